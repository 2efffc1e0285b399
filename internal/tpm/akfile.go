package tpm

import (
	"bytes"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/google/go-tpm/tpm2"

	"github.com/rootlink/rootlink/internal/files"
	"github.com/rootlink/rootlink/pkg/attest"
)

const (
	akFileName     = "ak.json"
	akCertFileName = "ak-cert.pem"
	akFileVersion  = 1
	maxAKFile      = 64 << 10
	maxAKAuth      = 64
)

// akFile is the AK as kept in the data directory. Private is wrapped by the TPM
// and Auth is worth nothing without that TPM, but together they are this node to
// anyone who can open the device: the file is 0600.
type akFile struct {
	Version        int    `json:"version"`
	Public         []byte `json:"public"`  // TPMT_PUBLIC
	Private        []byte `json:"private"` // TPM2B_PRIVATE contents
	Auth           []byte `json:"auth"`
	ParentName     []byte `json:"parent_name"`
	CreationData   []byte `json:"creation_data"` // TPMS_CREATION_DATA
	CreationAttest []byte `json:"creation_attest"`
	CreationSig    []byte `json:"creation_signature"`
	name           []byte
}

func (d *Device) akPath() string     { return filepath.Join(d.opts.DataDir, akFileName) }
func (d *Device) akCertPath() string { return filepath.Join(d.opts.DataDir, akCertFileName) }

// lockDataDir makes the directory if needed and locks it for the life of the
// returned file.
func lockDataDir(dir string) (*os.File, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	f, err := files.Lock(filepath.Join(dir, "tpm.lock"))
	if errors.Is(err, files.ErrLocked) {
		return nil, fmt.Errorf("%w: %s", ErrDataDirLocked, dir)
	}
	return f, err
}

var errBadAKFile = errors.New("attestation key file is damaged")

// loadAKFile returns nil when there is no file.
func loadAKFile(path string) (*akFile, error) {
	b, err := files.Read(path, maxAKFile)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var f akFile
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&f); err != nil {
		return nil, fmt.Errorf("%w: %s: %w", errBadAKFile, path, err)
	}
	if f.Version != akFileVersion {
		return nil, fmt.Errorf("%w: %s has version %d, this program knows %d", errBadAKFile, path, f.Version, akFileVersion)
	}
	if len(f.Private) == 0 || len(f.Auth) == 0 || len(f.Auth) > maxAKAuth || len(f.CreationAttest) == 0 {
		return nil, fmt.Errorf("%w: %s lacks a field", errBadAKFile, path)
	}
	if f.name, err = nameOf(f.Public); err != nil {
		return nil, fmt.Errorf("%w: %s: %w", errBadAKFile, path, err)
	}
	return &f, nil
}

func (f *akFile) save(path string) error {
	b, err := json.MarshalIndent(f, "", "  ")
	if err != nil {
		return err
	}
	return files.Write(path, append(b, '\n'), 0o600)
}

func nameOf(public []byte) ([]byte, error) {
	pub, err := tpm2.Unmarshal[tpm2.TPMTPublic](public)
	if err != nil {
		return nil, err
	}
	name, err := tpm2.ObjectName(pub)
	if err != nil {
		return nil, err
	}
	return name.Buffer, nil
}

// ErrNoAKCertificate means that the AK has not been certified yet.
var ErrNoAKCertificate = errors.New("no AK certificate yet")

// StoreAKCertificate keeps the certificate that the server issued for this AK,
// with the CA certificates above it. It refuses one for another key.
func (d *Device) StoreAKCertificate(ak *AK, chain [][]byte) error {
	if d.opts.DataDir == "" {
		return ErrNoDataDir
	}
	if err := certifiesAK(ak, chain); err != nil {
		return err
	}
	var b bytes.Buffer
	for _, der := range chain {
		if err := pem.Encode(&b, &pem.Block{Type: "CERTIFICATE", Bytes: der}); err != nil {
			return err
		}
	}
	return files.Write(d.akCertPath(), b.Bytes(), 0o600)
}

// AKCertificate returns the stored certificate of ak and the CA certificates
// above it, or ErrNoAKCertificate.
func (d *Device) AKCertificate(ak *AK) ([][]byte, error) {
	if d.opts.DataDir == "" {
		return nil, ErrNoDataDir
	}
	b, err := files.Read(d.akCertPath(), attest.MaxChain*2*attest.MaxCertificate)
	if errors.Is(err, os.ErrNotExist) {
		return nil, ErrNoAKCertificate
	}
	if err != nil {
		return nil, err
	}
	var chain [][]byte
	for len(b) > 0 && len(chain) <= attest.MaxChain {
		var block *pem.Block
		if block, b = pem.Decode(b); block == nil {
			break
		}
		chain = append(chain, block.Bytes)
	}
	if err := certifiesAK(ak, chain); err != nil {
		// Of an AK that is no more, or damaged: the next attestation replaces it.
		return nil, fmt.Errorf("%w: %w", ErrNoAKCertificate, err)
	}
	return chain, nil
}

func certifiesAK(ak *AK, chain [][]byte) error {
	if len(chain) == 0 || len(chain) > attest.MaxChain {
		return fmt.Errorf("AK certificate chain of %d certificates", len(chain))
	}
	for _, der := range chain {
		if len(der) > attest.MaxCertificate {
			return fmt.Errorf("AK certificate chain: %w", ErrTooLarge)
		}
	}
	cert, err := x509.ParseCertificate(chain[0])
	if err != nil {
		return fmt.Errorf("AK certificate: %w", err)
	}
	if !bytes.Equal(cert.RawSubjectPublicKeyInfo, ak.SPKI) {
		return errors.New("AK certificate is for another key")
	}
	return nil
}
