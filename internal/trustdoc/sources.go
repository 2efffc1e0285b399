package trustdoc

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"slices"
	"strings"
	"time"

	"github.com/rootlink/rootlink/pkg/link"
	"github.com/rootlink/rootlink/pkg/timestamp"
)

// Sources are time sources that the operator trusts besides the server's own.
// They are remembered: an export that left one out would take its tokens from
// links that were verified before.
type Sources struct {
	Operator          string         `json:"operator,omitempty"`
	AuthoritiesNeeded *int           `json:"authorities_needed,omitempty"`
	Timestamps        []TSA          `json:"timestamp_authorities,omitempty"`
	Witnesses         []link.Witness `json:"witnesses,omitempty"`
}

// TSA is a timestamp authority.
type TSA struct {
	Chain    [][]byte  `json:"chain"` // DER; root last
	Operator string    `json:"operator,omitempty"`
	URI      string    `json:"uri,omitempty"`
	From     time.Time `json:"from,omitzero"` // zero: as long as its first certificate is valid
}

// authority is t for a trusted root.
func (t TSA) authority() (a timestamp.Authority, err error) {
	a = timestamp.Authority{URI: t.URI, Operator: t.Operator, Start: t.From}
	for _, der := range t.Chain {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return a, err
		}
		a.Chain = append(a.Chain, c)
	}
	if len(a.Chain) == 0 {
		return a, errors.New("no certificate")
	}
	if a.Start.IsZero() {
		a.Start = a.Chain[0].NotBefore
	}
	a.End = a.Chain[0].NotAfter
	return a, a.Validate()
}

// Same says whether t and o are one authority, whatever is said of it.
func (t TSA) Same(o TSA) bool { return slices.EqualFunc(t.Chain, o.Chain, slices.Equal) }

// Merge adds more to s. What it says of an authority or a witness that is known
// takes the place of what was said before.
func (s *Sources) Merge(more Sources) error {
	if more.Operator != "" {
		s.Operator = more.Operator
	}
	if more.AuthoritiesNeeded != nil {
		s.AuthoritiesNeeded = more.AuthoritiesNeeded
	}
	for _, t := range more.Timestamps {
		if _, err := t.authority(); err != nil {
			return malformed("timestamp authority: %w", err)
		}
		s.Timestamps = append(slices.DeleteFunc(s.Timestamps, t.Same), t)
	}
	for _, w := range more.Witnesses {
		same := func(o link.Witness) bool { return o.Key == w.Key }
		s.Witnesses = append(slices.DeleteFunc(s.Witnesses, same), w)
	}
	return nil
}

// AddTo puts into f what is no part of its trusted root.
func (s Sources) AddTo(f *link.TrustFile) {
	f.Operator = s.Operator
	if s.AuthoritiesNeeded != nil {
		f.Time.AuthoritiesNeeded = *s.AuthoritiesNeeded
	}
	f.Witnesses = append(f.Witnesses, s.Witnesses...)
}

// Authorities are the timestamp authorities, for a trusted root.
func (s Sources) Authorities() (out []timestamp.Authority, err error) {
	for _, t := range s.Timestamps {
		a, err := t.authority()
		if err != nil {
			return nil, malformed("timestamp authority: %w", err)
		}
		out = append(out, a)
	}
	return out, nil
}

// Chains reads the certificates of a timestamp authority, in whatever order
// its operator writes them, and returns a chain with the root last for each one
// that signs: an authority changes its signing key and keeps its root.
func Chains(text []byte) ([][][]byte, error) {
	var all []*x509.Certificate
	for {
		var block *pem.Block
		if block, text = pem.Decode(text); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			continue
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, err
		}
		if !slices.ContainsFunc(all, c.Equal) {
			all = append(all, c)
		}
	}
	if len(all) == 0 {
		return nil, errors.New("it holds no certificate")
	}
	issuer := func(c *x509.Certificate) *x509.Certificate {
		for _, ca := range all {
			if ca != c && bytes.Equal(ca.RawSubject, c.RawIssuer) && c.CheckSignatureFrom(ca) == nil {
				return ca
			}
		}
		return nil
	}
	inner := map[*x509.Certificate]bool{} // those that issued another one
	for _, c := range all {
		if ca := issuer(c); ca != nil {
			inner[ca] = true
		}
	}
	var out [][][]byte
	for _, c := range all {
		if inner[c] {
			continue
		}
		var chain [][]byte
		for at := c; at != nil; at = issuer(at) {
			if chain = append(chain, at.Raw); len(chain) > len(all) {
				return nil, errors.New("its certificates issue each other")
			}
		}
		out = append(out, chain)
	}
	if len(out) == 0 {
		return nil, errors.New("its certificates issue each other")
	}
	return out, nil
}

// FileOptions splits FILE,name=value,….
func FileOptions(arg string, known ...string) (path string, out map[string]string, err error) {
	parts := strings.Split(arg, ",")
	out = map[string]string{}
	for _, p := range parts[1:] {
		name, value, _ := strings.Cut(p, "=")
		if value == "" || !slices.Contains(known, name) {
			return "", nil, malformed("unknown %q", p)
		}
		out[name] = value
	}
	return parts[0], out, nil
}
