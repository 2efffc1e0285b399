package forge

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha1" // for ESSCertID of version 1, and for what is refused
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"math/big"
	"slices"
	"testing"
	"time"

	"golang.org/x/crypto/cryptobyte"
	der "golang.org/x/crypto/cryptobyte/asn1"

	"github.com/rootlink/rootlink/pkg/timestamp"
)

// OIDs that tokens of a TSA are made of, and some to put in their place.
var (
	OIDTSTInfo       = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 16, 1, 4}
	OIDData          = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 7, 1}
	OIDSHA1          = asn1.ObjectIdentifier{1, 3, 14, 3, 2, 26}
	OIDECDSAWithSHA1 = asn1.ObjectIdentifier{1, 2, 840, 10045, 4, 1}

	oidTimeStamping = asn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 7, 3, 8}
	oidCodeSigning  = asn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 7, 3, 3}
	hashOIDs        = map[crypto.Hash]asn1.ObjectIdentifier{
		crypto.SHA1:   OIDSHA1,
		crypto.SHA256: {2, 16, 840, 1, 101, 3, 4, 2, 1},
		crypto.SHA384: {2, 16, 840, 1, 101, 3, 4, 2, 2},
		crypto.SHA512: {2, 16, 840, 1, 101, 3, 4, 2, 3},
	}
)

// TSA is a timestamp authority: a root and the certificate that signs tokens.
type TSA struct {
	Root, Leaf *x509.Certificate

	rootKey, key *ecdsa.PrivateKey
}

// NewTSA makes one whose certificates hold from a month before Epoch for a year.
// bend may change the template of the one that signs.
func NewTSA(tb testing.TB, bend func(*x509.Certificate)) *TSA {
	tb.Helper()
	t := &TSA{rootKey: P256(tb)}
	t.Root = Sign(tb, &x509.Certificate{
		Subject:  pkix.Name{CommonName: "forge TSA root"},
		KeyUsage: x509.KeyUsageCertSign, IsCA: true, BasicConstraintsValid: true,
		NotBefore: Epoch().AddDate(0, -1, 0), NotAfter: Epoch().AddDate(0, 11, 0),
	}, nil, t.rootKey.Public(), t.rootKey)
	return t.Rotated(tb, bend)
}

// Rotated is the same authority with another key and certificate.
func (t *TSA) Rotated(tb testing.TB, bend func(*x509.Certificate)) *TSA {
	tb.Helper()
	n := &TSA{Root: t.Root, rootKey: t.rootKey, key: P256(tb)}
	template := &x509.Certificate{
		Subject:  pkix.Name{CommonName: "forge TSA"},
		KeyUsage: x509.KeyUsageDigitalSignature, BasicConstraintsValid: true,
		NotBefore: Epoch().AddDate(0, -1, 0), NotAfter: Epoch().AddDate(0, 11, 0),
		ExtraExtensions: []pkix.Extension{EKU(tb, true, oidTimeStamping)},
	}
	if bend != nil {
		bend(template)
	}
	n.Leaf = Sign(tb, template, t.Root, n.key.Public(), t.rootKey)
	return n
}

// EKU is an extended key usage extension; with no usages it is timeStamping and
// codeSigning.
func EKU(tb testing.TB, critical bool, usages ...asn1.ObjectIdentifier) pkix.Extension {
	tb.Helper()
	if len(usages) == 0 {
		usages = []asn1.ObjectIdentifier{oidTimeStamping, oidCodeSigning}
	}
	value, err := asn1.Marshal(usages)
	if err != nil {
		tb.Fatal(err)
	}
	return pkix.Extension{Id: asn1.ObjectIdentifier{2, 5, 29, 37}, Critical: critical, Value: value}
}

// Authority pins the certificate that signs, for as long as it is valid.
func (t *TSA) Authority() timestamp.Authority {
	return timestamp.Authority{
		Chain: []*x509.Certificate{t.Leaf, t.Root}, Start: t.Leaf.NotBefore, End: t.Leaf.NotAfter,
		URI: "https://tsa.forge.example/tsa", Operator: "forge.example",
	}
}

