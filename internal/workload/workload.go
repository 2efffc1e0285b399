// Package workload turns a process into what can be said of it: who it is on
// this host, and which executable it runs.
package workload

import (
	"context"
	"errors"
	"net"
)

var errNotImplemented = errors.New("workload: not implemented")

// Peer is the process at the other end of a Unix socket connection, pinned by
// pidfd where the kernel has SO_PEERPIDFD, else by its start time.
type Peer struct {
	PID       int
	UID, GID  uint32 // as stamped at connect (SO_PEERCRED)
	StartTime uint64 // clock ticks since boot, field 22 of /proc/PID/stat
	pidfd     int    // -1 without SO_PEERPIDFD
}

// PeerOf pins the peer of a Unix socket connection. Pid 0 (a peer outside our
// pid namespace) is an error with a hint.
func PeerOf(c *net.UnixConn) (*Peer, error) { return nil, errNotImplemented }

// Check fails unless the very process that was pinned still runs.
func (p *Peer) Check() error { return errNotImplemented }

// Close releases the pidfd.
func (p *Peer) Close() error { return nil }

// Measurement is what was seen of one process at one moment.
type Measurement struct {
	PID          int
	StartTime    uint64
	UID, GID     uint32
	Dev, Inode   uint64
	SHA256       [32]byte
	Path         string    // only when caller and agent share user and mount namespaces
	ParentSHA256 *[32]byte // nil when the parent could not be measured
}

// Selectors returns values without the "binary:" type, sorted: sha256:<hex>,
// uid:<n>, gid:<n>, path:<path>, parent:sha256:<hex>.
func (m *Measurement) Selectors() []string { return nil }

// Options bound the work of a Measurer.
type Options struct {
	BytesPerUID int64 // hashing budget per uid in bytes per second, 0 for the default
}

// Measurer hashes executables, with a cache under the rules of docs/plugin-binary.md.
type Measurer struct{}

// NewMeasurer returns a Measurer, or an error that names the capability this
// process lacks.
func NewMeasurer(o Options) (*Measurer, error) { return nil, errNotImplemented }

// Measure opens /proc/PID/exe once, hashes it and describes the process.
func (m *Measurer) Measure(ctx context.Context, pid int) (*Measurement, error) {
	return nil, errNotImplemented
}

// SameImage fails unless pid still runs the executable (device and inode) that
// was measured; it hashes nothing.
func (m *Measurer) SameImage(was *Measurement) error { return errNotImplemented }

// StoppedChild finds the one child of caller that is stopped under ptrace by
// caller (PPid = caller, state t, Tgid(TracerPid) = caller) and pins it. None
// or two are errors.
func StoppedChild(caller *Peer) (*Peer, error) { return nil, errNotImplemented }

// RecorderProtected reports whether caller connected with the recorder group's
// gid and is not traced; reason says why not.
func RecorderProtected(caller *Peer, recorderGID uint32) (ok bool, reason string) {
	return false, "not implemented"
}
