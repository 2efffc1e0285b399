package server

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"time"
)

// listenAdmin listens on a Unix socket that only our own user can open.
func listenAdmin(path string) (net.Listener, error) {
	dir := filepath.Dir(path)
	if fi, err := os.Stat(dir); err != nil {
		return nil, fmt.Errorf("admin socket: %w", err)
	} else if fi.Mode().Perm()&0o022 != 0 && fi.Mode()&os.ModeSticky == 0 {
		return nil, fmt.Errorf("admin socket: %s has mode %04o: %w", dir, fi.Mode().Perm(), ErrShared)
	}
	if err := removeStale(path); err != nil {
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

// removeStale removes a socket that a server of ours left behind. Anything
// else in the way is an error.
func removeStale(path string) error {
	fi, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if fi.Mode()&os.ModeSocket == 0 {
		return fmt.Errorf("%s %w", path, ErrNotSocket)
	}
	if err := ownedByUs(path, fi); err != nil {
		return err
	}
	if c, err := net.DialTimeout("unix", path, time.Second); err == nil {
		c.Close()
		return fmt.Errorf("%s: %w", path, ErrInUse)
	}
	return os.Remove(path)
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
