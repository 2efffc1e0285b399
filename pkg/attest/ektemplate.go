package attest

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"

	"github.com/google/go-tpm/tpm2"
)

// ErrEKTemplate means that a public area is not that of a TCG endorsement key.
var ErrEKTemplate = errors.New("not a TCG endorsement key template")

// Policies of the TCG EK Credential Profile 2.6, annex B: PolicySecret on the
// endorsement hierarchy, and its disjunction with an NV-authorised policy.
const (
	ekPolicyA    = "837197674484b3f81a90cc8d46a5d724fd52d76e06520b64f2a1da1b331469aa"
	ekPolicyB256 = "ca3d0a99a2b93906f7a3342414efcfb3a385d44cd1fd459089d19b5071c0b7a0"
	ekPolicyB384 = "b26e7d28d11a50bc53d882bcf5fd3a1a074148bb35d3b4e4cb1c0ad9bde419cacb47ba09699646150f9fc000f3f80e12"
)

// ekTemplate is what varies between the TCG default templates.
type ekTemplate struct {
	name         string
	rsaBits      int
	curve        tpm2.TPMECCCurve
	nameAlg      tpm2.TPMAlgID
	aesBits      tpm2.TPMKeyBits
	policy       string
	userWithAuth bool
}

// ekTemplates are the storage templates of the profile for the key types that
// we take: L-1, L-2 and the high-range ones.
func ekTemplates() []ekTemplate {
	return []ekTemplate{
		{"L-1", 2048, 0, tpm2.TPMAlgSHA256, 128, ekPolicyA, false},
		{"L-2", 0, tpm2.TPMECCNistP256, tpm2.TPMAlgSHA256, 128, ekPolicyA, false},
		{"H-1", 2048, 0, tpm2.TPMAlgSHA256, 128, ekPolicyB256, true},
		{"H-2", 0, tpm2.TPMECCNistP256, tpm2.TPMAlgSHA256, 128, ekPolicyB256, true},
		{"H-3", 0, tpm2.TPMECCNistP384, tpm2.TPMAlgSHA384, 256, ekPolicyB384, true},
		{"H-6", 3072, 0, tpm2.TPMAlgSHA384, 256, ekPolicyB384, true},
	}
}

// public fills the template with the unique field of p, nil when p is of
// another type.
func (t ekTemplate) public(p *tpm2.TPMTPublic) *tpm2.TPMTPublic {
	policy, err := hex.DecodeString(t.policy)
	if err != nil {
		return nil
	}
	sym := tpm2.TPMTSymDefObject{
		Algorithm: tpm2.TPMAlgAES,
		KeyBits:   tpm2.NewTPMUSymKeyBits(tpm2.TPMAlgAES, t.aesBits),
		Mode:      tpm2.NewTPMUSymMode(tpm2.TPMAlgAES, tpm2.TPMAlgCFB),
	}
	out := &tpm2.TPMTPublic{
		Type:    p.Type,
		NameAlg: t.nameAlg,
		ObjectAttributes: tpm2.TPMAObject{
			FixedTPM: true, FixedParent: true, SensitiveDataOrigin: true,
			UserWithAuth: t.userWithAuth, AdminWithPolicy: true,
			Restricted: true, Decrypt: true,
		},
		AuthPolicy: tpm2.TPM2BDigest{Buffer: policy},
		Unique:     p.Unique,
	}
	switch {
	case p.Type == tpm2.TPMAlgRSA && t.rsaBits != 0:
		out.Parameters = tpm2.NewTPMUPublicParms(tpm2.TPMAlgRSA, &tpm2.TPMSRSAParms{
			Symmetric: sym, Scheme: tpm2.TPMTRSAScheme{Scheme: tpm2.TPMAlgNull}, KeyBits: tpm2.TPMKeyBits(t.rsaBits),
		})
	case p.Type == tpm2.TPMAlgECC && t.curve != 0:
		out.Parameters = tpm2.NewTPMUPublicParms(tpm2.TPMAlgECC, &tpm2.TPMSECCParms{
			Symmetric: sym, Scheme: tpm2.TPMTECCScheme{Scheme: tpm2.TPMAlgNull}, CurveID: t.curve,
			KDF: tpm2.TPMTKDFScheme{Scheme: tpm2.TPMAlgNull},
		})
	default:
		return nil
	}
	return out
}

// parseEKPublic decodes an EK's public area and fails unless it is one of the
// TCG templates around some key. The attributes matter: activation with a key
// that is not restricted, or could leave its TPM, proves nothing.
func parseEKPublic(public []byte) (*tpm2.TPMTPublic, crypto.PublicKey, error) {
	p, err := decodeTPM[tpm2.TPMTPublic]("EK public area", public)
	if err != nil {
		return nil, nil, err
	}
	key, err := publicKey(p)
	if err != nil {
		return nil, nil, err
	}
	for _, t := range ekTemplates() {
		if want := t.public(p); want != nil && bytes.Equal(tpm2.Marshal(*want), public) {
			return p, key, nil
		}
	}
	return nil, nil, fmt.Errorf("%w: attributes %#x", ErrEKTemplate, attributes(p))
}

// attributes returns TPMA_OBJECT as it stands in the public area: the four
// bytes behind type and name algorithm.
func attributes(p *tpm2.TPMTPublic) []byte { return tpm2.Marshal(*p)[4:8] }

// MakeCredential seals secret to (ek, ak name) for TPM2_ActivateCredential: only
// a TPM that holds both keys can open it. ekPublic is TPMT_PUBLIC and must be
// the one that VerifyEK accepted. The results are the contents of
// TPM2B_ID_OBJECT and TPM2B_ENCRYPTED_SECRET.
func MakeCredential(ekPublic []byte, akName, secret []byte) (blob, encryptedSecret []byte, err error) {
	p, _, err := parseEKPublic(ekPublic)
	if err != nil {
		return nil, nil, err
	}
	h, ok := hashByID(uint64(p.NameAlg))
	if !ok || len(secret) == 0 || len(secret) > h.size {
		return nil, nil, fmt.Errorf("a credential of %d bytes for an EK with digests of %d", len(secret), h.size)
	}
	if err := checkName(akName); err != nil {
		return nil, nil, err
	}
	ek, err := tpm2.ImportEncapsulationKey(p)
	if err != nil {
		return nil, nil, fmt.Errorf("EK: %w", err)
	}
	return tpm2.CreateCredential(rand.Reader, ek, akName, secret)
}

// checkName fails unless name is u16 nameAlg ‖ digest of a strong algorithm.
func checkName(name []byte) error {
	if len(name) < 2 {
		return fmt.Errorf("%w: name of %d bytes", ErrTPMStructure, len(name))
	}
	h, ok := hashByID(uint64(name[0])<<8 | uint64(name[1]))
	if !ok || h.weak || len(name) != 2+h.size {
		return fmt.Errorf("%w: name of %d bytes, algorithm %x", ErrTPMStructure, len(name), name[:2])
	}
	return nil
}
