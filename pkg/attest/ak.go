package attest

import (
	"bytes"
	"crypto"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/google/go-tpm/tpm2"
)

// Reasons why an AK is refused.
var (
	ErrAKAttributes = errors.New("AK is not a restricted signing key fixed to its TPM")
	ErrAKScheme     = errors.New("AK has no signing scheme that is taken")
	ErrAKCreation   = errors.New("AK creation is not certified")
	ErrAKHierarchy  = errors.New("AK was not created under a primary key of the endorsement hierarchy")
)

// AK is an attestation key that passed VerifyAK or that an AK certificate names.
type AK struct {
	Name         []byte // TPM name: u16 nameAlg ‖ digest
	Public       any    // *ecdsa.PublicKey or *rsa.PublicKey
	ParentName   []byte // TPM name of the storage key it was created under; nil when known from a certificate
	Manufacturer string // TPM_PT_MANUFACTURER as ASCII; what the TPM says it is
	Firmware     string
	Software     bool // swtpm and known virtual TPMs
}

// VerifyAK checks an AK's public area (restricted, fixedTPM, fixedParent,
// sensitiveDataOrigin, sign, not decrypt, a signing scheme that is not NULL)
// and its creation, certified by the key itself: under a primary key of the
// endorsement hierarchy, whose name is returned as ParentName.
//
// What creation data proves: a TPM computes the parent's qualified name from
// the hierarchy's handle and the parent's name, so a parent directly under the
// endorsement hierarchy can be told from any other by recomputing that hash.
// All of it is worth as much as the AK being in a genuine TPM, which credential
// activation shows and this function does not.
func VerifyAK(public, creationData, creationAttest, creationSignature []byte) (*AK, error) {
	p, err := decodeTPM[tpm2.TPMTPublic]("AK public area", public)
	if err != nil {
		return nil, err
	}
	if err := checkAKAttributes(p); err != nil {
		return nil, err
	}
	// Before anything else looks at the parameters: libraries panic on a NULL
	// scheme, and a restricted key without one can sign with whatever is asked.
	if err := checkAKScheme(p); err != nil {
		return nil, err
	}
	key, err := publicKey(p)
	if err != nil {
		return nil, err
	}
	name, err := nameOf(p.NameAlg, public)
	if err != nil {
		return nil, err
	}
	ak := &AK{Name: name, Public: key}
	if ak.ParentName, err = verifyCreation(p, ak, creationData, creationAttest, creationSignature); err != nil {
		return nil, err
	}
	return ak, nil
}

func checkAKAttributes(p *tpm2.TPMTPublic) error {
	a := p.ObjectAttributes
	for _, c := range []struct {
		name      string
		got, want bool
	}{
		{"restricted", a.Restricted, true},
		{"fixedTPM", a.FixedTPM, true},
		{"fixedParent", a.FixedParent, true},
		{"sensitiveDataOrigin", a.SensitiveDataOrigin, true},
		{"sign", a.SignEncrypt, true},
		{"decrypt", a.Decrypt, false},
		{"encryptedDuplication", a.EncryptedDuplication, false},
		{"stClear", a.STClear, false},
		{"x509sign", a.X509Sign, false},
	} {
		if c.got != c.want {
			return fmt.Errorf("%w: %s is %t", ErrAKAttributes, c.name, c.got)
		}
	}
	// Whatever could authorise the use of a key besides its own secret could one
	// day do so for a key of which a TPM has only the public half.
	if len(p.AuthPolicy.Buffer) != 0 || !a.UserWithAuth {
		return fmt.Errorf("%w: it can be used without its authorization value", ErrAKAttributes)
	}
	return nil
}

