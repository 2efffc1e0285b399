package admin

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/rootlink/rootlink/internal/server"
	"github.com/rootlink/rootlink/internal/store"
	"github.com/rootlink/rootlink/internal/trustdoc"
	"github.com/rootlink/rootlink/pkg/link"
	"github.com/rootlink/rootlink/pkg/svid"
	adminv1 "github.com/rootlink/rootlink/proto/rootlink/admin/v1"
)

// ExportTrust returns trust.json, or the part of it that Sigstore's tools read.
func (s *Service) ExportTrust(ctx context.Context, req *adminv1.ExportTrustRequest) (*adminv1.ExportTrustResponse, error) {
	var r *adminv1.ExportTrustResponse
	var err error
	switch req.Format {
	case "", "rootlink":
		r, err = s.exportRootlink(ctx, req)
	case "sigstore":
		r, err = s.exportSigstore(ctx)
	default:
		err = malformed("format %q is neither rootlink nor sigstore", req.Format)
	}
	return r, toStatus(err)
}

func (s *Service) exportSigstore(ctx context.Context) (*adminv1.ExportTrustResponse, error) {
	known, err := s.trustedRoot(ctx)
	if err != nil {
		return nil, err
	}
	doc, err := trustdoc.Sigstore(known)
	if err != nil {
		return nil, err
	}
	return &adminv1.ExportTrustResponse{Document: doc, Notes: []string{
		"tools that read this part check signatures and times, and no hardware evidence",
	}}, nil
}

func (s *Service) exportRootlink(ctx context.Context, req *adminv1.ExportTrustRequest) (*adminv1.ExportTrustResponse, error) {
	// Compared in seconds: a huge number of them would wrap around.
	if req.LifetimeSeconds < 0 || req.LifetimeSeconds > int64(trustdoc.MaxLifetime/time.Second) {
		return nil, malformed("a lifetime of %d seconds", req.LifetimeSeconds)
	}
	s.exporting.Lock()
	defer s.exporting.Unlock()
	f, err := trustdoc.New(s.b.TrustDomain(), s.now(), time.Duration(req.LifetimeSeconds)*time.Second)
	if err != nil {
		return nil, err
	}
	var notes []string
	root, err := s.trustedRoot(ctx)
	if err != nil {
		return nil, err
	}
	if err := s.addSources(ctx, req, &f, &root); err != nil {
		return nil, err
	}
	if f.TrustedRoot, err = root.Marshal(); err != nil {
		return nil, err
	}
	if err := s.addAuthorityRevocations(&f); err != nil {
		return nil, err
	}
	trustdoc.AddAttestationCAs(&f, s.b.AttestationCAs())
	if err := s.addEKs(ctx, &f, req.AnyNode, &notes); err != nil {
		return nil, err
	}
	known, err := s.addPolicies(ctx, &f)
	if err != nil {
		return nil, err
	}
	entries, err := s.store.Entries()
	if err != nil {
		return nil, err
	}
	for _, p := range slices.Concat(req.AcceptParent, req.AcceptDetached) {
		if err := link.ValidatePattern(p); err != nil {
			return nil, malformed("%w", err)
		}
		if !slices.ContainsFunc(entries, func(e *store.Entry) bool { return link.MatchPattern(p, e.SPIFFEID) }) {
			return nil, malformed("no entry is for an identity that matches %s", p)
		}
	}
	reqs, more := requirements(f.TrustDomain, entries, known, map[string][]string{
		link.EvidenceParent: req.AcceptParent, link.EvidenceDetached: req.AcceptDetached,
	})
	f.Requirements = append(f.Requirements, reqs...)
	notes = append(notes, more...)
	if err := addDemands(f.Requirements, req.Demands); err != nil {
		return nil, err
	}
	if len(reqs) == 0 {
		notes = append(notes, "no entry is for build steps, so this file accepts no link at all: create entries first")
	}
	if err := allowTypes(f.Requirements, req.AllowTypes); err != nil {
		return nil, err
	}
	for _, k := range req.LayoutKeys {
		if err := trustdoc.AddLayoutKey(&f, k.Name, k.SpkiDer); err != nil {
			return nil, err
		}
	}
	if err := trustdoc.AddRevocations(&f, req.RevocationsJson); err != nil {
		return nil, err
	}
	r, err := s.seal(ctx, &f, req.Unsigned)
	if err != nil {
		return nil, err
	}
	r.Notes = notes
	return r, nil
}

// trustedRoot lists the SVID authorities with the windows in which a signature
// by one of their SVIDs counts, the server's own timestamp authority and log,
// and what was added by earlier exports.
func (s *Service) trustedRoot(ctx context.Context) (root link.TrustedRoot, err error) {
	list, err := s.b.Authorities()
	if err != nil {
		return root, err
	}
	var out []link.Authority
	for _, a := range list {
		w := link.Authority{Certificate: a.Certificate, Start: a.ActivatedAt, End: a.RetiredAt}
		if w.Start.IsZero() {
			// Published but not yet signing: listed now so that a rotation does
			// not outdate every trust.json that is out there.
			w.Start = a.PreparedAt
		}
		// SVIDs are backdated, and their authority must hold when they begin.
		w.Start = w.Start.Add(-svid.Backdate).UTC().Truncate(time.Second)
		if !w.End.IsZero() {
			// The last SVID it signed may sign for as long as it lives.
			w.End = w.End.UTC().Truncate(time.Second).Add(time.Second + server.MaxIssuerTTL)
			if w.End.After(a.Certificate.NotAfter) {
				w.End = a.Certificate.NotAfter
			}
			// A format without revocations has the window to say it with.
			if from := distrusted(a); !from.IsZero() && from.Before(w.End) {
				w.End = from
			}
		}
		out = append(out, w)
	}
	if len(out) == 0 {
		return root, fmt.Errorf("%w: no X.509 authority", trustdoc.ErrNothing)
	}
	root.Authorities = out
	root.Timestamps = s.b.TimestampAuthorities()
	root.Logs = s.b.Logs()
	for i := range root.Logs {
		if root.Logs[i].Start.IsZero() { // it holds nothing older than the trust domain
			root.Logs[i].Start = oldest(out)
		}
	}
	return root, s.addRemembered(ctx, &root, nil)
}

