package cli

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
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
			return nil, Hint(fmt.Errorf("%s is a directory", path), "name a file in it")
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
	if err := SyncDir(filepath.Dir(f.path)); err != nil {
		return fmt.Errorf("%s is written but may not survive a power cut: %w", f.path, err)
	}
	return nil
}

// SyncDir makes the names in dir durable.
func SyncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
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

// WriteFile writes data to path by temporary file, fsync and rename.
func WriteFile(path string, data []byte, perm fs.FileMode) error {
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

// ReadFile reads at most limit bytes; a longer file is an error, not a prefix.
// "-" is standard input.
func ReadFile(path string, limit int64) ([]byte, error) {
	in := os.Stdin
	if path != "-" {
		f, err := os.Open(path)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		in = f
	}
	b, err := io.ReadAll(io.LimitReader(in, limit+1))
	if err != nil {
		return nil, err
	}
	if int64(len(b)) > limit {
		return nil, fmt.Errorf("%s is larger than %d bytes", path, limit)
	}
	return b, nil
}
