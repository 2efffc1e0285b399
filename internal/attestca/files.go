package attestca

import (
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
	"time"

	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/internal/files"
)

// Names of the files in a data directory.
const (
	CertFile = "attestation-ca.crt"
	KeyFile  = "attestation-ca.key"
	lockFile = "attestation-ca.lock"
)

// maxFile bounds a PEM file in bytes.
const maxFile = 64 << 10

// LoadOrCreate returns the CA kept in dir, made on first use. Two processes
// that start at once end up with the same one.
func LoadOrCreate(dir string, now time.Time) (*CA, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("attestation CA: %w", err)
	}
	lock, err := files.LockWait(filepath.Join(dir, lockFile))
	if err != nil {
		return nil, fmt.Errorf("attestation CA: %w", err)
	}
	defer lock.Close()

	certPath, keyPath := filepath.Join(dir, CertFile), filepath.Join(dir, KeyFile)
	haveCert, err := exists(certPath)
	if err != nil {
		return nil, fmt.Errorf("attestation CA: %w", err)
	}
	haveKey, err := exists(keyPath)
	if err != nil {
		return nil, fmt.Errorf("attestation CA: %w", err)
	}
	switch {
	case haveCert && !haveKey:
		return nil, lostKey(certPath, keyPath)
	case !haveKey:
		if err := createKey(keyPath); err != nil {
			return nil, fmt.Errorf("attestation CA: %w", err)
		}
		fallthrough
	case !haveCert: // also after a stop between the two writes: the key has signed nothing yet
		if err := createCert(certPath, keyPath, now); err != nil {
			return nil, fmt.Errorf("attestation CA: %w", err)
		}
	}
	return Load(certPath, keyPath, now)
}

// Load reads the CA from two PEM files: the certificate with what certifies it
// below, and the key in PKCS #8 or SEC 1 form.
func Load(certPath, keyPath string, now time.Time) (*CA, error) {
	key, err := readKey(keyPath)
	if err != nil {
		return nil, fmt.Errorf("attestation CA: %w", err)
	}
	chain, err := readChain(certPath)
	if err != nil {
		return nil, fmt.Errorf("attestation CA: %w", err)
	}
	ca, err := newCA(key, chain, now)
	if err != nil {
		return nil, hinted(fmt.Errorf("attestation CA %s: %w", certPath, err), keyPath)
	}
	return ca, nil
}

func hinted(err error, keyPath string) error {
	switch {
	case errors.Is(err, ErrKeyMismatch):
		return cli.Hint(err, "give the key that was made with that certificate, not "+keyPath)
	case errors.Is(err, ErrExpired):
		return cli.Hint(err, "check this machine's clock, or give a certificate that is valid now")
	case errors.Is(err, ErrNotCA):
		return cli.Hint(err, "make an ECDSA P-256 CA certificate with basicConstraints=critical,CA:TRUE, keyUsage=critical,keyCertSign and a subjectKeyIdentifier")
	}
	return err
}

func createKey(path string) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	return files.Write(path, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600)
}

func createCert(certPath, keyPath string, now time.Time) error {
	key, err := readKey(keyPath)
	if err != nil {
		return err
	}
	cert, err := selfSign(key, now)
	if err != nil {
		return err
	}
	return files.Write(certPath, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw}), 0o644)
}

func readKey(path string) (*ecdsa.PrivateKey, error) {
	st, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if mode := st.Mode().Perm(); mode&0o007 != 0 {
		return nil, cli.Hint(fmt.Errorf("key file %s is open to every user (mode %04o)", path, mode), "chmod 600 "+path)
	}
	b, err := files.Read(path, maxFile)
	if err != nil {
		return nil, err
	}
	for {
		var block *pem.Block
		if block, b = pem.Decode(b); block == nil {
			return nil, cli.Hint(fmt.Errorf("%s holds no private key in PEM form", path),
				"make one with: openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256")
		}
		switch block.Type {
		case "EC PARAMETERS":
		case "EC PRIVATE KEY":
			key, err := x509.ParseECPrivateKey(block.Bytes)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", path, err)
			}
			return key, nil
		case "PRIVATE KEY":
			key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", path, err)
			}
			ec, ok := key.(*ecdsa.PrivateKey)
			if !ok {
				return nil, fmt.Errorf("%s: %w: its key is not an ECDSA key", path, ErrNotCA)
			}
			return ec, nil
		case "ENCRYPTED PRIVATE KEY":
			return nil, cli.Hint(fmt.Errorf("%s is encrypted", path), "decrypt it with openssl pkey and protect the file by its mode")
		default:
			return nil, fmt.Errorf("%s: unexpected PEM block %q", path, block.Type)
		}
	}
}

func readChain(path string) ([]*x509.Certificate, error) {
	b, err := files.Read(path, maxFile)
	if err != nil {
		return nil, err
	}
	var chain []*x509.Certificate
	for {
		var block *pem.Block
		if block, b = pem.Decode(b); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("%s: unexpected PEM block %q", path, block.Type)
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("%s: certificate %d: %w", path, len(chain)+1, err)
		}
		if chain = append(chain, cert); len(chain) > maxChain {
			return nil, fmt.Errorf("%s: more than %d certificates", path, maxChain)
		}
	}
	if len(chain) == 0 {
		return nil, cli.Hint(fmt.Errorf("%s holds no certificate in PEM form", path), "convert it with openssl x509")
	}
	return chain, nil
}

func exists(path string) (bool, error) {
	switch _, err := os.Stat(path); {
	case err == nil:
		return true, nil
	case errors.Is(err, fs.ErrNotExist):
		return false, nil
	default:
		return false, err
	}
}

// Check says whether LoadOrCreate would work, and writes nothing.
func Check(dir string, now time.Time) error {
	certPath, keyPath := filepath.Join(dir, CertFile), filepath.Join(dir, KeyFile)
	haveCert, err := exists(certPath)
	if err != nil {
		return fmt.Errorf("attestation CA: %w", err)
	}
	haveKey, err := exists(keyPath)
	if err != nil {
		return fmt.Errorf("attestation CA: %w", err)
	}
	if !haveCert || !haveKey {
		if haveCert {
			return lostKey(certPath, keyPath)
		}
		return nil
	}
	_, err = Load(certPath, keyPath, now)
	return err
}

// lostKey: a new CA would make every agent's AK certificate worthless and leave
// trust files pointing at nothing, so somebody must decide.
func lostKey(certPath, keyPath string) error {
	return cli.Hint(fmt.Errorf("attestation CA: %s exists but its key %s does not", certPath, keyPath),
		"restore the key from a backup; to begin anew, move the certificate away and export trust.json again")
}
