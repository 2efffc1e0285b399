package server

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// errClientCertificate means that a client certificate is no SVID of ours.
var errClientCertificate = errors.New("client certificate")

// tlsConfig is SPIRE's: a client certificate is asked for and, when there is
// one, must be an SVID of this trust domain. Which calls need one is decided
// per call.
func (s *Server) tlsConfig() *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS12,
		NextProtos: []string{"h2"},
		ClientAuth: tls.RequestClientCert,
		Time:       s.cfg.Now,
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			if c := s.authorities.own.Load(); c != nil {
				return c, nil
			}
			return nil, errors.New("no server SVID")
		},
		VerifyConnection: func(cs tls.ConnectionState) error {
			if len(cs.PeerCertificates) == 0 {
				return nil
			}
			_, err := s.verifyClient(cs.PeerCertificates)
			return err
		},
		// A resumed session would carry a certificate past a change of authorities.
		SessionTicketsDisabled: true,
	}
}

// verifyClient does what X509-SVID §5 asks of a validator.
func (s *Server) verifyClient(chain []*x509.Certificate) (spiffeid.ID, error) {
	leaf := chain[0]
	if leaf.IsCA || leaf.KeyUsage&(x509.KeyUsageCertSign|x509.KeyUsageCRLSign) != 0 {
		return spiffeid.ID{}, fmt.Errorf("%w: it is that of an authority", errClientCertificate)
	}
	now := s.cfg.Now()
	roots := x509.NewCertPool()
	for _, c := range s.authorities.set.Load().valid(now) {
		roots.AddCert(c)
	}
	if _, err := leaf.Verify(x509.VerifyOptions{
		Roots:       roots,
		CurrentTime: now,
		KeyUsages:   []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}); err != nil {
		return spiffeid.ID{}, fmt.Errorf("%w: %w", errClientCertificate, err)
	}
	return idOf(leaf, s.cfg.td)
}

// idOf returns the SPIFFE ID of an SVID of td: its one URI SAN.
func idOf(leaf *x509.Certificate, td spiffeid.TrustDomain) (spiffeid.ID, error) {
	if len(leaf.URIs) != 1 {
		return spiffeid.ID{}, fmt.Errorf("%w: %d URI names, an SVID has one", errClientCertificate, len(leaf.URIs))
	}
	id, err := spiffeid.FromURI(leaf.URIs[0])
	if err != nil {
		return spiffeid.ID{}, fmt.Errorf("%w: %w", errClientCertificate, err)
	}
	if id.TrustDomain() != td || id.Path() == "" {
		return spiffeid.ID{}, fmt.Errorf("%w: %q is not in trust domain %q", errClientCertificate, id, td.Name())
	}
	return id, nil
}
