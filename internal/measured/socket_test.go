package measured

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/internal/needs"
)

// shortDir is a private directory whose path fits into sun_path.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "rl")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func TestSocketIsOpenToEverybody(t *testing.T) {
	path := filepath.Join(shortDir(t), "run", "agent.sock")
	l, err := Listen(path, "--socket")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	st, err := os.Stat(path)
	if err != nil || st.Mode().Perm() != 0o777 {
		t.Errorf("mode %v (%v)", st.Mode(), err)
	}
	if st, err = os.Stat(filepath.Dir(path)); err != nil || st.Mode().Perm() != 0o755 {
		t.Errorf("directory mode %v (%v)", st.Mode(), err)
	}
	l.Close()
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("left behind: %v", err)
	}
}

// TestStaleSocketIsReplaced: what an agent that was killed left behind must not
// keep the next one from starting.
func TestStaleSocketIsReplaced(t *testing.T) {
	path := filepath.Join(shortDir(t), "agent.sock")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	l, err = Listen(path, "--socket")
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
}

func TestRefusesSocket(t *testing.T) {
	for _, c := range []struct {
		name string
		make func(t *testing.T, dir string) string
		want string
	}{
		{"that another agent serves", func(t *testing.T, dir string) string {
			path := filepath.Join(dir, "s")
			l, err := net.Listen("unix", path)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { l.Close() })
			return path
		}, "another process"},
		{"that is a file", func(t *testing.T, dir string) string {
			path := filepath.Join(dir, "s")
			if err := os.WriteFile(path, nil, 0o600); err != nil {
				t.Fatal(err)
			}
			return path
		}, "not a socket"},
		{"that is a link to one", func(t *testing.T, dir string) string {
			path := filepath.Join(dir, "s")
			if err := os.Symlink(filepath.Join(dir, "x"), path); err != nil {
				t.Fatal(err)
			}
			return path
		}, "not a socket"},
		{"of another user", func(t *testing.T, dir string) string {
			path := filepath.Join(dir, "s")
			l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path})
			if err != nil {
				t.Fatal(err)
			}
			l.SetUnlinkOnClose(false)
			l.Close()
			chown(t, path)
			return path
		}, "belongs to another user"},
		{"in a directory of another user", func(t *testing.T, dir string) string {
			chown(t, dir)
			return filepath.Join(dir, "s")
		}, "belongs to uid"},
		{"in a directory that others can write", func(t *testing.T, dir string) string {
			if err := os.Chmod(dir, 0o777); err != nil {
				t.Fatal(err)
			}
			return filepath.Join(dir, "s")
		}, "writable for others"},
		{"with a path that is too long", func(t *testing.T, dir string) string {
			return filepath.Join(dir, strings.Repeat("x", 120))
		}, "bytes long"},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := c.make(t, shortDir(t))
			l, err := Listen(path, "--socket")
			if err == nil {
				l.Close()
				t.Fatal("accepted")
			}
			if !strings.Contains(err.Error(), c.want) || cli.HintOf(err) == "" {
				t.Errorf("error %q, hint %q", err, cli.HintOf(err))
			}
		})
	}
}

// chown gives a path to nobody, which only root can.
func chown(t *testing.T, path string) {
	t.Helper()
	needs.Root(t)
	if err := os.Lchown(path, 65534, 65534); err != nil {
		t.Fatal(err)
	}
}

func TestSharedStickyDirectoryIsGoodEnough(t *testing.T) {
	dir := shortDir(t)
	if err := os.Chmod(dir, 0o777|os.ModeSticky); err != nil {
		t.Fatal(err)
	}
	l, err := Listen(filepath.Join(dir, "s"), "--socket")
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
}

// TestConnectionsPerUser: one user cannot use up what all share.
func TestConnectionsPerUser(t *testing.T) {
	l := &listener{byUID: make(map[uint32]int)}
	for i := range maxConnsPerUID {
		if !l.admit(1000) {
			t.Fatalf("connection %d refused", i)
		}
	}
	if l.admit(1000) {
		t.Error("one more than allowed was admitted")
	}
	if !l.admit(1001) {
		t.Error("another user was refused")
	}
	l.leave(1000)
	if !l.admit(1000) {
		t.Error("not admitted after one left")
	}
}
