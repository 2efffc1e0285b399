// Package bundles keeps the bundles of other trust domains: the calls of SPIRE's
// bundle service for them. This server fetches none by itself; an operator or a
// controller sets them.
package bundles

import (
	"cmp"
	"context"
	"errors"
	"log/slog"
	"slices"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/rootlink/rootlink/internal/store"
)

// Bounds on one call.
const (
	maxBatch     = 500
	maxPage      = 500
	maxPageBytes = 3 << 20 // a client takes 4 MiB at most, which is gRPC's default
)

// Service answers the calls about federated bundles.
type Service struct {
	bundlev1.UnimplementedBundleServer
	TD    spiffeid.TrustDomain
	Store *store.Store
	Log   *slog.Logger
	// Own returns the SPKI of every authority of this trust domain.
	Own func() [][]byte
	// Internal logs an error and returns what the caller may know of it.
	Internal func(what string, err error) error
}

// CountBundles counts this trust domain's bundle, too, as SPIRE does.
func (s *Service) CountBundles(context.Context, *bundlev1.CountBundlesRequest) (*bundlev1.CountBundlesResponse, error) {
	all, err := s.Store.FederatedBundles()
	if err != nil {
		return nil, s.Internal("count bundles", err)
	}
	return &bundlev1.CountBundlesResponse{Count: int32(len(all)) + 1}, nil
}

// ListFederatedBundles lists in pages, sorted by trust domain. A token is the
// last name of the page before: one that was made up selects nothing that the
// caller could not list.
func (s *Service) ListFederatedBundles(_ context.Context, req *bundlev1.ListFederatedBundlesRequest) (*bundlev1.ListFederatedBundlesResponse, error) {
	if req.PageSize < 0 {
		return nil, status.Error(codes.InvalidArgument, "page size cannot be negative")
	}
	all, err := s.Store.FederatedBundles()
	if err != nil {
		return nil, s.Internal("list federated bundles", err)
	}
	most := int(req.PageSize)
	if most == 0 || most > maxPage {
		most = maxPage
	}
	start, found := slices.BinarySearchFunc(all, req.PageToken, func(b *store.FederatedBundle, t string) int { return cmp.Compare(b.TrustDomain, t) })
	if found {
		start++
	}
	resp, size := new(bundlev1.ListFederatedBundlesResponse), 0
	for _, b := range all[start:] {
		if len(resp.Bundles) == most || size >= maxPageBytes {
			resp.NextPageToken = resp.Bundles[len(resp.Bundles)-1].TrustDomain
			break
		}
		p := toProto(b, req.OutputMask)
		resp.Bundles = append(resp.Bundles, p)
		size += proto.Size(p)
	}
	return resp, nil
}

// GetFederatedBundle is for agents, too: they hand it to their workloads.
func (s *Service) GetFederatedBundle(_ context.Context, req *bundlev1.GetFederatedBundleRequest) (*types.Bundle, error) {
	td, err := TrustDomain(req.TrustDomain)
	if err != nil {
		return nil, status.Errorf(codes.InvalidArgument, "trust domain argument is not valid: %v", err)
	}
	if td == s.TD {
		return nil, status.Error(codes.InvalidArgument, "getting a federated bundle for the server's own trust domain is not allowed")
	}
	b, err := s.Store.FederatedBundle(td.Name())
	if errors.Is(err, store.ErrNotFound) {
		return nil, status.Error(codes.NotFound, "bundle not found")
	}
	if err != nil {
		return nil, s.Internal("get federated bundle", err)
	}
	return toProto(b, req.OutputMask), nil
}

// errExists means that the bundle to be created is there.
var errExists = errors.New("bundle already exists")

