package recorder

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	readBuffer = 128 << 10 // bytes read at once, per worker
	bigFile    = 4 << 20   // bytes from which a file is started before others
	bigBuffer  = 512 << 10 // bytes read at once of a big file, twice
	queueDepth = 1 << 14   // files found and not yet hashed
	// settleTime: changes within one tick of a file system's clock leave the
	// same times; 2 s is the coarsest clock there is.
	settleTime = 2 * time.Second
)

// fileID names one state of one file.
type fileID struct {
	dev, ino     uint64
	size         int64
	mtime, ctime unix.Timespec
}

func idOf(st *unix.Stat_t) fileID {
	return fileID{dev: uint64(st.Dev), ino: st.Ino, size: st.Size, mtime: st.Mtim, ctime: st.Ctim}
}

type job struct {
	name   string
	follow bool // a symlink, or named by the user: open follows
	size   int64
	out    *file // written by the one worker that takes the job
}

// queue hands out big files first: one that is begun last is waited for alone.
type queue struct {
	mu     sync.Mutex // guards all below
	cond   sync.Cond
	big    []job
	small  []job
	closed bool
}

func newQueue() *queue {
	q := &queue{}
	q.cond.L = &q.mu
	return q
}

// put waits while the queue is full; false means that it was closed.
func (q *queue) put(j job) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	for !q.closed && len(q.big)+len(q.small) >= queueDepth {
		q.cond.Wait()
	}
	if q.closed {
		return false
	}
	if j.size >= bigFile {
		q.big = append(q.big, j)
	} else {
		q.small = append(q.small, j)
	}
	q.cond.Broadcast()
	return true
}

// take waits for a job; false means that there will be none.
func (q *queue) take() (job, bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for len(q.big)+len(q.small) == 0 {
		if q.closed {
			return job{}, false
		}
		q.cond.Wait()
	}
	from := &q.small
	if len(q.big) > 0 {
		from = &q.big
	}
	last := len(*from) - 1
	j := (*from)[last]
	(*from)[last] = job{}
	*from = (*from)[:last]
	if len(q.big)+len(q.small) == queueDepth-1 {
		q.cond.Broadcast()
	}
	return j, true
}

func (q *queue) close() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.closed = true
	q.cond.Broadcast()
}

func (h *hasher) work(ctx context.Context, q *queue) error {
	buf := make([]byte, readBuffer)
	for {
		j, ok := q.take()
		if !ok {
			return nil
		}
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		if err := h.hash(ctx, j, buf); err != nil {
			return err
		}
	}
}

// hash reads a file once. It speaks to the kernel itself: 20,000 small files
// feel what os.File adds to each.
func (h *hasher) hash(ctx context.Context, j job, buf []byte) error {
	// NONBLOCK: the name may have become a FIFO since it was looked at.
	flags := unix.O_RDONLY | unix.O_CLOEXEC | unix.O_NONBLOCK | unix.O_NOCTTY
	if !j.follow {
		flags |= unix.O_NOFOLLOW
	}
	fd, err := openat(j.name, flags)
	if err != nil {
		return &os.PathError{Op: "open", Path: j.name, Err: err}
	}
	defer unix.Close(fd)
	start := time.Now()
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return &os.PathError{Op: "stat", Path: j.name, Err: err}
	}
	id := idOf(&st)
	if st.Mode&unix.S_IFMT != unix.S_IFREG || id != j.out.id {
		return fmt.Errorf("%s: %w", j.name, ErrChanged)
	}
	d := sha256.New()
	var n int64
	if id.size >= bigFile {
		n, err = h.readBig(ctx, fd, id.size, d)
	} else {
		n, err = readSmall(fd, id.size, d, buf)
	}
	if err != nil {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		return &os.PathError{Op: "read", Path: j.name, Err: err}
	}
	if err := unix.Fstat(fd, &st); err != nil {
		return &os.PathError{Op: "stat", Path: j.name, Err: err}
	}
	if n != id.size || idOf(&st) != id {
		return fmt.Errorf("%s: %w", j.name, ErrChanged)
	}
	d.Sum(j.out.sum[:0])
	j.out.settled = start.Sub(time.Unix(id.ctime.Unix())) > settleTime && h.fs.ok(id.dev, fd)
	if id.size >= bigFile {
		h.report(1, 0)
	} else {
		h.report(1, n)
	}
	return nil
}

// readSmall reads no further than size: one more read would only find the end,
// and that the file grew shows in its times.
func readSmall(fd int, size int64, d io.Writer, buf []byte) (n int64, err error) {
	for n < size {
		k, err := read(fd, buf)
		if err != nil || k == 0 {
			return n, err
		}
		d.Write(buf[:k])
		n += int64(k)
	}
	return n, nil
}

// readBig reads the next piece while the last is hashed: of one big file among
// many small ones nothing else can be done in parallel, and everything waits
// for it.
func (h *hasher) readBig(ctx context.Context, fd int, size int64, d io.Writer) (n int64, err error) {
	free, full := make(chan []byte, 2), make(chan []byte, 2)
	for range cap(free) {
		free <- make([]byte, bigBuffer)
	}
	var readErr error // written before full is closed
	go func() {
		defer close(full)
		for got := int64(0); got < size; {
			b, ok := <-free
			if !ok {
				return
			}
			k, err := read(fd, b[:cap(b)])
			if readErr = err; err != nil || k == 0 {
				return
			}
			got += int64(k)
			full <- b[:k]
		}
	}()
	for b := range full {
		if err = ctx.Err(); err != nil {
			break
		}
		d.Write(b)
		n += int64(len(b))
		h.report(0, int64(len(b)))
		free <- b
	}
	close(free)
	for range full { // the reader must be done with fd before the caller closes it
	}
	return n, errors.Join(err, readErr)
}

func read(fd int, b []byte) (int, error) {
	for {
		n, err := unix.Read(fd, b)
		if err != unix.EINTR {
			return n, err
		}
	}
}

func openat(name string, flags int) (int, error) {
	for {
		fd, err := unix.Open(name, flags, 0)
		if err != unix.EINTR {
			return fd, err
		}
	}
}

// trusted remembers which devices hold file systems whose ctime this kernel
// keeps itself: a network or FUSE server may change a file and not its times.
// tmpfs is none of them: what is written through a shared mapping of a page
// that was read before leaves its times alone.
type trusted struct {
	mu  sync.Mutex
	dev map[uint64]bool
}

func (t *trusted) ok(dev uint64, fd int) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	ok, known := t.dev[dev]
	if known {
		return ok
	}
	var fs unix.Statfs_t
	if unix.Fstatfs(fd, &fs) == nil {
		switch int64(fs.Type) & 0xffffffff {
		case unix.EXT4_SUPER_MAGIC, unix.XFS_SUPER_MAGIC, unix.BTRFS_SUPER_MAGIC, unix.F2FS_SUPER_MAGIC:
			ok = true
		}
	}
	if t.dev == nil {
		t.dev = map[uint64]bool{}
	}
	t.dev[dev] = ok
	return ok
}
