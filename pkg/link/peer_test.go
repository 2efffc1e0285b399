package link

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"testing"

	intoto "github.com/in-toto/attestation/go/v1"
	"github.com/secure-systems-lab/go-securesystemslib/dsse"
	"google.golang.org/protobuf/encoding/protojson"
)

// peerKey is a key as DSSE's own verifier asks for one.
type peerKey struct{ *ecdsa.PublicKey }

func (k peerKey) Verify(_ context.Context, data, sig []byte) error {
	if h := sha256.Sum256(data); !ecdsa.VerifyASN1(k.PublicKey, h[:], sig) {
		return errors.New("bad signature")
	}
	return nil
}
func (k peerKey) KeyID() (string, error)   { return "", nil }
func (k peerKey) Public() crypto.PublicKey { return k.PublicKey }

// in-toto's own types judge the statement, and DSSE's own verifier the
// envelope.
func TestPeersReadTheBundle(t *testing.T) {
	s := newScene(t)
	raw := s.sign(t)
	var bundle struct {
		Envelope dsse.Envelope `json:"dsseEnvelope"`
	}
	if err := json.Unmarshal(raw, &bundle); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		key  *ecdsa.PublicKey
		good bool
	}{{&s.SVIDKey.PublicKey, true}, {&s.AgentKey.PublicKey, false}} {
		v, err := dsse.NewEnvelopeVerifier(peerKey{c.key})
		if err != nil {
			t.Fatal(err)
		}
		if keys, err := v.Verify(t.Context(), &bundle.Envelope); (err == nil && len(keys) == 1) != c.good {
			t.Errorf("DSSE: %d keys, %v", len(keys), err)
		}
	}
	payload, err := bundle.Envelope.DecodeB64Payload()
	if err != nil {
		t.Fatal(err)
	}
	var statement intoto.Statement
	if err := protojson.Unmarshal(payload, &statement); err != nil {
		t.Fatal(err)
	}
	if err := statement.Validate(); err != nil {
		t.Fatal(err)
	}
	if statement.GetPredicateType() != PredicateType || statement.GetSubject()[0].GetName() != "out/hello" {
		t.Errorf("in-toto reads %s", &statement)
	}
}
