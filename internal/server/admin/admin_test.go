package admin

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"path/filepath"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/rootlink/rootlink/internal/forge"
	"github.com/rootlink/rootlink/internal/server"
	"github.com/rootlink/rootlink/internal/store"
	"github.com/rootlink/rootlink/pkg/attest"
	"github.com/rootlink/rootlink/pkg/svid"
	"github.com/rootlink/rootlink/pkg/timestamp"
	"github.com/rootlink/rootlink/pkg/tlog"
)

var epoch = time.Date(2030, 1, 2, 3, 4, 5, 0, time.UTC)

// fixture is a Service over a real store.
type fixture struct {
	*Service
	path        string
	st          *store.Store
	authorities []server.AuthorityInfo
	attestCA    *x509.Certificate
	timestamps  []timestamp.Authority
	logs        []tlog.Log
	roots       attest.EKRoots
	clock       time.Time

	key          *ecdsa.PrivateKey
	keyElsewhere bool
}

func (f *fixture) TrustDomain() string                          { return "example.org" }
func (f *fixture) Store() *store.Store                          { return f.st }
func (f *fixture) Authorities() ([]server.AuthorityInfo, error) { return f.authorities, nil }
func (f *fixture) AttestationCAs() []*x509.Certificate          { return []*x509.Certificate{f.attestCA} }

func (f *fixture) TimestampAuthorities() []timestamp.Authority { return f.timestamps }

func (f *fixture) Logs() []tlog.Log { return f.logs }

func (f *fixture) JoinLine() string { return "rootlink-join:v1:example.org:00" }

func (f *fixture) TrustKey() (crypto.Signer, crypto.PublicKey) {
	if f.keyElsewhere {
		return nil, f.key.Public()
	}
	return f.key, f.key.Public()
}

func (f *fixture) Counters() map[string]uint64 { return map[string]uint64{"issued": 2} }

func (f *fixture) RotateAuthority(context.Context) (*x509.Certificate, error) {
	return f.authorities[0].Certificate, nil
}

func newFixture(t *testing.T) *fixture {
	t.Helper()
	f := &fixture{path: filepath.Join(t.TempDir(), "db"), clock: epoch, attestCA: testCA(t, "attestation CA"), key: forge.P256(t)}
	f.roots.Roots = []*x509.Certificate{testCA(t, "TPM maker")}
	f.authorities = []server.AuthorityInfo{{
		Certificate: testCA(t, "one"), State: svid.Active, PreparedAt: epoch.Add(-time.Hour), ActivatedAt: epoch.Add(-time.Minute),
	}}
	f.open(t)
	return f
}

// open opens the store, again after a first time, as a restart would.
func (f *fixture) open(t *testing.T) {
	t.Helper()
	if f.st != nil {
		if err := f.st.Close(); err != nil {
			t.Fatal(err)
		}
	}
	var err error
	if f.st, err = store.Open(t.Context(), f.path, func() time.Time { return f.clock }); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.st.Close() })
	f.Service, err = New(Config{
		Backend: f, Now: func() time.Time { return f.clock },
		EK: func() (attest.EKRoots, error) { return f.roots, nil },
	})
	if err != nil {
		t.Fatal(err)
	}
}

func testCA(t *testing.T, name string) *x509.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name},
		NotBefore: epoch.Add(-24 * time.Hour), NotAfter: epoch.Add(365 * 24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

const agentPrefix = "spiffe://example.org/spire/agent/tpmnode/"

// node stores an agent whose EK hash is 32 times n, with PCR i = n + i.
func (f *fixture) node(t *testing.T, n byte) string {
	t.Helper()
	h := [32]byte(bytes.Repeat([]byte{n}, 32))
	id := agentPrefix + hexOf(n)
	values := map[uint32][]byte{}
	for i := range uint32(16) {
		values[i] = bytes.Repeat([]byte{n + byte(i)}, 32)
	}
	_, err := f.st.PutAttestedAgent(t.Context(), store.Agent{
		ID: id, AttestationType: "tpmnode", Serial: "1", ExpiresAt: f.clock.Add(time.Hour), CanReattest: true,
		Attestation: &store.Attestation{At: f.clock, EKHash: h, EKBasis: "maker", PCRs: []attest.PCRBank{{Bank: "sha256", Values: values}}, Software: true},
	}, "test")
	if err != nil {
		t.Fatal(err)
	}
	return id
}

func hexOf(n byte) string {
	const digits = "0123456789abcdef"
	return string(bytes.Repeat([]byte{digits[n>>4], digits[n&15]}, 32))
}

func wantCode(t *testing.T, err error, want codes.Code) {
	t.Helper()
	if got := status.Code(err); got != want {
		t.Errorf("code %v, want %v: %v", got, want, err)
	}
}

// entry stores an entry with selectors written as type:value.
func (f *fixture) entry(t *testing.T, id, parent string, sels ...store.Selector) {
	t.Helper()
	r, err := f.st.CreateEntries(t.Context(), []store.Entry{{SPIFFEID: id, ParentID: parent, Selectors: sels}})
	if err != nil || r[0].Err != nil {
		t.Fatal(err, r)
	}
}
