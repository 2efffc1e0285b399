package forge

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"testing"
	"time"

	"github.com/rootlink/rootlink/pkg/attest"
)

// Epoch is the time around which everything is made, unless told otherwise.
func Epoch() time.Time { return time.Date(2027, 3, 1, 12, 0, 0, 0, time.UTC) }

// Maker is a maker of TPMs.
type Maker struct {
	Root, Intermediate *x509.Certificate

	rootKey, intermediateKey *ecdsa.PrivateKey
}

// NewMaker returns a maker whose CAs carry name in their subjects. Two makers of
// one name have the same subjects and different keys.
func NewMaker(tb testing.TB, name string) *Maker {
	tb.Helper()
	return NewMakerWith(tb, name, nil)
}

// NewMakerWith is NewMaker with a hook that may change the root's template.
func NewMakerWith(tb testing.TB, name string, bend func(*x509.Certificate)) *Maker {
	tb.Helper()
	m := &Maker{rootKey: P256(tb), intermediateKey: P256(tb)}
	t := &x509.Certificate{
		Subject:  pkix.Name{Organization: []string{name}, CommonName: name + " Root CA"},
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, IsCA: true, BasicConstraintsValid: true,
		NotBefore: Epoch().AddDate(-10, 0, 0), NotAfter: Epoch().AddDate(20, 0, 0),
	}
	if bend != nil {
		bend(t)
	}
	m.Root = Sign(tb, t, nil, m.rootKey.Public(), m.rootKey)
	m.Intermediate = m.NewIntermediate(tb, nil)
	return m
}

// NewIntermediate signs an intermediate for the maker's intermediate key. bend
// may change its template.
func (m *Maker) NewIntermediate(tb testing.TB, bend func(*x509.Certificate)) *x509.Certificate {
	tb.Helper()
	t := &x509.Certificate{
		Subject:  pkix.Name{Organization: m.Root.Subject.Organization, CommonName: m.Root.Subject.Organization[0] + " TPM EK CA 1"},
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, IsCA: true, BasicConstraintsValid: true,
		MaxPathLenZero: true,
		NotBefore:      Epoch().AddDate(-8, 0, 0), NotAfter: Epoch().AddDate(15, 0, 0),
	}
	if bend != nil {
		bend(t)
	}
	return Sign(tb, t, m.Root, m.intermediateKey.Public(), m.rootKey)
}

// IssueEK signs an EK certificate of the TCG profile: empty subject, critical
// SAN with a directoryName, EKU tcg-kp-EKCertificate. bend may change its
// template. The chain is the certificate and the intermediate.
func (m *Maker) IssueEK(tb testing.TB, key crypto.PublicKey, bend func(*x509.Certificate)) [][]byte {
	tb.Helper()
	t := &x509.Certificate{
		KeyUsage: x509.KeyUsageKeyAgreement, BasicConstraintsValid: true,
		UnknownExtKeyUsage: []asn1.ObjectIdentifier{{2, 23, 133, 8, 1}},
		NotBefore:          Epoch().AddDate(-2, 0, 0), NotAfter: Epoch().AddDate(10, 0, 0),
		ExtraExtensions: []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 17}, Critical: true, Value: tpmSAN(tb)}},
	}
	if _, ok := key.(*ecdsa.PublicKey); !ok {
		t.KeyUsage = x509.KeyUsageKeyEncipherment
	}
	if bend != nil {
		bend(t)
	}
	c := Sign(tb, t, m.Intermediate, key, m.intermediateKey)
	return [][]byte{c.Raw, m.Intermediate.Raw}
}

