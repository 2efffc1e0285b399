package admin

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"slices"

	rekorv1 "github.com/sigstore/protobuf-specs/gen/pb-go/rekor/v1"

	"github.com/rootlink/rootlink/internal/store"
	"github.com/rootlink/rootlink/internal/trustdoc"
	"github.com/rootlink/rootlink/pkg/link"
	"github.com/rootlink/rootlink/pkg/tlog"
	adminv1 "github.com/rootlink/rootlink/proto/rootlink/admin/v1"
)

// logBackend is a server that keeps a transparency log.
type logBackend interface {
	Logs() []tlog.Log
	LogWitnesses() []tlog.Witness
	CertificateProof(ctx context.Context, sha256 [32]byte) (*rekorv1.TransparencyLogEntry, error)
}

func (s *Service) sources(ctx context.Context) (out trustdoc.Sources, err error) {
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
		have.AddTo(f)
		return nil
	}
	as, err := have.Authorities()
	root.Timestamps = append(root.Timestamps, as...)
	return err
}

// addSources remembers what the request adds and puts into f what is known of
// time and logs.
func (s *Service) addSources(ctx context.Context, req *adminv1.ExportTrustRequest, f *link.TrustFile, root *link.TrustedRoot) error {
	if len(req.SourcesJson) > 0 || req.ResetSources {
		var have, more trustdoc.Sources
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
		if err := have.Merge(more); err != nil {
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
