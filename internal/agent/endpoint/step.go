package endpoint

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/rootlink/rootlink/internal/agent/identity"
	"github.com/rootlink/rootlink/internal/workload"
	"github.com/rootlink/rootlink/pkg/attest"
	workloadv1 "github.com/rootlink/rootlink/proto/rootlink/workload/v1"
)

// step is what the Issuer keeps for one connection: one recorder, one tool
// process (which may exec several programs), one statement.
type step struct {
	turn chan struct{} // capacity 1: held by the Issuer call that is running

	// Guarded by turn; child also by caller.mu, as release closes it.
	child    *workload.Peer // the tool's process, nil before Measure
	recorder identity.Subject
	guarded  bool   // the recorder counted as protected at every Measure
	reason   string // why it does not
	tools    []string
	lastTool [32]byte
	wanted   string // SPIFFE ID that the caller chose
	prepared *prepared
	issued   *[32]byte // payload digest of the statement that was signed for
}

// prepared is evidence that waits for its CSR.
type prepared struct {
	entry   *identity.Entry
	ev      *identity.Evidence
	key     *ecdsa.PublicKey
	payload [32]byte
	at      time.Time
}

const (
	maxTools = 16 // different programs in one step
	// evidenceLife is how long a CSR may follow its evidence. The server takes
	// nonces for 60 s, and ours may be 20 s old when it is quoted.
	evidenceLife = 35 * time.Second
)

// release frees the child's pin. caller.mu is held.
func (st *step) release() {
	if st.child != nil {
		st.child.Close()
	}
}

func (st *step) lock(ctx context.Context) error {
	select {
	case st.turn <- struct{}{}:
		return nil
	case <-ctx.Done():
		return status.FromContextError(ctx.Err()).Err()
	}
}

func (st *step) unlock() { <-st.turn }

// seen is what the entry is matched with.
func (st *step) seen() identity.StepSeen {
	return identity.StepSeen{
		Base:  append(slices.Clone(st.recorder.Selectors), recorderSelector(st.recorder.Executable, st.guarded)),
		Tools: st.tools,
	}
}

func recorderSelector(hash [32]byte, protected bool) string {
	if protected {
		return attest.SelectorRecorder + hex.EncodeToString(hash[:])
	}
	return attest.SelectorUnprotectedRecorder + hex.EncodeToString(hash[:])
}

// toolOf finds and measures the one child of c that c holds stopped under its
// trace. The returned pin is the caller's to close.
func (s *Server) toolOf(ctx context.Context, c *caller) (child *workload.Peer, tool [32]byte, err error) {
	if err := c.with(func(p *workload.Peer) (err error) { child, err = workload.StoppedChild(p); return err }); err != nil {
		code := codes.PermissionDenied
		if errors.Is(err, workload.ErrNoStoppedChild) || errors.Is(err, workload.ErrManyStoppedChildren) {
			code = codes.FailedPrecondition
		}
		return nil, tool, status.Error(code, status.Convert(callerError(err)).Message())
	}
	defer func() {
		if err != nil {
			child.Close()
			child = nil
		}
	}()
	before, err := imageOf(child.PID)
	if err != nil {
		return child, tool, callerError(err)
	}
	subj, err := attestPID(ctx, s.cfg.Attestor, child.PID)
	if err != nil {
		return child, tool, err
	}
	after, err := imageOf(child.PID)
	if err == nil && after != before {
		err = workload.ErrChanged
	}
	if err == nil {
		// Still stopped: else it may have exec'd while it was measured.
		err = c.with(func(p *workload.Peer) error { return workload.StillStopped(child, p) })
	}
	if err != nil {
		return child, tool, callerError(err)
	}
	return child, subj.Executable, nil
}

// recorderOf measures the caller as a recorder.
func (s *Server) recorderOf(ctx context.Context, c *caller) (subj identity.Subject, protected bool, reason string, err error) {
	if subj, err = c.measure(ctx, s.cfg.Attestor); err != nil {
		return subj, false, "", err
	}
	err = c.with(func(p *workload.Peer) error {
		protected, reason = workload.RecorderProtected(p, s.cfg.RecorderGID)
		return nil
	})
	if err != nil {
		return subj, false, "", callerError(err)
	}
	return subj, protected, reason, nil
}

