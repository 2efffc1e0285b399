package workload

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/rootlink/rootlink/internal/needs"
)

// holder starts a process that holds children as kinds says (see
// holdChildren) and returns it as a peer.
func holder(t *testing.T, kinds string, more ...string) (*Peer, *role) {
	t.Helper()
	l, path := listen(t)
	r := startRole(t, self(t), "children", append([]string{path, kinds}, more...)...)
	p, err := PeerOf(connect(t, l, r))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	return p, r
}

func TestStoppedChild(t *testing.T) {
	caller, _ := holder(t, "rut") // running, stopped by a signal, traced
	child, err := StoppedChild(caller)
	if err != nil {
		t.Fatal(err)
	}
	defer child.Close()
	got, err := newMeasurer(t, Options{}).MeasurePeer(t.Context(), child)
	if err != nil {
		t.Fatal(err)
	}
	if want := sumFile(t, "/bin/sleep"); got.SHA256 != want {
		t.Error("measured something else than the tool")
	}
	if err := StillStopped(child, caller); err != nil {
		t.Error(err)
	}
}

func TestRefusesNoStoppedChild(t *testing.T) {
	caller, _ := holder(t, "ru")
	if _, err := StoppedChild(caller); !errors.Is(err, ErrNoStoppedChild) {
		t.Errorf("a child that is not traced passed for the tool: %v", err)
	}
}

func TestRefusesTwoStoppedChildren(t *testing.T) {
	caller, _ := holder(t, "tt")
	if _, err := StoppedChild(caller); !errors.Is(err, ErrManyStoppedChildren) {
		t.Errorf("two candidates: %v", err)
	}
}

func TestRefusesChildOfAnother(t *testing.T) {
	// A genuine stopped tool exists, but it is another process's.
	other, _ := holder(t, "t")
	l, path := listen(t)
	r := startRole(t, self(t), "connect", path)
	caller, err := PeerOf(connect(t, l, r))
	if err != nil {
		t.Fatal(err)
	}
	defer caller.Close()
	if _, err := StoppedChild(caller); !errors.Is(err, ErrNoStoppedChild) {
		t.Errorf("the child of another process passed for the caller's: %v", err)
	}
	child, err := StoppedChild(other)
	if err != nil {
		t.Fatal(err)
	}
	defer child.Close()
	if err := StillStopped(child, caller); !errors.Is(err, ErrNoStoppedChild) {
		t.Errorf("the child of another process passed for the caller's: %v", err)
	}
}

func TestRefusesChildTracedByAnother(t *testing.T) {
	// A child of the caller, stopped under the trace of somebody else, who
	// can edit its memory: not the caller's tool.
	caller, r := holder(t, "r")
	kids, err := children(r.Process.Pid)
	if err != nil || len(kids) != 1 {
		t.Fatalf("children %v: %v", kids, err)
	}
	traced(t, kids[0], func() {
		if _, err := StoppedChild(caller); !errors.Is(err, ErrNoStoppedChild) {
			t.Errorf("a child traced by another passed for the tool: %v", err)
		}
	})
}

// traced runs f while this process holds pid stopped under its trace.
func traced(t *testing.T, pid int, f func()) {
	t.Helper()
	done := make(chan error)
	go func() {
		done <- onTracer(pid, f)
	}()
	if err := <-done; err != nil {
		t.Fatalf("ptrace: %v", err)
	}
}

func TestStoppedChildInChildPidNamespace(t *testing.T) {
	needs.Root(t)
	// The tool sees itself as pid 1; we see it under our own number.
	caller, _ := holder(t, "t", "newpid")
	child, err := StoppedChild(caller)
	if err != nil {
		t.Fatal(err)
	}
	child.Close()
}

