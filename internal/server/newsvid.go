package server

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/rootlink/rootlink/internal/policy"
	"github.com/rootlink/rootlink/internal/server/compose"
	"github.com/rootlink/rootlink/internal/store"
	"github.com/rootlink/rootlink/pkg/attest"
	"github.com/rootlink/rootlink/pkg/svid"
)

// maxCSRs is SPIRE's own limit on one call.
const maxCSRs = 500

// svidOverhead is about what a certificate holds beside what its CSR held, in
// bytes.
const svidOverhead = 1 << 10

// refusal is why no SVID was issued. Its reason is from a fixed set: it is
// counted by.
type refusal struct {
	reason string
	code   codes.Code
	err    error
}

func (r *refusal) Error() string { return r.reason + ": " + r.err.Error() }
func (r *refusal) Unwrap() error { return r.err }

// refuse is for what stays refused.
func refuse(reason, format string, args ...any) error {
	return &refusal{reason, codes.PermissionDenied, fmt.Errorf(format, args...)}
}

// stale is for what other evidence, made now, may get past.
func stale(reason string, err error) error { return &refusal{reason, codes.Aborted, err} }

// issuance is what the items of one BatchNewX509SVID call share.
type issuance struct {
	agent     *store.Agent
	agentKey  [32]byte // proved by the handshake
	now       time.Time
	selectors []store.Selector // of the node, by its record
	policies  []policy.Revision
	ek        attest.EKRoots
	parentCache
}

// BatchNewX509SVID signs CSRs for entries that the calling agent is authorised
// for. Each item has a status of its own, in the order of the request; a reply
// that would be too large is cut short, and the agent asks again for the rest.
func (v *svidService) BatchNewX509SVID(ctx context.Context, req *svidv1.BatchNewX509SVIDRequest) (*svidv1.BatchNewX509SVIDResponse, error) {
	if len(req.Params) == 0 {
		return nil, status.Error(codes.InvalidArgument, "missing parameters")
	}
	if len(req.Params) > maxCSRs {
		return nil, status.Errorf(codes.ResourceExhausted, "%d CSRs, at most %d allowed", len(req.Params), maxCSRs)
	}
	in, err := v.s.newIssuance(callerOf(ctx))
	if err != nil {
		return nil, v.s.internal("issue SVIDs", err)
	}
	set, err := v.s.authorized(in.agent.ID, in.selectors)
	if err != nil {
		return nil, v.s.internal("issue SVIDs", err)
	}
	n, size := 0, 0
	for _, p := range req.Params {
		if size += v.s.sizeOf(in, set.entries[p.GetEntryId()], p); n > 0 && size > maxPageBytes {
			break
		}
		n++
	}
	results := make([]*svidv1.BatchNewX509SVIDResponse_Result, n)
	// Few goroutines for many items: what certificates are made with needs a deep
	// stack, which each new goroutine grows, and copies, anew.
	var next atomic.Int64
	var wg sync.WaitGroup
	for range min(n, runtime.GOMAXPROCS(0)) {
		wg.Go(func() {
			for i := int(next.Add(1)) - 1; i < n; i = int(next.Add(1)) - 1 {
				results[i] = v.s.result(ctx, in, req.Params[i])
			}
		})
	}
	wg.Wait()
	return &svidv1.BatchNewX509SVIDResponse{Results: results}, nil
}

// sizeOf is about what the SVID will hold, in bytes: rather more than less.
func (s *Server) sizeOf(in *issuance, entry *store.Entry, p *svidv1.NewX509SVIDParams) int {
	size := len(p.GetCsr()) + svidOverhead
	if len(s.composers) > 0 {
		size += compose.MaxAdded
	}
	if entry == nil {
		return size // it is refused
	}
	for _, n := range entry.DNSNames {
		size += len(n) + 8
	}
	if givesParent(in.agent) && s.wantsParent(entry.SPIFFEID) {
		size += attest.MaxParent
	}
	return size
}

func (s *Server) newIssuance(c *caller) (*issuance, error) {
	in := &issuance{agent: c.agent, agentKey: c.key(), now: s.cfg.Now(), selectors: s.nodeSelectors(c.agent)}
	var err error
	if in.policies, err = s.policies(); err != nil {
		return nil, err
	}
	if c.agent.KeyBound || givesParent(c.agent) {
		if in.ek, err = s.EKRoots(); err != nil {
			return nil, err
		}
	}
	return in, nil
}

