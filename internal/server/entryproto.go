package server

import (
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/rootlink/rootlink/internal/server/bundles"
	"github.com/rootlink/rootlink/internal/store"
	"github.com/rootlink/rootlink/pkg/attest"
	"github.com/rootlink/rootlink/pkg/svid"
)

// Limits on entries beyond those that evidence sets on selectors.
const (
	maxEntryID = 255
	maxHint    = 1024
)

var entryID = regexp.MustCompile(`^[A-Za-z0-9._-]+$`)

// errEntry means that an entry as sent cannot be.
var errEntry = errors.New("invalid entry")

func badEntry(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{errEntry}, args...)...)
}

// allFields is what an absent mask stands for.
var allFields = &types.EntryMask{
	SpiffeId: true, ParentId: true, Selectors: true, X509SvidTtl: true, FederatesWith: true, Admin: true,
	Downstream: true, ExpiresAt: true, DnsNames: true, RevisionNumber: true, StoreSvid: true, JwtSvidTtl: true,
	Hint: true, CreatedAt: true,
}

// entryToProto returns the fields of e that mask names; the ID always.
func entryToProto(e *store.Entry, mask *types.EntryMask) *types.Entry {
	if mask == nil {
		mask = allFields
	}
	p := &types.Entry{Id: e.ID}
	if mask.SpiffeId {
		p.SpiffeId = idToProto(e.SPIFFEID)
	}
	if mask.ParentId {
		p.ParentId = idToProto(e.ParentID)
	}
	if mask.Selectors {
		p.Selectors = selectorsToProto(e.Selectors)
	}
	if mask.X509SvidTtl {
		p.X509SvidTtl = int32(e.X509TTL / time.Second)
	}
	if mask.JwtSvidTtl {
		p.JwtSvidTtl = int32(e.JWTTTL / time.Second)
	}
	if mask.FederatesWith {
		p.FederatesWith = e.FederatesWith
	}
	if mask.Admin {
		p.Admin = e.Admin
	}
	if mask.Downstream {
		p.Downstream = e.Downstream
	}
	if mask.ExpiresAt {
		p.ExpiresAt = unixOrZero(e.ExpiresAt)
	}
	if mask.DnsNames {
		p.DnsNames = e.DNSNames
	}
	if mask.RevisionNumber {
		p.RevisionNumber = e.Revision
	}
	if mask.StoreSvid {
		p.StoreSvid = e.StoreSVID
	}
	if mask.Hint {
		p.Hint = e.Hint
	}
	if mask.CreatedAt {
		p.CreatedAt = e.CreatedAt.Unix()
	}
	return p
}

