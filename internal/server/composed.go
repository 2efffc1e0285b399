package server

import (
	"context"
	"errors"

	"google.golang.org/grpc/codes"

	"github.com/rootlink/rootlink/internal/server/compose"
	"github.com/rootlink/rootlink/pkg/svid"
)

const composerType = "CredentialComposer"

// What a caller hears; the log has the rest, which is a plugin's text.
var (
	errComposerRefused = errors.New("a credential composer of this server answered with what may not be in an SVID")
	errComposerFailed  = errors.New("a credential composer of this server did not answer")
)

// compose has the credential composers add to an SVID.
func (s *Server) compose(ctx context.Context, r *svid.Request) error {
	return s.composed(s.composers.X509(ctx, r), r.ID.String())
}

// signJWT issues a token under the active authority.
func (s *Server) signJWT(ctx context.Context, r svid.JWTRequest) (*svid.JWT, error) {
	signer, err := s.jwt.signer()
	if err != nil {
		return nil, err
	}
	if len(s.composers) > 0 {
		begin, end, err := signer.Window(r)
		if err != nil {
			return nil, err
		}
		if err := s.composed(s.composers.JWT(ctx, &r, begin, end), r.ID.String()); err != nil {
			return nil, err
		}
	}
	return signer.Sign(r)
}

// composed counts and logs why an SVID is not issued.
func (s *Server) composed(err error, id string) error {
	var e *compose.Error
	if !errors.As(err, &e) {
		return err
	}
	s.cfg.Log.Error("SVID not issued", "spiffe_id", id, "plugin", e.Composer, "error", e)
	if e.Refused {
		s.count.add("composer_refused/" + e.Composer)
		return &refusal{"composer", codes.Internal, errComposerRefused}
	}
	s.count.add("composer_failed/" + e.Composer)
	return &refusal{"composer", codes.Unavailable, errComposerFailed}
}
