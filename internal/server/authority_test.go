package server

import (
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/rootlink/rootlink/internal/forge"
	"github.com/rootlink/rootlink/pkg/svid"
	nodev1 "github.com/rootlink/rootlink/proto/rootlink/node/v1"
)

func (n *node) tlsCert() *tls.Certificate {
	return &tls.Certificate{Certificate: [][]byte{n.cert.Raw}, PrivateKey: n.key}
}

// maintain does what the rotation loop would at this time.
func (w *world) maintain() {
	w.t.Helper()
	if _, err := w.srv.authorities.maintain(w.t.Context()); err != nil {
		w.t.Fatal(err)
	}
}

// issuedBy returns which authority signs now.
func (w *world) issuedBy() string {
	w.t.Helper()
	c := w.mint("/probe")
	leaf, err := x509.ParseCertificate(c.Certificate[0])
	if err != nil {
		w.t.Fatal(err)
	}
	return hex.EncodeToString(leaf.AuthorityKeyId)
}

// One authority after the other, over three lives: the next is in the bundle
// long before it signs, and who holds the bundle of then can verify the server
// of now.
func TestAuthoritiesRotate(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.AuthorityTTL = 12 * 24 * time.Hour })
	known := map[string]time.Time{} // authority → when a peer first saw it
	signed := map[string]bool{}
	for range 3 * 12 * 24 {
		w.clock.add(time.Hour)
		w.maintain()
		for _, a := range bundleOf(t, w.admin).X509Authorities {
			c, err := x509.ParseCertificate(a.Asn1)
			if err != nil {
				t.Fatal(err)
			}
			if _, ok := known[svid.AuthorityID(c)]; !ok {
				known[svid.AuthorityID(c)] = w.clock.Now()
			}
		}
		by := w.issuedBy()
		if !signed[by] && len(signed) > 0 {
			if lead := w.clock.Now().Sub(known[by]); lead < 24*time.Hour {
				t.Fatalf("an authority signs %v after peers could know it", lead)
			}
		}
		signed[by] = true
		own := w.srv.authorities.own.Load().Leaf
		if _, ok := known[hex.EncodeToString(own.AuthorityKeyId)]; !ok || w.clock.Now().After(own.NotAfter) {
			t.Fatal("no peer can verify the server's own SVID")
		}
	}
	if len(signed) < 4 {
		t.Fatalf("%d authorities in three lives", len(signed))
	}
	// All are on record for ever, at most one of them active, and the keys of
	// those long retired are gone.
	all, err := w.srv.Authorities()
	if err != nil || len(all) < len(signed) {
		t.Fatal(len(all), err)
	}
	active := 0
	for _, a := range all {
		if a.State == svid.Active {
			active++
		}
		if a.State == svid.Retired && (a.ActivatedAt.IsZero() || a.RetiredAt.Before(a.ActivatedAt)) {
			t.Errorf("windows %+v", a)
		}
	}
	keys, err := filepath.Glob(filepath.Join(w.cfg.DataDir, "authority-*.key"))
	if err != nil || active != 1 || len(keys) > 2 {
		t.Fatalf("%d active, %d keys, %v", active, len(keys), err)
	}
	w.stop()
	w.start()
	w.issuedBy()
}

// An agent that only knew the bundle of before must still be able to reach the
// server right after a forced rotation.
func TestForcedRotationKeepsPeersConnected(t *testing.T) {
	w := newWorld(t, nil)
	n := w.attest(w.newTPM(), attestOptions{})
	before := w.issuedBy()
	cert, err := w.srv.RotateAuthority(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if by := w.issuedBy(); by == before || by != svid.AuthorityID(cert) {
		t.Fatal("the new authority does not sign")
	}
	w.clock.add(publishLead / 2)
	w.srv.authorities.own.Store(nil) // as after a restart
	w.maintain()
	if own := hex.EncodeToString(w.srv.authorities.own.Load().Leaf.AuthorityKeyId); own != before {
		t.Fatal("the server's own SVID uses an authority that peers do not know yet")
	}
	w.clock.add(publishLead)
	w.srv.authorities.own.Store(nil)
	w.maintain()
	if own := hex.EncodeToString(w.srv.authorities.own.Load().Leaf.AuthorityKeyId); own == before {
		t.Fatal("the server's own SVID stays behind")
	}
	// The agent's SVID, signed by the one before, is still good.
	n.conn = w.dialTCP(n.tlsCert())
	if err := n.sync(); err != nil {
		t.Fatal(err)
	}
}

// The server's clock jumps back an hour: it says so rather than signing with
// dates that nobody could accept, and goes on when the clock is right.
func TestClockAnHourOff(t *testing.T) {
	w := newWorld(t, nil)
	n := w.attest(w.newTPM(), attestOptions{})
	step := w.create(entry(n.id, "/build", stepSelectorsOf("go")...))
	key := forge.P256(t)
	id, _ := spiffeURL("spiffe://" + td + "/x")
	mint := func() error {
		_, err := svidv1.NewSVIDClient(w.admin).MintX509SVID(t.Context(), &svidv1.MintX509SVIDRequest{Csr: newCSR(t, key, &x509.CertificateRequest{URIs: id})})
		return err
	}
	csr := n.csr(n.step("/build"))
	w.clock.add(-time.Hour)
	if err := mint(); status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "clock") {
		t.Fatal(err)
	}
	n.refused("evidence_nonce_fresh", step, csr) // a nonce of the future
	w.clock.add(time.Hour)
	if err := mint(); err != nil {
		t.Fatal(err)
	}
	if _, err := n.sign(step, csr); err != nil {
		t.Fatal(err)
	}
}

