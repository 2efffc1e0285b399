package attestca

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/pkg/attest"
)

var now = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func statement() attest.AKStatement {
	s := attest.AKStatement{EKBasis: "maker", AKName: append([]byte{0, 0x0b}, make([]byte, 32)...), Manufacturer: "IBM", Firmware: "1.2", Software: true}
	s.EKHash[0], s.EKRoot[0] = 1, 2
	return s
}

func TestMakesOnceAndLoadsAgain(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "new")
	first, err := LoadOrCreate(dir, now)
	if err != nil {
		t.Fatal(err)
	}
	second, err := LoadOrCreate(dir, now.Add(time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	if !first.Certificate().Equal(second.Certificate()) {
		t.Error("a second start made another CA")
	}
	st, err := os.Stat(filepath.Join(dir, KeyFile))
	if err != nil {
		t.Fatal(err)
	}
	if st.Mode().Perm() != 0o600 {
		t.Errorf("key file has mode %v", st.Mode())
	}
	if c := first.Certificate(); c.Subject.SerialNumber == "" || !c.IsCA || !c.MaxPathLenZero || c.KeyUsage != x509.KeyUsageCertSign {
		t.Errorf("CA certificate: subject %v, CA %v, usage %b", c.Subject, c.IsCA, c.KeyUsage)
	}
	other, err := LoadOrCreate(t.TempDir(), now)
	if err != nil {
		t.Fatal(err)
	}
	if other.Certificate().Subject.String() == first.Certificate().Subject.String() {
		t.Error("two CAs have one subject")
	}
}

func TestTwoStartsAtOnceShareOneCA(t *testing.T) {
	dir := t.TempDir()
	got := make([]*CA, 8)
	var wg sync.WaitGroup
	for i := range got {
		wg.Go(func() {
			ca, err := LoadOrCreate(dir, now)
			if err != nil {
				t.Error(err)
			}
			got[i] = ca
		})
	}
	wg.Wait()
	for _, ca := range got {
		if ca == nil || !ca.Certificate().Equal(got[0].Certificate()) {
			t.Fatal("two processes made two CAs")
		}
	}
}

func TestStopBetweenKeyAndCertificate(t *testing.T) {
	dir := t.TempDir()
	first, err := LoadOrCreate(dir, now)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(dir, CertFile)); err != nil {
		t.Fatal(err)
	}
	again, err := LoadOrCreate(dir, now)
	if err != nil {
		t.Fatal(err)
	}
	if !again.key.Equal(first.key) {
		t.Error("the key that was written first is lost")
	}
}

func TestRefusesToReplaceALostKey(t *testing.T) {
	dir := t.TempDir()
	if _, err := LoadOrCreate(dir, now); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(dir, KeyFile)); err != nil {
		t.Fatal(err)
	}
	_, err := LoadOrCreate(dir, now)
	if err == nil {
		t.Fatal("made a new CA over an old certificate")
	}
	if cli.HintOf(err) == "" {
		t.Error("no hint")
	}
}

// operatorFiles writes a CA as an operator would have made it.
func operatorFiles(t *testing.T, edit func(*x509.Certificate), key *ecdsa.PrivateKey) (cert, keyPath string) {
	t.Helper()
	dir := t.TempDir()
	signer := newKey(t)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(7), Subject: pkix.Name{CommonName: "operator"},
		NotBefore: now.Add(-time.Hour), NotAfter: now.Add(1000 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	edit(template)
	der, err := x509.CreateCertificate(rand.Reader, template, template, signer.Public(), signer)
	if err != nil {
		t.Fatal(err)
	}
	if key == nil {
		key = signer
	}
	keyDER, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	cert, keyPath = filepath.Join(dir, "ca.pem"), filepath.Join(dir, "key.pem")
	write(t, cert, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o644)
	write(t, keyPath, pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: keyDER}), 0o600)
	return cert, keyPath
}

func write(t *testing.T, path string, b []byte, mode os.FileMode) {
	t.Helper()
	if err := os.WriteFile(path, b, mode); err != nil {
		t.Fatal(err)
	}
}

func TestLoadsOperatorFiles(t *testing.T) {
	cert, key := operatorFiles(t, func(*x509.Certificate) {}, nil)
	ca, err := Load(cert, key, now)
	if err != nil {
		t.Fatal(err)
	}
	if len(ca.ChainDER()) != 1 {
		t.Errorf("chain of %d", len(ca.ChainDER()))
	}
}

