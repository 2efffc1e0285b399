package server

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"sync"
	"time"

	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	nodeattestorv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/server/nodeattestor/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/rootlink/rootlink/internal/store"
	"github.com/rootlink/rootlink/pkg/svid"
	"github.com/rootlink/rootlink/plugins/tpmnode/nodeserver"
	"github.com/rootlink/rootlink/plugins/tpmnode/wire"
)

// maxAttestRounds bounds the messages of one attestation: the largest logs in
// their smallest useful chunks need fewer.
const maxAttestRounds = 256

// sessionMetadata carries the number of an attestation through the plugin to
// our own callbacks, which the plugin calls with the stream's context.
const sessionMetadata = "rootlink-attestation"

// attestation is one AttestAgent call while it runs.
type attestation struct {
	proved *nodeserver.Attested // set by the plugin's OnAttested
	banned bool                 // the plugin asked, and the answer was yes
}

// attestations are those that run, by number.
type attestations struct {
	mu sync.Mutex
	m  map[string]*attestation
}

func (a *attestations) begin() (id string, end func()) {
	id = rand.Text()
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.m == nil {
		a.m = make(map[string]*attestation)
	}
	a.m[id] = new(attestation)
	return id, func() {
		a.mu.Lock()
		defer a.mu.Unlock()
		delete(a.m, id)
	}
}

// with calls f with the attestation that ctx, of a plugin's call, belongs to.
func (a *attestations) with(ctx context.Context, f func(*attestation)) bool {
	v := metadata.ValueFromIncomingContext(ctx, sessionMetadata)
	return len(v) == 1 && a.byID(v[0], f)
}

func (a *attestations) byID(id string, f func(*attestation)) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	at := a.m[id]
	if at != nil {
		f(at)
	}
	return at != nil
}

type attestStream = agentv1.Agent_AttestAgentServer

// AttestAgent carries messages between an agent and the node attestor. What
// the attestor concludes becomes the node's record, and then the agent gets
// its SVID.
func (a *agentService) AttestAgent(stream attestStream) (err error) {
	s, c := a.s, callerOf(stream.Context())
	level := slog.LevelWarn
	defer func() {
		if err != nil {
			s.count.add("attest_refused/" + snake(status.Code(err).String()))
			s.cfg.Log.Log(stream.Context(), level, "node attestation failed", "address", c.addr, "error", err)
		}
	}()
	if err := s.limiter.wait(stream.Context(), c.addr, s.cfg.RoundTimeout); err != nil {
		level = slog.LevelDebug // what is limited must not fill the disk instead; the counter has it
		return status.Error(codes.ResourceExhausted, "too many attestations from this address")
	}
	if len(s.attestors) == 0 {
		return status.Error(codes.Unavailable, "this server accepts no TPM: it was given neither EK roots nor an allow-list")
	}
	// Its end also ends the plugin's stream.
	ctx, cancel := context.WithCancel(stream.Context())
	defer cancel()
	first, err := receive(ctx, s.cfg.RoundTimeout, stream)
	if err != nil {
		return err
	}
	params := first.GetParams()
	switch {
	case params.GetParams() == nil || params.GetData() == nil:
		return status.Error(codes.InvalidArgument, "malformed param: missing params")
	case s.attestors[params.Data.Type] == nil:
		return status.Errorf(codes.FailedPrecondition, "node attestation type %.100q is not known here, only %q", params.Data.Type, s.attestationTypes())
	case len(params.Data.Payload) == 0:
		return status.Error(codes.InvalidArgument, "malformed param: missing attestation payload")
	}
	at := s.attestors[params.Data.Type]
	csr, err := parseCSR(params.Params.Csr)
	if err != nil {
		return status.Errorf(codes.InvalidArgument, "malformed CSR: %v", err)
	}
	id, end := s.running.begin()
	defer end()
	key, err := boundKey(stream.Context(), csr)
	if err != nil {
		return err
	}
	attrs, err := s.converse(ctx, at, stream, id, key, params.Data.Payload)
	if err != nil {
		banned := false
		s.running.byID(id, func(at *attestation) { banned = at.banned })
		if banned {
			return permissionDenied(types.PermissionDeniedDetails_AGENT_BANNED, "agent is banned")
		}
		return err
	}
	var proved *nodeserver.Attested
	s.running.byID(id, func(at *attestation) { proved = at.proved })
	cert, err := s.admit(ctx, at, attrs, proved, csr, key != nil)
	if err != nil {
		return err
	}
	s.rivals.attested(attrs.GetSpiffeId(), c.addr)
	s.count.add("attested")
	return stream.Send(&agentv1.AttestAgentResponse{Step: &agentv1.AttestAgentResponse_Result_{Result: &agentv1.AttestAgentResponse_Result{
		Svid: svidToProto(cert, ""), Reattestable: attrs.CanReattest,
	}}})
}

