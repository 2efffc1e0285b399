package keeper_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rootlink/rootlink/internal/keeper"
	"github.com/rootlink/rootlink/pkg/link"
)

var epoch = time.Date(2030, 5, 1, 12, 0, 0, 0, time.UTC)

// authority makes an X.509 authority as SPIRE does; bend makes it a bad one.
func authority(t *testing.T, start time.Time, life time.Duration, bend func(*x509.Certificate)) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{Country: []string{"US"}, Organization: []string{"SPIFFE"}, SerialNumber: serial.String()},
		NotBefore: start.Add(-10 * time.Second), NotAfter: start.Add(life),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		URIs: []*url.URL{{Scheme: "spiffe", Host: "example.org"}},
	}
	if bend != nil {
		bend(c)
	}
	der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// world is a directory with all files, and the clock.
type world struct {
	dir string
	now time.Time
	c   keeper.Config
}

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{dir: t.TempDir(), now: epoch}
	maker := authority(t, epoch, 1000*time.Hour, func(c *x509.Certificate) { c.URIs = nil })
	ca := authority(t, epoch, 1000*time.Hour, func(c *x509.Certificate) { c.URIs = nil })
	w.writePEM(t, "maker.pem", maker)
	w.writePEM(t, "ca.pem", ca)
	w.write(t, "requirements.json", `[{"identity": "spiffe://example.org/build", "evidence": "detached", "tier": "tpm",
		"tools": ["*"], "recorders": ["*"], "eks": ["`+strings.Repeat("ab", 32)+`"]}]`)
	w.c = keeper.Config{
		TrustDomain: "example.org", DataDir: w.path("keeper"), TrustFile: w.path("trust.json"), SigstoreFile: w.path("trusted_root.json"),
		AttestationCAs: []string{w.path("ca.pem")}, EKRoots: []string{w.path("maker.pem")}, Requirements: w.path("requirements.json"),
		Now: func() time.Time { return w.now },
	}
	return w
}

func (w *world) path(name string) string { return filepath.Join(w.dir, name) }

func (w *world) write(t *testing.T, name, text string) {
	t.Helper()
	if err := os.WriteFile(w.path(name), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func (w *world) writePEM(t *testing.T, name string, der []byte) {
	t.Helper()
	w.write(t, name, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})))
}

