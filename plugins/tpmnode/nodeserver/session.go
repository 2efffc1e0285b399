package nodeserver

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"runtime/debug"
	"slices"
	"time"

	nodeattestorv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/server/nodeattestor/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/rootlink/rootlink/internal/policy"
	"github.com/rootlink/rootlink/pkg/attest"
	"github.com/rootlink/rootlink/plugins/tpmnode/wire"
	tpmv1 "github.com/rootlink/rootlink/proto/rootlink/tpm/v1"
)

// Attest implements the NodeAttestor service.
func (p *Plugin) Attest(stream nodeattestorv1.NodeAttestor_AttestServer) (err error) {
	// As an external plugin nothing else would catch a panic, and the plugin
	// would be gone until SPIRE is started again.
	defer func() {
		if r := recover(); r != nil {
			p.log.Error("attestation panicked", "panic", fmt.Sprint(r), "stack", string(debug.Stack()))
			err = status.Error(codes.Internal, "internal error")
		}
	}()
	settings := p.state.Load()
	if settings == nil {
		return status.Error(codes.FailedPrecondition, "not configured")
	}
	ctx, evict := context.WithCancelCause(stream.Context())
	defer evict(nil)
	slot := p.slots.take(evict)
	if slot == nil {
		return p.refused(nil, unavailable("busy", "too many attestations under way", nil))
	}
	defer p.slots.release(slot)
	ctx, cancel := context.WithTimeoutCause(ctx, maxSessionRounds*settings.roundTimeout,
		fmt.Errorf("attestation as a whole: %w", errRound))
	defer cancel()
	s := &session{p: p, slot: slot, settings: settings, stream: stream, ctx: ctx}
	if err := s.run(); err != nil {
		return p.refused(s, err)
	}
	return nil
}

// refused logs why an attestation ended and returns what the caller may know.
func (p *Plugin) refused(s *session, err error) error {
	var r *refusal
	if !errors.As(err, &r) {
		// The stream's own error: the other side went away.
		p.log.Debug("attestation ended early", "error", err.Error())
		return err
	}
	args := []any{"reason", r.reason, "error", r.Error()}
	if s != nil && s.agentID != "" {
		args = append(args, "agent_id", s.agentID)
	}
	p.log.Warn("attestation refused", args...)
	return r.GRPCStatus().Err()
}

// session is one Attest stream. Its secrets are made for it and used once.
type session struct {
	p        *Plugin
	slot     *slot
	settings *settings
	stream   nodeattestorv1.NodeAttestor_AttestServer
	ctx      context.Context

	agentKey [32]byte // what the quote must bind: the agent's key, or zero
	bound    bool     // whether the host told us the agent's key
	began    time.Time
	started  uint64 // order of the challenges, see live

	req       *tpmv1.AttestRequest
	ek        *attest.EK
	ak        *attest.AK
	agentID   string
	secret    [wire.SecretSize]byte
	nonce     [wire.NonceSize]byte
	pcrs      []attest.PCRSelection // what the challenge asks for
	policies  []policy.Revision
	proof     *tpmv1.Proof
	out       Attested
	heldBytes int64 // of event log, counted in Plugin.logs
}