// setEntry sets the fields of e that mask names from p, checked, and then
// checks what only the whole entry can show.
func (s *Server) setEntry(e *store.Entry, p *types.Entry, mask *types.EntryMask) error {
	if mask == nil {
		mask = allFields
	}
	if mask.SpiffeId {
		id, err := s.memberID(p.SpiffeId)
		if err != nil {
			return badEntry("SPIFFE ID: %w", err)
		}
		if svid.Reserved(id) {
			return badEntry("SPIFFE ID %q: paths below /spire/ are reserved", id)
		}
		e.SPIFFEID = id.String()
	}
	if mask.ParentId {
		id, err := s.memberID(p.ParentId)
		if err != nil {
			return badEntry("parent ID: %w", err)
		}
		e.ParentID = id.String()
	}
	if mask.Selectors {
		sel, err := selectorsFromProto(p.Selectors)
		if err != nil {
			return badEntry("%w", err)
		}
		e.Selectors = sel
	}
	if mask.X509SvidTtl {
		if p.X509SvidTtl < 0 {
			return badEntry("X.509-SVID TTL is negative")
		}
		e.X509TTL = time.Duration(p.X509SvidTtl) * time.Second
		if most := svid.MaxTTL(s.cfg.AuthorityTTL); e.X509TTL > most {
			return badEntry("X.509-SVID TTL of %v is over %v, a sixth of an authority's life", e.X509TTL, most)
		}
	}
	if mask.JwtSvidTtl {
		if p.JwtSvidTtl < 0 {
			return badEntry("JWT-SVID TTL is negative")
		}
		e.JWTTTL = time.Duration(p.JwtSvidTtl) * time.Second
	}
	if mask.FederatesWith {
		federates, err := s.federates(p.FederatesWith)
		if err != nil {
			return badEntry("invalid federated trust domain: %w", err)
		}
		e.FederatesWith = federates
	}
	if mask.Admin {
		e.Admin = p.Admin
	}
	if mask.Downstream && p.Downstream {
		return badEntry("this server signs no downstream authorities; run the plugins on a SPIRE deployment for that")
	}
	if mask.ExpiresAt {
		if p.ExpiresAt < 0 {
			return badEntry("expiry is negative")
		}
		e.ExpiresAt = time.Time{}
		if p.ExpiresAt > 0 {
			e.ExpiresAt = time.Unix(p.ExpiresAt, 0).UTC()
		}
	}
	if mask.DnsNames {
		if n := len(p.DnsNames); n > svid.MaxDNSNames {
			return badEntry("%d DNS names, at most %d allowed", n, svid.MaxDNSNames)
		}
		for _, n := range p.DnsNames {
			if err := svid.CheckDNSName(n); err != nil {
				return badEntry("%w", err)
			}
		}
		e.DNSNames = p.DnsNames
	}
	if mask.StoreSvid {
		e.StoreSVID = p.StoreSvid
	}
	if mask.Hint {
		if len(p.Hint) > maxHint {
			return badEntry("hint of %d bytes, at most %d allowed", len(p.Hint), maxHint)
		}
		e.Hint = p.Hint
	}
	return s.checkEntry(e)
}

// maxFederates bounds the trust domains that one entry federates with.
const maxFederates = 100

// federates reads the trust domains that an entry federates with, each named or
// written as an ID, and returns their names, sorted and each once.
func (s *Server) federates(in []string) ([]string, error) {
	out, err := trustDomains(in)
	if err == nil && slices.Contains(out, s.cfg.td.Name()) {
		return nil, fmt.Errorf("%q is this trust domain itself", s.cfg.td.Name())
	}
	return out, err
}

func trustDomains(in []string) ([]string, error) {
	if len(in) > maxFederates {
		return nil, fmt.Errorf("%d trust domains, at most %d allowed", len(in), maxFederates)
	}
	var out []string
	for _, name := range in {
		td, err := bundles.TrustDomain(name)
		if err != nil {
			return nil, err
		}
		out = append(out, td.Name())
	}
	slices.Sort(out)
	return slices.Compact(out), nil
}

// checkEntry holds what several fields say against each other.
func (s *Server) checkEntry(e *store.Entry) error {
	if e.SPIFFEID == "" || e.ParentID == "" {
		return badEntry("SPIFFE ID and parent ID are both needed")
	}
	if e.SPIFFEID == e.ParentID {
		return badEntry("an entry cannot be its own parent")
	}
	if e.StoreSVID {
		for _, sel := range e.Selectors {
			if sel.Type != e.Selectors[0].Type {
				return badEntry("selectors of an entry whose SVID is stored are all of one type")
			}
		}
	}
	if tool, recorder := stepSelectors(e); tool != recorder {
		// With a tool alone anyone could record it, with a recorder alone it
		// could record anything: no agent and no server would ever issue.
		have, lack := "binary:tool", "binary:recorder (or binary:recorder_unprotected)"
		if recorder {
			have, lack = lack, have
		}
		return badEntry("it has a selector %s but none %s: a recorded step needs both", have, lack)
	}
	return nil
}

// stepSelectors reports whether e demands a tool and whether it demands a
// recorder, protected or not.
func stepSelectors(e *store.Entry) (tool, recorder bool) {
	for _, sel := range e.Selectors {
		if sel.Type != "binary" {
			continue
		}
		switch {
		case strings.HasPrefix(sel.Value, "tool:"):
			tool = true
		case strings.HasPrefix(sel.Value, "recorder:"), strings.HasPrefix(sel.Value, "recorder_unprotected:"):
			recorder = true
		}
	}
	return tool, recorder
}

// isStep reports whether e is for recorded steps: issuable with an issuer's
// evidence only.
func isStep(e *store.Entry) bool {
	tool, recorder := stepSelectors(e)
	return tool || recorder
}

