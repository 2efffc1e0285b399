package svid

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/asn1"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/rootlink/rootlink/internal/forge"
	"github.com/rootlink/rootlink/pkg/attest"
)

var td = spiffeid.RequireTrustDomainFromString("example.org")

func newSigner(t testing.TB, now time.Time, life time.Duration) *Signer {
	t.Helper()
	key := forge.P256(t)
	cert, err := NewAuthority(td, key, now, life)
	if err != nil {
		t.Fatal(err)
	}
	s, err := NewSigner(td, cert, key)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func request(t testing.TB, p Profile, path string, key crypto.PublicKey) Request {
	t.Helper()
	spki, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return Request{Profile: p, ID: spiffeid.RequireFromPath(td, path), PublicKey: key, SPKI: spki, TTL: time.Hour, Now: forge.Epoch()}
}

func issue(t testing.TB, s *Signer, r Request) *x509.Certificate {
	t.Helper()
	token, err := s.Prepare(r)
	if err != nil {
		t.Fatal(err)
	}
	out, err := s.Issue(token)
	if err != nil {
		t.Fatal(err)
	}
	c, err := x509.ParseCertificate(out.DER)
	if err != nil {
		t.Fatal(err)
	}
	if c.SerialNumber.Cmp(out.Serial) != 0 || !c.NotAfter.Equal(out.NotAfter) || !c.NotBefore.Equal(out.NotBefore) || c.URIs[0].String() != out.ID.String() {
		t.Errorf("what is said of the certificate is not in it: %+v", out)
	}
	return c
}

// verified is evidence for one statement, verified as the server does it.
func verified(t testing.TB, bend func(*forge.World)) (*forge.World, *Evidence) {
	t.Helper()
	w := forge.NewWorld(t)
	if bend != nil {
		bend(w)
	}
	record := w.Make(t)
	b := w.Binding()
	b.Payload = nil
	v, _, err := attest.Verify(record, b, w.Options())
	if err != nil {
		t.Fatal(err)
	}
	return w, &Evidence{Record: record, Verified: v}
}

func issuerRequest(t testing.TB, w *forge.World, e *Evidence) Request {
	r := request(t, Issuer, "/build", w.SVIDKey.Public())
	r.Evidence = e
	return r
}

// each issues one certificate of every profile.
func each(t *testing.T, f func(t *testing.T, s *Signer, p Profile, c *x509.Certificate)) {
	s := newSigner(t, forge.Epoch(), 365*24*time.Hour)
	w, e := verified(t, nil)
	for p, r := range map[Profile]Request{
		Workload: request(t, Workload, "/web", forge.P256(t).Public()),
		Minted:   request(t, Minted, "/web", forge.P256(t).Public()),
		Agent:    request(t, Agent, "/spire/agent/tpmnode/00", forge.P256(t).Public()),
		Server:   request(t, Server, "/spire/server", forge.P256(t).Public()),
		Issuer:   issuerRequest(t, w, e),
	} {
		t.Run(p.String(), func(t *testing.T) { f(t, s, p, issue(t, s, r)) })
	}
}

// X509-SVID §2: "an X.509 SVID MUST contain exactly one URI SAN".
func TestX509SVIDSection2ExactlyOneURISAN(t *testing.T) {
	each(t, func(t *testing.T, _ *Signer, _ Profile, c *x509.Certificate) {
		if len(c.URIs) != 1 {
			t.Fatalf("%d URI SANs", len(c.URIs))
		}
		if _, err := x509svid.IDFromCert(c); err != nil {
			t.Fatal(err)
		}
	})
}

// X509-SVID §3.1: a leaf's SPIFFE ID has a path component that is not root.
func TestX509SVIDSection3LeafHasAPath(t *testing.T) {
	s := newSigner(t, forge.Epoch(), time.Hour)
	r := request(t, Workload, "/web", forge.P256(t).Public())
	r.ID = td.ID()
	if _, err := s.Prepare(r); !errors.Is(err, ErrRequest) {
		t.Fatal(err)
	}
}

// X509-SVID §3.2: a signing certificate's SPIFFE ID has no path.
func TestX509SVIDSection3AuthorityHasNoPath(t *testing.T) {
	a := newSigner(t, forge.Epoch(), time.Hour).Authority()
	if len(a.URIs) != 1 || a.URIs[0].String() != "spiffe://example.org" {
		t.Fatal(a.URIs)
	}
}

// X509-SVID §4.1: cA is true in signing certificates and false in leaves.
func TestX509SVIDSection4BasicConstraints(t *testing.T) {
	each(t, func(t *testing.T, s *Signer, _ Profile, c *x509.Certificate) {
		if c.IsCA || !c.BasicConstraintsValid {
			t.Error("the leaf is an authority")
		}
		if a := s.Authority(); !a.IsCA || !a.BasicConstraintsValid || !a.MaxPathLenZero {
			t.Error("the authority is none, or may have intermediates")
		}
	})
}

var (
	oidKeyUsage         = asn1.ObjectIdentifier{2, 5, 29, 15}
	oidBasicConstraints = asn1.ObjectIdentifier{2, 5, 29, 19}
	oidSAN              = asn1.ObjectIdentifier{2, 5, 29, 17}
)

func critical(c *x509.Certificate, id asn1.ObjectIdentifier) bool {
	for _, e := range c.Extensions {
		if e.Id.Equal(id) {
			return e.Critical
		}
	}
	return false
}

// X509-SVID §4.3: key usage is set and critical; signing certificates have
// keyCertSign, leaves digitalSignature and neither keyCertSign nor cRLSign.
func TestX509SVIDSection4KeyUsage(t *testing.T) {
	each(t, func(t *testing.T, s *Signer, _ Profile, c *x509.Certificate) {
		if c.KeyUsage != x509.KeyUsageDigitalSignature || !critical(c, oidKeyUsage) {
			t.Errorf("leaf: %b", c.KeyUsage)
		}
		a := s.Authority()
		if a.KeyUsage != x509.KeyUsageCertSign|x509.KeyUsageCRLSign || !critical(a, oidKeyUsage) || !critical(a, oidBasicConstraints) {
			t.Errorf("authority: %b", a.KeyUsage)
		}
	})
}

// X509-SVID §4.4: with extended key usage present, serverAuth and clientAuth
// are. codeSigning is earned by evidence alone.
func TestX509SVIDSection4ExtendedKeyUsage(t *testing.T) {
	each(t, func(t *testing.T, _ *Signer, p Profile, c *x509.Certificate) {
		has := map[x509.ExtKeyUsage]bool{}
		for _, u := range c.ExtKeyUsage {
			has[u] = true
		}
		if !has[x509.ExtKeyUsageServerAuth] || !has[x509.ExtKeyUsageClientAuth] {
			t.Error(c.ExtKeyUsage)
		}
		if has[x509.ExtKeyUsageCodeSigning] != (p == Issuer) {
			t.Error("codeSigning", c.ExtKeyUsage)
		}
	})
}

// X509-SVID §5.1: validators build a path to an authority of the trust domain.
// RFC 5280 §4.2.1.1 and §4.2.1.2 name the keys; §4.2.1.6 makes the SAN critical
// where the subject is empty.
func TestX509SVIDSection5PathValidation(t *testing.T) {
	each(t, func(t *testing.T, s *Signer, _ Profile, c *x509.Certificate) {
		roots := x509.NewCertPool()
		roots.AddCert(s.Authority())
		if _, err := c.Verify(x509.VerifyOptions{Roots: roots, CurrentTime: forge.Epoch(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err != nil {
			t.Fatal(err)
		}
		if string(c.AuthorityKeyId) != string(s.Authority().SubjectKeyId) || len(c.SubjectKeyId) == 0 {
			t.Error("key identifiers")
		}
		if len(c.Subject.Names) == 0 && !critical(c, oidSAN) {
			t.Error("empty subject and the SAN is not critical")
		}
		if c.SerialNumber.Sign() <= 0 || len(c.SerialNumber.Bytes()) > 20 {
			t.Error("serial", c.SerialNumber)
		}
	})
}

func TestAuthoritySubjectsAreUnique(t *testing.T) {
	a, b := newSigner(t, forge.Epoch(), time.Hour).Authority(), newSigner(t, forge.Epoch(), time.Hour).Authority()
	if a.Subject.SerialNumber == "" || a.Subject.String() == b.Subject.String() {
		t.Fatal(a.Subject, b.Subject)
	}
}

func TestTimes(t *testing.T) {
	s := newSigner(t, forge.Epoch(), 2*time.Hour)
	c := issue(t, s, request(t, Workload, "/web", forge.P256(t).Public()))
	if want := forge.Epoch().Add(-Backdate); !c.NotBefore.Equal(want) {
		t.Errorf("notBefore %v, want %v", c.NotBefore, want)
	}
	if want := forge.Epoch().Add(time.Hour); !c.NotAfter.Equal(want) {
		t.Errorf("notAfter %v, want %v", c.NotAfter, want)
	}
	long := request(t, Workload, "/web", forge.P256(t).Public())
	long.TTL = 1000 * time.Hour
	if c := issue(t, s, long); !c.NotAfter.Equal(s.Authority().NotAfter) {
		t.Errorf("an SVID outlives its authority: %v", c.NotAfter)
	}
	w, e := verified(t, nil)
	r := issuerRequest(t, w, e)
	if c := issue(t, s, r); c.NotAfter.After(forge.Epoch().Add(MaxIssuerTTL)) {
		t.Errorf("an issuer SVID ends %v", c.NotAfter)
	}
}

// A clock an hour off is said, not signed with.
func TestRefusesWhenTheAuthorityIsNotValid(t *testing.T) {
	s := newSigner(t, forge.Epoch(), time.Hour)
	for _, at := range []time.Duration{-time.Hour, time.Hour, 2 * time.Hour} {
		r := request(t, Workload, "/web", forge.P256(t).Public())
		r.Now = forge.Epoch().Add(at)
		if _, err := s.Prepare(r); !errors.Is(err, ErrAuthority) {
			t.Errorf("%v: %v", at, err)
		}
	}
}

func TestRefusesRequests(t *testing.T) {
	s := newSigner(t, forge.Epoch(), time.Hour)
	p256 := forge.P256(t).Public()
	weak, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	ed, _, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	p224, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	with := func(r Request, f func(*Request)) Request { f(&r); return r }
	web := request(t, Workload, "/web", p256)
	for name, r := range map[string]Request{
		"no profile":             with(web, func(r *Request) { r.Profile = 0 }),
		"unknown profile":        with(web, func(r *Request) { r.Profile = 77 }),
		"no ID":                  with(web, func(r *Request) { r.ID = spiffeid.ID{} }),
		"other trust domain":     with(web, func(r *Request) { r.ID = spiffeid.RequireFromString("spiffe://example.com/web") }),
		"workload as agent":      request(t, Workload, "/spire/agent/tpmnode/00", p256),
		"workload as server":     request(t, Workload, "/spire/server", p256),
		"minted as agent":        request(t, Minted, "/spire/agent/tpmnode/00", p256),
		"agent as workload":      request(t, Agent, "/web", p256),
		"server as agent":        request(t, Server, "/spire/agent/tpmnode/00", p256),
		"no TTL":                 with(web, func(r *Request) { r.TTL = 0 }),
		"negative TTL":           with(web, func(r *Request) { r.TTL = -time.Hour }),
		"no time":                with(web, func(r *Request) { r.Now = time.Time{} }),
		"weak RSA":               request(t, Workload, "/web", weak.Public()),
		"Ed25519":                request(t, Workload, "/web", ed),
		"P-224":                  request(t, Workload, "/web", p224.Public()),
		"no key":                 with(web, func(r *Request) { r.PublicKey = nil }),
		"SPKI of another key":    with(web, func(r *Request) { r.SPKI = request(t, Workload, "/web", forge.P256(t).Public()).SPKI }),
		"bad DNS name":           with(web, func(r *Request) { r.DNSNames = []string{"a..b"} }),
		"wildcard in the middle": with(web, func(r *Request) { r.DNSNames = []string{"a.*.example.org"} }),
		"too many DNS names":     with(web, func(r *Request) { r.DNSNames = make([]string, MaxDNSNames+1) }),
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := s.Prepare(r); !errors.Is(err, ErrRequest) {
				t.Fatal(err)
			}
		})
	}
}

func TestRefusesIssuerWithoutEvidence(t *testing.T) {
	s := newSigner(t, forge.Epoch(), time.Hour)
	if _, err := s.Prepare(request(t, Issuer, "/build", forge.P256(t).Public())); !errors.Is(err, ErrEvidence) {
		t.Fatal(err)
	}
}

func TestRefusesUnverifiedEvidence(t *testing.T) {
	s := newSigner(t, forge.Epoch(), time.Hour)
	w, e := verified(t, nil)
	for name, bad := range map[string]*Evidence{
		"no verdict": {Record: e.Record}, "no record": {Verified: e.Verified}, "empty verdict": {Record: e.Record, Verified: new(attest.Verified)},
	} {
		if _, err := s.Prepare(issuerRequest(t, w, bad)); !errors.Is(err, ErrEvidence) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// A verdict on one record does not carry another into a certificate.
func TestRefusesEvidenceOfAnotherSVID(t *testing.T) {
	s := newSigner(t, forge.Epoch(), time.Hour)
	w, e := verified(t, nil)
	_, other := verified(t, nil)
	for name, r := range map[string]Request{
		"record swapped": issuerRequest(t, w, &Evidence{Record: other.Record, Verified: e.Verified}),
		"another key":    func() Request { r := request(t, Issuer, "/build", forge.P256(t).Public()); r.Evidence = e; return r }(),
		"another ID":     func() Request { r := request(t, Issuer, "/deploy", w.SVIDKey.Public()); r.Evidence = e; return r }(),
	} {
		if _, err := s.Prepare(r); !errors.Is(err, ErrEvidence) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// Which evidence goes with which profile.
func TestRefusesEvidenceOfAnotherRole(t *testing.T) {
	s := newSigner(t, forge.Epoch(), time.Hour)
	for name, c := range map[string]struct {
		p    Profile
		path string
		bend func(*forge.World)
	}{
		"issuer without payload":  {Issuer, "/build", func(w *forge.World) { w.Leaf.Payload = [32]byte{} }},
		"issuer without tool":     {Issuer, "/build", func(w *forge.World) { w.Leaf.Tool = [32]byte{} }},
		"issuer without recorder": {Issuer, "/build", func(w *forge.World) { w.Leaf.Recorder = [32]byte{} }},
		"issuer, agent's key":     {Issuer, "/build", func(w *forge.World) { w.Leaf.KeyOrigin = attest.OriginAgent }},
		"workload with payload":   {Workload, "/build", func(w *forge.World) { w.Leaf.KeyOrigin = attest.OriginAgent }},
		"workload, caller's key":  {Workload, "/build", func(w *forge.World) { w.Leaf.Payload = [32]byte{} }},
		"minted":                  {Minted, "/build", nil},
		"agent":                   {Agent, "/spire/agent/tpmnode/00", func(w *forge.World) { w.Leaf.SPIFFEID = "spiffe://example.org/spire/agent/tpmnode/00" }},
	} {
		t.Run(name, func(t *testing.T) {
			w, e := verified(t, c.bend)
			r := request(t, c.p, c.path, w.SVIDKey.Public())
			r.Evidence = e
			if _, err := s.Prepare(r); !errors.Is(err, ErrEvidence) {
				t.Fatal(err)
			}
		})
	}
}

// An SVID whose dates a verifier could never tie to its nonce is not signed.
func TestRefusesOldEvidenceUnderNewDates(t *testing.T) {
	s := newSigner(t, forge.Epoch(), time.Hour)
	w, e := verified(t, nil)
	r := issuerRequest(t, w, e)
	r.Now = r.Now.Add(attest.MaxSVIDAfterNonce + Backdate + time.Second)
	if _, err := s.Prepare(r); !errors.Is(err, ErrEvidence) {
		t.Fatal(err)
	}
}

// A nonce has milliseconds, a certificate has not: whatever the fraction, the
// SVID's dates fit the nonce as evidence.md demands.
func TestNonceWithinTheSecond(t *testing.T) {
	s := newSigner(t, forge.Epoch(), time.Hour)
	for _, ms := range []int{0, 1, 500, 999} {
		at := forge.Epoch().Add(time.Duration(ms) * time.Millisecond)
		w, e := verified(t, func(w *forge.World) {
			w.Leaf.Nonce = attest.NewNonceMaker([32]byte{1}).Make("spiffe://example.org/spire/agent/tpmnode/00", at)
		})
		r := issuerRequest(t, w, e)
		r.Now = at
		c := issue(t, s, r)
		b := w.Binding()
		b.SVIDNotBefore = c.NotBefore
		rec, err := attest.FromCertificate(c)
		if err != nil {
			t.Fatal(err)
		}
		if _, _, err := attest.Verify(rec, b, w.Options()); err != nil {
			t.Errorf("%d ms: %v", ms, err)
		}
	}
}

func TestTokenIsRedeemedOnceByItsOwnSigner(t *testing.T) {
	s, other := newSigner(t, forge.Epoch(), time.Hour), newSigner(t, forge.Epoch(), time.Hour)
	token, err := s.Prepare(request(t, Workload, "/web", forge.P256(t).Public()))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := other.Issue(token); !errors.Is(err, ErrTokenUsed) {
		t.Fatal(err)
	}
	for _, bad := range []*Token{nil, new(Token)} {
		if _, err := s.Issue(bad); !errors.Is(err, ErrTokenUsed) {
			t.Fatal(err)
		}
	}
	var wg sync.WaitGroup
	var signed atomic.Int32
	for range 8 {
		wg.Go(func() {
			if _, err := s.Issue(token); err == nil {
				signed.Add(1)
			}
		})
	}
	wg.Wait()
	if signed.Load() != 1 {
		t.Fatalf("one token, %d SVIDs", signed.Load())
	}
}

func TestRefusesSignerOfAnotherKeyOrDomain(t *testing.T) {
	s := newSigner(t, forge.Epoch(), time.Hour)
	key := forge.P256(t)
	if _, err := NewSigner(td, s.Authority(), key); !errors.Is(err, ErrAuthority) {
		t.Error(err)
	}
	cert, err := NewAuthority(spiffeid.RequireTrustDomainFromString("example.com"), key, forge.Epoch(), time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := NewSigner(td, cert, key); !errors.Is(err, ErrAuthority) {
		t.Error(err)
	}
	leaf := issue(t, s, request(t, Workload, "/web", key.Public()))
	if _, err := NewSigner(td, leaf, key); !errors.Is(err, ErrAuthority) {
		t.Error(err)
	}
}

func TestCheckDNSName(t *testing.T) {
	for name, ok := range map[string]bool{
		"example.org": true, "*.example.org": true, "a_b.example": true, "A-1": true, "x": true,
		"": false, "*": false, "a..b": false, "-a": false, "a-": false, "a b": false, "*a.b": false, "a.*": false, ".a": false, "a.": false, "ä.de": false,
	} {
		if err := CheckDNSName(name); (err == nil) != ok {
			t.Errorf("%q: %v", name, err)
		}
	}
}

func BenchmarkIssue(b *testing.B) {
	s := newSigner(b, forge.Epoch(), 365*24*time.Hour)
	r := request(b, Minted, "/web", forge.P256(b).Public())
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			token, err := s.Prepare(r)
			if err != nil {
				b.Fatal(err)
			}
			if _, err := s.Issue(token); err != nil {
				b.Fatal(err)
			}
		}
	})
}
