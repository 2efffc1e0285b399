// Package ekfiles reads what operators write about endorsement keys: their
// makers' certificates, and lists of them by hash.
package ekfiles

import (
	"bufio"
	"bytes"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/internal/files"
	"github.com/rootlink/rootlink/pkg/attest"
)

// Limits on files in bytes, and on the certificates in them.
const (
	maxRootFile = 4 << 20
	maxRoots    = 1024
	maxHashFile = 16 << 20
)

// AddRoots reads a PEM file, or every .pem, .crt and .cer file in a directory.
// Self-signed certificates become roots, others intermediates: an intermediate
// is a help in building chains and no reason to trust anything.
func AddRoots(r *attest.EKRoots, path string) error {
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

// ReadHashes reads a file of EK hashes: one a line, # begins a comment. No path
// is an empty list; a path without a file is an error, since a deny-list that
// was moved away must not let anybody in.
func ReadHashes(key, path string) (map[[32]byte]bool, error) {
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

func isDir(path string) (bool, error) {
	st, err := os.Stat(path)
	if err != nil {
		return false, err
	}
	return st.IsDir(), nil
}

// ReadInventory reads files that say which EKs are ours: an EK's hash a line,
// with a name for its host behind it if you like, or the file in which the
// server's plugin pins every TPM that attested. nil means no inventory.
func ReadInventory(key string, paths []string) (map[string]string, error) {
	if len(paths) == 0 {
		return nil, nil
	}
	out := map[string]string{}
	for _, path := range paths {
		b, err := files.Read(path, maxHashFile)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", key, err)
		}
		if bytes.HasPrefix(bytes.TrimSpace(b), []byte("{")) {
			var pins struct {
				AKs map[string]string `json:"ak_by_ek"`
			}
			if err := json.Unmarshal(b, &pins); err != nil || pins.AKs == nil {
				return nil, fmt.Errorf("%s: %s: neither a list nor the plugin's pins", key, path)
			}
			for ek := range pins.AKs {
				if raw, err := hex.DecodeString(ek); err != nil || len(raw) != 32 {
					return nil, fmt.Errorf("%s: %s: %q is not a SHA-256 in hex", key, path, ek)
				}
				if out[ek] == "" {
					out[ek] = ek
				}
			}
			continue
		}
		lines := bufio.NewScanner(bytes.NewReader(b))
		for n := 1; lines.Scan(); n++ {
			text, _, _ := strings.Cut(lines.Text(), "#")
			ek, host, _ := strings.Cut(strings.TrimSpace(text), " ")
			if ek == "" {
				continue
			}
			raw, err := hex.DecodeString(ek)
			if err != nil || len(raw) != 32 {
				return nil, cli.Hint(fmt.Errorf("%s: %s line %d: not a SHA-256 in hex", key, path, n),
					"`rootlink-agent tpm info` prints the EK hash")
			}
			ek = strings.ToLower(ek)
			if host = strings.TrimSpace(host); host == "" {
				host = ek
			}
			out[ek] = host
		}
		if err := lines.Err(); err != nil {
			return nil, fmt.Errorf("%s: %s: %w", key, path, err)
		}
	}
	if len(out) == 0 {
		// An inventory without a machine would read as none at all.
		return nil, cli.Hint(fmt.Errorf("%s: no EK in it yet", key), "it is written when the first node attests; without this key any TPM that the makers certify is accepted")
	}
	return out, nil
}