// Measure measures the recorder and its stopped tool, adds the tool to those of
// the step, and names the entry that allows what was seen so far.
func (s *Server) Measure(ctx context.Context, req *workloadv1.MeasureRequest) (*workloadv1.MeasureResponse, error) {
	c, err := callerOf(ctx)
	if err != nil {
		return nil, err
	}
	st := &c.step
	if err := st.lock(ctx); err != nil {
		return nil, err
	}
	defer st.unlock()
	recorder, protected, reason, err := s.recorderOf(ctx, c)
	if err != nil {
		return nil, err
	}
	child, tool, err := s.toolOf(ctx, c)
	if err != nil {
		return nil, err
	}
	if err := c.adopt(child); err != nil {
		return nil, err
	}
	first := len(st.tools) == 0
	if !first && st.recorder.Executable != recorder.Executable {
		return nil, callerError(errReplaced)
	}
	st.recorder = recorder
	if first || !protected {
		st.guarded, st.reason = protected, reason
	}
	sel := attest.SelectorTool + hex.EncodeToString(tool[:])
	if !slices.Contains(st.tools, sel) {
		if len(st.tools) == maxTools {
			return nil, status.Errorf(codes.FailedPrecondition, "the step ran more than %d different programs", maxTools)
		}
		st.tools = append(st.tools, sel)
	}
	st.lastTool, st.prepared = tool, nil
	if id := req.GetSpiffeId(); id != "" {
		st.wanted = id
	}
	v, e, err := s.stepEntry(ctx, st, false)
	if err != nil {
		return nil, err
	}
	return &workloadv1.MeasureResponse{
		Measurement: st.measurement(),
		SpiffeId:    e.SPIFFEID.String(),
		EntryId:     e.ID,
		TrustDomain: v.TrustDomain.Name(),

		TimestampUrls: v.TimestampURLs, LogUrl: v.LogURL,
	}, nil
}

func (st *step) measurement() *workloadv1.Measurement {
	m := &workloadv1.Measurement{
		Executable:        st.recorder.Executable[:],
		Recorder:          st.recorder.Executable[:],
		RecorderProtected: st.guarded,
		UnprotectedReason: st.reason,
		Selectors:         st.seen().All(),
	}
	if len(st.tools) > 0 {
		m.Tool = st.lastTool[:]
	}
	return m
}

// adopt makes child the step's tool process, or finds that it already is.
func (c *caller) adopt(child *workload.Peer) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		child.Close()
		return callerError(workload.ErrGone)
	}
	old := c.step.child
	switch {
	case old == nil:
		c.step.child = child
		return nil
	case old.PID == child.PID && old.StartTime == child.StartTime:
		child.Close()
		return nil
	}
	child.Close()
	return status.Error(codes.FailedPrecondition,
		"this connection already measured another tool process; hint: one connection is for one step, open another")
}

// stepEntry chooses the entry of a step. While the tool may still exec others,
// an entry that waits for more tools is a candidate too; final wants all seen.
func (s *Server) stepEntry(ctx context.Context, st *step, final bool) (*identity.View, *identity.Entry, error) {
	seen := st.seen()
	v, err := s.cfg.Keeper.View()
	found := func(v *identity.View) bool {
		complete, partial := v.Steps(seen)
		// The one that was asked for may be younger than another that matches.
		return slices.ContainsFunc(append(complete, partial...), func(e *identity.Entry) bool {
			return st.wanted == "" || e.SPIFFEID.String() == st.wanted
		})
	}
	if err != nil || !found(v) {
		if err := s.knock(ctx, found); err != nil {
			return nil, nil, err
		}
		if v, err = s.cfg.Keeper.View(); err != nil {
			return nil, nil, status.Error(codes.Unavailable, err.Error())
		}
	}
	if v.Stock {
		return nil, nil, status.Error(codes.Unimplemented, identity.ErrNoEvidence.Error())
	}
	e, err := chooseStep(v, seen, st.wanted, final)
	return v, e, err
}

