package workload

import (
	"errors"
	"fmt"
	"net"

	"golang.org/x/sys/unix"
)

// Peer is a process, pinned by a pidfd where the kernel has one and by its
// start time always: the peer of a Unix socket connection or the child of one.
type Peer struct {
	PID       int
	UID, GID  uint32 // of a connection: as stamped at connect (SO_PEERCRED); of a child: as found
	StartTime uint64 // clock ticks since boot, field 22 of /proc/PID/stat
	pidfd     int    // -1 without
}

// PeerOf pins the peer of a Unix socket connection. Call it as soon as the
// connection is accepted. Pid 0 (a peer outside our pid namespace) is
// ErrForeignPID.
//
// SO_PEERPIDFD (Linux 6.5) names the process that connected beyond doubt.
// Older kernels give a number: between connect and here the process may have
// died and its pid been reused. A process younger than this call is refused;
// what remains is a full turn of the pid counter between connect and accept.
func PeerOf(c *net.UnixConn) (*Peer, error) { return peerOf(c, true) }

func peerOf(c *net.UnixConn, peerPidfd bool) (*Peer, error) {
	now, err := bootTicks()
	if err != nil {
		return nil, fmt.Errorf("boot clock: %w", err)
	}
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	var cred *unix.Ucred
	var credErr error
	pidfd := -1
	err = raw.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
		if credErr != nil || cred.Pid == 0 || !peerPidfd {
			return
		}
		n, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_PEERPIDFD)
		switch {
		case err == nil:
			pidfd = n
			unix.CloseOnExec(n)
		case errors.Is(err, unix.ENOPROTOOPT):
			// Kernels before 6.5.
		case errors.Is(err, unix.ESRCH), errors.Is(err, unix.EINVAL):
			credErr = ErrGone // reaped since it connected
		case errors.Is(err, unix.ENODATA):
			credErr = ErrForeignPID
		default:
			credErr = err
		}
	})
	if err == nil {
		err = credErr
	}
	if err != nil {
		return nil, fmt.Errorf("peer of the connection: %w", err)
	}
	if cred.Pid == 0 {
		return nil, ErrForeignPID
	}
	p := &Peer{PID: int(cred.Pid), UID: cred.Uid, GID: cred.Gid, pidfd: pidfd}
	if err := p.pin(now); err != nil {
		p.Close()
		return nil, err
	}
	return p, nil
}

// pin records the start time. With a pidfd that still lives afterwards, the
// time read was that of the pinned process.
func (p *Peer) pin(notAfter uint64) error {
	st, err := readStat(p.PID)
	if err != nil {
		return err
	}
	if st.startTime > notAfter {
		return fmt.Errorf("process %d started after it connected: pid reused: %w", p.PID, ErrGone)
	}
	p.StartTime = st.startTime
	if p.pidfd < 0 {
		// From here on a pidfd of the number pins as well as SO_PEERPIDFD
		// would; the start time, read on both sides of the open, ties it to p.
		if fd, err := unix.PidfdOpen(p.PID, 0); err == nil {
			p.pidfd = fd
		}
	}
	return p.Check()
}

// Check fails unless the very process that was pinned still runs.
func (p *Peer) Check() error {
	st, err := readStat(p.PID)
	if err != nil {
		return err
	}
	if st.startTime != p.StartTime {
		return fmt.Errorf("process %d: another process has its pid now: %w", p.PID, ErrGone)
	}
	if st.state == 'Z' || st.state == 'X' {
		return fmt.Errorf("process %d has exited: %w", p.PID, ErrGone)
	}
	if p.pidfd >= 0 {
		if err := unix.PidfdSendSignal(p.pidfd, 0, nil, 0); err != nil && !errors.Is(err, unix.EPERM) {
			return fmt.Errorf("process %d: %w", p.PID, ErrGone)
		}
	}
	return nil
}

// Close releases the pidfd.
func (p *Peer) Close() error {
	if p.pidfd < 0 {
		return nil
	}
	fd := p.pidfd
	p.pidfd = -1
	return unix.Close(fd)
}
