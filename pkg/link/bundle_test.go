package link

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"io"
	"math/big"
	"strings"
	"testing"
	"time"

	commonv1 "github.com/sigstore/protobuf-specs/gen/pb-go/common/v1"
	rekorv1 "github.com/sigstore/protobuf-specs/gen/pb-go/rekor/v1"
	"google.golang.org/protobuf/proto"
)

func testStatement() *Statement {
	zero := 0
	return &Statement{
		Step:    "build",
		Command: []string{"go", "build", "<x&y>"},
		Subjects: []Resource{
			{Name: "z", Digest: map[string]string{"sha256": strings.Repeat("ab", 32)}},
			{Name: "a", Digest: map[string]string{"sha256": strings.Repeat("cd", 32), "sha512": strings.Repeat("01", 64)}},
		},
		Byproducts: Byproducts{ExitCode: &zero},
	}
}

// testSigner is a key with a self-signed certificate: enough where only form matters.
func testSigner(t testing.TB) (*ecdsa.PrivateKey, *x509.Certificate) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "x"},
		NotBefore: time.Unix(0, 0), NotAfter: time.Unix(1<<33, 0),
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return key, cert
}

func testBundle(t testing.TB) []byte {
	t.Helper()
	key, cert := testSigner(t)
	p, err := Prepare(testStatement())
	if err != nil {
		t.Fatal(err)
	}
	b, err := p.sign(key, cert)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := b.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

func TestBundleRoundTrip(t *testing.T) {
	raw := testBundle(t)
	b, err := ParseBundle(raw)
	if err != nil {
		t.Fatal(err)
	}
	again, err := b.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(raw, again) {
		t.Errorf("marshalled again:\n%s\nwas:\n%s", again, raw)
	}
	s, err := b.UnverifiedStatement()
	if err != nil {
		t.Fatal(err)
	}
	if s.Subjects[0].Name != "a" || s.Step != "build" || s.Byproducts.ExitCode == nil {
		t.Errorf("statement = %+v", s)
	}
}

func TestBundleKeepsTokensAndLogEntries(t *testing.T) {
	b := mustParse(t, testBundle(t))
	with, err := b.WithTimestamps([]byte("one"), []byte("two"), []byte("one"))
	if err != nil {
		t.Fatal(err)
	}
	entry := &rekorv1.TransparencyLogEntry{LogIndex: 7, LogId: &commonv1.LogId{KeyId: []byte("log")}, CanonicalizedBody: []byte("{}")}
	if with, err = with.WithLogEntry(entry); err != nil {
		t.Fatal(err)
	}
	// A later proof of the same entry takes its place.
	entry.InclusionProof = &rekorv1.InclusionProof{TreeSize: 9}
	if with, err = with.WithLogEntry(entry); err != nil {
		t.Fatal(err)
	}
	raw, err := with.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	again := mustParse(t, raw)
	if got := again.Timestamps(); len(got) != 2 || string(got[0]) != "one" || string(got[1]) != "two" {
		t.Errorf("tokens %q", got)
	}
	if got := again.LogEntries(); len(got) != 1 || !proto.Equal(got[0], entry) {
		t.Errorf("entries %v", got)
	}
	if !bytes.Equal(again.Signature(), b.Signature()) || len(b.Timestamps())+len(b.LogEntries()) != 0 {
		t.Error("the bundle that they were added to has changed")
	}
	if _, err := again.WithTimestamps(make([]byte, MaxToken+1)); !errors.Is(err, ErrMalformed) {
		t.Errorf("a large token: %v", err)
	}
}

func TestSignRefusesCertificateOfAnotherKey(t *testing.T) {
	key, _ := testSigner(t)
	_, other := testSigner(t)
	p, err := Prepare(testStatement())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.sign(key, other); !errors.Is(err, ErrSignerMismatch) {
		t.Errorf("err = %v, want ErrSignerMismatch", err)
	}
}

func TestParseBundleRefuses(t *testing.T) {
	good := string(testBundle(t))
	sig := good[strings.Index(good, `{"sig":`) : strings.LastIndex(good, "}]")+1]
	for name, bad := range map[string]string{
		"two signatures":           strings.Replace(good, sig, sig+","+sig, 1),
		"no signature":             strings.Replace(good, sig, "", 1),
		"key ID":                   strings.Replace(good, `{"sig":`, `{"keyid":"k","sig":`, 1),
		"extra field":              strings.Replace(good, `{"mediaType"`, `{"x":1,"mediaType"`, 1),
		"extra field at the end":   strings.TrimSuffix(good, "}\n") + `,"x":1}`,
		"extra field in signature": strings.Replace(good, `{"sig":`, `{"x":1,"sig":`, 1),
		"duplicate key":            strings.Replace(good, `"payloadType":`, `"payloadType":"a","payloadType":`, 1),
		"case duplicate key":       strings.Replace(good, `"payloadType":`, `"PayloadType":"a","payloadType":`, 1),
		"two spellings of a field": strings.Replace(good, `"payloadType":`, `"payload_type":"application/vnd.in-toto+json","payloadType":`, 1),
		"other media type":         strings.Replace(good, "v0.3+json", "v0.2+json", 1),
		"other payload type":       strings.Replace(good, "vnd.in-toto+json", "vnd.other+json", 1),
		"public key for a leaf":    strings.Replace(good, `"certificate":{"rawBytes":`, `"publicKey":{"hint":`, 1),
		"empty log entry":          strings.Replace(good, `"verificationMaterial":{`, `"verificationMaterial":{"tlogEntries":[{}],`, 1),
		"nine log entries":         strings.Replace(good, `"verificationMaterial":{`, `"verificationMaterial":{"tlogEntries":[`+strings.Repeat(`{"logIndex":"1"},`, 8)+`{"logIndex":"1"}],`, 1),
		"large log entry":          strings.Replace(good, `"verificationMaterial":{`, `"verificationMaterial":{"tlogEntries":[{"canonicalizedBody":"`+strings.Repeat("AAAA", MaxLogEntry/3+1)+`"}],`, 1),
		"empty token":              strings.Replace(good, `"verificationMaterial":{`, `"verificationMaterial":{"timestampVerificationData":{"rfc3161Timestamps":[{}]},`, 1),
		"seventeen tokens":         strings.Replace(good, `"verificationMaterial":{`, `"verificationMaterial":{"timestampVerificationData":{"rfc3161Timestamps":[`+strings.Repeat(`{"signedTimestamp":"AA=="},`, 16)+`{"signedTimestamp":"AA=="}]},`, 1),
		"large token":              strings.Replace(good, `"verificationMaterial":{`, `"verificationMaterial":{"timestampVerificationData":{"rfc3161Timestamps":[{"signedTimestamp":"`+strings.Repeat("AAAA", MaxToken/3+1)+`"}]},`, 1),
		"unknown time":             strings.Replace(good, `"verificationMaterial":{`, `"verificationMaterial":{"timestampVerificationData":{"roughtime":[]},`, 1),
		"trailing data":            good + "{}",
		"empty":                    "",
		"null":                     "null",
		"no envelope":              `{"mediaType":"` + BundleMediaType + `"}`,
		"deep nesting":             strings.Repeat("[", 1<<20),
		"invalid UTF-8":            strings.Replace(good, "v0.3", "v0.\xff", 1),
	} {
		t.Run(name, func(t *testing.T) {
			if bad == good {
				t.Fatal("the fixture is not broken")
			}
			_, err := ParseBundle([]byte(bad))
			if !errors.Is(err, ErrMalformed) && !errors.Is(err, ErrUnsupported) {
				t.Errorf("err = %v, want ErrMalformed or ErrUnsupported", err)
			}
		})
	}
}

func TestParseBundleRefusesOversized(t *testing.T) {
	raw := append(testBundle(t), bytes.Repeat([]byte(" "), MaxBundle)...)
	if _, err := ParseBundle(raw); !errors.Is(err, ErrMalformed) {
		t.Errorf("err = %v, want ErrMalformed", err)
	}
}

func TestParseBundleRefusesOversizedCertificate(t *testing.T) {
	key, _ := testSigner(t)
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Unix(0, 0), NotAfter: time.Unix(1<<33, 0),
		ExtraExtensions: []pkix.Extension{{Id: []int{1, 2, 3}, Value: make([]byte, MaxLeaf)}},
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := (&Bundle{payload: []byte("{}"), signature: []byte{1}, leaf: leaf}).Marshal()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ParseBundle(raw); !errors.Is(err, ErrMalformed) {
		t.Errorf("err = %v, want ErrMalformed", err)
	}
}

// brokenSigner signs something else, or nothing.
type brokenSigner struct {
	*ecdsa.PrivateKey
	err error
}

func (b brokenSigner) Sign(r io.Reader, digest []byte, o crypto.SignerOpts) ([]byte, error) {
	if b.err != nil {
		return nil, b.err
	}
	return b.PrivateKey.Sign(r, make([]byte, len(digest)), o)
}

func TestSignNoticesABrokenSigner(t *testing.T) {
	key, leaf := testSigner(t)
	p, err := Prepare(testStatement())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.sign(brokenSigner{key, nil}, leaf); !errors.Is(err, ErrCrypto) {
		t.Errorf("a bad signature: %v", err)
	}
	gone := errors.New("the token was pulled out")
	if _, err := p.sign(brokenSigner{key, gone}, leaf); !errors.Is(err, gone) {
		t.Errorf("a failing signer: %v", err)
	}
}
