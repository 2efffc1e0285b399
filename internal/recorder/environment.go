package recorder

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/rootlink/rootlink/pkg/link"
)

// recordedVariables change what a build makes of the same inputs. A name that
// ends in * is a prefix. Nothing else is recorded unless it is asked for:
// environments are where secrets live.
var recordedVariables = []string{
	"AR", "AS", "CARGO_BUILD_TARGET", "CC", "CFLAGS", "CGO_*", "CLASSPATH", "CPATH", "CPPFLAGS", "CXX", "CXXFLAGS",
	"GOAMD64", "GOARCH", "GOARM", "GOARM64", "GOCACHE", "GOCACHEPROG", "GODEBUG", "GOENV", "GOEXPERIMENT", "GOFIPS140", "GOFLAGS", "GOMODCACHE", "GOOS", "GOPATH", "GOPROXY", "GOROOT",
	"GOSUMDB", "GOTOOLCHAIN", "GOWORK", "GONOSUMDB", "GONOSUMCHECK", "JAVA_HOME", "JAVA_TOOL_OPTIONS", "LANG", "LC_ALL", "LD",
	"LDFLAGS", "LD_*", "LIBRARY_PATH", "MAKEFLAGS", "NODE_OPTIONS", "PATH", "PKG_CONFIG_PATH", "PYTHONHASHSEED", "PYTHONPATH",
	"RUSTC", "RUSTC_WRAPPER", "RUSTFLAGS", "SOURCE_DATE_EPOCH", "TZ",
}

const maxVariable = 16 << 10 // bytes of one value

// credentials matches the userinfo of a URL: tokens live there too.
var credentials = regexp.MustCompile(`://[^/@\s]+@`)

func redact(s string) string { return credentials.ReplaceAllString(s, "://REDACTED@") }

// variables picks what is recorded of env.
func variables(env, extra []string) map[string]string {
	out := map[string]string{}
	for _, kv := range env {
		k, v, ok := strings.Cut(kv, "=")
		if !ok || !recorded(k, extra) || len(v) > maxVariable {
			continue
		}
		out[k] = strings.ToValidUTF8(redact(v), "\uFFFD")
	}
	return out
}

func recorded(name string, extra []string) bool {
	if slices.Contains(extra, name) {
		return true
	}
	return slices.ContainsFunc(recordedVariables, func(p string) bool {
		prefix, wild := strings.CutSuffix(p, "*")
		return wild && strings.HasPrefix(name, prefix) || name == p
	})
}

// environment says where the step runs.
func environment(env, extra []string, version string) link.Environment {
	e := link.Environment{
		Variables: variables(env, extra),
		OS:        runtime.GOOS,
		Arch:      runtime.GOARCH,
		Recorder:  "rootlink " + version,
	}
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		e.Kernel = unix.ByteSliceToString(u.Release[:])
	}
	if h, err := os.Hostname(); err == nil {
		e.Hostname = h
	}
	if wd, err := os.Getwd(); err == nil {
		e.WorkDir = strings.ToValidUTF8(wd, "\uFFFD")
	}
	return e
}

const gitTimeout = 20 * time.Second // for all of git's answers about a large tree

// gitState asks git for the state of the working tree, nil outside of one or
// without git. The configuration of a tree can name programs to run; those
// that these commands would start are switched off.
func gitState(ctx context.Context) *link.Git {
	if !inGitTree() {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, gitTimeout)
	defer cancel()
	git := func(args ...string) (string, bool) {
		c := exec.CommandContext(ctx, "git", append([]string{"-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null"}, args...)...)
		c.Env = append(os.Environ(), "GIT_OPTIONAL_LOCKS=0", "GIT_TERMINAL_PROMPT=0", "LC_ALL=C")
		out, err := c.Output()
		return string(bytes.TrimSpace(out)), err == nil
	}
	g := &link.Git{}
	if commit, ok := git("rev-parse", "--verify", "HEAD"); ok {
		g.Commit = commit
	}
	if remote, ok := git("config", "--get", "remote.origin.url"); ok {
		g.Remote = strings.ToValidUTF8(redact(remote), "\uFFFD")
	}
	if changes, ok := git("status", "--porcelain", "--untracked-files=normal"); ok {
		dirty := changes != ""
		g.Dirty = &dirty
	}
	if *g == (link.Git{}) {
		return nil
	}
	return g
}

// inGitTree saves starting git where it has nothing to say.
func inGitTree() bool {
	dir, err := os.Getwd()
	if err != nil {
		return false
	}
	for {
		if _, err := os.Lstat(filepath.Join(dir, ".git")); err == nil {
			return true
		}
		up := filepath.Dir(dir)
		if up == dir {
			return false
		}
		dir = up
	}
}
