package attest

import (
	"crypto/sha256"
	"crypto/x509"
	"sync"
)

// Signatures remembers signatures that were found good, for a server that sees
// thousands of leaves under one quote, one AK certificate and one EK chain.
//
// Whether a signature is good follows from the bytes of key, message and
// signature alone. No time, list or revocation can change it, and all of them
// are looked at again each time; so is everything else about the evidence.
// What was found bad is not remembered: nobody without a signing key can fill
// the memory. A nil *Signatures remembers nothing.
type Signatures struct {
	mu         sync.Mutex
	young, old map[[32]byte]tpmHash // by all that was checked; certificates have no tpmHash
}

// maxRemembered bounds each of the two generations. 100 bytes each make 1.6 MB.
const maxRemembered = 8192

// NewSignatures returns an empty memory.
func NewSignatures() *Signatures {
	return &Signatures{young: make(map[[32]byte]tpmHash)}
}

// What is remembered, so that bytes of one kind cannot pass for another.
const (
	rememberedCertificate = iota + 1
	rememberedQuote
)

func rememberKey(kind byte, parts ...[]byte) [32]byte {
	b := []byte{kind}
	for _, p := range parts {
		b = appendLP(b, p)
	}
	return sha256.Sum256(b)
}

// check returns what f did when it last succeeded for key, and calls it when
// that is not known.
func (s *Signatures) check(key [32]byte, f func() (tpmHash, error)) (tpmHash, error) {
	if s == nil {
		return f()
	}
	s.mu.Lock()
	h, ok := s.young[key]
	if !ok {
		if h, ok = s.old[key]; ok {
			s.keep(key, h)
		}
	}
	s.mu.Unlock()
	if ok {
		return h, nil
	}
	h, err := f()
	if err == nil {
		s.mu.Lock()
		s.keep(key, h)
		s.mu.Unlock()
	}
	return h, err
}

// keep is called with s.mu held. What was not asked for in a whole generation
// is forgotten.
func (s *Signatures) keep(key [32]byte, h tpmHash) {
	if len(s.young) >= maxRemembered {
		s.young, s.old = make(map[[32]byte]tpmHash), s.young
	}
	s.young[key] = h
}

// SignedBy is child.CheckSignatureFrom(ca), remembered.
func (s *Signatures) SignedBy(child, ca *x509.Certificate) error { return s.signedBy(child, ca) }

// signedBy is child.CheckSignatureFrom(ca), which depends on nothing but the
// two certificates.
func (s *Signatures) signedBy(child, ca *x509.Certificate) error {
	_, err := s.check(rememberKey(rememberedCertificate, child.Raw, ca.Raw), func() (tpmHash, error) {
		return tpmHash{}, child.CheckSignatureFrom(ca)
	})
	return err
}

// quoted is verifySignature with the key of an AK certificate.
func (s *Signatures) quoted(cert *x509.Certificate, message, signature []byte) (tpmHash, error) {
	return s.check(rememberKey(rememberedQuote, cert.RawSubjectPublicKeyInfo, message, signature), func() (tpmHash, error) {
		return verifySignature(cert.PublicKey, message, signature)
	})
}
