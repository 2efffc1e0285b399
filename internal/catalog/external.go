package catalog

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Defaults of Options, and the pace of restarts.
const (
	DefaultStartTimeout     = 30 * time.Second
	DefaultConfigureTimeout = time.Minute
)

// pace is that of looking after a process.
type pace struct {
	first  time.Duration // wait before the first start after a loss; then twice as long each time
	last   time.Duration // and never longer
	steady time.Duration // a process that lived so long begins at first again
	pulse  time.Duration // between looks at whether it answers, and the longest wait for that
}

var usualPace = pace{first: 200 * time.Millisecond, last: time.Minute, steady: time.Minute, pulse: 15 * time.Second}

// delay is the wait after so many failures, with a fifth of jitter so that what
// died together does not come back together.
func (p pace) delay(failures int) time.Duration {
	d := p.last
	if failures < 32 {
		d = min(d, p.first<<failures)
	}
	return time.Duration(float64(d) * (0.8 + 0.4*rand.Float64()))
}

// DownError says that an external plugin does not run.
type DownError struct {
	Plugin   string
	Since    time.Time
	Restarts int // since the host started
	Err      error
}

func (e *DownError) Error() string {
	return fmt.Sprintf("plugin %q is down since %s: %v", e.Plugin, e.Since.UTC().Format(time.RFC3339), e.Err)
}
func (e *DownError) Unwrap() error { return e.Err }

// errClosed is what calls get once the plugin was closed.
var errClosed = errors.New("plugin is closed")

// errServices means that a program that was started again is another plugin.
var errServices = errors.New("the program offers other services than before")

// external is the backend of a plugin that is a process of its own. It keeps
// one running: a process that ends is followed by another.
//
// While there is none calls fail at once with Unavailable. Whoever calls has a
// retry of its own (agents, workloads), and a queue of calls that wait for a
// plugin that may never come back would hang what works without it.
type external struct {
	cfg     Config
	sum     *[sha256.Size]byte
	opts    Options
	out     *output
	prepare func(context.Context, grpc.ClientConnInterface) error // configures a process that was started again
	names   []string

	life   context.Context // ends with close
	cancel context.CancelFunc
	done   chan struct{} // closed when the supervisor has returned

	mu       sync.Mutex
	proc     *process // nil while there is none to call
	down     error    // why
	since    time.Time
	restarts int
	calls    int           // in flight
	closing  bool          // no more calls
	idle     chan struct{} // closed by the last call once closing
	changed  chan struct{} // closed at the next change
}

func startExternal(ctx context.Context, c Config, sum *[sha256.Size]byte, o Options, prepare func(context.Context, grpc.ClientConnInterface) error) (*external, error) {
	e := &external{
		cfg: c, sum: sum, opts: o, out: newOutput(o.Log.With("plugin", c.Name)), prepare: prepare,
		done: make(chan struct{}), changed: make(chan struct{}), idle: make(chan struct{}),
	}
	if e.opts.pace == (pace{}) {
		e.opts.pace = usualPace
	}
	e.life, e.cancel = context.WithCancel(context.Background())
	p, err := e.start(ctx)
	if err != nil {
		e.cancel()
		return nil, err
	}
	e.names, e.proc = p.names, p
	if sum == nil {
		e.out.log.Warn("plugin_checksum pins no program: whoever can replace the file runs as this daemon",
			"program", p.prog.path, "sha256", p.prog.digestHex())
	}
	go e.supervise(p)
	return e, nil
}

func (e *external) start(ctx context.Context) (*process, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, e.opts.startTimeout(), errors.New("the plugin did not come up in time"))
	defer cancel()
	prog, err := openProgram(e.cfg.Cmd, e.cfg.Args, e.sum)
	if err != nil {
		return nil, err
	}
	p, err := startProcess(ctx, e.cfg, prog, e.opts, e.out)
	if err != nil {
		return nil, err
	}
	e.out.log.Info("plugin started", "program", prog.path, "pid", prog.ID(), "sha256", prog.digestHex())
	return p, nil
}

// supervise follows one process with the next until close.
func (e *external) supervise(p *process) {
	defer close(e.done)
	failures := 0
	for {
		began := time.Now()
		why, ok := e.watch(p)
		if !ok {
			p.quit()
			return
		}
		if time.Since(began) >= e.opts.pace.steady {
			failures = 0
		}
		e.lost(why)
		p.release()
		if p, ok = e.again(&failures); !ok {
			return
		}
	}
}

// watch returns why the process ended; false when it is no longer wanted.
func (e *external) watch(p *process) (error, bool) {
	t := time.NewTicker(e.opts.pace.pulse)
	defer t.Stop()
	for {
		select {
		case <-e.life.Done():
			return nil, false
		case <-p.prog.exited:
			return fmt.Errorf("its process ended: %s", p.prog.ended()), true
		case <-t.C:
			ctx, cancel := context.WithTimeout(e.life, e.opts.pace.pulse)
			err := p.alive(ctx)
			cancel()
			if err != nil && e.life.Err() == nil {
				select {
				case <-p.prog.exited: // which says more
				default:
					p.prog.kill()
					return fmt.Errorf("it did not answer for %s", e.opts.pace.pulse), true
				}
			}
		}
	}
}

