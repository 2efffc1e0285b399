package attest

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"errors"
	"fmt"
	"math/big"
	"time"
)

// Ways to accept an EK, as they stand in AK certificates and selectors.
const (
	BasisMaker     = "maker"
	BasisAllowList = "allow_list"
)

// Reasons why an EK is refused.
var (
	ErrEKDenied    = errors.New("EK is on the deny-list")
	ErrEKUntrusted = errors.New("EK has no chain to a maker root and is not on the allow-list")
	ErrEKMismatch  = errors.New("EK public area is not the key in the EK certificate")
	ErrEKWeak      = errors.New("EK key is weak or of a type that is not taken")
	ErrEKCert      = errors.New("EK certificate is not acceptable")
)

// EKRoots is what decides whether an EK is genuine.
type EKRoots struct {
	Roots         []*x509.Certificate
	Intermediates []*x509.Certificate
	Allow         map[[32]byte]bool // KeyHash of the EK
	Deny          map[[32]byte]bool
}

// EK is an endorsement key that passed VerifyEK.
type EK struct {
	Hash     [32]byte // KeyHash: the node's identity
	Public   any      // *ecdsa.PublicKey or *rsa.PublicKey
	Basis    string   // BasisMaker or BasisAllowList
	RootHash [32]byte // SHA-256 of the maker root certificate; zero for allow_list
	Root     *x509.Certificate
}

// VerifyEK decides whether an EK is genuine: chain to a maker root at time at
// (critical extensions understood, key sizes, ROCA, EKU), or on the allow-list;
// the deny-list wins. public is TPMT_PUBLIC as the agent sent it: it must be a
// TCG template and hold the certificate's key.
func VerifyEK(chain [][]byte, public []byte, r EKRoots, at time.Time) (*EK, error) {
	_, key, err := parseEKPublic(public)
	if err != nil {
		return nil, err
	}
	return verifyEKKey(key, chain, r, at, nil)
}

// verifyEKKey is VerifyEK for a key known otherwise. With a nil key the chain
// must name it.
func verifyEKKey(key crypto.PublicKey, chain [][]byte, r EKRoots, at time.Time, known *Signatures) (*EK, error) {
	certs, err := parseChain(chain)
	if err != nil {
		return nil, err
	}
	if len(certs) > 0 {
		certKey, err := ekCertKey(certs[0])
		if err != nil {
			return nil, err
		}
		if key != nil && !keysEqual(key, certKey) {
			return nil, ErrEKMismatch
		}
		key = certKey
	}
	if key == nil {
		return nil, fmt.Errorf("%w: neither a certificate nor a key", ErrEKUntrusted)
	}
	if err := checkEKKey(key); err != nil {
		return nil, err
	}
	hash, err := KeyHash(key)
	if err != nil {
		return nil, err
	}
	if r.Deny[hash] {
		return nil, ErrEKDenied
	}
	ek := &EK{Hash: hash, Public: key}
	chainErr := error(nil)
	if len(certs) > 0 {
		root, err := verifyEKChain(certs, r, at, known)
		if err == nil {
			ek.Basis, ek.Root, ek.RootHash = BasisMaker, root, sha256.Sum256(root.Raw)
			return ek, nil
		}
		chainErr = err
	}
	if r.Allow[hash] {
		ek.Basis = BasisAllowList
		return ek, nil
	}
	if chainErr != nil {
		return nil, fmt.Errorf("%w: %w", ErrEKUntrusted, chainErr)
	}
	return nil, ErrEKUntrusted
}

// checkEKKey fails on key types and sizes that no maker should use any more,
// and on RSA keys from the broken generator known as ROCA, whose private keys
// can be computed.
func checkEKKey(key crypto.PublicKey) error {
	switch k := key.(type) {
	case *rsa.PublicKey:
		return checkRSA(k, 2048, 3072)
	case *ecdsa.PublicKey:
		if n := k.Curve.Params().BitSize; n != 256 && n != 384 {
			return fmt.Errorf("%w: curve of %d bits", ErrEKWeak, n)
		}
		if _, err := k.ECDH(); err != nil {
			return fmt.Errorf("%w: point not on its curve", ErrEKWeak)
		}
		return nil
	}
	return fmt.Errorf("%w: %T", ErrEKWeak, key)
}

func checkRSA(k *rsa.PublicKey, sizes ...int) error {
	ok := false
	for _, n := range sizes {
		ok = ok || k.N.BitLen() == n
	}
	if !ok {
		return fmt.Errorf("%w: RSA of %d bits", ErrEKWeak, k.N.BitLen())
	}
	if k.E != 65537 {
		return fmt.Errorf("%w: RSA exponent %d", ErrEKWeak, k.E)
	}
	if hasROCA(k.N) {
		return fmt.Errorf("%w: RSA key has the ROCA fingerprint (CVE-2017-15361)", ErrEKWeak)
	}
	return nil
}

// hasROCA tests the fingerprint of CVE-2017-15361: such a modulus is a power of
// 65537 modulo every small prime. A sound key has it with a chance of 2^-27.
func hasROCA(n *big.Int) bool {
	if n.Sign() <= 0 || n.Bit(0) == 0 {
		return false // not a modulus at all, refused elsewhere
	}
	primes := [...]int64{
		3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73, 79,
		83, 89, 97, 101, 103, 107, 109, 113, 127, 131, 137, 139, 149, 151, 157, 163, 167,
	}
	var m, q big.Int
	for _, p := range primes {
		want := m.Mod(n, q.SetInt64(p)).Int64()
		found := false
		for x, i := int64(1), int64(0); i < p; x, i = x*65537%p, i+1 {
			if x == want {
				found = true
				break
			}
		}
		if !found {
			return false
		}
	}
	return true
}

func keysEqual(a, b crypto.PublicKey) bool {
	switch k := a.(type) {
	case *rsa.PublicKey:
		return k.Equal(b)
	case *ecdsa.PublicKey:
		return k.Equal(b)
	}
	return false
}

// ekCertKey returns the key of an EK certificate. Some makers label the RSA key
// with id-RSAES-OAEP, which Go's parser does not know; the key bits are the same.
func ekCertKey(c *x509.Certificate) (crypto.PublicKey, error) {
	switch k := c.PublicKey.(type) {
	case *rsa.PublicKey, *ecdsa.PublicKey:
		return k, nil
	}
	var spki struct {
		Algorithm struct {
			ID   asn1.ObjectIdentifier
			Rest asn1.RawValue `asn1:"optional"`
		}
		Key asn1.BitString
	}
	rest, err := asn1.Unmarshal(c.RawSubjectPublicKeyInfo, &spki)
	if err != nil || len(rest) != 0 || !spki.Algorithm.ID.Equal(asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 7}) {
		return nil, fmt.Errorf("%w: key algorithm %v", ErrEKCert, spki.Algorithm.ID)
	}
	k, err := x509.ParsePKCS1PublicKey(spki.Key.RightAlign())
	if err != nil {
		return nil, fmt.Errorf("%w: %v", ErrEKCert, err)
	}
	return k, nil
}
