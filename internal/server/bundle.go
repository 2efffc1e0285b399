package server

import (
	"context"

	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/rootlink/rootlink/internal/server/bundles"
)

// bundleRefresh is how often GetBundle suggests to ask again, in seconds: well
// within the time between publishing an authority and using it.
const bundleRefresh = 300

// bundleService answers for this trust domain's bundle itself, and has those of
// others from internal/server/bundles.
type bundleService struct {
	*bundles.Service
	s *Server
}

func newBundleService(s *Server) *bundleService {
	return &bundleService{s: s, Service: &bundles.Service{
		TD: s.cfg.td, Store: s.store, Log: s.cfg.Log, Own: s.ownKeys, Internal: s.internal,
	}}
}

func (b *bundleService) GetBundle(ctx context.Context, req *bundlev1.GetBundleRequest) (*types.Bundle, error) {
	mask := req.OutputMask
	if mask == nil {
		mask = &types.BundleMask{X509Authorities: true, JwtAuthorities: true, RefreshHint: true, SequenceNumber: true}
	}
	set := b.s.authorities.set.Load()
	out := &types.Bundle{TrustDomain: b.s.cfg.TrustDomain}
	if mask.X509Authorities {
		for _, c := range set.valid(b.s.cfg.Now()) {
			out.X509Authorities = append(out.X509Authorities, &types.X509Certificate{Asn1: c.Raw, Tainted: set.tainted(c)})
		}
	}
	if mask.JwtAuthorities {
		out.JwtAuthorities = b.s.jwt.set.Load().keys(b.s.cfg.Now())
	}
	if mask.RefreshHint {
		out.RefreshHint = bundleRefresh
	}
	if mask.SequenceNumber {
		var err error
		if out.SequenceNumber, err = b.s.store.BundleSequence(); err != nil {
			return nil, b.s.internal("read bundle", err)
		}
	}
	return out, nil
}

// ownKeys returns the SPKI of every authority of this trust domain.
func (s *Server) ownKeys() (keys [][]byte) {
	for _, a := range s.authorities.set.Load().all {
		keys = append(keys, a.Certificate.RawSubjectPublicKeyInfo)
	}
	for _, a := range s.jwt.set.Load().all {
		keys = append(keys, a.PublicKey)
	}
	return keys
}