func TestRefusesUnusableOperatorFiles(t *testing.T) {
	nothing := func(*x509.Certificate) {}
	tests := map[string]struct {
		edit func(*x509.Certificate)
		key  *ecdsa.PrivateKey
		want error
	}{
		"key of another certificate": {nothing, newKey(t), ErrKeyMismatch},
		"not a CA":                   {func(c *x509.Certificate) { c.IsCA = false }, nil, ErrNotCA},
		"no keyCertSign":             {func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageCRLSign }, nil, ErrNotCA},
		"EKU without AK":             {func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }, nil, ErrNotCA},
		"expired":                    {func(c *x509.Certificate) { c.NotAfter = now.Add(-time.Second) }, nil, ErrExpired},
		"not yet valid":              {func(c *x509.Certificate) { c.NotBefore = now.Add(time.Minute) }, nil, ErrExpired},
		"unknown critical extension": {func(c *x509.Certificate) {
			c.ExtraExtensions = []pkix.Extension{{Id: []int{1, 2, 3}, Critical: true, Value: []byte{5, 0}}}
		}, nil, ErrNotCA},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			cert, key := operatorFiles(t, tt.edit, tt.key)
			_, err := Load(cert, key, now)
			if !errors.Is(err, tt.want) {
				t.Errorf("got %v, want %v", err, tt.want)
			}
			if cli.HintOf(err) == "" {
				t.Error("no hint")
			}
		})
	}
}

func TestRefusesAKeyThatEveryUserCanRead(t *testing.T) {
	cert, key := operatorFiles(t, func(*x509.Certificate) {}, nil)
	if err := os.Chmod(key, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := Load(cert, key, now); err == nil || cli.HintOf(err) == "" {
		t.Errorf("got %v, hint %q", err, cli.HintOf(err))
	}
}

func TestRefusesBrokenFiles(t *testing.T) {
	cert, key := operatorFiles(t, func(*x509.Certificate) {}, nil)
	for name, content := range map[string]string{
		"empty":      "",
		"not PEM":    "hello",
		"wrong kind": "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n",
		"not DER":    "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
	} {
		t.Run(name, func(t *testing.T) {
			bad := filepath.Join(t.TempDir(), "bad.pem")
			write(t, bad, []byte(content), 0o600)
			if _, err := Load(bad, key, now); err == nil {
				t.Error("accepted as a certificate")
			}
			if _, err := Load(cert, bad, now); err == nil {
				t.Error("accepted as a key")
			}
		})
	}
}

func TestSignsAnAKCertificate(t *testing.T) {
	ca, err := LoadOrCreate(t.TempDir(), now)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := ca.SignAK(statement(), newKey(t).Public(), now)
	if err != nil {
		t.Fatal(err)
	}
	if d := cert.NotAfter.Sub(cert.NotBefore); d > AKLifetime {
		t.Errorf("valid for %v", d)
	}
	if want := now.Add(-Backdate); !cert.NotBefore.Equal(want) {
		t.Errorf("not before %v, want %v", cert.NotBefore, want)
	}
	if len(cert.URIs) != 0 || len(cert.Subject.Names) != 0 || cert.IsCA {
		t.Errorf("URIs %v, subject %v, CA %v: this could pass for something else", cert.URIs, cert.Subject, cert.IsCA)
	}
}

// A TPM whose EK certificate is seconds old, as every software TPM in a test
// is, must be verifiable: its chain is judged at our notBefore.
func TestAKCertificateBeginsWithTheEKsChain(t *testing.T) {
	ca, err := LoadOrCreate(t.TempDir(), now.Add(-time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	old := &x509.Certificate{NotBefore: now.Add(-time.Hour)}
	young := &x509.Certificate{NotBefore: now.Add(-2 * time.Second)}
	later := &x509.Certificate{NotBefore: now.Add(time.Hour)} // another maker's: not in this chain
	cert, err := ca.SignAK(statement(), newKey(t).Public(), now, old, young, later)
	if err != nil {
		t.Fatal(err)
	}
	if !cert.NotBefore.Equal(young.NotBefore) {
		t.Errorf("not before %v, want %v", cert.NotBefore, young.NotBefore)
	}
}

func TestAKCertificateEndsWithItsCA(t *testing.T) {
	ca, err := LoadOrCreate(t.TempDir(), now)
	if err != nil {
		t.Fatal(err)
	}
	end := ca.Certificate().NotAfter
	cert, err := ca.SignAK(statement(), newKey(t).Public(), end.Add(-time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	if cert.NotAfter.After(end) {
		t.Errorf("valid until %v, its CA until %v", cert.NotAfter, end)
	}
	if _, err := ca.SignAK(statement(), newKey(t).Public(), end.Add(time.Second)); !errors.Is(err, ErrExpired) {
		t.Errorf("an expired CA signed: %v", err)
	}
	if _, err := ca.SignAK(statement(), newKey(t).Public(), now.Add(-time.Hour)); !errors.Is(err, ErrExpired) {
		t.Errorf("a CA signed before its time: %v", err)
	}
}
