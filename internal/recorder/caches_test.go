package recorder

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/rootlink/rootlink/pkg/link"
)

// goCaches runs a shell that runs go, and returns what was recorded of its caches.
func goCaches(t *testing.T, env []string, script string) (got []link.Cache, gaps []string) {
	t.Helper()
	if _, err := exec.LookPath("go"); err != nil {
		t.Fatal(err)
	}
	r := &state{Step: &Step{Stderr: os.Stderr}}
	for _, kv := range env {
		k, v, _ := strings.Cut(kv, "=")
		t.Setenv(k, v)
	}
	env = os.Environ()
	r.watch(env)
	if _, err := Run(Command{Path: "/bin/sh", Args: []string{"sh", "-c", script}, Env: env, Stdin: os.Stdin, Stdout: os.Stderr, Stderr: os.Stderr, Tree: r.tree},
		func(*Exec) error { return nil }); err != nil {
		t.Fatal(err)
	}
	_, gaps = r.tree.Result()
	return r.caches.list(), gaps
}

func TestCachesOfTheGoCommand(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	write(t, at("full/x"), "x")
	write(t, at("home/.config/go/env"), "GOMODCACHE="+at("configured")+"\n")
	env := []string{"HOME=" + at("home"), "XDG_CACHE_HOME=", "XDG_CONFIG_HOME=", "GOCACHE=", "GOMODCACHE=", "GOPATH=", "GOENV=", "GOFLAGS=", "CCACHE_DIR=" + at("full")}
	got, gaps := goCaches(t, env, `go version; GOCACHE=`+at("full")+` GOPATH=`+at("path")+` GOENV=off go version`)
	complete(t, gaps)
	want := []link.Cache{
		{Name: "CCACHE_DIR", Path: at("full"), Reason: "it was not empty when the step first had it"},
		{Name: "GOCACHE", Path: at("home/.cache/go-build"), Fresh: true},
		{Name: "GOMODCACHE", Path: at("configured"), Fresh: true},
		{Name: "GOCACHE", Path: at("full"), Reason: "it was not empty when the step first had it"},
		{Name: "GOMODCACHE", Path: at("path/pkg/mod"), Fresh: true},
	}
	if !slices.Equal(got, want) {
		t.Errorf("got %+v", got)
	}
}

// A cache may be filled within the step, by a copy of go under another name.
func TestRefusesACacheFilledBeforeGoRan(t *testing.T) {
	dir := t.TempDir()
	path, err := exec.LookPath("go")
	if err != nil {
		t.Fatal(err)
	}
	if path, err = filepath.EvalSymlinks(path); err != nil {
		t.Fatal(err)
	}
	cache, other := filepath.Join(dir, "cache"), filepath.Join(dir, "other-name")
	got, _ := goCaches(t, []string{"GOCACHE=" + cache, "GOCACHEPROG=", "GOMODCACHE=" + filepath.Join(dir, "mod")},
		fmt.Sprintf("mkdir %s; echo poison >%s/x; cp %s %s; GOROOT=$(go env GOROOT) %s version", cache, cache, path, other, other))
	if len(got) == 0 || got[0].Name != "GOCACHE" || got[0].Fresh {
		t.Errorf("%+v", got)
	}
	// The copy alone, and a program that serves a cache.
	got, _ = goCaches(t, []string{"GOCACHE=" + cache, "GOCACHEPROG=serve it", "GOMODCACHE=" + filepath.Join(dir, "mod")},
		other+" version >/dev/null 2>&1; true")
	if len(got) != 3 || got[0].Name != "GOCACHEPROG" || got[0].Fresh || got[1].Fresh || !strings.Contains(got[0].Reason, "serves it") {
		t.Errorf("%+v", got)
	}
}
