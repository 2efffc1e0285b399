package admin

import (
	"context"
	"crypto"
	"crypto/x509"
	"fmt"

	"github.com/rootlink/rootlink/internal/store"
	"github.com/rootlink/rootlink/internal/trustdoc"
	"github.com/rootlink/rootlink/pkg/envelope"
	"github.com/rootlink/rootlink/pkg/link"
	adminv1 "github.com/rootlink/rootlink/proto/rootlink/admin/v1"
)

// TrustKey tells which key signs trust.json.
func (s *Service) TrustKey(context.Context, *adminv1.TrustKeyRequest) (*adminv1.TrustKeyResponse, error) {
	signer, pub := s.b.TrustKey()
	der, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		return nil, toStatus(err)
	}
	return &adminv1.TrustKeyResponse{SpkiDer: der, Here: signer != nil}, nil
}

// seal writes f as the next trust.json. The caller holds s.exporting, so that
// each one names the one before.
func (s *Service) seal(ctx context.Context, f *link.TrustFile, unsigned bool) (*adminv1.ExportTrustResponse, error) {
	signer, pub := s.b.TrustKey()
	if signer == nil && !unsigned {
		return nil, fmt.Errorf("%w: the trust key is not kept on this server", errNoKey)
	}
	var err error
	if f.Previous, err = s.store.TrustValue(ctx, store.TrustDigest); err != nil {
		return nil, err
	}
	// The serial is spent before anything carries it. One lost to a failure
	// below leaves a gap, which harms nobody; one given twice would hide a
	// rollback.
	if f.Serial, err = s.store.NextTrustSerial(ctx); err != nil {
		return nil, err
	}
	var signers []crypto.Signer
	if !unsigned {
		signers = append(signers, signer)
	}
	doc, signed, err := trustdoc.Seal(f, []crypto.PublicKey{pub}, signers)
	if err != nil {
		return nil, err
	}
	t, err := link.ParseUnsignedTrust(doc)
	if err != nil {
		return nil, err
	}
	if err := s.store.SetTrustValue(ctx, store.TrustDigest, t.Digest()); err != nil {
		return nil, err
	}
	r := &adminv1.ExportTrustResponse{Document: doc, Serial: f.Serial}
	if unsigned {
		return r, nil
	}
	r.Document = signed
	r.SignedBy, err = envelope.Fingerprint(pub)
	return r, err
}
