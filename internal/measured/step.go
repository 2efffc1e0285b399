package measured

import (
	"context"
	"encoding/hex"
	"errors"
	"slices"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/internal/workload"
	"github.com/rootlink/rootlink/pkg/attest"
	workloadv1 "github.com/rootlink/rootlink/proto/rootlink/workload/v1"
)

// MaxTools is how many different programs one step may run in its main process.
const MaxTools = 16

// Step is what one connection has measured: one recorder, one tool process
// (which may exec several programs), one statement.
type Step struct {
	child    *workload.Peer // the tool's process, nil before MeasureStep; its Close is guarded by Caller.mu
	recorder Subject
	guarded  bool   // the recorder counted as protected at every measurement
	reason   string // why it does not
	tools    []string
	lastTool [32]byte
	signed   *[32]byte // payload digest of the statement that was signed for

	// Own is what the service keeps beside it.
	Own any
}

// Seen is what an entry is matched with, and what a leaf commits to.
type Seen struct {
	Base  []string // the recorder's own selectors as a key holder, and its recorder selector
	Tools []string // tool selectors in the order they were seen, without repeats
}

// All returns every selector seen, sorted.
func (s Seen) All() []string {
	out := slices.Concat(s.Base, s.Tools)
	slices.Sort(out)
	return slices.Compact(out)
}

// Seen returns what was measured so far.
func (st *Step) Seen() Seen {
	return Seen{
		Base:  append(slices.Clone(st.recorder.Selectors), RecorderSelector(st.recorder.Executable, st.guarded)),
		Tools: st.tools,
	}
}

// Executable is the hash of the process that holds the connection, which is the
// recorder.
func (st *Step) Executable() [32]byte { return st.recorder.Executable }

// Tool is the hash of the program that the tool's process ran last.
func (st *Step) Tool() [32]byte { return st.lastTool }

// Protected says whether the recorder counted as protected at every measurement.
func (st *Step) Protected() bool { return st.guarded }

// Signed notes the statement that the step was signed for.
func (st *Step) Signed(payload [32]byte) { st.signed = &payload }

// RecorderSelector is how a recorder's hash is told.
func RecorderSelector(hash [32]byte, protected bool) string {
	if protected {
		return attest.SelectorRecorder + hex.EncodeToString(hash[:])
	}
	return attest.SelectorUnprotectedRecorder + hex.EncodeToString(hash[:])
}

// Measurement is the step for the caller.
func (st *Step) Measurement() *workloadv1.Measurement {
	m := &workloadv1.Measurement{
		Executable:        st.recorder.Executable[:],
		Recorder:          st.recorder.Executable[:],
		RecorderProtected: st.guarded,
		UnprotectedReason: st.reason,
		Selectors:         st.Seen().All(),
	}
	if len(st.tools) > 0 {
		m.Tool = st.lastTool[:]
	}
	return m
}

// release frees the child's pin. Caller.mu is held.
func (st *Step) release() {
	if st.child != nil {
		st.child.Close()
	}
}

// Lock waits for the connection's other calls that use Step.
func (c *Caller) Lock(ctx context.Context) (unlock func(), err error) {
	select {
	case c.turn <- struct{}{}:
		return func() { <-c.turn }, nil
	case <-ctx.Done():
		return nil, status.FromContextError(ctx.Err()).Err()
	}
}

// Recorder is a caller that was measured as a recorder.
type Recorder struct {
	Subject
	Protected bool
	Reason    string // why not
}

// MeasureRecorder measures the caller as a recorder. gid is the group that
// recorders are installed setgid to, 0 when there is none.
func (c *Caller) MeasureRecorder(ctx context.Context, a Attestor, gid uint32) (r Recorder, err error) {
	if r.Subject, err = c.Measure(ctx, a); err != nil {
		return r, err
	}
	err = c.With(func(p *workload.Peer) error {
		r.Protected, r.Reason = workload.RecorderProtected(p, gid)
		return nil
	})
	if err != nil {
		return r, Error(err)
	}
	return r, nil
}

