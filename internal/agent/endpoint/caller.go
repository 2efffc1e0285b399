package endpoint

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"

	workloadattestorv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/agent/workloadattestor/v1"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/rootlink/rootlink/internal/agent/identity"
	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/internal/workload"
)

// caller is the process at the other end of one connection.
type caller struct {
	uid   uint32 // as stamped at connect; only for accounting
	image image  // what it ran when the connection was accepted
	err   error  // why it could not be pinned; then peer is nil

	mu     sync.Mutex
	peer   *workload.Peer // guarded by mu: Close releases its pidfd, whose number is then reused
	closed bool

	step step // what the Issuer keeps for this connection
}

// image names an executable in use. While a process runs it, the inode cannot
// be freed for another file, nor can its contents be written.
type image struct{ dev, ino uint64 }

func newCaller(c *net.UnixConn) *caller {
	ca := &caller{uid: peerUID(c), step: step{turn: make(chan struct{}, 1)}}
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

func (c *caller) close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = true
	if c.peer != nil {
		c.peer.Close()
	}
	c.step.release()
}

// errReplaced is the answer to a process that exec'd another program over
// itself: what was measured is not what would get the key.
var errReplaced = errors.New("the process runs another executable than when it connected")

// with calls fn with the pinned peer while it cannot be released.
func (c *caller) with(fn func(*workload.Peer) error) error {
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

// check fails unless the very process that connected still runs the very
// executable that it ran then. It is called before every reply that holds
// anything secret.
func (c *caller) check() error {
	return c.with(func(p *workload.Peer) error {
		if err := p.Check(); err != nil {
			return err
		}
		now, err := imageOf(p.PID)
		if err != nil {
			return err
		}
		if now != c.image {
			return errReplaced
		}
		return nil
	})
}

// measure asks the workload attestor about the caller, and makes sure that the
// process was the same before and after.
func (c *caller) measure(ctx context.Context, a workloadattestorv1.WorkloadAttestorClient) (identity.Subject, error) {
	if err := c.check(); err != nil {
		return identity.Subject{}, callerError(err)
	}
	s, err := attestPID(ctx, a, c.peer.PID)
	if err != nil {
		return identity.Subject{}, err
	}
	if err := c.check(); err != nil {
		return identity.Subject{}, callerError(err)
	}
	return s, nil
}

// attestPID asks the plugin about one process.
func attestPID(ctx context.Context, a workloadattestorv1.WorkloadAttestorClient, pid int) (identity.Subject, error) {
	if pid <= 0 || pid > math.MaxInt32 {
		return identity.Subject{}, status.Errorf(codes.PermissionDenied, "no such process: %d", pid)
	}
	resp, err := a.Attest(ctx, &workloadattestorv1.AttestRequest{Pid: int32(pid)})
	if err != nil {
		return identity.Subject{}, attestError(err)
	}
	s, err := identity.NewSubject(resp.GetSelectorValues())
	if err != nil {
		return identity.Subject{}, status.Error(codes.PermissionDenied, err.Error())
	}
	return s, nil
}

// attestError keeps the codes that tell the caller to wait, and denies else.
func attestError(err error) error {
	st := status.Convert(err)
	switch st.Code() {
	case codes.Unavailable, codes.ResourceExhausted, codes.DeadlineExceeded, codes.Canceled:
		return status.Errorf(st.Code(), "measure the caller: %s", st.Message())
	}
	return status.Errorf(codes.PermissionDenied, "measure the caller: %s", st.Message())
}

// callerError is the one place that turns what can be wrong with a caller into
// a status.
func callerError(err error) error {
	return status.Error(codes.PermissionDenied, cli.JoinHint(err.Error(), workload.Hint(err)))
}

// peerCredentials carry the caller from the listener to the handlers.
type peerCredentials struct{}

type authInfo struct {
	credentials.CommonAuthInfo
	caller *caller
}

func (authInfo) AuthType() string { return "unix-peer" }

var errNotUnix = errors.New("connection did not come from the agent's listener")

func (peerCredentials) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	c, ok := raw.(*conn)
	if !ok {
		return nil, nil, errNotUnix
	}
	return c, authInfo{credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity}, c.caller}, nil
}

func (peerCredentials) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("server side only")
}

func (peerCredentials) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "unix-peer"}
}
func (peerCredentials) Clone() credentials.TransportCredentials { return peerCredentials{} }
func (peerCredentials) OverrideServerName(string) error         { return nil }

func callerOf(ctx context.Context) (*caller, error) {
	if p, ok := peer.FromContext(ctx); ok {
		if a, ok := p.AuthInfo.(authInfo); ok {
			return a.caller, nil
		}
	}
	return nil, status.Error(codes.Internal, errNotUnix.Error())
}

// exeName is the file name of the program that a process runs, for people only.
func exeName(pid int) (string, error) {
	path, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
	if err != nil {
		return "", err
	}
	return filepath.Base(strings.TrimSuffix(path, " (deleted)")), nil
}