// put stores p under rule, which may refuse by what is there; the fields that
// mask does not name stay as they are.
func (s *Service) put(ctx context.Context, doing string, p *types.Bundle, in, out *types.BundleMask, rule func(old *store.FederatedBundle) error) (*types.Bundle, *types.Status) {
	fail := func(c codes.Code, msg string) (*types.Bundle, *types.Status) {
		return nil, &types.Status{Code: int32(c), Message: msg}
	}
	td, err := TrustDomain(p.GetTrustDomain())
	if err != nil {
		return fail(codes.InvalidArgument, "trust domain argument is not valid: "+err.Error())
	}
	if td == s.TD {
		return fail(codes.InvalidArgument, doing+" a federated bundle for the server's own trust domain is not allowed")
	}
	in = orAll(in)
	b, err := fromProto(p, in, s.Own())
	if err != nil {
		return fail(codes.InvalidArgument, err.Error())
	}
	b, err = s.Store.PutFederatedBundle(ctx, td.Name(), func(old *store.FederatedBundle) (*store.FederatedBundle, error) {
		if err := rule(old); err != nil {
			return nil, err
		}
		if old == nil {
			return b, nil
		}
		c := *old
		if in.X509Authorities {
			c.X509Authorities = b.X509Authorities
		}
		if in.JwtAuthorities {
			c.JWTAuthorities = b.JWTAuthorities
		}
		if in.RefreshHint {
			c.RefreshHint = b.RefreshHint
		}
		if in.SequenceNumber {
			c.Sequence = b.Sequence
		}
		return &c, nil
	})
	switch {
	case errors.Is(err, errExists):
		return fail(codes.AlreadyExists, err.Error())
	case errors.Is(err, store.ErrNotFound):
		return fail(codes.NotFound, "bundle not found")
	case err != nil:
		st := status.Convert(s.Internal("store federated bundle", err))
		return fail(st.Code(), st.Message())
	}
	s.Log.Info("federated bundle stored", "trust_domain", b.TrustDomain, "x509_authorities", len(b.X509Authorities), "jwt_authorities", len(b.JWTAuthorities))
	return toProto(b, out), okStatus()
}

func okStatus() *types.Status { return &types.Status{Code: int32(codes.OK), Message: "OK"} }

func batch(n int) error {
	if n > maxBatch {
		return status.Errorf(codes.InvalidArgument, "%d bundles in one call, at most %d allowed", n, maxBatch)
	}
	return nil
}

// BatchCreateFederatedBundle stores bundles that are not there.
func (s *Service) BatchCreateFederatedBundle(ctx context.Context, req *bundlev1.BatchCreateFederatedBundleRequest) (*bundlev1.BatchCreateFederatedBundleResponse, error) {
	if err := batch(len(req.Bundle)); err != nil {
		return nil, err
	}
	resp := new(bundlev1.BatchCreateFederatedBundleResponse)
	for _, p := range req.Bundle {
		b, st := s.put(ctx, "creating", p, nil, req.OutputMask, func(old *store.FederatedBundle) error {
			if old != nil {
				return errExists
			}
			return nil
		})
		resp.Results = append(resp.Results, &bundlev1.BatchCreateFederatedBundleResponse_Result{Status: st, Bundle: b})
	}
	return resp, nil
}

// BatchUpdateFederatedBundle changes bundles that are there.
func (s *Service) BatchUpdateFederatedBundle(ctx context.Context, req *bundlev1.BatchUpdateFederatedBundleRequest) (*bundlev1.BatchUpdateFederatedBundleResponse, error) {
	if err := batch(len(req.Bundle)); err != nil {
		return nil, err
	}
	resp := new(bundlev1.BatchUpdateFederatedBundleResponse)
	for _, p := range req.Bundle {
		b, st := s.put(ctx, "updating", p, req.InputMask, req.OutputMask, func(old *store.FederatedBundle) error {
			if old == nil {
				return store.ErrNotFound
			}
			return nil
		})
		resp.Results = append(resp.Results, &bundlev1.BatchUpdateFederatedBundleResponse_Result{Status: st, Bundle: b})
	}
	return resp, nil
}

