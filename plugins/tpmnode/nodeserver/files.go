package nodeserver

import (
	"bufio"
	"bytes"
	"context"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/internal/files"
	"github.com/rootlink/rootlink/pkg/attest"
)

// Limits on files in bytes, and on the certificates in them.
const (
	maxRootFile = 4 << 20
	maxRoots    = 1024
	maxHashFile = 16 << 20
	maxPinsFile = 64 << 20
)

// addRoots reads a PEM file, or every .pem, .crt and .cer file in a directory.
// Self-signed certificates become roots, others intermediates: an intermediate
// is a help in building chains and no reason to trust anything.
func addRoots(r *attest.EKRoots, path string) error {
	dir, err := isDir(path)
	if err != nil {
		return fmt.Errorf("ek_roots: %w", err)
	}
	files := []string{path}
	if dir {
		files = nil
		entries, err := os.ReadDir(path)
		if err != nil {
			return fmt.Errorf("ek_roots: %w", err)
		}
		for _, e := range entries {
			if ext := strings.ToLower(filepath.Ext(e.Name())); slices.Contains([]string{".pem", ".crt", ".cer"}, ext) {
				files = append(files, filepath.Join(path, e.Name()))
			}
		}
		if len(files) == 0 {
			return cli.Hint(fmt.Errorf("ek_roots: no .pem, .crt or .cer file in %s", path), "put the TPM makers' root certificates there")
		}
	}
	for _, f := range files {
		if err := addRootFile(r, f); err != nil {
			return fmt.Errorf("ek_roots: %s: %w", f, err)
		}
	}
	return nil
}

func addRootFile(r *attest.EKRoots, path string) error {
	b, err := files.Read(path, maxRootFile)
	if err != nil {
		return err
	}
	var ders [][]byte
	for rest := b; ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			return fmt.Errorf("unexpected PEM block %q", block.Type)
		}
		ders = append(ders, block.Bytes)
	}
	if len(ders) == 0 {
		ders = [][]byte{b} // makers publish DER too
	}
	for _, der := range ders {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return err
		}
		if len(r.Roots)+len(r.Intermediates) == maxRoots {
			return fmt.Errorf("more than %d certificates", maxRoots)
		}
		if bytes.Equal(c.RawSubject, c.RawIssuer) && c.CheckSignature(c.SignatureAlgorithm, c.RawTBSCertificate, c.Signature) == nil {
			r.Roots = append(r.Roots, c)
		} else {
			r.Intermediates = append(r.Intermediates, c)
		}
	}
	return nil
}

// readHashes reads a file of EK hashes: one a line, # begins a comment. No path
// is an empty list; a path without a file is an error, since a deny-list that
// was moved away must not let anybody in.
func readHashes(key, path string) (map[[32]byte]bool, error) {
	out := map[[32]byte]bool{}
	if path == "" {
		return out, nil
	}
	b, err := files.Read(path, maxHashFile)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", key, err)
	}
	lines := bufio.NewScanner(bytes.NewReader(b))
	for n := 1; lines.Scan(); n++ {
		text, _, _ := strings.Cut(lines.Text(), "#")
		if text = strings.TrimSpace(text); text == "" {
			continue
		}
		raw, err := hex.DecodeString(text)
		if err != nil || len(raw) != 32 {
			return nil, cli.Hint(fmt.Errorf("%s: %s line %d: not a SHA-256 in hex", key, path, n),
				"`rootlink-agent tpm info` prints the EK hash")
		}
		out[[32]byte(raw)] = true
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("%s: %s: %w", key, path, err)
	}
	return out, nil
}

// pinsFile is the name of the pins in data_dir.
const pinsFile = "tpmnode-pins.json"

// filePins is the PinStore of a stock SPIRE. It writes the whole file anew for
// each new TPM, which happens once in a machine's life.
type filePins struct {
	path string
	mu   sync.Mutex
	data pinData // guarded by mu; equal to the file's content
}

type pinData struct {
	Version int               `json:"version"`
	AKs     map[string]string `json:"ak_by_ek"`  // hex SHA-256 of the EK → hex AK name
	TPMs    map[string]string `json:"ek_by_tpm"` // hex name of the storage key → hex SHA-256 of the EK
}

func openPins(path string) (*filePins, error) {
	p := &filePins{path: path, data: pinData{Version: 1, AKs: map[string]string{}, TPMs: map[string]string{}}}
	if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
		return p, nil
	}
	b, err := files.Read(path, maxPinsFile)
	if err != nil {
		return nil, fmt.Errorf("pins: %w", err)
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	// An unreadable file is not an empty one: every pin would be open again.
	var data pinData
	err = d.Decode(&data)
	if err == nil && (data.Version != 1 || data.AKs == nil || data.TPMs == nil || d.More()) {
		err = errors.New("not the pins of this version")
	}
	if err != nil {
		return nil, cli.Hint(fmt.Errorf("pins: %s: %w", path, err),
			"restore it from a backup; removing it lets every TPM be pinned anew")
	}
	p.data = data
	return p, nil
}

func (p *filePins) PinAK(_ context.Context, ek [32]byte, akName []byte, replace bool) ([]byte, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	k, v := hex.EncodeToString(ek[:]), hex.EncodeToString(akName)
	was, known := p.data.AKs[k]
	if known && (was == v || !replace) {
		return hex.DecodeString(was)
	}
	if err := p.set(p.data.AKs, k, v); err != nil {
		return nil, err
	}
	if !known {
		was = v
	}
	return hex.DecodeString(was)
}

func (p *filePins) PinTPM(_ context.Context, parentName []byte, ek [32]byte) ([32]byte, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	k, v := hex.EncodeToString(parentName), hex.EncodeToString(ek[:])
	was, known := p.data.TPMs[k]
	if !known {
		if err := p.set(p.data.TPMs, k, v); err != nil {
			return [32]byte{}, err
		}
		was = v
	}
	raw, err := hex.DecodeString(was)
	if err != nil || len(raw) != 32 {
		return [32]byte{}, fmt.Errorf("pins: %s: malformed EK hash %q", p.path, was)
	}
	return [32]byte(raw), nil
}

// set changes m, a map of p.data, and undoes that when it cannot be saved. The
// caller holds mu.
func (p *filePins) set(m map[string]string, k, v string) error {
	was, known := m[k]
	m[k] = v
	b, err := json.MarshalIndent(p.data, "", "  ")
	if err == nil {
		err = files.Write(p.path, append(b, '\n'), 0o600)
	}
	if err != nil {
		if delete(m, k); known {
			m[k] = was
		}
		return fmt.Errorf("pins: %w", err)
	}
	return nil
}
