package timestamp_test

import (
	"bytes"
	"crypto/x509"
	"math/big"
	"testing"

	"github.com/sigstore/timestamp-authority/v2/pkg/verification"

	"github.com/rootlink/rootlink/internal/forge"
	"github.com/rootlink/rootlink/pkg/timestamp"
)

// peer is what sigstore-go and cosign make of a token.
func peer(raw []byte, tsa *forge.TSA) error {
	_, err := verification.VerifyTimestampResponse(raw, bytes.NewReader(signature), verification.VerifyOpts{
		TSACertificate: tsa.Leaf, Roots: []*x509.Certificate{tsa.Root},
	})
	return err
}

func TestSigstoreTakesWhatWeTake(t *testing.T) {
	tsa := forge.NewTSA(t, nil)
	if err := peer(tsa.Token(t, signature, forge.Epoch(), nil), tsa); err != nil {
		t.Error(err)
	}
}

// FuzzParse: nothing makes Parse or Verify fail badly, and what they take
// Sigstore's verifier takes too. The other way round it is laxer, see the tests
// named TestRefuses.
func FuzzParse(f *testing.F) {
	tsa := forge.NewTSA(f, nil)
	as := []timestamp.Authority{tsa.Authority()}
	f.Add(tsa.Token(f, signature, forge.Epoch(), nil))
	f.Add(tsa.Token(f, signature, forge.Epoch(), func(s *forge.TokenSpec) { s.Certificates = nil; s.ESSv1 = true }))
	f.Add(tsa.Token(f, signature, forge.Epoch(), func(s *forge.TokenSpec) { s.Status = 2; s.Unsigned = true; s.Signers = 2 }))
	f.Add([]byte{0x30, 0x0f, 0x30, 0x0d, 2, 1, 2, 0x30, 4, 12, 2, 'n', 'o', 3, 2, 7, 0x80})
	f.Fuzz(func(t *testing.T, raw []byte) {
		tok, err := timestamp.Parse(raw)
		if err != nil {
			return
		}
		if !bytes.Equal(tok.Raw(), raw) {
			t.Error("Raw is not what was parsed")
		}
		if _, err := tok.Verify(signature, as); err == nil {
			if err := peer(raw, tsa); err != nil {
				t.Errorf("Sigstore refuses %x: %v", raw, err)
			}
		}
	})
}

func FuzzParseQuery(f *testing.F) {
	raw, err := timestamp.Request(signature, big.NewInt(7))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(raw)
	f.Add(raw[:len(raw)-3])
	f.Fuzz(func(t *testing.T, raw []byte) {
		if q, err := timestamp.ParseQuery(raw); err == nil && len(q.Imprint) != q.Hash.Size() {
			t.Errorf("%+v", q)
		}
	})
}
