package workload

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/singleflight"
	"golang.org/x/sys/unix"
)

const (
	// MaxExecutable bounds what is hashed for one process, in bytes.
	MaxExecutable = 4 << 30
	// minAge is how much older than the start of hashing a file's ctime must be
	// before its hash is kept: two changes within one tick of the file system's
	// clock (2 s on the coarsest) leave the same times.
	minAge = 2 * time.Second

	hashBuffer = 256 << 10
)

// Options bound the work of a Measurer.
type Options struct {
	BytesPerUID int64 // hashing budget per uid in bytes per second, 0 for the default
	// AllowFileSystems adds file system types by the names of /proc/filesystems.
	// Whoever serves such a file system is trusted as the host is; its files are
	// never cached.
	AllowFileSystems []string
	// AllUsers makes NewMeasurer fail without the capabilities to look at the
	// processes of other users.
	AllUsers bool
}

// Measurer hashes executables, with a cache under the rules of docs/plugin-binary.md.
type Measurer struct {
	missing []string
	memfd   uint64          // st_dev of memfd files
	rootDev uint64          // st_dev of our own /
	rootFS  string          // its type, "" when it does not vouch for files
	extra   map[string]bool // Options.AllowFileSystems
	budget  *budget
	slots   chan struct{} // one token for each file being hashed
	flight  singleflight.Group
	buffers sync.Pool

	mu    sync.Mutex
	cache map[fileID][32]byte // bounded by maxCache

	// Tests: called once a file is open and looked at, before it is hashed.
	beforeHash func()
}

const maxCache = 16384 // entries, about 2 MiB

// fileID names one state of one file. ctime cannot be set by a user.
type fileID struct {
	dev, ino     uint64
	size         int64
	mtime, ctime unix.Timespec
}

// NewMeasurer returns a Measurer. Without CAP_SYS_PTRACE and
// CAP_DAC_READ_SEARCH it can look only at processes of its own user: with
// Options.AllUsers that is an error which names what is missing, else
// Limitation says it.
func NewMeasurer(o Options) (*Measurer, error) {
	// A /proc of another pid namespace would show other processes under the
	// numbers that the kernel gives us.
	self, err := os.Readlink("/proc/self")
	if err != nil {
		return nil, fmt.Errorf("/proc is not mounted: %w", err)
	}
	if self != fmt.Sprint(os.Getpid()) {
		return nil, errors.New("/proc belongs to another pid namespace")
	}
	if o.BytesPerUID < 0 {
		return nil, errors.New("the hashing budget is negative")
	}
	m := &Measurer{
		missing: missingCapabilities(),
		extra:   map[string]bool{},
		budget:  newBudget(o.BytesPerUID),
		slots:   make(chan struct{}, max(2, runtime.GOMAXPROCS(0))),
		buffers: sync.Pool{New: func() any { b := make([]byte, hashBuffer); return &b }},
		cache:   map[fileID][32]byte{},
	}
	if o.AllUsers && len(m.missing) > 0 {
		return nil, &CapabilityError{Missing: m.missing}
	}
	for _, t := range o.AllowFileSystems {
		if t == "" || strings.ContainsAny(t, " \t\n/") {
			return nil, fmt.Errorf("not a file system type: %q", t)
		}
		m.extra[t] = true
	}
	if m.memfd, err = memfdDevice(); err != nil {
		return nil, fmt.Errorf("memfd: %w", err)
	}
	if m.rootDev, m.rootFS, err = rootFileSystem(); err != nil {
		return nil, fmt.Errorf("root file system: %w", err)
	}
	return m, nil
}

// Limitation returns a *CapabilityError when only processes of the agent's own
// user can be measured, else nil. The agent logs it as a warning.
func (m *Measurer) Limitation() error {
	if len(m.missing) == 0 {
		return nil
	}
	return &CapabilityError{Missing: m.missing}
}

// MeasurePeer is Measure of a pinned process.
func (m *Measurer) MeasurePeer(ctx context.Context, p *Peer) (*Measurement, error) {
	if err := p.Check(); err != nil {
		return nil, err
	}
	out, err := m.Measure(ctx, p.PID)
	if err != nil {
		return nil, err
	}
	if out.StartTime != p.StartTime {
		return nil, fmt.Errorf("process %d: another process has its pid now: %w", p.PID, ErrGone)
	}
	return out, p.Check()
}

