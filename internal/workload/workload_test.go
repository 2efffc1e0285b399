package workload

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/rootlink/rootlink/internal/needs"
)

// TestMain lets this test binary be started as another program: the attacks
// need real processes that connect, exec and trace.
func TestMain(m *testing.M) {
	if role := os.Getenv("WORKLOAD_TEST_ROLE"); role != "" {
		os.Exit(runRole(role, os.Args[1:]))
	}
	os.Exit(m.Run())
}

func newMeasurer(t *testing.T, o Options) *Measurer {
	t.Helper()
	m, err := NewMeasurer(o)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func sumFile(t *testing.T, path string) [32]byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return sha256.Sum256(b)
}

// copyExe copies this test binary, so that a test owns an executable.
func copyExe(t *testing.T, to string) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	in, err := os.Open(self)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY|os.O_EXCL, 0o755)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	if _, err := io.Copy(out, in); err != nil {
		t.Fatal(err)
	}
}

// role is a process of this binary that says a line when ready and then does
// as it is told, line by line.
type role struct {
	*exec.Cmd
	in  io.WriteCloser
	out io.Reader
}

func (r *role) wait(t *testing.T, want string) string {
	t.Helper()
	var line []byte
	b := make([]byte, 1)
	for {
		n, err := r.out.Read(b)
		if n == 1 && b[0] == '\n' {
			break
		}
		if n == 1 {
			line = append(line, b[0])
		}
		if err != nil {
			t.Fatalf("role ended after %q, want %q: %v", line, want, err)
		}
	}
	if !strings.HasPrefix(string(line), want) {
		t.Fatalf("role said %q, want %q", line, want)
	}
	return strings.TrimSpace(strings.TrimPrefix(string(line), want))
}

func (r *role) tell(t *testing.T, line string) {
	t.Helper()
	if _, err := io.WriteString(r.in, line+"\n"); err != nil {
		t.Fatal(err)
	}
}

func startRole(t *testing.T, exe, name string, args ...string) *role {
	t.Helper()
	return startCmd(t, exec.Command(exe, args...), name)
}

func startCmd(t *testing.T, c *exec.Cmd, name string) *role {
	t.Helper()
	c.Env = append(os.Environ(), "WORKLOAD_TEST_ROLE="+name)
	c.Stderr = os.Stderr
	in, err := c.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := c.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		c.Process.Kill()
		c.Wait()
	})
	return &role{Cmd: c, in: in, out: out}
}