func (w *world) keeper(t *testing.T) *keeper.Keeper {
	t.Helper()
	k, err := keeper.New(w.c)
	if err == nil {
		err = k.Open()
	}
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// publish publishes certificates, tainted ones behind a nil.
func (w *world) publish(t *testing.T, k *keeper.Keeper, sequence uint64, ders ...[]byte) {
	t.Helper()
	if err := k.Publish(bundle(sequence, ders...)); err != nil {
		t.Fatal(err)
	}
}

func bundle(sequence uint64, ders ...[]byte) keeper.Bundle {
	b := keeper.Bundle{TrustDomain: "example.org", Sequence: sequence}
	tainted := false
	for _, der := range ders {
		if der == nil {
			tainted = true
			continue
		}
		b.Authorities = append(b.Authorities, keeper.Authority{Certificate: der, Tainted: tainted})
	}
	return b
}

// trust opens what was written as a verifier does.
func (w *world) trust(t *testing.T) *link.Trust {
	t.Helper()
	raw, err := os.ReadFile(w.c.TrustFile)
	if err != nil {
		t.Fatal(err)
	}
	trust, err := link.OpenUnpinnedTrust(raw)
	if err != nil {
		t.Fatal(err)
	}
	return trust
}

// window is an authority's in trust.json, relative to epoch.
func (w *world) window(t *testing.T, der []byte) (start, end time.Duration) {
	t.Helper()
	for _, a := range w.trust(t).Authorities() {
		if bytes.Equal(a.Certificate.Raw, der) {
			return a.Start.Sub(epoch), a.End.Sub(epoch)
		}
	}
	t.Fatal("the authority is not in trust.json")
	return 0, 0
}

func TestKeepsEveryAuthorityWithItsWindow(t *testing.T) {
	w := newWorld(t)
	k := w.keeper(t)
	a, b, c := authority(t, epoch, 24*time.Hour, nil), authority(t, epoch.Add(time.Hour), 24*time.Hour, nil), authority(t, epoch, 24*time.Hour, nil)
	w.publish(t, k, 1, a, c)
	if s := w.trust(t).Serial(); s != 1 {
		t.Errorf("serial %d", s)
	}
	w.now = epoch.Add(time.Hour)
	w.publish(t, k, 2, a, b, c)
	first := w.trust(t)
	// Nothing new: no new file.
	w.now = epoch.Add(2 * time.Hour)
	w.publish(t, k, 2, a, b, c)
	if s := w.trust(t).Serial(); s != 2 {
		t.Errorf("serial %d without a change", s)
	}
	// c is tainted, seen well at two hours last; a is dropped before its time.
	w.now = epoch.Add(2*time.Hour + 30*time.Second)
	w.publish(t, k, 3, b, nil, c)
	if _, end := w.window(t, c); end != 2*time.Hour {
		t.Errorf("tainted: ends at %v", end)
	}
	if _, end := w.window(t, a); end != 2*time.Hour {
		t.Errorf("dropped: ends at %v", end)
	}
	if start, end := w.window(t, b); start != time.Hour-10*time.Second || end != 25*time.Hour {
		t.Errorf("good: %v to %v", start, end)
	}
	third := w.trust(t)
	if third.Serial() != 3 || third.File().Previous != first.Digest() || third.CheckHistory(2, first.Digest()) != nil {
		t.Errorf("serial %d after %s", third.Serial(), third.File().Previous)
	}
	// Tainted is for good; a bundle that is older than others takes nothing out,
	// and who comes back was never gone.
	w.publish(t, k, 2, a, c)
	if _, end := w.window(t, c); end != 2*time.Hour {
		t.Errorf("untainted: ends at %v", end)
	}
	if _, end := w.window(t, a); end != 24*time.Hour {
		t.Errorf("back: ends at %v", end)
	}
	if _, end := w.window(t, b); end != 25*time.Hour {
		t.Errorf("missing from an older bundle: ends at %v", end)
	}
	// Years later, after SPIRE pruned all of them.
	w.now = epoch.Add(5 * 365 * 24 * time.Hour)
	d := authority(t, w.now, 24*time.Hour, nil)
	k = w.keeper(t)
	w.publish(t, k, 900, d)
	if n := len(w.trust(t).Authorities()); n != 4 {
		t.Errorf("%d authorities", n)
	}
	if _, end := w.window(t, b); end != 25*time.Hour {
		t.Errorf("pruned: ends at %v", end)
	}
	raw, err := os.ReadFile(w.c.SigstoreFile)
	if err != nil {
		t.Fatal(err)
	}
	root, err := link.ParseTrustedRoot(raw)
	if err != nil || len(root.Authorities) != 4 {
		t.Errorf("sigstore file: %d authorities, %v", len(root.Authorities), err)
	}
}

func (w *world) bare(t *testing.T) *keeper.Keeper {
	t.Helper()
	k, err := keeper.New(w.c)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func read(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func newKey(t *testing.T, w *world, name string) string {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	pub, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	w.write(t, name, string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})))
	w.write(t, name+".pub", string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: pub})))
	return w.path(name)
}