// boundKey returns the hash of the agent's CSR key when the agent says that
// its quote will cover it, and nil when it does not: a stock agent cannot have
// its plugin know the key. A node without it gets no leaf evidence accepted,
// so leaving it out gains nothing.
func boundKey(ctx context.Context, csr *x509.CertificateRequest) (*[32]byte, error) {
	said, bound, err := wire.AgentKey(ctx)
	if err != nil {
		return nil, status.Errorf(codes.InvalidArgument, "%v", err)
	}
	if !bound {
		return nil, nil
	}
	key := sha256.Sum256(csr.RawSubjectPublicKeyInfo)
	if said != key {
		return nil, status.Error(codes.InvalidArgument, "the agent key named is not that of the CSR")
	}
	return &key, nil
}

// converse runs the attestation to the attestor's verdict. Its errors are the
// attestor's own, which it words for callers who have proved nothing yet.
func (s *Server) converse(ctx context.Context, at *attestor, stream attestStream, id string, key *[32]byte, payload []byte) (*nodeattestorv1.AgentAttributes, error) {
	ctx = metadata.NewOutgoingContext(ctx, metadata.Pairs(sessionMetadata, id))
	if key != nil {
		ctx = wire.WithAgentKey(ctx, *key)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	plugin, err := at.client.Attest(ctx)
	if err != nil {
		return nil, err
	}
	// A plugin that hangs must not keep an agent, and a place here, for ever.
	recv := func() (*nodeattestorv1.AttestResponse, error) {
		t := time.AfterFunc(s.cfg.RoundTimeout, func() { cancel(errSlowAttestor) })
		defer t.Stop()
		resp, err := plugin.Recv()
		switch {
		case errors.Is(err, io.EOF):
			return nil, s.internal("node attestor", errors.New("it ended without a verdict"))
		case err != nil && errors.Is(context.Cause(ctx), errSlowAttestor):
			return nil, status.Error(codes.Unavailable, errSlowAttestor.Error())
		}
		return resp, err
	}
	send := func(r *nodeattestorv1.AttestRequest) error {
		err := plugin.Send(r)
		if errors.Is(err, io.EOF) {
			_, err = plugin.Recv() // has the reason
		}
		return err
	}
	if err := send(&nodeattestorv1.AttestRequest{Request: &nodeattestorv1.AttestRequest_Payload{Payload: payload}}); err != nil {
		return nil, err
	}
	for range maxAttestRounds {
		resp, err := recv()
		if err != nil {
			return nil, err
		}
		switch r := resp.Response.(type) {
		case *nodeattestorv1.AttestResponse_AgentAttributes:
			return r.AgentAttributes, nil
		case *nodeattestorv1.AttestResponse_Challenge:
			if err := stream.Send(&agentv1.AttestAgentResponse{Step: &agentv1.AttestAgentResponse_Challenge{Challenge: r.Challenge}}); err != nil {
				return nil, err
			}
			req, err := receive(ctx, s.cfg.RoundTimeout, stream)
			if err != nil {
				return nil, err
			}
			answer, ok := req.Step.(*agentv1.AttestAgentRequest_ChallengeResponse)
			if !ok {
				return nil, status.Error(codes.InvalidArgument, "malformed param: missing challenge response")
			}
			if err := send(&nodeattestorv1.AttestRequest{Request: &nodeattestorv1.AttestRequest_ChallengeResponse{ChallengeResponse: answer.ChallengeResponse}}); err != nil {
				return nil, err
			}
		default:
			return nil, s.internal("node attestor", fmt.Errorf("unexpected response %T", r))
		}
	}
	return nil, status.Error(codes.InvalidArgument, "attestation takes too many rounds")
}

// receive reads the agent's next message within d. Past that the handler
// returns, which ends the stream and with it the read that was left behind.
func receive(ctx context.Context, d time.Duration, stream attestStream) (*agentv1.AttestAgentRequest, error) {
	type result struct {
		req *agentv1.AttestAgentRequest
		err error
	}
	ch := make(chan result, 1)
	go func() {
		req, err := stream.Recv()
		ch <- result{req, err}
	}()
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case r := <-ch:
		if errors.Is(r.err, io.EOF) {
			r.err = status.Error(codes.InvalidArgument, "attestation ended early")
		}
		return r.req, r.err
	case <-t.C:
		return nil, status.Error(codes.DeadlineExceeded, "no answer in time")
	case <-ctx.Done():
		return nil, status.FromContextError(ctx.Err()).Err()
	}
}