// OpenSSL, which shares no code with us, accepts the SVIDs against the
// exported authority.
func TestOpenSSLVerifies(t *testing.T) {
	openssl, err := exec.LookPath("openssl")
	if err != nil {
		t.Fatal("openssl is needed as the judge: ", err)
	}
	w, n, step, workload := issuer(t, nil)
	dir := t.TempDir()
	write := func(name string, ders ...[]byte) string {
		t.Helper()
		var b []byte
		for _, der := range ders {
			b = append(b, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})...)
		}
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	ca := write("ca.pem", bundleOf(t, w.admin).X509Authorities[0].Asn1)
	issuerSVID, err := n.sign(step, n.csr(n.step("/build")))
	if err != nil {
		t.Fatal(err)
	}
	withEvidence, err := n.sign(workload, n.csr(n.web()))
	if err != nil {
		t.Fatal(err)
	}
	at := fmt.Sprint(w.clock.Now().Unix())
	for purpose, der := range map[string][]byte{
		"sslserver": withEvidence.Raw, "sslclient": n.cert.Raw, "any": issuerSVID.Raw,
	} {
		out, err := exec.Command(openssl, "verify", "-x509_strict", "-purpose", purpose, "-attime", at, "-CAfile", ca, write(purpose+".pem", der)).CombinedOutput()
		if err != nil {
			t.Errorf("%s: %v: %s", purpose, err, out)
		}
	}
	stranger := forge.P256(t)
	other := forge.Sign(t, &x509.Certificate{URIs: n.cert.URIs, NotBefore: n.cert.NotBefore, NotAfter: n.cert.NotAfter}, nil, stranger.Public(), stranger)
	if out, err := exec.Command(openssl, "verify", "-attime", at, "-CAfile", ca, write("other.pem", other.Raw)).CombinedOutput(); err == nil {
		t.Errorf("the judge accepts anything: %s", out)
	}
}

// What an agent with only a join line does.
func TestSignedBundle(t *testing.T) {
	w := newWorld(t, nil)
	client := nodev1.NewNodeClient(w.dialTCP(nil))
	if _, err := client.GetSignedBundle(t.Context(), &nodev1.GetSignedBundleRequest{Nonce: make([]byte, 31)}); status.Code(err) != codes.InvalidArgument {
		t.Fatal(err)
	}
	nonce := hashOf("mine")
	resp, err := client.GetSignedBundle(t.Context(), &nodev1.GetSignedBundleRequest{Nonce: nonce[:]})
	if err != nil {
		t.Fatal(err)
	}
	pin := sha256.Sum256(resp.TrustKey)
	if want := "rootlink-join:v1:" + td + ":" + hex.EncodeToString(pin[:]); w.srv.JoinLine() != want {
		t.Fatalf("join line %s, want %s", w.srv.JoinLine(), want)
	}
	key, err := x509.ParsePKIXPublicKey(resp.TrustKey)
	if err != nil {
		t.Fatal(err)
	}
	digest := sha256.Sum256(append([]byte("rootlink/bundle/v1\x00"), resp.Bundle...))
	if !ecdsa.VerifyASN1(key.(*ecdsa.PublicKey), digest[:], resp.Signature) {
		t.Fatal("signature")
	}
	var sb nodev1.SignedBundle
	if err := proto.Unmarshal(resp.Bundle, &sb); err != nil {
		t.Fatal(err)
	}
	if string(sb.Nonce) != string(nonce[:]) || sb.TrustDomain != td || len(sb.X509Authorities) != 1 || sb.IssuedUnix != w.clock.Now().Unix() {
		t.Fatalf("%v", &sb)
	}
}

func TestNonceAndConfig(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.EvidencePatterns = []string{"spiffe://" + td + "/db/**"} })
	n := w.attest(w.newTPM(), attestOptions{})
	c, err := nodev1.NewNodeClient(n.conn).GetConfig(t.Context(), &nodev1.GetConfigRequest{})
	if err != nil || len(c.EvidencePatterns) != 1 || len(c.QuotePcrs) != 1 || len(c.QuotePcrs[0].Indices) != 16 {
		t.Fatal(c, err)
	}
	resp, err := nodev1.NewNodeClient(n.conn).GetNonce(t.Context(), &nodev1.GetNonceRequest{})
	if err != nil || len(resp.Nonce) != 32 {
		t.Fatal(resp, err)
	}
	if err := w.srv.nonces.Check([32]byte(resp.Nonce), n.id, w.clock.Now()); err != nil {
		t.Fatal(err)
	}
}