// Measure opens /proc/PID/exe once, hashes it and describes the process.
func (m *Measurer) Measure(ctx context.Context, pid int) (*Measurement, error) {
	if pid <= 0 {
		return nil, ErrForeignPID
	}
	before, err := readStat(pid)
	if err != nil {
		return nil, err
	}
	status, err := readStatus(pid)
	if err != nil {
		return nil, err
	}
	id, sum, err := m.executable(ctx, pid, status.euid)
	if err != nil {
		return nil, err
	}
	out := &Measurement{
		PID: pid, StartTime: before.startTime, UID: status.euid, GID: status.egid,
		Dev: id.dev, Inode: id.ino, Size: id.size, SHA256: sum, id: id,
	}
	if out.Path, err = visiblePath(pid); err != nil {
		return nil, err
	}
	out.ParentSHA256 = m.parent(ctx, pid, before, status.euid)

	// The process must have stayed what it was while we looked.
	after, err := readStat(pid)
	if err != nil {
		return nil, err
	}
	if after.startTime != before.startTime {
		return nil, fmt.Errorf("process %d: another process has its pid now: %w", pid, ErrGone)
	}
	again, err := readStatus(pid)
	if err != nil {
		return nil, err
	}
	if again.euid != status.euid || again.egid != status.egid {
		return nil, fmt.Errorf("process %d changed its user or group: %w", pid, ErrChanged)
	}
	if err := m.SameImage(out); err != nil {
		return nil, err
	}
	return out, nil
}

// SameImage fails unless the process still runs the executable that was
// measured, unchanged since (device, inode, size, times); it hashes nothing.
// After a mere chmod or rename of the file, measure again.
func (m *Measurer) SameImage(was *Measurement) error {
	st, err := readStat(was.PID)
	if err != nil {
		return err
	}
	if st.startTime != was.StartTime {
		return fmt.Errorf("process %d: another process has its pid now: %w", was.PID, ErrGone)
	}
	fd, err := openExe(was.PID)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	id, _, err := statID(fd)
	if err != nil {
		return procErr(was.PID, err)
	}
	if id != was.id {
		return fmt.Errorf("process %d: %w", was.PID, ErrChanged)
	}
	return nil
}

// parent measures the parent, or returns nil: it may have exited, be the
// kernel, or be out of reach, none of which is a fault of pid.
func (m *Measurer) parent(ctx context.Context, pid int, child procStat, uid uint32) *[32]byte {
	if child.ppid <= 0 {
		return nil
	}
	before, err := readStat(child.ppid)
	if err != nil || before.startTime > child.startTime {
		return nil
	}
	_, sum, err := m.executable(ctx, child.ppid, uid)
	if err != nil {
		return nil
	}
	after, err := readStat(child.ppid)
	if err != nil || after.startTime != before.startTime {
		return nil
	}
	if now, err := readStat(pid); err != nil || now.ppid != child.ppid {
		return nil
	}
	return &sum
}

// openExe gets a handle on the executable without opening it: nothing is asked
// of its file system, so a FUSE server cannot stall us here.
func openExe(pid int) (int, error) {
	fd, err := unix.Open(fmt.Sprintf("/proc/%d/exe", pid), unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, procErr(pid, err)
	}
	return fd, nil
}

