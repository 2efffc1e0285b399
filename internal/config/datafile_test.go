package config

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/rootlink/rootlink/internal/cli"
)

// write makes a configuration file whose one plugin names data as its
// plugin_data_file.
func write(t *testing.T, data string) (conf, dataFile string) {
	t.Helper()
	dir := t.TempDir()
	conf, dataFile = filepath.Join(dir, "server.conf"), filepath.Join(dir, "tpmnode.conf")
	if err := os.WriteFile(dataFile, []byte(data), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(conf, []byte("plugins {\n  NodeAttestor \"tpmnode\" {\n    plugin_data_file = \""+dataFile+"\"\n  }\n}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return conf, dataFile
}

func TestPluginDataOfAFileOfItsOwn(t *testing.T) {
	t.Setenv("ROOTS", "p.pem")
	conf, data := write(t, "# whose are $NOBODYS\nek_roots = [\"$ROOTS\"]\n")
	f, err := Load(conf, true)
	if err != nil {
		t.Fatal(err)
	}
	p := f.Plugins()[0]
	if p.DataFile != data || p.Data != "# whose are $NOBODYS\nek_roots = [\"p.pem\"]\n" {
		t.Errorf("%+v", p)
	}
	var v values
	if err := f.ApplyPlugins(flagSet(&v), map[string][]string{"NodeAttestor tpmnode": {"ek_roots"}}); err != nil || !slices.Equal(v.roots, []string{"p.pem"}) {
		t.Errorf("%v, %v", v.roots, err)
	}
	// It is what the file says now that counts.
	if err := os.WriteFile(data, []byte("ek_roots = [\"q.pem\"]"), 0o600); err != nil {
		t.Fatal(err)
	}
	again, err := Load(conf, false)
	if err != nil || again.Plugins()[0].SameData(p) {
		t.Errorf("the change went unseen: %v", err)
	}
}

func TestRefusesPluginDataFiles(t *testing.T) {
	t.Setenv("TWO_LINES", "a\nb = 1")
	for _, tt := range []struct {
		name, data string
		line       int
		want       string
	}{
		{"syntax", "\na = }", 2, ""},
		{"unknown key", "ek_roots = [\"a\"]\n\nek_root = 1\n", 3, `unknown key "ek_root"`},
		{"a variable that is not set", "\nek_roots = [\"${ROOTLINK_TEST_UNSET}\"]", 2, "is not set"},
		{"a variable that writes keys", "ek_roots = [\"$TWO_LINES\"]", 1, "could change"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			conf, data := write(t, tt.data)
			f, err := Load(conf, true)
			if err == nil {
				err = f.ApplyPlugins(flagSet(&values{}), map[string][]string{"NodeAttestor tpmnode": {"ek_roots"}})
			}
			e, ok := errors.AsType[*Error](err)
			if !ok || e.Path != data || e.Line != tt.line || !strings.Contains(e.Msg, tt.want) || cli.ExitCode(err) != cli.ExitUsage {
				t.Errorf("%v, want %s:%d", err, data, tt.line)
			}
		})
	}
	t.Run("too large", func(t *testing.T) {
		conf, _ := write(t, strings.Repeat("#", maxFile+1))
		if _, err := Load(conf, false); err == nil || !strings.Contains(cli.HintOf(err), `plugin_data_file of NodeAttestor "tpmnode"`) {
			t.Errorf("%v, hint %q", err, cli.HintOf(err))
		}
	})
	t.Run("missing", func(t *testing.T) {
		conf, data := write(t, "")
		if err := os.Remove(data); err != nil {
			t.Fatal(err)
		}
		if _, err := Load(conf, false); !errors.Is(err, os.ErrNotExist) || !strings.Contains(cli.HintOf(err), conf+":2") {
			t.Errorf("%v, hint %q", err, cli.HintOf(err))
		}
	})
	for _, both := range []string{
		"plugin_data {}\n plugin_data_file = \"x\"", "plugin_data_file = \"x\"\n plugin_data {}", "plugin_data_file = \"\"",
	} {
		if _, err := Parse("x", []byte("plugins {\n A \"b\" {\n"+both+"}\n}")); err == nil {
			t.Errorf("accepted: %s", both)
		}
	}
}