func TestRefusesStrangersPidNamespace(t *testing.T) {
	needs.Root(t)
	// The agent runs in a container, the caller on the host: the kernel has no
	// number for the caller that means anything to the agent.
	path := filepath.Join(t.TempDir(), "s")
	c := exec.Command(self(t), path)
	c.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID}
	srv := startCmd(t, c, "server")
	srv.wait(t, "ready")
	r := startRole(t, self(t), "connect", path)
	r.wait(t, "connected")
	said := srv.wait(t, "peer")
	if !strings.Contains(said, ErrForeignPID.Error()) || !strings.Contains(said, "hostPID") {
		t.Errorf("server said %q", said)
	}
}

func TestRefusesProcOfAnotherPidNamespace(t *testing.T) {
	needs.Root(t)
	// The agent's /proc is the host's while its pids are the container's.
	c := exec.Command(self(t))
	c.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID}
	r := startCmd(t, c, "new-measurer")
	if said := r.wait(t, "measurer"); !strings.Contains(said, "pid namespace") {
		t.Errorf("it said %q", said)
	}
}

func TestRecorderUnprotected(t *testing.T) {
	l, path := listen(t)
	r := startRole(t, self(t), "connect", path)
	p, err := PeerOf(connect(t, l, r))
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	if ok, reason := RecorderProtected(p, 0); ok || reason == "" {
		t.Error("protected without a recorder group")
	}
	if ok, reason := RecorderProtected(p, p.GID+1); ok || !strings.Contains(reason, "setgid") {
		t.Errorf("protected with another gid: %q", reason)
	}
}

func TestRefusesRecorderStartedUnderPtrace(t *testing.T) {
	needs.Root(t)
	const group = 54321
	l, path := listen(t)
	c := exec.Command(self(t), path)
	c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Gid: group}}
	if err := os.Chmod(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, 0o777); err != nil {
		t.Fatal(err)
	}
	r := startCmd(t, c, "connect")
	p, err := PeerOf(connect(t, l, r))
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	if ok, reason := RecorderProtected(p, group); !ok {
		t.Fatalf("a recorder of the group is not protected: %s", reason)
	}
	tids, err := threads(p.PID)
	if err != nil {
		t.Fatal(err)
	}
	// One traced thread is enough to edit the memory of all.
	traced(t, tids[len(tids)-1], func() {
		if ok, reason := RecorderProtected(p, group); ok || !strings.Contains(reason, "traced") {
			t.Errorf("a traced recorder counts as protected: %q", reason)
		}
	})
}

func TestRefusesForgedRecorderByExec(t *testing.T) {
	needs.Root(t)
	// Connect as oneself, then exec the genuine setgid recorder over oneself:
	// the process has the group now, the connection was stamped without it.
	const group = 54321
	l, path := listen(t)
	recorder := filepath.Join(t.TempDir(), "recorder")
	copyExe(t, recorder)
	if err := os.Chown(recorder, 0, group); err != nil {
		t.Fatal(err)
	}
	if err := unix.Chmod(recorder, 0o2755); err != nil {
		t.Fatal(err)
	}
	r := startRole(t, self(t), "connect-exec", path, recorder)
	p, err := PeerOf(connect(t, l, r))
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	r.tell(t, "exec")
	r.wait(t, "ready")
	st, err := readStatus(p.PID)
	if err != nil || st.egid != group {
		t.Fatalf("exec did not give the group: %v, %v", st.egid, err)
	}
	if ok, _ := RecorderProtected(p, group); ok {
		t.Error("a connection made before the exec counts as the recorder's")
	}
}

func TestPathNotInPrivateMountNamespace(t *testing.T) {
	needs.Root(t)
	// In a mount namespace of its own a process can call its file what it likes.
	exe := filepath.Join(t.TempDir(), "prog")
	copyExe(t, exe)
	c := exec.Command(exe)
	c.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}
	r := startCmd(t, c, "wait")
	r.wait(t, "ready")
	got, err := newMeasurer(t, Options{}).Measure(t.Context(), r.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	if got.Path != "" {
		t.Errorf("path %q of a private mount namespace", got.Path)
	}
	if want := sumFile(t, exe); got.SHA256 != want {
		t.Error("wrong hash")
	}
}