// executable hashes what pid runs, on uid's budget.
func (m *Measurer) executable(ctx context.Context, pid int, uid uint32) (fileID, [32]byte, error) {
	fail := func(err error) (fileID, [32]byte, error) { return fileID{}, [32]byte{}, err }
	fd, err := openExe(pid)
	if err != nil {
		return fail(err)
	}
	defer unix.Close(fd)
	fs, err := m.fileSystem(pid, fd)
	if err != nil {
		return fail(err)
	}
	// The same inode, now for reading.
	f, err := os.Open(fmt.Sprintf("/proc/self/fd/%d", fd))
	if err != nil {
		return fail(procErr(pid, err))
	}
	defer f.Close()
	start := time.Now()
	id, settled, err := statID(int(f.Fd()))
	if err != nil {
		return fail(fmt.Errorf("executable of process %d: %w", pid, err))
	}
	if id.size > MaxExecutable {
		return fail(fmt.Errorf("executable of process %d has %d bytes: %w", pid, id.size, ErrTooLarge))
	}
	if !fs.cacheable || !settled || start.Sub(time.Unix(id.ctime.Unix())) <= minAge {
		sum, err := m.hash(ctx, f, id, uid)
		return id, sum, err
	}
	m.mu.Lock()
	sum, ok := m.cache[id]
	m.mu.Unlock()
	if ok {
		return id, sum, nil
	}
	// Whoever comes first hashes for all, on its own budget. Only files old
	// enough for the cache are shared: what another began to hash before we
	// looked is the same file still.
	v, err, shared := m.flight.Do(fmt.Sprint(id), func() (any, error) {
		sum, err := m.hash(ctx, f, id, uid)
		if err == nil {
			m.remember(id, sum)
		}
		return sum, err
	})
	if err != nil && shared && ctx.Err() == nil && !errors.Is(err, ErrChanged) {
		// The leader gave up, or was out of its own budget, not ours.
		sum, err := m.hash(ctx, f, id, uid)
		if err == nil {
			m.remember(id, sum)
		}
		return id, sum, err
	}
	if err != nil {
		return fail(err)
	}
	return id, v.([32]byte), nil
}

func (m *Measurer) remember(id fileID, sum [32]byte) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.cache) >= maxCache {
		for k := range m.cache { // any one: the working set is far smaller
			delete(m.cache, k)
			break
		}
	}
	m.cache[id] = sum
}

// hash reads the whole file once, within budget, in bounded memory.
func (m *Measurer) hash(ctx context.Context, f *os.File, id fileID, uid uint32) (sum [32]byte, err error) {
	if m.beforeHash != nil {
		m.beforeHash()
	}
	release, err := m.budget.take(ctx, uid, id.size)
	if err != nil {
		return sum, err
	}
	defer release()
	select {
	case m.slots <- struct{}{}:
		defer func() { <-m.slots }()
	case <-ctx.Done():
		return sum, context.Cause(ctx)
	}
	buf := m.buffers.Get().(*[]byte)
	defer m.buffers.Put(buf)
	h := sha256.New()
	var n int64
	for n <= id.size { // one read past the end sees a file that grew
		if ctx.Err() != nil {
			return sum, context.Cause(ctx)
		}
		k, err := f.ReadAt(*buf, n)
		h.Write((*buf)[:k])
		n += int64(k)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return sum, fmt.Errorf("reading an executable: %w", err)
		}
	}
	after, _, err := statID(int(f.Fd()))
	if err != nil {
		return sum, err
	}
	if after != id || n != id.size {
		return sum, fmt.Errorf("while it was hashed: %w", ErrChanged)
	}
	h.Sum(sum[:0])
	return sum, nil
}

// statID returns the state of an open file, and whether it stays told apart
// from later ones by that. ctime alone does not do it: whoever may write to two
// files can exchange their blocks, by XFS_IOC_SWAPEXT and EXT4_IOC_MOVE_EXT,
// and neither's times change. A program cannot be started while somebody has
// it open for writing, so whoever may not open it now has no old handle either.
func statID(fd int) (id fileID, settled bool, err error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return fileID{}, false, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return fileID{}, false, errors.New("not a regular file")
	}
	return fileID{dev: uint64(st.Dev), ino: st.Ino, size: st.Size, mtime: st.Mtim, ctime: st.Ctim}, st.Nlink > 0 && onlyTrusted(&st), nil
}

// onlyTrusted reports whether root and the agent's own user alone may write to
// a file, or let others do so. With an access control list the bits of the
// group are its mask, so no entry of it gives more than they do.
func onlyTrusted(st *unix.Stat_t) bool {
	return (st.Uid == 0 || int(st.Uid) == os.Geteuid()) && st.Mode&0o022 == 0
}

// visiblePath is where the executable lies, when our paths are its paths.
func visiblePath(pid int) (string, error) {
	for _, kind := range []string{"user", "mnt"} {
		same, err := sameNamespace(pid, kind)
		if err != nil {
			return "", err
		}
		if !same {
			return "", nil
		}
	}
	p, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
	if err != nil {
		return "", procErr(pid, err)
	}
	// " (deleted)" marks an unlinked name; a file really called so loses its
	// path selector too, which is safe.
	if strings.HasSuffix(p, " (deleted)") || !printablePath(p) {
		return "", nil
	}
	return p, nil
}
