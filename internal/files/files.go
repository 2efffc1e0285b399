// Package files writes files whole or not at all, reads them with a bound, and
// locks directories against a second process.
package files

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"
)

// File is an output that appears under its name only when Commit succeeds.
// Deferring Close right after Create leaves nothing behind on any other way out.
type File struct {
	*os.File
	path string // the final name, symbolic links resolved
	temp string // "" when the target is a device or pipe and is written in place
	once sync.Once
}

// Create opens a temporary file beside path. A target that exists and is not a
// regular file (/dev/stdout, a FIFO) is written in place: renaming over it
// would replace a device node.
func Create(path string, perm fs.FileMode) (*File, error) {
	if real, err := filepath.EvalSymlinks(path); err == nil {
		path = real
	}
	if st, err := os.Stat(path); err == nil {
		if st.IsDir() {
			return nil, fmt.Errorf("%s is a directory: %w", path, unix.EISDIR)
		}
		if !st.Mode().IsRegular() {
			f, err := os.OpenFile(path, os.O_WRONLY, 0)
			return &File{File: f, path: path}, err
		}
	}
	dir, base := filepath.Split(path)
	if dir == "" {
		dir = "."
	}
	f, err := os.CreateTemp(dir, "."+base+".tmp*")
	if err != nil {
		if e, ok := errors.AsType[*fs.PathError](err); ok {
			err = &fs.PathError{Op: "create", Path: path, Err: e.Err} // not the temporary name, which says nothing to anybody
		}
		return nil, err
	}
	out := &File{File: f, path: path, temp: f.Name()}
	if err := f.Chmod(perm); err != nil {
		out.Close()
		return nil, err
	}
	return out, nil
}

// Commit makes the file durable under its name.
func (f *File) Commit() (err error) {
	defer func() { err = errors.Join(err, f.Close()) }()
	if f.temp == "" {
		return nil
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if err := os.Rename(f.temp, f.path); err != nil {
		return err
	}
	f.temp = ""
	// Past this point path holds all of the data and there is nothing to undo;
	// without the directory's own sync a power cut could still lose the name.
	if err := syncDir(filepath.Dir(f.path)); err != nil {
		return fmt.Errorf("%s is written but may not survive a power cut: %w", f.path, err)
	}
	return nil
}

// Close removes the temporary file unless Commit has succeeded. Calling it
// again does nothing.
func (f *File) Close() (err error) {
	f.once.Do(func() {
		err = f.File.Close()
		if f.temp != "" {
			err = errors.Join(err, os.Remove(f.temp))
		}
	})
	return err
}

// Write writes data to path by temporary file, fsync and rename.
func Write(path string, data []byte, perm fs.FileMode) error {
	f, err := Create(path, perm)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.Write(data); err != nil {
		return err
	}
	return f.Commit()
}

// WriteNew is Write for a file that must not exist yet: no key is ever
// overwritten.
func WriteNew(path string, data []byte, perm fs.FileMode) error {
	dir, base := filepath.Split(path)
	f, err := os.CreateTemp(filepath.Clean(dir), "."+base+".tmp*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // its second name, once linked
	defer f.Close()
	if err := f.Chmod(perm); err != nil {
		return err
	}
	if _, err := f.Write(data); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	// A link fails where a rename would replace.
	if err := os.Link(f.Name(), path); err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}

// syncDir makes the names in dir durable.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// ErrTooLarge means that a file holds more than its reader takes.
var ErrTooLarge = errors.New("over the size limit")

// Read reads at most limit bytes; a longer file is ErrTooLarge, not a prefix.
// The limit is met while reading: files of /proc and securityfs have no size.
func Read(path string, limit int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return ReadAll(f, path, limit)
}

// ReadAll is Read of a stream; name is for messages.
func ReadAll(r io.Reader, name string, limit int64) ([]byte, error) {
	b, err := io.ReadAll(io.LimitReader(r, limit+1))
	if err != nil {
		return nil, err
	}
	if int64(len(b)) > limit {
		return nil, fmt.Errorf("%s: %w of %d bytes", name, ErrTooLarge, limit)
	}
	return b, nil
}

// SHA256 is the digest of what a file holds, however much that is.
func SHA256(path string) (sum [sha256.Size]byte, err error) {
	f, err := os.Open(path)
	if err != nil {
		return sum, err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return sum, err
	}
	h.Sum(sum[:0])
	return sum, nil
}

// ErrLocked means that another process holds a lock.
var ErrLocked = errors.New("in use by another process")

// Lock makes the file at path and holds it against other processes until it is
// closed, or the process dies, however it dies. The file stays: removing it
// would let two processes lock two files of one name.
func Lock(path string) (*os.File, error) {
	return lock(path, unix.LOCK_EX|unix.LOCK_NB)
}

// LockWait is Lock for what is held only for moments: it waits instead of
// failing with ErrLocked.
func LockWait(path string) (*os.File, error) {
	return lock(path, unix.LOCK_EX)
}

func lock(path string, how int) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	for err = unix.EINTR; errors.Is(err, unix.EINTR); {
		err = unix.Flock(int(f.Fd()), how)
	}
	if err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("%s: %w", path, ErrLocked)
		}
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	return f, nil
}
