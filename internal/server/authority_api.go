package server

import (
	"context"
	"crypto/x509"
	"errors"
	"slices"
	"time"

	"github.com/rootlink/rootlink/pkg/svid"
)

var errAuthorityExpired = errors.New("the active X.509 authority has expired")

// AuthorityInfo is an X.509 authority with its windows.
type AuthorityInfo struct {
	Certificate *x509.Certificate
	State       svid.State
	PreparedAt  time.Time
	ActivatedAt time.Time // zero until then
	RetiredAt   time.Time // zero until then
	TaintedAt   time.Time // zero unless an operator distrusts it
	RevokedAt   time.Time // zero unless it was taken out of the bundle
}

// Authorities returns every X.509 authority there ever was, oldest first.
func (s *Server) Authorities() ([]AuthorityInfo, error) {
	return slices.Clone(s.authorities.set.Load().all), nil
}

// RotateAuthority prepares an authority, unless one is prepared, and activates
// it at once. Peers learn of it with their next look at the bundle; until then
// (a minute) the server's own SVID stays with the authority before.
func (s *Server) RotateAuthority(ctx context.Context) (*x509.Certificate, error) {
	return s.authorities.rotate(ctx)
}

// Counters returns how often each thing was counted since the start, such as
// "issue_refused/pcr_policy".
func (s *Server) Counters() map[string]uint64 { return s.count.all() }

// AttestationCAs returns the certificates that sign AK certificates, the one in
// use first.
func (s *Server) AttestationCAs() []*x509.Certificate { return s.attestationCA.Chain() }
