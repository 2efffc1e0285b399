package server

import (
	"context"
	"errors"
	"slices"

	localauthorityv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/localauthority/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/rootlink/rootlink/internal/store"
	"github.com/rootlink/rootlink/pkg/svid"
)

// localAuthorityService answers SPIRE's calls about this server's own
// authorities. Those that have expired or were revoked are past its ends.
type localAuthorityService struct {
	localauthorityv1.UnimplementedLocalAuthorityServer
	s *Server
}

// live returns the newest authority in a state that is still in the bundle,
// or nil.
func (l *localAuthorityService) live(state svid.State) *AuthorityInfo {
	all := l.s.authorities.set.Load().all
	for _, a := range slices.Backward(all) {
		if a.State == state && a.RevokedAt.IsZero() && l.s.cfg.Now().Before(a.Certificate.NotAfter) {
			return &a
		}
	}
	return nil
}

func stateToProto(a *AuthorityInfo) *localauthorityv1.AuthorityState {
	if a == nil {
		return nil
	}
	return &localauthorityv1.AuthorityState{AuthorityId: svid.AuthorityID(a.Certificate), ExpiresAt: a.Certificate.NotAfter.Unix()}
}

// GetX509AuthorityState tells which authority signs, which will, and which did
// last.
func (l *localAuthorityService) GetX509AuthorityState(context.Context, *localauthorityv1.GetX509AuthorityStateRequest) (*localauthorityv1.GetX509AuthorityStateResponse, error) {
	active := l.live(svid.Active)
	if active == nil {
		return nil, status.Error(codes.Unavailable, "no X.509 authority is active")
	}
	return &localauthorityv1.GetX509AuthorityStateResponse{
		Active: stateToProto(active), Prepared: stateToProto(l.live(svid.Prepared)), Old: stateToProto(l.live(svid.Retired)),
	}, nil
}

// PrepareX509Authority publishes an authority. One that is prepared already
// stays: each stands in trust.json for ever, so a script that repeats itself
// must not fill it.
func (l *localAuthorityService) PrepareX509Authority(ctx context.Context, _ *localauthorityv1.PrepareX509AuthorityRequest) (*localauthorityv1.PrepareX509AuthorityResponse, error) {
	cert, err := l.s.authorities.prepareNext(ctx)
	if err != nil {
		return nil, l.s.internal("prepare X.509 authority", err)
	}
	return &localauthorityv1.PrepareX509AuthorityResponse{PreparedAuthority: &localauthorityv1.AuthorityState{
		AuthorityId: svid.AuthorityID(cert), ExpiresAt: cert.NotAfter.Unix(),
	}}, nil
}

// ActivateX509Authority lets the prepared authority sign from now on.
func (l *localAuthorityService) ActivateX509Authority(ctx context.Context, req *localauthorityv1.ActivateX509AuthorityRequest) (*localauthorityv1.ActivateX509AuthorityResponse, error) {
	a, err := l.x509(req.AuthorityId, func() error { return l.s.authorities.activateID(ctx, req.AuthorityId) })
	if err != nil {
		return nil, err
	}
	return &localauthorityv1.ActivateX509AuthorityResponse{ActivatedAuthority: a}, nil
}

// TaintX509Authority has what an old authority signed replaced.
func (l *localAuthorityService) TaintX509Authority(ctx context.Context, req *localauthorityv1.TaintX509AuthorityRequest) (*localauthorityv1.TaintX509AuthorityResponse, error) {
	a, err := l.x509(req.AuthorityId, func() error {
		return l.s.authorities.distrust(ctx, req.AuthorityId, false)
	})
	if err != nil {
		return nil, err
	}
	return &localauthorityv1.TaintX509AuthorityResponse{TaintedAuthority: a}, nil
}

// RevokeX509Authority takes an old authority out of the bundle: what it signed
// verifies no more.
func (l *localAuthorityService) RevokeX509Authority(ctx context.Context, req *localauthorityv1.RevokeX509AuthorityRequest) (*localauthorityv1.RevokeX509AuthorityResponse, error) {
	a, err := l.x509(req.AuthorityId, func() error {
		return l.s.authorities.distrust(ctx, req.AuthorityId, true)
	})
	if err != nil {
		return nil, err
	}
	return &localauthorityv1.RevokeX509AuthorityResponse{RevokedAuthority: a}, nil
}

// Outcomes of a change of one authority.
var (
	errNotPrepared = errors.New("only a prepared authority can be activated")
	errNotOld      = errors.New("only an old authority can be tainted or revoked: prepare and activate another first")
	errNotTainted  = errors.New("it is not tainted yet: what it signed would stop working before anybody has something newer")
)

// x509 runs f and returns the X.509 authority as it is then.
func (l *localAuthorityService) x509(id string, f func() error) (*localauthorityv1.AuthorityState, error) {
	if err := l.change(id, f); err != nil {
		return nil, err
	}
	a, err := l.s.authorities.set.Load().byID(id)
	if err != nil {
		return nil, l.s.internal("change X.509 authority", err)
	}
	return stateToProto(&a), nil
}

// change runs f, and words what it returns.
func (l *localAuthorityService) change(id string, f func() error) error {
	if id == "" {
		return status.Error(codes.InvalidArgument, "no authority ID provided")
	}
	switch err := f(); {
	case errors.Is(err, store.ErrNotFound):
		return status.Error(codes.InvalidArgument, "unexpected authority ID: there is none of that ID")
	case errors.Is(err, errNotPrepared), errors.Is(err, errNotOld), errors.Is(err, errNotTainted):
		return status.Error(codes.InvalidArgument, err.Error())
	case err != nil:
		return l.s.internal("change authority", err)
	}
	return nil
}

func noUpstream() error {
	return status.Error(codes.FailedPrecondition, "upstream authority is not configured: this server signs with its own authorities; "+
		"`localauthority x509 taint` and `revoke` are for those")
}

func (l *localAuthorityService) TaintX509UpstreamAuthority(context.Context, *localauthorityv1.TaintX509UpstreamAuthorityRequest) (*localauthorityv1.TaintX509UpstreamAuthorityResponse, error) {
	return nil, noUpstream()
}

func (l *localAuthorityService) RevokeX509UpstreamAuthority(context.Context, *localauthorityv1.RevokeX509UpstreamAuthorityRequest) (*localauthorityv1.RevokeX509UpstreamAuthorityResponse, error) {
	return nil, noUpstream()
}
