package layout

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"reflect"

	"github.com/in-toto/in-toto-golang/in_toto"
)

// NewKey returns a public key, ECDSA P-256 or Ed25519, in in-toto's form. Its
// ID is the one that in-toto's other implementations compute.
func NewKey(pub crypto.PublicKey) (in_toto.Key, error) {
	var k in_toto.Key
	if err := supported(pub); err != nil {
		return k, err
	}
	raw, err := publicPEM(pub)
	if err != nil {
		return k, err
	}
	err = k.LoadKeyReaderDefaults(bytes.NewReader(raw))
	return k, err
}

func publicPEM(pub crypto.PublicKey) ([]byte, error) {
	der, err := x509.MarshalPKIXPublicKey(pub)
	return pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}), err
}

func supported(pub crypto.PublicKey) error {
	switch k := pub.(type) {
	case *ecdsa.PublicKey:
		if k.Curve == elliptic.P256() {
			return nil
		}
	case ed25519.PublicKey:
		return nil
	}
	return malformed("a key that is neither ECDSA P-256 nor Ed25519")
}

// publicKey is the way back. Fields that say the same twice must agree: the
// key ID above all, since thresholds of pinned keys count it.
func publicKey(k in_toto.Key) (crypto.PublicKey, error) {
	var pub crypto.PublicKey
	switch k.KeyType {
	case "ed25519":
		raw, err := hex.DecodeString(k.KeyVal.Public)
		if err != nil || len(raw) != ed25519.PublicKeySize {
			return nil, malformed("Ed25519 key")
		}
		pub = ed25519.PublicKey(raw)
	case "ecdsa", "ecdsa-sha2-nistp256":
		block, rest := pem.Decode([]byte(k.KeyVal.Public))
		if block == nil || len(bytes.TrimSpace(rest)) > 0 {
			return nil, malformed("ECDSA key that is not one PEM block")
		}
		var err error
		if pub, err = x509.ParsePKIXPublicKey(block.Bytes); err != nil {
			return nil, malformed("%w", err)
		}
	default:
		return nil, malformed("key type %q: only ecdsa (P-256) and ed25519", k.KeyType)
	}
	return pub, supported(pub)
}

func checkKey(id string, k in_toto.Key) error {
	if k.KeyVal.Private != "" || k.KeyVal.Certificate != "" {
		return malformed("it holds more than a public key")
	}
	pub, err := publicKey(k)
	if err != nil {
		return err
	}
	want, err := NewKey(pub)
	if err != nil {
		return err
	}
	if k.KeyID != id || !reflect.DeepEqual(k, want) {
		return malformed("it is not in in-toto's own form, with ID %s", want.KeyID)
	}
	return nil
}

// signMessage signs what DSSE and in-toto's Metablock sign: the message itself
// for Ed25519, its SHA-256 for ECDSA.
func signMessage(key crypto.Signer, message []byte) ([]byte, error) {
	if err := supported(key.Public()); err != nil {
		return nil, err
	}
	if _, ok := key.Public().(ed25519.PublicKey); ok {
		return key.Sign(rand.Reader, message, crypto.Hash(0))
	}
	sum := sha256.Sum256(message)
	return key.Sign(rand.Reader, sum[:], crypto.SHA256)
}

func verifyMessage(pub crypto.PublicKey, message, sig []byte) bool {
	switch k := pub.(type) {
	case *ecdsa.PublicKey:
		sum := sha256.Sum256(message)
		return k.Curve == elliptic.P256() && ecdsa.VerifyASN1(k, sum[:], sig)
	case ed25519.PublicKey:
		return len(k) == ed25519.PublicKeySize && ed25519.Verify(k, message, sig)
	}
	return false
}

// Fingerprint is how this project names a key to people: the lower-case hex
// SHA-256 of its SubjectPublicKeyInfo.
func Fingerprint(pub crypto.PublicKey) (string, error) {
	der, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		return "", fmt.Errorf("fingerprint: %w", err)
	}
	sum := sha256.Sum256(der)
	return hex.EncodeToString(sum[:]), nil
}
