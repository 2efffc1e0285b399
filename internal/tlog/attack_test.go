package tlog_test

import (
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"testing"

	"github.com/rootlink/rootlink/internal/forge"
	"github.com/rootlink/rootlink/internal/tlog"
)

// Whoever has an SVID logs a signature over the hash of a certificate. Were that
// entry taken for the certificate's own, the server would think it logged, never
// log it, and nobody would get its proof.
func TestRefusesSignatureInPlaceOfACertificate(t *testing.T) {
	dir := t.TempDir()
	l := open(t, dir)
	ca := forge.P256(t)
	cert := forge.Sign(t, &x509.Certificate{NotBefore: forge.Epoch(), NotAfter: forge.Epoch().AddDate(1, 0, 0), IsCA: true, BasicConstraintsValid: true}, nil, ca.Public(), ca)
	digest := sha256.Sum256(cert.Raw)
	mustAppend(t, l, newSigner(t).body(t, string(cert.Raw)))
	missing := func(l *tlog.Log) {
		t.Helper()
		if idx, err := l.CertificateIndex(t.Context(), digest); !errors.Is(err, tlog.ErrNotLogged) {
			t.Errorf("entry %d, %v", idx, err)
		}
	}
	missing(l) // whether it is indexed yet or not
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	missing(open(t, dir))
}
