package recorder

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// Lookup finds a program as execvp does, and so as env does: a name with a
// slash is a path, any other is searched in PATH; what is found but may not be
// executed is ErrNotExecutable only if nothing later can be.
func Lookup(name string, env []string) (string, error) {
	if name == "" {
		return "", fmt.Errorf("%q: %w", name, ErrNotFound)
	}
	if strings.Contains(name, "/") {
		return name, runnable(name)
	}
	path, ok := lookupEnv(env, "PATH")
	if !ok {
		path = "/bin:/usr/bin"
	}
	var found error
	for _, dir := range strings.Split(path, ":") {
		if dir == "" {
			dir = "." // POSIX: an empty element is the working directory
		}
		p := dir + "/" + name
		err := runnable(p)
		if err == nil {
			return p, nil
		}
		// A directory that may not be searched is passed over, as shells do:
		// nobody can say that the program is there.
		var stat *fs.PathError
		if found == nil && !errors.Is(err, ErrNotFound) && !errors.As(err, &stat) {
			found = err
		}
	}
	if found != nil {
		return "", found
	}
	return "", fmt.Errorf("%q: %w", name, ErrNotFound)
}

func lookupEnv(env []string, key string) (string, bool) {
	for i := len(env) - 1; i >= 0; i-- {
		if k, v, ok := strings.Cut(env[i], "="); ok && k == key {
			return v, true
		}
	}
	return "", false
}

// runnable says why path cannot be executed under trace, or nil.
func runnable(path string) error {
	st, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ENOTDIR):
		return fmt.Errorf("%s: %w", path, ErrNotFound)
	case err != nil:
		return fmt.Errorf("%w: %w", ErrNotExecutable, err)
	case st.IsDir():
		return fmt.Errorf("%s is a directory: %w", path, ErrNotExecutable)
	case !st.Mode().IsRegular():
		return fmt.Errorf("%s is not a regular file: %w", path, ErrNotExecutable)
	}
	if err := unix.Access(path, unix.X_OK); err != nil {
		return fmt.Errorf("%s: %w: %w", path, ErrNotExecutable, err)
	}
	if what := elevation(path, st.Mode()); what != "" {
		return fmt.Errorf("%s is %s: %w", path, what, ErrElevated)
	}
	return nil
}

// elevation says what the file would gain at exec, "" for nothing. Being root
// already does not help a program that switches to a lesser user.
func elevation(path string, mode fs.FileMode) string {
	switch {
	case mode&fs.ModeSetuid != 0:
		return "setuid"
	case mode&fs.ModeSetgid != 0 && mode&0o010 != 0: // without group x it means mandatory locking
		return "setgid"
	}
	if n, err := unix.Getxattr(path, "security.capability", nil); err == nil && n > 0 {
		return "given file capabilities"
	}
	return ""
}
