package swtpmtest

import (
	"bufio"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"
)

const envDie = "SWTPMTEST_DIE"

// TestHoldTPM is no test but what TestNothingOutlivesAKilledTest kills.
func TestHoldTPM(t *testing.T) {
	if os.Getenv(envDie) == "" {
		return
	}
	s := Start(t)
	os.Stdout.WriteString("HELD " + s.Socket() + "\n")
	select {}
}

// A killed test, or one whose time is up, runs no cleanup. Software TPMs that
// stay behind were seen to run for hours.
func TestNothingOutlivesAKilledTest(t *testing.T) {
	t.Parallel()
	for _, how := range []syscall.Signal{syscall.SIGKILL, syscall.SIGQUIT} {
		cmd := exec.Command(os.Args[0], "-test.run=^TestHoldTPM$", "-test.timeout=5m")
		cmd.Env = append(os.Environ(), envDie+"=1", "TMPDIR="+t.TempDir())
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		socket := ""
		for lines := bufio.NewScanner(out); socket == "" && lines.Scan(); {
			socket, _ = strings.CutPrefix(lines.Text(), "HELD ")
		}
		if _, err := os.Stat(socket); err != nil {
			t.Error(err)
		}
		if err := cmd.Process.Signal(how); err != nil {
			t.Error(err)
		}
		cmd.Wait()
		dir := strings.TrimSuffix(socket, "/s")
		gone := func() bool { _, err := os.Stat(dir); return errors.Is(err, fs.ErrNotExist) }
		for end := time.Now().Add(20 * time.Second); !gone() && time.Now().Before(end); {
			time.Sleep(5 * time.Millisecond) // nothing announces it: whoever could is dead
		}
		if !gone() {
			t.Errorf("after %v: %s is still there", how, dir)
		}
	}
}
