package keyfile

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/rootlink/rootlink/pkg/envelope"
)

func write(t *testing.T, name string, content []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// What OpenSSL writes is what people have.
func TestReadsOpenSSLKeys(t *testing.T) {
	for name, args := range map[string][]string{
		"P-256":                 {"genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256"},
		"P-256 with parameters": {"ecparam", "-name", "prime256v1", "-genkey"},
		"Ed25519":               {"genpkey", "-algorithm", "ED25519"},
	} {
		t.Run(name, func(t *testing.T) {
			out, err := exec.Command("openssl", args...).Output()
			if err != nil {
				t.Fatal(err)
			}
			private := write(t, "key.pem", out)
			key, err := Private(private)
			if err != nil {
				t.Fatal(err)
			}
			if out, err = exec.Command("openssl", "pkey", "-in", private, "-pubout").Output(); err != nil {
				t.Fatal(err)
			}
			public := write(t, "pub.pem", out)
			want, err := envelope.Fingerprint(key.Public())
			if err != nil {
				t.Fatal(err)
			}
			for _, arg := range []string{public, want} {
				if got, err := Fingerprint(arg); err != nil || got != want {
					t.Errorf("%s: %s, %v", arg, got, err)
				}
			}
		})
	}
}

func TestRefusesOtherFiles(t *testing.T) {
	r, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	marshal := func(key crypto.Signer) []byte {
		der, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			t.Fatal(err)
		}
		return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
	}
	for name, content := range map[string][]byte{
		"RSA": marshal(r), "P-384": marshal(p384), "no PEM": []byte("key"), "empty": nil,
		"another block": []byte("-----BEGIN FOO-----\nAAAA\n-----END FOO-----\n"),
	} {
		path := write(t, "key.pem", content)
		if _, err := Private(path); err == nil {
			t.Errorf("%s: taken for a private key", name)
		}
		if _, err := Public(path); err == nil {
			t.Errorf("%s: taken for a public key", name)
		}
	}
}