// Several servers share the directory: none loses what another saw.
func TestServersShareADirectory(t *testing.T) {
	w := newWorld(t)
	const servers, rounds = 4, 8
	var ders [servers][rounds][]byte
	for i := range ders {
		for j := range ders[i] {
			ders[i][j] = authority(t, epoch, time.Hour, nil)
		}
	}
	var wg sync.WaitGroup
	for i := range servers {
		c := w.c
		c.TrustFile, c.SigstoreFile = w.path(fmt.Sprintf("trust-%d.json", i)), ""
		k, err := keeper.New(c)
		if err != nil {
			t.Fatal(err)
		}
		wg.Go(func() {
			for j := range rounds {
				if err := k.Publish(bundle(uint64(j), ders[i][j])); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	k := w.keeper(t)
	w.publish(t, k, 100, ders[0][0])
	if n := len(w.trust(t).Authorities()); n != servers*rounds {
		t.Errorf("%d authorities, want %d", n, servers*rounds)
	}
}

func TestWritesAnewWhenFilesChangeOrTheLastIsOld(t *testing.T) {
	w := newWorld(t)
	w.c.Revocations, w.c.Lifetime = w.path("revoked.json"), 30*24*time.Hour
	revoked := func(list string) {
		w.write(t, "revoked.json", `{"format":"rootlink-revocations","version":1,"trust_domain":"example.org","issued":"2030-05-01T12:00:00Z","revocations":[`+list+`]}`)
	}
	revoked("")
	k := w.keeper(t)
	if err := k.Check(); err != nil { // no bundle yet
		t.Error(err)
	}
	w.publish(t, k, 1, authority(t, epoch, time.Hour, nil))
	revoked(`{"kind":"ek","id":"` + strings.Repeat("cd", 32) + `","always":true}`)
	if err := k.Check(); err != nil {
		t.Fatal(err)
	}
	got := w.trust(t)
	if got.Serial() != 2 || len(got.File().Revocations) != 1 {
		t.Errorf("serial %d, %d revocations", got.Serial(), len(got.File().Revocations))
	}
	// A mistake keeps the last file, and the bundle's acknowledgement says so.
	revoked(`{"kind":"ek","id":"x","always":true}`)
	if err := k.Check(); err == nil {
		t.Error("no error")
	}
	if err := k.Publish(bundle(2, authority(t, epoch, time.Hour, nil))); err == nil {
		t.Error("no error")
	}
	if s := w.trust(t).Serial(); s != 2 {
		t.Errorf("serial %d", s)
	}
	revoked("")
	w.now = epoch.Add(time.Hour)
	if err := k.Check(); err != nil {
		t.Fatal(err)
	}
	if got = w.trust(t); got.Serial() != 3 || len(got.Authorities()) != 2 {
		t.Errorf("serial %d, %d authorities", got.Serial(), len(got.Authorities()))
	}
	w.now = w.now.Add(15 * 24 * time.Hour)
	if err := k.Check(); err != nil {
		t.Fatal(err)
	}
	if got = w.trust(t); got.Serial() != 4 || !got.Expires().Equal(w.now.Add(30*24*time.Hour)) {
		t.Errorf("serial %d, expires %v", got.Serial(), got.Expires())
	}
}

// A CA's certificate that is replaced still vouches for what it vouched for.
func TestRemembersWhatFilesNoLongerHold(t *testing.T) {
	w := newWorld(t)
	k := w.keeper(t)
	w.publish(t, k, 1, authority(t, epoch, time.Hour, nil))
	was := w.trust(t).File().AttestationCAs[0].Certificate
	w.writePEM(t, "ca.pem", authority(t, epoch, 2000*time.Hour, func(c *x509.Certificate) { c.URIs = nil }))
	if err := k.Check(); err != nil {
		t.Fatal(err)
	}
	if n := len(w.trust(t).File().AttestationCAs); n != 2 {
		t.Errorf("%d attestation CAs", n)
	}
	sum := sha256.Sum256(was)
	w.c.Forget = []string{hex.EncodeToString(sum[:])}
	if err := w.keeper(t).Check(); err != nil {
		t.Fatal(err)
	}
	if cas := w.trust(t).File().AttestationCAs; len(cas) != 1 || bytes.Equal(cas[0].Certificate, was) {
		t.Errorf("%d attestation CAs", len(cas))
	}
}

func policies(revisions ...[2]int) string {
	var out []string
	for _, r := range revisions {
		out = append(out, fmt.Sprintf(`{"name":"fleet","revision":%d,"profiles":[{"name":"p","pcrs":{"sha256":{"7":"%064x"}}}]}`, r[0], r[1]))
	}
	return "[" + strings.Join(out, ",") + "]"
}

func TestKeepsEveryPolicyRevision(t *testing.T) {
	w := newWorld(t)
	w.c.PCRPolicies = w.path("pcr.json")
	w.write(t, "pcr.json", policies([2]int{1, 1}))
	k := w.keeper(t)
	w.publish(t, k, 1, authority(t, epoch, time.Hour, nil))
	w.now = epoch.Add(time.Minute)
	w.write(t, "pcr.json", policies([2]int{2, 2}))
	if err := k.Check(); err != nil {
		t.Fatal(err)
	}
	replaced := func() (out []string) {
		for _, p := range w.trust(t).File().PCRPolicies {
			at := "current"
			if !p.Replaced.IsZero() {
				at = p.Replaced.Sub(epoch).String()
			}
			out = append(out, fmt.Sprint(p.Revision, " ", at))
		}
		return out
	}
	if got := fmt.Sprint(replaced()); got != "[1 1m0s 2 current]" {
		t.Error(got)
	}
	for _, bad := range []string{policies([2]int{1, 1}), policies([2]int{2, 3})} { // back, and changed in place
		w.write(t, "pcr.json", bad)
		if err := k.Check(); !errors.Is(err, keeper.ErrPolicy) {
			t.Errorf("%s: err = %v", bad, err)
		}
	}
	w.now = epoch.Add(time.Hour)
	w.write(t, "pcr.json", "[]")
	if err := k.Check(); err != nil {
		t.Fatal(err)
	}
	if got := fmt.Sprint(replaced()); got != "[1 1m0s 2 1h0m0s]" {
		t.Error(got)
	}
}

func TestWritesTheBareDocument(t *testing.T) {
	w := newWorld(t)
	key := newKey(t, w, "away.pem")
	w.c.Unsigned, w.c.TrustKeysPublic = true, []string{key + ".pub"}
	w.publish(t, w.keeper(t), 1, authority(t, epoch, time.Hour, nil))
	trust, err := link.ParseUnsignedTrust([]byte(read(t, w.c.TrustFile)))
	if err != nil || len(trust.TrustKeys()) != 1 || len(trust.Signers()) != 0 {
		t.Errorf("%v, %v", trust, err)
	}
	if _, err := os.Stat(w.path("keeper/trust.key")); err == nil {
		t.Error("a key was made")
	}
}

// Fifteen years of SPIRE's rotations fit, and are read fast.
func TestHoldsYearsOfAuthorities(t *testing.T) {
	w := newWorld(t)
	der := authority(t, epoch, time.Hour, nil)
	// One key signs them all: making thousands takes long.
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	type entry struct {
		Certificate []byte    `json:"certificate"`
		FirstSeen   time.Time `json:"first_seen"`
		LastSeen    time.Time `json:"last_seen"`
	}
	archive := struct {
		Version     int     `json:"version"`
		TrustDomain string  `json:"trust_domain"`
		SVIDs       []entry `json:"x509_authorities"`
	}{Version: 1, TrustDomain: "example.org"}
	const many = 6700
	for i := range many {
		n := *c
		n.PublicKey = key.Public()
		n.SerialNumber = new(big.Int).Add(c.SerialNumber, big.NewInt(int64(i)))
		n.Subject.SerialNumber, n.Subject.Names = n.SerialNumber.String(), nil
		n.NotBefore = epoch.Add(time.Duration(i) * 20 * time.Hour)
		n.NotAfter = n.NotBefore.Add(24 * time.Hour)
		raw, err := x509.CreateCertificate(rand.Reader, &n, &n, key.Public(), key)
		if err != nil {
			t.Fatal(err)
		}
		archive.SVIDs = append(archive.SVIDs, entry{raw, n.NotBefore, n.NotAfter})
	}
	raw, err := json.Marshal(archive)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(w.path("keeper"), 0o700); err != nil {
		t.Fatal(err)
	}
	w.write(t, "keeper/archive.json", string(raw))
	w.now = epoch.Add(many * 20 * time.Hour)
	k := w.keeper(t)
	start := time.Now()
	w.publish(t, k, 1, der)
	wrote := time.Since(start)
	start = time.Now()
	n := len(w.trust(t).Authorities())
	t.Logf("%d authorities in %d bytes, written in %v, opened in %v", n, len(read(t, w.c.TrustFile)), wrote, time.Since(start))
	if n != 6600 {
		t.Errorf("%d authorities", n)
	}
}
