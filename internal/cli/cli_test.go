package cli

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
)

func TestReport(t *testing.T) {
	base := errors.New("no such socket")
	for _, c := range []struct {
		name string
		err  error
		code int
		out  string
	}{
		{"nil", nil, ExitOK, ""},
		{"plain", base, ExitInternal, "error: no such socket\n"},
		{"hint keeps internal", Hint(base, "start the agent"), ExitInternal, "error: no such socket\nhint: start the agent\n"},
		{"hint keeps code", Hint(Fail(ExitPolicy, base, ""), "do"), ExitPolicy, "error: no such socket\nhint: do\n"},
		{"wrapped", fmt.Errorf("ask: %w", Fail(ExitCrypto, base, "why")), ExitCrypto, "error: ask: no such socket\nhint: why\n"},
		{"inner hint", Fail(ExitPolicy, Hint(base, "inner"), ""), ExitPolicy, "error: no such socket\nhint: inner\n"},
		{"a stranger's words", errors.New("signal \x1b[2J\r\u202e\u009b31mVERIFIED\nhint: ünder"), ExitInternal,
			"error: signal \\u001b[2J\\u000d\\u202e\\u009b31mVERIFIED\n  hint: ünder\n"},
		{"usage", Usage("see --help", "bad %s", "flag"), ExitUsage, "error: bad flag\nhint: see --help\n"},
	} {
		t.Run(c.name, func(t *testing.T) {
			var b bytes.Buffer
			if code := Report(&b, c.err); code != c.code || b.String() != c.out {
				t.Errorf("code %d out %q, want %d %q", code, b.String(), c.code, c.out)
			}
		})
	}
}

func TestWriteFileLeavesNothingBehindOnFailure(t *testing.T) {
	dir := t.TempDir()
	// A directory in the way makes the rename fail after the data was written.
	path := filepath.Join(dir, "out")
	if err := os.Mkdir(path, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := WriteFile(path, []byte("x"), 0o600); err == nil {
		t.Fatal("wrote over a directory")
	}
	names, err := os.ReadDir(dir)
	if err != nil || len(names) != 1 {
		t.Fatalf("left %v behind (%v)", names, err)
	}
}

func TestWriteFileReplaces(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	for _, s := range []string{"one", "two"} {
		if err := WriteFile(path, []byte(s), 0o600); err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(path)
		if err != nil || string(b) != s {
			t.Fatalf("%q, %v", b, err)
		}
	}
	fi, err := os.Stat(path)
	if err != nil || fi.Mode().Perm() != 0o600 {
		t.Fatalf("%v %v", fi.Mode(), err)
	}
}
