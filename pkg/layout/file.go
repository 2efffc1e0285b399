package layout

import (
	"bytes"
	"crypto"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"

	"github.com/in-toto/in-toto-golang/in_toto"
	"github.com/secure-systems-lab/go-securesystemslib/cjson"
	"github.com/secure-systems-lab/go-securesystemslib/dsse"

	"github.com/rootlink/rootlink/pkg/envelope"
	"github.com/rootlink/rootlink/pkg/link"
)

// Forms of a signed layout.
const (
	// FormDSSE signs the bytes of the document: what is judged is what was
	// signed, without encoding it anew.
	FormDSSE = "dsse"
	// FormMetablock is in-toto's older one, which Debian's in-toto 1.3 reads.
	// It knows no certificate constraints, so there are none in it.
	FormMetablock = "metablock"
)

// File is a layout file: well-formed, and a claim until Open finds a key.
type File struct {
	form    string // "": not signed
	payload []byte // the document
	message []byte // what the signatures are over
	sigs    []signature
	layout  *Layout
}

type signature struct {
	keyID string // as claimed; decides nothing
	sig   []byte
}

// IsFile tells a layout file from other files by its form alone.
func IsFile(raw []byte) bool {
	f, err := ParseFile(raw)
	return err == nil && f != nil
}

// ParseFile reads a layout in either signed form, or the bare document.
func ParseFile(raw []byte) (*File, error) {
	if len(raw) > MaxFile*3/2 {
		return nil, malformed("layout file of %d bytes, at most %d allowed", len(raw), MaxFile*3/2)
	}
	var head struct {
		Payload json.RawMessage `json:"payload"`
		Signed  json.RawMessage `json:"signed"`
		Type    json.RawMessage `json:"_type"`
	}
	if err := json.Unmarshal(raw, &head); err != nil {
		return nil, malformed("not JSON: %w", err)
	}
	var f *File
	var err error
	switch {
	case head.Payload != nil:
		f, err = parseDSSE(raw)
	case head.Signed != nil:
		f, err = parseMetablock(raw)
	case head.Type != nil:
		f = &File{payload: raw}
	default:
		return nil, malformed("neither a DSSE envelope, nor a Metablock, nor a layout")
	}
	if err != nil {
		return nil, err
	}
	if f.layout, err = parse(f.payload); err != nil {
		return nil, err
	}
	if f.form == FormMetablock {
		w, err := f.layout.wire(false)
		if err != nil {
			return nil, err
		}
		// What is signed is the canonical form of what was read, as everywhere
		// in in-toto. That no unknown key was dropped is parse's doing.
		if f.message, err = cjson.EncodeCanonical(w); err != nil {
			return nil, malformed("%w", err)
		}
		var back any
		if json.Unmarshal(f.payload, &back) != nil {
			return nil, malformed("layout")
		}
		if raw, err := cjson.EncodeCanonical(back); err != nil || !bytes.Equal(raw, f.message) {
			return nil, malformed("a Metablock whose layout is not in this project's own form")
		}
	}
	return f, nil
}

func parseDSSE(raw []byte) (*File, error) {
	var w struct {
		PayloadType string `json:"payloadType"`
		Payload     string `json:"payload"`
		Signatures  []struct {
			KeyID string `json:"keyid"`
			Sig   string `json:"sig"`
		} `json:"signatures"`
	}
	if err := decodeStrict(raw, MaxFile*3/2, "", &w); err != nil {
		return nil, fmt.Errorf("layout envelope: %w", err)
	}
	if w.PayloadType != in_toto.PayloadType {
		return nil, malformed("payload type %q, want %q", w.PayloadType, in_toto.PayloadType)
	}
	if len(w.Signatures) > MaxSignatures {
		return nil, malformed("%d signatures, at most %d allowed", len(w.Signatures), MaxSignatures)
	}
	payload, err := base64.StdEncoding.Strict().DecodeString(w.Payload)
	if err != nil {
		return nil, malformed("payload: %w", err)
	}
	f := &File{form: FormDSSE, payload: payload, message: dsse.PAE(in_toto.PayloadType, payload)}
	for _, s := range w.Signatures {
		sig, err := base64.StdEncoding.Strict().DecodeString(s.Sig)
		if err != nil || len(sig) == 0 || len(sig) > link.MaxSignature {
			return nil, malformed("signature")
		}
		f.sigs = append(f.sigs, signature{s.KeyID, sig})
	}
	return f, nil
}

