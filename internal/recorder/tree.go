package recorder

import (
	"cmp"
	"crypto/sha256"
	"debug/buildinfo"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/rootlink/rootlink/pkg/link"
)

const (
	// maxRan leaves room in a statement for what the agent measured.
	maxRan      = link.MaxExecutables - 256
	maxRanPaths = 4 << 20 // bytes of paths
	maxGaps     = link.MaxTreeGaps
	// hashAhead is how many files wait to be hashed while their processes run on.
	hashAhead = 64
	// maxScripts is how many scripts may have each other as interpreters
	// (the kernel's limit on a #! of a #!).
	maxScripts = 5
)

// Tree collects what the processes of one step execute. Its methods but Result
// are called by the tracing thread alone.
type Tree struct {
	// Exec, if not nil, is called for every program executed while its process
	// is stopped. goTool: the program is cmd/go, under whatever name.
	Exec func(pid int, goTool bool)

	ran   map[ranKey]*runs
	paths int // bytes of all paths
	now   func() time.Time
	files map[fileID]*program
	fs    trusted
	work  chan hashJob // nil until the first job
	done  sync.WaitGroup

	powerless []string // programs that gained nothing from setuid, being traced

	mu   sync.Mutex // guards gaps
	gaps []string
}

// program is one state of one file.
type program struct {
	id      fileID
	settled bool // its times would show a change: what was read once holds
	goTool  bool
	gains   string        // what it would gain untraced, such as "setuid"
	hashed  chan struct{} // closed when sum and err are there
	sum     [32]byte
	err     error
}

type ranKey struct {
	file       *program
	path, role string
}

type runs struct{ count int }

type hashJob struct {
	fd   int
	file *program
	name string
}

// NewTree returns an empty Tree for one Run.
func NewTree() *Tree {
	return &Tree{now: time.Now, ran: map[ranKey]*runs{}, files: map[fileID]*program{}}
}

// gap says why the list may not be complete.
func (t *Tree) gap(format string, args ...any) {
	t.mu.Lock()
	defer t.mu.Unlock()
	s := strings.ToValidUTF8(fmt.Sprintf(format, args...), "\uFFFD")
	if len(t.gaps) < maxGaps && !slices.Contains(t.gaps, s) {
		t.gaps = append(t.gaps, s)
	}
}

// saw records what the stopped process pid has just executed. Failing to see
// it is a gap, never the end of the step: a demand on the list is the
// verifier's.
func (t *Tree) saw(pid int, main bool) {
	proc := fmt.Sprintf("/proc/%d", pid)
	path, err := os.Readlink(proc + "/exe")
	if err != nil {
		// Its name among processes is there even when nothing else is.
		comm, _ := os.ReadFile(proc + "/comm")
		t.lost(pid, "a program named "+strings.TrimSpace(string(comm)), err)
		return
	}
	path = strings.ToValidUTF8(path, "\uFFFD")
	name, err := execName(pid)
	if err != nil {
		t.lost(pid, path, err)
		return
	}
	exe, err := t.look(pid, proc+"/exe", path)
	if err != nil {
		t.lost(pid, path, err)
		return
	}
	role := link.RoleChild
	if main {
		role = link.RoleTool
	}
	if t.scripts(pid, name, path, exe) {
		role = link.RoleInterpreter
	}
	t.add(exe, path, role)
	if exe.gains != "" && os.Geteuid() != 0 && len(t.powerless) < maxGaps && !slices.Contains(t.powerless, path) {
		t.powerless = append(t.powerless, path)
	}
	if t.Exec != nil {
		t.Exec(pid, exe.goTool)
	}
}

// lost notes a program that could not be looked at. A process that was killed
// while it was stopped has executed nothing of it.
func (t *Tree) lost(pid int, what string, err error) {
	if errors.Is(err, unix.ESRCH) || errors.Is(err, os.ErrNotExist) {
		if s := stateOf(pid); s == 0 || s == 'Z' || s == 'X' {
			return
		}
	}
	t.gap("%s ran and could not be read: %v", what, err)
}