func chooseStep(v *identity.View, seen identity.StepSeen, wanted string, final bool) (*identity.Entry, error) {
	complete, partial := v.Steps(seen)
	if wanted != "" {
		other := func(e *identity.Entry) bool { return e.SPIFFEID.String() != wanted }
		complete, partial = slices.DeleteFunc(complete, other), slices.DeleteFunc(partial, other)
	}
	es := complete
	if len(es) == 0 && !final {
		es = partial
	}
	if len(es) == 0 {
		if final && len(partial) > 0 {
			return nil, status.Errorf(codes.PermissionDenied, "no identity issued: the tool never ran %s, which entry %s demands",
				strings.Join(partial[0].Missing(seen.All()), ", "), partial[0].ID)
		}
		if wanted != "" {
			if c, p := v.Steps(seen); len(c)+len(p) > 0 {
				return nil, status.Errorf(codes.PermissionDenied, "no identity issued: no entry gives %q to this tool and recorder; it may have %s",
					bounded(wanted), strings.Join(ids(append(c, p...)), ", "))
			}
		}
		return nil, noIdentity(v, seen.All(), true)
	}
	if distinct := ids(es); len(distinct) > 1 {
		return nil, status.Errorf(codes.FailedPrecondition, "several identities match this step: %s; hint: choose one of them by its SPIFFE ID",
			bounded(strings.Join(distinct, ", ")))
	}
	return es[0], nil
}