// MeasureTool finds and measures the one child of c that c holds stopped under
// its trace. The returned pin is the caller's to close.
func (c *Caller) MeasureTool(ctx context.Context, a Attestor) (child *workload.Peer, tool [32]byte, err error) {
	if err := c.With(func(p *workload.Peer) (err error) { child, err = workload.StoppedChild(p); return err }); err != nil {
		code := codes.PermissionDenied
		if errors.Is(err, workload.ErrNoStoppedChild) || errors.Is(err, workload.ErrManyStoppedChildren) {
			code = codes.FailedPrecondition
		}
		return nil, tool, status.Error(code, status.Convert(Error(err)).Message())
	}
	defer func() {
		if err != nil {
			child.Close()
			child = nil
		}
	}()
	before, err := imageOf(child.PID)
	if err != nil {
		return child, tool, Error(err)
	}
	subj, err := a(ctx, child.PID)
	if err != nil {
		return child, tool, err
	}
	after, err := imageOf(child.PID)
	if err == nil && after != before {
		err = workload.ErrChanged
	}
	if err == nil {
		// Still stopped: else it may have exec'd while it was measured.
		err = c.With(func(p *workload.Peer) error { return workload.StillStopped(child, p) })
	}
	if err != nil {
		return child, tool, Error(err)
	}
	return child, subj.Executable, nil
}

// MeasureStep measures the recorder and its stopped tool, and adds the tool to
// those of the step. Called within Lock.
func (c *Caller) MeasureStep(ctx context.Context, a Attestor, gid uint32) error {
	st := &c.Step
	r, err := c.MeasureRecorder(ctx, a, gid)
	if err != nil {
		return err
	}
	child, tool, err := c.MeasureTool(ctx, a)
	if err != nil {
		return err
	}
	if err := c.adopt(child); err != nil {
		return err
	}
	first := len(st.tools) == 0
	if !first && st.recorder.Executable != r.Executable {
		return Error(ErrReplaced)
	}
	st.recorder = r.Subject
	if first || !r.Protected {
		st.guarded, st.reason = r.Protected, r.Reason
	}
	sel := attest.SelectorTool + hex.EncodeToString(tool[:])
	if !slices.Contains(st.tools, sel) {
		if len(st.tools) == MaxTools {
			return status.Errorf(codes.FailedPrecondition, "the step ran more than %d different programs", MaxTools)
		}
		st.tools = append(st.tools, sel)
	}
	st.lastTool = tool
	return nil
}

// adopt makes child the step's tool process, or finds that it already is.
func (c *Caller) adopt(child *workload.Peer) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		child.Close()
		return Error(workload.ErrGone)
	}
	old := c.Step.child
	switch {
	case old == nil:
		c.Step.child = child
		return nil
	case old.PID == child.PID && old.StartTime == child.StartTime:
		child.Close()
		return nil
	}
	child.Close()
	return status.Error(codes.FailedPrecondition,
		cli.JoinHint("this connection already measured another tool process", "one connection is for one step, open another"))
}

// StepEnded checks what must hold from the tool's end on: a tool was measured
// and is gone, and the recorder is still the process that was measured, as well
// protected as it was. Called within Lock.
func (c *Caller) StepEnded(gid uint32) error {
	if err := c.Check(); err != nil {
		return Error(err)
	}
	st := &c.Step
	if st.child == nil || len(st.tools) == 0 {
		return status.Error(codes.FailedPrecondition, cli.JoinHint("nothing was measured on this connection", "call Measure while the tool is stopped at exec"))
	}
	var alive error
	var protected bool
	var reason string
	err := c.With(func(p *workload.Peer) error {
		alive = st.child.Check()
		protected, reason = workload.RecorderProtected(p, gid)
		return nil
	})
	if err != nil {
		return Error(err)
	}
	if alive == nil {
		return status.Error(codes.FailedPrecondition, cli.JoinHint("the tool is still running", "prepare the signature after it has exited"))
	}
	if !errors.Is(alive, workload.ErrGone) {
		return Error(alive)
	}
	if st.guarded && !protected {
		return status.Errorf(codes.PermissionDenied, "the recorder is no longer protected as it was when the tool was measured: %s", reason)
	}
	return nil
}

// OneStatement fails when the step was signed for another statement already.
func (st *Step) OneStatement(payload [32]byte) error {
	if st.signed != nil && *st.signed != payload {
		return status.Error(codes.FailedPrecondition, "this step was signed already; one measurement stands for one statement")
	}
	return nil
}
