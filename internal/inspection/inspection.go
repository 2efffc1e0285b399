// Package inspection runs the inspections of an in-toto layout: commands of the
// layout's author, on the machine of whoever verifies. They get copies of the
// artifacts, no network, no privilege, nothing of the user's files, and an end.
package inspection

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/rootlink/rootlink/pkg/layout"
)

// Timeout is how long an inspection may run unless told otherwise.
const Timeout = 2 * time.Minute

const (
	maxOutput = 16 << 10 // bytes of what it prints, for a failure's text
	maxFiles  = 1 << 16  // before, and after
)

// ErrNoSandbox: this machine does not let us shut the command in, so it is not run.
var ErrNoSandbox = errors.New("no sandbox for the inspection")

// ErrTimeout: it was ended.
var ErrTimeout = errors.New("the inspection took too long")

// Run copies the artifacts into an empty directory, runs the command there, and
// says which files there were before and after.
func Run(in layout.Inspection, artifacts []string, timeout time.Duration) (out layout.Inspected, err error) {
	dir, err := os.MkdirTemp("", "rootlink-inspection-")
	if err != nil {
		return out, err
	}
	defer func() { err = errors.Join(err, removeAll(dir)) }()
	for _, a := range artifacts {
		if err := copyIn(dir, a); err != nil {
			return out, err
		}
	}
	if out.Materials, err = listing(dir); err != nil {
		return out, err
	}
	if out.ExitCode, err = shutIn(dir, in.Run, timeout); err != nil {
		return out, err
	}
	out.Products, err = listing(dir)
	return out, err
}

// shutIn starts this program again in namespaces of its own, where RunStub
// closes the doors and becomes the command.
func shutIn(dir string, command []string, timeout time.Duration) (int, error) {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	status, statusW, err := os.Pipe()
	if err != nil {
		return 0, err
	}
	defer status.Close()
	defer statusW.Close()
	cmd := exec.CommandContext(ctx, "/proc/self/exe", append([]string{stubArg, dir, homes()}, command...)...)
	cmd.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=" + workDir, "LC_ALL=C.UTF-8"}
	printed := &head{}
	cmd.Stdout, cmd.Stderr, cmd.ExtraFiles, cmd.WaitDelay = printed, printed, []*os.File{statusW}, 5*time.Second
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS | syscall.CLONE_NEWNET | syscall.CLONE_NEWPID | syscall.CLONE_NEWIPC | syscall.CLONE_NEWUTS,
		// The command's process is the first of its PID namespace: when it is
		// killed, so is everything that it started.
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}},
		Pdeathsig:   syscall.SIGKILL,
		Setsid:      true,
	}
	if err := cmd.Start(); err != nil {
		return 0, fmt.Errorf("%w: %w", ErrNoSandbox, err)
	}
	statusW.Close()
	// Closed by exec without a word: the command runs, and runs shut in.
	why, _ := io.ReadAll(io.LimitReader(status, 1<<10))
	err = cmd.Wait()
	if len(why) > 0 {
		if kind, text, ok := strings.Cut(string(why), ":"); ok && kind == "exec" {
			return 0, fmt.Errorf("%s: %s", command[0], text)
		}
		return 0, fmt.Errorf("%w: %s", ErrNoSandbox, why)
	}
	if ctx.Err() != nil {
		return 0, fmt.Errorf("%w: %s", ErrTimeout, timeout)
	}
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit) && exit.Exited():
		return exit.ExitCode(), nil
	case err != nil:
		return 0, fmt.Errorf("%w; it printed: %s", err, printed.buf.String())
	}
	return 0, nil
}

// homes are the user's home directories, by the environment and by passwd: that
// of a service, with its credentials, lies anywhere. Those that hold the system
// itself, as in a container, cannot be hidden from a command that needs it.
func homes() string {
	var out []string
	env, _ := os.UserHomeDir()
	if u, err := user.Current(); err == nil {
		out = append(out, u.HomeDir)
	}
	return strings.Join(slices.DeleteFunc(append(out, env), func(h string) bool {
		return !filepath.IsAbs(h) || strings.Contains(h, ":") || slices.ContainsFunc(system, func(s string) bool {
			return strings.HasPrefix(s+"/", strings.TrimSuffix(filepath.Clean(h), "/")+"/")
		})
	}), ":")
}

var system = []string{"/usr", "/bin", "/sbin", "/lib", "/lib64", "/etc", "/dev", "/proc"}

// head keeps the beginning of what is printed.
type head struct{ buf bytes.Buffer }

func (t *head) Write(p []byte) (int, error) {
	t.buf.Write(p[:min(len(p), max(0, maxOutput-t.buf.Len()))])
	return len(p), nil
}

// copyIn copies a file or a directory under its own last name.
func copyIn(dir, name string) error {
	abs, err := filepath.Abs(name)
	if err != nil {
		return err
	}
	to := filepath.Join(dir, filepath.Base(abs))
	if _, err := os.Lstat(to); err == nil {
		return fmt.Errorf("two artifacts are named %s", filepath.Base(abs))
	}
	return filepath.WalkDir(abs, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(abs, path)
		if err != nil {
			return err
		}
		st, err := os.Stat(path) // a link to a file is that file, as when it was recorded
		switch {
		case err != nil:
			return err
		case d.IsDir():
			return os.Mkdir(filepath.Join(to, rel), 0o700)
		case !st.Mode().IsRegular():
			return fmt.Errorf("%s is neither a file nor a link to one", path)
		}
		return copyFile(filepath.Join(to, rel), path, st.Mode().Perm()|0o600)
	})
}

func copyFile(to, from string, perm fs.FileMode) error {
	src, err := os.Open(from)
	if err != nil {
		return err
	}
	defer src.Close()
	dst, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, perm)
	if err != nil {
		return err
	}
	_, err = io.Copy(dst, src)
	return errors.Join(err, dst.Close())
}

// listing hashes the files below dir. What is no file could lead anywhere.
func listing(dir string) (map[string]string, error) {
	out := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		rel, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		if !d.Type().IsRegular() {
			return fmt.Errorf("the inspection left %s, which is not a regular file", rel)
		}
		if len(out) == maxFiles {
			return fmt.Errorf("more than %d files", maxFiles)
		}
		f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW, 0)
		if err != nil {
			return err
		}
		defer f.Close()
		h := sha256.New()
		if _, err := io.Copy(h, f); err != nil {
			return err
		}
		out[filepath.ToSlash(rel)] = hex.EncodeToString(h.Sum(nil))
		return nil
	})
	return out, err
}

// removeAll also removes what was left without permissions.
func removeAll(dir string) error {
	if os.RemoveAll(dir) == nil {
		return nil
	}
	_ = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if d != nil && d.IsDir() {
			_ = os.Chmod(path, 0o700)
		}
		return nil
	})
	return os.RemoveAll(dir)
}