// ids returns the distinct SPIFFE IDs of entries.
func ids(es []*identity.Entry) []string {
	var out []string
	for _, e := range es {
		out = append(out, e.SPIFFEID.String())
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// Prepare commits a key and a statement to the step that has ended.
func (s *Server) Prepare(ctx context.Context, req *workloadv1.PrepareRequest) (*workloadv1.PrepareResponse, error) {
	c, err := callerOf(ctx)
	if err != nil {
		return nil, err
	}
	st := &c.step
	if err := st.lock(ctx); err != nil {
		return nil, err
	}
	defer st.unlock()
	key, payload, err := readPrepare(req)
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	if err := s.stepEnded(c); err != nil {
		return nil, err
	}
	if st.issued != nil && *st.issued != payload {
		return nil, status.Error(codes.FailedPrecondition, "this step was signed already; one measurement stands for one statement")
	}
	_, entry, err := s.stepEntry(ctx, st, true)
	if err != nil {
		return nil, err
	}
	at := time.Now() // before the nonce is taken, which is what grows old
	ev, err := s.cfg.Issuer.Evidence(ctx, identity.Leaf{
		Origin: attest.OriginCaller, SPIFFEID: entry.SPIFFEID.String(), SPKI: req.GetSpki(),
		Executable: st.recorder.Executable, Recorder: st.recorder.Executable, Tool: st.lastTool,
		Payload: payload, Selectors: st.seen().All(),
	})
	if err != nil {
		return nil, issueError(err)
	}
	if err := c.check(); err != nil {
		return nil, callerError(err)
	}
	st.prepared = &prepared{entry: entry, ev: ev, key: key, payload: payload, at: at}
	return &workloadv1.PrepareResponse{Evidence: ev.Extension}, nil
}

// readPrepare takes only a key in its one encoding and a digest that is one.
func readPrepare(req *workloadv1.PrepareRequest) (key *ecdsa.PublicKey, payload [32]byte, err error) {
	pub, err := x509.ParsePKIXPublicKey(req.GetSpki())
	if err != nil {
		return nil, payload, fmt.Errorf("spki: %w", err)
	}
	key, ok := pub.(*ecdsa.PublicKey)
	if !ok || key.Curve != elliptic.P256() {
		return nil, payload, errors.New("spki: not an ECDSA P-256 key")
	}
	if again, err := x509.MarshalPKIXPublicKey(key); err != nil || !bytes.Equal(again, req.GetSpki()) {
		return nil, payload, errors.New("spki: not in its canonical encoding")
	}
	if len(req.GetPayloadSha256()) != len(payload) {
		return nil, payload, fmt.Errorf("payload_sha256: %d bytes, want %d", len(req.GetPayloadSha256()), len(payload))
	}
	copy(payload[:], req.GetPayloadSha256())
	if payload == ([32]byte{}) {
		return nil, payload, errors.New("payload_sha256: all zero, which means no statement")
	}
	return key, payload, nil
}

// stepEnded checks what must hold from the tool's end on: a tool was measured
// and is gone, and the recorder is still the process that was measured, as well
// protected as it was.
func (s *Server) stepEnded(c *caller) error {
	if err := c.check(); err != nil {
		return callerError(err)
	}
	st := &c.step
	if st.child == nil || len(st.tools) == 0 {
		return status.Error(codes.FailedPrecondition, "nothing was measured on this connection; hint: call Measure while the tool is stopped at exec")
	}
	var alive error
	var protected bool
	var reason string
	err := c.with(func(p *workload.Peer) error {
		alive = st.child.Check()
		protected, reason = workload.RecorderProtected(p, s.cfg.RecorderGID)
		return nil
	})
	if err != nil {
		return callerError(err)
	}
	if alive == nil {
		return status.Error(codes.FailedPrecondition, "the tool is still running; hint: prepare the signature after it has exited")
	}
	if !errors.Is(alive, workload.ErrGone) {
		return callerError(alive)
	}
	if st.guarded && !protected {
		return status.Errorf(codes.PermissionDenied, "the recorder is no longer protected as it was when the tool was measured: %s", reason)
	}
	return nil
}

// Issue has the CSR of the prepared key signed.
func (s *Server) Issue(ctx context.Context, req *workloadv1.IssueRequest) (*workloadv1.IssueResponse, error) {
	c, err := callerOf(ctx)
	if err != nil {
		return nil, err
	}
	st := &c.step
	if err := st.lock(ctx); err != nil {
		return nil, err
	}
	defer st.unlock()
	if st.prepared == nil {
		return nil, status.Error(codes.FailedPrecondition, "nothing was prepared on this connection; hint: call Prepare first")
	}
	p := st.prepared
	if err := s.cfg.Issuer.InTurn(func() error { return checkCSR(req.GetCsr(), p) }); err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	if err := s.stepEnded(c); err != nil {
		return nil, err
	}
	if time.Since(p.at) > evidenceLife || !s.cfg.Issuer.Current(p.ev) {
		return nil, status.Error(codes.Aborted, "the evidence is out of date; hint: call Prepare again, the measurement still stands")
	}
	chain, err := s.cfg.Issuer.SignEvidence(ctx, p.entry, req.GetCsr(), p.key, p.ev)
	if err != nil {
		s.cfg.Log.Warn("step SVID not issued", "spiffe_id", p.entry.SPIFFEID.String(), "entry", p.entry.ID, "error", err)
		return nil, issueError(err)
	}
	if err := c.check(); err != nil {
		return nil, callerError(err)
	}
	st.issued = &p.payload
	authorities := s.cfg.Issuer.Authorities()
	if !identity.IssuedBy(authorities, chain) {
		return nil, issueError(errNotInBundle)
	}
	resp := &workloadv1.IssueResponse{}
	if v, _ := s.cfg.Keeper.View(); v != nil {
		resp.TimestampUrls, resp.LogUrl = v.TimestampURLs, v.LogURL
	}
	for _, cert := range chain {
		resp.X509Svid = append(resp.X509Svid, cert.Raw)
	}
	for _, a := range authorities {
		resp.Authorities = append(resp.Authorities, a.Raw)
	}
	if s.cfg.Logs != nil {
		resp.EventLog, resp.ImaLog = s.cfg.Logs(p.ev.Record)
	}
	s.cfg.Log.Info("step SVID issued", "spiffe_id", p.entry.SPIFFEID.String(), "entry", p.entry.ID,
		"tool", hex.EncodeToString(p.ev.Record.Tool[:]), "recorder_protected", st.guarded)
	return resp, nil
}

// Logs returns the logs that a record names by digest, where they are at hand.
type Logs func(*attest.Evidence) (eventLog, imaLog []byte)

// checkCSR fails unless csr is for the prepared key, proves to hold it, and
// carries exactly the prepared evidence, byte for byte.
func checkCSR(der []byte, p *prepared) error {
	csr, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return fmt.Errorf("csr: %w", err)
	}
	// First, as checking the signature of an RSA key of the caller's choice
	// could take minutes.
	if !p.key.Equal(csr.PublicKey) {
		return errors.New("csr: for another key than the one prepared")
	}
	if err := csr.CheckSignature(); err != nil {
		return fmt.Errorf("csr: %w", err)
	}
	found := 0
	for _, x := range csr.Extensions {
		if !x.Id.Equal(attest.ExtensionID()) {
			continue
		}
		if found++; x.Critical || !bytes.Equal(x.Value, p.ev.Extension) {
			return errors.New("csr: carries other evidence than was prepared")
		}
	}
	if found != 1 {
		return fmt.Errorf("csr: carries %d evidence extensions, want the one that was prepared", found)
	}
	return nil
}
