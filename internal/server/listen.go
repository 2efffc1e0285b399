package server

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"

	"github.com/rootlink/rootlink/internal/cli"
)

// listenAdmin listens on a Unix socket that only our own user can open.
func listenAdmin(path string) (net.Listener, error) {
	dir := filepath.Dir(path)
	if fi, err := os.Stat(dir); err != nil {
		return nil, fmt.Errorf("admin socket: %w", err)
	} else if fi.Mode().Perm()&0o022 != 0 && fi.Mode()&os.ModeSticky == 0 {
		return nil, fmt.Errorf("admin socket: %s has mode %04o: %w", dir, fi.Mode().Perm(), ErrShared)
	}
	switch err := cli.ClearStaleSocket(path); {
	case errors.Is(err, cli.ErrSocketInUse):
		return nil, fmt.Errorf("admin socket %s: %w", path, ErrInUse)
	case errors.Is(err, cli.ErrNotSocket):
		return nil, fmt.Errorf("admin socket: %s %w", path, ErrNotSocket)
	case errors.Is(err, cli.ErrForeignSocket):
		return nil, fmt.Errorf("admin socket %s: %w", path, ErrForeignOwner)
	case err != nil:
		return nil, fmt.Errorf("admin socket: %w", err)
	}
	// bind makes the socket with the umask's mode, and the umask belongs to
	// the whole process. Bound in a private directory and renamed, it is never
	// open to others, not for a moment.
	private, err := os.MkdirTemp(dir, ".s*")
	if err != nil {
		return nil, fmt.Errorf("admin socket: %w", err)
	}
	defer os.RemoveAll(private)
	// Through a descriptor the path is short, however long that of dir is.
	d, err := os.Open(private)
	if err != nil {
		return nil, fmt.Errorf("admin socket: %w", err)
	}
	defer d.Close()
	tmp := fmt.Sprintf("/proc/self/fd/%d/s", d.Fd())
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: tmp, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("admin socket: %w", err)
	}
	l.SetUnlinkOnClose(false)
	if err := errors.Join(os.Chmod(tmp, 0o600), os.Rename(tmp, path)); err != nil {
		l.Close()
		return nil, fmt.Errorf("admin socket: %w", err)
	}
	fi, err := os.Lstat(path)
	if err != nil {
		l.Close()
		return nil, fmt.Errorf("admin socket: %w", err)
	}
	return &adminListener{l, path, fi}, nil
}

// adminListener removes its socket on Close, if it is still its own.
type adminListener struct {
	*net.UnixListener
	path string
	made os.FileInfo
}

func (l *adminListener) Close() error {
	if fi, err := os.Lstat(l.path); err == nil && os.SameFile(fi, l.made) {
		os.Remove(l.path)
	}
	return l.UnixListener.Close()
}
