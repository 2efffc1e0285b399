package attest_test

import (
	"bytes"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/hex"
	"errors"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/rootlink/rootlink/internal/forge"
	"github.com/rootlink/rootlink/pkg/attest"
)

func TestAKCertificateRoundTrip(t *testing.T) {
	m := forge.NewMaker(t, "Forge Semiconductor")
	ca := forge.NewAttestationCA(t, nil)
	for _, o := range []forge.TPMOptions{{}, {RSAAK: true}} {
		p := forge.NewTPM(t, m, o)
		for _, root := range []*x509.Certificate{m.Root, nil} {
			s := forge.Statement(p, root)
			c := ca.Certify(t, s, p.AKKey(), forge.Epoch(), nil)
			got, err := attest.ParseAKCertificate(c)
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(&s, got); d != "" {
				t.Error(d)
			}
			if len(c.URIs) != 0 {
				t.Error("an AK certificate with a URI could be taken for an SVID")
			}
			// Nobody else's verifier may take it for a certificate of its own.
			if _, err := c.Verify(x509.VerifyOptions{Roots: pool(ca.Cert), CurrentTime: forge.Epoch(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err == nil {
				t.Error("x509.Verify, which does not know the SAN, accepts the certificate")
			}
		}
	}
}

func pool(c *x509.Certificate) *x509.CertPool {
	p := x509.NewCertPool()
	p.AddCert(c)
	return p
}

func TestRefusesAKCertificate(t *testing.T) {
	m := forge.NewMaker(t, "Forge Semiconductor")
	ca := forge.NewAttestationCA(t, nil)
	p := forge.NewTPM(t, m, forge.TPMOptions{})
	statement := func(c *x509.Certificate) *pkix.Extension { return &c.ExtraExtensions[1] }
	san := func(c *x509.Certificate) *pkix.Extension { return &c.ExtraExtensions[0] }
	for name, bend := range map[string]func(*x509.Certificate){
		"EKU of an SVID": func(c *x509.Certificate) {
			c.UnknownExtKeyUsage, c.ExtKeyUsage = nil, []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
		},
		"EKU of an SVID beside its own": func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth} },
		"no EKU":                        func(c *x509.Certificate) { c.UnknownExtKeyUsage = nil },
		"CA":                            func(c *x509.Certificate) { c.IsCA, c.KeyUsage = true, c.KeyUsage|x509.KeyUsageCertSign },
		"no basic constraints":          func(c *x509.Certificate) { c.BasicConstraintsValid = false },
		"key usage":                     func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageKeyAgreement },
		"subject":                       func(c *x509.Certificate) { c.Subject.CommonName = "node" },
		"life over a day":               func(c *x509.Certificate) { c.NotAfter = c.NotAfter.Add(time.Second) },
		"SAN not critical":              func(c *x509.Certificate) { san(c).Critical = false },
		"SAN with a SPIFFE ID as well": func(c *x509.Certificate) {
			uri := append([]byte{0x86, 8}, "spiffe:/"...)
			v := append(bytes.Clone(san(c).Value), uri...)
			v[1] += byte(len(uri))
			san(c).Value = v
		},
		"SAN with a SPIFFE ID instead": func(c *x509.Certificate) {
			c.ExtraExtensions = c.ExtraExtensions[1:]
			c.URIs = []*url.URL{{Scheme: "spiffe", Host: "example.org", Path: "/build"}}
		},
		"EK hash in capitals": func(c *x509.Certificate) {
			v := bytes.Clone(san(c).Value)
			h := []byte(hex.EncodeToString(p.EKHash[:]))
			copy(v[bytes.Index(v, h):], bytes.ToUpper(h))
			v[bytes.Index(v, bytes.ToUpper(h))] = 'A'
			san(c).Value = v
		},
		"no statement":       func(c *x509.Certificate) { c.ExtraExtensions = c.ExtraExtensions[:1] },
		"statement critical": func(c *x509.Certificate) { statement(c).Critical = true },
		"statement twice": func(c *x509.Certificate) {
			c.ExtraExtensions = append(c.ExtraExtensions, *statement(c))
		},
		"statement malformed": func(c *x509.Certificate) { statement(c).Value = statement(c).Value[:20] },
		"evidence as statement": func(c *x509.Certificate) {
			x, err := forge.NewWorld(t).Make(t).Extension()
			if err != nil {
				t.Fatal(err)
			}
			*statement(c) = x
		},
		"extension that does not belong there": func(c *x509.Certificate) {
			c.ExtraExtensions = append(c.ExtraExtensions, pkix.Extension{Id: asn1.ObjectIdentifier{1, 2, 3}, Value: []byte{5, 0}})
		},
		"name constraints": func(c *x509.Certificate) { c.PermittedDNSDomains = []string{"a"} },
	} {
		t.Run(name, func(t *testing.T) {
			der, err := forge.TrySign(ca, forge.Statement(p, m.Root), p.AKKey(), bend)
			if err != nil {
				t.Fatal(err)
			}
			c, err := x509.ParseCertificate(der)
			if err != nil && name == "statement twice" {
				return // Go's parser is first to refuse it
			}
			if err != nil {
				t.Fatal(err)
			}
			if s, err := attest.ParseAKCertificate(c); !errors.Is(err, attest.ErrAKCert) {
				t.Errorf("got %v, %v", s, err)
			}
		})
	}
	t.Run("no authority key identifier", func(t *testing.T) {
		bare := forge.NewAttestationCA(t, func(c *x509.Certificate) { c.IsCA, c.MaxPathLenZero, c.KeyUsage = false, false, 0 })
		c := bare.Certify(t, forge.Statement(p, m.Root), p.AKKey(), forge.Epoch(), nil)
		if _, err := attest.ParseAKCertificate(c); !errors.Is(err, attest.ErrAKCert) {
			t.Error(err)
		}
	})
	t.Run("key that no AK has", func(t *testing.T) {
		big := forge.NewTPM(t, m, forge.TPMOptions{EK: forge.EKRSA3072})
		k, err := x509.ParseCertificate(big.EKChain[0])
		if err != nil {
			t.Fatal(err)
		}
		c := ca.Certify(t, forge.Statement(p, m.Root), k.PublicKey, forge.Epoch(), nil)
		if _, err := attest.ParseAKCertificate(c); !errors.Is(err, attest.ErrAKCert) {
			t.Error(err)
		}
	})
}