// memberID returns an ID of this trust domain that has a path.
func (s *Server) memberID(p *types.SPIFFEID) (spiffeid.ID, error) {
	if p == nil {
		return spiffeid.ID{}, errors.New("is missing")
	}
	// First, so that no error repeats megabytes.
	if n := len("spiffe://") + len(p.TrustDomain) + len(p.Path); n > attest.MaxName {
		return spiffeid.ID{}, fmt.Errorf("is %d bytes long, a SPIFFE ID has at most %d", n, attest.MaxName)
	}
	td, err := spiffeid.TrustDomainFromString(p.TrustDomain)
	if err != nil {
		return spiffeid.ID{}, err
	}
	path := p.Path
	if path != "" && path[0] != '/' {
		path = "/" + path // allowed by the API, "SHOULD have a leading slash"
	}
	id, err := spiffeid.FromPath(td, path)
	if err != nil {
		return spiffeid.ID{}, err
	}
	if td != s.cfg.td {
		return spiffeid.ID{}, fmt.Errorf("%q is not in trust domain %q", id, s.cfg.td.Name())
	}
	if path == "" {
		return spiffeid.ID{}, fmt.Errorf("%q has no path", id)
	}
	if n := len(id.String()); n > attest.MaxName {
		return spiffeid.ID{}, fmt.Errorf("is %d bytes long, a SPIFFE ID has at most %d", n, attest.MaxName)
	}
	return id, nil
}

// binaryDigest are the forms of the selectors that hold an executable's hash.
// One that is mistyped would never match, in silence.
var (
	binaryDigest     = regexp.MustCompile(`^((tool|recorder|recorder_unprotected|parent):)?sha256:`)
	binaryDigestFull = regexp.MustCompile(`^((tool|recorder|recorder_unprotected|parent):)?sha256:[0-9a-f]{64}$`)
	binaryRole       = regexp.MustCompile(`^(tool|recorder|recorder_unprotected|parent):`)
)

func selectorsFromProto(in []*types.Selector) ([]store.Selector, error) {
	if len(in) == 0 {
		return nil, errors.New("selector list is empty")
	}
	if len(in) > attest.MaxSelectors {
		return nil, fmt.Errorf("%d selectors, at most %d allowed", len(in), attest.MaxSelectors)
	}
	out := make([]store.Selector, 0, len(in))
	for _, p := range in {
		s := store.Selector{Type: p.GetType(), Value: p.GetValue()}
		switch {
		case s.Type == "" || s.Value == "":
			return nil, errors.New("selector without type or value")
		case len(s.Type)+1+len(s.Value) > attest.MaxSelector:
			return nil, fmt.Errorf("selector of %d bytes, at most %d allowed", len(s.Type)+1+len(s.Value), attest.MaxSelector)
		case strings.Contains(s.Type, ":"):
			return nil, fmt.Errorf("selector type %q contains ':'", s.Type)
		case strings.ContainsFunc(s.Type+s.Value, func(r rune) bool { return r < ' ' || r == 0x7f || r == '\ufffd' }):
			return nil, fmt.Errorf("selector %q contains control characters or is not UTF-8", s)
		case s.Type == "binary" && (binaryDigest.MatchString(s.Value) || binaryRole.MatchString(s.Value)) && !binaryDigestFull.MatchString(s.Value):
			return nil, fmt.Errorf("selector %q: the hash is sha256: and 64 lower-case hex digits", s)
		}
		out = append(out, s)
	}
	return store.SortSelectors(out), nil
}

func selectorsToProto(in []store.Selector) []*types.Selector {
	out := make([]*types.Selector, len(in))
	for i, s := range in {
		out[i] = &types.Selector{Type: s.Type, Value: s.Value}
	}
	return out
}

// idToProto splits an ID that was checked when it came in.
func idToProto(id string) *types.SPIFFEID {
	td, path, _ := strings.Cut(strings.TrimPrefix(id, "spiffe://"), "/")
	return &types.SPIFFEID{TrustDomain: td, Path: "/" + path}
}

func unixOrZero(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.Unix()
}
