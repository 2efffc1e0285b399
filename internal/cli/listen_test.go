package cli

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

func TestClearStaleSocket(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "s")
	if err := ClearStaleSocket(path); err != nil {
		t.Errorf("nothing there: %v", err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path})
	if err != nil {
		t.Fatal(err)
	}
	if err := ClearStaleSocket(path); !errors.Is(err, ErrSocketInUse) {
		t.Errorf("somebody listens: %v", err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	if err := ClearStaleSocket(path); err != nil {
		t.Errorf("a leftover: %v", err)
	}
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("it is still there: %v", err)
	}
	if err := ClearStaleSocket(dir); !errors.Is(err, ErrNotSocket) {
		t.Errorf("a directory: %v", err)
	}
}

// TestBusyDaemonKeepsItsSocket: a daemon that has more callers than it can take
// in refuses none; its socket must not pass for a leftover.
func TestBusyDaemonKeepsItsSocket(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := errors.Join(unix.Bind(fd, &unix.SockaddrUnix{Name: path}), unix.Listen(fd, 0)); err != nil {
		t.Fatal(err)
	}
	first, err := net.Dial("unix", path) // fills the queue
	if err != nil {
		t.Fatal(err)
	}
	defer first.Close()
	if err := ClearStaleSocket(path); err == nil {
		t.Error("a busy daemon's socket passed for a leftover")
	}
	if _, err := os.Lstat(path); err != nil {
		t.Error(err)
	}
}
