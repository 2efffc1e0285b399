package admin

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/rootlink/rootlink/internal/server"
	"github.com/rootlink/rootlink/internal/store"
	"github.com/rootlink/rootlink/pkg/link"
	"github.com/rootlink/rootlink/pkg/svid"
	adminv1 "github.com/rootlink/rootlink/proto/rootlink/admin/v1"
)

// DefaultTrustLifetime is how long a trust.json may be used: long enough for a
// release to be checked, short enough that revocations reach people.
const DefaultTrustLifetime = 90 * 24 * time.Hour

const maxTrustLifetime = 10 * 365 * 24 * time.Hour

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
	root, err := known.Sigstore()
	if err != nil {
		return nil, err
	}
	var b bytes.Buffer
	if err := json.Indent(&b, root, "", "  "); err != nil {
		return nil, err
	}
	b.WriteByte('\n')
	return &adminv1.ExportTrustResponse{Document: b.Bytes(), Notes: []string{
		"tools that read this part check signatures and times, and no hardware evidence",
	}}, nil
}

func (s *Service) exportRootlink(ctx context.Context, req *adminv1.ExportTrustRequest) (*adminv1.ExportTrustResponse, error) {
	// Compared in seconds: a huge number of them would wrap around.
	if req.LifetimeSeconds < 0 || req.LifetimeSeconds > int64(maxTrustLifetime/time.Second) {
		return nil, malformed("a lifetime of %d seconds", req.LifetimeSeconds)
	}
	lifetime := time.Duration(req.LifetimeSeconds) * time.Second
	if lifetime == 0 {
		lifetime = DefaultTrustLifetime
	}
	s.exporting.Lock()
	defer s.exporting.Unlock()
	now := s.now().UTC().Truncate(time.Second)
	f := link.TrustFile{
		Issued: now, Expires: now.Add(lifetime), TrustDomain: s.b.TrustDomain(),
		Requirements: []link.Requirement{}, // an empty list is written out: it allows nobody
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
	for _, ca := range s.b.AttestationCAs() {
		f.AttestationCAs = append(f.AttestationCAs, link.AttestationCA{Certificate: ca.Raw})
	}
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
	reqs, more := requirements(f.TrustDomain, entries, known)
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
		if _, err := x509.ParsePKIXPublicKey(k.SpkiDer); err != nil {
			return nil, malformed("layout key %q: %w", k.Name, err)
		}
		f.LayoutKeys = append(f.LayoutKeys, link.LayoutKey{Name: k.Name, Key: k.SpkiDer})
	}
	if err := addRevocations(&f, req.RevocationsJson); err != nil {
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
		}
		out = append(out, w)
	}
	if len(out) == 0 {
		return root, fmt.Errorf("%w: no X.509 authority", errNothing)
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
		if a.RevokedAt.IsZero() {
			continue
		}
		from := a.RevokedAt
		if !a.TaintedAt.IsZero() && a.TaintedAt.Before(from) {
			from = a.TaintedAt
		}
		from = from.UTC().Truncate(time.Second)
		f.Revocations = append(f.Revocations, link.Revocation{
			Kind: link.RevokedAuthority, ID: hex.EncodeToString(spkiHash(a.Certificate)), From: &from, Reason: "revoked by an administrator",
		})
	}
	return nil
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
		return fmt.Errorf("%w: %w", errNothing, err)
	}
	for _, c := range ek.Roots {
		f.EK.Roots = append(f.EK.Roots, c.Raw)
	}
	for _, c := range ek.Intermediates {
		f.EK.Intermediates = append(f.EK.Intermediates, c.Raw)
	}
	f.EK.Allow, f.EK.Deny = hashes(ek.Allow), hashes(ek.Deny)
	if len(f.EK.Roots)+len(f.EK.Allow) == 0 {
		return fmt.Errorf("%w: the server has neither EK roots nor an EK allow-list, so no TPM can be genuine", errNothing)
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
	for i, p := range list { // by name, oldest first
		// A deleted one ended then, whatever took its name later.
		replaced := p.DeletedAt
		if replaced.IsZero() && i+1 < len(list) && list[i+1].Policy.Name == p.Policy.Name {
			replaced = list[i+1].CreatedAt
		}
		f.PCRPolicies = append(f.PCRPolicies, link.PCRPolicy{PCRPolicy: p.Policy, Replaced: replaced})
		known[p.Policy.Name] = true
	}
	return known, nil
}

func addRevocations(f *link.TrustFile, raw []byte) error {
	if len(raw) == 0 {
		return nil
	}
	// Signed or not: it came through the admin socket.
	kind, doc, _, err := link.Document(raw)
	if err != nil || kind != link.KindRevocations {
		return malformed("revocations: not a revocation file")
	}
	var r link.RevocationsFile
	dec := json.NewDecoder(bytes.NewReader(doc))
	dec.DisallowUnknownFields() // a misspelt key would bring back what somebody meant to revoke
	if err := dec.Decode(&r); err != nil {
		return malformed("revocations: %w", err)
	}
	if r.Format != link.RevocationsFormat || r.Version != link.FormatVersion {
		return malformed("revocations: format %q version %d", r.Format, r.Version)
	}
	if _, err := r.Marshal(); err != nil {
		return malformed("revocations: %w", err)
	}
	if r.TrustDomain != f.TrustDomain {
		return malformed("the revocations are of trust domain %q, this is %q", r.TrustDomain, f.TrustDomain)
	}
	f.Revocations = append(f.Revocations, r.Revocations...)
	return nil
}

// ekOf returns the EK hash of an agent that attested with a TPM: its ID names it.
func ekOf(agentID, td string) (string, bool) {
	h, ok := strings.CutPrefix(agentID, "spiffe://"+td+"/spire/agent/tpmnode/")
	return h, ok && len(h) == 64
}

func hashes(set map[[32]byte]bool) (out []string) {
	for h, in := range maps.All(set) {
		if in {
			out = append(out, hex.EncodeToString(h[:]))
		}
	}
	slices.Sort(out)
	return out
}
