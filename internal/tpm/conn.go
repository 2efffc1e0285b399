package tpm

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"github.com/google/go-tpm/tpm2"
	"golang.org/x/sys/unix"
)

const (
	// maxResponse bounds a response; TPM 2.0 parts in use answer within 4 KiB.
	maxResponse  = 8 << 10
	headerSize   = 10
	dialTimeout  = 5 * time.Second
	retryFirst   = 5 * time.Millisecond   // first wait after TPM_RC_RETRY and its kin
	retryLongest = 500 * time.Millisecond // waits double up to this
	restartTime  = 5 * time.Second        // how long a TPM that was there may be away
)

// conn is one connection to a TPM. Only the owner goroutine uses it.
type conn struct {
	t      wire
	ctx    context.Context // of the running job; a command ends with it
	broken error           // what lost the connection; it answers nothing any more
}

// wire moves one command and its response.
type wire interface {
	roundTrip(ctx context.Context, cmd []byte) ([]byte, error)
	Close() error
}

func dial(ctx context.Context, a Address) (*conn, error) {
	var t wire
	switch a.kind {
	case KindUnix, KindTCP:
		network := "unix"
		if a.kind == KindTCP {
			network = "tcp"
		}
		d := net.Dialer{Timeout: dialTimeout}
		c, err := d.DialContext(ctx, network, a.path)
		if err != nil {
			return nil, &connError{fmt.Errorf("%w: %w", ErrUnreachable, err)}
		}
		t = &socket{c}
	default:
		// Non-blocking, so that the kernel runs the command while we poll and a
		// deadline can end the wait. os.File would spin on the device's empty reads.
		fd, err := unix.Open(a.path, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
		if err != nil {
			return nil, &connError{fmt.Errorf("%w: %w", ErrUnreachable, &os.PathError{Op: "open", Path: a.path, Err: err})}
		}
		t = &charDevice{fd}
	}
	return &conn{t: t, ctx: ctx}, nil
}

// Send implements transport.TPM. It waits and sends again when the TPM asks for
// that: the command was not executed, so nothing is done twice.
func (c *conn) Send(cmd []byte) ([]byte, error) {
	if c.broken != nil {
		return nil, &connError{c.broken}
	}
	wait := retryFirst
	for {
		rsp, err := c.t.roundTrip(c.ctx, cmd)
		if err != nil {
			c.broken = err
			return nil, &connError{err}
		}
		switch tpm2.TPMRC(binary.BigEndian.Uint32(rsp[6:headerSize])) {
		case tpm2.TPMRCRetry, tpm2.TPMRCYielded, tpm2.TPMRCTesting, tpm2.TPMRCNVRate:
		default:
			return rsp, nil
		}
		select {
		case <-c.ctx.Done():
			return nil, fmt.Errorf("TPM is busy: %w", c.ctx.Err())
		case <-time.After(wait):
		}
		wait = min(2*wait, retryLongest)
	}
}

func (c *conn) Close() error { return c.t.Close() }

var errShortResponse = errors.New("malformed response header")

// socket speaks raw TPM commands over a stream, as swtpm does.
type socket struct{ c net.Conn }

func (s *socket) Close() error { return s.c.Close() }

func (s *socket) roundTrip(ctx context.Context, cmd []byte) ([]byte, error) {
	deadline, _ := ctx.Deadline() // zero: none
	if err := s.c.SetDeadline(deadline); err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { s.c.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	if _, err := s.c.Write(cmd); err != nil {
		return nil, err
	}
	rsp := make([]byte, headerSize, 1024)
	if _, err := io.ReadFull(s.c, rsp); err != nil {
		return nil, err
	}
	size := binary.BigEndian.Uint32(rsp[2:6])
	if size < headerSize || size > maxResponse {
		return nil, fmt.Errorf("%w: size %d", errShortResponse, size)
	}
	rsp = append(rsp, make([]byte, size-headerSize)...)
	if _, err := io.ReadFull(s.c, rsp[headerSize:]); err != nil {
		return nil, err
	}
	return rsp, nil
}

// charDevice is /dev/tpmrm0 or /dev/tpm0.
type charDevice struct{ fd int }

func (d *charDevice) Close() error { return unix.Close(d.fd) }

func (d *charDevice) roundTrip(ctx context.Context, cmd []byte) ([]byte, error) {
	n, err := unix.Write(d.fd, cmd)
	if err != nil {
		return nil, os.NewSyscallError("write", err)
	}
	if n != len(cmd) {
		return nil, io.ErrShortWrite
	}
	rsp := make([]byte, maxResponse)
	for {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		fds := []unix.PollFd{{Fd: int32(d.fd), Events: unix.POLLIN}}
		// A short timeout, because a cancelled context cannot wake poll.
		if _, err := unix.Poll(fds, 50); err != nil && err != unix.EINTR {
			return nil, os.NewSyscallError("poll", err)
		}
		if fds[0].Revents == 0 {
			continue
		}
		n, err := unix.Read(d.fd, rsp)
		if err == unix.EINTR || err == unix.EAGAIN {
			continue
		}
		if err != nil {
			return nil, os.NewSyscallError("read", err)
		}
		if n < headerSize || binary.BigEndian.Uint32(rsp[2:6]) != uint32(n) {
			return nil, fmt.Errorf("%w: %d bytes", errShortResponse, n)
		}
		return rsp[:n], nil
	}
}
