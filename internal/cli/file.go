package cli

import (
	"fmt"
	"os"
	"path/filepath"
)

// WriteFile writes data to path so that path holds either what it held before
// or all of data: a temporary file in the same directory, synced, then renamed.
func WriteFile(path string, data []byte, perm os.FileMode) (err error) {
	dir := filepath.Dir(path)
	f, err := os.CreateTemp(dir, "."+filepath.Base(path)+".*")
	if err != nil {
		return err
	}
	tmp := f.Name()
	defer func() {
		if err != nil {
			f.Close() // a second Close is harmless
			os.Remove(tmp)
		}
	}()
	if err = f.Chmod(perm); err != nil {
		return err
	}
	if _, err = f.Write(data); err != nil {
		return err
	}
	if err = f.Sync(); err != nil {
		return err
	}
	if err = f.Close(); err != nil {
		return err
	}
	if err = os.Rename(tmp, path); err != nil {
		return err
	}
	// Past this point path holds all of data and there is nothing to undo;
	// without the directory's own sync a power cut could still lose the name.
	if e := SyncDir(dir); e != nil {
		return fmt.Errorf("%s is written but may not survive a power cut: %w", path, e)
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
