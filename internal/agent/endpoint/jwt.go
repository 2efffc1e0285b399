package endpoint

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	workloadpb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/rootlink/rootlink/internal/agent/identity"
	"github.com/rootlink/rootlink/internal/measured"
	"github.com/rootlink/rootlink/pkg/svid"
)

// FetchJWTSVID returns a token for each identity of the caller, or for the one
// that it asks for. They are not bound to it: what reads them can use them.
func (s *Server) FetchJWTSVID(ctx context.Context, req *workloadpb.JWTSVIDRequest) (*workloadpb.JWTSVIDResponse, error) {
	if err := svid.CheckAudience(req.GetAudience()); err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	var only spiffeid.ID
	if req.GetSpiffeId() != "" {
		var err error
		if only, err = spiffeid.FromString(req.GetSpiffeId()); err != nil {
			return nil, status.Errorf(codes.InvalidArgument, "requested SPIFFE ID: %v", err)
		}
	}
	c, subj, err := s.caller(ctx)
	if err != nil {
		return nil, err
	}
	view, es, err := s.entitled(ctx, subj, true)
	if err != nil {
		return nil, err
	}
	if !only.IsZero() {
		of := func(v *identity.View) []*identity.Entry {
			return slices.DeleteFunc(matches(v, subj), func(e *identity.Entry) bool { return e.SPIFFEID != only })
		}
		if es = of(view); len(es) == 0 {
			// Its entry may have been made a moment ago.
			if err := s.knock(ctx, func(v *identity.View) bool { return len(of(v)) > 0 }); err != nil {
				return nil, err
			}
			if view, err = s.cfg.Keeper.View(); err != nil {
				return nil, status.Error(codes.Unavailable, err.Error())
			}
			es = of(view)
		}
		if len(es) == 0 {
			return nil, status.Errorf(codes.PermissionDenied, "no identity issued: this workload is not entitled to %s", bounded(only.String()))
		}
	}
	got := make([]*identity.JWT, len(es))
	errs := make([]error, len(es))
	var wg sync.WaitGroup
	for i, e := range es {
		wg.Go(func() { got[i], errs[i] = s.cfg.Issuer.JWT(ctx, e, req.GetAudience()) })
	}
	wg.Wait()
	if err := ctx.Err(); err != nil {
		return nil, status.FromContextError(err).Err()
	}
	resp := new(workloadpb.JWTSVIDResponse)
	for i, e := range es {
		// All or none (Workload API §6.2.1): who asked for every identity
		// would take one that is left out for withdrawn.
		if errs[i] != nil {
			return nil, issueError(fmt.Errorf("%s: %w", e.SPIFFEID, errs[i]))
		}
		resp.Svids = append(resp.Svids, &workloadpb.JWTSVID{SpiffeId: e.SPIFFEID.String(), Svid: got[i].Token, Hint: e.Hint})
	}
	if err := c.Check(); err != nil {
		return nil, measured.Error(err)
	}
	return resp, nil
}

// caller pins and measures whoever calls.
func (s *Server) caller(ctx context.Context) (*measured.Caller, measured.Subject, error) {
	c, err := measured.CallerOf(ctx)
	if err != nil {
		return nil, measured.Subject{}, err
	}
	subj, err := c.Measure(ctx, s.attestor)
	return c, subj, err
}

// FetchJWTBundles streams the JWT keys of the caller's trust domain and of those
// its entries federate with.
func (s *Server) FetchJWTBundles(_ *workloadpb.JWTBundlesRequest, stream workloadpb.SpiffeWorkloadAPI_FetchJWTBundlesServer) error {
	return watch(s, stream.Context(), stream.Send, s.jwtBundles)
}

func (s *Server) jwtBundles(_ context.Context, v *identity.View, _ measured.Subject, es []*identity.Entry) (*workloadpb.JWTBundlesResponse, time.Time, error) {
	m := make(map[string][]byte)
	for _, e := range es {
		for _, td := range e.FederatesWith {
			if b := v.Federated[td]; len(b.JWT) > 0 {
				jwks, err := b.JWT.JWKS()
				if err != nil {
					return nil, time.Time{}, status.Errorf(codes.Internal, "JWT bundle of %s: %v", td, err)
				}
				m[td.IDString()] = jwks
			}
		}
	}
	// Last: nobody else's bundle takes the place of our own.
	jwks, err := v.JWT.JWKS()
	if err != nil {
		return nil, time.Time{}, status.Errorf(codes.Internal, "JWT bundle: %v", err)
	}
	m[v.TrustDomain.IDString()] = jwks
	return &workloadpb.JWTBundlesResponse{Bundles: m}, time.Time{}, nil
}

// ValidateJWTSVID checks a token for the caller, with the keys that the caller
// would be given: those of its own trust domain, and of others if its entries
// federate with them. It says nothing that is secret, so a caller without an
// identity may ask too.
func (s *Server) ValidateJWTSVID(ctx context.Context, req *workloadpb.ValidateJWTSVIDRequest) (*workloadpb.ValidateJWTSVIDResponse, error) {
	if req.GetAudience() == "" {
		return nil, status.Error(codes.InvalidArgument, "no audience")
	}
	if req.GetSvid() == "" {
		return nil, status.Error(codes.InvalidArgument, "no JWT-SVID")
	}
	// The form first: it costs nothing to refuse what is none.
	u, err := svid.ParseJWT(req.GetSvid())
	if err == nil {
		err = u.CheckTime(time.Now())
	}
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, bounded(err.Error()))
	}
	_, subj, err := s.caller(ctx)
	if err != nil {
		return nil, err
	}
	view, err := s.cfg.Keeper.View()
	if err != nil {
		return nil, status.Error(codes.Unavailable, err.Error())
	}
	keys := jwtbundle.NewSet(view.JWT.Bundle(view.TrustDomain))
	for _, e := range matches(view, subj) {
		for _, td := range e.FederatesWith {
			if b := view.Federated[td]; len(b.JWT) > 0 && td != view.TrustDomain {
				keys.Add(b.JWT.Bundle(td))
			}
		}
	}
	var got *jwtsvid.SVID
	err = s.cfg.Issuer.InTurn(func() (err error) {
		got, err = jwtsvid.ParseAndValidate(req.GetSvid(), keys, []string{req.GetAudience()})
		return err
	})
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, bounded(err.Error()))
	}
	claims, err := structpb.NewStruct(claimsFor(got, got.ID.TrustDomain() == view.TrustDomain))
	if err != nil {
		return nil, status.Errorf(codes.InvalidArgument, "claims: %s", bounded(err.Error()))
	}
	return &workloadpb.ValidateJWTSVIDResponse{SpiffeId: got.ID.String(), Claims: claims}, nil
}

// claimsFor returns the claims that a workload is told. Of another trust
// domain's token only those that JWT-SVID defines and the times: what else its
// server writes there ("admin") is not ours to vouch for.
func claimsFor(got *jwtsvid.SVID, ours bool) map[string]any {
	out := make(map[string]any, len(got.Claims))
	for name, v := range got.Claims {
		switch name {
		case "sub", "exp", "iat", "nbf":
		case "aud": // always a list, as SPIRE has it
			var list []any
			for _, a := range got.Audience {
				list = append(list, a)
			}
			v = list
		default:
			if !ours {
				continue
			}
		}
		out[name] = v
	}
	return out
}