func self(t *testing.T) string {
	t.Helper()
	p, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestMeasureChild(t *testing.T) {
	m := newMeasurer(t, Options{})
	exe := filepath.Join(t.TempDir(), "prog")
	copyExe(t, exe)
	r := startRole(t, exe, "wait")
	r.wait(t, "ready")
	got, err := m.Measure(t.Context(), r.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	sum := sumFile(t, exe)
	if got.SHA256 != sum {
		t.Error("wrong hash")
	}
	if got.Path != exe {
		t.Errorf("path %q, want %q", got.Path, exe)
	}
	parent := sumFile(t, self(t))
	if got.ParentSHA256 == nil || *got.ParentSHA256 != parent {
		t.Error("wrong parent hash")
	}
	want := []string{
		"sha256:" + hex.EncodeToString(sum[:]), "path:" + exe,
		"parent:sha256:" + hex.EncodeToString(parent[:]),
	}
	sel := got.Selectors()
	for _, w := range want {
		if !slices.Contains(sel, w) {
			t.Errorf("%s is missing in %v", w, sel)
		}
	}
	if !slices.IsSorted(sel) {
		t.Error("not sorted")
	}
	if err := m.SameImage(got); err != nil {
		t.Error(err)
	}
}

// connect returns the accepted side of a connection from r.
func connect(t *testing.T, l *net.UnixListener, r *role) *net.UnixConn {
	t.Helper()
	c, err := l.AcceptUnix()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	r.wait(t, "connected")
	return c
}

func listen(t *testing.T) (*net.UnixListener, string) {
	t.Helper()
	dir, err := os.MkdirTemp("", "wl")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	path := filepath.Join(dir, "s")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	l.SetDeadline(time.Now().Add(20 * time.Second))
	return l, path
}

// eachPinning runs f with the start time alone, as on kernels before 6.5, and
// with SO_PEERPIDFD where this kernel has it.
func eachPinning(t *testing.T, f func(t *testing.T, peer func(*net.UnixConn) (*Peer, error))) {
	t.Run("start time", func(t *testing.T) {
		f(t, func(c *net.UnixConn) (*Peer, error) {
			p, err := peerOf(c, false)
			if err == nil && p.pidfd >= 0 {
				unix.Close(p.pidfd)
				p.pidfd = -1
			}
			return p, err
		})
	})
	t.Run("pidfd", func(t *testing.T) { f(t, PeerOf) })
}

func TestPeer(t *testing.T) {
	eachPinning(t, func(t *testing.T, peer func(*net.UnixConn) (*Peer, error)) {
		l, path := listen(t)
		r := startRole(t, self(t), "connect", path)
		c := connect(t, l, r)
		p, err := peer(c)
		if err != nil {
			t.Fatal(err)
		}
		defer p.Close()
		if p.PID != r.Process.Pid || int(p.UID) != os.Getuid() || int(p.GID) != os.Getgid() {
			t.Errorf("peer %+v is not process %d", p, r.Process.Pid)
		}
		m := newMeasurer(t, Options{})
		if _, err := m.MeasurePeer(t.Context(), p); err != nil {
			t.Error(err)
		}
		r.Process.Kill()
		r.Wait()
		if err := p.Check(); !errors.Is(err, ErrGone) {
			t.Errorf("Check of a dead peer: %v", err)
		}
		if _, err := m.MeasurePeer(t.Context(), p); !errors.Is(err, ErrGone) {
			t.Errorf("MeasurePeer of a dead peer: %v", err)
		}
	})
}

func TestRefusesReusedPid(t *testing.T) {
	eachPinning(t, func(t *testing.T, peer func(*net.UnixConn) (*Peer, error)) {
		l, path := listen(t)
		r := startRole(t, self(t), "connect", path)
		p, err := peer(connect(t, l, r))
		if err != nil {
			t.Fatal(err)
		}
		defer p.Close()
		// Another process under the same number differs in its start time.
		p.StartTime--
		if err := p.Check(); !errors.Is(err, ErrGone) {
			t.Errorf("Check: %v", err)
		}
		if _, err := newMeasurer(t, Options{}).MeasurePeer(t.Context(), p); !errors.Is(err, ErrGone) {
			t.Errorf("MeasurePeer: %v", err)
		}
	})
}

func TestRefusesReusedPidYoungerThanConnection(t *testing.T) {
	p := &Peer{PID: os.Getpid(), pidfd: -1}
	st, err := readStat(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	if err := p.pin(st.startTime - 1); !errors.Is(err, ErrGone) {
		t.Errorf("a process younger than the connection was pinned: %v", err)
	}
}

func TestRefusesReusedPidAfterMeasurement(t *testing.T) {
	m := newMeasurer(t, Options{})
	was, err := m.Measure(t.Context(), os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	was.StartTime--
	if err := m.SameImage(was); !errors.Is(err, ErrGone) {
		t.Errorf("SameImage: %v", err)
	}
}

func TestRefusesConnectThenExecTrustedBinary(t *testing.T) {
	eachPinning(t, func(t *testing.T, peer func(*net.UnixConn) (*Peer, error)) {
		l, path := listen(t)
		dir := t.TempDir()
		attacker, trusted := filepath.Join(dir, "attacker"), filepath.Join(dir, "trusted")
		copyExe(t, attacker)
		copyExe(t, trusted)
		r := startRole(t, attacker, "connect-exec", path, trusted)
		p, err := peer(connect(t, l, r))
		if err != nil {
			t.Fatal(err)
		}
		defer p.Close()
		m := newMeasurer(t, Options{})
		was, err := m.MeasurePeer(t.Context(), p)
		if err != nil {
			t.Fatal(err)
		}
		if err := m.SameImage(was); err != nil {
			t.Fatal(err)
		}
		r.tell(t, "exec")
		r.wait(t, "ready") // now it is the trusted binary, same pid, same start time
		if err := p.Check(); err != nil {
			t.Fatalf("exec keeps the process: %v", err)
		}
		if err := m.SameImage(was); !errors.Is(err, ErrChanged) {
			t.Errorf("another executable passed for the measured one: %v", err)
		}
	})
}

func TestRefusesExecutableReplacedAfterMeasurement(t *testing.T) {
	m := newMeasurer(t, Options{})
	exe := filepath.Join(t.TempDir(), "prog")
	copyExe(t, exe)
	r := startRole(t, exe, "wait")
	r.wait(t, "ready")
	was, err := m.Measure(t.Context(), r.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	// Replaced by rename: the old process still runs the old, unlinked file.
	other := exe + ".new"
	if err := os.WriteFile(other, []byte("other"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(other, exe); err != nil {
		t.Fatal(err)
	}
	got, err := m.Measure(t.Context(), r.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	if got.SHA256 != was.SHA256 {
		t.Error("measured what has its name now, not what runs")
	}
	if got.Path != "" {
		t.Errorf("a deleted file has path %q", got.Path)
	}
}

func TestRefusesFileChangedWhileHashed(t *testing.T) {
	m := newMeasurer(t, Options{})
	exe := filepath.Join(t.TempDir(), "prog")
	copyExe(t, exe)
	r := startRole(t, exe, "wait")
	r.wait(t, "ready")
	m.beforeHash = func() {
		// The kernel keeps writers out while it runs; a change of the inode is
		// as good for the check.
		now := time.Now()
		if err := os.Chtimes(exe, now, now); err != nil {
			t.Error(err)
		}
	}
	if _, err := m.Measure(t.Context(), r.Process.Pid); !errors.Is(err, ErrChanged) {
		t.Errorf("a file that changed under the hash: %v", err)
	}
}

func TestCacheOnlyOldFiles(t *testing.T) {
	hashed := 0
	m := newMeasurer(t, Options{})
	m.beforeHash = func() { hashed++ }
	exe := filepath.Join(t.TempDir(), "prog")
	copyExe(t, exe) // its ctime is now
	measure := func() {
		t.Helper()
		r := startRole(t, exe, "wait")
		r.wait(t, "ready")
		if _, _, err := m.executable(t.Context(), r.Process.Pid, 0); err != nil {
			t.Fatal(err)
		}
	}
	measure()
	measure()
	if hashed != 2 || len(m.cache) != 0 {
		t.Errorf("a file whose ctime is now was cached (%d hashed)", hashed)
	}
	// The system's sleep is older than that: hashed once.
	hashed = 0
	old := exec.Command("/bin/sleep", "60")
	if err := old.Start(); err != nil {
		t.Fatal(err)
	}
	defer old.Wait()
	defer old.Process.Kill()
	for range 3 {
		if _, _, err := m.executable(t.Context(), old.Process.Pid, 0); err != nil {
			t.Fatal(err)
		}
	}
	if hashed != 1 {
		t.Errorf("an old file was hashed %d times", hashed)
	}
}

func TestMeasureCancelled(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := newMeasurer(t, Options{}).Measure(ctx, os.Getpid()); err == nil {
		t.Error("measured under a cancelled context")
	}
}

func TestPidZeroHasHint(t *testing.T) {
	_, err := newMeasurer(t, Options{}).Measure(t.Context(), 0)
	if !errors.Is(err, ErrForeignPID) || !strings.Contains(Hint(err), "hostPID") {
		t.Errorf("%v, hint %q", err, Hint(err))
	}
}

func TestMeasureInChroot(t *testing.T) {
	needs.Root(t)
	// A build root: the mount that the executable lies on is above the
	// process's root, so its mount table does not list it.
	m, err := NewMeasurer(Options{})
	if err != nil {
		t.Fatal(err)
	}
	if m.rootFS == "" {
		needs.Missing(t, "our own / is not on a local file system")
	}
	program := filepath.Join(t.TempDir(), "program")
	copyExe(t, program)
	if dev, err := deviceOfPath(program); err != nil || dev != m.rootDev {
		needs.Missing(t, "the test's directory is not on the file system of /")
	}
	c := exec.Command(program, t.TempDir())
	r := startCmd(t, c, "chroot")
	r.wait(t, "ready")
	if _, err := m.Measure(t.Context(), c.Process.Pid); err != nil {
		t.Fatal(err)
	}
	// A file system that is not ours stays out.
	m.rootDev++
	if _, err := m.Measure(t.Context(), c.Process.Pid); !errors.Is(err, ErrFileSystem) {
		t.Errorf("a mount that nobody lists: %v", err)
	}
}

func deviceOfPath(path string) (uint64, error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	return deviceOf(int(f.Fd()))
}
