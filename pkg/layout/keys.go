package layout

import (
	"bytes"
	"crypto"
	"crypto/ed25519"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"reflect"

	"github.com/in-toto/in-toto-golang/in_toto"

	"github.com/rootlink/rootlink/pkg/envelope"
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
	if err := envelope.CheckKey(pub); err != nil {
		return malformed("%w", err)
	}
	return nil
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