func TestRefusesAKTemplate(t *testing.T) {
	m := forge.NewMaker(t, "Forge Semiconductor")
	p := forge.NewTPM(t, m, forge.TPMOptions{})
	now := forge.Epoch()
	for name, c := range map[string]struct {
		bend func(*attest.AKStatement)
		life time.Duration
	}{
		"life over a day":           {life: 25 * time.Hour},
		"no life":                   {life: 0},
		"basis unknown":             {life: time.Hour, bend: func(s *attest.AKStatement) { s.EKBasis = "cloud" }},
		"maker without a root":      {life: time.Hour, bend: func(s *attest.AKStatement) { s.EKRoot = [32]byte{} }},
		"allow-list with a root":    {life: time.Hour, bend: func(s *attest.AKStatement) { s.EKBasis = attest.BasisAllowList }},
		"no AK name":                {life: time.Hour, bend: func(s *attest.AKStatement) { s.AKName = nil }},
		"control characters":        {life: time.Hour, bend: func(s *attest.AKStatement) { s.Firmware = "\x1b[2J" }},
		"manufacturer without end":  {life: time.Hour, bend: func(s *attest.AKStatement) { s.Manufacturer = strings.Repeat("x", 65) }},
		"manufacturer not UTF-8":    {life: time.Hour, bend: func(s *attest.AKStatement) { s.Manufacturer = "\xff" }},
		"AK name of a handle alone": {life: time.Hour, bend: func(s *attest.AKStatement) { s.AKName = []byte{0x40, 0, 0, 1} }},
	} {
		s := forge.Statement(p, m.Root)
		if c.bend != nil {
			c.bend(&s)
		}
		if _, err := attest.AKTemplate(s, now, now.Add(c.life)); !errors.Is(err, attest.ErrAKCert) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestOpenSSLReadsAKCertificate lets a peer judge the encoding: it must name
// the EKU and the permanentIdentifier, and verify the signature.
func TestOpenSSLReadsAKCertificate(t *testing.T) {
	if _, err := exec.LookPath("openssl"); err != nil {
		t.Fatal("openssl is needed: ", err)
	}
	m := forge.NewMaker(t, "Forge Semiconductor")
	ca := forge.NewAttestationCA(t, nil)
	p := forge.NewTPM(t, m, forge.TPMOptions{})
	c := ca.Certify(t, forge.Statement(p, m.Root), p.AKKey(), forge.Epoch(), nil)
	dir := t.TempDir()
	file := filepath.Join(dir, "ak.der")
	if err := os.WriteFile(file, c.Raw, 0o600); err != nil {
		t.Fatal(err)
	}
	text, err := exec.Command("openssl", "x509", "-inform", "der", "-in", file, "-noout", "-text").CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, text)
	}
	dump, err := exec.Command("openssl", "asn1parse", "-inform", "der", "-in", file).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, dump)
	}
	var san []byte
	for _, x := range c.Extensions {
		if x.Id.Equal(asn1.ObjectIdentifier{2, 5, 29, 17}) {
			san = x.Value
		}
	}
	sanFile := filepath.Join(dir, "san.der")
	if err := os.WriteFile(sanFile, san, 0o600); err != nil {
		t.Fatal(err)
	}
	sanDump, err := exec.Command("openssl", "asn1parse", "-inform", "der", "-in", sanFile).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, sanDump)
	}
	for _, want := range []string{"Subject Alternative Name: critical", "2.23.133.8.3"} {
		if !strings.Contains(string(text), want) {
			t.Errorf("openssl does not show %q in\n%s", want, text)
		}
	}
	for _, want := range []string{"UTF8STRING        :" + hex.EncodeToString(p.EKHash[:]), "2.23.133.12.1"} {
		if !strings.Contains(string(sanDump), want) {
			t.Errorf("openssl does not show %q in\n%s", want, sanDump)
		}
	}
}

func FuzzParseAKCertificate(f *testing.F) {
	m := forge.NewMaker(f, "Forge Semiconductor")
	ca := forge.NewAttestationCA(f, nil)
	p := forge.NewTPM(f, m, forge.TPMOptions{})
	f.Add(ca.Certify(f, forge.Statement(p, m.Root), p.AKKey(), forge.Epoch(), nil).Raw)
	f.Add(ca.Certify(f, forge.Statement(p, nil), p.AKKey(), forge.Epoch(), nil).Raw)
	f.Add(p.EKChain[0])
	f.Fuzz(func(t *testing.T, der []byte) {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return
		}
		s, err := attest.ParseAKCertificate(c)
		if err != nil {
			return
		}
		again, err := attest.AKTemplate(*s, c.NotBefore, c.NotAfter)
		if err != nil {
			t.Fatal(err)
		}
		for _, want := range again.ExtraExtensions {
			found := false
			for _, x := range c.Extensions {
				found = found || x.Id.Equal(want.Id) && x.Critical == want.Critical && bytes.Equal(x.Value, want.Value)
			}
			if !found {
				t.Errorf("%v is not what was parsed", want.Id)
			}
		}
	})
}
