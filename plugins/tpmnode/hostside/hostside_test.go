package hostside

import (
	"bytes"
	"encoding/json"
	"log/slog"
	"slices"
	"testing"

	"github.com/hashicorp/go-hclog"
)

func TestLoggerKeepsLevelsAndAttributes(t *testing.T) {
	for _, tt := range []struct {
		host hclog.Level
		want []string
	}{
		{hclog.Debug, []string{"debug", "info", "warn", "error"}},
		{hclog.Info, []string{"info", "warn", "error"}},
	} {
		var out bytes.Buffer
		log := Logger(hclog.New(&hclog.LoggerOptions{Output: &out, JSONFormat: true, Level: tt.host})).With("tpm", "one")
		log.Debug("d", "n", 1<<60)
		log.Info("i", "n", 1<<60)
		log.Warn("w", "n", 1<<60)
		log.Error("e", "n", 1<<60)
		var levels []string
		for line := range bytes.Lines(out.Bytes()) {
			var m map[string]any
			if err := json.Unmarshal(line, &m); err != nil {
				t.Fatal(err)
			}
			if m["n"] != "1152921504606846976" || m["tpm"] != "one" {
				t.Errorf("%s", line)
			}
			levels = append(levels, m["@level"].(string))
		}
		if !slices.Equal(levels, tt.want) {
			t.Errorf("host at %s: %v", tt.host, levels)
		}
	}
}

func TestLoggerGroupsByName(t *testing.T) {
	var out bytes.Buffer
	Logger(hclog.New(&hclog.LoggerOptions{Name: "plugin", Output: &out, Level: hclog.Info})).WithGroup("keeper").Log(t.Context(), slog.LevelInfo, "hello")
	if !bytes.Contains(out.Bytes(), []byte("plugin.keeper: hello")) {
		t.Errorf("%s", out.Bytes())
	}
}

func TestStringList(t *testing.T) {
	for _, tt := range []struct {
		in   any
		want []string
		bad  bool
	}{
		{nil, nil, false},
		{"", nil, false},
		{"a", []string{"a"}, false},
		{[]any{"a", "b"}, []string{"a", "b"}, false},
		{[]any{}, nil, false},
		{[]any{"a", ""}, nil, true},
		{[]any{1}, nil, true},
		{7, nil, true},
		{map[string]any{}, nil, true},
	} {
		got, err := StringList("key", tt.in)
		if (err != nil) != tt.bad || !slices.Equal(got, tt.want) {
			t.Errorf("%#v: %v, %v", tt.in, got, err)
		}
	}
}
