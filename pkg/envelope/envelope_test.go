package envelope

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"errors"
	"fmt"
	"strings"
	"testing"
)

const kind = "application/vnd.example.v1+json"

func keys(t testing.TB) (p256 *ecdsa.PrivateKey, ed ed25519.PrivateKey) {
	t.Helper()
	p256, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	_, ed, err = ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return p256, ed
}

func signed(t testing.TB, ks ...crypto.Signer) []byte {
	t.Helper()
	raw, err := Sign(kind, []byte(`{"a":1}`), ks...)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

func TestEnvelopeOfTwoKeys(t *testing.T) {
	p256, ed := keys(t)
	stranger, _ := keys(t)
	e, err := Open(signed(t, p256, ed), kind, 100)
	if err != nil {
		t.Fatal(err)
	}
	if string(e.UnverifiedPayload()) != `{"a":1}` {
		t.Errorf("payload %s", e.UnverifiedPayload())
	}
	for _, c := range []struct {
		keys []crypto.PublicKey
		want int
	}{
		{[]crypto.PublicKey{p256.Public(), ed.Public()}, 2},
		{[]crypto.PublicKey{ed.Public(), stranger.Public()}, 1},
		{[]crypto.PublicKey{ed.Public(), ed.Public()}, 1}, // one key named twice is one
	} {
		by, err := e.Verify(c.keys)
		if err != nil || len(by) != c.want {
			t.Errorf("signed by %v, %v; want %d", by, err, c.want)
		}
	}
	for _, none := range [][]crypto.PublicKey{{stranger.Public()}, nil} {
		if by, err := e.Verify(none); !errors.Is(err, ErrForeign) {
			t.Errorf("signed by %v, %v", by, err)
		}
	}
}

func TestRefusesAnotherKindOfDocument(t *testing.T) {
	p256, _ := keys(t)
	if _, err := Open(signed(t, p256), "application/vnd.other+json", 100); !errors.Is(err, ErrMalformed) {
		t.Errorf("got %v", err)
	}
	// The same under a relabelled type: the signature covers it.
	e, err := Open(bytes.ReplaceAll(signed(t, p256), []byte(kind), []byte("application/vnd.other+json")), "application/vnd.other+json", 100)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := e.Verify([]crypto.PublicKey{p256.Public()}); !errors.Is(err, ErrBadSignature) {
		t.Errorf("got %v", err)
	}
}

func TestRefusesUnsignedDocument(t *testing.T) {
	for _, raw := range []string{`{"format":"rootlink-trust"}`, `{"payloadType":"` + kind + `","payload":"e30=","signatures":[]}`} {
		if _, err := Open([]byte(raw), kind, 100); !errors.Is(err, ErrUnsigned) {
			t.Errorf("%s: %v", raw, err)
		}
	}
}

func TestRefusesChangedPayload(t *testing.T) {
	p256, ed := keys(t)
	e, err := Open(signed(t, p256, ed), kind, 100)
	if err != nil {
		t.Fatal(err)
	}
	e.payload = []byte(`{"a":2}`)
	for _, k := range []crypto.PublicKey{p256.Public(), ed.Public()} {
		if _, err := e.Verify([]crypto.PublicKey{k}); !errors.Is(err, ErrBadSignature) {
			t.Errorf("%T: %v", k, err)
		}
	}
	// Without its key ID a bad signature is just nobody's.
	for i := range e.signatures {
		e.signatures[i].keyID = ""
	}
	if _, err := e.Verify([]crypto.PublicKey{p256.Public()}); !errors.Is(err, ErrForeign) {
		t.Errorf("got %v", err)
	}
}

func TestRefusesMalformedEnvelopes(t *testing.T) {
	p256, _ := keys(t)
	good := string(signed(t, p256))
	many := strings.Repeat(`{"keyid":"","sig":"AAAA"},`, 10_000)
	for name, raw := range map[string]string{
		"two payload types":  strings.Replace(good, `"payloadType"`, `"payloadType":"`+kind+`","payloadType"`, 1),
		"duplicate payload":  strings.Replace(good, `"payload"`, `"payload":"e30=","payload"`, 1),
		"duplicate by case":  strings.Replace(good, `"payload":`, `"Payload":"e30=","payload":`, 1),
		"unknown key":        strings.Replace(good, `"payload":`, `"colour":1,"payload":`, 1),
		"10,000 signatures":  strings.Replace(good, `"signatures":[`, `"signatures":[`+many, 1),
		"17 signatures":      strings.Replace(good, `"signatures":[`, `"signatures":[`+strings.Repeat(`{"keyid":"","sig":"AAAA"},`, 16), 1),
		"empty signature":    strings.Replace(good, `"signatures":[`, `"signatures":[{"keyid":"","sig":""},`, 1),
		"not base64":         strings.Replace(good, `"signatures":[`, `"signatures":[{"keyid":"","sig":"*"},`, 1),
		"long key ID":        strings.Replace(good, `"keyid":"`, `"keyid":"`+strings.Repeat("a", 1000), 1),
		"data after it":      good + "{}",
		"payload over limit": fmt.Sprintf(`{"payloadType":%q,"payload":%q,"signatures":[{"keyid":"","sig":"AAAA"}]}`, kind, strings.Repeat("AAAA", 100)),
		"null":               "null",
		"array":              "[]",
	} {
		t.Run(name, func(t *testing.T) {
			if e, err := Open([]byte(raw), kind, 100); !errors.Is(err, ErrMalformed) && !errors.Is(err, ErrUnsigned) {
				t.Errorf("got %+v, %v", e, err)
			}
		})
	}
}

func TestRefusesOtherKindsOfKeys(t *testing.T) {
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Sign(kind, nil, p384); !errors.Is(err, ErrKey) {
		t.Errorf("got %v", err)
	}
	if _, err := Sign(kind, nil); !errors.Is(err, ErrKey) {
		t.Errorf("no key: %v", err)
	}
}

func FuzzOpen(f *testing.F) {
	p256, ed := keys(f)
	f.Add(signed(f, p256))
	f.Add(signed(f, p256, ed))
	f.Add([]byte(`{"payload":1}`))
	pubs := []crypto.PublicKey{p256.Public(), ed.Public()}
	f.Fuzz(func(t *testing.T, raw []byte) {
		e, err := Open(raw, kind, 1000)
		if err != nil {
			return
		}
		if len(e.signatures) == 0 || len(e.signatures) > MaxSignatures || len(e.payload) > 1000 {
			t.Error("over a limit")
		}
		_, _ = e.Verify(pubs)
	})
}
