package server

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"

	"github.com/rootlink/rootlink/internal/files"
	"github.com/rootlink/rootlink/internal/keyfile"
)

// Errors of the data directory and the admin socket that callers branch on.
var (
	// ErrInUse means that another server has the data directory or the socket.
	ErrInUse = errors.New("in use by another server")
	// ErrForeignOwner means that somebody else owns what only we should.
	ErrForeignOwner = errors.New("owned by another user")
	// ErrShared means that others can write where only we should.
	ErrShared = errors.New("other users could replace its files")
	// ErrNotSocket means that something else is at the admin socket's path.
	ErrNotSocket = errors.New("exists and is no socket")
)

// dataDir is the locked directory that holds the database and the keys.
type dataDir struct {
	path string
	lock *os.File
}

// openDataDir makes the directory when it is absent, refuses one that others
// own or can enter, and locks it.
func openDataDir(path string) (*dataDir, error) {
	if err := os.MkdirAll(path, 0o700); err != nil {
		return nil, fmt.Errorf("data directory: %w", err)
	}
	fi, err := os.Lstat(path)
	if err != nil {
		return nil, fmt.Errorf("data directory: %w", err)
	}
	if fi.Mode()&os.ModeSymlink != 0 {
		if fi, err = os.Stat(path); err != nil {
			return nil, fmt.Errorf("data directory: %w", err)
		}
	}
	if err := ownedByUs(path, fi); err != nil {
		return nil, fmt.Errorf("data directory: %w", err)
	}
	if fi.Mode().Perm()&0o022 != 0 {
		return nil, fmt.Errorf("data directory %s has mode %04o: %w", path, fi.Mode().Perm(), ErrShared)
	}
	f, err := files.Lock(filepath.Join(path, "lock"))
	if errors.Is(err, files.ErrLocked) {
		return nil, fmt.Errorf("data directory %s: %w", path, ErrInUse)
	}
	if err != nil {
		return nil, fmt.Errorf("data directory: %w", err)
	}
	return &dataDir{path, f}, nil
}

func (d *dataDir) file(name string) string { return filepath.Join(d.path, name) }

// Close unlocks the directory.
func (d *dataDir) Close() error { return d.lock.Close() }

func ownedByUs(path string, fi os.FileInfo) error {
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !ok {
		return fmt.Errorf("%s: no owner known", path)
	}
	if int(st.Uid) != os.Geteuid() {
		return fmt.Errorf("%s: %w (uid %d, we are %d)", path, ErrForeignOwner, st.Uid, os.Geteuid())
	}
	return nil
}

// makeKey makes an ECDSA P-256 key and stores it under name, durable before
// it returns. A file of that name must not exist.
func (d *dataDir) makeKey(name string) (*ecdsa.PrivateKey, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	text := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
	if err := files.WriteNew(d.file(name), text, 0o600); err != nil {
		return nil, fmt.Errorf("store key %s: %w", name, err)
	}
	return key, nil
}

// readKey reads a key that makeKey stored.
func (d *dataDir) readKey(name string) (*ecdsa.PrivateKey, error) {
	path := d.file(name)
	fi, err := os.Lstat(path)
	if err != nil {
		return nil, err
	}
	if err := ownedByUs(path, fi); err != nil {
		return nil, err
	}
	k, _, err := keyfile.Own(path)
	if err != nil {
		return nil, err
	}
	key, ok := k.(*ecdsa.PrivateKey)
	if !ok || key.Curve != elliptic.P256() {
		return nil, fmt.Errorf("key file %s holds no ECDSA P-256 key", path)
	}
	return key, nil
}
