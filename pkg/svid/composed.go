package svid

import (
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	"github.com/rootlink/rootlink/pkg/strictjson"
)

// Limits on what a deployment adds to SVIDs. All of an SVID is to fit into the
// pages that agents fetch.
const (
	MaxComposedExtensions = 16
	MaxComposed           = 4 << 10 // bytes of subject and extensions, and of claims
)

// Composed is what a deployment adds to an X509-SVID beside DNS names: whatever
// its own peers read, and nothing that decides what the SVID is.
type Composed struct {
	Subject    pkix.Name
	Extensions []pkix.Extension
}

// reservedExtensions are arcs whose extensions say what a certificate may do,
// for how long or for whom, or are ours; but for those of allowedExtensions.
func reservedExtensions() []asn1.ObjectIdentifier {
	return []asn1.ObjectIdentifier{
		{2, 5, 29},                // X.509's own: names, key usage, constraints, key identifiers
		{1, 3, 6, 1, 5, 5, 7},     // PKIX: id-pe-cmw, which holds evidence, and delegation
		{1, 3, 6, 1, 4, 1, 311},   // Microsoft: application policies are key usages by another name
		{1, 3, 6, 1, 4, 1, 57264}, // Sigstore: whose build a certificate speaks for
		{1, 3, 6, 1, 4, 1, 11129}, // certificate transparency
		{2, 16, 840, 1, 113730},   // Netscape: certificate type, which OpenSSL still heeds
		{2, 23, 133},              // TCG: what attestation keys are told by
	}
}

func allowedExtensions() []asn1.ObjectIdentifier {
	return []asn1.ObjectIdentifier{
		{2, 5, 29, 31},               // CRL distribution points
		{2, 5, 29, 32},               // certificate policies
		{1, 3, 6, 1, 5, 5, 7, 1, 1},  // authority information access
		{1, 3, 6, 1, 5, 5, 7, 1, 24}, // TLS features
	}
}

// Check fails on what must not be added: it is refused here for every way that
// it could come.
func (c *Composed) Check() error {
	subject, err := asn1.Marshal(c.Subject.ToRDNSequence())
	if err != nil {
		return fmt.Errorf("%w: subject: %w", ErrRequest, err)
	}
	size := len(subject)
	if n := len(c.Extensions); n > MaxComposedExtensions {
		return fmt.Errorf("%w: %d extensions added, at most %d allowed", ErrRequest, n, MaxComposedExtensions)
	}
	for i, e := range c.Extensions {
		in := func(arc asn1.ObjectIdentifier) bool { return len(e.Id) >= len(arc) && arc.Equal(e.Id[:len(arc)]) }
		switch {
		case len(e.Id) < 3:
			return fmt.Errorf("%w: extension %v", ErrRequest, e.Id)
		case slices.ContainsFunc(reservedExtensions(), in) && !slices.ContainsFunc(allowedExtensions(), e.Id.Equal):
			return fmt.Errorf("%w: extension %v is not to be added", ErrRequest, e.Id)
		case e.Critical:
			// Whoever does not know it has to refuse the SVID; our own verifier too.
			return fmt.Errorf("%w: extension %v is critical", ErrRequest, e.Id)
		case slices.ContainsFunc(c.Extensions[:i], func(o pkix.Extension) bool { return o.Id.Equal(e.Id) }):
			return fmt.Errorf("%w: extension %v is added twice", ErrRequest, e.Id)
		}
		if _, err := asn1.Marshal(e.Id); err != nil {
			return fmt.Errorf("%w: extension %v: %w", ErrRequest, e.Id, err)
		}
		size += len(e.Value) + 32
	}
	if size > MaxComposed {
		return fmt.Errorf("%w: %d bytes of subject and extensions added, at most %d allowed", ErrRequest, size, MaxComposed)
	}
	return nil
}

// checkComposed: an SVID with leaf evidence is as the profile of docs/evidence.md
// has it and nothing beside, so that nothing but evidence decides what it is
// taken for.
func checkComposed(r *Request) error {
	if r.Composed == nil {
		return nil
	}
	if r.Profile == Issuer || r.Evidence != nil {
		return fmt.Errorf("%w: nothing is added to SVIDs with evidence about their key", ErrRequest)
	}
	return r.Composed.Check()
}

// RegisteredClaim reports whether a claim's name is one that RFC 7519, 4.1, gives
// a meaning, or confirmation (RFC 7800), which binds a token to a key. Case does
// not count: a parser that ignores it would take Sub for sub.
func RegisteredClaim(name string) bool {
	return slices.Contains([]string{"iss", "sub", "aud", "exp", "nbf", "iat", "jti", "cnf"}, strings.ToLower(name))
}

// CheckClaims fails on claims that must not be added to a JWT-SVID.
func CheckClaims(extra map[string]any) error {
	for name := range extra {
		if name == "" || RegisteredClaim(name) {
			return fmt.Errorf("%w: claim %q is not to be added", ErrRequest, name)
		}
	}
	b, err := json.Marshal(extra)
	if err != nil {
		return fmt.Errorf("%w: claims: %w", ErrRequest, err)
	}
	if err := strictjson.Scan(b, MaxComposed, ""); err != nil {
		return fmt.Errorf("%w: claims: %w", ErrRequest, err)
	}
	return nil
}
