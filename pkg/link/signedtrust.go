package link

import (
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"github.com/rootlink/rootlink/pkg/envelope"
)

// Payload types of the DSSE envelopes that trust.json and revocations are.
const (
	TrustPayloadType       = "application/vnd.rootlink.trust.v1+json"
	RevocationsPayloadType = "application/vnd.rootlink.revocations.v1+json"
)

// SignTrust signs a document that TrustFile.Marshal wrote. Each key must be
// listed in it: that is where verifiers learn the key of a fingerprint.
func SignTrust(document []byte, keys ...crypto.Signer) ([]byte, error) {
	t, err := ParseUnsignedTrust(document)
	if err != nil {
		return nil, err
	}
	for _, k := range keys {
		id, err := envelope.Fingerprint(k.Public())
		if err != nil {
			return nil, err
		}
		if !slices.Contains(t.trustKeyIDs, id) {
			return nil, fmt.Errorf("trust.json: key %s is not among its trust_keys: %w", id, ErrForeignTrust)
		}
	}
	return envelope.Sign(TrustPayloadType, document, keys...)
}

// SignRevocations signs a document that RevocationsFile.Marshal wrote.
func SignRevocations(document []byte, keys ...crypto.Signer) ([]byte, error) {
	if _, err := parseRevocations(document); err != nil {
		return nil, err
	}
	return envelope.Sign(RevocationsPayloadType, document, keys...)
}

// OpenTrust opens a trust.json that one of the pinned keys signed. A pin is the
// lower-case hex SHA-256 of a key's SubjectPublicKeyInfo.
func OpenTrust(raw []byte, pins []string) (*Trust, error) {
	t, err := OpenUnpinnedTrust(raw)
	if err != nil {
		return nil, err
	}
	return t, t.CheckSigner(pins)
}

// OpenUnpinnedTrust opens a trust.json that a key signed which the document
// itself names. That only shows that it is whole: who would be believed must be
// compared with what was pinned or seen before (CheckSigner).
func OpenUnpinnedTrust(raw []byte) (*Trust, error) {
	e, err := envelope.Open(raw, TrustPayloadType, MaxTrust)
	if _, _, _, kind := Document(raw); err != nil && errors.Is(kind, ErrMalformed) {
		return nil, fmt.Errorf("trust.json: %w", malformed("it is not trust.json at all"))
	}
	if err != nil {
		return nil, fmt.Errorf("trust.json: %w", envelopeError(err))
	}
	t, err := ParseUnsignedTrust(e.UnverifiedPayload())
	if err != nil {
		return nil, err
	}
	if t.signers, err = e.Verify(t.trustKeys); err != nil {
		return nil, fmt.Errorf("trust.json: %w", envelopeError(err))
	}
	return t, nil
}

// envelopeError gives an envelope's failures the names of this package.
func envelopeError(err error) error {
	switch {
	case errors.Is(err, envelope.ErrUnsigned):
		return ErrUnsigned
	case errors.Is(err, envelope.ErrForeign):
		return fmt.Errorf("%w: %w", ErrForeignTrust, err)
	case errors.Is(err, envelope.ErrMalformed):
		return malformed("%w", err)
	}
	return fmt.Errorf("%w: %w", ErrCrypto, err)
}

// Signers are the fingerprints of the keys that signed the file; none of a Trust
// that was not read from a signed one.
func (t *Trust) Signers() []string { return t.signers }

// CheckSigner fails with ErrForeignTrust unless one of pins signed.
func (t *Trust) CheckSigner(pins []string) error {
	if len(t.signers) == 0 {
		return fmt.Errorf("trust.json: %w", ErrUnsigned)
	}
	for _, id := range t.signers {
		if slices.Contains(pins, id) {
			return nil
		}
	}
	return fmt.Errorf("trust.json: %w: by %s, not by %s", ErrForeignTrust, list(t.signers), list(pins))
}

func list(ids []string) string {
	if len(ids) == 0 {
		return "any key"
	}
	return fmt.Sprint(ids)
}

// Digest is the hex SHA-256 of the document that was signed: what the next one
// names as its previous. Empty of a Trust that was not read from a document.
func (t *Trust) Digest() string { return t.digest }

