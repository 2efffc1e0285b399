package link

import (
	"crypto/ed25519"
	"crypto/x509"
	"errors"
	"net/url"
	"time"

	commonv1 "github.com/sigstore/protobuf-specs/gen/pb-go/common/v1"
	trustrootv1 "github.com/sigstore/protobuf-specs/gen/pb-go/trustroot/v1"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/rootlink/rootlink/pkg/timestamp"
	"github.com/rootlink/rootlink/pkg/tlog"
)

// The timestamp authorities, logs and witnesses of trust.json.

// TimePolicy is how much attested time a link needs.
type TimePolicy struct {
	// AuthoritiesNeeded is how many distinct authorities (timestamp authorities
	// and witnesses) must attest when a link was signed. 0: a link without any
	// is judged at the verifier's own clock.
	AuthoritiesNeeded int `json:"authorities_needed,omitempty"`
}

// Witness cosigns the checkpoints of logs, with the time.
type Witness struct {
	Name       string    `json:"name"`
	Key        string    `json:"key"` // C2SP verifier key, cosignature/v1
	Operator   string    `json:"operator,omitempty"`
	ValidFrom  time.Time `json:"valid_from,omitzero"`  // zero: always
	ValidUntil time.Time `json:"valid_until,omitzero"` // zero: open
}

func (w Witness) info() tlog.Witness {
	return tlog.Witness{Name: w.Name, Key: w.Key, Operator: w.Operator, Start: w.ValidFrom, End: w.ValidUntil}
}

// CheckSources checks the parts of f that say when links were signed, alone.
func (f TrustFile) CheckSources() error { return (&Trust{file: f}).readTime() }

func (t *Trust) readTime() error {
	f := t.file
	if n := f.Time.AuthoritiesNeeded; n < 0 || n > MaxTokens {
		return malformed("time.authorities_needed is %d, 0 to %d allowed", n, MaxTokens)
	}
	// Who signs SVIDs would else also say when they were used: one that ran out
	// would verify for whoever has that key.
	signers := t.svidSigners()
	for i := range t.root.Timestamps {
		for _, c := range t.root.Timestamps[i].Chain {
			if signers[spkiHash(c)] {
				return malformed("timestamp authority %d has the key of an SVID authority", i)
			}
		}
	}
	if len(f.Witnesses) > tlog.MaxWitnesses {
		return malformed("%d witnesses, at most %d allowed", len(f.Witnesses), tlog.MaxWitnesses)
	}
	for _, w := range f.Witnesses {
		info := w.info()
		if err := info.Check(); err != nil {
			return malformed("%w", err)
		}
		if !w.ValidUntil.IsZero() && w.ValidUntil.Before(w.ValidFrom) {
			return malformed("witness %q: its window ends before it starts", w.Name)
		}
		t.witnesses = append(t.witnesses, info)
	}
	if len(f.LogProofs) > 2*MaxAuthorities {
		return malformed("%d log_proofs, at most %d allowed", len(f.LogProofs), 2*MaxAuthorities)
	}
	for i, raw := range f.LogProofs {
		e, err := tlog.ParseEntry(raw)
		if err != nil {
			return malformed("log_proofs %d: %w", i, err)
		}
		t.logProofs = append(t.logProofs, e)
	}
	return nil
}

// Operator is who runs the trust domain.
func (t *Trust) Operator() string {
	if t.file.Operator != "" {
		return t.file.Operator
	}
	return t.td.Name()
}

// TrustedRoot returns the authorities, timestamp authorities and logs.
func (t *Trust) TrustedRoot() TrustedRoot { return t.root }

func timeRange(start, end time.Time) *commonv1.TimeRange {
	r := &commonv1.TimeRange{Start: timestamppb.New(start)}
	if !end.IsZero() {
		r.End = timestamppb.New(end)
	}
	return r
}

func readRange(r *commonv1.TimeRange) (start, end time.Time, err error) {
	if r.GetStart() == nil || r.GetStart().CheckValid() != nil {
		return start, end, errors.New("no window")
	}
	if r.GetEnd() != nil {
		if err := r.GetEnd().CheckValid(); err != nil {
			return start, end, err
		}
		end = r.GetEnd().AsTime()
	}
	return r.GetStart().AsTime(), end, nil
}