// again starts and configures a process, however often that takes; false when
// none is wanted any more.
func (e *external) again(failures *int) (*process, bool) {
	for {
		wait := e.opts.pace.delay(*failures)
		*failures++
		t := time.NewTimer(wait)
		select {
		case <-e.life.Done():
			t.Stop()
			return nil, false
		case <-t.C:
		}
		p, err := e.start(e.life)
		if err == nil {
			if !slices.Equal(p.names, e.names) {
				err = errServices
			} else {
				err = e.prepare(e.life, p.conn)
			}
			if err != nil {
				p.prog.kill()
				p.release()
			}
		}
		if e.life.Err() != nil {
			if err == nil {
				p.quit()
			}
			return nil, false
		}
		if err == nil {
			e.up(p)
			return p, true
		}
		e.mu.Lock()
		e.down = err
		e.mu.Unlock()
		e.out.log.Error("plugin could not be started again", "error", err, "failures", *failures)
	}
}

func (e *external) lost(why error) {
	e.mu.Lock()
	e.proc, e.down, e.since = nil, why, time.Now()
	e.notify()
	e.mu.Unlock()
	e.out.log.Error("plugin is down and will be started again", "error", why)
}

func (e *external) up(p *process) {
	e.mu.Lock()
	e.proc, e.down = p, nil
	e.restarts++
	n, gap := e.restarts, time.Since(e.since)
	e.notify()
	e.mu.Unlock()
	e.out.log.Warn("plugin is up again", "restarts", n, "down_for", gap.Round(time.Millisecond).String())
}

// notify wakes who waits for a change. mu is held.
func (e *external) notify() {
	close(e.changed)
	e.changed = make(chan struct{})
}

// restart ends the process, so that another follows with the last good
// configuration. It does not wait.
func (e *external) restart() {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.proc != nil {
		e.proc.prog.kill()
	}
}

func (e *external) conn() grpc.ClientConnInterface { return e }
func (e *external) services() []string             { return e.names }

func (e *external) health() (restarts int, changed <-chan struct{}, err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.proc == nil {
		err = &DownError{Plugin: e.cfg.Name, Since: e.since, Restarts: e.restarts, Err: e.down}
	}
	return e.restarts, e.changed, err
}

// enter returns the process that is to be called; leave must follow.
func (e *external) enter() (*process, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	switch {
	case e.closing:
		return nil, status.Errorf(codes.Unavailable, "plugin %q: %v", e.cfg.Name, errClosed)
	case e.proc == nil:
		// Not why: the text goes on to callers who may be strangers.
		return nil, status.Errorf(codes.Unavailable, "plugin %q is down and being started again", e.cfg.Name)
	}
	e.calls++
	return e.proc, nil
}

func (e *external) leave() {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.calls--; e.calls == 0 && e.closing {
		close(e.idle)
	}
}

// Invoke and NewStream make external a connection: that of today's process.
func (e *external) Invoke(ctx context.Context, method string, args, reply any, opts ...grpc.CallOption) error {
	p, err := e.enter()
	if err != nil {
		return err
	}
	defer e.leave()
	return e.broken(ctx, p.conn.Invoke(ctx, method, args, reply, opts...))
}

// broken is err of a call on ctx. A connection that we closed because its
// process had ended is not a call that its caller gave up.
func (e *external) broken(ctx context.Context, err error) error {
	if status.Code(err) == codes.Canceled && ctx.Err() == nil {
		return status.Errorf(codes.Unavailable, "plugin %q ended during the call", e.cfg.Name)
	}
	return err
}

func (e *external) NewStream(ctx context.Context, desc *grpc.StreamDesc, method string, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	p, err := e.enter()
	if err != nil {
		return nil, err
	}
	leave := sync.OnceFunc(e.leave)
	s, err := p.conn.NewStream(ctx, desc, method, append(slices.Clip(opts), grpc.OnFinish(func(error) { leave() }))...)
	if err != nil {
		leave()
		return nil, e.broken(ctx, err)
	}
	return &externalStream{s, e, ctx}, nil
}

type externalStream struct {
	grpc.ClientStream
	e   *external
	ctx context.Context // the caller's
}

func (s *externalStream) SendMsg(m any) error { return s.e.broken(s.ctx, s.ClientStream.SendMsg(m)) }

func (s *externalStream) RecvMsg(m any) error { return s.e.broken(s.ctx, s.ClientStream.RecvMsg(m)) }

func (s *externalStream) CloseSend() error { return s.e.broken(s.ctx, s.ClientStream.CloseSend()) }

// close lets calls in flight end, for a while, and then the process.
func (e *external) close() error {
	e.mu.Lock()
	e.closing = true
	if e.calls == 0 {
		close(e.idle)
	}
	e.mu.Unlock()
	if !within(e.idle, drainTimeout) {
		e.out.log.Warn("plugin calls did not end in time and were abandoned", "timeout", drainTimeout)
	}
	e.cancel()
	<-e.done
	return nil
}
