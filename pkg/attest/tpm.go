package attest

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/x509"
	"errors"
	"fmt"
	"hash"
	"math/big"

	"github.com/google/go-tpm/tpm2"
)

// ErrTPMStructure is wrapped by every error about the form of a TPM structure.
var ErrTPMStructure = errors.New("malformed TPM structure")

// tpmHash is a hash algorithm under its names.
type tpmHash struct {
	name string
	id   uint16 // TPM_ALG_ID
	size int
	hash crypto.Hash
	new  func() hash.Hash
	weak bool // collisions are practical: never enough alone
}

func hashes() [4]tpmHash {
	return [4]tpmHash{
		{"sha1", 0x0004, 20, crypto.SHA1, sha1.New, true},
		{"sha256", 0x000b, 32, crypto.SHA256, sha256.New, false},
		{"sha384", 0x000c, 48, crypto.SHA384, sha512.New384, false},
		{"sha512", 0x000d, 64, crypto.SHA512, sha512.New, false},
	}
}

func hashByName(name string) (tpmHash, bool) {
	for _, h := range hashes() {
		if h.name == name {
			return h, true
		}
	}
	return tpmHash{}, false
}

func hashByID(id uint64) (tpmHash, bool) {
	for _, h := range hashes() {
		if uint64(h.id) == id {
			return h, true
		}
	}
	return tpmHash{}, false
}

func (h tpmHash) sum(parts ...[]byte) []byte {
	d := h.new()
	for _, p := range parts {
		d.Write(p)
	}
	return d.Sum(nil)
}

// decodeTPM decodes one TPM structure that fills b exactly. go-tpm's Unmarshal
// ignores trailing bytes and its reflection may panic on hostile unions: the
// first is caught by encoding again, the second by recovering.
func decodeTPM[T tpm2.Marshallable, P interface {
	*T
	tpm2.Unmarshallable
}](what string, b []byte) (v *T, err error) {
	if len(b) == 0 || len(b) > MaxTPMStructure {
		return nil, fmt.Errorf("%w: %s of %d bytes", ErrTPMStructure, what, len(b))
	}
	defer func() {
		if r := recover(); r != nil {
			v, err = nil, fmt.Errorf("%w: %s: %v", ErrTPMStructure, what, r)
		}
	}()
	v, err = tpm2.Unmarshal[T, P](b)
	if err != nil {
		return nil, fmt.Errorf("%w: %s: %v", ErrTPMStructure, what, err)
	}
	if !bytes.Equal(tpm2.Marshal(*v), b) {
		return nil, fmt.Errorf("%w: %s has trailing bytes or is not in the one right encoding", ErrTPMStructure, what)
	}
	return v, nil
}

// nameOf is the TPM name of a public area: u16 nameAlg ‖ H(TPMT_PUBLIC).
func nameOf(nameAlg tpm2.TPMAlgID, public []byte) ([]byte, error) {
	h, ok := hashByID(uint64(nameAlg))
	if !ok || h.weak {
		return nil, fmt.Errorf("%w: name algorithm %#x", ErrTPMStructure, uint16(nameAlg))
	}
	return append([]byte{byte(h.id >> 8), byte(h.id)}, h.sum(public)...), nil
}

// publicKey returns the key of a public area, which for ECC is on its curve.
func publicKey(p *tpm2.TPMTPublic) (crypto.PublicKey, error) {
	switch p.Type {
	case tpm2.TPMAlgRSA:
		parms, err := p.Parameters.RSADetail()
		if err != nil {
			return nil, fmt.Errorf("%w: %v", ErrTPMStructure, err)
		}
		n, err := p.Unique.RSA()
		if err != nil {
			return nil, fmt.Errorf("%w: %v", ErrTPMStructure, err)
		}
		key := &rsa.PublicKey{N: new(big.Int).SetBytes(n.Buffer), E: int(parms.Exponent)}
		if key.E == 0 {
			key.E = 65537 // Part 2 §12.2.3.5: zero stands for 2^16 + 1
		}
		if key.N.BitLen() != int(parms.KeyBits) {
			return nil, fmt.Errorf("%w: modulus of %d bits in a key of %d", ErrTPMStructure, key.N.BitLen(), parms.KeyBits)
		}
		return key, nil
	case tpm2.TPMAlgECC:
		parms, err := p.Parameters.ECCDetail()
		if err != nil {
			return nil, fmt.Errorf("%w: %v", ErrTPMStructure, err)
		}
		pt, err := p.Unique.ECC()
		if err != nil {
			return nil, fmt.Errorf("%w: %v", ErrTPMStructure, err)
		}
		var curve elliptic.Curve
		switch parms.CurveID {
		case tpm2.TPMECCNistP256:
			curve = elliptic.P256()
		case tpm2.TPMECCNistP384:
			curve = elliptic.P384()
		default:
			return nil, fmt.Errorf("%w: curve %#x, want P-256 or P-384", ErrTPMStructure, uint16(parms.CurveID))
		}
		size := (curve.Params().BitSize + 7) / 8
		if len(pt.X.Buffer) > size || len(pt.Y.Buffer) > size {
			return nil, fmt.Errorf("%w: coordinate too long", ErrTPMStructure)
		}
		raw := make([]byte, 1+2*size) // TPMs may drop leading zeros
		raw[0] = 4
		copy(raw[1+size-len(pt.X.Buffer):], pt.X.Buffer)
		copy(raw[1+2*size-len(pt.Y.Buffer):], pt.Y.Buffer)
		key, err := ecdsa.ParseUncompressedPublicKey(curve, raw)
		if err != nil {
			return nil, fmt.Errorf("%w: point not on its curve", ErrTPMStructure)
		}
		return key, nil
	}
	return nil, fmt.Errorf("%w: key type %#x", ErrTPMStructure, uint16(p.Type))
}

// KeyHash is SHA-256 of a public key's SPKI DER: how keys, EKs above all, are
// named everywhere. It is taken over Go's encoding, so that it does not depend
// on how a certificate wrote the same key.
func KeyHash(key crypto.PublicKey) ([32]byte, error) {
	spki, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		return [32]byte{}, err
	}
	return sha256.Sum256(spki), nil
}

// EKHash is KeyHash of the key in an EK's TPMT_PUBLIC.
func EKHash(public []byte) ([32]byte, error) {
	p, err := decodeTPM[tpm2.TPMTPublic]("EK public area", public)
	if err != nil {
		return [32]byte{}, err
	}
	key, err := publicKey(p)
	if err != nil {
		return [32]byte{}, err
	}
	return KeyHash(key)
}
