// Package story runs end-to-end scripts: real programs, a real software TPM per
// script. The commands of the scripts beyond testscript's own are in world.go
// and commands.go. Only tests import it.
package story

import (
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
)

const module = "github.com/rootlink/rootlink"

// Command is a command of the scripts.
type Command = func(ts *testscript.TestScript, neg bool, args []string)

// Programs says where the programs under test are, and what scripts use beside
// them.
type Programs struct {
	Bin, Helpers string
}

// Build takes the programs that ROOTLINK_BIN names (make test has just built
// them) or builds them itself from the source tree at root. The helpers, name →
// package, it always builds. The returned function removes what it built.
func Build(root string, helpers map[string]string) (Programs, func(), error) {
	tmp, err := os.MkdirTemp("", "rootlink-bin-")
	if err != nil {
		return Programs{}, nil, err
	}
	remove := func() { os.RemoveAll(tmp) }
	p := Programs{Bin: os.Getenv("ROOTLINK_BIN"), Helpers: tmp}
	all := map[string]string{}
	if p.Bin == "" {
		p.Bin = tmp
		maps.Copy(all, map[string]string{"rootlink-server": module + "/cmd/server", "rootlink-agent": module + "/cmd/agent", "rootlink": module + "/cmd/rootlink"})
	}
	maps.Copy(all, helpers)
	for name, pkg := range all {
		cmd := exec.Command("go", "build", "-trimpath", "-o", filepath.Join(tmp, name), pkg)
		cmd.Dir = root
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if text, err := cmd.CombinedOutput(); err != nil {
			remove()
			return Programs{}, nil, fmt.Errorf("go build %s: %w\n%s", pkg, err, text)
		}
	}
	return p, remove, nil
}

// Main builds, runs the package's tests with use told where the programs are,
// and ends the process.
func Main(m *testing.M, root string, helpers map[string]string, use func(Programs)) {
	p, remove, err := Build(root, helpers)
	if err != nil {
		fmt.Fprintln(os.Stderr, "stories:", err)
		os.Exit(1)
	}
	use(p)
	code := m.Run()
	remove()
	os.Exit(code)
}

// Run runs each script that matches the pattern as a parallel subtest, with
// these commands more.
func (p Programs) Run(t *testing.T, pattern string, more map[string]Command) {
	files, err := filepath.Glob(pattern)
	if err != nil {
		t.Fatal(err)
	}
	if len(files) == 0 {
		t.Fatalf("no stories: nothing matches %s", pattern)
	}
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			t.Parallel() // each has a TPM, a server and directories of its own
			w := newWorld(t, p)
			commands := w.commands()
			maps.Copy(commands, more)
			testscript.Run(t, testscript.Params{
				Files:               []string{file},
				Setup:               w.setup,
				Cmds:                commands,
				RequireExplicitExec: true,
				RequireUniqueNames:  true,
				Condition:           condition,
				// To see all that is wrong with a story at once.
				ContinueOnError: os.Getenv("STORIES_CONTINUE") != "",
			})
		})
	}
}

// condition: [root] is whether the stories run as root; what only root can
// show (another user's files, a full file system, a setgid recorder) is behind it.
func condition(name string) (bool, error) {
	if name == "root" {
		return os.Geteuid() == 0, nil
	}
	return false, fmt.Errorf("unknown condition %q", name)
}
