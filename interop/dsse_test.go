package interop

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"encoding/asn1"
	"encoding/base64"
	"encoding/json"
	"errors"
	"math/big"
	"testing"

	"github.com/rootlink/rootlink/pkg/envelope"
)

// DSSE's own vector, from the protocol's text: an envelope signed by a P-256 key.
// It writes the signature as r‖s; ours and every Sigstore tool's are ASN.1, so it
// is put so here, the two numbers unchanged.
const (
	vectorType    = "http://example.com/HelloWorld"
	vectorPayload = "hello world"
	vectorX       = "46950820868899156662930047687818585632848591499744589407958293238635476079160"
	vectorY       = "5640078356564379163099075877009565129882514886557779369047442380624545832820"
	vectorSig     = "A3JqsQGtVsJ2O2xqrI5IcnXip5GToJ3F+FnZ+O88SjtR6rDAajabZKciJTfUiHqJPcIAriEGAHTVeCUjW2JIZA=="
)

func TestDSSEsOwnVector(t *testing.T) {
	number := func(s string) *big.Int {
		n, ok := new(big.Int).SetString(s, 10)
		if !ok {
			t.Fatal(s)
		}
		return n
	}
	point := append([]byte{4}, number(vectorX).FillBytes(make([]byte, 32))...)
	point = append(point, number(vectorY).FillBytes(make([]byte, 32))...)
	key, err := ecdsa.ParseUncompressedPublicKey(elliptic.P256(), point)
	if err != nil {
		t.Fatal(err)
	}
	rs, err := base64.StdEncoding.DecodeString(vectorSig)
	if err != nil {
		t.Fatal(err)
	}
	sig, err := asn1.Marshal(struct{ R, S *big.Int }{new(big.Int).SetBytes(rs[:32]), new(big.Int).SetBytes(rs[32:])})
	if err != nil {
		t.Fatal(err)
	}
	id, err := envelope.Fingerprint(key)
	if err != nil {
		t.Fatal(err)
	}
	open := func(payloadType, payload string) error {
		raw, err := json.Marshal(map[string]any{
			"payloadType": payloadType, "payload": []byte(payload),
			"signatures": []map[string]any{{"keyid": id, "sig": sig}},
		})
		if err != nil {
			t.Fatal(err)
		}
		e, err := envelope.Open(raw, payloadType, 1024)
		if err != nil {
			t.Fatal(err)
		}
		_, err = e.Verify([]crypto.PublicKey{key})
		return err
	}
	if err := open(vectorType, vectorPayload); err != nil {
		t.Errorf("the vector is refused: %v", err)
	}
	for _, c := range [][2]string{{vectorType, "hello worlD"}, {vectorType + "2", vectorPayload}, {"http://example.com/HelloWorl", "dhello world"}} {
		if err := open(c[0], c[1]); !errors.Is(err, envelope.ErrBadSignature) {
			t.Errorf("%q: %v", c, err)
		}
	}
}
