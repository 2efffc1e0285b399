package server

import (
	"context"

	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
)

// bundleRefresh is how often GetBundle suggests to ask again, in seconds: well
// within the time between publishing an authority and using it.
const bundleRefresh = 300

type bundleService struct {
	bundlev1.UnimplementedBundleServer
	s *Server
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
			out.X509Authorities = append(out.X509Authorities, &types.X509Certificate{Asn1: c.Raw})
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

func (b *bundleService) CountBundles(context.Context, *bundlev1.CountBundlesRequest) (*bundlev1.CountBundlesResponse, error) {
	return &bundlev1.CountBundlesResponse{Count: 1}, nil
}

// ListFederatedBundles returns none: a controller asks for it at its start.
func (b *bundleService) ListFederatedBundles(context.Context, *bundlev1.ListFederatedBundlesRequest) (*bundlev1.ListFederatedBundlesResponse, error) {
	return new(bundlev1.ListFederatedBundlesResponse), nil
}

func (b *bundleService) GetFederatedBundle(context.Context, *bundlev1.GetFederatedBundleRequest) (*types.Bundle, error) {
	return nil, status.Error(codes.NotFound, "bundle not found: this server does not federate")
}

func noFederation() error {
	return status.Error(codes.Unimplemented, "this server does not federate; run the plugins on a SPIRE deployment for that")
}

func (b *bundleService) AppendBundle(context.Context, *bundlev1.AppendBundleRequest) (*types.Bundle, error) {
	return nil, status.Error(codes.Unimplemented, "the bundle holds this server's own authorities only; nothing can be appended to it")
}

func (b *bundleService) PublishJWTAuthority(context.Context, *bundlev1.PublishJWTAuthorityRequest) (*bundlev1.PublishJWTAuthorityResponse, error) {
	return nil, status.Error(codes.Unimplemented, "this server has no downstream servers")
}

func (b *bundleService) BatchCreateFederatedBundle(context.Context, *bundlev1.BatchCreateFederatedBundleRequest) (*bundlev1.BatchCreateFederatedBundleResponse, error) {
	return nil, noFederation()
}

func (b *bundleService) BatchUpdateFederatedBundle(context.Context, *bundlev1.BatchUpdateFederatedBundleRequest) (*bundlev1.BatchUpdateFederatedBundleResponse, error) {
	return nil, noFederation()
}

func (b *bundleService) BatchSetFederatedBundle(context.Context, *bundlev1.BatchSetFederatedBundleRequest) (*bundlev1.BatchSetFederatedBundleResponse, error) {
	return nil, noFederation()
}

func (b *bundleService) BatchDeleteFederatedBundle(context.Context, *bundlev1.BatchDeleteFederatedBundleRequest) (*bundlev1.BatchDeleteFederatedBundleResponse, error) {
	return nil, noFederation()
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
