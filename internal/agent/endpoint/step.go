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
	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/internal/measured"
	"github.com/rootlink/rootlink/pkg/attest"
	workloadv1 "github.com/rootlink/rootlink/proto/rootlink/workload/v1"
)

// step is what the Issuer keeps for one connection, under the lock of the
// measured.Step that it belongs to.
type step struct {
	*measured.Step
	own *own
}

type own struct {
	wanted   string // SPIFFE ID that the caller chose
	prepared *prepared
}

// lockStep returns the connection's step for the use of one call.
func lockStep(ctx context.Context) (c *measured.Caller, st step, unlock func(), err error) {
	if c, err = measured.CallerOf(ctx); err != nil {
		return nil, st, nil, err
	}
	if unlock, err = c.Lock(ctx); err != nil {
		return nil, st, nil, err
	}
	o, ok := c.Step.Own.(*own)
	if !ok {
		o = new(own)
		c.Step.Own = o
	}
	return c, step{&c.Step, o}, unlock, nil
}

// prepared is evidence that waits for its CSR.
type prepared struct {
	entry   *identity.Entry
	ev      *identity.Evidence // nil for a server that takes none
	key     *ecdsa.PublicKey
	payload [32]byte
	at      time.Time
}

// evidenceLife is how long a CSR may follow its evidence. The server takes
// nonces for 60 s, and ours may be 20 s old when it is quoted.
const evidenceLife = 35 * time.Second