// CheckHistory compares t with the newest trust.json that the caller has seen.
// Two documents with one serial, or one that follows another than the one seen,
// show that somebody tells different people different things.
func (t *Trust) CheckHistory(serial uint64, digest string) error {
	if digest == "" || t.digest == "" {
		return nil
	}
	if t.file.Serial == serial && t.digest != digest {
		return fmt.Errorf("%w: two files with serial %d: this one has digest %s, %s was seen before", ErrEquivocated, serial, t.digest, digest)
	}
	if t.file.Serial == serial+1 && t.file.Previous != "" && t.file.Previous != digest {
		return fmt.Errorf("%w: serial %d follows a file with digest %s, %s was seen", ErrEquivocated, t.file.Serial, t.file.Previous, digest)
	}
	return nil
}

func (t *Trust) readTrustKeys() error {
	if len(t.file.TrustKeys) > MaxTrustKeys {
		return malformed("%d trust_keys, at most %d allowed", len(t.file.TrustKeys), MaxTrustKeys)
	}
	for i, k := range t.file.TrustKeys {
		pub, err := x509.ParsePKIXPublicKey(k.Key)
		if err != nil {
			return malformed("trust key %d: %w", i, err)
		}
		id, err := envelope.Fingerprint(pub)
		if err != nil {
			return malformed("trust key %d: %w", i, err)
		}
		t.trustKeys, t.trustKeyIDs = append(t.trustKeys, pub), append(t.trustKeyIDs, id)
	}
	if p := t.file.Previous; p != "" {
		if _, err := parseHash(p); err != nil {
			return fmt.Errorf("previous: %w", err)
		}
	}
	return nil
}

// TrustKeys are the keys that may sign this trust domain's files.
func (t *Trust) TrustKeys() []crypto.PublicKey { return t.trustKeys }

func digestOf(document []byte) string {
	sum := sha256.Sum256(document)
	return hex.EncodeToString(sum[:])
}

func parseRevocations(b []byte) (r RevocationsFile, err error) {
	if err := decodeStrict(b, MaxRevocations, "none", &r); err != nil {
		return r, fmt.Errorf("revocations: %w", err)
	}
	if err := r.validate(); err != nil {
		return r, fmt.Errorf("revocations: %w", err)
	}
	return r, nil
}

// WithRevocations returns t extended by a later revocation file, which one of
// the trust keys that t names must have signed: who could leave revocations out
// could also make some up, and stop a release.
func (t *Trust) WithRevocations(raw []byte) (*Trust, error) {
	e, err := envelope.Open(raw, RevocationsPayloadType, MaxRevocations)
	if err != nil {
		return nil, fmt.Errorf("revocations: %w", envelopeError(err))
	}
	if _, err := e.Verify(t.trustKeys); err != nil {
		return nil, fmt.Errorf("revocations: %w", envelopeError(err))
	}
	r, err := parseRevocations(e.UnverifiedPayload())
	if err != nil {
		return nil, err
	}
	return t.extend(r)
}

// Kinds of documents that a trust key signs.
const (
	KindTrust       = "trust.json"
	KindRevocations = "revocations"
)

// Document returns what trust.json or a revocation file says, signed or not, and
// who claims to have signed it: for people to read and to sign. Nothing is
// verified.
func Document(raw []byte) (kind string, document []byte, claimed []string, err error) {
	var head struct {
		Format      string `json:"format"`
		PayloadType string `json:"payloadType"`
	}
	if len(raw) > MaxTrustFile {
		return "", nil, nil, malformed("%d bytes, at most %d allowed", len(raw), MaxTrustFile)
	}
	_ = json.Unmarshal(raw, &head) // one that is not JSON is of no kind
	for _, k := range []struct {
		kind, format, payload string
		limit                 int
	}{
		{KindTrust, TrustFormat, TrustPayloadType, MaxTrust},
		{KindRevocations, RevocationsFormat, RevocationsPayloadType, MaxRevocations},
	} {
		if head.Format == k.format {
			return k.kind, raw, nil, nil
		}
		if head.PayloadType == k.payload {
			e, err := envelope.Open(raw, k.payload, k.limit)
			if err != nil {
				return "", nil, nil, envelopeError(err)
			}
			return k.kind, e.UnverifiedPayload(), e.UnverifiedKeyIDs(), nil
		}
	}
	return "", nil, nil, malformed("neither trust.json nor a revocation file")
}
