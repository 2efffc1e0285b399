package forge

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/x509"
	"encoding/binary"
	"encoding/hex"
	"testing"

	"github.com/google/go-tpm/tpm2"

	"github.com/rootlink/rootlink/pkg/attest"
)

// Kinds of endorsement keys, in the order in which a server asks for them.
const (
	EKP256    = "ecc-p256" // template L-2
	EKRSA2048 = "rsa-2048" // template L-1
	EKP384    = "ecc-p384" // template H-3
	EKRSA3072 = "rsa-3072" // template H-6
)

// TPMOptions say what a TPM is made of. The zero value is a P-256 EK and AK.
type TPMOptions struct {
	EK     string // kind of EK; EKP256 when empty
	RSAAK  bool   // RSA-2048 AK instead of P-256
	RSAPSS bool   // with RSAAK: RSAPSS instead of RSASSA

	// Hooks to bend one thing.
	EKPublic func(*tpm2.TPMTPublic)
	EKCert   func(*x509.Certificate)
	AKPublic func(*tpm2.TPMTPublic)
	Creation func(*tpm2.TPMSCreationData, *tpm2.TPMSAttest)
	EKKey    crypto.Signer // instead of a fresh one
}

// TPM is a software TPM: what it says is what a genuine one would say, except
// where a hook bent it.
type TPM struct {
	EKChain  [][]byte // certificate and intermediate
	EKPublic []byte   // TPMT_PUBLIC
	EKHash   [32]byte

	AKPublic          []byte // TPMT_PUBLIC
	AKName            []byte
	AKCreationData    []byte
	AKCreationAttest  []byte
	AKCreationSig     []byte
	ParentName        []byte // of the storage key in the endorsement hierarchy
	PCRs              []attest.PCRBank
	ResetCount        uint32
	RestartCount      uint32
	Clock             uint64
	Safe              bool
	FirmwareVersion   uint64
	ek, ak            crypto.Signer
	ekPublic          *tpm2.TPMTPublic
	rsapss            bool
	qualifiedSignerQN []byte
}

// NewTPM makes a TPM with an EK certificate by maker, an AK created and
// certified in it, and PCRs 0-23 of two banks at plausible values.
func NewTPM(tb testing.TB, maker *Maker, o TPMOptions) *TPM {
	tb.Helper()
	t := &TPM{ResetCount: 7, RestartCount: 2, Clock: 1_000_000, Safe: true, FirmwareVersion: 0x0001000200030004, rsapss: o.RSAPSS}
	t.makeEK(tb, maker, o)
	t.makeAK(tb, o)
	t.PCRs = []attest.PCRBank{{Bank: "sha256", Values: map[uint32][]byte{}}, {Bank: "sha384", Values: map[uint32][]byte{}}}
	for i := range uint32(24) {
		h2, h3 := sha256.Sum256([]byte{byte(i)}), sha512.Sum384([]byte{byte(i)})
		t.PCRs[0].Values[i], t.PCRs[1].Values[i] = h2[:], h3[:]
		switch {
		case i >= 10 && i != 14 && (i < 17 || i > 22): // never extended
			t.PCRs[0].Values[i], t.PCRs[1].Values[i] = make([]byte, 32), make([]byte, 48)
		case i >= 17: // no dynamic launch
			t.PCRs[0].Values[i], t.PCRs[1].Values[i] = bytes.Repeat([]byte{0xff}, 32), bytes.Repeat([]byte{0xff}, 48)
		}
	}
	return t
}

// Extend extends a PCR in every bank.
func (t *TPM) Extend(pcr uint32, data []byte) {
	for _, b := range t.PCRs {
		if b.Bank == "sha384" {
			d := sha512.Sum384(data)
			h := sha512.Sum384(append(bytes.Clone(b.Values[pcr]), d[:]...))
			b.Values[pcr] = h[:]
			continue
		}
		d := sha256.Sum256(data)
		h := sha256.Sum256(append(bytes.Clone(b.Values[pcr]), d[:]...))
		b.Values[pcr] = h[:]
	}
}

// Reboot counts a reset, clean or not. PCRs keep their values: the same image
// was booted.
func (t *TPM) Reboot(clean bool) {
	t.ResetCount++
	t.RestartCount = 0
	t.Safe = clean
}