// run is the whole protocol, top down. Whatever a step needs has been checked
// by a step above it.
func (s *session) run() error {
	defer func() { s.p.logs.Add(-s.heldBytes) }()
	s.began = s.p.opts.Now()
	for _, step := range []func() error{
		s.request,     // what the agent claims
		s.endorsement, // the TPM is genuine and wanted
		s.attestation, // the AK is one that can be trusted in such a TPM
		s.challenge,   // only that TPM can answer
		s.activation,  // it did: the AK lives in the TPM of the EK
		s.quote,       // boot state and agent key, said by that AK
		s.eventLogs,   // how the boot state came about
		s.judge,       // what the boot state is worth
		s.pin,         // it is the AK and EK that we know
		s.certify,     // an AK certificate, unless banned meanwhile
		s.finish,
	} {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

func (s *session) receive(what string) (*nodeattestorv1.AttestRequest, error) {
	r, err := round(s.ctx, s.settings.roundTimeout, "waiting for "+what, s.stream.Recv)
	if errors.Is(err, io.EOF) {
		return nil, invalid("malformed", "attestation ended early", fmt.Errorf("the agent ended the stream, due was %s", what))
	}
	return r, err
}

func (s *session) send(what string, m *nodeattestorv1.AttestResponse) error {
	_, err := round(s.ctx, s.settings.roundTimeout, "sending "+what, func() (struct{}, error) {
		return struct{}{}, s.stream.Send(m)
	})
	return err
}

// ask sends a challenge and returns the answer.
func (s *session) ask(what string, m *tpmv1.ServerMessage, limit int) (*tpmv1.AgentMessage, error) {
	b, err := wire.EncodeServer(m)
	if err != nil {
		return nil, unavailable("internal", "internal error", err)
	}
	if err := s.send(what, &nodeattestorv1.AttestResponse{Response: &nodeattestorv1.AttestResponse_Challenge{Challenge: b}}); err != nil {
		return nil, err
	}
	r, err := s.receive("the answer to " + what)
	if err != nil {
		return nil, err
	}
	answer, ok := r.GetRequest().(*nodeattestorv1.AttestRequest_ChallengeResponse)
	if !ok {
		return nil, invalid("malformed", "message out of turn", errors.New("a payload where a challenge response is due"))
	}
	out, err := wire.DecodeAgent(answer.ChallengeResponse, limit)
	if err != nil {
		return nil, messageRefusal(err)
	}
	return out, nil
}

func (s *session) request() (err error) {
	if s.agentKey, s.bound, err = wire.AgentKey(s.ctx); err != nil {
		// Said by our host, not by the agent.
		return unavailable("internal", "internal error", err)
	}
	r, err := s.receive("the payload")
	if err != nil {
		return err
	}
	payload, ok := r.GetRequest().(*nodeattestorv1.AttestRequest_Payload)
	if !ok {
		return invalid("malformed", "message out of turn", errors.New("no payload in the first message"))
	}
	if s.req, err = wire.DecodeRequest(payload.Payload); err != nil {
		return messageRefusal(err)
	}
	if s.req.TrustDomain != s.settings.trustDomain {
		return denied("trust_domain", "wrong trust domain", fmt.Errorf("agent means %q", s.req.TrustDomain))
	}
	return nil
}

func (s *session) endorsement() error {
	roots, err := s.settings.ekRoots()
	if err != nil {
		return unavailable("lists", "server cannot judge TPMs now", err)
	}
	if s.ek, err = attest.VerifyEK(s.req.EkChain, s.req.EkPublic, roots, s.p.opts.Now()); err != nil {
		return ekRefusal(err)
	}
	// The credential will be sealed to this public area. That it is the key
	// just accepted was checked above; this keeps it so.
	if h, err := attest.EKHash(s.req.EkPublic); err != nil || h != s.ek.Hash {
		return denied("ek_mismatch", "EK certificate and key do not belong together", err)
	}
	s.agentID = wire.AgentID(s.settings.trustDomain, s.ek.Hash)
	if t := ekType(s.ek.Public); !slices.Contains(s.settings.ekTypes, t) {
		return denied("ek_type", "EK is of a type that is not accepted here", fmt.Errorf("EK type %q, accepted: %v", t, s.settings.ekTypes))
	}
	return s.notBanned()
}

func (s *session) notBanned() error {
	if s.p.opts.Banned == nil {
		return nil
	}
	banned, err := s.p.opts.Banned(s.ctx, s.agentID)
	if err != nil {
		return unavailable("ban_check", "server cannot judge nodes now", err)
	}
	if banned {
		return denied("banned", "this node is banned", nil)
	}
	return nil
}

func (s *session) attestation() (err error) {
	if s.ak, err = attest.VerifyAK(s.req.AkPublic, s.req.AkCreationData, s.req.AkCreationAttest, s.req.AkCreationSignature); err != nil {
		return akRefusal(err)
	}
	return nil
}

// challenge seals a fresh secret to (EK, AK name) and asks for a quote over a
// fresh nonce. Both belong to this stream only.
func (s *session) challenge() (err error) {
	if s.policies, err = s.settings.policies(s.ctx); err != nil {
		return unavailable("policies", "server cannot judge nodes now", err)
	}
	s.pcrs = withPolicyPCRs(s.settings.pcrs, s.policies)
	if _, err := rand.Read(s.secret[:]); err != nil {
		return unavailable("internal", "internal error", err)
	}
	if _, err := rand.Read(s.nonce[:]); err != nil {
		return unavailable("internal", "internal error", err)
	}
	blob, encrypted, err := attest.MakeCredential(s.req.EkPublic, s.ak.Name, s.secret[:])
	if err != nil {
		return denied("credential", "EK cannot take a credential", err)
	}
	s.started = s.p.live.begin()
	m, err := s.ask("the challenge", &tpmv1.ServerMessage{Step: &tpmv1.ServerMessage_Challenge{Challenge: &tpmv1.Challenge{
		CredentialBlob: blob, EncryptedSecret: encrypted, Nonce: s.nonce[:], Pcrs: wire.SelectionsToProto(s.pcrs),
		WantEventLog: s.settings.wantEventLog, WantImaLog: s.settings.wantIMALog,
	}}}, wire.MaxProof)
	if err != nil {
		return err
	}
	if s.proof = m.GetProof(); s.proof == nil {
		return invalid("malformed", "message out of turn", errors.New("no proof after the challenge"))
	}
	return nil
}

// withPolicyPCRs adds what policies name to the PCRs that are quoted anyway, in
// banks that are: a TPM without some bank would fail the whole quote.
func withPolicyPCRs(pcrs []attest.PCRSelection, policies []policy.Revision) []attest.PCRSelection {
	out := slices.Clone(pcrs)
	for i := range out {
		indices := slices.Clone(out[i].Indices)
		for _, r := range policies {
			for _, need := range r.Policy.Required() {
				if need.Bank == out[i].Bank {
					indices = append(indices, need.Indices...)
				}
			}
		}
		slices.Sort(indices)
		out[i].Indices = slices.Compact(indices)
	}
	return out
}

func (s *session) activation() error {
	if subtle.ConstantTimeCompare(s.proof.Secret, s.secret[:]) != 1 {
		return denied("activation", "credential was not activated", errors.New("the secret is not this session's: EK and AK are not in one TPM, or the answer belongs to another session"))
	}
	s.p.slots.prove(s.slot, s.ek.Hash)
	return nil
}

func (s *session) quote() error {
	if subtle.ConstantTimeCompare(s.proof.AgentKeySha256, s.agentKey[:]) != 1 {
		if s.bound {
			return denied("agent_key", "proof does not bind the agent's key", fmt.Errorf("proof names %x, the CSR's key is %x", s.proof.AgentKeySha256, s.agentKey))
		}
		return denied("agent_key", "proof binds a key that this server cannot check", fmt.Errorf("proof names %x", s.proof.AgentKeySha256))
	}
	pcrs, err := wire.BanksFromProto(s.proof.Pcrs)
	if err != nil {
		return messageRefusal(err)
	}
	extra := attest.NodeExtraData(s.nonce, s.ak.Name, s.settings.trustDomain, s.agentKey)
	q, err := attest.VerifyQuote(s.proof.Attest, s.proof.Signature, s.ak, extra, pcrs, s.pcrs)
	if err != nil {
		return quoteRefusal(err)
	}
	s.out = Attested{
		AgentID: s.agentID, EK: *s.ek, EKChain: s.req.EkChain,
		AgentKey: s.agentKey, KeyBound: s.bound,
		Nonce: s.nonce, QuoteAttest: s.proof.Attest, Signature: s.proof.Signature, Quote: *q, PCRs: pcrs,
	}
	label(s.ak, s.ek.Basis, s.req, q.FirmwareVersion)
	s.out.AK = *s.ak
	return nil
}

// pin holds EK, AK and TPM together. Only now are their names worth pinning:
// before the activation anybody could have sent them.
func (s *session) pin() error {
	ctx, pins := s.ctx, s.settings.pins
	first, err := pins.PinTPM(ctx, s.ak.ParentName, s.ek.Hash)
	if err != nil {
		return unavailable("pins", "server cannot judge nodes now", err)
	}
	if first != s.ek.Hash {
		s.p.alarm(ctx, Alarm{AlarmSecondEK, s.agentID, fmt.Sprintf("this TPM is enrolled as %s already", wire.AgentID(s.settings.trustDomain, first)), true})
		return denied("second_ek", "this TPM is enrolled under another EK", nil)
	}
	known, err := pins.PinAK(ctx, s.ek.Hash, s.ak.Name, false)
	if err != nil {
		return unavailable("pins", "server cannot judge nodes now", err)
	}
	if bytes.Equal(known, s.ak.Name) {
		return nil
	}
	detail := fmt.Sprintf("AK changed from %x to %x: the TPM was cleared, the agent's data was lost, or somebody else uses this TPM", known, s.ak.Name)
	s.p.alarm(ctx, Alarm{AlarmAKChanged, s.agentID, detail, s.settings.refuseAKChange})
	if s.settings.refuseAKChange {
		return denied("ak_changed", "AK is not the one known for this TPM", nil)
	}
	if _, err := pins.PinAK(ctx, s.ek.Hash, s.ak.Name, true); err != nil {
		return unavailable("pins", "server cannot judge nodes now", err)
	}
	return nil
}

func (s *session) judge() error {
	v := s.p.judge.Node(s.ak.Name, &s.out.Quote, s.out.PCRs, s.policies, s.p.opts.Now())
	s.out.Matches = v.Matches()
	for _, m := range v.Misses() {
		s.p.log.Info("PCR policy not met", "agent_id", s.agentID, "policy", m.Name, "difference", m.Reason.Error())
	}
	s.out.Selectors = selectors(&s.out, s.settings.selectors, v)
	return nil
}

func (s *session) certify() error {
	// The session took a while: the ban or the deny-list may be younger.
	if err := s.notBanned(); err != nil {
		return err
	}
	roots, err := s.settings.ekRoots()
	if err != nil {
		return unavailable("lists", "server cannot judge TPMs now", err)
	}
	if roots.Deny[s.ek.Hash] {
		return ekRefusal(attest.ErrEKDenied)
	}
	above := append(slices.Clone(roots.Roots), roots.Intermediates...)
	for _, der := range s.out.EKChain {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return invalid("malformed", "EK certificate chain is malformed", err)
		}
		above = append(above, cert)
	}
	s.out.At = s.p.opts.Now()
	s.out.AKCert, err = s.settings.ca.SignAK(attest.AKStatement{
		EKHash: s.ek.Hash, EKBasis: s.ek.Basis, EKRoot: s.ek.RootHash, AKName: s.ak.Name,
		Manufacturer: s.ak.Manufacturer, Firmware: s.ak.Firmware, Software: s.ak.Software,
		Boot: &attest.BootCounters{Reset: s.out.Quote.ResetCount, Restart: s.out.Quote.RestartCount},
	}, s.ak.Public, s.out.At, above...)
	if err != nil {
		return caRefusal(err)
	}
	if s.p.opts.OnCertificate != nil {
		if err := s.p.opts.OnCertificate(s.ctx, s.agentID, s.out.AKCert); err != nil {
			return unavailable("certificate", "server cannot record AK certificates now", err)
		}
	}
	m, err := s.ask("the AK certificate", &tpmv1.ServerMessage{Step: &tpmv1.ServerMessage_AkCertificate{AkCertificate: &tpmv1.AKCertificate{
		Certificate: s.out.AKCert.Raw, CaChain: s.settings.ca.ChainDER(),
	}}}, wire.MaxProof)
	if err != nil {
		return err
	}
	want := sha256.Sum256(s.out.AKCert.Raw)
	if ack := m.GetAck(); ack == nil || !bytes.Equal(ack.AkCertificateSha256, want[:]) {
		return invalid("malformed", "AK certificate was not acknowledged", nil)
	}
	return nil
}

func (s *session) finish() error {
	if stale, crowd := s.p.live.finish(s.ek.Hash, s.started, s.agentKey, s.p.opts.Now()); stale {
		s.p.alarm(s.ctx, Alarm{AlarmTwoAgents, s.agentID, "a second agent on this TPM attested while this one was about to", true})
		return &refusal{codes.Aborted, "superseded", "a newer agent on this TPM has attested", nil}
	} else if crowd != "" {
		s.p.alarm(s.ctx, Alarm{AlarmTwoAgents, s.agentID, crowd, false})
	}
	if s.p.opts.OnAttested != nil {
		if err := s.p.opts.OnAttested(s.ctx, &s.out); err != nil {
			return unavailable("observer", "server cannot record nodes now", err)
		}
	}
	s.p.log.Info("attested", "agent_id", s.agentID, "ek_basis", s.ek.Basis, "ak", hex.EncodeToString(s.ak.Name),
		"manufacturer", s.ak.Manufacturer, "software_tpm", s.ak.Software, "key_bound", s.bound,
		"pcr_policies", fmt.Sprint(len(s.out.Matches)), "took", s.p.opts.Now().Sub(s.began).Round(time.Millisecond).String())
	return s.send("the result", &nodeattestorv1.AttestResponse{Response: &nodeattestorv1.AttestResponse_AgentAttributes{
		AgentAttributes: &nodeattestorv1.AgentAttributes{SpiffeId: s.agentID, SelectorValues: s.out.Selectors, CanReattest: true},
	}})
}