// Deepen puts one more intermediate between the maker's intermediate and a new
// certificate for the EK, and returns the chain.
func (m *Maker) Deepen(tb testing.TB, key crypto.PublicKey) [][]byte {
	tb.Helper()
	sub := &Maker{Root: m.Root, intermediateKey: P256(tb)}
	sub.Intermediate = Sign(tb, &x509.Certificate{
		Subject: pkix.Name{CommonName: "sub CA"}, KeyUsage: x509.KeyUsageCertSign, IsCA: true, BasicConstraintsValid: true,
		NotBefore: Epoch().AddDate(-8, 0, 0), NotAfter: Epoch().AddDate(15, 0, 0),
	}, m.Intermediate, sub.intermediateKey.Public(), m.intermediateKey)
	return append(sub.IssueEK(tb, key, nil), m.Intermediate.Raw)
}

// EKRoots trusts this maker's root, and no intermediate.
func (m *Maker) EKRoots() attest.EKRoots {
	return attest.EKRoots{Roots: []*x509.Certificate{m.Root}}
}

// tpmSAN is a directoryName with TPM manufacturer, model and version.
func tpmSAN(tb testing.TB) []byte {
	tb.Helper()
	var rdns pkix.RDNSequence
	for i, v := range []string{"id:46524745", "forge", "id:00010002"} {
		rdns = append(rdns, pkix.RelativeDistinguishedNameSET{{Type: asn1.ObjectIdentifier{2, 23, 133, 2, i + 1}, Value: v}})
	}
	name, err := asn1.Marshal(rdns)
	if err != nil {
		tb.Fatal(err)
	}
	san, err := asn1.Marshal([]asn1.RawValue{{Class: asn1.ClassContextSpecific, Tag: 4, IsCompound: true, Bytes: name}})
	if err != nil {
		tb.Fatal(err)
	}
	return san
}

// P256 makes a P-256 key.
func P256(tb testing.TB) *ecdsa.PrivateKey {
	tb.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		tb.Fatal(err)
	}
	return k
}

// Sign makes a certificate for key; with a nil parent it is self-signed.
func Sign(tb testing.TB, t, parent *x509.Certificate, key crypto.PublicKey, signer crypto.Signer) *x509.Certificate {
	tb.Helper()
	if parent == nil {
		parent = t
	}
	der, err := x509.CreateCertificate(rand.Reader, t, parent, key, signer)
	if err != nil {
		tb.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		tb.Fatal(err)
	}
	return c
}

// KeyHash is attest.KeyHash that cannot fail.
func KeyHash(tb testing.TB, key crypto.PublicKey) [32]byte {
	tb.Helper()
	h, err := attest.KeyHash(key)
	if err != nil {
		tb.Fatal(err)
	}
	return h
}

// Relabel returns c signed again by the maker's intermediate, with another
// algorithm identifier on its key.
func (m *Maker) Relabel(tb testing.TB, c *x509.Certificate, alg asn1.ObjectIdentifier) []byte {
	tb.Helper()
	// The algorithm identifiers have one length, so that no length changes.
	old, err := asn1.Marshal(asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 1})
	if err != nil {
		tb.Fatal(err)
	}
	relabelled, err := asn1.Marshal(alg)
	if err != nil || len(old) != len(relabelled) {
		tb.Fatal("algorithm identifier of another length", err)
	}
	tbs := bytes.Replace(c.RawTBSCertificate, old, relabelled, 1)
	d := sha256.Sum256(tbs)
	sig, err := m.intermediateKey.Sign(rand.Reader, d[:], crypto.SHA256)
	if err != nil {
		tb.Fatal(err)
	}
	der, err := asn1.Marshal(struct {
		TBS asn1.RawValue
		Alg pkix.AlgorithmIdentifier
		Sig asn1.BitString
	}{
		asn1.RawValue{FullBytes: tbs},
		pkix.AlgorithmIdentifier{Algorithm: asn1.ObjectIdentifier{1, 2, 840, 10045, 4, 3, 2}},
		asn1.BitString{Bytes: sig, BitLength: 8 * len(sig)},
	})
	if err != nil {
		tb.Fatal(err)
	}
	return der
}
