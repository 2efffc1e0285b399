package link

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/rootlink/rootlink/pkg/envelope"
)

func trustKey(t testing.TB, key *ecdsa.PrivateKey) TrustKey {
	t.Helper()
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	return TrustKey{Key: der}
}

// signedFile signs the test's trust.json with a new key.
func signedFile(t testing.TB, bend func(*TrustFile)) (*ecdsa.PrivateKey, []byte) {
	t.Helper()
	key, _ := testSigner(t)
	f := testTrustFile(t)
	f.TrustKeys = []TrustKey{trustKey(t, key)}
	if bend != nil {
		bend(&f)
	}
	doc, err := f.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	raw, err := SignTrust(doc, key)
	if err != nil {
		t.Fatal(err)
	}
	return key, raw
}

func signedTrust(t testing.TB, bend func(*TrustFile)) (*ecdsa.PrivateKey, *Trust) {
	t.Helper()
	key, raw := signedFile(t, bend)
	trust, err := OpenUnpinnedTrust(raw)
	if err != nil {
		t.Fatal(err)
	}
	return key, trust
}

func idOf(t testing.TB, key *ecdsa.PrivateKey) string {
	t.Helper()
	id, err := envelope.Fingerprint(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	return id
}

func TestSignedTrust(t *testing.T) {
	key, raw := signedFile(t, nil)
	trust, err := OpenTrust(raw, []string{idOf(t, key)})
	if err != nil {
		t.Fatal(err)
	}
	kind, doc, claimed, err := Document(raw)
	if err != nil || kind != KindTrust || trust.Digest() != digestOf(doc) || !slices.Equal(claimed, trust.Signers()) || !IsTrust(raw) || !IsTrust(doc) {
		t.Errorf("%s %v %v %s", kind, err, claimed, trust.Digest())
	}
}

func TestRefusesUnsignedTrust(t *testing.T) {
	doc, err := testTrustFile(t).Marshal()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := OpenUnpinnedTrust(doc); !errors.Is(err, ErrUnsigned) {
		t.Errorf("bare: %v", err)
	}
	_, raw := signedFile(t, nil)
	i, j := bytes.Index(raw, []byte(`"signatures":[`))+14, bytes.LastIndexByte(raw, ']')
	if _, err := OpenUnpinnedTrust(slices.Concat(raw[:i], raw[j:])); !errors.Is(err, ErrUnsigned) {
		t.Errorf("no signature: %v", err)
	}
	// Whoever opens the bare document gets nothing that Verify believes.
	s := newScene(t)
	trust, err := ParseUnsignedTrust(doc)
	if err != nil {
		t.Fatal(err)
	}
	s.in.Links = []LinkInput{{Name: "x"}}
	if res, err := Verify(s.in, trust, s.at); !errors.Is(err, ErrUnsigned) || res.Failure.Check != "trust.signature" {
		t.Errorf("%v", err)
	}
}

func TestRefusesForeignTrust(t *testing.T) {
	key, raw := signedFile(t, nil)
	stranger, _ := testSigner(t)
	if _, err := OpenTrust(raw, []string{idOf(t, stranger)}); !errors.Is(err, ErrForeignTrust) {
		t.Errorf("another pin: %v", err)
	}
	if _, err := OpenTrust(raw, nil); !errors.Is(err, ErrForeignTrust) {
		t.Errorf("no pin: %v", err)
	}
	_, doc, _, err := Document(raw)
	if err != nil {
		t.Fatal(err)
	}
	// A key that the document does not name.
	if _, err := SignTrust(doc, stranger); !errors.Is(err, ErrForeignTrust) {
		t.Errorf("signed: %v", err)
	}
	forged, err := envelope.Sign(TrustPayloadType, doc, stranger)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := OpenUnpinnedTrust(forged); !errors.Is(err, ErrForeignTrust) {
		t.Errorf("forged: %v", err)
	}
	// The stranger's own document, under the trust domain's name: Verify
	// compares it with what was seen before.
	_, trust := signedTrust(t, nil)
	s := newScene(t)
	s.in.TrustKeys = []string{idOf(t, key)}
	s.in.Links = []LinkInput{{Name: "x"}}
	if res, err := Verify(s.in, trust, s.at); !errors.Is(err, ErrForeignTrust) || res.Failure.Class != ClassCryptographic {
		t.Errorf("%v", err)
	}
}

func TestRefusesChangedTrust(t *testing.T) {
	_, raw := signedFile(t, nil)
	_, doc, _, err := Document(raw)
	if err != nil {
		t.Fatal(err)
	}
	changed := bytes.Replace(doc, []byte(`"serial": 7`), []byte(`"serial": 8`), 1)
	if bytes.Equal(changed, doc) {
		t.Fatal("the fixture is not broken")
	}
	b64 := base64.StdEncoding.EncodeToString
	if _, err := OpenUnpinnedTrust(bytes.Replace(raw, []byte(b64(doc)), []byte(b64(changed)), 1)); !errors.Is(err, ErrCrypto) {
		t.Errorf("%v", err)
	}
}

// What two parsers, or one in a hurry, could read differently.
func TestRefusesTrustEnvelopesThatAreNone(t *testing.T) {
	_, raw := signedFile(t, nil)
	good := string(raw)
	sig := good[strings.Index(good, `{"keyid":`) : strings.LastIndex(good, "}]")+1]
	for name, bad := range map[string]string{
		"two payload types":  strings.Replace(good, `"payloadType":`, `"payloadType":"application/vnd.in-toto+json","payloadType":`, 1),
		"other payload type": strings.Replace(good, TrustPayloadType, RevocationsPayloadType, 1),
		"two payloads":       strings.Replace(good, `"payload":`, `"payload":"e30=","payload":`, 1),
		"duplicate keyid":    strings.Replace(good, `{"keyid":`, `{"keyid":"a","keyid":`, 1),
		"unknown key":        strings.Replace(good, `{"payloadType":`, `{"x":1,"payloadType":`, 1),
		"10,000 signatures":  strings.Replace(good, sig, sig+strings.Repeat(","+sig, 9999), 1),
		"data after it":      good + "{}",
	} {
		if bad == good {
			t.Fatalf("%s: the fixture is not broken", name)
		}
		if _, err := OpenUnpinnedTrust([]byte(bad)); !errors.Is(err, ErrMalformed) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if b := strings.Replace(string(testBundle(t)), `{"sig":`, `{"sig":"AA=="}`+strings.Repeat(`,{"sig":"AA=="}`, 9998)+`,{"sig":`, 1); true {
		if _, err := ParseBundle([]byte(b)); !errors.Is(err, ErrMalformed) {
			t.Errorf("a bundle with 10,000 signatures: %v", err)
		}
	}
}

func TestRefusesAnotherHistory(t *testing.T) {
	_, seen := signedTrust(t, nil)
	if err := seen.CheckHistory(7, seen.Digest()); err != nil {
		t.Errorf("the same file again: %v", err)
	}
	_, other := signedTrust(t, nil)
	if err := other.CheckHistory(7, seen.Digest()); !errors.Is(err, ErrEquivocated) {
		t.Errorf("two files with one serial: %v", err)
	}
	_, next := signedTrust(t, func(f *TrustFile) { f.Serial, f.Previous = 8, seen.Digest() })
	if err := next.CheckHistory(7, seen.Digest()); err != nil {
		t.Errorf("the next one: %v", err)
	}
	if err := next.CheckHistory(7, other.Digest()); !errors.Is(err, ErrEquivocated) {
		t.Errorf("the next of another: %v", err)
	}
	_, later := signedTrust(t, func(f *TrustFile) { f.Serial, f.Previous = 9, other.Digest() })
	if err := later.CheckHistory(7, seen.Digest()); err != nil {
		t.Errorf("one in between was not seen: %v", err)
	}
	s := newScene(t)
	s.in.LeastSerial, s.in.LeastDigest, s.in.Links = 7, other.Digest(), []LinkInput{{Name: "x"}}
	if res, err := Verify(s.in, seen, day); !errors.Is(err, ErrEquivocated) || res.Failure.Check != "trust.history" {
		t.Errorf("%v", err)
	}
}

// A new key takes over by a file that both have signed.
func TestTrustKeyRotation(t *testing.T) {
	old, _ := testSigner(t)
	next, _ := testSigner(t)
	f := testTrustFile(t)
	f.TrustKeys = []TrustKey{trustKey(t, old), trustKey(t, next)}
	doc, err := f.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	raw, err := SignTrust(doc, old, next)
	if err != nil {
		t.Fatal(err)
	}
	trust, err := OpenTrust(raw, []string{idOf(t, old)})
	if err != nil || len(trust.Signers()) != 2 {
		t.Fatalf("%v, %v", trust, err)
	}
}
