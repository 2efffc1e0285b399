package main

import (
	"bytes"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/internal/forge"
	"github.com/rootlink/rootlink/pkg/svid"
)

func TestSPIFFEIDSection2SchemeAndComponents(t *testing.T) {
	cl := &client{}
	for name, s := range map[string]string{
		"no scheme": "example.org/a", "other scheme": "https://example.org/a", "upper-case scheme": "SPIFFE://example.org/a",
		"no trust domain": "spiffe:///a", "one slash": "spiffe:/example.org/a", "opaque": "spiffe:example.org/a",
		"query": "spiffe://example.org/a?b=c", "empty query": "spiffe://example.org/a?",
		"fragment": "spiffe://example.org/a#b", "empty fragment": "spiffe://example.org/a#",
		"user": "spiffe://u@example.org/a", "port": "spiffe://example.org:443/a", "colon": "spiffe://example.org:/a",
		"no path": "spiffe://example.org", "trailing slash": "spiffe://example.org/a/", "empty": "",
	} {
		if id, err := cl.spiffeID(t.Context(), "--spiffe-id", s); cli.ExitCode(err) != cli.ExitUsage {
			t.Errorf("%s: %v, %v", name, id, err)
		}
	}
	if id, err := cl.spiffeID(t.Context(), "--spiffe-id", "spiffe://example.org/a/B-c_d.e"); err != nil || idString(id) != "spiffe://example.org/a/B-c_d.e" {
		t.Errorf("%v, %v", id, err)
	}
}

// One JWK for each authority, of use x509-svid, with that certificate alone and
// no kid.
func TestX509SVIDSection61BundleDocument(t *testing.T) {
	var certs []*x509.Certificate
	for range 2 {
		c, err := svid.NewAuthority(spiffeid.RequireTrustDomainFromString("example.org"), forge.P256(t), time.Now(), time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		certs = append(certs, c)
	}
	doc, err := bundleDocument(&types.Bundle{TrustDomain: "example.org", SequenceNumber: 7}, certs)
	if err != nil {
		t.Fatal(err)
	}
	var set struct{ Keys []map[string]any }
	if err := json.Unmarshal(doc, &set); err != nil || len(set.Keys) != len(certs) {
		t.Fatalf("%d keys, %v", len(set.Keys), err)
	}
	for i, k := range set.Keys {
		x5c, _ := k["x5c"].([]any)
		if _, kid := k["kid"]; kid || k["use"] != "x509-svid" || len(x5c) != 1 {
			t.Fatalf("key %d: %v", i, k)
		}
		s, _ := x5c[0].(string)
		if der, err := base64.StdEncoding.DecodeString(s); err != nil || !bytes.Equal(der, certs[i].Raw) {
			t.Errorf("key %d is not the authority (%v)", i, err)
		}
	}
}

// JWT-SVID §6.1: one JWK for each signing key, its use jwt-svid, its kid set.
func TestJWTSVIDSection61BundleDocument(t *testing.T) {
	key := forge.P256(t)
	spki, err := x509.MarshalPKIXPublicKey(&key.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	b := &types.Bundle{TrustDomain: "example.org", JwtAuthorities: []*types.JWTKey{{KeyId: "one", PublicKey: spki}, {KeyId: "two", PublicKey: spki}}}
	doc, err := bundleDocument(b, nil)
	if err != nil {
		t.Fatal(err)
	}
	var set struct{ Keys []map[string]any }
	if err := json.Unmarshal(doc, &set); err != nil || len(set.Keys) != 2 {
		t.Fatalf("%d keys, %v", len(set.Keys), err)
	}
	kids := map[any]bool{}
	for _, k := range set.Keys {
		if k["use"] != "jwt-svid" || k["kty"] != "EC" || k["x5c"] != nil || k["d"] != nil {
			t.Error(k)
		}
		kids[k["kid"]] = true
	}
	if !kids["one"] || !kids["two"] {
		t.Error(kids)
	}
	for name, bad := range map[string]*types.JWTKey{"no name": {PublicKey: spki}, "no key": {KeyId: "one"}} {
		if _, err := bundleDocument(&types.Bundle{TrustDomain: "example.org", JwtAuthorities: []*types.JWTKey{bad}}, nil); err == nil {
			t.Error(name)
		}
	}
}
