package tpm

import (
	"encoding/hex"
	"fmt"

	"github.com/google/go-tpm/tpm2"
)

// EKType names one of the TCG's default EK templates.
type EKType string

// Templates of the TCG EK Credential Profile for TPM 2.0 (version 2.5), annex B.
const (
	EKECCP256     EKType = "ecc-p256"      // L-2, NV 0x01c0000a
	EKRSA2048     EKType = "rsa-2048"      // L-1, NV 0x01c00002
	EKECCP256High EKType = "ecc-p256-high" // H-2, NV 0x01c00014
	EKRSA2048High EKType = "rsa-2048-high" // H-1, NV 0x01c00012
	EKECCP384     EKType = "ecc-p384"      // H-3, NV 0x01c00016
	EKRSA3072     EKType = "rsa-3072"      // H-6, NV 0x01c0001c
)

// DefaultEKTypes is the fixed order: one TPM holds several EKs, and the same one
// must be chosen each time, because its hash is the node's identity.
func DefaultEKTypes() []EKType {
	return []EKType{EKECCP256, EKRSA2048, EKECCP384, EKRSA3072, EKECCP256High, EKRSA2048High}
}

// ekSpec is what the profile fixes for one type.
type ekSpec struct {
	typ      EKType
	cert     tpm2.TPMHandle // NV index of the certificate
	nonce    tpm2.TPMHandle // NV index of the nonce, 0: none
	template tpm2.TPMHandle // NV index of a template that replaces the default, 0: none
	public   tpm2.TPMTPublic
	policy   ekPolicy
}

// ekPolicy is how the template's authPolicy is satisfied.
type ekPolicy struct {
	hash tpm2.TPMIAlgHash
	// or is nil for PolicyA alone (low range), else the branches of PolicyB:
	// PolicyA, or PolicyC through the policy NV index, which we never take.
	or []tpm2.TPM2BDigest
}

// Digests of the profile's annex B.6. TestPolicyB recomputes B from A and C.
var (
	policyA256 = mustHex("837197674484b3f81a90cc8d46a5d724fd52d76e06520b64f2a1da1b331469aa")
	policyC256 = mustHex("3767e2edd43ff45a3a7e1eaefcef78643dca964632e7aad82c673a30d8633fde")
	policyB256 = mustHex("ca3d0a99a2b93906f7a3342414efcfb3a385d44cd1fd459089d19b5071c0b7a0")
	policyA384 = mustHex("8bbf2266537c171cb56e403c4dc1d4b64f432611dc386e6f532050c3278c930e143e8bb1133824ccb431053871c6db53")
	policyC384 = mustHex("d6032ce61f2fb3c240eb3cf6a33237ef2b6a16f4293c22b455e261cffd217ad5b4947c2d73e63005eed2dc2b3593d165")
	policyB384 = mustHex("b26e7d28d11a50bc53d882bcf5fd3a1a074148bb35d3b4e4cb1c0ad9bde419cacb47ba09699646150f9fc000f3f80e12")
)

func mustHex(s string) []byte {
	b, err := hex.DecodeString(s)
	if err != nil {
		panic(err)
	}
	return b
}

func digests(d ...[]byte) []tpm2.TPM2BDigest {
	out := make([]tpm2.TPM2BDigest, len(d))
	for i := range d {
		out[i].Buffer = d[i]
	}
	return out
}

func ekSpecOf(t EKType) (*ekSpec, error) {
	low := ekPolicy{hash: tpm2.TPMAlgSHA256}
	high256 := ekPolicy{hash: tpm2.TPMAlgSHA256, or: digests(policyA256, policyC256)}
	high384 := ekPolicy{hash: tpm2.TPMAlgSHA384, or: digests(policyA384, policyC384)}
	switch t {
	case EKECCP256:
		return &ekSpec{t, 0x01c0000a, 0x01c0000b, 0x01c0000c, tpm2.ECCEKTemplate, low}, nil
	case EKRSA2048:
		return &ekSpec{t, 0x01c00002, 0x01c00003, 0x01c00004, tpm2.RSAEKTemplate, low}, nil
	case EKECCP256High:
		return &ekSpec{t, 0x01c00014, 0, 0, highTemplate(tpm2.TPMAlgSHA256, policyB256, 128, eccParms(tpm2.TPMECCNistP256)), high256}, nil
	case EKRSA2048High:
		return &ekSpec{t, 0x01c00012, 0, 0, highTemplate(tpm2.TPMAlgSHA256, policyB256, 128, rsaParms(2048)), high256}, nil
	case EKECCP384:
		return &ekSpec{t, 0x01c00016, 0, 0, highTemplate(tpm2.TPMAlgSHA384, policyB384, 256, eccParms(tpm2.TPMECCNistP384)), high384}, nil
	case EKRSA3072:
		return &ekSpec{t, 0x01c0001c, 0, 0, highTemplate(tpm2.TPMAlgSHA384, policyB384, 256, rsaParms(3072)), high384}, nil
	}
	return nil, fmt.Errorf("unknown EK type %q (known: %v)", t, DefaultEKTypes())
}

// keyParms sets the algorithm of a template: type, parameters for a symmetric
// cipher, and the empty unique field of the high range.
type keyParms func(sym tpm2.TPMTSymDefObject) (tpm2.TPMAlgID, tpm2.TPMUPublicParms, tpm2.TPMUPublicID)

func eccParms(curve tpm2.TPMECCCurve) keyParms {
	return func(sym tpm2.TPMTSymDefObject) (tpm2.TPMAlgID, tpm2.TPMUPublicParms, tpm2.TPMUPublicID) {
		return tpm2.TPMAlgECC,
			tpm2.NewTPMUPublicParms(tpm2.TPMAlgECC, &tpm2.TPMSECCParms{Symmetric: sym, CurveID: curve}),
			tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{})
	}
}

func rsaParms(bits tpm2.TPMKeyBits) keyParms {
	return func(sym tpm2.TPMTSymDefObject) (tpm2.TPMAlgID, tpm2.TPMUPublicParms, tpm2.TPMUPublicID) {
		return tpm2.TPMAlgRSA,
			tpm2.NewTPMUPublicParms(tpm2.TPMAlgRSA, &tpm2.TPMSRSAParms{Symmetric: sym, KeyBits: bits}),
			tpm2.NewTPMUPublicID(tpm2.TPMAlgRSA, &tpm2.TPM2BPublicKeyRSA{})
	}
}

func highTemplate(nameAlg tpm2.TPMIAlgHash, policy []byte, aes tpm2.TPMKeyBits, parms keyParms) tpm2.TPMTPublic {
	p := tpm2.TPMTPublic{
		NameAlg: nameAlg,
		ObjectAttributes: tpm2.TPMAObject{
			FixedTPM: true, FixedParent: true, SensitiveDataOrigin: true,
			UserWithAuth: true, AdminWithPolicy: true,
			Restricted: true, Decrypt: true,
		},
		AuthPolicy: tpm2.TPM2BDigest{Buffer: policy},
	}
	p.Type, p.Parameters, p.Unique = parms(tpm2.TPMTSymDefObject{
		Algorithm: tpm2.TPMAlgAES,
		KeyBits:   tpm2.NewTPMUSymKeyBits(tpm2.TPMAlgAES, aes),
		Mode:      tpm2.NewTPMUSymMode(tpm2.TPMAlgAES, tpm2.TPMAlgCFB),
	})
	return p
}
