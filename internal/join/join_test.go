package join

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"errors"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	nodev1 "github.com/rootlink/rootlink/proto/rootlink/node/v1"
)

func TestLineHasOneSpelling(t *testing.T) {
	hash := strings.Repeat("ab", 32)
	good := "rootlink-join:v1:example.org:" + hash
	l, err := Parse(good)
	if err != nil || l.String() != good || l.TrustDomain.Name() != "example.org" || l.TrustKey[0] != 0xab {
		t.Errorf("%v %v", l, err)
	}
	for _, bad := range []string{
		"", "rootlink-join:v2:example.org:" + hash, "join:v1:example.org:" + hash, "rootlink-join:v1:example.org:" + hash[2:],
		"rootlink-join:v1:example.org:" + strings.ToUpper(hash), "rootlink-join:v1:Example.org:" + hash, "rootlink-join:v1::" + hash,
		"rootlink-join:v1:spiffe://example.org:" + hash, good + ":", " " + good,
	} {
		if _, err := Parse(bad); err == nil {
			t.Errorf("accepted %q", bad)
		}
	}
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// TestRefusesBundles: each is one that somebody in between could send.
func TestRefusesBundles(t *testing.T) {
	td := spiffeid.RequireTrustDomainFromString("example.org")
	key, nonce := newKey(t), [32]byte{1}
	line, err := NewLine(td, &key.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	answer := func(key *ecdsa.PrivateKey, td string, nonce [32]byte) *nodev1.GetSignedBundleResponse {
		r, err := Sign(key, &nodev1.SignedBundle{TrustDomain: td, Nonce: nonce[:], IssuedUnix: 1})
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	if b, err := Verify(answer(key, "example.org", nonce), line, nonce); err != nil || b.IssuedUnix != 1 {
		t.Fatalf("the good one: %v, %v", b, err)
	}
	changed := answer(key, "example.org", nonce)
	changed.Bundle = append(changed.Bundle, changed.Bundle...)
	for name, r := range map[string]*nodev1.GetSignedBundleResponse{
		"another key":          answer(newKey(t), "example.org", nonce),
		"changed since":        changed,
		"replayed":             answer(key, "example.org", [32]byte{2}),
		"nothing":              {},
		"key without anything": {TrustKey: changed.TrustKey},
	} {
		if _, err := Verify(r, line, nonce); !errors.Is(err, ErrTrustKey) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := Verify(answer(key, "other.org", nonce), line, nonce); err == nil {
		t.Error("a bundle of another trust domain")
	}
}
