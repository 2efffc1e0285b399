// Package stories runs the user stories end to end: real binaries, a real
// software TPM per script. Each testdata/*.txt is one story, headed by why it
// exists. Commands of the scripts beyond testscript's own are in world_test.go.
package stories

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
)

// binDir holds the programs under test, helperDir what the stories use beside them.
var binDir, helperDir string

func TestMain(m *testing.M) {
	code, err := buildAndRun(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, "stories:", err)
		code = 1
	}
	os.Exit(code)
}

// buildAndRun takes the programs that ROOTLINK_BIN names (make test has just
// built them) or builds them itself. The stories' own helpers it always builds.
func buildAndRun(m *testing.M) (int, error) {
	tmp, err := os.MkdirTemp("", "rootlink-bin-")
	if err != nil {
		return 1, err
	}
	defer os.RemoveAll(tmp)
	helperDir, binDir = tmp, os.Getenv("ROOTLINK_BIN")
	if binDir == "" {
		binDir = tmp
		for name, pkg := range map[string]string{"rootlink-server": "./cmd/server", "rootlink-agent": "./cmd/agent", "rootlink": "./cmd/rootlink"} {
			if err := build(name, pkg); err != nil {
				return 1, err
			}
		}
	}
	for name, pkg := range map[string]string{"resign": "./examples/resign", "borrow": "./swtpm-tests/borrow"} {
		if err := build(name, pkg); err != nil {
			return 1, err
		}
	}
	return m.Run(), nil
}

func build(name, pkg string) error {
	cmd := exec.Command("go", "build", "-trimpath", "-o", filepath.Join(helperDir, name), pkg)
	cmd.Dir = ".."
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if text, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("go build %s: %w\n%s", pkg, err, text)
	}
	return nil
}

func TestStories(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txt")
	if err != nil {
		t.Fatal(err)
	}
	if len(files) == 0 {
		t.Fatal("no stories: testdata is empty")
	}
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			t.Parallel() // each has a TPM, a server and directories of its own
			w := newWorld(t)
			testscript.Run(t, testscript.Params{
				Files:               []string{file},
				Setup:               w.setup,
				Cmds:                w.commands(),
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