// result never panics past itself: a nil result would take a stock agent down.
func (s *Server) result(ctx context.Context, in *issuance, p *svidv1.NewX509SVIDParams) (out *svidv1.BatchNewX509SVIDResponse_Result) {
	out = new(svidv1.BatchNewX509SVIDResponse_Result)
	var err error
	defer func() {
		if err != nil {
			st := status.Convert(err)
			out.Svid, out.Status = nil, &types.Status{Code: int32(st.Code()), Message: st.Message()}
		}
	}()
	defer s.recovered("BatchNewX509SVID", &err)
	cert, profile, ierr := s.newSVID(ctx, in, p)
	switch {
	case ierr != nil:
		err = s.refused(in, p.GetEntryId(), ierr)
	default:
		s.count.add("issued/" + profile.String())
		out.Status, out.Svid = okStatus(), svidToProto(cert, "")
	}
	return out
}

// refused counts and logs why an SVID is not issued and returns what the agent
// hears of it.
func (s *Server) refused(in *issuance, entry string, err error) error {
	var r *refusal
	if errors.As(err, &r) {
		s.count.add("issue_refused/" + r.reason)
		s.warnOf(in.agent.ID, "SVID refused", "agent", in.agent.ID, "entry", entry, "reason", r.reason, "error", r.err)
		return status.Error(r.code, r.Error())
	}
	s.count.add("issue_refused/other")
	s.warnOf(in.agent.ID, "SVID refused", "agent", in.agent.ID, "entry", entry, "reason", "other", "error", err)
	return s.issueError(err)
}

// newSVID decides on one CSR, top down, and signs.
func (s *Server) newSVID(ctx context.Context, in *issuance, p *svidv1.NewX509SVIDParams) (*svid.SVID, svid.Profile, error) {
	entry, err := s.entryFor(in, p.GetEntryId(), in.selectors)
	if err != nil {
		return nil, 0, err
	}
	csr, err := parseCSR(p.GetCsr())
	if err != nil {
		return nil, 0, &refusal{"csr", codes.InvalidArgument, fmt.Errorf("malformed CSR: %w", err)}
	}
	id, err := spiffeid.FromString(entry.SPIFFEID)
	if err != nil {
		return nil, 0, err
	}
	r := svid.Request{
		Profile: svid.Workload, ID: id, PublicKey: csr.PublicKey, SPKI: csr.RawSubjectPublicKeyInfo,
		DNSNames: entry.DNSNames, TTL: entry.X509TTL, Now: in.now,
	}
	if r.TTL == 0 {
		r.TTL = s.cfg.X509TTL
	}
	record, err := attest.FromExtensions(csr.Extensions)
	switch {
	case errors.Is(err, attest.ErrNoEvidence):
		if isStep(entry) {
			return nil, 0, refuse("step_without_evidence", "entry %s is for recorded steps, whose SVIDs need leaf evidence", entry.ID)
		}
		if s.needsEvidence(entry.SPIFFEID) {
			return nil, 0, refuse("evidence_missing", "SVIDs of %s need leaf evidence on this server", entry.SPIFFEID)
		}
		if err := s.addParent(in, entry, &r); err != nil {
			return nil, 0, err
		}
	case err != nil:
		return nil, 0, &refusal{"evidence_malformed", codes.InvalidArgument, err}
	default:
		if err := s.checkLeaf(in, entry, csr, record, &r); err != nil {
			return nil, 0, err
		}
	}
	// No SVID outlives its entry.
	if !entry.ExpiresAt.IsZero() {
		r.TTL = min(r.TTL, entry.ExpiresAt.Sub(in.now))
	}
	cert, err := s.issue(ctx, r)
	if errors.Is(err, svid.ErrEvidence) {
		err = stale("evidence", err)
	}
	if err == nil && r.Parent != nil && len(cert.DER) > maxParentSVID {
		return nil, 0, refuse("too_large", "the SVID with parent evidence has %d bytes, at most %d", len(cert.DER), maxParentSVID)
	}
	return cert, r.Profile, err
}