// Issuer trusts whatever certificate the root issued.
func (t *TSA) Issuer() timestamp.Authority {
	a := t.Authority()
	a.Chain = a.Chain[1:]
	return a
}

// TokenSpec is a token in the making. Each field is one thing to bend.
type TokenSpec struct {
	Status        int
	Hash          crypto.Hash // of the imprint, and of all else that needs one
	Imprint       []byte
	Time          string // GeneralizedTime
	Seconds       int64  // accuracy
	Serial, Nonce *big.Int
	TSAName       []byte // DER of a Name, nil for none
	Critical      bool   // a critical extension

	ContentType, SignedContentType asn1.ObjectIdentifier
	DigestHash                     crypto.Hash
	SignatureAlgorithm             asn1.ObjectIdentifier
	SigningTime                    time.Time // zero: none
	Certificates                   []*x509.Certificate
	Names                          *x509.Certificate // by issuer and serial number
	ESS                            *x509.Certificate // by hash, nil for none
	ESSv1                          bool
	Key                            *ecdsa.PrivateKey
	Extra                          [][]byte // signed attributes in DER
	Unsorted, Unsigned             bool     // signed attributes out of order; an unsigned one
	Signers                        int
	Info                           func(tstInfo []byte) []byte // changes what is signed
	After                          func(tstInfo []byte) []byte // changes what was signed
}

// Token stamps a signature. bend may change one thing about the token.
func (t *TSA) Token(tb testing.TB, signature []byte, at time.Time, bend func(*TokenSpec)) []byte {
	tb.Helper()
	h := crypto.SHA256.New()
	h.Write(signature)
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		tb.Fatal(err)
	}
	s := &TokenSpec{
		Hash: crypto.SHA256, Imprint: h.Sum(nil), Time: at.UTC().Format("20060102150405Z"), Seconds: 1, Serial: serial,
		TSAName: t.Leaf.RawSubject, ContentType: OIDTSTInfo, SignedContentType: OIDTSTInfo, DigestHash: crypto.SHA256,
		SignatureAlgorithm: asn1.ObjectIdentifier{1, 2, 840, 10045, 4, 3, 2}, SigningTime: at,
		Certificates: []*x509.Certificate{t.Leaf}, Names: t.Leaf, ESS: t.Leaf, Key: t.key, Signers: 1,
	}
	if bend != nil {
		bend(s)
	}
	return s.response(tb)
}

// build is the DER that f writes.
func build(tb testing.TB, f func(*cryptobyte.Builder)) []byte {
	tb.Helper()
	var b cryptobyte.Builder
	f(&b)
	out, err := b.Bytes()
	if err != nil {
		tb.Fatal(err)
	}
	return out
}

func seq(tag der.Tag, parts ...[]byte) []byte {
	var b cryptobyte.Builder
	b.AddASN1(tag, func(b *cryptobyte.Builder) {
		for _, p := range parts {
			b.AddBytes(p)
		}
	})
	return b.BytesOrPanic()
}

func oid(o asn1.ObjectIdentifier) []byte {
	var b cryptobyte.Builder
	b.AddASN1ObjectIdentifier(o)
	return b.BytesOrPanic()
}

func algorithm(o asn1.ObjectIdentifier) []byte { return seq(der.SEQUENCE, oid(o)) }

func explicit(n uint8) der.Tag { return der.Tag(n).ContextSpecific().Constructed() }

func octets(b []byte) []byte { return seq(der.OCTET_STRING, b) }

// Attribute is the DER of a CMS attribute with one value.
func Attribute(o asn1.ObjectIdentifier, value []byte) []byte {
	return seq(der.SEQUENCE, oid(o), seq(der.SET, value))
}

func integer(tb testing.TB, n *big.Int) []byte {
	tb.Helper()
	return build(tb, func(b *cryptobyte.Builder) { b.AddASN1BigInt(n) })
}

