package link

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/url"
)

// Attestation is an in-toto Statement v1 with a predicate of any type: what
// somebody says about artifacts that is not how a step went. The predicate is
// carried byte for byte, white space apart; its meaning is its reader's affair.
type Attestation struct {
	Type      string     // predicate type, an absolute URI
	Subjects  []Resource // at least one, at most MaxSubjects
	Predicate json.RawMessage
}

type wireAttestation struct {
	Type          string          `json:"_type"`
	Subject       []Resource      `json:"subject"`
	PredicateType string          `json:"predicateType"`
	Predicate     json.RawMessage `json:"predicate"`
}

// ValidatePredicateType fails on what is not an absolute URI in the one
// spelling that can be compared byte for byte.
func ValidatePredicateType(uri string) error {
	if uri == "" || len(uri) > MaxTypeURI {
		return malformed("predicate type of %d bytes, 1 to %d allowed", len(uri), MaxTypeURI)
	}
	for _, c := range []byte(uri) {
		if c <= ' ' || c >= 0x7f {
			return malformed("predicate type %q is not a URI", uri)
		}
	}
	u, err := url.Parse(uri)
	if err != nil || !u.IsAbs() || u.Opaque == "" && u.Host == "" {
		return malformed("predicate type %q is not an absolute URI", uri)
	}
	return nil
}

// Validate fails on what Marshal would refuse to write and ParseAttestation to
// read.
func (a *Attestation) Validate() error {
	if err := ValidatePredicateType(a.Type); err != nil {
		return err
	}
	switch n := len(a.Subjects); {
	case n == 0:
		return malformed("no subject: a statement about nothing")
	case n > MaxSubjects:
		return malformed("%d subjects, at most %d allowed", n, MaxSubjects)
	}
	if err := validateResources("subject", a.Subjects); err != nil {
		return err
	}
	// Duplicate keys could show one predicate to us and another to its reader.
	if err := scanJSON(a.Predicate, MaxStatement); err != nil {
		return fmt.Errorf("predicate: %w", err)
	}
	if p := bytes.TrimSpace(a.Predicate); len(p) == 0 || p[0] != '{' {
		return malformed("the predicate is not a JSON object")
	}
	return nil
}

// Marshal encodes a. Subjects are sorted by name.
func (a *Attestation) Marshal() ([]byte, error) {
	if err := a.Validate(); err != nil {
		return nil, err
	}
	b, err := encode(wireAttestation{Type: StatementType, Subject: sortedByName(a.Subjects), PredicateType: a.Type, Predicate: a.Predicate})
	if err != nil {
		return nil, malformed("%w", err)
	}
	// Once more as it will be read: inside the statement the predicate is
	// nested one deeper.
	if err := scanJSON(b, MaxStatement); err != nil {
		return nil, err
	}
	return b, nil
}

// ParseAttestation decodes a statement with a predicate of any type, a link's
// among them. Unknown keys outside of the predicate, and duplicate keys
// anywhere, are errors.
func ParseAttestation(b []byte) (*Attestation, error) {
	var w wireAttestation
	if err := decodeStrict(b, MaxStatement, "", &w); err != nil {
		return nil, fmt.Errorf("statement: %w", err)
	}
	if w.Type != StatementType {
		return nil, malformed("statement type %q, want %q", w.Type, StatementType)
	}
	a := &Attestation{Type: w.PredicateType, Subjects: w.Subject, Predicate: w.Predicate}
	return a, a.Validate()
}

// PrepareAttestation encodes a for signing. One that claims to be a link must
// be one.
func PrepareAttestation(a *Attestation) (*Prepared, error) {
	b, err := a.Marshal()
	if err != nil {
		return nil, err
	}
	if a.Type == PredicateType {
		if _, err := ParseStatement(b); err != nil {
			return nil, err
		}
	}
	return &Prepared{payload: b, digest: PayloadDigest(b)}, nil
}

// UnverifiedAttestation decodes the statement, of whatever predicate type, as
// the bundle claims it.
func (b *Bundle) UnverifiedAttestation() (*Attestation, error) { return ParseAttestation(b.payload) }