func TestMemfdMeasuredNeverCached(t *testing.T) {
	fd, err := unix.MemfdCreate("tool", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(self(t))
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "tool")
	defer f.Close()
	if _, err := f.Write(b); err != nil {
		t.Fatal(err)
	}
	r := startRole(t, fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), fd), "wait")
	r.wait(t, "ready")
	hashed := 0
	m := newMeasurer(t, Options{})
	m.beforeHash = func() { hashed++ }
	for range 2 {
		_, sum, err := m.executable(t.Context(), r.Process.Pid, 0)
		if err != nil {
			t.Fatal(err)
		}
		if want := sumFile(t, self(t)); sum != want {
			t.Error("wrong hash")
		}
	}
	if hashed != 2 {
		t.Errorf("hashed %d times", hashed)
	}
	if got, err := m.Measure(t.Context(), r.Process.Pid); err != nil || got.Path != "" {
		t.Errorf("path of a memfd: %+v, %v", got, err)
	}
}

// mount mounts in this process's mount namespace and undoes it at the end.
func mount(t *testing.T, fstype, dir, opts string) {
	t.Helper()
	if err := unix.Mount(fstype, dir, fstype, 0, opts); err != nil {
		needs.Missing(t, "mounting %s: %v", fstype, err)
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
}

func TestTmpfsAndOverlayNeverCached(t *testing.T) {
	needs.Root(t)
	base := t.TempDir()
	mount(t, "tmpfs", base, "")
	for _, d := range []string{"lower", "upper", "work", "merged"} {
		if err := os.Mkdir(filepath.Join(base, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	copyExe(t, filepath.Join(base, "lower", "prog"))
	merged := filepath.Join(base, "merged")
	mount(t, "overlay", merged, fmt.Sprintf("lowerdir=%s/lower,upperdir=%s/upper,workdir=%s/work", base, base, base))
	for _, exe := range []string{filepath.Join(base, "lower", "prog"), filepath.Join(merged, "prog")} {
		r := startRole(t, exe, "wait")
		r.wait(t, "ready")
		m := newMeasurer(t, Options{})
		fd, err := openExe(r.Process.Pid)
		if err != nil {
			t.Fatal(err)
		}
		fs, err := m.fileSystem(r.Process.Pid, fd)
		unix.Close(fd)
		if err != nil || fs.cacheable {
			t.Errorf("%s: %+v, %v", exe, fs, err)
		}
		if _, sum, err := m.executable(t.Context(), r.Process.Pid, 0); err != nil || sum != sumFile(t, exe) {
			t.Errorf("%s: %v", exe, err)
		}
		r.Process.Kill()
		r.Wait()
	}
}

func TestRefusesOverlayOfAnotherUserNamespace(t *testing.T) {
	needs.Root(t)
	// In a user namespace of their own anybody can lay an overlay over a FUSE
	// mount of theirs and change the file after it was measured.
	base := t.TempDir()
	mount(t, "tmpfs", base, "")
	for _, d := range []string{"lower", "upper", "work", "merged"} {
		if err := os.Mkdir(filepath.Join(base, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	copyExe(t, filepath.Join(base, "lower", "prog"))
	merged := filepath.Join(base, "merged")
	c := exec.Command(self(t), base, merged)
	c.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: 0, Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: 0, Size: 1}},
	}
	r := startCmd(t, c, "overlay-exec")
	r.wait(t, "ready")
	m := newMeasurer(t, Options{})
	if _, err := m.Measure(t.Context(), r.Process.Pid); !errors.Is(err, ErrFileSystem) {
		t.Errorf("overlay of a user namespace was measured: %v", err)
	}
	// The same file started from outside, through /proc/PID/root: now the
	// process is in our user namespace and the mount still is not.
	outside := startRole(t, fmt.Sprintf("/proc/%d/root%s/prog", r.Process.Pid, merged), "wait")
	outside.wait(t, "ready")
	if _, err := m.Measure(t.Context(), outside.Process.Pid); !errors.Is(err, ErrFileSystem) {
		t.Errorf("overlay reached through /proc/PID/root was measured: %v", err)
	}
}

func TestRefusesFileSystemsNotAllowed(t *testing.T) {
	// What FUSE is called in a mount table; the file system itself is never asked.
	for _, name := range []string{"fuse", "fuse.sshfs", "fuseblk", "nfs4", "cifs", "9p", "virtiofs", "proc", ""} {
		if _, ok := localFileSystems[name]; ok {
			t.Errorf("%q is allowed", name)
		}
	}
	m := newMeasurer(t, Options{})
	r := startRole(t, self(t), "wait")
	r.wait(t, "ready")
	fd, err := openExe(r.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	fs, err := m.fileSystem(r.Process.Pid, fd)
	if err != nil {
		t.Fatal(err)
	}
	saved := localFileSystems[fs.name]
	delete(localFileSystems, fs.name)
	defer func() { localFileSystems[fs.name] = saved }()
	if _, err := m.Measure(t.Context(), r.Process.Pid); !errors.Is(err, ErrFileSystem) {
		t.Errorf("measured on a file system that is not allowed: %v", err)
	}
	allowed := newMeasurer(t, Options{AllowFileSystems: []string{fs.name}})
	fs, err = allowed.fileSystem(r.Process.Pid, fd)
	if err != nil || fs.cacheable {
		t.Errorf("an added file system: %+v, %v", fs, err)
	}
}

func TestRefusesHashFlood(t *testing.T) {
	// A budget that one copy of this binary uses up: the next is refused before
	// a byte of it is read, another user's is not.
	st, err := os.Stat(self(t))
	if err != nil {
		t.Fatal(err)
	}
	m := newMeasurer(t, Options{BytesPerUID: st.Size() / burstSeconds})
	hashed := 0
	m.beforeHash = func() { hashed++ }
	dir := t.TempDir()
	run := func(i int, uid uint32) error {
		exe := filepath.Join(dir, fmt.Sprint("prog", i))
		copyExe(t, exe)
		r := startRole(t, exe, "wait")
		r.wait(t, "ready")
		_, _, err := m.executable(t.Context(), r.Process.Pid, uid)
		return err
	}
	if err := run(0, 1000); err != nil {
		t.Fatal(err)
	}
	if err := run(1, 1000); !errors.Is(err, ErrBudget) {
		t.Errorf("over the budget: %v", err)
	}
	if err := run(2, 1001); err != nil {
		t.Errorf("another user pays for the flood: %v", err)
	}
}

func TestBudgetForgetsOnlyTheIdle(t *testing.T) {
	b := newBudget(1000)
	if release, err := b.take(t.Context(), 1, 8000); err != nil {
		t.Fatal(err)
	} else {
		release()
	}
	for uid := uint32(100); len(b.uids) < maxUIDs; uid++ {
		release, err := b.take(t.Context(), uid, 0)
		if err != nil {
			t.Fatal(err)
		}
		release()
	}
	if _, err := b.take(t.Context(), 99999, 0); err != nil {
		t.Fatal(err)
	}
	// A flooder must not get a fresh budget by flooding the table.
	if _, err := b.take(t.Context(), 1, 8000); !errors.Is(err, ErrBudget) {
		t.Errorf("the used budget was forgotten: %v", err)
	}
}

func TestConcurrentMeasurementsHashOnce(t *testing.T) {
	c := exec.Command("/bin/sleep", "60")
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	defer c.Wait()
	defer c.Process.Kill()
	m := newMeasurer(t, Options{})
	var mu sync.Mutex
	hashed := 0
	m.beforeHash = func() {
		mu.Lock()
		hashed++
		mu.Unlock()
	}
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			if _, _, err := m.executable(t.Context(), c.Process.Pid, 0); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if hashed != 1 {
		t.Errorf("hashed %d times", hashed)
	}
}
