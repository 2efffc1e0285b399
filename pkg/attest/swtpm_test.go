package attest_test

import (
	"bytes"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/rootlink/rootlink/pkg/attest"
)

// testdata/swtpm was made by peers: keys and certificates by swtpm_setup 0.7.1
// with its defaults, AK, creation certificate and quote by tpm2-tools 5.4
// (tpm2_createprimary -C e, tpm2_create, tpm2_certifycreation, tpm2_quote) on
// that swtpm. The 2-byte size of TPM2B files is cut off.

func swtpmFile(t testing.TB, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("testdata", "swtpm", name))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func swtpmCert(t testing.TB, name string) *x509.Certificate {
	t.Helper()
	c, err := x509.ParseCertificate(swtpmFile(t, name))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func swtpmRoots(t testing.TB) attest.EKRoots {
	return attest.EKRoots{
		Roots:         []*x509.Certificate{swtpmCert(t, "ca-root.crt")},
		Intermediates: []*x509.Certificate{swtpmCert(t, "ca-intermediate.crt")},
	}
}

func swtpmTime(t testing.TB) time.Time {
	return swtpmCert(t, "ek-p384.crt").NotBefore.Add(time.Hour)
}

func TestSwtpmEKs(t *testing.T) {
	for _, kind := range []string{"rsa2048", "p384"} {
		cert, public := swtpmFile(t, "ek-"+kind+".crt"), swtpmFile(t, "ek-"+kind+".tpmt")
		ek, err := attest.VerifyEK([][]byte{cert}, public, swtpmRoots(t), swtpmTime(t))
		if err != nil {
			t.Errorf("%s: %v", kind, err)
			continue
		}
		if ek.Basis != attest.BasisMaker || ek.Root.Subject.CommonName != "swtpm-localca-rootca" {
			t.Errorf("%s: accepted by %s under %v", kind, ek.Basis, ek.Root.Subject)
		}
		if h, err := attest.EKHash(public); err != nil || h != ek.Hash {
			t.Errorf("%s: EKHash differs: %v", kind, err)
		}
		if _, _, err := attest.MakeCredential(public, append([]byte{0, 11}, make([]byte, 32)...), make([]byte, 32)); err != nil {
			t.Errorf("%s: %v", kind, err)
		}
		// The intermediate may come from the agent instead.
		r := swtpmRoots(t)
		chain := [][]byte{cert, r.Intermediates[0].Raw}
		r.Intermediates = nil
		if _, err := attest.VerifyEK(chain, public, r, swtpmTime(t)); err != nil {
			t.Errorf("%s: %v", kind, err)
		}
		if _, err := attest.VerifyEK(chain[:1], public, r, swtpmTime(t)); !errors.Is(err, attest.ErrEKUntrusted) {
			t.Errorf("%s without its intermediate: %v", kind, err)
		}
	}
}

func TestSwtpmAKAndQuote(t *testing.T) {
	ak, err := attest.VerifyAK(swtpmFile(t, "ak.tpmt"), swtpmFile(t, "creation.data"),
		swtpmFile(t, "creation.attest"), swtpmFile(t, "creation.sig"))
	if err != nil {
		t.Fatal(err)
	}
	if len(ak.ParentName) != 34 {
		t.Errorf("parent name %x", ak.ParentName)
	}
	want, _ := hex.DecodeString("00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff")
	values := swtpmFile(t, "quote.values")
	bank := attest.PCRBank{Bank: "sha256", Values: map[uint32][]byte{}}
	for i := range 8 {
		bank.Values[uint32(i)] = values[32*i : 32*i+32]
	}
	q, err := attest.VerifyQuote(swtpmFile(t, "quote.attest"), swtpmFile(t, "quote.sig"), ak, [32]byte(want),
		[]attest.PCRBank{bank}, []attest.PCRSelection{{Bank: "sha256", Indices: []uint32{7}}})
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(q.ExtraData, want) || q.DigestAlg != "sha256" {
		t.Errorf("quote %+v", q)
	}
}
