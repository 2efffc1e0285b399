package cli

import (
	"errors"
	"net"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/rootlink/rootlink/internal/needs"
)

// listenAs binds path and listens with another uid, which needs root: the
// kernel shows a listener's peers the credentials of the thread that called
// listen.
func listenAs(t *testing.T, path string, uid uintptr) {
	t.Helper()
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	if err := unix.Bind(fd, &unix.SockaddrUnix{Name: path}); err != nil {
		t.Fatal(err)
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	const keep = ^uintptr(0)
	if _, _, e := unix.RawSyscall(unix.SYS_SETRESUID, keep, uid, keep); e != 0 {
		t.Fatal(e)
	}
	err = unix.Listen(fd, 1)
	if _, _, e := unix.RawSyscall(unix.SYS_SETRESUID, keep, 0, keep); e != 0 {
		panic(e) // this thread would go on as somebody else
	}
	if err != nil {
		t.Fatal(err)
	}
}

// Whoever binds the admin socket's path first could hand a forged trust.json
// to the person who asks the server for it.
func TestRefusesASocketThatAnotherUserListensOn(t *testing.T) {
	needs.Root(t)
	path := filepath.Join(t.TempDir(), "s")
	listenAs(t, path, 65534)
	s := Socket{Path: path, Daemon: "prog-server", OwnOnly: true}
	_, err := s.Dial(t.Context())
	if !errors.Is(err, ErrForeignSocket) || !strings.Contains(HintOf(err), "run this command as that user too") {
		t.Errorf("%v, hint %q", err, HintOf(err))
	}
	// The Workload API's socket is for everybody and an agent may run as any user.
	s.OwnOnly = false
	c, err := s.Dial(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
}

func TestDialAcceptsOurOwnSocket(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for _, prefix := range []string{"", "unix:", "unix://"} {
		c, err := Socket{Path: prefix + path, OwnOnly: true}.Dial(t.Context())
		if err != nil {
			t.Fatalf("%s: %v", prefix, err)
		}
		c.Close()
	}
}
