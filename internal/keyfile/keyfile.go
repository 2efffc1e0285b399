// Package keyfile reads the keys that people keep in PEM files: those that sign
// layouts, trust.json and verification summaries, and those that are pinned.
// Own reads those that a server keeps for itself.
package keyfile

import (
	"crypto"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"io/fs"

	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/pkg/envelope"
)

const maxFile = 64 << 10

const makeKey = "make one: openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out key.pem"

// Private reads a private key, ECDSA P-256 or Ed25519, in PKCS #8 or SEC 1.
func Private(path string) (crypto.Signer, error) {
	block, err := read(path, makeKey)
	if err != nil {
		return nil, err
	}
	var key any
	switch block.Type {
	case "PRIVATE KEY":
		key, err = x509.ParsePKCS8PrivateKey(block.Bytes)
	case "EC PRIVATE KEY":
		key, err = x509.ParseECPrivateKey(block.Bytes)
	case "ENCRYPTED PRIVATE KEY":
		return nil, cli.Usage("decrypt it into a file only you can read: openssl pkey -in "+path, "%s is encrypted", path)
	default:
		return nil, cli.Usage(makeKey, "%s holds a %s, not a private key", path, block.Type)
	}
	if err != nil {
		return nil, cli.Usage(makeKey, "%s: %w", path, err)
	}
	signer, ok := key.(crypto.Signer)
	if !ok || envelope.CheckKey(signer.Public()) != nil {
		return nil, cli.Usage(makeKey, "%s: %w", path, envelope.ErrKey)
	}
	return signer, nil
}

// Public reads a public key from a PEM file with a public key or a certificate.
func Public(path string) (crypto.PublicKey, error) {
	const hint = "give a PEM file with a PUBLIC KEY or a CERTIFICATE, such as `openssl pkey -pubout` writes"
	block, err := read(path, hint)
	if err != nil {
		return nil, err
	}
	var pub any
	switch block.Type {
	case "PUBLIC KEY":
		pub, err = x509.ParsePKIXPublicKey(block.Bytes)
	case "CERTIFICATE":
		var cert *x509.Certificate
		if cert, err = x509.ParseCertificate(block.Bytes); err == nil {
			pub = cert.PublicKey
		}
	default:
		return nil, cli.Usage(hint, "%s holds a %s", path, block.Type)
	}
	if err != nil {
		return nil, cli.Usage(hint, "%s: %w", path, err)
	}
	if err := envelope.CheckKey(pub); err != nil {
		return nil, cli.Usage(hint, "%s: %w", path, err)
	}
	return pub, nil
}

// Fingerprint reads what a person pins a key by: its fingerprint (64 hex
// digits, as the commands print it) or a file that holds the key.
func Fingerprint(arg string) (string, error) {
	if b, err := hex.DecodeString(arg); err == nil && len(b) == 32 {
		return hex.EncodeToString(b), nil
	}
	pub, err := Public(arg)
	if errors.Is(err, fs.ErrNotExist) {
		return "", cli.Usage("a fingerprint is 64 hex digits, a file one with a public key in PEM", "%q is neither the fingerprint of a key nor a file", arg)
	}
	if err != nil {
		return "", err
	}
	return envelope.Fingerprint(pub)
}

func read(path, hint string) (*pem.Block, error) {
	raw, err := cli.ReadInput(path, maxFile)
	if err != nil {
		return nil, err
	}
	for {
		block, rest := pem.Decode(raw)
		if block == nil {
			return nil, cli.Usage(hint, "%s: %w", path, errNoPEM)
		}
		if block.Type != "EC PARAMETERS" { // openssl ecparam writes them before the key
			return block, nil
		}
		raw = rest
	}
}

var errNoPEM = errors.New("no PEM block in it")
