package composer

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"math/big"
	"slices"
	"strings"
	"testing"
	"time"

	composerv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/server/credentialcomposer/v1"
	configv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/service/common/config/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

func configured(t *testing.T, text string) *Plugin {
	t.Helper()
	p := New()
	if _, err := p.Configure(t.Context(), request(text)); err != nil {
		t.Fatal(err)
	}
	return p
}

func request(text string) *configv1.ConfigureRequest {
	return &configv1.ConfigureRequest{CoreConfiguration: &configv1.CoreConfiguration{TrustDomain: "example.org"}, HclConfiguration: text}
}

// usages are those of a certificate made as SPIRE makes one: its own purposes in
// the template, and the extensions that composers returned.
func usages(t *testing.T, a *composerv1.X509SVIDAttributes) []x509.ExtKeyUsage {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	for _, e := range a.GetExtraExtensions() {
		if e.Oid != oidExtKeyUsage.String() {
			continue
		}
		tmpl.ExtraExtensions = append(tmpl.ExtraExtensions, pkix.Extension{Id: oidExtKeyUsage, Value: e.Value, Critical: e.Critical})
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der) // refuses two extensions of one kind
	if err != nil {
		t.Fatal(err)
	}
	if len(c.UnknownExtKeyUsage) > 0 {
		t.Errorf("unknown purposes %v", c.UnknownExtKeyUsage)
	}
	return c.ExtKeyUsage
}

func compose(t *testing.T, p *Plugin, id string, a *composerv1.X509SVIDAttributes) *composerv1.X509SVIDAttributes {
	t.Helper()
	was := proto.CloneOf(a)
	r, err := p.ComposeWorkloadX509SVID(t.Context(), &composerv1.ComposeWorkloadX509SVIDRequest{SpiffeId: id, Attributes: a})
	if err != nil {
		t.Fatal(err)
	}
	if !proto.Equal(was, a) {
		t.Error("the request was changed")
	}
	return r.Attributes
}

func TestAddsCodeSigningToThoseWhoSign(t *testing.T) {
	p := configured(t, `code_signing = ["spiffe://example.org/build/*", "spiffe://example.org/release"]`)
	all := []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageCodeSigning}
	a := &composerv1.X509SVIDAttributes{
		Subject: &composerv1.DistinguishedName{CommonName: "x"}, DnsSans: []string{"a.example.org"},
		ExtraExtensions: []*composerv1.X509Extension{{Oid: "1.2.3", Value: []byte{5, 0}}},
	}
	for _, id := range []string{"spiffe://example.org/build/go", "spiffe://example.org/release"} {
		got := compose(t, p, id, a)
		if u := usages(t, got); !slices.Equal(u, all) {
			t.Errorf("%s: %v", id, u)
		}
		got.ExtraExtensions = got.ExtraExtensions[:1]
		if !proto.Equal(got, a) {
			t.Errorf("%s: more was changed: %v", id, got)
		}
	}
	for _, id := range []string{"spiffe://example.org/web", "spiffe://example.org/build", "spiffe://example.org/build/a/b", "spiffe://other.org/release", ""} {
		if got := compose(t, p, id, a); got != nil {
			t.Errorf("%s: changed to %v", id, got)
		}
	}
}

// What another composer put there stays: a purpose that it took away, too.
func TestJoinsAnExtensionOfAnotherComposer(t *testing.T) {
	p := configured(t, `code_signing = ["spiffe://example.org/build"]`)
	email := asn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 7, 3, 4}
	value, err := asn1.Marshal([]asn1.ObjectIdentifier{oidClientAuth, email})
	if err != nil {
		t.Fatal(err)
	}
	a := &composerv1.X509SVIDAttributes{ExtraExtensions: []*composerv1.X509Extension{{Oid: "2.5.29.37", Value: value, Critical: true}}}
	got := compose(t, p, "spiffe://example.org/build", a)
	want := []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageEmailProtection, x509.ExtKeyUsageCodeSigning}
	if u := usages(t, got); !slices.Equal(u, want) || len(got.ExtraExtensions) != 1 || !got.ExtraExtensions[0].Critical {
		t.Errorf("%v, %v", u, got)
	}
	if again := compose(t, p, "spiffe://example.org/build", got); !proto.Equal(again, got) {
		t.Errorf("a second time: %v", again)
	}
	a.ExtraExtensions[0].Value = []byte("junk")
	if _, err := p.ComposeWorkloadX509SVID(t.Context(), &composerv1.ComposeWorkloadX509SVIDRequest{SpiffeId: "spiffe://example.org/build", Attributes: a}); status.Code(err) != codes.Internal {
		t.Errorf("err = %v", err)
	}
}

func TestRefusesPatternsOfServersAndAgents(t *testing.T) {
	for pattern, ok := range map[string]bool{
		"spiffe://example.org/**":               false,
		"spiffe://example.org/spire/**":         false,
		"spiffe://example.org/spire/server":     false,
		"spiffe://example.org/*/server":         false,
		"spiffe://example.org/*/*":              false,
		"spiffe://example.org/s*/se*r":          false,
		"spiffe://example.org/spire/agent/**":   false,
		"spiffe://example.org/*/a*/tpmnode/*":   false,
		"spiffe://example.org/*/**":             false,
		"spiffe://other.org/build":              false,
		"spiffe://example.org":                  false,
		"build":                                 false,
		"spiffe://example.org/a**":              false,
		"spiffe://example.org/*":                true,
		"spiffe://example.org/spire":            true,
		"spiffe://example.org/build/**":         true,
		"spiffe://example.org/*/build":          true,
		"spiffe://example.org/team/spire/agent": true,
	} {
		p := New()
		_, err := p.Configure(t.Context(), request(`code_signing = ["spiffe://example.org/fine", "`+pattern+`"]`))
		if (err == nil) != ok {
			t.Errorf("%s: err = %v", pattern, err)
		}
	}
	// Even if a pattern slipped through.
	s := configured(t, `code_signing = ["spiffe://example.org/build"]`)
	s.state.Load().patterns = []string{"spiffe://example.org/**"}
	if got := compose(t, s, "spiffe://example.org/spire/agent/tpmnode/x", &composerv1.X509SVIDAttributes{}); got != nil {
		t.Errorf("an agent would sign: %v", got)
	}
}

func TestRefusesConfigurations(t *testing.T) {
	for text, want := range map[string]string{
		"":                                "patterns",
		"code_signing = []":               "patterns",
		"code_signing = [1":               "configuration",
		`code_sining = ["spiffe://a/b"]`:  "unknown key code_sining",
		`code_signing = ["spiffe://x/*"]`: "trust domain",
	} {
		v, err := New().Validate(t.Context(), &configv1.ValidateRequest{CoreConfiguration: request("").CoreConfiguration, HclConfiguration: text})
		if err != nil || v.Valid || !strings.Contains(strings.Join(v.Notes, " "), want) {
			t.Errorf("%q: %v, %v", text, v, err)
		}
	}
	if _, err := New().ComposeWorkloadX509SVID(t.Context(), &composerv1.ComposeWorkloadX509SVIDRequest{}); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("unconfigured: %v", err)
	}
}