// Measure measures the recorder and its stopped tool, adds the tool to those of
// the step, and names the entry that allows what was seen so far.
func (s *Server) Measure(ctx context.Context, req *workloadv1.MeasureRequest) (*workloadv1.MeasureResponse, error) {
	c, st, unlock, err := lockStep(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if err := c.MeasureStep(ctx, s.attestor, s.cfg.RecorderGID); err != nil {
		return nil, err
	}
	st.own.prepared = nil
	if id := req.GetSpiffeId(); id != "" {
		st.own.wanted = id
	}
	v, e, err := s.stepEntry(ctx, st, false)
	if err != nil {
		return nil, err
	}
	return &workloadv1.MeasureResponse{
		Measurement: st.Measurement(),
		SpiffeId:    e.SPIFFEID.String(),
		EntryId:     e.ID,
		TrustDomain: v.TrustDomain.Name(),

		TimestampUrls: v.TimestampURLs, LogUrl: v.LogURL,
	}, nil
}

// stepEntry chooses the entry of a step. While the tool may still exec others,
// an entry that waits for more tools is a candidate too; final wants all seen.
func (s *Server) stepEntry(ctx context.Context, st step, final bool) (*identity.View, *identity.Entry, error) {
	seen := st.Seen()
	v, err := s.cfg.Keeper.View()
	found := func(v *identity.View) bool {
		complete, partial := v.Steps(seen)
		// The one that was asked for may be younger than another that matches.
		return slices.ContainsFunc(append(complete, partial...), func(e *identity.Entry) bool {
			return st.own.wanted == "" || e.SPIFFEID.String() == st.own.wanted
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
	e, err := chooseStep(v, seen, st.own.wanted, final)
	return v, e, err
}

func chooseStep(v *identity.View, seen measured.Seen, wanted string, final bool) (*identity.Entry, error) {
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
		return nil, status.Error(codes.FailedPrecondition, cli.JoinHint("several identities match this step: "+bounded(strings.Join(distinct, ", ")),
			"choose one of them by its SPIFFE ID"))
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
	c, st, unlock, err := lockStep(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()
	key, payload, err := readPrepare(req)
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	if err := c.StepEnded(s.cfg.RecorderGID); err != nil {
		return nil, err
	}
	if err := st.OneStatement(payload); err != nil {
		return nil, err
	}
	view, entry, err := s.stepEntry(ctx, st, true)
	if err != nil {
		return nil, err
	}
	p := &prepared{entry: entry, key: key, payload: payload, at: time.Now()} // before the nonce is taken, which is what grows old
	if view.Stock {
		// Nothing to put into the CSR: the evidence of such a server's SVID is
		// about the SVID, and comes with it.
		st.own.prepared = p
		return &workloadv1.PrepareResponse{}, nil
	}
	p.ev, err = s.cfg.Issuer.Evidence(ctx, identity.Leaf{
		Origin: attest.OriginCaller, SPIFFEID: entry.SPIFFEID.String(), SPKI: req.GetSpki(),
		Executable: st.Executable(), Recorder: st.Executable(), Tool: st.Tool(),
		Payload: payload, Selectors: st.Seen().All(),
	})
	if err != nil {
		return nil, issueError(err)
	}
	if err := c.Check(); err != nil {
		return nil, measured.Error(err)
	}
	st.own.prepared = p
	return &workloadv1.PrepareResponse{Evidence: p.ev.Extension}, nil
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

// Issue has the CSR of the prepared key signed.
func (s *Server) Issue(ctx context.Context, req *workloadv1.IssueRequest) (*workloadv1.IssueResponse, error) {
	c, st, unlock, err := lockStep(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if st.own.prepared == nil {
		return nil, status.Error(codes.FailedPrecondition, cli.JoinHint("nothing was prepared on this connection", "call Prepare first"))
	}
	p := st.own.prepared
	if err := s.cfg.Issuer.InTurn(func() error { return checkCSR(req.GetCsr(), p) }); err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	if err := c.StepEnded(s.cfg.RecorderGID); err != nil {
		return nil, err
	}
	if s.stale(p) {
		return nil, status.Error(codes.Aborted, cli.JoinHint("the evidence is out of date", "call Prepare again, the measurement still stands"))
	}
	made, err := s.issue(ctx, st, p, req.GetCsr())
	if err != nil {
		s.cfg.Log.Warn("step SVID not issued", "spiffe_id", p.entry.SPIFFEID.String(), "entry", p.entry.ID, "error", err)
		return nil, issueError(err)
	}
	if err := c.Check(); err != nil {
		return nil, measured.Error(err)
	}
	st.Signed(p.payload)
	authorities := s.cfg.Issuer.Authorities()
	if !identity.IssuedBy(authorities, made.chain) {
		return nil, issueError(errNotInBundle)
	}
	resp := &workloadv1.IssueResponse{Detached: made.detached}
	if v, _ := s.cfg.Keeper.View(); v != nil {
		resp.TimestampUrls, resp.LogUrl = v.TimestampURLs, v.LogURL
	}
	for _, cert := range made.chain {
		resp.X509Svid = append(resp.X509Svid, cert.Raw)
	}
	for _, a := range authorities {
		resp.Authorities = append(resp.Authorities, a.Raw)
	}
	if s.cfg.Logs != nil {
		resp.EventLog, resp.ImaLog = s.cfg.Logs(made.record)
	}
	s.cfg.Log.Info("step SVID issued", "spiffe_id", p.entry.SPIFFEID.String(), "entry", p.entry.ID,
		"tool", hex.EncodeToString(made.record.Tool[:]), "recorder_protected", st.Protected(), "detached", made.detached != nil)
	return resp, nil
}

// stale says whether what was prepared cannot be used any more, or is not what
// the server that answers now takes.
func (s *Server) stale(p *prepared) bool {
	v, err := s.cfg.Keeper.View()
	if err != nil {
		return false // the attempt will say why
	}
	if p.ev == nil {
		return !v.Stock
	}
	return v.Stock || time.Since(p.at) > evidenceLife || !s.cfg.Issuer.Current(p.ev)
}

// issued is an SVID and its evidence.
type issued struct {
	chain    []*x509.Certificate
	record   *attest.Evidence
	detached []byte // nil when the SVID carries the evidence
}

func (s *Server) issue(ctx context.Context, st step, p *prepared, csr []byte) (*issued, error) {
	if p.ev != nil {
		chain, err := s.cfg.Issuer.SignEvidence(ctx, p.entry, csr, p.key, p.ev)
		return &issued{chain: chain, record: p.ev.Record}, err
	}
	chain, err := s.cfg.Issuer.Sign(ctx, p.entry, csr, p.key)
	if err != nil {
		return nil, err
	}
	d, err := s.cfg.Issuer.Detached(ctx, st.Step, chain[0], p.entry, p.payload)
	if err != nil {
		return nil, err
	}
	b, err := d.Marshal()
	return &issued{chain, d.Evidence, b}, err
}

// checkCSR fails unless csr is for the prepared key, proves to hold it, and
// carries exactly the prepared evidence, byte for byte, or none where none was.
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
		if found++; p.ev == nil || x.Critical || !bytes.Equal(x.Value, p.ev.Extension) {
			return errors.New("csr: carries other evidence than was prepared")
		}
	}
	if p.ev != nil && found != 1 {
		return fmt.Errorf("csr: carries %d evidence extensions, want the one that was prepared", found)
	}
	return nil
}