// Quote signs a quote over the selection, bent by hook when it is not nil, and
// returns the values that belong to it.
func (t *TPM) Quote(tb testing.TB, extraData []byte, sel []attest.PCRSelection, hook func(*tpm2.TPMSAttest)) (att, sig []byte, values []attest.PCRBank) {
	tb.Helper()
	var list []tpm2.TPMSPCRSelection
	d := sha256.New()
	for _, s := range sel {
		mask := make([]byte, 3)
		bank := attest.PCRBank{Bank: s.Bank, Values: map[uint32][]byte{}}
		for _, have := range t.PCRs {
			if have.Bank != s.Bank {
				continue
			}
			for i := range uint32(24) {
				for _, want := range s.Indices {
					if i == want {
						mask[i/8] |= 1 << (i % 8)
						bank.Values[i] = have.Values[i]
						d.Write(have.Values[i])
					}
				}
			}
		}
		list = append(list, tpm2.TPMSPCRSelection{Hash: algID(s.Bank), PCRSelect: mask})
		if len(bank.Values) > 0 { // a bank that is off is selected empty, and the quote succeeds
			values = append(values, bank)
		}
	}
	a := &tpm2.TPMSAttest{
		Magic: tpm2.TPMGeneratedValue, Type: tpm2.TPMSTAttestQuote,
		QualifiedSigner: tpm2.TPM2BName{Buffer: t.qualifiedSignerQN},
		ExtraData:       tpm2.TPM2BData{Buffer: extraData},
		ClockInfo:       tpm2.TPMSClockInfo{Clock: t.Clock, ResetCount: t.ResetCount, RestartCount: t.RestartCount, Safe: tpm2.TPMIYesNo(t.Safe)},
		FirmwareVersion: t.FirmwareVersion,
		Attested: tpm2.NewTPMUAttest(tpm2.TPMSTAttestQuote, &tpm2.TPMSQuoteInfo{
			PCRSelect: tpm2.TPMLPCRSelection{PCRSelections: list},
			PCRDigest: tpm2.TPM2BDigest{Buffer: d.Sum(nil)},
		}),
	}
	if hook != nil {
		hook(a)
	}
	att = tpm2.Marshal(*a)
	return att, t.SignAK(tb, att), values
}

// SignAK signs message with the AK, as TPMT_SIGNATURE over SHA-256. A real TPM
// would sign nothing but its own structures with it.
func (t *TPM) SignAK(tb testing.TB, message []byte) []byte {
	tb.Helper()
	return t.SignAKWith(tb, message, crypto.SHA256)
}

// SignAKWith is SignAK over another hash.
func (t *TPM) SignAKWith(tb testing.TB, message []byte, hash crypto.Hash) []byte {
	tb.Helper()
	h := hash.New()
	h.Write(message)
	d := h.Sum(nil)
	hashID := map[crypto.Hash]tpm2.TPMAlgID{crypto.SHA1: tpm2.TPMAlgSHA1, crypto.SHA256: tpm2.TPMAlgSHA256, crypto.SHA384: tpm2.TPMAlgSHA384}[hash]
	switch k := t.ak.(type) {
	case *ecdsa.PrivateKey:
		r, s, err := ecdsa.Sign(rand.Reader, k, d)
		if err != nil {
			tb.Fatal(err)
		}
		return tpm2.Marshal(tpm2.TPMTSignature{
			SigAlg: tpm2.TPMAlgECDSA,
			Signature: tpm2.NewTPMUSignature(tpm2.TPMAlgECDSA, &tpm2.TPMSSignatureECC{
				Hash:       hashID,
				SignatureR: tpm2.TPM2BECCParameter{Buffer: r.FillBytes(make([]byte, 32))},
				SignatureS: tpm2.TPM2BECCParameter{Buffer: s.FillBytes(make([]byte, 32))},
			}),
		})
	case *rsa.PrivateKey:
		alg := tpm2.TPMAlgRSASSA
		sig, err := rsa.SignPKCS1v15(nil, k, hash, d)
		if t.rsapss {
			alg = tpm2.TPMAlgRSAPSS
			sig, err = rsa.SignPSS(rand.Reader, k, hash, d, nil)
		}
		if err != nil {
			tb.Fatal(err)
		}
		return tpm2.Marshal(tpm2.TPMTSignature{
			SigAlg:    alg,
			Signature: tpm2.NewTPMUSignature(alg, &tpm2.TPMSSignatureRSA{Hash: hashID, Sig: tpm2.TPM2BPublicKeyRSA{Buffer: sig}}),
		})
	}
	tb.Fatal("the TPM has no AK")
	return nil
}

// AKKey is the public half of the AK.
func (t *TPM) AKKey() crypto.PublicKey { return t.ak.Public() }

// EKKey is the public half of the EK.
func (t *TPM) EKKey() crypto.PublicKey { return t.ek.Public() }

// AK returns the AK as VerifyAK would.
func (t *TPM) AK() *attest.AK {
	return &attest.AK{Name: t.AKName, Public: t.AKKey(), ParentName: t.ParentName}
}

