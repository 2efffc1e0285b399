package tsa

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/internal/files"
	"github.com/rootlink/rootlink/internal/keyfile"
)

// Names of the files in the data directory.
const (
	CertFile    = "tsa.pem"      // the root, then each signing certificate, oldest first
	KeyFile     = "tsa.key"      // that signs tokens
	RootKeyFile = "tsa-root.key" // that certifies the former
	nextKeyFile = "tsa-next.key" // that will sign tokens
	newSuffix   = ".new"         // of keys whose certificates are not written yet
)

const (
	maxFile   = 1 << 20 // bytes
	maxLeaves = 256     // signing certificates: one a year
)

// Exists says whether a data directory holds an authority.
func Exists(dir string) (bool, error) {
	_, err := os.Lstat(filepath.Join(dir, CertFile))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}

func (a *Authority) path(name string) string { return filepath.Join(a.cfg.Dir, name) }

// load reads what is there and makes it when nothing is. Keys are durable under
// another name before the certificates are, and get their own after: whatever
// moment a stop falls on, either nothing was made or all of it is there.
func (a *Authority) load() (*state, error) {
	exists, err := Exists(a.cfg.Dir)
	if err != nil {
		return nil, err
	}
	if !exists {
		for _, name := range []string{KeyFile, RootKeyFile} {
			if _, err := os.Lstat(a.path(name)); !errors.Is(err, fs.ErrNotExist) {
				return nil, a.incomplete(CertFile, err)
			}
		}
		if err := a.create(); err != nil {
			return nil, err
		}
	}
	for _, name := range []string{KeyFile, RootKeyFile} {
		if _, err := os.Lstat(a.path(name)); !errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err := os.Rename(a.path(name+newSuffix), a.path(name)); err != nil {
			return nil, a.incomplete(name, err)
		}
	}
	s := new(state)
	if s.root, s.leaves, err = readCertificates(a.path(CertFile)); err != nil {
		return nil, err
	}
	if s.rootKey, err = readKey(a.path(RootKeyFile)); err != nil {
		return nil, err
	}
	if s.key, err = readKey(a.path(KeyFile)); err != nil {
		return nil, err
	}
	if !s.rootKey.PublicKey.Equal(s.root.PublicKey) {
		return nil, a.incomplete(RootKeyFile, errors.New("it is the key of another root"))
	}
	for _, c := range s.leaves {
		if s.key.PublicKey.Equal(c.PublicKey) {
			s.leaf = c
		}
	}
	if s.leaf == nil {
		return nil, a.incomplete(KeyFile, errors.New("no certificate is for it"))
	}
	newest := s.leaves[len(s.leaves)-1]
	if newest == s.leaf {
		return s, nil
	}
	if s.nextKey, err = readKey(a.path(nextKeyFile)); errors.Is(err, fs.ErrNotExist) {
		return nil, a.incomplete(nextKeyFile, err)
	} else if err != nil {
		return nil, err
	}
	if !s.nextKey.PublicKey.Equal(newest.PublicKey) {
		return nil, a.incomplete(nextKeyFile, errors.New("it is not the key of the last certificate"))
	}
	return s, nil
}

// incomplete says what to do about a missing or foreign file. Making another in
// its place would void, in silence, what verifiers were told to trust.
func (a *Authority) incomplete(name string, err error) error {
	if err == nil {
		err = fs.ErrNotExist
	}
	return cli.Hint(fmt.Errorf("%w: %s: %w", ErrIncomplete, a.path(name), err),
		"restore it from a backup; or remove tsa.pem and the tsa*.key files to begin another authority: verifiers then need a new trust.json, and tokens made before are good only with the old one")
}

// create makes keys and certificates for the first time.
func (a *Authority) create() error {
	rootKey, err := a.makeKey(RootKeyFile + newSuffix)
	if err != nil {
		return err
	}
	key, err := a.makeKey(KeyFile + newSuffix)
	if err != nil {
		return err
	}
	now := a.cfg.Now()
	root, err := newRoot(a.cfg.Name, rootKey, now)
	if err != nil {
		return err
	}
	leaf, err := newLeaf(a.cfg.Name, root, rootKey, key.Public(), now.Add(-backdate), a.cfg.LeafLife)
	if err != nil {
		return err
	}
	return a.writeCertificates(root, leaf)
}

func (a *Authority) writeCertificates(root *x509.Certificate, leaves ...*x509.Certificate) error {
	var b bytes.Buffer
	for _, c := range append([]*x509.Certificate{root}, leaves...) {
		if err := pem.Encode(&b, &pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}); err != nil {
			return err
		}
	}
	return files.Write(a.path(CertFile), b.Bytes(), 0o644)
}

// makeKey stores a new key, in place of one that a stop left behind.
func (a *Authority) makeKey(name string) (*ecdsa.PrivateKey, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	return key, a.writeKey(name, key)
}

func (a *Authority) writeKey(name string, key *ecdsa.PrivateKey) error {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	return files.Write(a.path(name), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600)
}

func readKey(path string) (*ecdsa.PrivateKey, error) {
	k, _, err := keyfile.Own(path)
	if errors.Is(err, keyfile.ErrNoKey) {
		return nil, fmt.Errorf("%w: %w", ErrIncomplete, err)
	}
	if err != nil {
		return nil, err
	}
	key, ok := k.(*ecdsa.PrivateKey)
	if !ok || key.Curve != elliptic.P256() {
		return nil, fmt.Errorf("%w: %s holds no ECDSA P-256 key", ErrIncomplete, path)
	}
	return key, nil
}

func readCertificates(path string) (root *x509.Certificate, leaves []*x509.Certificate, err error) {
	rest, err := files.Read(path, maxFile)
	if err != nil {
		return nil, nil, err
	}
	for {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, nil, fmt.Errorf("%w: %s: %w", ErrIncomplete, path, err)
		}
		if root == nil {
			root = c
			continue
		}
		if len(leaves) == maxLeaves {
			return nil, nil, fmt.Errorf("%w: %s holds more than %d signing certificates", ErrIncomplete, path, maxLeaves)
		}
		if err := c.CheckSignatureFrom(root); err != nil {
			return nil, nil, fmt.Errorf("%w: %s: certificate %d is not the root's: %w", ErrIncomplete, path, len(leaves)+1, err)
		}
		leaves = append(leaves, c)
	}
	if root == nil || len(leaves) == 0 || len(bytes.TrimSpace(rest)) > 0 {
		return nil, nil, fmt.Errorf("%w: %s holds no root and signing certificate", ErrIncomplete, path)
	}
	return root, leaves, nil
}

// ReadCertificates returns the certificates of the authority kept in dir as they
// are in its file: the root, then each that signs tokens, oldest first. It may be
// in use.
func ReadCertificates(dir string) ([]byte, error) {
	path := filepath.Join(dir, CertFile)
	if _, _, err := readCertificates(path); err != nil {
		return nil, err
	}
	return files.Read(path, maxFile)
}
