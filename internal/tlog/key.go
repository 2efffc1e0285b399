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
	"path/filepath"
	"strings"

	"github.com/rootlink/rootlink/internal/files"
	"github.com/rootlink/rootlink/internal/keyfile"
	pub "github.com/rootlink/rootlink/pkg/tlog"
)

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
	k, text, err := keyfile.Own(path)
	if err != nil {
		return nil, "", err
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
