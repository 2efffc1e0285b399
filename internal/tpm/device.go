// Package tpm is the device side of attestation: it reads the EK, makes and
// keeps the AK, activates credentials and quotes.
//
// A software TPM has three slots for objects, three for sessions, and serves one
// client at a time. So one goroutine owns a Device: operations queue for it, and
// when none is waiting it leaves nothing loaded and, where only one client fits,
// closes the connection, so that tpm2-tools get their turn. Connecting and loading
// the AK from a saved context again costs about half a millisecond on swtpm
// (BenchmarkIdleQuote against BenchmarkBusyQuote).
//
// No exported function signs data chosen by its caller. QuoteNode and
// QuoteLeaves take fields and hash them through pkg/attest, so that nobody who
// reaches this API can have the TPM vouch for something else.
package tpm

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime/debug"
	"time"

	"github.com/google/go-tpm/tpm2"
)

// defaultDeadline bounds an operation whose context has none. RSA primaries take
// up to half a minute on slow parts.
const defaultDeadline = 60 * time.Second

// idleTimeout bounds the tidying before the TPM is left to others. The next
// operation waits for it, and flushes again.
const idleTimeout = time.Second

// Options configure a Device.
type Options struct {
	// Address is the device flag: /dev/tpmrm0, unix:PATH or tcp:HOST:PORT.
	Address string
	// DataDir holds the AK and is locked while the Device is open. Without one
	// the Device can describe the TPM but has no AK.
	DataDir string
	// AllowSharedDevice accepts a device that other users of the host can open,
	// although each of them can then act as this node.
	AllowSharedDevice bool
	// EKTypes is the order in which EK certificates are looked for; empty means
	// DefaultEKTypes.
	EKTypes []EKType
	// QuoteLatency is added to every quote, to measure on a software TPM what a
	// slow hardware one would do to the rest.
	QuoteLatency time.Duration
	// Log receives alarms; nil means slog.Default().
	Log *slog.Logger
}

// Device is an open TPM. Its methods may be called from any goroutine.
type Device struct {
	addr Address
	opts Options
	log  *slog.Logger
	lock *os.File // held on the data directory; nil without one

	jobs    chan *job
	closing context.Context // done once Close is called
	close   context.CancelFunc
	done    chan struct{} // closed when the owner has ended
}

// longestTurn bounds how long an unbroken run of operations keeps a TPM that
// serves one client at a time from the others.
const longestTurn = 500 * time.Millisecond

// job is one operation. It owns the connection while it runs.
type job struct {
	ctx  context.Context
	run  func(*state) error
	done chan error // buffered: the caller may have gone
}

// state belongs to the owner goroutine.
type state struct {
	d     *Device
	conn  *conn
	since time.Time // of conn
	fresh bool      // connected, leftovers not yet flushed
	met   bool      // was connected before

	ek        *EK            // as first seen
	ak        *akFile        // as on disk
	akHandle  tpm2.TPMHandle // 0: not loaded
	akContext *tpm2.TPMSContext
	props     *properties
}

// Open checks the address, that nobody else can open the device, and locks the
// data directory. It does not talk to the TPM, which may be busy or restarting.
func Open(o Options) (*Device, error) {
	addr, err := ParseAddress(o.Address)
	if err != nil {
		return nil, err
	}
	if err := checkDevice(addr, o.AllowSharedDevice); err != nil {
		return nil, err
	}
	if len(o.EKTypes) == 0 {
		o.EKTypes = DefaultEKTypes()
	}
	for _, t := range o.EKTypes {
		if _, err := ekSpecOf(t); err != nil {
			return nil, err
		}
	}
	if o.Log == nil {
		o.Log = slog.Default()
	}
	d := &Device{
		addr: addr, opts: o, log: o.Log.With("tpm", addr.String()),
		jobs: make(chan *job), done: make(chan struct{}),
	}
	d.closing, d.close = context.WithCancel(context.Background())
	if o.DataDir != "" {
		if d.lock, err = lockDataDir(o.DataDir); err != nil {
			d.close()
			return nil, err
		}
	}
	go d.own()
	return d, nil
}

// Close ends the running operation, flushes what is loaded and releases the
// data directory.
func (d *Device) Close() error {
	d.close()
	<-d.done
	return nil
}

// Address returns the device's address.
func (d *Device) Address() Address { return d.addr }

// own is the owner goroutine.
func (d *Device) own() {
	st := &state{d: d}
	defer func() {
		st.idle()
		st.drop()
		if d.lock != nil {
			d.lock.Close() // releases the flock
		}
		close(d.done)
	}()
	for {
		select {
		case j := <-d.jobs:
			if time.Since(st.since) > longestTurn {
				st.idle()
			}
			j.done <- st.perform(j)
			continue
		case <-d.closing.Done():
			return
		default:
		}
		st.idle()
		select {
		case j := <-d.jobs:
			j.done <- st.perform(j)
		case <-d.closing.Done():
			return
		}
	}
}