// scripts records the scripts that led to the executable, and reports whether
// there are any: name is what was given to execve, and the first line of each
// names the next. Whatever else was given to execve, such as what binfmt_misc
// finds an interpreter for, counts as one.
func (t *Tree) scripts(pid int, name, path string, exe *program) (any bool) {
	for range maxScripts {
		file := inProcess(pid, name)
		var st unix.Stat_t
		if err := unix.Stat(file, &st); err != nil {
			// An executable may be gone by now, and a descriptor closed; both
			// were opened before. A script would have to be there still.
			if any || !strings.HasPrefix(name, "/dev/fd/") && filepath.Base(name) != filepath.Base(strings.TrimSuffix(path, " (deleted)")) {
				t.gap("%s was executed as %s, which could not be looked at: %v", path, name, err)
			}
			return any
		}
		if uint64(st.Dev) == exe.id.dev && st.Ino == exe.id.ino || st.Mode&unix.S_IFMT != unix.S_IFREG {
			return any
		}
		s, err := t.look(pid, file, name)
		if err != nil {
			t.gap("%s, which %s runs, could not be read: %v", name, path, err)
			return true
		}
		any = true
		t.add(s, strings.ToValidUTF8(name, "\uFFFD"), link.RoleScript)
		if name = interpreterOf(file); name == "" {
			return true
		}
	}
	return any
}

// interpreterOf is the interpreter that the first line of a script names.
func interpreterOf(file string) string {
	f, err := os.OpenFile(file, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return ""
	}
	defer f.Close()
	head := make([]byte, maxShebang)
	n, _ := f.ReadAt(head, 0)
	if head = head[:n]; !strings.HasPrefix(string(head), "#!") {
		return ""
	}
	name, _, _ := strings.Cut(strings.ReplaceAll(firstLine(head), "\t", " "), " ")
	return name
}

// inProcess is the file that a name given to execve means to a process.
func inProcess(pid int, name string) string {
	switch {
	case strings.HasPrefix(name, "/dev/fd/"): // fexecve
		return fmt.Sprintf("/proc/%d/fd/%s", pid, strings.TrimPrefix(name, "/dev/fd/"))
	case !filepath.IsAbs(name):
		return fmt.Sprintf("/proc/%d/cwd/%s", pid, name)
	}
	return fmt.Sprintf("/proc/%d/root%s", pid, name)
}

// look returns the program that file is. What it has not read before it opens
// now, while the process is stopped, so that no other file can take its place.
//
// A file whose times have settled is read while the process runs on: until its
// times are compared again afterwards nobody but root could have changed it
// unseen, and whatever runs it again in this state need not be read at all.
// A younger one could change within one tick of the clock. It is read at once,
// every time.
func (t *Tree) look(pid int, file, name string) (*program, error) {
	var st unix.Stat_t
	if err := unix.Stat(file, &st); err != nil {
		return nil, err
	}
	if p := t.files[idOf(&st)]; p != nil && p.settled {
		return p, nil
	}
	fd, err := openat(file, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK|unix.O_NOCTTY)
	if err != nil {
		return nil, err
	}
	now := t.now()
	if err := unix.Fstat(fd, &st); err != nil {
		unix.Close(fd)
		return nil, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		unix.Close(fd)
		return nil, errors.New("not a regular file")
	}
	p := &program{id: idOf(&st), hashed: make(chan struct{})}
	p.settled = now.Sub(time.Unix(p.id.ctime.Unix())) > settleTime && t.believes(pid, fd, p.id.dev, name)
	p.goTool = isGo(fd)
	p.gains = elevation(file, os.FileMode(st.Mode&0o777)|setBits(st.Mode))
	j := hashJob{fd, p, name}
	if p.settled {
		t.files[p.id] = p
		if t.work == nil {
			t.work = make(chan hashJob, hashAhead)
			t.done.Go(t.hashAll)
		}
		select {
		case t.work <- j:
			return p, nil
		default: // it is behind: wait here rather than hold ever more files open
		}
	}
	t.hash(j, make([]byte, readBuffer))
	if !p.settled && p.err == nil {
		// Of equal content there is one, so that a program which is built and
		// run a thousand times is one entry.
		if old := t.files[p.id]; old != nil && !old.settled && old.err == nil && old.sum == p.sum {
			return old, nil
		}
		if len(t.files) < maxRan {
			t.files[p.id] = p
		}
	}
	return p, nil
}

func (t *Tree) hashAll() {
	buf := make([]byte, bigBuffer)
	for j := range t.work {
		t.hash(j, buf)
	}
}

func (t *Tree) hash(j hashJob, buf []byte) {
	defer close(j.file.hashed)
	defer unix.Close(j.fd)
	d := sha256.New()
	var n, at int64
	for {
		k, err := unix.Pread(j.fd, buf, at)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			j.file.err = err
			break
		}
		if k == 0 {
			break
		}
		d.Write(buf[:k])
		at += int64(k)
		if n = at; n > j.file.id.size {
			break
		}
	}
	var st unix.Stat_t
	if j.file.err == nil {
		if err := unix.Fstat(j.fd, &st); err != nil {
			j.file.err = err
		} else if id := idOf(&st); n != id.size || id != j.file.id {
			j.file.err = ErrChanged
		}
	}
	if j.file.err != nil {
		t.gap("%s ran and could not be read: %v", j.name, j.file.err)
		return
	}
	d.Sum(j.file.sum[:0])
}

