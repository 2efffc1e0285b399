package upstream

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/rootlink/rootlink/internal/files"
)

// Source is where an agent that knows no authority yet learns them: a PEM file
// or a join line.
type Source interface {
	// Authorities returns at least one authority of the trust domain.
	Authorities(ctx context.Context) ([]*x509.Certificate, error)
	// Fingerprint changes when the operator points at other trust. Authorities
	// that were saved under another fingerprint are forgotten.
	Fingerprint() [32]byte
}

// maxSaved bounds a bundle in bytes, the saved one and the PEM file.
const maxSaved = 1 << 20

// savedName is the bundle's file in the data directory.
const savedName = "bundle.json"

// Trust holds the authorities of the agent's trust domain. It starts with what
// an earlier run saved, falls back on its Source, and is refreshed from the
// server. The JWT authorities are the server's alone: they verify no server, so
// nothing needs them before there is one.
type Trust struct {
	td     spiffeid.TrustDomain
	file   string
	source Source

	mu          sync.Mutex
	authorities []*x509.Certificate // replaced, never changed in place
	fromSource  bool                // authorities are the source's, fetched by this process
	jwt         JWTKeys             // replaced, never changed in place
	tainted     []*x509.Certificate // those of authorities that are being withdrawn; replaced, never changed in place
}

// saved is the form of bundle.json.
type saved struct {
	TrustDomain string   `json:"trust_domain"`
	Source      string   `json:"source"` // hex fingerprint of the Source it began with
	Saved       string   `json:"saved"`  // RFC 3339, for people
	Authorities [][]byte `json:"x509_authorities"`
}

// NewTrust loads what dir holds for td, if it began with the same source.
func NewTrust(td spiffeid.TrustDomain, dir string, source Source) (*Trust, error) {
	t := &Trust{td: td, file: filepath.Join(dir, savedName), source: source}
	b, err := files.Read(t.file, maxSaved)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return t, nil
	case err != nil:
		return nil, fmt.Errorf("saved bundle: %w", err)
	}
	var s saved
	if err := json.Unmarshal(b, &s); err != nil {
		// Written by rename, so this is somebody's edit. The source still
		// stands, so a broken copy is not a reason to stay down.
		return t, nil
	}
	fp := source.Fingerprint()
	if s.TrustDomain != td.Name() || s.Source != hex.EncodeToString(fp[:]) {
		return t, nil
	}
	for _, der := range s.Authorities {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			t.authorities = nil
			return t, nil
		}
		t.authorities = append(t.authorities, c)
	}
	return t, nil
}

// Ensure makes sure that there are authorities to verify a server with.
func (t *Trust) Ensure(ctx context.Context) error {
	if len(t.Authorities()) > 0 {
		return nil
	}
	return t.Bootstrap(ctx)
}

// Bootstrap asks the source. It is what brings a machine back that was off while
// the authorities were rotated. What was known stays beside it until an
// authenticated server says otherwise: else one wrong server on our address
// would make us swap a current bundle for an old file.
func (t *Trust) Bootstrap(ctx context.Context) error {
	as, err := t.source.Authorities(ctx)
	if err != nil {
		return err
	}
	if len(as) == 0 {
		return errors.New("bootstrap source holds no authority")
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	all := slices.Clone(t.authorities)
	for _, a := range as {
		if !slices.ContainsFunc(all, a.Equal) {
			all = append(all, a)
		}
	}
	t.authorities, t.fromSource = all, true
	return nil
}

// Authorities returns the authorities, which must not be changed.
func (t *Trust) Authorities() []*x509.Certificate {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.authorities
}

// Tainted returns the authorities that are being withdrawn, which must not be
// changed. They still verify; what they signed is to be replaced.
func (t *Trust) Tainted() []*x509.Certificate {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.tainted
}

// setTainted replaces them by what an authenticated server said, and reports
// whether they are others than before.
func (t *Trust) setTainted(as []*x509.Certificate) (changed bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	changed = !slices.EqualFunc(t.tainted, as, (*x509.Certificate).Equal)
	t.tainted = as
	return changed
}

// JWT returns the JWT authorities, which must not be changed.
func (t *Trust) JWT() JWTKeys {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.jwt
}

// SetJWT replaces the JWT authorities by what an authenticated server said.
func (t *Trust) SetJWT(keys JWTKeys) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.jwt = keys
}

// GetX509BundleForTrustDomain makes Trust a source for go-spiffe.
func (t *Trust) GetX509BundleForTrustDomain(td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	if td != t.td {
		return nil, fmt.Errorf("no bundle for trust domain %q", td)
	}
	as := t.Authorities()
	if len(as) == 0 {
		return nil, fmt.Errorf("no authority known for trust domain %q", td)
	}
	return x509bundle.FromX509Authorities(td, as), nil
}

// Set replaces the authorities by what an authenticated server said and saves
// them. changed is false when they are the same.
func (t *Trust) Set(as []*x509.Certificate, now time.Time) (changed bool, err error) {
	if len(as) == 0 {
		return false, errors.New("server's bundle holds no authority")
	}
	t.mu.Lock()
	same := slices.EqualFunc(t.authorities, as, (*x509.Certificate).Equal) && !t.fromSource
	if !same {
		t.authorities, t.fromSource = as, false
	}
	t.mu.Unlock()
	if same {
		return false, nil
	}
	fp := t.source.Fingerprint()
	s := saved{TrustDomain: t.td.Name(), Source: hex.EncodeToString(fp[:]), Saved: now.UTC().Format(time.RFC3339)}
	for _, a := range as {
		s.Authorities = append(s.Authorities, a.Raw)
	}
	b, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return true, err
	}
	if err := files.Write(t.file, b, 0o600); err != nil {
		return true, fmt.Errorf("save bundle: %w", err)
	}
	return true, nil
}

// PEMFile is a Source that reads authorities from a PEM file each time it is
// asked, so that a file that configuration management replaced is seen.
type PEMFile string

// Authorities reads every CERTIFICATE block; anything else is an error.
func (f PEMFile) Authorities(context.Context) ([]*x509.Certificate, error) {
	b, err := files.Read(string(f), maxSaved)
	if err != nil {
		return nil, fmt.Errorf("trust bundle: %w", err)
	}
	as, err := parsePEM(b)
	if err != nil {
		return nil, fmt.Errorf("trust bundle %s: %w", string(f), err)
	}
	return as, nil
}

// Fingerprint is over the file's contents.
func (f PEMFile) Fingerprint() [32]byte {
	b, err := files.Read(string(f), maxSaved)
	if err != nil {
		// Authorities says what is wrong with the file.
		return [32]byte{}
	}
	return sha256.Sum256(append([]byte("pem\x00"), b...))
}

func parsePEM(b []byte) ([]*x509.Certificate, error) {
	var as []*x509.Certificate
	for {
		block, rest := pem.Decode(b)
		if block == nil {
			break
		}
		b = rest
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("holds a %q block, only CERTIFICATE is expected", block.Type)
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, err
		}
		as = append(as, c)
	}
	if len(as) == 0 {
		return nil, errors.New("holds no certificate")
	}
	return as, nil
}