// entryFor returns the entry if the agent, with these node selectors, is
// authorised for it and it can be issued for.
func (s *Server) entryFor(in *issuance, id string, selectors []store.Selector) (*store.Entry, error) {
	set, err := s.authorized(in.agent.ID, selectors)
	if err != nil {
		return nil, err
	}
	entry := set.entries[id]
	if entry == nil {
		return nil, &refusal{"entry", codes.NotFound, fmt.Errorf("entry %q not found or not authorized", id)}
	}
	if !s.issuable(entry, in.agent) {
		return nil, refuse("not_issuable", "entry %s has expired or needs evidence that this node cannot give", id)
	}
	return entry, nil
}

// checkLeaf decides on leaf evidence, and completes the request with it.
// Everything is checked before the leaf counts as used.
func (s *Server) checkLeaf(in *issuance, entry *store.Entry, csr *x509.CertificateRequest, record *attest.Evidence, r *svid.Request) error {
	if !in.agent.KeyBound || in.agent.Attestation == nil {
		return refuse("agent_unbound", "this node's attestation did not cover its agent's key")
	}
	if record.Policy != nil {
		return refuse("policy_claimed", "the policy field is the server's to fill in")
	}
	node := in.agent.Attestation
	verified, _, err := attest.Verify(record, attest.Binding{
		TrustDomain: s.cfg.TrustDomain, SPIFFEID: entry.SPIFFEID, SVIDKey: sha256.Sum256(csr.RawSubjectPublicKeyInfo),
		AgentKey: &in.agentKey, EKHash: &node.EKHash, At: in.now,
	}, attest.Options{
		AttestationCAs: s.attestationCA.Chain(),
		EK:             in.ek,
		RequiredPCRs:   s.cfg.QuotePCRs,
		Signatures:     s.signatures,
		CheckNonce:     func(n [32]byte) error { return s.nonces.Check(n, in.agent.ID, in.now) },
	})
	var boot *attest.BootError
	if errors.As(err, &boot) {
		// Everything else about the quote was good. Of the node's boot, it was
		// certified in an earlier one, and the agent has a newer certificate.
		if err := s.bootOf(in, boot.Quoted); err != nil {
			return err
		}
		return stale("ak_certificate_old", err)
	}
	if err != nil {
		return verifyRefusal(err)
	}
	if err := s.sameBoot(in, verified); err != nil {
		return err
	}
	leaf := verified.Leaf()
	if err := checkRole(entry, &leaf, r); err != nil {
		return err
	}
	if err := checkSelectors(in, entry, &leaf); err != nil {
		return err
	}
	grant, err := s.judge.Grant(verified, in.policies, in.now)
	if err != nil {
		return err
	}
	ref, err := s.checkPolicy(in, entry, grant.Verdict(), verified.PCRs())
	if err != nil {
		return err
	}
	hash, err := leaf.Hash()
	if err != nil {
		return err
	}
	switch err := s.leaves.use(hash, in.now); {
	case errors.Is(err, errReplayFull):
		return stale("replay_cache_full", err)
	case err != nil:
		return stale("leaf_replayed", err)
	}
	// The copy that goes into the certificate says which policy let it pass;
	// the quote and all that it covers stay byte for byte.
	embedded := *record
	embedded.Policy = ref
	r.Evidence = &svid.Evidence{Record: &embedded, Verified: verified}
	if r.Profile == svid.Issuer {
		r.TTL = s.cfg.IssuerTTL
		r.DNSNames = nil // it signs one statement and serves nothing
	}
	return nil
}

// verifyRefusal names the check that failed. What the agent could mend by
// making new evidence is told apart from what it could not.
func verifyRefusal(err error) error {
	var c *attest.CheckError
	if !errors.As(err, &c) {
		return stale("evidence", err)
	}
	code := codes.PermissionDenied
	for _, mendable := range []error{attest.ErrNonceExpired, attest.ErrNonceForeign, attest.ErrNonceFuture, attest.ErrAKCertTime, attest.ErrWrongAgent} {
		if errors.Is(err, mendable) {
			code = codes.Aborted
		}
	}
	return &refusal{"evidence_" + snakeID(c.ID), code, err}
}

// snakeID turns "quote.pcr_digest" into "quote_pcr_digest".
func snakeID(id string) string {
	b := []byte(id)
	for i := range b {
		if b[i] == '.' {
			b[i] = '_'
		}
	}
	return string(b)
}