// checkAKScheme takes P-256 with ECDSA, and RSA-2048 with RSASSA or RSAPSS, over
// SHA-256 or stronger.
func checkAKScheme(p *tpm2.TPMTPublic) error {
	var scheme, hash tpm2.TPMAlgID
	switch p.Type {
	case tpm2.TPMAlgECC:
		parms, err := p.Parameters.ECCDetail()
		if err != nil {
			return fmt.Errorf("%w: %v", ErrTPMStructure, err)
		}
		if parms.CurveID != tpm2.TPMECCNistP256 {
			return fmt.Errorf("%w: curve %#x, want P-256", ErrAKScheme, uint16(parms.CurveID))
		}
		if parms.Symmetric.Algorithm != tpm2.TPMAlgNull || parms.KDF.Scheme != tpm2.TPMAlgNull {
			return fmt.Errorf("%w: symmetric cipher or KDF on a signing key", ErrAKScheme)
		}
		scheme = parms.Scheme.Scheme
		if scheme != tpm2.TPMAlgECDSA {
			return fmt.Errorf("%w: scheme %#x, want ECDSA", ErrAKScheme, uint16(scheme))
		}
		d, err := parms.Scheme.Details.ECDSA()
		if err != nil {
			return fmt.Errorf("%w: %v", ErrAKScheme, err)
		}
		hash = d.HashAlg
	case tpm2.TPMAlgRSA:
		parms, err := p.Parameters.RSADetail()
		if err != nil {
			return fmt.Errorf("%w: %v", ErrTPMStructure, err)
		}
		if parms.KeyBits != 2048 {
			return fmt.Errorf("%w: RSA of %d bits, want 2048", ErrAKScheme, parms.KeyBits)
		}
		if parms.Symmetric.Algorithm != tpm2.TPMAlgNull {
			return fmt.Errorf("%w: symmetric cipher on a signing key", ErrAKScheme)
		}
		switch scheme = parms.Scheme.Scheme; scheme {
		case tpm2.TPMAlgRSASSA:
			d, err := parms.Scheme.Details.RSASSA()
			if err != nil {
				return fmt.Errorf("%w: %v", ErrAKScheme, err)
			}
			hash = d.HashAlg
		case tpm2.TPMAlgRSAPSS:
			d, err := parms.Scheme.Details.RSAPSS()
			if err != nil {
				return fmt.Errorf("%w: %v", ErrAKScheme, err)
			}
			hash = d.HashAlg
		default:
			return fmt.Errorf("%w: scheme %#x, want RSASSA or RSAPSS", ErrAKScheme, uint16(scheme))
		}
		key, err := publicKey(p)
		if err != nil {
			return err
		}
		if err := checkAKKey(key); err != nil {
			return err
		}
	default:
		return fmt.Errorf("%w: key type %#x", ErrAKScheme, uint16(p.Type))
	}
	if h, ok := hashByID(uint64(hash)); !ok || h.weak {
		return fmt.Errorf("%w: hash %#x", ErrAKScheme, uint16(hash))
	}
	return nil
}

// verifyCreation checks TPMS_CREATION_DATA against the certificate that
// TPM2_CertifyCreation made of it, and returns the parent's name.
func verifyCreation(p *tpm2.TPMTPublic, ak *AK, data, attest, signature []byte) ([]byte, error) {
	a, err := decodeAttest(attest)
	if err != nil {
		return nil, err
	}
	if a.Type != tpm2.TPMSTAttestCreation {
		return nil, fmt.Errorf("%w: attestation of type %#x", ErrAKCreation, uint16(a.Type))
	}
	if _, err := verifySignature(ak.Public, attest, signature); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrAKCreation, err)
	}
	info, err := a.Attested.Creation()
	if err != nil {
		return nil, fmt.Errorf("%w: %v", ErrAKCreation, err)
	}
	if !bytes.Equal(info.ObjectName.Buffer, ak.Name) {
		return nil, fmt.Errorf("%w: it certifies another key", ErrAKCreation)
	}
	h, ok := hashByID(uint64(p.NameAlg))
	if !ok || !bytes.Equal(info.CreationHash.Buffer, h.sum(data)) {
		return nil, fmt.Errorf("%w: creation data is not what was certified", ErrAKCreation)
	}
	cd, err := decodeTPM[tpm2.TPMSCreationData]("creation data", data)
	if err != nil {
		return nil, err
	}
	parent := cd.ParentName.Buffer
	if err := checkName(parent); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrAKHierarchy, err)
	}
	ph, ok := hashByID(uint64(cd.ParentNameAlg))
	if !ok || binary.BigEndian.Uint16(parent) != ph.id {
		return nil, fmt.Errorf("%w: parent's name algorithm", ErrAKHierarchy)
	}
	// Part 1 §16: QN = nameAlg ‖ H(QN of the parent ‖ name); that of a hierarchy
	// is its handle.
	handle := binary.BigEndian.AppendUint32(nil, uint32(tpm2.TPMRHEndorsement))
	parentQN := append(bytes.Clone(parent[:2]), ph.sum(handle, parent)...)
	if !bytes.Equal(cd.ParentQualifiedName.Buffer, parentQN) {
		return nil, ErrAKHierarchy
	}
	qn := append(bytes.Clone(ak.Name[:2]), h.sum(parentQN, ak.Name)...)
	if !bytes.Equal(a.QualifiedSigner.Buffer, qn) {
		return nil, fmt.Errorf("%w: qualified signer is not the key under its parent", ErrAKCreation)
	}
	return bytes.Clone(parent), nil
}

// checkAKKey fails unless key is of a type that AKs may have.
func checkAKKey(key crypto.PublicKey) error {
	if err := checkEKKey(key); err != nil {
		return fmt.Errorf("%w: %w", ErrAKScheme, err)
	}
	if k, ok := key.(interface{ Size() int }); ok && k.Size() != 256 {
		return fmt.Errorf("%w: RSA of %d bits", ErrAKScheme, k.Size()*8)
	}
	return nil
}
