package swtpmtest

import (
	"os"
	"os/exec"
	"strconv"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// AtDeath has a shell script run, with args as $1 and on, if this process dies
// before the test has ended: killed, or by a panic such as that of a timeout,
// after which no cleanup runs. Call it before the clean-up that it stands in
// for is registered, so that it watches over that one too.
func AtDeath(t testing.TB, script string, args ...string) {
	t.Helper()
	endWithGo()
	// The read ends with a line from us, or at the end of the pipe, whose other
	// end nobody holds but us.
	cmd := exec.Command("sh", append([]string{"-c", "read _ && exit 0\n" + script, "sh"}, args...)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // ^C is not for it
	pipe, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if _, err := pipe.Write([]byte("\n")); err != nil {
			t.Errorf("dismiss the guard: %v", err)
		}
		if err := cmd.Wait(); err != nil {
			t.Errorf("the guard: %v", err)
		}
	})
}

// endWithGo ends this process when the go command that started it is killed,
// which leaves test binaries running until their own timeout.
var endWithGo = sync.OnceFunc(func() {
	parent := os.Getppid()
	name, err := os.ReadFile("/proc/" + strconv.Itoa(parent) + "/comm")
	if err != nil || string(name) != "go\n" {
		return // a shell may well end before what it started
	}
	fd, err := unix.PidfdOpen(parent, 0)
	if err != nil || os.Getppid() != parent {
		return
	}
	go func() {
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		for {
			if n, err := unix.Poll(fds, -1); n > 0 || err != nil && err != unix.EINTR {
				break
			}
		}
		os.Exit(2)
	}()
})
