package admin

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"slices"
	"time"

	rekorv1 "github.com/sigstore/protobuf-specs/gen/pb-go/rekor/v1"

	"github.com/rootlink/rootlink/internal/store"
	"github.com/rootlink/rootlink/pkg/link"
	"github.com/rootlink/rootlink/pkg/timestamp"
	"github.com/rootlink/rootlink/pkg/tlog"
	adminv1 "github.com/rootlink/rootlink/proto/rootlink/admin/v1"
)

// logBackend is a server that keeps a transparency log.
type logBackend interface {
	Logs() []tlog.Log
	LogWitnesses() []tlog.Witness
	CertificateProof(ctx context.Context, sha256 [32]byte) (*rekorv1.TransparencyLogEntry, error)
}

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
		return a, fmt.Errorf("no certificate")
	}
	if a.Start.IsZero() {
		a.Start = a.Chain[0].NotBefore
	}
	a.End = a.Chain[0].NotAfter
	return a, a.Validate()
}

// merge adds more to s.
func (s *Sources) merge(more Sources) error {
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
		same := func(o TSA) bool { return slices.EqualFunc(o.Chain, t.Chain, slices.Equal) }
		s.Timestamps = append(slices.DeleteFunc(s.Timestamps, same), t)
	}
	for _, w := range more.Witnesses {
		same := func(o link.Witness) bool { return o.Key == w.Key }
		s.Witnesses = append(slices.DeleteFunc(s.Witnesses, same), w)
	}
	return nil
}

func (s *Service) sources(ctx context.Context) (out Sources, err error) {
	raw, err := s.store.TrustValue(ctx, store.TrustSources)
	if err != nil || raw == "" {
		return out, err
	}
	return out, json.Unmarshal([]byte(raw), &out)
}

// addRemembered adds the remembered authorities to root, and the rest to f
// where there is one.
func (s *Service) addRemembered(ctx context.Context, root *link.TrustedRoot, f *link.TrustFile) error {
	have, err := s.sources(ctx)
	if err != nil {
		return err
	}
	if f != nil {
		f.Operator = have.Operator
		if have.AuthoritiesNeeded != nil {
			f.Time.AuthoritiesNeeded = *have.AuthoritiesNeeded
		}
		f.Witnesses = append(f.Witnesses, have.Witnesses...)
		return nil
	}
	for _, t := range have.Timestamps {
		a, err := t.authority()
		if err != nil {
			return malformed("timestamp authority: %w", err)
		}
		root.Timestamps = append(root.Timestamps, a)
	}
	return nil
}

// addSources remembers what the request adds and puts into f what is known of
// time and logs.
func (s *Service) addSources(ctx context.Context, req *adminv1.ExportTrustRequest, f *link.TrustFile, root *link.TrustedRoot) error {
	if len(req.SourcesJson) > 0 || req.ResetSources {
		var have, more Sources
		if len(req.SourcesJson) > 0 {
			if err := json.Unmarshal(req.SourcesJson, &more); err != nil {
				return malformed("time sources: %w", err)
			}
		}
		if !req.ResetSources {
			var err error
			if have, err = s.sources(ctx); err != nil {
				return err
			}
		}
		if err := have.merge(more); err != nil {
			return err
		}
		// Tried whole before it is kept: what makes no trust.json must not stop
		// every later export.
		trial := link.TrustFile{Witnesses: have.Witnesses}
		if have.AuthoritiesNeeded != nil {
			trial.Time.AuthoritiesNeeded = *have.AuthoritiesNeeded
		}
		if err := trial.CheckSources(); err != nil {
			return malformed("%w", err)
		}
		raw, err := json.Marshal(have)
		if err != nil {
			return err
		}
		if err := s.store.SetTrustValue(ctx, store.TrustSources, string(raw)); err != nil {
			return err
		}
		if *root, err = s.trustedRoot(ctx); err != nil {
			return err
		}
	}
	if err := s.addRemembered(ctx, nil, f); err != nil {
		return err
	}
	// The server's own log and timestamp authority are run by whoever runs it.
	own := f.Operator
	if own == "" {
		own = f.TrustDomain
	}
	for i := range root.Logs {
		if root.Logs[i].Operator == "" || root.Logs[i].Operator == f.TrustDomain {
			root.Logs[i].Operator = own
		}
	}
	for i := range root.Timestamps {
		if root.Timestamps[i].Operator == f.TrustDomain {
			root.Timestamps[i].Operator = own
		}
	}
	l, ok := s.b.(logBackend)
	if !ok || len(root.Logs) == 0 {
		return nil
	}
	for _, w := range l.LogWitnesses() {
		if !slices.ContainsFunc(f.Witnesses, func(o link.Witness) bool { return o.Key == w.Key }) {
			f.Witnesses = append(f.Witnesses, link.Witness{Name: w.Name, Key: w.Key, Operator: w.Operator, ValidFrom: w.Start, ValidUntil: w.End})
		}
	}
	certs := slices.Clone(s.b.AttestationCAs())
	for _, a := range root.Authorities {
		certs = append(certs, a.Certificate)
	}
	for _, c := range certs {
		e, err := l.CertificateProof(ctx, sha256.Sum256(c.Raw))
		if err != nil {
			continue // not logged: a requirement that wants it says so
		}
		raw, err := tlog.MarshalEntry(e)
		if err != nil {
			return err
		}
		f.LogProofs = append(f.LogProofs, raw)
	}
	return nil
}
