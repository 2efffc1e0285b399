// Package envelope signs and opens DSSE envelopes whose keys are pinned:
// trust.json, revocations, layouts, verification summaries. Bundles, whose keys
// are certified, are package link's.
package envelope

import (
	"bytes"
	"crypto"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"github.com/secure-systems-lab/go-securesystemslib/dsse"

	"github.com/rootlink/rootlink/pkg/strictjson"
)

// MaxSignatures of one envelope.
const MaxSignatures = 16

const (
	maxSignature = 1024 // bytes
	maxKeyID     = 256  // bytes
	// An envelope is base64 of its payload and little else.
	maxOverhead = 64 << 10
)

var (
	// ErrMalformed: not a DSSE envelope, or not one of that payload type.
	ErrMalformed = errors.New("malformed envelope")
	// ErrUnsigned: a document where an envelope should be.
	ErrUnsigned = errors.New("not signed")
	// ErrForeign: no signature is by a key that counts.
	ErrForeign = errors.New("signed by no key that counts")
	// ErrBadSignature: a signature that claims to be by a key that counts, and
	// does not verify.
	ErrBadSignature = errors.New("bad signature")
	// ErrKey: a key of a kind that is not used here.
	ErrKey = errors.New("neither an ECDSA P-256 nor an Ed25519 key")
)

type wire struct {
	PayloadType string          `json:"payloadType"`
	Payload     string          `json:"payload"`
	Signatures  []wireSignature `json:"signatures"`
}

type wireSignature struct {
	KeyID string `json:"keyid"`
	Sig   string `json:"sig"`
}

// Envelope is a DSSE envelope in good form. Nothing in it has been verified.
type Envelope struct {
	payloadType string
	payload     []byte
	signatures  []signature
}

type signature struct {
	keyID string
	sig   []byte
}

// Sign puts payload in an envelope signed by every key.
func Sign(payloadType string, payload []byte, keys ...crypto.Signer) ([]byte, error) {
	if len(keys) == 0 || len(keys) > MaxSignatures {
		return nil, fmt.Errorf("%w: %d keys, 1 to %d allowed", ErrKey, len(keys), MaxSignatures)
	}
	w := wire{PayloadType: payloadType, Payload: base64.StdEncoding.EncodeToString(payload)}
	pae := dsse.PAE(payloadType, payload)
	for _, k := range keys {
		id, err := Fingerprint(k.Public())
		if err != nil {
			return nil, err
		}
		sig, err := SignMessage(k, pae)
		if err != nil {
			return nil, err
		}
		if !VerifyMessage(k.Public(), pae, sig) {
			return nil, fmt.Errorf("%w by the signer itself", ErrBadSignature)
		}
		w.Signatures = append(w.Signatures, wireSignature{KeyID: id, Sig: base64.StdEncoding.EncodeToString(sig)})
	}
	b, err := json.Marshal(w)
	if err != nil {
		return nil, err
	}
	return append(b, '\n'), nil
}

// Open reads an envelope whose payload has at most limit bytes.
func Open(raw []byte, payloadType string, limit int) (*Envelope, error) {
	if most := base64.StdEncoding.EncodedLen(limit) + maxOverhead; len(raw) > most {
		return nil, fmt.Errorf("%w: %d bytes, at most %d allowed", ErrMalformed, len(raw), most)
	}
	var head struct {
		Payload *json.RawMessage `json:"payload"`
	}
	if json.Unmarshal(raw, &head) == nil && head.Payload == nil {
		return nil, fmt.Errorf("%w: it is a bare document, not an envelope", ErrUnsigned)
	}
	var w wire
	if err := strictjson.Decode(raw, len(raw), "", &w); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	// The type is under the signature: a signature over another kind of
	// document must not count for this one.
	if w.PayloadType != payloadType {
		return nil, fmt.Errorf("%w: payload type %q, want %q", ErrMalformed, w.PayloadType, payloadType)
	}
	if len(w.Signatures) == 0 {
		return nil, fmt.Errorf("%w: no signature", ErrUnsigned)
	}
	if len(w.Signatures) > MaxSignatures {
		return nil, fmt.Errorf("%w: %d signatures, at most %d allowed", ErrMalformed, len(w.Signatures), MaxSignatures)
	}
	e := &Envelope{payloadType: w.PayloadType}
	var err error
	if e.payload, err = base64.StdEncoding.Strict().DecodeString(w.Payload); err != nil || len(e.payload) > limit {
		return nil, fmt.Errorf("%w: a payload that is not base64 of at most %d bytes", ErrMalformed, limit)
	}
	for _, s := range w.Signatures {
		sig, err := base64.StdEncoding.Strict().DecodeString(s.Sig)
		if err != nil || len(sig) == 0 || len(sig) > maxSignature || len(s.KeyID) > maxKeyID {
			return nil, fmt.Errorf("%w: a signature that is not base64 of 1 to %d bytes", ErrMalformed, maxSignature)
		}
		e.signatures = append(e.signatures, signature{s.KeyID, sig})
	}
	return e, nil
}

// UnverifiedPayload returns the payload whoever signed it.
func (e *Envelope) UnverifiedPayload() []byte { return bytes.Clone(e.payload) }

// Verify returns the fingerprints of those of keys that signed, each once and
// sorted. Signatures by other keys are passed over: a document may be signed for
// several readers. One that names a key of keys and does not verify is an error,
// as is an envelope that none of keys signed.
func (e *Envelope) Verify(keys []crypto.PublicKey) ([]string, error) {
	pae := dsse.PAE(e.payloadType, e.payload)
	var by []string
	for _, pub := range keys {
		id, err := Fingerprint(pub)
		if err != nil {
			return nil, err
		}
		for _, s := range e.signatures {
			ok := VerifyMessage(pub, pae, s.sig)
			if !ok && s.keyID == id {
				return nil, fmt.Errorf("%w by key %s", ErrBadSignature, id)
			}
			// The key ID is a hint that nobody signed: what counts is the key.
			if ok && !slices.Contains(by, id) {
				by = append(by, id)
			}
		}
	}
	if len(by) == 0 {
		return nil, ErrForeign
	}
	slices.Sort(by)
	return by, nil
}

// UnverifiedKeyIDs are the key IDs that the signatures claim.
func (e *Envelope) UnverifiedKeyIDs() []string {
	var out []string
	for _, s := range e.signatures {
		out = append(out, s.keyID)
	}
	return out
}