// BatchSetFederatedBundle stores bundles whether they are there or not.
func (s *Service) BatchSetFederatedBundle(ctx context.Context, req *bundlev1.BatchSetFederatedBundleRequest) (*bundlev1.BatchSetFederatedBundleResponse, error) {
	if err := batch(len(req.Bundle)); err != nil {
		return nil, err
	}
	resp := new(bundlev1.BatchSetFederatedBundleResponse)
	for _, p := range req.Bundle {
		b, st := s.put(ctx, "setting", p, nil, req.OutputMask, func(*store.FederatedBundle) error { return nil })
		resp.Results = append(resp.Results, &bundlev1.BatchSetFederatedBundleResponse_Result{Status: st, Bundle: b})
	}
	return resp, nil
}

// BatchDeleteFederatedBundle deletes bundles; the mode says what becomes of
// entries that federate with them.
func (s *Service) BatchDeleteFederatedBundle(ctx context.Context, req *bundlev1.BatchDeleteFederatedBundleRequest) (*bundlev1.BatchDeleteFederatedBundleResponse, error) {
	if err := batch(len(req.TrustDomains)); err != nil {
		return nil, err
	}
	var mode store.DeleteMode
	switch req.Mode {
	case bundlev1.BatchDeleteFederatedBundleRequest_RESTRICT:
		mode = store.DeleteRestrict
	case bundlev1.BatchDeleteFederatedBundleRequest_DELETE:
		mode = store.DeleteEntries
	case bundlev1.BatchDeleteFederatedBundleRequest_DISSOCIATE:
		mode = store.DeleteDissociate
	default:
		return nil, status.Errorf(codes.InvalidArgument, "failed to parse deletion mode: unhandled delete mode %q", req.Mode)
	}
	resp := new(bundlev1.BatchDeleteFederatedBundleResponse)
	for _, name := range req.TrustDomains {
		resp.Results = append(resp.Results, &bundlev1.BatchDeleteFederatedBundleResponse_Result{TrustDomain: name, Status: s.delete(ctx, name, mode)})
	}
	return resp, nil
}

func (s *Service) delete(ctx context.Context, name string, mode store.DeleteMode) *types.Status {
	td, err := TrustDomain(name)
	if err != nil {
		return &types.Status{Code: int32(codes.InvalidArgument), Message: "trust domain argument is not valid: " + err.Error()}
	}
	if td == s.TD {
		return &types.Status{Code: int32(codes.InvalidArgument), Message: "removing the bundle for the server trust domain is not allowed"}
	}
	err = s.Store.DeleteFederatedBundle(ctx, td.Name(), mode)
	var used *store.BundleInUseError
	switch {
	case errors.Is(err, store.ErrNotFound):
		return &types.Status{Code: int32(codes.NotFound), Message: "bundle not found"}
	case errors.As(err, &used):
		return &types.Status{Code: int32(codes.FailedPrecondition), Message: "failed to delete federated bundle: " + used.Error()}
	case err != nil:
		st := status.Convert(s.Internal("delete federated bundle", err))
		return &types.Status{Code: int32(st.Code()), Message: st.Message()}
	}
	s.Log.Info("federated bundle deleted", "trust_domain", td.Name(), "mode", mode)
	return okStatus()
}

// AppendBundle would put authorities of others into this trust domain's bundle.
func (s *Service) AppendBundle(context.Context, *bundlev1.AppendBundleRequest) (*types.Bundle, error) {
	return nil, status.Error(codes.Unimplemented, "this trust domain's bundle holds the server's own authorities only, since each must be in trust.json with its window; "+
		"`localauthority x509 prepare` adds one")
}

// PublishJWTAuthority is for downstream servers.
func (s *Service) PublishJWTAuthority(context.Context, *bundlev1.PublishJWTAuthorityRequest) (*bundlev1.PublishJWTAuthorityResponse, error) {
	return nil, status.Error(codes.Unimplemented, "this server has no downstream servers; run the plugins on a SPIRE deployment for nested servers")
}
