package keyfile

import (
	"crypto"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"os"

	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/internal/files"
)

// ErrNoKey: a file of our own that does not hold the key that was put there.
var ErrNoKey = errors.New("no private key")

// Own reads a key that this program made for itself, PKCS #8 in PEM, and the
// whole text of its file. One that others could have read is refused: what it
// signed may be theirs.
func Own(path string) (crypto.Signer, []byte, error) {
	fi, err := os.Lstat(path)
	if err != nil {
		return nil, nil, err
	}
	if !fi.Mode().IsRegular() || fi.Mode().Perm()&0o077 != 0 {
		return nil, nil, cli.Hint(fmt.Errorf("key file %s has mode %v: only its owner may have access", path, fi.Mode()), "chmod 600 "+path)
	}
	text, err := files.Read(path, maxFile)
	if err != nil {
		return nil, nil, err
	}
	block, _ := pem.Decode(text)
	if block == nil || block.Type != "PRIVATE KEY" {
		return nil, nil, fmt.Errorf("%w: key file %s holds no PKCS #8 key", ErrNoKey, path)
	}
	k, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, nil, fmt.Errorf("%w: key file %s: %w", ErrNoKey, path, err)
	}
	key, ok := k.(crypto.Signer)
	if !ok {
		return nil, nil, fmt.Errorf("%w: key file %s holds a %T", ErrNoKey, path, k)
	}
	return key, text, nil
}
