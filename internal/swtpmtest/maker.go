package swtpmtest

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"math/big"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"
)

// Maker is a forged TPM maker: a root, and unless EK certificates come straight
// from it, an intermediate.
type Maker struct {
	Root         *x509.Certificate
	Intermediate *x509.Certificate // issues EK certificates that have a chain in NV

	rootKey, intermediateKey *ecdsa.PrivateKey
}

// NewMaker makes a maker whose certificates are valid for ten years around now.
func NewMaker(t testing.TB, name string) *Maker {
	t.Helper()
	m, err := newMaker(name)
	if err != nil {
		t.Fatalf("make a TPM maker: %v", err)
	}
	return m
}

func newMaker(name string) (*Maker, error) {
	m := &Maker{}
	var err error
	if m.rootKey, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		return nil, err
	}
	if m.intermediateKey, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		return nil, err
	}
	ca := func(cn string) *x509.Certificate {
		return &x509.Certificate{
			SerialNumber: serial(), Subject: pkix.Name{CommonName: cn, Organization: []string{name}},
			NotBefore: time.Now().Add(-5 * 365 * 24 * time.Hour), NotAfter: time.Now().Add(5 * 365 * 24 * time.Hour),
			IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		}
	}
	if m.Root, err = sign(ca(name+" Root"), nil, &m.rootKey.PublicKey, m.rootKey); err != nil {
		return nil, err
	}
	m.Intermediate, err = sign(ca(name+" EK CA"), m.Root, &m.intermediateKey.PublicKey, m.rootKey)
	return m, err
}

func sign(tmpl, parent *x509.Certificate, pub any, key *ecdsa.PrivateKey) (*x509.Certificate, error) {
	if parent == nil {
		parent = tmpl
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, pub, key)
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}

func serial() *big.Int {
	n, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		panic(err)
	}
	return n.Add(n, big.NewInt(1))
}

// certify issues an EK certificate as the TCG EK Credential Profile wants it:
// empty subject, manufacturer, model and version in a critical SAN, EKU
// tcg-kp-EKCertificate.
func (m *Maker) certify(pub any, rsa, viaIntermediate bool) ([]byte, error) {
	san, err := ekSAN()
	if err != nil {
		return nil, err
	}
	usage := x509.KeyUsageKeyAgreement
	if rsa {
		usage = x509.KeyUsageKeyEncipherment
	}
	tmpl := &x509.Certificate{
		SerialNumber: serial(),
		NotBefore:    time.Now().Add(-24 * time.Hour), NotAfter: time.Now().Add(4 * 365 * 24 * time.Hour),
		KeyUsage: usage, BasicConstraintsValid: true,
		UnknownExtKeyUsage: []asn1.ObjectIdentifier{{2, 23, 133, 8, 1}},
		ExtraExtensions:    []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 17}, Critical: true, Value: san}},
	}
	parent, key := m.Root, m.rootKey
	if viaIntermediate {
		parent, key = m.Intermediate, m.intermediateKey
	}
	c, err := sign(tmpl, parent, pub, key)
	if err != nil {
		return nil, err
	}
	return c.Raw, nil
}

func ekSAN() ([]byte, error) {
	var rdn pkix.RDNSequence
	for i, v := range []string{"id:49424D00", "swtpm", "id:20191023"} { // manufacturer, model, version
		rdn = append(rdn, pkix.RelativeDistinguishedNameSET{{
			Type: asn1.ObjectIdentifier{2, 23, 133, 2, i + 1}, Value: v,
		}})
	}
	name, err := asn1.Marshal(rdn)
	if err != nil {
		return nil, err
	}
	return asn1.Marshal([]asn1.RawValue{{Class: asn1.ClassContextSpecific, Tag: 4, IsCompound: true, Bytes: name}})
}

// manufacture makes the EK certificate and writes it into NV.
func (s *TPM) manufacture(c *config) error {
	if c.kind == NoEK {
		return nil
	}
	return s.with(func(t Sender) error {
		var tmpl tpm2.TPMTPublic
		var index tpm2.TPMHandle
		switch c.kind {
		case RSA2048:
			tmpl, index = tpm2.RSAEKTemplate, 0x01c00002
		case ECCP384:
			tmpl, index = p384Template(), 0x01c00016
		default:
			tmpl, index = tpm2.ECCEKTemplate, 0x01c0000a
		}
		rsp, err := tpm2.CreatePrimary{PrimaryHandle: tpm2.TPMRHEndorsement, InPublic: tpm2.New2B(tmpl)}.Execute(t)
		if err != nil {
			return wrap("create EK", err)
		}
		if _, err := (tpm2.FlushContext{FlushHandle: rsp.ObjectHandle}).Execute(t); err != nil {
			return wrap("flush EK", err)
		}
		area, err := rsp.OutPublic.Contents()
		if err != nil {
			return err
		}
		pub, err := tpm2.Pub(*area)
		if err != nil {
			return err
		}
		if s.EKCert, err = s.Maker.certify(pub, c.kind == RSA2048, c.chainInNV); err != nil {
			return wrap("EK certificate", err)
		}
		inNV := s.EKCert
		if c.wrongEKCert != nil {
			inNV = c.wrongEKCert
		}
		if err := WriteNV(t, index, inNV); err != nil {
			return err
		}
		if c.chainInNV {
			return WriteNV(t, 0x01c00100, s.Maker.Intermediate.Raw)
		}
		return nil
	})
}