// do runs fn on the owner goroutine and returns when it is done or ctx is.
func do[T any](ctx context.Context, d *Device, what string, fn func(*state) (T, error)) (T, error) {
	var zero T
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, defaultDeadline)
		defer cancel()
	}
	var out T
	j := &job{ctx: ctx, done: make(chan error, 1), run: func(s *state) (err error) {
		out, err = fn(s)
		return err
	}}
	select {
	case d.jobs <- j:
	case <-d.closing.Done():
		return zero, ErrClosed
	case <-ctx.Done():
		return zero, fmt.Errorf("%s: waiting for the TPM: %w", what, ctx.Err())
	}
	select {
	case err := <-j.done:
		if err != nil {
			return zero, typed(what, err)
		}
		return out, nil
	case <-ctx.Done():
		// The owner finishes the command that runs; its result is lost.
		return zero, fmt.Errorf("%s: %w", what, ctx.Err())
	}
}

// perform runs j, on a new connection after a lost one, until it succeeds, the
// TPM refuses, or the context ends. Every operation may be run twice: none
// changes the TPM.
func (s *state) perform(j *job) error {
	ctx, cancel := context.WithCancelCause(j.ctx)
	defer cancel(nil)
	defer context.AfterFunc(s.d.closing, func() { cancel(ErrClosed) })()
	wait := retryFirst
	var lost time.Time // since when no TPM answers
	for {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		err := s.connect(ctx)
		if err == nil {
			err = s.guarded(j.run)
		}
		switch {
		case err == nil:
			if s.conn.broken != nil {
				s.drop()
			}
			return nil
		case outOfSlots(err) && s.d.addr.exclusive() && !s.fresh:
			// Somebody (a tool that was killed) left the slots full.
			s.distrust()
		case isConnError(err):
			s.drop()
			if ctx.Err() != nil {
				return fmt.Errorf("%w: %w", context.Cause(ctx), err)
			}
			if errors.Is(err, os.ErrPermission) {
				return err // will not mend itself
			}
			if errors.Is(err, ErrUnreachable) {
				if lost.IsZero() {
					lost = time.Now()
				}
				// A TPM that was there is given time to restart. One that never
				// was is not there, and so is one that stays away.
				if !s.met || time.Since(lost) > restartTime {
					return err
				}
			}
			s.d.log.Debug("connection to the TPM failed, trying again", "error", err)
		default:
			s.distrust()
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w: %w", context.Cause(ctx), err)
		case <-time.After(wait):
		}
		wait = min(2*wait, retryLongest)
	}
}

// guarded turns a panic of a library on a TPM's odd answer into an error. The
// connection goes with it, because nobody knows what is loaded.
func (s *state) guarded(fn func(*state) error) (err error) {
	defer func() {
		if r := recover(); r != nil {
			s.d.log.Error("panic in a TPM operation", "panic", r, "stack", string(debug.Stack()))
			s.drop()
			err = fmt.Errorf("internal error in a TPM operation: %v", r)
		}
	}()
	return fn(s)
}

// connect makes sure of a connection without another's leftovers.
func (s *state) connect(ctx context.Context) error {
	if s.conn == nil {
		c, err := dial(ctx, s.d.addr)
		if err != nil {
			return err
		}
		s.conn, s.since, s.fresh, s.met = c, time.Now(), true, true
		s.forget()
	}
	s.conn.ctx = ctx
	if s.fresh && s.d.addr.exclusive() {
		// Being connected we are the only client, so whatever is loaded was left
		// by one that died, perhaps by ourselves.
		if err := s.flushLeftovers(); err != nil {
			return err
		}
	}
	s.fresh = false
	return nil
}

// forget drops what was true of the last connection.
func (s *state) forget() { s.akHandle = 0 }

// distrust is called after a failed operation, which may have left a session or
// object behind: everything is flushed before the connection is used again.
func (s *state) distrust() {
	if !s.d.addr.exclusive() {
		s.drop() // the kernel flushes what was ours
		return
	}
	s.fresh = true
	s.forget()
}

// drop closes a connection that is no longer trusted.
func (s *state) drop() {
	if s.conn != nil {
		s.conn.Close()
		s.conn = nil
	}
	s.forget()
}

// idle is called when no operation waits. A kernel resource manager swaps our
// objects out itself, elsewhere the next client needs slots and connection.
func (s *state) idle() {
	if s.conn == nil || !s.d.addr.exclusive() {
		return
	}
	if s.conn.broken != nil {
		s.drop()
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), idleTimeout)
	defer cancel()
	s.conn.ctx = ctx
	if s.fresh {
		if err := s.flushLeftovers(); err != nil {
			s.d.log.Debug("cannot flush before leaving the TPM", "error", err)
		}
	}
	s.unloadAK()
	s.drop()
}

func outOfSlots(err error) bool {
	for _, rc := range []tpm2.TPMRC{tpm2.TPMRCObjectMemory, tpm2.TPMRCSessionMemory, tpm2.TPMRCMemory, tpm2.TPMRCSessionHandles, tpm2.TPMRCObjectHandles} {
		if errors.Is(err, rc) {
			return true
		}
	}
	return false
}
