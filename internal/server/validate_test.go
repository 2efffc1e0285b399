package server

import (
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/rootlink/rootlink/internal/forge"
)

// validator is a server that trusts one authority, whose key the test has.
func validator(t *testing.T) (sign func(bend func(*x509.Certificate)) error) {
	t.Helper()
	now, key, caKey := time.Now(), forge.P256(t), forge.P256(t)
	tmpl := &x509.Certificate{
		NotBefore: now.Add(-time.Hour), NotAfter: now.Add(time.Hour), IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign, URIs: []*url.URL{{Scheme: "spiffe", Host: td}},
	}
	ca := forge.Sign(t, tmpl, tmpl, caKey.Public(), caKey)
	cfg := &settings{Config: Config{Now: func() time.Time { return now }}, td: spiffeid.RequireTrustDomainFromString(td)}
	s := &Server{cfg: cfg, authorities: &authorities{}}
	s.authorities.set.Store(&authoritySet{all: []AuthorityInfo{{Certificate: ca}}})
	return func(bend func(*x509.Certificate)) error {
		c := &x509.Certificate{
			NotBefore: now.Add(-time.Minute), NotAfter: now.Add(time.Minute), BasicConstraintsValid: true,
			KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
			URIs: []*url.URL{{Scheme: "spiffe", Host: td, Path: "/node"}},
		}
		bend(c)
		id, err := s.verifyClient([]*x509.Certificate{forge.Sign(t, c, ca, key.Public(), caKey)})
		if err == nil && id.String() != parent {
			t.Errorf("taken for %s", id)
		}
		return err
	}
}

// An authority that is taken for a client, or a certificate with two names, is
// how the holder of one right would use another.
func TestX509SVIDSection52LeafValidation(t *testing.T) {
	sign := validator(t)
	if err := sign(func(*x509.Certificate) {}); err != nil {
		t.Fatal(err)
	}
	uri := func(s string) *url.URL {
		u, err := url.Parse(s)
		if err != nil {
			t.Fatal(err)
		}
		return u
	}
	for name, bend := range map[string]func(*x509.Certificate){
		"authority":          func(c *x509.Certificate) { c.IsCA, c.KeyUsage = true, c.KeyUsage|x509.KeyUsageCertSign },
		"cA alone":           func(c *x509.Certificate) { c.IsCA = true },
		"keyCertSign alone":  func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCertSign },
		"cRLSign alone":      func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCRLSign },
		"no URI":             func(c *x509.Certificate) { c.URIs, c.DNSNames = nil, []string{td} },
		"two URIs":           func(c *x509.Certificate) { c.URIs = append(c.URIs, uri("spiffe://"+td+"/admin")) },
		"another URI":        func(c *x509.Certificate) { c.URIs = append(c.URIs, uri("https://"+td)) },
		"other scheme":       func(c *x509.Certificate) { c.URIs = []*url.URL{uri("https://" + td + "/node")} },
		"no path":            func(c *x509.Certificate) { c.URIs = []*url.URL{uri("spiffe://" + td)} },
		"root path":          func(c *x509.Certificate) { c.URIs = []*url.URL{uri("spiffe://" + td + "/")} },
		"other trust domain": func(c *x509.Certificate) { c.URIs = []*url.URL{uri("spiffe://other.example/node")} },
		"query":              func(c *x509.Certificate) { c.URIs = []*url.URL{uri(parent + "?a")} },
	} {
		if err := sign(bend); !errors.Is(err, errClientCertificate) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestX509SVIDSection51ServerValidatesThePath(t *testing.T) {
	sign := validator(t)
	for name, bend := range map[string]func(*x509.Certificate){
		"over":          func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Second) },
		"not yet valid": func(c *x509.Certificate) { c.NotBefore = time.Now().Add(30 * time.Second) },
		"other usage":   func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageCodeSigning} },
		"unknown critical extension": func(c *x509.Certificate) {
			c.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 99999, 1}, Critical: true, Value: []byte{5, 0}}}
		},
	} {
		if err := sign(bend); !errors.Is(err, errClientCertificate) || !strings.Contains(err.Error(), "x509: ") {
			t.Errorf("%s: %v", name, err)
		}
	}
}