// admit records the node and signs its agent's SVID. The record is durable
// before the SVID leaves, and a ban that came meanwhile holds.
func (s *Server) admit(ctx context.Context, at *attestor, attrs *nodeattestorv1.AgentAttributes, proved *nodeserver.Attested, csr *x509.CertificateRequest, bound bool) (*svid.SVID, error) {
	typ := at.plugin.Name()
	id, err := s.attestedID(typ, attrs)
	if err != nil {
		return nil, s.internal("node attestor", err)
	}
	switch {
	case !at.builtIn:
		// What it proved, if it was a TPM at all, was not proved to us: this is a
		// node without evidence.
		proved, bound = nil, false
	case proved == nil || proved.AgentID != id.String() || proved.KeyBound != bound:
		return nil, s.internal("node attestor", errors.New("what was proved is missing or of another attestation"))
	}
	cert, err := s.issue(ctx, svid.Request{Profile: svid.Agent, ID: id, PublicKey: csr.PublicKey, SPKI: csr.RawSubjectPublicKeyInfo, TTL: s.cfg.AgentTTL})
	if err != nil {
		return nil, s.issueError(err)
	}
	agent := store.Agent{
		ID: id.String(), AttestationType: typ, Serial: cert.Serial.String(), ExpiresAt: cert.NotAfter,
		CanReattest: attrs.CanReattest, KeyBound: bound, Attestation: recordOf(proved),
	}
	for _, v := range attrs.SelectorValues {
		agent.Selectors = append(agent.Selectors, store.Selector{Type: typ, Value: v})
	}
	_, err = s.store.PutAttestedAgent(ctx, agent, "serial "+agent.Serial)
	switch {
	case errors.Is(err, store.ErrBanned):
		return nil, permissionDenied(types.PermissionDeniedDetails_AGENT_BANNED, "agent is banned")
	case err != nil:
		return nil, s.internal("record attestation", err)
	}
	if len(s.cfg.ParentPatterns) > 0 && givesParent(&agent) {
		if err := s.parentReady(&agent); err != nil {
			s.cfg.Log.Warn("entries that need parent evidence are left out of this agent's", "agent", agent.ID, "error", err)
		}
	}
	s.cfg.Log.Info("node attested", "agent", agent.ID, "key_bound", bound, "selectors", len(agent.Selectors), "expires", agent.ExpiresAt)
	return cert, nil
}

// recordOf returns nil for what another than the built-in attestor proved.
func recordOf(p *nodeserver.Attested) *store.Attestation {
	if p == nil {
		return nil
	}
	// The key of an EK that came with a certificate is in there. The TPM's
	// public area was parsed from the same key, so it has an encoding.
	var ekPublic []byte
	if len(p.EKChain) == 0 {
		ekPublic, _ = x509.MarshalPKIXPublicKey(p.EK.Public)
	}
	return &store.Attestation{
		At: p.At, EKHash: p.EK.Hash, EKBasis: p.EK.Basis, EKRoot: p.EK.RootHash, EKChain: p.EKChain, EKPublic: ekPublic,
		AKName: p.AK.Name, AKCert: p.AKCert.Raw, AgentKey: p.AgentKey,
		Nonce: p.Nonce[:], Quote: p.QuoteAttest, Signature: p.Signature, PCRs: p.PCRs,
		ResetCount: p.Quote.ResetCount, RestartCount: p.Quote.RestartCount, Clock: p.Quote.Clock,
		EventLog: p.EventLogDigest, IMALog: p.IMALogDigest, SecureBoot: p.SecureBoot,
		Manufacturer: p.AK.Manufacturer, Firmware: p.AK.Firmware, Software: p.AK.Software,
	}
}

// snake turns "PermissionDenied" into "permission_denied".
func snake(s string) string {
	var b strings.Builder
	for i, r := range s {
		if r >= 'A' && r <= 'Z' {
			if i > 0 {
				b.WriteByte('_')
			}
			r += 'a' - 'A'
		}
		b.WriteRune(r)
	}
	return b.String()
}
