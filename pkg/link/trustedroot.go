package link

import (
	"bytes"
	"crypto/x509"
	"encoding/json"
	"slices"
	"time"

	commonv1 "github.com/sigstore/protobuf-specs/gen/pb-go/common/v1"
	trustrootv1 "github.com/sigstore/protobuf-specs/gen/pb-go/trustroot/v1"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/rootlink/rootlink/pkg/timestamp"
	"github.com/rootlink/rootlink/pkg/tlog"
)

// The first is written, for sigstore-go and so cosign read no other spelling;
// v0.2 only adds log operators.
const (
	trustedRootMediaType   = "application/vnd.dev.sigstore.trustedroot+json;version=0.1"
	trustedRootMediaType01 = "application/vnd.dev.sigstore.trustedroot.v0.1+json"
	trustedRootMediaType02 = "application/vnd.dev.sigstore.trustedroot.v0.2+json"
)

// Authority is an X.509 authority of the trust domain and the window in which
// it signed. The window is inclusive; a zero End leaves it open.
type Authority struct {
	Certificate *x509.Certificate
	Start       time.Time
	End         time.Time
}

// TrustedRoot is what a Sigstore TrustedRoot says to us.
type TrustedRoot struct {
	Authorities []Authority           // of SVIDs
	Timestamps  []timestamp.Authority // RFC 3161
	Logs        []tlog.Log
}

// MarshalTrustedRoot writes authorities alone as a Sigstore TrustedRoot.
func MarshalTrustedRoot(authorities []Authority) (json.RawMessage, error) {
	return TrustedRoot{Authorities: authorities}.Marshal()
}

// Sigstore writes r as v0.1, without operators: what every Sigstore client reads.
func (r TrustedRoot) Sigstore() (json.RawMessage, error) {
	r.Timestamps, r.Logs = slices.Clone(r.Timestamps), slices.Clone(r.Logs)
	for i := range r.Timestamps {
		r.Timestamps[i].Operator = ""
	}
	for i := range r.Logs {
		r.Logs[i].Operator = ""
	}
	return r.Marshal()
}

// Marshal writes r as a Sigstore TrustedRoot, authorities oldest first: the
// trusted_root of trust.json.
func (r TrustedRoot) Marshal() (json.RawMessage, error) {
	as := slices.Clone(r.Authorities)
	slices.SortStableFunc(as, func(a, b Authority) int { return a.Start.Compare(b.Start) })
	root := &trustrootv1.TrustedRoot{MediaType: trustedRootMediaType}
	if err := r.addSources(root); err != nil {
		return nil, err
	}
	for _, a := range as {
		if err := a.validate(); err != nil {
			return nil, err
		}
		window := timeRange(a.Start, a.End)
		name := &commonv1.DistinguishedName{CommonName: a.Certificate.Subject.CommonName}
		if o := a.Certificate.Subject.Organization; len(o) > 0 {
			name.Organization = o[0]
		}
		root.CertificateAuthorities = append(root.CertificateAuthorities, &trustrootv1.CertificateAuthority{
			Subject: name,
			CertChain: &commonv1.X509CertificateChain{
				Certificates: []*commonv1.X509Certificate{{RawBytes: a.Certificate.Raw}},
			},
			ValidFor: window,
		})
	}
	raw, err := protojson.Marshal(root)
	if err != nil {
		return nil, malformed("trusted root: %w", err)
	}
	var out bytes.Buffer
	if err := json.Compact(&out, raw); err != nil {
		return nil, malformed("trusted root: %w", err)
	}
	return out.Bytes(), nil
}

// ParseTrustedRoot reads a Sigstore TrustedRoot. Logs of kinds that are not
// read here, and certificate transparency logs, are left out: nothing that they
// say counts.
func ParseTrustedRoot(raw []byte) (r TrustedRoot, err error) {
	if len(raw) == 0 {
		return r, malformed("no trusted_root")
	}
	var pb trustrootv1.TrustedRoot
	if err := protojson.Unmarshal(raw, &pb); err != nil {
		return r, malformed("trusted_root: %w", err)
	}
	if m := pb.GetMediaType(); m != trustedRootMediaType && m != trustedRootMediaType01 && m != trustedRootMediaType02 {
		return r, malformed("trusted_root media type %q", m)
	}
	if r.Authorities, err = readAuthorities(pb.GetCertificateAuthorities()); err != nil {
		return r, err
	}
	if r.Timestamps, err = readTimestamps(pb.GetTimestampAuthorities()); err != nil {
		return r, err
	}
	r.Logs, err = readLogs(pb.GetTlogs())
	return r, err
}

func readAuthorities(cas []*trustrootv1.CertificateAuthority) ([]Authority, error) {
	if len(cas) == 0 || len(cas) > MaxAuthorities {
		return nil, malformed("%d SVID authorities, 1 to %d allowed", len(cas), MaxAuthorities)
	}
	var out []Authority
	for i, ca := range cas {
		certs := ca.GetCertChain().GetCertificates()
		if len(certs) != 1 {
			return nil, malformed("SVID authority %d has %d certificates, exactly one allowed", i, len(certs))
		}
		cert, err := x509.ParseCertificate(certs[0].GetRawBytes())
		if err != nil {
			return nil, malformed("SVID authority %d: %w", i, err)
		}
		a := Authority{Certificate: cert}
		if a.Start, a.End, err = readRange(ca.GetValidFor()); err != nil {
			return nil, malformed("SVID authority %d: %w", i, err)
		}
		if err := a.validate(); err != nil {
			return nil, err
		}
		out = append(out, a)
	}
	return out, nil
}

func (a Authority) validate() error {
	c := a.Certificate
	switch {
	case c == nil:
		return malformed("SVID authority without a certificate")
	case a.Start.IsZero():
		return malformed("SVID authority %q without a window", c.Subject)
	case !a.End.IsZero() && a.End.Before(a.Start):
		return malformed("SVID authority %q: its window ends before it starts", c.Subject)
	case !c.BasicConstraintsValid || !c.IsCA || c.KeyUsage&x509.KeyUsageCertSign == 0:
		return malformed("SVID authority %q is not a CA", c.Subject)
	case len(c.UnhandledCriticalExtensions) > 0:
		return malformed("SVID authority %q: unknown critical extension %v", c.Subject, c.UnhandledCriticalExtensions[0])
	}
	return nil
}

// holds says whether the authority's window and certificate hold at t.
func (a Authority) holds(t time.Time) bool {
	return !t.Before(a.Start) && (a.End.IsZero() || !t.After(a.End)) &&
		!t.Before(a.Certificate.NotBefore) && !t.After(a.Certificate.NotAfter)
}
