package server

import (
	"context"
	"crypto/ecdsa"
	"crypto/x509"
	"time"

	"github.com/rootlink/rootlink/pkg/svid"
)

// AuthorityInfo is an X.509 authority with its windows.
type AuthorityInfo struct {
	Certificate *x509.Certificate
	State       svid.State
	PreparedAt  time.Time
	ActivatedAt time.Time // zero until then
	RetiredAt   time.Time // zero until then
}

// Authorities returns every X.509 authority there ever was, oldest first.
func (s *Server) Authorities() ([]AuthorityInfo, error) { return nil, errNotImplemented }

// RotateAuthority prepares an authority (unless one is prepared) and activates it.
func (s *Server) RotateAuthority(ctx context.Context) (*x509.Certificate, error) {
	return nil, errNotImplemented
}

// AttestationCAs returns the certificates that sign AK certificates, the one in
// use first.
func (s *Server) AttestationCAs() []*x509.Certificate { return nil }

// TrustKey signs bundles for agents that have only a join line. Its public
// half is what the join line pins.
func (s *Server) TrustKey() *ecdsa.PrivateKey { return nil }

// JoinLine is what an agent needs to find and check this trust domain:
// rootlink-join:v1:<trust domain>:<hex SHA-256 of the trust key's SPKI>.
func (s *Server) JoinLine() string { return "" }

// Counters returns how often each thing was counted since the start, such as
// "issue_refused/pcr_policy".
func (s *Server) Counters() map[string]uint64 { return nil }
