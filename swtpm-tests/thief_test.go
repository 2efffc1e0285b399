package stories

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"os"
	"path/filepath"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
)

// thief SERVER-DIR BUNDLE PREFIX [WHEN]: has stolen the SVID authority's key
// from the server's data directory, and makes with it an SVID like that of
// BUNDLE, with the evidence of that, for a key of its own. PREFIX.pem and
// PREFIX.key are the SVID; with WHEN its dates are moved by that duration.
func cmdThief(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 3 {
		ts.Fatalf("usage: thief SERVER-DIR BUNDLE PREFIX [WHEN]")
	}
	var b struct {
		VerificationMaterial struct {
			Certificate struct {
				RawBytes string `json:"rawBytes"`
			} `json:"certificate"`
		} `json:"verificationMaterial"`
	}
	ts.Check(json.Unmarshal([]byte(ts.ReadFile(args[1])), &b))
	der, err := base64.StdEncoding.DecodeString(b.VerificationMaterial.Certificate.RawBytes)
	ts.Check(err)
	genuine, err := x509.ParseCertificate(der)
	ts.Check(err)

	keys, err := filepath.Glob(filepath.Join(ts.MkAbs(args[0]), "authority-*.key"))
	ts.Check(err)
	if len(keys) != 1 {
		ts.Fatalf("%d authority keys", len(keys))
	}
	text, err := os.ReadFile(keys[0])
	ts.Check(err)
	block, _ := pem.Decode(text)
	authority, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	ts.Check(err)

	own, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	ts.Check(err)
	spki, err := x509.MarshalPKIXPublicKey(own.Public())
	ts.Check(err)
	keyID := sha256.Sum256(spki)
	var moved time.Duration
	if len(args) > 3 {
		moved, err = time.ParseDuration(args[3])
		ts.Check(err)
	}
	made := &x509.Certificate{
		SerialNumber: genuine.SerialNumber, Subject: genuine.Subject, URIs: genuine.URIs,
		NotBefore: genuine.NotBefore.Add(moved), NotAfter: genuine.NotAfter.Add(moved),
		KeyUsage: genuine.KeyUsage, ExtKeyUsage: genuine.ExtKeyUsage, SubjectKeyId: keyID[:20],
	}
	for _, e := range genuine.Extensions {
		if e.Id.String() == "1.3.6.1.5.5.7.1.35" { // id-pe-cmw, the evidence
			made.ExtraExtensions = append(made.ExtraExtensions, pkix.Extension{Id: e.Id, Value: e.Value})
		}
	}
	if len(made.ExtraExtensions) != 1 {
		ts.Fatalf("the genuine SVID has no evidence")
	}
	issuer := &x509.Certificate{RawSubject: genuine.RawIssuer, SubjectKeyId: genuine.AuthorityKeyId}
	out, err := x509.CreateCertificate(rand.Reader, made, issuer, own.Public(), authority)
	ts.Check(err)
	keyDER, err := x509.MarshalPKCS8PrivateKey(own)
	ts.Check(err)
	ts.Check(os.WriteFile(ts.MkAbs(args[2]+".pem"), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: out}), 0o600))
	ts.Check(os.WriteFile(ts.MkAbs(args[2]+".key"), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}), 0o600))
}
