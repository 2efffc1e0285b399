package cli

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"syscall"
	"time"
)

// Why a socket's path cannot be taken; also ErrForeignSocket.
var (
	ErrNotSocket   = errors.New("exists and is not a socket")
	ErrSocketInUse = errors.New("another process is serving the socket")
)

// ClearStaleSocket removes the socket that a daemon of this user left behind
// when it crashed. Only a refused connection shows that nobody listens: one that
// takes too long may be that of a daemon with much to do.
func ClearStaleSocket(path string) error {
	st, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if st.Mode().Type() != fs.ModeSocket {
		return fmt.Errorf("%s %w", path, ErrNotSocket)
	}
	if owner := st.Sys().(*syscall.Stat_t).Uid; int(owner) != os.Geteuid() {
		return fmt.Errorf("%s: %w: uid %d, we are %d", path, ErrForeignSocket, owner, os.Geteuid())
	}
	c, err := net.DialTimeout("unix", path, time.Second)
	if err == nil {
		c.Close()
		return fmt.Errorf("%s: %w", path, ErrSocketInUse)
	}
	if !errors.Is(err, syscall.ECONNREFUSED) && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("stale socket: %w", err)
	}
	return nil
}
