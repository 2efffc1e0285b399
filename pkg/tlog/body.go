package tlog

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"fmt"
)

// Kind and Version name the only form of entry there is.
const (
	Kind    = "hashedrekord"
	Version = "0.0.2"
)

// The JSON form of a body. The fields are in the order of RFC 8785, and no
// value holds a character that its JSON would write otherwise than encoding/json
// does, so marshalling is canonical by itself.
type body struct {
	APIVersion string `json:"apiVersion"`
	Kind       string `json:"kind"`
	Spec       struct {
		HashedRekord hashedRekord `json:"hashedRekordV002"`
	} `json:"spec"`
}

type hashedRekord struct {
	Data struct {
		Algorithm string `json:"algorithm"`
		Digest    []byte `json:"digest"`
	} `json:"data"`
	Signature struct {
		Content  []byte `json:"content"`
		Verifier struct {
			KeyDetails  string `json:"keyDetails"`
			Certificate struct {
				RawBytes []byte `json:"rawBytes"`
			} `json:"x509Certificate"`
		} `json:"verifier"`
	} `json:"signature"`
}

const digestAlgorithm = "SHA2_256"

// keyDetails is the name that Sigstore gives to a key used with SHA-256.
func keyDetails(cert *x509.Certificate) (string, error) {
	if key, ok := cert.PublicKey.(*ecdsa.PublicKey); ok {
		switch key.Curve {
		case elliptic.P256():
			return "PKIX_ECDSA_P256_SHA_256", nil
		case elliptic.P384():
			return "PKIX_ECDSA_P384_SHA_256", nil
		}
	}
	return "", malformed("the verifier's key is neither P-256 nor P-384")
}

// EntryBody returns the body of the entry for a signature over digest by the
// key of cert.
func EntryBody(digest [32]byte, sig []byte, cert *x509.Certificate) ([]byte, error) {
	if cert == nil || len(cert.Raw) == 0 {
		return nil, malformed("no verifier certificate")
	}
	if len(sig) < MinSignature || len(sig) > MaxSignature {
		return nil, malformed("a signature of %d bytes", len(sig))
	}
	if len(cert.Raw) > MaxBody {
		return nil, malformed("a certificate of %d bytes", len(cert.Raw))
	}
	details, err := keyDetails(cert)
	if err != nil {
		return nil, err
	}
	b := body{APIVersion: Version, Kind: Kind}
	hr := &b.Spec.HashedRekord
	hr.Data.Algorithm, hr.Data.Digest = digestAlgorithm, digest[:]
	hr.Signature.Content = sig
	hr.Signature.Verifier.KeyDetails = details
	hr.Signature.Verifier.Certificate.RawBytes = cert.Raw
	out, err := json.Marshal(b)
	if err != nil {
		return nil, malformed("%w", err)
	}
	if len(out) > MaxBody {
		return nil, malformed("a body of %d bytes, at most %d allowed", len(out), MaxBody)
	}
	return out, nil
}

// Entry is what a body says; nothing in it has been verified.
type Entry struct {
	Digest      [32]byte
	Signature   []byte
	Certificate *x509.Certificate // of the key that is said to have signed Digest
}

// ParseBody reads a body. One that EntryBody would have written otherwise is
// refused: a log must not hold two forms of one statement.
func ParseBody(raw []byte) (*Entry, error) {
	if len(raw) > MaxBody {
		return nil, malformed("a body of %d bytes, at most %d allowed", len(raw), MaxBody)
	}
	var b body
	if err := json.Unmarshal(raw, &b); err != nil {
		return nil, malformed("body: %w", err)
	}
	hr := &b.Spec.HashedRekord
	if len(hr.Data.Digest) != hashSize {
		return nil, malformed("body: a digest of %d bytes", len(hr.Data.Digest))
	}
	cert, err := x509.ParseCertificate(hr.Signature.Verifier.Certificate.RawBytes)
	if err != nil {
		return nil, malformed("body: %w", err)
	}
	e := &Entry{Digest: [32]byte(hr.Data.Digest), Signature: hr.Signature.Content, Certificate: cert}
	again, err := EntryBody(e.Digest, e.Signature, cert)
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(raw, again) {
		return nil, malformed("body: not in the canonical form of %s %s", Kind, Version)
	}
	return e, nil
}

// CheckSignature says whether the key of the entry's certificate signed its
// digest.
func (e *Entry) CheckSignature() error {
	key, ok := e.Certificate.PublicKey.(*ecdsa.PublicKey)
	if !ok {
		return fmt.Errorf("%w: the verifier's key is not an ECDSA key", ErrSignature)
	}
	if !ecdsa.VerifyASN1(key, e.Digest[:], e.Signature) {
		return ErrSignature
	}
	return nil
}

// CertificateBody returns the body under which a certificate is logged: the
// CA that issued it signs the digest of the whole certificate. A log that
// vouches for such entries needs no look into the certificate, so what it says
// (an EK's hash is the machine's name for life) need not be public.
func CertificateBody(cert *x509.Certificate, sig []byte, issuer *x509.Certificate) ([]byte, error) {
	if cert == nil || len(cert.Raw) == 0 {
		return nil, malformed("no certificate")
	}
	return EntryBody(sha256.Sum256(cert.Raw), sig, issuer)
}
