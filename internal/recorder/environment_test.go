package recorder

import (
	"os"
	"path/filepath"
	"testing"
)

func TestGitState(t *testing.T) {
	t.Chdir(t.TempDir())
	if g := gitState(t.Context()); g != nil {
		t.Fatalf("the temporary directory is in a git tree: %+v", g)
	}
	git := func(args ...string) {
		t.Helper()
		st, err := record(os.Stdout, append([]string{"git", "-c", "user.name=x", "-c", "user.email=x@y"}, args...), func(*Exec) error { return nil })
		if err != nil || st.Code != 0 {
			t.Fatal(st, err)
		}
	}
	git("init", "-q")
	write(t, "f", "x")
	git("add", "f")
	git("commit", "-q", "-m", "x")
	git("remote", "add", "origin", "https://me:token@git.example/x")
	g := gitState(t.Context())
	if g == nil || len(g.Commit) != 40 || g.Remote != "https://REDACTED@git.example/x" || g.Dirty == nil || *g.Dirty {
		t.Fatalf("%+v", g)
	}
	// A tree's own configuration must not run programs.
	pwned := filepath.Join(t.TempDir(), "pwned")
	git("config", "core.fsmonitor", "touch "+pwned)
	write(t, "f", "y")
	if g := gitState(t.Context()); g.Dirty == nil || !*g.Dirty {
		t.Errorf("%+v", g)
	}
	if _, err := os.Stat(pwned); err == nil {
		t.Error("the tree's configuration ran a program")
	}
}