func (s *TokenSpec) info(tb testing.TB) []byte {
	tb.Helper()
	small := func(n int64) []byte { return integer(tb, big.NewInt(n)) }
	parts := [][]byte{
		small(1), oid(asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 99999, 1}),
		seq(der.SEQUENCE, algorithm(hashOIDs[s.Hash]), octets(s.Imprint)),
		integer(tb, s.Serial), seq(der.GeneralizedTime, []byte(s.Time)),
	}
	if s.Seconds > 0 {
		parts = append(parts, seq(der.SEQUENCE, small(s.Seconds)))
	}
	if s.Nonce != nil {
		parts = append(parts, integer(tb, s.Nonce))
	}
	if s.TSAName != nil {
		parts = append(parts, seq(explicit(0), seq(explicit(4), s.TSAName)))
	}
	if s.Critical {
		parts = append(parts, seq(explicit(1), seq(der.SEQUENCE, oid(oidCodeSigning), []byte{1, 1, 0xff}, octets(nil))))
	}
	return seq(der.SEQUENCE, parts...)
}

func (s *TokenSpec) signedAttributes(tb testing.TB, content []byte) []byte {
	tb.Helper()
	h := s.DigestHash.New()
	h.Write(content)
	attrs := append([][]byte{
		Attribute(asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 3}, oid(s.SignedContentType)),
		Attribute(asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 4}, octets(h.Sum(nil))),
	}, s.Extra...)
	if !s.SigningTime.IsZero() {
		attrs = append(attrs, Attribute(asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 5},
			build(tb, func(b *cryptobyte.Builder) { b.AddASN1UTCTime(s.SigningTime.UTC()) })))
	}
	switch {
	case s.ESS == nil:
	case s.ESSv1:
		sum := sha1.Sum(s.ESS.Raw)
		attrs = append(attrs, Attribute(asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 16, 2, 12},
			seq(der.SEQUENCE, seq(der.SEQUENCE, seq(der.SEQUENCE, octets(sum[:]))))))
	default:
		h := crypto.SHA256.New()
		h.Write(s.ESS.Raw)
		attrs = append(attrs, Attribute(asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 16, 2, 47},
			seq(der.SEQUENCE, seq(der.SEQUENCE, seq(der.SEQUENCE, octets(h.Sum(nil)))))))
	}
	slices.SortFunc(attrs, slices.Compare)
	if s.Unsorted {
		slices.Reverse(attrs)
	}
	return seq(der.SET, attrs...)
}

func (s *TokenSpec) response(tb testing.TB) []byte {
	tb.Helper()
	status := seq(der.SEQUENCE, integer(tb, big.NewInt(int64(s.Status))))
	content := s.info(tb)
	if s.Info != nil {
		content = s.Info(content)
	}
	attrs := s.signedAttributes(tb, content)
	h := s.DigestHash.New()
	h.Write(attrs)
	sig, err := s.Key.Sign(rand.Reader, h.Sum(nil), s.DigestHash)
	if err != nil {
		tb.Fatal(err)
	}
	if s.After != nil {
		content = s.After(content)
	}
	implicit := slices.Clone(attrs)
	implicit[0] = byte(explicit(0))
	one := [][]byte{
		integer(tb, big.NewInt(1)), seq(der.SEQUENCE, s.Names.RawIssuer, integer(tb, s.Names.SerialNumber)),
		algorithm(hashOIDs[s.DigestHash]), implicit, algorithm(s.SignatureAlgorithm), octets(sig),
	}
	if s.Unsigned {
		one = append(one, seq(explicit(1), Attribute(oidCodeSigning, octets([]byte("nobody vouches for this")))))
	}
	var signers, certs []byte
	for range s.Signers {
		signers = append(signers, seq(der.SEQUENCE, one...)...)
	}
	for _, c := range s.Certificates {
		certs = append(certs, c.Raw...)
	}
	signed := [][]byte{
		integer(tb, big.NewInt(3)), seq(der.SET, algorithm(hashOIDs[s.DigestHash])),
		seq(der.SEQUENCE, oid(s.ContentType), seq(explicit(0), octets(content))),
	}
	if len(certs) > 0 {
		signed = append(signed, seq(explicit(0), certs))
	}
	signed = append(signed, seq(der.SET, signers))
	token := seq(der.SEQUENCE, oid(asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 7, 2}), seq(explicit(0), seq(der.SEQUENCE, signed...)))
	return seq(der.SEQUENCE, status, token)
}