func (t *TPM) makeEK(tb testing.TB, maker *Maker, o TPMOptions) {
	tb.Helper()
	policyA, _ := hex.DecodeString("837197674484b3f81a90cc8d46a5d724fd52d76e06520b64f2a1da1b331469aa")
	policyB, _ := hex.DecodeString("b26e7d28d11a50bc53d882bcf5fd3a1a074148bb35d3b4e4cb1c0ad9bde419cacb47ba09699646150f9fc000f3f80e12")
	p := &tpm2.TPMTPublic{
		NameAlg: tpm2.TPMAlgSHA256, AuthPolicy: tpm2.TPM2BDigest{Buffer: policyA},
		ObjectAttributes: tpm2.TPMAObject{
			FixedTPM: true, FixedParent: true, SensitiveDataOrigin: true,
			AdminWithPolicy: true, Restricted: true, Decrypt: true,
		},
	}
	aes, bits, curve := tpm2.TPMKeyBits(128), 2048, elliptic.P256()
	if o.EK == EKP384 || o.EK == EKRSA3072 {
		p.NameAlg, p.AuthPolicy.Buffer, p.ObjectAttributes.UserWithAuth = tpm2.TPMAlgSHA384, policyB, true
		aes, bits, curve = 256, 3072, elliptic.P384()
	}
	sym := tpm2.TPMTSymDefObject{
		Algorithm: tpm2.TPMAlgAES,
		KeyBits:   tpm2.NewTPMUSymKeyBits(tpm2.TPMAlgAES, aes), Mode: tpm2.NewTPMUSymMode(tpm2.TPMAlgAES, tpm2.TPMAlgCFB),
	}
	t.ek = o.EKKey
	switch o.EK {
	case "", EKP256, EKP384:
		if t.ek == nil {
			k, err := ecdsa.GenerateKey(curve, rand.Reader)
			if err != nil {
				tb.Fatal(err)
			}
			t.ek = k
		}
		p.Type = tpm2.TPMAlgECC
		p.Parameters = tpm2.NewTPMUPublicParms(tpm2.TPMAlgECC, &tpm2.TPMSECCParms{
			Symmetric: sym,
			Scheme:    tpm2.TPMTECCScheme{Scheme: tpm2.TPMAlgNull}, CurveID: curveID(curve), KDF: tpm2.TPMTKDFScheme{Scheme: tpm2.TPMAlgNull},
		})
		p.Unique = eccPoint(tb, t.ek.Public().(*ecdsa.PublicKey))
	case EKRSA2048, EKRSA3072:
		if t.ek == nil {
			k, err := rsa.GenerateKey(rand.Reader, bits)
			if err != nil {
				tb.Fatal(err)
			}
			t.ek = k
		}
		p.Type = tpm2.TPMAlgRSA
		p.Parameters = tpm2.NewTPMUPublicParms(tpm2.TPMAlgRSA, &tpm2.TPMSRSAParms{
			Symmetric: sym,
			Scheme:    tpm2.TPMTRSAScheme{Scheme: tpm2.TPMAlgNull}, KeyBits: tpm2.TPMKeyBits(t.ek.Public().(*rsa.PublicKey).N.BitLen()),
		})
		p.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgRSA, &tpm2.TPM2BPublicKeyRSA{Buffer: t.ek.Public().(*rsa.PublicKey).N.Bytes()})
	default:
		tb.Fatalf("EK kind %q", o.EK)
	}
	if o.EKPublic != nil {
		o.EKPublic(p)
	}
	t.ekPublic = p
	t.EKPublic = tpm2.Marshal(*p)
	t.EKChain = maker.IssueEK(tb, t.ek.Public(), o.EKCert)
	t.EKHash = KeyHash(tb, t.ek.Public())
}

