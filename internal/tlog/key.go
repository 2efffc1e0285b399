package tlog

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/binary"
	"encoding/pem"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/rootlink/rootlink/internal/files"
	pub "github.com/rootlink/rootlink/pkg/tlog"
)

const maxKeyFile = 64 << 10 // bytes

// originLine is where the key file keeps the log's name, above the PEM: key and
// name are one identity, and neither may be changed alone.
const originLine = "origin: "

func makeKey(path, origin string) (ed25519.PrivateKey, error) {
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	text := append([]byte(originLine+origin+"\n"), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})...)
	if err := files.WriteNew(path, text, 0o600); err != nil {
		return nil, err
	}
	return key, nil
}

func readKey(path string) (ed25519.PrivateKey, string, error) {
	fi, err := os.Lstat(path)
	if err != nil {
		return nil, "", err
	}
	if !fi.Mode().IsRegular() || fi.Mode().Perm()&0o077 != 0 {
		return nil, "", fmt.Errorf("key file %s has mode %v: only its owner may have access", path, fi.Mode())
	}
	text, err := files.Read(path, maxKeyFile)
	if err != nil {
		return nil, "", err
	}
	block, _ := pem.Decode(text)
	if block == nil || block.Type != "PRIVATE KEY" {
		return nil, "", fmt.Errorf("key file %s holds no PKCS #8 key", path)
	}
	k, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, "", fmt.Errorf("key file %s: %w", path, err)
	}
	key, ok := k.(ed25519.PrivateKey)
	if !ok {
		return nil, "", fmt.Errorf("key file %s holds no Ed25519 key", path)
	}
	first, _, _ := strings.Cut(string(text), "\n")
	origin := strings.TrimPrefix(first, originLine)
	if err := pub.CheckOrigin(origin); err != nil {
		return nil, "", fmt.Errorf("key file %s: %w", path, err)
	}
	return key, origin, nil
}

// ReadIdentity returns a log as its verifiers know it, from the data directory.
func ReadIdentity(dataDir string) (pub.Log, error) {
	key, origin, err := readKey(filepath.Join(dataDir, KeyFile))
	if err != nil {
		return pub.Log{}, fmt.Errorf("transparency log: %w", err)
	}
	public := key.Public().(ed25519.PublicKey)
	return pub.Log{Origin: origin, Key: public, ID: pub.LogID(origin, public)}, nil
}

// skey is a signer's key as sumdb/note reads it.
func skey(name string, key ed25519.PrivateKey) string {
	sum := sha256.Sum256(append([]byte(name+"\n\x01"), key.Public().(ed25519.PublicKey)...))
	return fmt.Sprintf("PRIVATE+KEY+%s+%08x+%s", name, binary.BigEndian.Uint32(sum[:4]),
		base64.StdEncoding.EncodeToString(append([]byte{1}, key.Seed()...)))
}
