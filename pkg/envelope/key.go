package envelope

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"fmt"
)

// Fingerprint is how a key is named: the lower-case hex SHA-256 of its
// SubjectPublicKeyInfo.
func Fingerprint(pub crypto.PublicKey) (string, error) {
	der, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		return "", fmt.Errorf("%w: %w", ErrKey, err)
	}
	sum := sha256.Sum256(der)
	return hex.EncodeToString(sum[:]), nil
}

// CheckKey returns ErrKey for a public key that is neither ECDSA P-256 nor
// Ed25519.
func CheckKey(pub crypto.PublicKey) error {
	switch pub := pub.(type) {
	case *ecdsa.PublicKey:
		if pub.Curve == elliptic.P256() {
			return nil
		}
	case ed25519.PublicKey:
		if len(pub) == ed25519.PublicKeySize { // Verify panics on other lengths
			return nil
		}
	}
	return ErrKey
}

// SignMessage signs a message as DSSE and in-toto's Metablock do, each with an
// encoding of its own before: the message itself with Ed25519, its SHA-256 with
// ECDSA.
func SignMessage(k crypto.Signer, message []byte) ([]byte, error) {
	if err := CheckKey(k.Public()); err != nil {
		return nil, err
	}
	if _, ok := k.Public().(ed25519.PublicKey); ok {
		return k.Sign(rand.Reader, message, crypto.Hash(0))
	}
	sum := sha256.Sum256(message)
	return k.Sign(rand.Reader, sum[:], crypto.SHA256)
}

// VerifyMessage reports whether sig is what SignMessage makes with pub's key. No
// key of another kind verifies anything.
func VerifyMessage(pub crypto.PublicKey, message, sig []byte) bool {
	if CheckKey(pub) != nil {
		return false
	}
	switch pub := pub.(type) {
	case ed25519.PublicKey:
		return ed25519.Verify(pub, message, sig)
	case *ecdsa.PublicKey:
		sum := sha256.Sum256(message)
		return ecdsa.VerifyASN1(pub, sum[:], sig)
	}
	return false
}