// addAuthorityRevocations names the authorities that an operator revoked. The
// revocation counts from when it was distrusted first; who knows of an earlier
// theft says so with --revocations.
func (s *Service) addAuthorityRevocations(f *link.TrustFile) error {
	list, err := s.b.Authorities()
	if err != nil {
		return err
	}
	for _, a := range list {
		from := distrusted(a)
		if from.IsZero() {
			continue
		}
		f.Revocations = append(f.Revocations, link.Revocation{
			Kind: link.RevokedAuthority, ID: hex.EncodeToString(spkiHash(a.Certificate)), From: &from, Reason: "revoked by an administrator",
		})
	}
	return nil
}

// distrusted is when an authority that was revoked was first distrusted, zero
// for all others.
func distrusted(a server.AuthorityInfo) time.Time {
	at := a.RevokedAt
	if at.IsZero() {
		return at
	}
	if !a.TaintedAt.IsZero() && a.TaintedAt.Before(at) {
		at = a.TaintedAt
	}
	return at.UTC().Truncate(time.Second)
}

func spkiHash(c *x509.Certificate) []byte {
	h := sha256.Sum256(c.RawSubjectPublicKeyInfo)
	return h[:]
}

func oldest(as []link.Authority) time.Time {
	t := as[0].Start
	for _, a := range as {
		if a.Start.Before(t) {
			t = a.Start
		}
	}
	return t
}

// addEKs says which TPMs are genuine, which of them are ours, and which were
// thrown out.
func (s *Service) addEKs(ctx context.Context, f *link.TrustFile, anyNode bool, notes *[]string) error {
	ek, err := s.ek()
	if err != nil {
		return fmt.Errorf("%w: %w", trustdoc.ErrNothing, err)
	}
	if err := trustdoc.AddEKs(f, ek); err != nil {
		return err
	}
	// Whoever attested once stays in the inventory: what a node signed before
	// it was evicted or retired is as good as ever, and what a banned one signed
	// is judged by the time of the ban.
	ids, err := s.store.AttestedAgentIDs(ctx)
	if err != nil {
		return err
	}
	inventory := map[string]string{}
	for _, id := range ids {
		if h, ok := ekOf(id, f.TrustDomain); ok {
			inventory[h] = id
		}
	}
	agents, err := s.store.Agents()
	if err != nil {
		return err
	}
	for _, a := range agents {
		if h, ok := ekOf(a.ID, f.TrustDomain); ok && a.Banned {
			r, err := s.ban(ctx, a, h)
			if err != nil {
				return err
			}
			f.Revocations = append(f.Revocations, r)
		}
	}
	switch {
	case anyNode:
		*notes = append(*notes, "no inventory: any TPM that ek names is accepted")
	case len(inventory) == 0:
		*notes = append(*notes, "no node has attested yet, so there is no inventory and any TPM that ek names is accepted: export again later")
	default:
		f.EK.Inventory = inventory
	}
	return nil
}

func (s *Service) ban(ctx context.Context, a *store.Agent, ekHash string) (link.Revocation, error) {
	r := link.Revocation{Kind: link.RevokedEK, ID: ekHash, Reason: "the agent was banned"}
	history, err := s.store.AgentHistory(ctx, a.ID, 1000)
	if err != nil {
		return r, err
	}
	for _, e := range history { // newest first
		if e.Event == "banned" {
			from := e.At.UTC().Truncate(time.Second)
			r.From = &from
			return r, nil
		}
	}
	r.Always = true // banned at a time that is no longer on record
	return r, nil
}

// addPolicies adds every revision there ever was, with the time it ended:
// evidence names the one it was issued under.
func (s *Service) addPolicies(ctx context.Context, f *link.TrustFile) (known map[string]bool, err error) {
	list, err := s.store.PCRPolicyRevisions(ctx)
	if err != nil {
		return nil, err
	}
	known = map[string]bool{}
	var revisions []trustdoc.PolicyRevision
	for _, p := range list { // by name, oldest first
		revisions = append(revisions, trustdoc.PolicyRevision{Policy: p.Policy, Created: p.CreatedAt, Deleted: p.DeletedAt})
		known[p.Policy.Name] = true
	}
	trustdoc.AddPolicies(f, revisions)
	return known, nil
}

// ekOf returns the EK hash of an agent that attested with a TPM: its ID names it.
func ekOf(agentID, td string) (string, bool) {
	h, ok := strings.CutPrefix(agentID, "spiffe://"+td+"/spire/agent/tpmnode/")
	return h, ok && len(h) == 64
}