func (t *TPM) makeAK(tb testing.TB, o TPMOptions) {
	tb.Helper()
	p := &tpm2.TPMTPublic{
		Type: tpm2.TPMAlgECC, NameAlg: tpm2.TPMAlgSHA256,
		ObjectAttributes: tpm2.TPMAObject{
			FixedTPM: true, FixedParent: true, SensitiveDataOrigin: true,
			UserWithAuth: true, Restricted: true, SignEncrypt: true,
		},
	}
	if o.RSAAK {
		k, err := rsa.GenerateKey(rand.Reader, 2048)
		if err != nil {
			tb.Fatal(err)
		}
		t.ak = k
		p.Type = tpm2.TPMAlgRSA
		scheme := tpm2.TPMTRSAScheme{
			Scheme:  tpm2.TPMAlgRSASSA,
			Details: tpm2.NewTPMUAsymScheme(tpm2.TPMAlgRSASSA, &tpm2.TPMSSigSchemeRSASSA{HashAlg: tpm2.TPMAlgSHA256}),
		}
		if o.RSAPSS {
			scheme = tpm2.TPMTRSAScheme{
				Scheme:  tpm2.TPMAlgRSAPSS,
				Details: tpm2.NewTPMUAsymScheme(tpm2.TPMAlgRSAPSS, &tpm2.TPMSSigSchemeRSAPSS{HashAlg: tpm2.TPMAlgSHA256}),
			}
		}
		p.Parameters = tpm2.NewTPMUPublicParms(tpm2.TPMAlgRSA, &tpm2.TPMSRSAParms{
			Symmetric: tpm2.TPMTSymDefObject{Algorithm: tpm2.TPMAlgNull}, Scheme: scheme, KeyBits: 2048,
		})
		p.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgRSA, &tpm2.TPM2BPublicKeyRSA{Buffer: k.N.Bytes()})
	} else {
		k := P256(tb)
		t.ak = k
		p.Parameters = tpm2.NewTPMUPublicParms(tpm2.TPMAlgECC, &tpm2.TPMSECCParms{
			Symmetric: tpm2.TPMTSymDefObject{Algorithm: tpm2.TPMAlgNull},
			Scheme: tpm2.TPMTECCScheme{
				Scheme:  tpm2.TPMAlgECDSA,
				Details: tpm2.NewTPMUAsymScheme(tpm2.TPMAlgECDSA, &tpm2.TPMSSigSchemeECDSA{HashAlg: tpm2.TPMAlgSHA256}),
			},
			CurveID: tpm2.TPMECCNistP256, KDF: tpm2.TPMTKDFScheme{Scheme: tpm2.TPMAlgNull},
		})
		p.Unique = eccPoint(tb, &k.PublicKey)
	}
	if o.AKPublic != nil {
		o.AKPublic(p)
	}
	t.AKPublic = tpm2.Marshal(*p)
	t.AKName = nameOf(t.AKPublic)

	// The storage key's name is a function of the TPM's seed; here of its EK.
	t.ParentName = nameOf(t.EKHash[:])
	handle := binary.BigEndian.AppendUint32(nil, uint32(tpm2.TPMRHEndorsement))
	parentQN := nameOf(append(handle, t.ParentName...))
	t.qualifiedSignerQN = nameOf(append(bytes.Clone(parentQN), t.AKName...))
	empty := sha256.Sum256(nil)
	cd := &tpm2.TPMSCreationData{
		PCRDigest: tpm2.TPM2BDigest{Buffer: empty[:]}, Locality: tpm2.TPMALocality{TPMLocZero: true},
		ParentNameAlg: tpm2.TPMAlgSHA256, ParentName: tpm2.TPM2BName{Buffer: t.ParentName},
		ParentQualifiedName: tpm2.TPM2BName{Buffer: parentQN},
	}
	a := &tpm2.TPMSAttest{
		Magic: tpm2.TPMGeneratedValue, Type: tpm2.TPMSTAttestCreation,
		QualifiedSigner: tpm2.TPM2BName{Buffer: t.qualifiedSignerQN},
		ClockInfo:       tpm2.TPMSClockInfo{Clock: t.Clock, ResetCount: t.ResetCount, RestartCount: t.RestartCount, Safe: true},
		FirmwareVersion: t.FirmwareVersion,
	}
	info := &tpm2.TPMSCreationInfo{ObjectName: tpm2.TPM2BName{Buffer: t.AKName}}
	a.Attested = tpm2.NewTPMUAttest(tpm2.TPMSTAttestCreation, info)
	if o.Creation != nil {
		o.Creation(cd, a)
	}
	t.AKCreationData = tpm2.Marshal(*cd)
	if info.CreationHash.Buffer == nil {
		h := sha256.Sum256(t.AKCreationData)
		info.CreationHash.Buffer = h[:]
	}
	t.AKCreationAttest = tpm2.Marshal(*a)
	t.AKCreationSig = t.SignAK(tb, t.AKCreationAttest)
}

// nameOf is u16 SHA-256 ‖ SHA-256(b).
func nameOf(b []byte) []byte {
	h := sha256.Sum256(b)
	return append([]byte{0x00, 0x0b}, h[:]...)
}

func algID(bank string) tpm2.TPMAlgID {
	return map[string]tpm2.TPMAlgID{
		"sha1": tpm2.TPMAlgSHA1, "sha256": tpm2.TPMAlgSHA256,
		"sha384": tpm2.TPMAlgSHA384, "sha512": tpm2.TPMAlgSHA512,
	}[bank]
}

func curveID(c elliptic.Curve) tpm2.TPMECCCurve {
	if c == elliptic.P384() {
		return tpm2.TPMECCNistP384
	}
	return tpm2.TPMECCNistP256
}

func eccPoint(tb testing.TB, k *ecdsa.PublicKey) tpm2.TPMUPublicID {
	tb.Helper()
	raw, err := k.Bytes()
	if err != nil {
		tb.Fatal(err)
	}
	n := (len(raw) - 1) / 2
	return tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{
		X: tpm2.TPM2BECCParameter{Buffer: raw[1 : 1+n]}, Y: tpm2.TPM2BECCParameter{Buffer: raw[1+n:]},
	})
}