func parseMetablock(raw []byte) (*File, error) {
	var w struct {
		Signed     json.RawMessage `json:"signed"`
		Signatures []struct {
			KeyID string `json:"keyid"`
			Sig   string `json:"sig"`
		} `json:"signatures"`
	}
	if err := decodeStrict(raw, MaxFile*3/2, "", &w); err != nil {
		return nil, fmt.Errorf("layout metablock: %w", err)
	}
	if len(w.Signatures) > MaxSignatures {
		return nil, malformed("%d signatures, at most %d allowed", len(w.Signatures), MaxSignatures)
	}
	f := &File{form: FormMetablock, payload: w.Signed}
	for _, s := range w.Signatures {
		sig, err := hex.DecodeString(s.Sig)
		if err != nil || len(sig) == 0 || len(sig) > link.MaxSignature {
			return nil, malformed("signature")
		}
		f.sigs = append(f.sigs, signature{s.KeyID, sig})
	}
	return f, nil
}

// UnverifiedLayout is what the file claims.
func (f *File) UnverifiedLayout() *Layout { return f.layout }

// Form is FormDSSE, FormMetablock, or "" for a document without signatures.
func (f *File) Form() string { return f.form }

// UnverifiedKeyIDs are the in-toto key IDs that the signatures claim.
func (f *File) UnverifiedKeyIDs() []string {
	var ids []string
	for _, s := range f.sigs {
		ids = append(ids, s.keyID)
	}
	return ids
}

// Digest is the SHA-256 of the document's meaning: two editions under one
// serial are told apart by it, however they are signed.
func (f *File) Digest() ([32]byte, error) {
	w, err := f.layout.wire(false)
	if err != nil {
		return [32]byte{}, err
	}
	b, err := encode(w)
	return sha256.Sum256(b), err
}

// Open returns the layout if one of keys signed it, and which of them did.
// Signatures by others neither help nor harm: they may be for other verifiers.
func (f *File) Open(keys []crypto.PublicKey) (*Layout, []int, error) {
	if len(f.sigs) == 0 {
		return nil, nil, ErrUnsigned
	}
	if len(keys) == 0 {
		return nil, nil, fmt.Errorf("%w: there is none", ErrForeign)
	}
	var by []int
	for i, k := range keys {
		for _, s := range f.sigs {
			if envelope.VerifyMessage(k, f.message, s.sig) {
				by = append(by, i)
				break
			}
		}
	}
	if len(by) == 0 {
		return nil, nil, ErrForeign
	}
	return f.layout, by, nil
}

// Sign signs l in form with every key, and returns the file.
func Sign(l *Layout, form string, keys ...crypto.Signer) ([]byte, error) {
	if err := l.Validate(); err != nil {
		return nil, err
	}
	if len(keys) == 0 || len(keys) > MaxSignatures {
		return nil, malformed("%d keys, 1 to %d allowed", len(keys), MaxSignatures)
	}
	w, err := l.wire(form == FormDSSE)
	if err != nil {
		return nil, err
	}
	var out any
	switch form {
	case FormDSSE:
		out, err = signDSSE(w, keys)
	case FormMetablock:
		out, err = signMetablock(w, keys)
	default:
		return nil, malformed("form %q of a layout", form)
	}
	if err != nil {
		return nil, err
	}
	raw, err := json.MarshalIndent(out, "", "  ")
	if err != nil {
		return nil, err
	}
	raw = append(raw, '\n')
	if _, err := ParseFile(raw); err != nil {
		return nil, fmt.Errorf("what was signed cannot be read back: %w", err)
	}
	return raw, nil
}

// wireEnvelope is DSSE's; securesystemslib's type has the fields in another order,
// which is all the same to a reader.
type wireEnvelope struct {
	PayloadType string           `json:"payloadType"`
	Payload     string           `json:"payload"`
	Signatures  []dsse.Signature `json:"signatures"`
}

func signDSSE(w any, keys []crypto.Signer) (any, error) {
	payload, err := encode(w)
	if err != nil {
		return nil, err
	}
	e := wireEnvelope{PayloadType: in_toto.PayloadType, Payload: base64.StdEncoding.EncodeToString(payload)}
	for _, k := range keys {
		id, err := NewKey(k.Public())
		if err != nil {
			return nil, err
		}
		sig, err := envelope.SignMessage(k, dsse.PAE(in_toto.PayloadType, payload))
		if err != nil {
			return nil, err
		}
		e.Signatures = append(e.Signatures, dsse.Signature{KeyID: id.KeyID, Sig: base64.StdEncoding.EncodeToString(sig)})
	}
	return e, nil
}

// signMetablock signs anything that in-toto puts into one: layouts and links.
func signMetablock(w any, keys []crypto.Signer) (any, error) {
	message, err := cjson.EncodeCanonical(w)
	if err != nil {
		return nil, err
	}
	mb := in_toto.Metablock{Signed: w, Signatures: []in_toto.Signature{}}
	for _, k := range keys {
		id, err := NewKey(k.Public())
		if err != nil {
			return nil, err
		}
		sig, err := envelope.SignMessage(k, message)
		if err != nil {
			return nil, err
		}
		mb.Signatures = append(mb.Signatures, in_toto.Signature{KeyID: id.KeyID, Sig: hex.EncodeToString(sig)})
	}
	return mb, nil
}
