package server

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"slices"

	localauthorityv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/localauthority/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/rootlink/rootlink/internal/store"
	"github.com/rootlink/rootlink/pkg/svid"
)

// The calls about the keys that sign JWT-SVIDs.

func jwtState(a *store.JWTAuthority) *localauthorityv1.AuthorityState {
	if a == nil {
		return nil
	}
	return &localauthorityv1.AuthorityState{AuthorityId: a.ID, ExpiresAt: a.NotAfter.Unix()}
}

// last returns the newest authority in a state that is in the bundle, or nil.
func (a *jwtAuthorities) last(state svid.State) *store.JWTAuthority {
	for _, row := range slices.Backward(a.set.Load().all) {
		if row.State == state && svid.JWTNeeded(stageOf(&row), a.now()) {
			return &row
		}
	}
	return nil
}

// byID returns an authority, or store.ErrNotFound.
func (a *jwtAuthorities) byID(id string) (*store.JWTAuthority, error) {
	for _, row := range a.set.Load().all {
		if row.ID == id {
			return &row, nil
		}
	}
	return nil, store.ErrNotFound
}

// prepareNext returns the prepared authority, made now when there is none.
func (a *jwtAuthorities) prepareNext(ctx context.Context) (*store.JWTAuthority, error) {
	a.changing.Lock()
	defer a.changing.Unlock()
	if row := a.last(svid.Prepared); row != nil {
		return row, nil
	}
	if err := a.prepare(ctx); err != nil {
		return nil, err
	}
	return a.last(svid.Prepared), nil
}

func (a *jwtAuthorities) activateID(ctx context.Context, id string) error {
	a.changing.Lock()
	defer a.changing.Unlock()
	row, err := a.byID(id)
	if err != nil {
		return err
	}
	if row.State != svid.Prepared || !a.now().Before(row.NotAfter) {
		return errNotPrepared
	}
	return a.activate(ctx, id)
}

// distrust marks a retired authority as tainted, or drops it at once.
func (a *jwtAuthorities) distrust(ctx context.Context, id string, revoke bool) error {
	a.changing.Lock()
	defer a.changing.Unlock()
	row, err := a.byID(id)
	switch {
	case err != nil:
		return err
	case row.State != svid.Retired:
		return errNotOld
	case revoke && row.TaintedAt.IsZero():
		return errNotTainted
	}
	// The thief's copy does not go with ours, but the next backup has none.
	if err := os.Remove(a.dir.file(row.KeyFile)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if revoke {
		err = a.store.DropJWTAuthority(ctx, id)
	} else {
		err = a.store.TaintJWTAuthority(ctx, id, a.now())
	}
	if err != nil {
		return err
	}
	a.log.Warn("JWT authority distrusted by an administrator", "authority", id, "revoked", revoke)
	return a.reload()
}

// GetJWTAuthorityState tells which key signs, which will, and which did last.
func (l *localAuthorityService) GetJWTAuthorityState(context.Context, *localauthorityv1.GetJWTAuthorityStateRequest) (*localauthorityv1.GetJWTAuthorityStateResponse, error) {
	active := l.s.jwt.last(svid.Active)
	if active == nil {
		return nil, status.Error(codes.Unavailable, "no JWT authority is active")
	}
	return &localauthorityv1.GetJWTAuthorityStateResponse{
		Active: jwtState(active), Prepared: jwtState(l.s.jwt.last(svid.Prepared)), Old: jwtState(l.s.jwt.last(svid.Retired)),
	}, nil
}

// PrepareJWTAuthority publishes a key, unless one is prepared.
func (l *localAuthorityService) PrepareJWTAuthority(ctx context.Context, _ *localauthorityv1.PrepareJWTAuthorityRequest) (*localauthorityv1.PrepareJWTAuthorityResponse, error) {
	row, err := l.s.jwt.prepareNext(ctx)
	if err != nil {
		return nil, l.s.internal("prepare JWT authority", err)
	}
	return &localauthorityv1.PrepareJWTAuthorityResponse{PreparedAuthority: jwtState(row)}, nil
}

// ActivateJWTAuthority lets the prepared key sign from now on.
func (l *localAuthorityService) ActivateJWTAuthority(ctx context.Context, req *localauthorityv1.ActivateJWTAuthorityRequest) (*localauthorityv1.ActivateJWTAuthorityResponse, error) {
	if err := l.change(req.AuthorityId, func() error { return l.s.jwt.activateID(ctx, req.AuthorityId) }); err != nil {
		return nil, err
	}
	return &localauthorityv1.ActivateJWTAuthorityResponse{ActivatedAuthority: jwtState(l.s.jwt.last(svid.Active))}, nil
}

// TaintJWTAuthority has agents throw away what an old key signed.
func (l *localAuthorityService) TaintJWTAuthority(ctx context.Context, req *localauthorityv1.TaintJWTAuthorityRequest) (*localauthorityv1.TaintJWTAuthorityResponse, error) {
	if err := l.change(req.AuthorityId, func() error { return l.s.jwt.distrust(ctx, req.AuthorityId, false) }); err != nil {
		return nil, err
	}
	return &localauthorityv1.TaintJWTAuthorityResponse{TaintedAuthority: &localauthorityv1.AuthorityState{AuthorityId: req.AuthorityId}}, nil
}

// RevokeJWTAuthority takes an old key out of the bundle.
func (l *localAuthorityService) RevokeJWTAuthority(ctx context.Context, req *localauthorityv1.RevokeJWTAuthorityRequest) (*localauthorityv1.RevokeJWTAuthorityResponse, error) {
	if err := l.change(req.AuthorityId, func() error { return l.s.jwt.distrust(ctx, req.AuthorityId, true) }); err != nil {
		return nil, err
	}
	return &localauthorityv1.RevokeJWTAuthorityResponse{RevokedAuthority: &localauthorityv1.AuthorityState{AuthorityId: req.AuthorityId}}, nil
}