// addSources writes the timestamp authorities and logs.
func (r TrustedRoot) addSources(root *trustrootv1.TrustedRoot) error {
	for i := range r.Timestamps {
		a := &r.Timestamps[i]
		if err := a.Validate(); err != nil {
			return malformed("timestamp authority %d: %w", i, err)
		}
		chain := &commonv1.X509CertificateChain{}
		for _, c := range a.Chain {
			chain.Certificates = append(chain.Certificates, &commonv1.X509Certificate{RawBytes: c.Raw})
		}
		top := a.Chain[len(a.Chain)-1].Subject
		name := &commonv1.DistinguishedName{CommonName: top.CommonName}
		if len(top.Organization) > 0 {
			name.Organization = top.Organization[0]
		}
		root.TimestampAuthorities = append(root.TimestampAuthorities, &trustrootv1.CertificateAuthority{
			Subject: name, Uri: a.URI, CertChain: chain, ValidFor: timeRange(a.Start, a.End), Operator: a.Operator,
		})
		if a.Operator != "" {
			root.MediaType = trustedRootMediaType02
		}
	}
	for _, l := range r.Logs {
		key, ok := l.Key.(ed25519.PublicKey)
		if !ok || l.Start.IsZero() {
			return malformed("log %q needs an Ed25519 key and a window", l.Origin)
		}
		spki, err := x509.MarshalPKIXPublicKey(key)
		if err != nil {
			return malformed("log %q: %w", l.Origin, err)
		}
		if l.Operator != "" {
			root.MediaType = trustedRootMediaType02
		}
		root.Tlogs = append(root.Tlogs, &trustrootv1.TransparencyLogInstance{
			// Sigstore's verifiers take the host name for the origin.
			BaseUrl:       "https://" + l.Origin,
			HashAlgorithm: commonv1.HashAlgorithm_SHA2_256,
			PublicKey: &commonv1.PublicKey{
				RawBytes: spki, KeyDetails: commonv1.PublicKeyDetails_PKIX_ED25519, ValidFor: timeRange(l.Start, l.End),
			},
			LogId:    &commonv1.LogId{KeyId: tlog.LogID(l.Origin, key)},
			Operator: l.Operator,
		})
	}
	return nil
}

func readTimestamps(list []*trustrootv1.CertificateAuthority) ([]timestamp.Authority, error) {
	if len(list) > MaxTimestampAuthorities {
		return nil, malformed("%d timestamp authorities, at most %d allowed", len(list), MaxTimestampAuthorities)
	}
	var out []timestamp.Authority
	for i, pb := range list {
		certs := pb.GetCertChain().GetCertificates()
		if len(certs) > timestamp.MaxChain {
			return nil, malformed("timestamp authority %d: %d certificates, at most %d allowed", i, len(certs), timestamp.MaxChain)
		}
		a := timestamp.Authority{URI: pb.GetUri(), Operator: pb.GetOperator()}
		var err error
		if a.Start, a.End, err = readRange(pb.GetValidFor()); err != nil {
			return nil, malformed("timestamp authority %d: %w", i, err)
		}
		for _, c := range certs {
			cert, err := x509.ParseCertificate(c.GetRawBytes())
			if err != nil {
				return nil, malformed("timestamp authority %d: %w", i, err)
			}
			a.Chain = append(a.Chain, cert)
		}
		if err := a.Validate(); err != nil {
			return nil, malformed("timestamp authority %d: %w", i, err)
		}
		out = append(out, a)
	}
	return out, nil
}

func readLogs(list []*trustrootv1.TransparencyLogInstance) ([]tlog.Log, error) {
	if len(list) > tlog.MaxLogs {
		return nil, malformed("%d logs, at most %d allowed", len(list), tlog.MaxLogs)
	}
	var out []tlog.Log
	for i, pb := range list {
		if pb.GetPublicKey().GetKeyDetails() != commonv1.PublicKeyDetails_PKIX_ED25519 {
			continue
		}
		pub, err := x509.ParsePKIXPublicKey(pb.GetPublicKey().GetRawBytes())
		key, ok := pub.(ed25519.PublicKey)
		if err != nil || !ok {
			return nil, malformed("log %d: its key is not Ed25519", i)
		}
		u, err := url.Parse(pb.GetBaseUrl())
		if err != nil || u.Hostname() == "" {
			return nil, malformed("log %d: base URL %q", i, pb.GetBaseUrl())
		}
		l := tlog.Log{Origin: u.Hostname(), Key: key, URL: pb.GetBaseUrl(), Operator: pb.GetOperator()}
		id := tlog.LogID(l.Origin, key)
		// Sigstore writes the ID whole or as the first four bytes of it.
		if got := string(pb.GetLogId().GetKeyId()); got != string(id) && got != string(id[:4]) {
			return nil, malformed("log %s: its ID does not belong to its origin and key", l.Origin)
		}
		l.ID = id
		if err := tlog.CheckOrigin(l.Origin); err != nil {
			return nil, malformed("log %d: %w", i, err)
		}
		if l.Start, l.End, err = readRange(pb.GetPublicKey().GetValidFor()); err != nil {
			return nil, malformed("log %s: %w", l.Origin, err)
		}
		out = append(out, l)
	}
	return out, nil
}
