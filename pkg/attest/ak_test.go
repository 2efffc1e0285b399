package attest_test

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"testing"

	"github.com/google/go-tpm/tpm2"

	"github.com/rootlink/rootlink/internal/forge"
	"github.com/rootlink/rootlink/pkg/attest"
)

func eccParms(p *tpm2.TPMTPublic) *tpm2.TPMSECCParms {
	d, err := p.Parameters.ECCDetail()
	if err != nil {
		panic(err)
	}
	return d
}

func rsaParms(p *tpm2.TPMTPublic) *tpm2.TPMSRSAParms {
	d, err := p.Parameters.RSADetail()
	if err != nil {
		panic(err)
	}
	return d
}

func nullSym() tpm2.TPMTSymDefObject { return tpm2.TPMTSymDefObject{Algorithm: tpm2.TPMAlgNull} }

// qualified is the qualified name of a primary key under a hierarchy.
func qualified(hierarchy tpm2.TPMHandle, name []byte) []byte {
	h := sha256.Sum256(append(binary.BigEndian.AppendUint32(nil, uint32(hierarchy)), name...))
	return append([]byte{0, 11}, h[:]...)
}

func TestRefusesAK(t *testing.T) {
	maker := forge.NewMaker(t, "Forge Semiconductor")
	attr := func(bend func(*tpm2.TPMAObject)) forge.TPMOptions {
		return forge.TPMOptions{AKPublic: func(p *tpm2.TPMTPublic) { bend(&p.ObjectAttributes) }}
	}
	public := func(bend func(*tpm2.TPMTPublic)) forge.TPMOptions { return forge.TPMOptions{AKPublic: bend} }
	rsa := func(bend func(*tpm2.TPMSRSAParms)) forge.TPMOptions {
		return forge.TPMOptions{RSAAK: true, AKPublic: func(p *tpm2.TPMTPublic) { bend(rsaParms(p)) }}
	}
	creation := func(bend func(*tpm2.TPMSCreationData, *tpm2.TPMSAttest)) forge.TPMOptions {
		return forge.TPMOptions{Creation: bend}
	}
	for name, c := range map[string]struct {
		o    forge.TPMOptions
		bend func(*forge.TPM)
		want error
	}{
		"without restricted":          {o: attr(func(a *tpm2.TPMAObject) { a.Restricted = false }), want: attest.ErrAKAttributes},
		"without fixedTPM":            {o: attr(func(a *tpm2.TPMAObject) { a.FixedTPM = false }), want: attest.ErrAKAttributes},
		"without fixedParent":         {o: attr(func(a *tpm2.TPMAObject) { a.FixedParent = false }), want: attest.ErrAKAttributes},
		"without sensitiveDataOrigin": {o: attr(func(a *tpm2.TPMAObject) { a.SensitiveDataOrigin = false }), want: attest.ErrAKAttributes},
		"without sign":                {o: attr(func(a *tpm2.TPMAObject) { a.SignEncrypt = false }), want: attest.ErrAKAttributes},
		"with decrypt":                {o: attr(func(a *tpm2.TPMAObject) { a.Decrypt = true }), want: attest.ErrAKAttributes},
		"with a policy":               {o: public(func(p *tpm2.TPMTPublic) { p.AuthPolicy.Buffer = make([]byte, 32) }), want: attest.ErrAKAttributes},
		"without userWithAuth":        {o: attr(func(a *tpm2.TPMAObject) { a.UserWithAuth = false }), want: attest.ErrAKAttributes},
		"with x509sign":               {o: attr(func(a *tpm2.TPMAObject) { a.X509Sign = true }), want: attest.ErrAKAttributes},

		"NULL signing scheme": {want: attest.ErrAKScheme, o: public(func(p *tpm2.TPMTPublic) {
			eccParms(p).Scheme = tpm2.TPMTECCScheme{Scheme: tpm2.TPMAlgNull}
		})},
		"NULL signing scheme, RSA": {want: attest.ErrAKScheme, o: rsa(func(p *tpm2.TPMSRSAParms) {
			p.Scheme = tpm2.TPMTRSAScheme{Scheme: tpm2.TPMAlgNull}
		})},
		"SHA-1 scheme": {want: attest.ErrAKScheme, o: public(func(p *tpm2.TPMTPublic) {
			eccParms(p).Scheme.Details = tpm2.NewTPMUAsymScheme(tpm2.TPMAlgECDSA, &tpm2.TPMSSigSchemeECDSA{HashAlg: tpm2.TPMAlgSHA1})
		})},
		"ECDAA scheme": {want: attest.ErrAKScheme, o: public(func(p *tpm2.TPMTPublic) {
			eccParms(p).Scheme = tpm2.TPMTECCScheme{
				Scheme:  tpm2.TPMAlgECDAA,
				Details: tpm2.NewTPMUAsymScheme(tpm2.TPMAlgECDAA, &tpm2.TPMSSchemeECDAA{HashAlg: tpm2.TPMAlgSHA256}),
			}
		})},
		"OAEP scheme": {want: attest.ErrAKScheme, o: rsa(func(p *tpm2.TPMSRSAParms) {
			p.Scheme = tpm2.TPMTRSAScheme{
				Scheme:  tpm2.TPMAlgOAEP,
				Details: tpm2.NewTPMUAsymScheme(tpm2.TPMAlgOAEP, &tpm2.TPMSEncSchemeOAEP{HashAlg: tpm2.TPMAlgSHA256}),
			}
		})},
		"P-384":      {want: attest.ErrAKScheme, o: public(func(p *tpm2.TPMTPublic) { eccParms(p).CurveID = tpm2.TPMECCNistP384 })},
		"RSA-1024":   {want: attest.ErrAKScheme, o: rsa(func(p *tpm2.TPMSRSAParms) { p.KeyBits = 1024 })},
		"exponent 3": {want: attest.ErrAKScheme, o: rsa(func(p *tpm2.TPMSRSAParms) { p.Exponent = 3 })},
		"storage cipher": {want: attest.ErrAKScheme, o: public(func(p *tpm2.TPMTPublic) {
			eccParms(p).Symmetric = tpm2.TPMTSymDefObject{
				Algorithm: tpm2.TPMAlgAES,
				KeyBits:   tpm2.NewTPMUSymKeyBits(tpm2.TPMAlgAES, tpm2.TPMKeyBits(128)), Mode: tpm2.NewTPMUSymMode(tpm2.TPMAlgAES, tpm2.TPMAlgCFB),
			}
		})},
		"SHA-1 name": {want: attest.ErrTPMStructure, o: public(func(p *tpm2.TPMTPublic) { p.NameAlg = tpm2.TPMAlgSHA1 })},
		"point off its curve": {want: attest.ErrTPMStructure, o: public(func(p *tpm2.TPMTPublic) {
			pt, _ := p.Unique.ECC()
			pt.X.Buffer[0] ^= 1
		})},
		"symmetric key": {want: attest.ErrAKScheme, o: public(func(p *tpm2.TPMTPublic) {
			p.Type = tpm2.TPMAlgSymCipher
			p.Parameters = tpm2.NewTPMUPublicParms(tpm2.TPMAlgSymCipher, &tpm2.TPMSSymCipherParms{Sym: nullSym()})
			p.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgSymCipher, &tpm2.TPM2BDigest{Buffer: make([]byte, 32)})
		})},
		"trailing bytes": {want: attest.ErrTPMStructure, bend: func(p *forge.TPM) { p.AKPublic = append(p.AKPublic, 0) }},
		"huge":           {want: attest.ErrTPMStructure, bend: func(p *forge.TPM) { p.AKPublic = make([]byte, attest.MaxTPMStructure+1) }},

		"creation of another key": {want: attest.ErrAKCreation, bend: func(p *forge.TPM) {
			o := forge.NewTPM(t, maker, forge.TPMOptions{})
			p.AKCreationData, p.AKCreationAttest = o.AKCreationData, o.AKCreationAttest
			p.AKCreationSig = p.SignAK(t, p.AKCreationAttest)
		}},
		"creation that names another key": {want: attest.ErrAKCreation, o: creation(func(_ *tpm2.TPMSCreationData, a *tpm2.TPMSAttest) {
			info, err := a.Attested.Creation()
			if err != nil {
				t.Fatal(err)
			}
			info.ObjectName.Buffer = append([]byte{0, 11}, make([]byte, 32)...)
		})},
		"creation signed by another key": {want: attest.ErrAKCreation, bend: func(p *forge.TPM) {
			p.AKCreationSig = forge.NewTPM(t, maker, forge.TPMOptions{}).SignAK(t, p.AKCreationAttest)
		}},
		"creation data swapped": {want: attest.ErrAKCreation, bend: func(p *forge.TPM) {
			p.AKCreationData = forge.NewTPM(t, maker, forge.TPMOptions{}).AKCreationData
		}},
		"creation data with trailing bytes": {want: attest.ErrAKCreation, bend: func(p *forge.TPM) { p.AKCreationData = append(p.AKCreationData, 0) }},
		"quote shown as creation": {want: attest.ErrAKCreation, bend: func(p *forge.TPM) {
			p.AKCreationAttest, p.AKCreationSig, _ = p.Quote(t, make([]byte, 32), []attest.PCRSelection{{Bank: "sha256", Indices: []uint32{7}}}, nil)
		}},
		"creation without the magic": {want: attest.ErrQuoteMagic, o: creation(func(_ *tpm2.TPMSCreationData, a *tpm2.TPMSAttest) { a.Magic = 0xff544348 })},
		"creation signature missing": {want: attest.ErrTPMStructure, bend: func(p *forge.TPM) { p.AKCreationSig = nil }},
		"owner hierarchy": {want: attest.ErrAKHierarchy, o: creation(func(d *tpm2.TPMSCreationData, _ *tpm2.TPMSAttest) {
			d.ParentQualifiedName.Buffer = qualified(tpm2.TPMRHOwner, d.ParentName.Buffer)
		})},
		"NULL hierarchy": {want: attest.ErrAKHierarchy, o: creation(func(d *tpm2.TPMSCreationData, _ *tpm2.TPMSAttest) {
			d.ParentQualifiedName.Buffer = qualified(tpm2.TPMRHNull, d.ParentName.Buffer)
		})},
		"primary AK": {want: attest.ErrAKHierarchy, o: creation(func(d *tpm2.TPMSCreationData, _ *tpm2.TPMSAttest) {
			handle := binary.BigEndian.AppendUint32(nil, uint32(tpm2.TPMRHEndorsement))
			d.ParentNameAlg, d.ParentName.Buffer, d.ParentQualifiedName.Buffer = tpm2.TPMAlgNull, handle, handle
		})},
		"parent that is not a primary key": {want: attest.ErrAKHierarchy, o: creation(func(d *tpm2.TPMSCreationData, _ *tpm2.TPMSAttest) {
			d.ParentName.Buffer = append([]byte{0, 11}, make([]byte, 32)...)
		})},
		"qualified signer of another parent": {want: attest.ErrAKCreation, o: creation(func(_ *tpm2.TPMSCreationData, a *tpm2.TPMSAttest) {
			a.QualifiedSigner.Buffer = append([]byte{0, 11}, make([]byte, 32)...)
		})},
	} {
		t.Run(name, func(t *testing.T) {
			p := forge.NewTPM(t, maker, c.o)
			if c.bend != nil {
				c.bend(p)
			}
			ak, err := attest.VerifyAK(p.AKPublic, p.AKCreationData, p.AKCreationAttest, p.AKCreationSig)
			if !errors.Is(err, c.want) || ak != nil {
				t.Errorf("got %v, %v; want %v", ak, err, c.want)
			}
		})
	}
}

// FuzzVerifyAK looks for panics: go-tpm decodes by reflection, and unions are
// where it has panicked.
func FuzzVerifyAK(f *testing.F) {
	m := forge.NewMaker(f, "Forge Semiconductor")
	for _, o := range []forge.TPMOptions{{}, {RSAAK: true}} {
		p := forge.NewTPM(f, m, o)
		f.Add(p.AKPublic, p.AKCreationData, p.AKCreationAttest, p.AKCreationSig)
		f.Add(p.EKPublic, p.AKCreationData, p.AKCreationAttest, p.AKCreationSig)
	}
	f.Fuzz(func(t *testing.T, public, data, att, sig []byte) {
		if ak, err := attest.VerifyAK(public, data, att, sig); err == nil && len(ak.Name) != 34 {
			t.Errorf("accepted an AK with name %x", ak.Name)
		}
		_, _ = attest.EKHash(public)
		_, _, _ = attest.MakeCredential(public, append([]byte{0, 11}, make([]byte, 32)...), make([]byte, 32))
	})
}
