// Package trustdoc composes and signs trust.json from what its callers know of
// a trust domain: a rootlink-server from its database, the keeper of a stock
// SPIRE server from its archive and the operator's files.
package trustdoc

import (
	"bytes"
	"crypto"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/rootlink/rootlink/pkg/attest"
	"github.com/rootlink/rootlink/pkg/link"
)

// DefaultLifetime is how long a trust.json may be used: long enough for a
// release to be checked, short enough that revocations reach people.
const DefaultLifetime = 90 * 24 * time.Hour

// MaxLifetime is the longest that may be asked for.
const MaxLifetime = 10 * 365 * 24 * time.Hour

// Errors that callers branch on.
var (
	// ErrMalformed: something that was given cannot go into a trust.json.
	ErrMalformed = errors.New("malformed")
	// ErrNothing: what is known makes no trust.json.
	ErrNothing = errors.New("nothing to trust")
)

func malformed(format string, args ...any) error {
	return fmt.Errorf("%w: %w", ErrMalformed, fmt.Errorf(format, args...))
}

// New begins a file that may be used from now on, for lifetime or by default
// DefaultLifetime.
func New(trustDomain string, now time.Time, lifetime time.Duration) (link.TrustFile, error) {
	if lifetime < 0 || lifetime > MaxLifetime {
		return link.TrustFile{}, malformed("a lifetime of %v", lifetime)
	}
	if lifetime == 0 {
		lifetime = DefaultLifetime
	}
	now = now.UTC().Truncate(time.Second)
	return link.TrustFile{
		Issued: now, Expires: now.Add(lifetime), TrustDomain: trustDomain,
		Requirements: []link.Requirement{}, // an empty list is written out: it allows nobody
	}, nil
}

// AddAttestationCAs says whose word about TPMs is taken.
func AddAttestationCAs(f *link.TrustFile, cas []*x509.Certificate) {
	for _, ca := range cas {
		f.AttestationCAs = append(f.AttestationCAs, link.AttestationCA{Certificate: ca.Raw})
	}
}

// AddEKs says which TPMs are genuine, and which were thrown out.
func AddEKs(f *link.TrustFile, ek attest.EKRoots) error {
	for _, c := range ek.Roots {
		f.EK.Roots = append(f.EK.Roots, c.Raw)
	}
	for _, c := range ek.Intermediates {
		f.EK.Intermediates = append(f.EK.Intermediates, c.Raw)
	}
	f.EK.Allow, f.EK.Deny = hashes(ek.Allow), hashes(ek.Deny)
	if len(f.EK.Roots)+len(f.EK.Allow) == 0 {
		return fmt.Errorf("%w: neither EK roots nor an EK allow-list, so no TPM can be genuine", ErrNothing)
	}
	return nil
}

// PolicyRevision is one revision of a PCR policy, and its time as the current one.
type PolicyRevision struct {
	Policy  attest.PCRPolicy
	Created time.Time
	Deleted time.Time // zero: not
}

// AddPolicies adds every revision there ever was, with the time it ended:
// evidence names the one it was issued under. The list is by name, oldest first.
func AddPolicies(f *link.TrustFile, list []PolicyRevision) {
	for i, p := range list {
		// A deleted one ended then, whatever took its name later.
		replaced := p.Deleted
		if replaced.IsZero() && i+1 < len(list) && list[i+1].Policy.Name == p.Policy.Name {
			replaced = list[i+1].Created
		}
		f.PCRPolicies = append(f.PCRPolicies, link.PCRPolicy{PCRPolicy: p.Policy, Replaced: replaced})
	}
}

// AddLayoutKey lets a key sign layouts.
func AddLayoutKey(f *link.TrustFile, name string, spki []byte) error {
	if _, err := x509.ParsePKIXPublicKey(spki); err != nil {
		return malformed("layout key %q: %w", name, err)
	}
	f.LayoutKeys = append(f.LayoutKeys, link.LayoutKey{Name: name, Key: spki})
	return nil
}

// AddRevocations adds those of a revocation file, signed or not: the caller
// vouches for where it came from.
func AddRevocations(f *link.TrustFile, raw []byte) error {
	if len(raw) == 0 {
		return nil
	}
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

// Seal writes f, whose serial and predecessor are set, as a document, and signs
// it: signed is nil without signers, for whoever keeps the keys elsewhere. All
// keys are named in the file.
func Seal(f *link.TrustFile, keys []crypto.PublicKey, signers []crypto.Signer) (document, signed []byte, err error) {
	f.TrustKeys = nil
	for _, k := range keys {
		der, err := x509.MarshalPKIXPublicKey(k)
		if err != nil {
			return nil, nil, err
		}
		f.TrustKeys = append(f.TrustKeys, link.TrustKey{Key: der})
	}
	if document, err = f.Marshal(); err != nil {
		return nil, nil, err
	}
	if len(signers) == 0 {
		return document, nil, nil
	}
	signed, err = link.SignTrust(document, signers...)
	return document, signed, err
}

// Sigstore is the part of a trust.json that Sigstore's tools read.
func Sigstore(r link.TrustedRoot) ([]byte, error) {
	root, err := r.Sigstore()
	if err != nil {
		return nil, err
	}
	var b bytes.Buffer
	if err := json.Indent(&b, root, "", "  "); err != nil {
		return nil, err
	}
	b.WriteByte('\n')
	return b.Bytes(), nil
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
