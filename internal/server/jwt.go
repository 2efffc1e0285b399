package server

import (
	"context"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/rootlink/rootlink/internal/store"
	"github.com/rootlink/rootlink/pkg/svid"
)

// MintJWTSVID signs what an administrator asks for.
func (v *svidService) MintJWTSVID(ctx context.Context, req *svidv1.MintJWTSVIDRequest) (*svidv1.MintJWTSVIDResponse, error) {
	id, err := v.s.memberID(req.Id)
	if err != nil {
		return nil, status.Errorf(codes.InvalidArgument, "SPIFFE ID %v", err)
	}
	r := svid.JWTRequest{ID: id, Audience: req.Audience, TTL: v.s.cfg.JWTTTL, Now: v.s.cfg.Now()}
	if req.Ttl < 0 {
		return nil, status.Error(codes.InvalidArgument, "TTL is negative")
	}
	if req.Ttl > 0 {
		r.TTL = time.Duration(req.Ttl) * time.Second
	}
	token, err := v.s.signJWT(ctx, r)
	if err != nil {
		return nil, v.s.issueError(err)
	}
	v.s.count.add("issued/jwt_minted")
	return &svidv1.MintJWTSVIDResponse{Svid: jwtToProto(token, "")}, nil
}

// NewJWTSVID signs a token for an entry that the calling agent is authorised for.
func (v *svidService) NewJWTSVID(ctx context.Context, req *svidv1.NewJWTSVIDRequest) (*svidv1.NewJWTSVIDResponse, error) {
	agent := callerOf(ctx).agent
	in := &issuance{agent: agent, now: v.s.cfg.Now(), selectors: v.s.nodeSelectors(agent)}
	token, entry, err := v.s.newJWT(ctx, in, req)
	if err != nil {
		return nil, v.s.refused(in, req.EntryId, err)
	}
	v.s.count.add("issued/jwt")
	return &svidv1.NewJWTSVIDResponse{Svid: jwtToProto(token, entry.Hint)}, nil
}

func (s *Server) newJWT(ctx context.Context, in *issuance, req *svidv1.NewJWTSVIDRequest) (*svid.JWT, *store.Entry, error) {
	if err := svid.CheckAudience(req.Audience); err != nil {
		return nil, nil, err
	}
	entry, err := s.entryFor(in, req.EntryId, in.selectors)
	if err != nil {
		return nil, nil, err
	}
	// What a recorded step's identity says rests on evidence, and a token
	// carries none.
	if isStep(entry) {
		return nil, nil, refuse("jwt_for_step", "entry %s is for recorded steps, which get no JWT-SVID", entry.ID)
	}
	id, err := spiffeid.FromString(entry.SPIFFEID)
	if err != nil {
		return nil, nil, err
	}
	r := svid.JWTRequest{ID: id, Audience: req.Audience, TTL: entry.JWTTTL, Now: in.now}
	if r.TTL == 0 {
		r.TTL = s.cfg.JWTTTL
	}
	// No SVID outlives its entry.
	if !entry.ExpiresAt.IsZero() {
		r.TTL = min(r.TTL, entry.ExpiresAt.Sub(in.now))
	}
	token, err := s.signJWT(ctx, r)
	return token, entry, err
}

func jwtToProto(t *svid.JWT, hint string) *types.JWTSVID {
	return &types.JWTSVID{
		Token:     t.Token,
		Id:        &types.SPIFFEID{TrustDomain: t.ID.TrustDomain().Name(), Path: t.ID.Path()},
		ExpiresAt: t.Expiry.Unix(),
		IssuedAt:  t.IssuedAt.Unix(),
		Hint:      hint,
	}
}
