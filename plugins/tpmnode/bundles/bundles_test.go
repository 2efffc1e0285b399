package bundles

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	publisherv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/server/bundlepublisher/v1"
	"github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/types"
	configv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/service/common/config/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/rootlink/rootlink/pkg/link"
)

func ca(t *testing.T) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "ca"}, NotBefore: time.Now(), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// files makes the operator's files, and returns their directory and plugin_data.
func files(t *testing.T) (dir, data string) {
	t.Helper()
	dir = t.TempDir()
	for _, name := range []string{"maker.pem", "ca.pem"} {
		text := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca(t)})
		if err := os.WriteFile(filepath.Join(dir, name), text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	reqs := `[{"identity":"spiffe://example.org/build","evidence":"detached","tier":"tpm","tools":["*"],"recorders":["*"],"eks":["` + strings.Repeat("ab", 32) + `"]}]`
	if err := os.WriteFile(filepath.Join(dir, "requirements.json"), []byte(reqs), 0o600); err != nil {
		t.Fatal(err)
	}
	return dir, fmt.Sprintf(`
		data_dir = "%[1]s/keeper"
		trust_file = "%[1]s/trust.json"
		attestation_ca_certs = "%[1]s/ca.pem"
		ek_roots = ["%[1]s/maker.pem"]
		requirements = "%[1]s/requirements.json"
		operator = "builders"
		lifetime = "30d"
	`, dir)
}

func configure(data string) *configv1.ConfigureRequest {
	return &configv1.ConfigureRequest{CoreConfiguration: &configv1.CoreConfiguration{TrustDomain: "example.org"}, HclConfiguration: data}
}

func TestPublishedAuthoritiesAreInTrust(t *testing.T) {
	dir, data := files(t)
	p := New(Options{})
	defer p.Close()
	if _, err := p.Configure(t.Context(), configure(data)); err != nil {
		t.Fatal(err)
	}
	b := &types.Bundle{TrustDomain: "example.org", SequenceNumber: 1, X509Authorities: []*types.X509Certificate{{Asn1: ca(t)}, {Asn1: ca(t), Tainted: true}}}
	if _, err := p.PublishBundle(t.Context(), &publisherv1.PublishBundleRequest{Bundle: b}); err != nil {
		t.Fatal(err)
	}
	raw, err := os.ReadFile(filepath.Join(dir, "trust.json"))
	if err != nil {
		t.Fatal(err)
	}
	trust, err := link.OpenUnpinnedTrust(raw)
	if err != nil {
		t.Fatal(err)
	}
	if len(trust.Authorities()) != 2 || trust.Operator() != "builders" || trust.Expires().Sub(trust.Issued()) != 30*24*time.Hour {
		t.Errorf("%d authorities, operator %q, %v", len(trust.Authorities()), trust.Operator(), trust.Expires().Sub(trust.Issued()))
	}
	for name, bad := range map[string]*types.Bundle{"none": nil, "another domain": {TrustDomain: "other.org", X509Authorities: b.X509Authorities}} {
		if _, err := p.PublishBundle(t.Context(), &publisherv1.PublishBundleRequest{Bundle: bad}); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%s: err = %v", name, err)
		}
	}
	// A configuration that fails leaves the one in force.
	if _, err := p.Configure(t.Context(), configure("")); status.Code(err) != codes.InvalidArgument {
		t.Errorf("err = %v", err)
	}
	if _, err := p.PublishBundle(t.Context(), &publisherv1.PublishBundleRequest{Bundle: b}); err != nil {
		t.Error(err)
	}
}

func TestRefusesConfigurations(t *testing.T) {
	dir, data := files(t)
	for text, want := range map[string]string{
		"":                                     "data_dir",
		data + `no_such_key = 1`:               "unknown key no_such_key",
		data + `lifetime = "forever"`:          "lifetime",
		data + `layout_keys = [1]`:             "layout_keys",
		data + `ek_roots = [{}]`:               "ek_roots",
		data + `tsa_chains = "/x,operated=me"`: "operated",
	} {
		v, err := New(Options{}).Validate(t.Context(), &configv1.ValidateRequest{CoreConfiguration: configure("").CoreConfiguration, HclConfiguration: text})
		if err != nil || v.Valid || !strings.Contains(strings.Join(v.Notes, " "), want) {
			t.Errorf("%q: %v, %v", text, v, err)
		}
	}
	v, err := New(Options{}).Validate(t.Context(), &configv1.ValidateRequest{CoreConfiguration: configure("").CoreConfiguration, HclConfiguration: data})
	if err != nil || !v.Valid {
		t.Errorf("%v, %v", v, err)
	}
	if _, err := os.Stat(filepath.Join(dir, "keeper")); err == nil {
		t.Error("Validate made the directory")
	}
	if _, err := New(Options{}).PublishBundle(t.Context(), &publisherv1.PublishBundleRequest{}); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("unconfigured: %v", err)
	}
}
