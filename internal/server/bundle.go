package server

import (
	"context"

	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

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
	if mask.RefreshHint {
		out.RefreshHint = bundleRefresh
	}
	if mask.SequenceNumber {
		out.SequenceNumber = set.sequence
	}
	return out, nil
}

// ownKeys returns the SPKI of every authority of this trust domain.
func (s *Server) ownKeys() (keys [][]byte) {
	for _, a := range s.authorities.set.Load().all {
		keys = append(keys, a.Certificate.RawSubjectPublicKeyInfo)
	}
	return keys
}

// healthService answers for the service "": the store takes writes and an
// authority can sign.
type healthService struct {
	grpc_health_v1.UnimplementedHealthServer
	s *Server
}

func (h *healthService) Check(ctx context.Context, req *grpc_health_v1.HealthCheckRequest) (*grpc_health_v1.HealthCheckResponse, error) {
	if req.Service != "" {
		return nil, status.Error(codes.NotFound, "unknown service")
	}
	resp := &grpc_health_v1.HealthCheckResponse{Status: grpc_health_v1.HealthCheckResponse_SERVING}
	signer, err := h.s.authorities.signer()
	if err == nil && !h.s.cfg.Now().Before(signer.Authority().NotAfter) {
		err = errAuthorityExpired
	}
	if err == nil {
		err = h.s.store.Check(ctx)
	}
	if err != nil {
		h.s.cfg.Log.Error("health check", "error", err)
		resp.Status = grpc_health_v1.HealthCheckResponse_NOT_SERVING
	}
	return resp, nil
}
