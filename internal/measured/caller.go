// Package measured is what serves measured callers on a Unix socket: it pins
// each process the moment it connects, measures what it runs, and keeps what was
// seen of a recorded step with its connection. The agent's endpoint and the node
// attestor's quoter socket are built on it.
package measured

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net"
	"sync"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/internal/workload"
)

// Caller is the process at the other end of one connection.
type Caller struct {
	uid   uint32 // as stamped at connect; only for accounting
	image image  // what it ran when the connection was accepted
	err   error  // why it could not be pinned; then peer is nil

	mu     sync.Mutex
	peer   *workload.Peer // guarded by mu: Close releases its pidfd, whose number is then reused
	closed bool

	// Step is what was measured on this connection. It is used between Lock and
	// the unlock that Lock returns.
	Step Step
	turn chan struct{} // capacity 1: held by the call that uses Step
}

// image names an executable in use. While a process runs it, the inode cannot
// be freed for another file, nor can its contents be written.
type image struct{ dev, ino uint64 }

func newCaller(c *net.UnixConn) *Caller {
	ca := &Caller{uid: peerUID(c), turn: make(chan struct{}, 1)}
	p, err := workload.PeerOf(c)
	if err != nil {
		ca.err = err
		return ca
	}
	if ca.image, err = imageOf(p.PID); err == nil {
		err = p.Check()
	}
	if err != nil {
		p.Close()
		ca.err = err
		return ca
	}
	ca.peer = p
	return ca
}

// peerUID is for counting connections, also of peers that cannot be pinned.
func peerUID(c *net.UnixConn) uint32 {
	uid := uint32(math.MaxUint32)
	if raw, err := c.SyscallConn(); err == nil {
		raw.Control(func(fd uintptr) {
			if cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
				uid = cred.Uid
			}
		})
	}
	return uid
}

// imageOf looks at the executable without opening it for reading.
func imageOf(pid int) (image, error) {
	var st unix.Stat_t
	switch err := unix.Stat(fmt.Sprintf("/proc/%d/exe", pid), &st); {
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		return image{}, &workload.CapabilityError{PID: pid, Err: err}
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ESRCH):
		return image{}, fmt.Errorf("process %d: %w", pid, workload.ErrGone)
	case err != nil:
		return image{}, fmt.Errorf("executable of process %d: %w", pid, err)
	}
	return image{uint64(st.Dev), st.Ino}, nil
}

func (c *Caller) close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = true
	if c.peer != nil {
		c.peer.Close()
	}
	c.Step.release()
}

// ErrReplaced is the answer to a process that exec'd another program over
// itself: what was measured is not what would get the key.
var ErrReplaced = errors.New("the process runs another executable than when it connected")

// With calls fn with the pinned peer while it cannot be released.
func (c *Caller) With(fn func(*workload.Peer) error) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.err != nil:
		return c.err
	case c.closed:
		return workload.ErrGone
	}
	return fn(c.peer)
}

// Check fails unless the very process that connected still runs the very
// executable that it ran then. It is called before every reply that holds
// anything secret.
func (c *Caller) Check() error {
	return c.With(func(p *workload.Peer) error {
		if err := p.Check(); err != nil {
			return err
		}
		now, err := imageOf(p.PID)
		if err != nil {
			return err
		}
		if now != c.image {
			return ErrReplaced
		}
		return nil
	})
}

// Attestor measures one process. Its errors are statuses.
type Attestor func(ctx context.Context, pid int) (Subject, error)

// Measure asks the attestor about the caller, and makes sure that the process
// was the same before and after.
func (c *Caller) Measure(ctx context.Context, a Attestor) (Subject, error) {
	if err := c.Check(); err != nil {
		return Subject{}, Error(err)
	}
	s, err := a(ctx, c.peer.PID)
	if err != nil {
		return Subject{}, err
	}
	if err := c.Check(); err != nil {
		return Subject{}, Error(err)
	}
	return s, nil
}

// PID is the caller's number, for looking at it and never for trusting it.
func (c *Caller) PID() (pid int, err error) {
	err = c.With(func(p *workload.Peer) error { pid = p.PID; return nil })
	return pid, err
}

// Error is the one place that turns what can be wrong with a caller into
// a status.
func Error(err error) error {
	return status.Error(codes.PermissionDenied, cli.JoinHint(err.Error(), workload.Hint(err)))
}