// WriteNV defines an NV index as a TPM maker does (platform-created, readable by
// everyone, outliving TPM2_Clear) and writes it.
func WriteNV(t Sender, index tpm2.TPMHandle, data []byte) error {
	return writeNV(t, index, data, true)
}

// WriteNVWithDA is WriteNV for an index whose readers are subject to the
// TPM's dictionary attack protection.
func WriteNVWithDA(t Sender, index tpm2.TPMHandle, data []byte) error {
	return writeNV(t, index, data, false)
}

// UndefineNV deletes an index that WriteNV defined.
func UndefineNV(t Sender, index tpm2.TPMHandle) error {
	rp, err := tpm2.NVReadPublic{NVIndex: index}.Execute(t)
	if err != nil {
		return wrap("read NV public", err)
	}
	_, err = tpm2.NVUndefineSpace{
		AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHPlatform, Auth: tpm2.PasswordAuth(nil)},
		NVIndex:    tpm2.NamedHandle{Handle: index, Name: rp.NVName},
	}.Execute(t)
	return wrap("undefine NV", err)
}

func writeNV(t Sender, index tpm2.TPMHandle, data []byte, noDA bool) error {
	platform := tpm2.AuthHandle{Handle: tpm2.TPMRHPlatform, Auth: tpm2.PasswordAuth(nil)}
	pub := tpm2.TPMSNVPublic{
		NVIndex: index, NameAlg: tpm2.TPMAlgSHA256,
		Attributes: tpm2.TPMANV{
			PPWrite: true, PPRead: true, OwnerRead: true, AuthRead: true,
			NoDA: noDA, PlatformCreate: true, NT: tpm2.TPMNTOrdinary,
		},
		DataSize: uint16(len(data)),
	}
	if _, err := (tpm2.NVDefineSpace{AuthHandle: platform, PublicInfo: tpm2.New2B(pub)}).Execute(t); err != nil {
		return wrap("define NV", err)
	}
	for off := 0; off < len(data); off += 1024 {
		rp, err := tpm2.NVReadPublic{NVIndex: index}.Execute(t)
		if err != nil {
			return wrap("read NV public", err)
		}
		if _, err := (tpm2.NVWrite{
			AuthHandle: platform,
			NVIndex:    tpm2.NamedHandle{Handle: index, Name: rp.NVName},
			Data:       tpm2.TPM2BMaxNVBuffer{Buffer: data[off:min(off+1024, len(data))]},
			Offset:     uint16(off),
		}).Execute(t); err != nil {
			return wrap("write NV", err)
		}
	}
	return nil
}

// p384Template is template H-3, written out here and not taken from internal/tpm,
// so that an error there does not hide.
func p384Template() tpm2.TPMTPublic {
	return tpm2.TPMTPublic{
		Type: tpm2.TPMAlgECC, NameAlg: tpm2.TPMAlgSHA384,
		ObjectAttributes: tpm2.TPMAObject{
			FixedTPM: true, FixedParent: true, SensitiveDataOrigin: true,
			UserWithAuth: true, AdminWithPolicy: true, Restricted: true, Decrypt: true,
		},
		AuthPolicy: tpm2.TPM2BDigest{Buffer: []byte{
			0xb2, 0x6e, 0x7d, 0x28, 0xd1, 0x1a, 0x50, 0xbc, 0x53, 0xd8, 0x82, 0xbc, 0xf5, 0xfd, 0x3a, 0x1a,
			0x07, 0x41, 0x48, 0xbb, 0x35, 0xd3, 0xb4, 0xe4, 0xcb, 0x1c, 0x0a, 0xd9, 0xbd, 0xe4, 0x19, 0xca,
			0xcb, 0x47, 0xba, 0x09, 0x69, 0x96, 0x46, 0x15, 0x0f, 0x9f, 0xc0, 0x00, 0xf3, 0xf8, 0x0e, 0x12,
		}},
		Parameters: tpm2.NewTPMUPublicParms(tpm2.TPMAlgECC, &tpm2.TPMSECCParms{
			Symmetric: tpm2.TPMTSymDefObject{
				Algorithm: tpm2.TPMAlgAES,
				KeyBits:   tpm2.NewTPMUSymKeyBits(tpm2.TPMAlgAES, tpm2.TPMKeyBits(256)),
				Mode:      tpm2.NewTPMUSymMode(tpm2.TPMAlgAES, tpm2.TPMAlgCFB),
			},
			CurveID: tpm2.TPMECCNistP384,
		}),
		Unique: tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{}),
	}
}