func (t *Tree) add(p *program, path, role string) {
	k := ranKey{p, path, role}
	if r := t.ran[k]; r != nil {
		r.count++
		return
	}
	if len(t.ran) >= maxRan || t.paths+len(path) > maxRanPaths {
		t.gap("more different programs ran than can be listed (%d)", len(t.ran))
		return
	}
	t.paths += len(path)
	t.ran[k] = &runs{count: 1}
}

// believes reports whether a file system's own clock stands for its files. One
// that any user can serve may show us another file than it gave the kernel.
func (t *Tree) believes(pid, fd int, dev uint64, name string) bool {
	if t.fs.ok(dev, fd) {
		return true
	}
	var fs unix.Statfs_t
	if err := unix.Fstatfs(fd, &fs); err != nil {
		return false
	}
	switch int64(fs.Type) & 0xffffffff {
	case unix.FUSE_SUPER_MAGIC:
		t.gap("%s lies on a FUSE file system, whose server may show another file than the kernel ran", name)
	case unix.OVERLAYFS_SUPER_MAGIC:
		// As good as its layers, which in a user namespace of their own
		// anybody can choose.
		own, err := os.Readlink("/proc/self/ns/user")
		theirs, err2 := os.Readlink(fmt.Sprintf("/proc/%d/ns/user", pid))
		if err != nil || err2 != nil || own != theirs {
			t.gap("%s lies on an overlay of another user namespace, whose layers may show another file than the kernel ran", name)
			return false
		}
		// Its upper layer may be a tmpfs; see trusted. What the step's user
		// cannot write stays as it is all the same.
		return unix.Faccessat(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", fd), unix.W_OK, unix.AT_EACCESS) != nil
	}
	return false
}

func setBits(mode uint32) (m os.FileMode) {
	if mode&unix.S_ISUID != 0 {
		m |= os.ModeSetuid
	}
	if mode&unix.S_ISGID != 0 {
		m |= os.ModeSetgid
	}
	return m
}

// isGo reports whether the file is the go command, whatever its name. The
// parser meets hostile files; one that trips it is not the go command.
func isGo(fd int) (is bool) {
	defer func() {
		if recover() != nil {
			is = false
		}
	}()
	info, err := buildinfo.Read(readerAt(fd))
	return err == nil && info.Path == "cmd/go"
}

type readerAt int

func (fd readerAt) ReadAt(b []byte, off int64) (n int, err error) {
	for n < len(b) {
		k, err := unix.Pread(int(fd), b[n:], off+int64(n))
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return n, err
		case k == 0:
			return n, io.EOF
		default:
			n += k
		}
	}
	return n, nil
}

// Result waits until all is hashed and returns what ran, and why that may not
// be all; no reason means that it is. Call it once, after Run.
func (t *Tree) Result() ([]link.Executable, []string) {
	if t.work != nil {
		close(t.work)
		t.done.Wait()
	}
	type line struct{ sum, path, role string }
	merged := map[line]int{}
	for k, r := range t.ran {
		<-k.file.hashed
		if k.file.err != nil {
			continue // a gap says so
		}
		merged[line{hex.EncodeToString(k.file.sum[:]), k.path, k.role}] += r.count
	}
	out := make([]link.Executable, 0, len(merged))
	for l, n := range merged {
		out = append(out, link.Executable{Path: l.path, Role: l.role, Count: n, Digest: map[string]string{"sha256": l.sum}})
	}
	slices.SortFunc(out, func(a, b link.Executable) int {
		return cmp.Or(cmp.Compare(rank(a.Role), rank(b.Role)), strings.Compare(a.Path, b.Path),
			strings.Compare(a.Role, b.Role), strings.Compare(a.Digest["sha256"], b.Digest["sha256"]))
	})
	t.mu.Lock()
	defer t.mu.Unlock()
	return out, slices.Clone(t.gaps)
}

// rank puts the main process first.
func rank(role string) int {
	if role == link.RoleTool {
		return 0
	}
	return 1
}

// stateOf is the state of a process as ps shows it, 0 when there is none.
func stateOf(pid int) byte {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0
	}
	if i := strings.LastIndexByte(string(b), ')'); i >= 0 && i+2 < len(b) {
		return b[i+2]
	}
	return 0
}
