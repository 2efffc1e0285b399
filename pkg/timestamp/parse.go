package timestamp

import (
	"crypto"
	"crypto/x509"
	"encoding/asn1"
	"fmt"
	"math/big"
	"time"

	"golang.org/x/crypto/cryptobyte"
	der "golang.org/x/crypto/cryptobyte/asn1"
)

// Token is a time-stamp token that was read and not judged: all of it is what
// somebody claims. See Verify.
type Token struct {
	raw []byte

	// TSTInfo, RFC 3161, 2.4.2.
	content   []byte // its DER, which is what the signature covers
	hash      crypto.Hash
	imprint   []byte
	policy    asn1.ObjectIdentifier
	serial    *big.Int
	time      time.Time
	accuracy  time.Duration
	precise   bool // accuracy was given
	nonce     *big.Int
	directory []byte // Name of the TSA, nil when it gave none

	// SignedData and its one SignerInfo, RFC 5652, 5.
	certificates []*x509.Certificate
	issuer       []byte // Name and serial number that name the signer
	certSerial   *big.Int
	attributes   []byte // DER with the tag that is signed, SET OF
	digest       crypto.Hash
	algorithm    x509.SignatureAlgorithm
	signature    []byte
	signingTime  time.Time // zero when there is none
	signers      []certID  // first: the signer's certificate
}

// certID is an ESSCertID or ESSCertIDv2, RFC 5035, 4.
type certID struct {
	sha1   bool // version 1
	hash   crypto.Hash
	digest []byte
}

// UnverifiedTime is when the token says that it was made.
func (t *Token) UnverifiedTime() time.Time { return t.time }

// Raw is the TimeStampResp that was parsed.
func (t *Token) Raw() []byte { return append([]byte(nil), t.raw...) }

// Parse reads the DER of a TimeStampResp. It takes one encoding only: no BER, no
// trailing bytes, exactly one signer (RFC 3161, 2.4.2), no unsigned attributes
// (nobody vouches for them), no hash weaker than SHA-256.
func Parse(raw []byte) (*Token, error) {
	if len(raw) > MaxToken {
		return nil, malformed("%d bytes, at most %d", len(raw), MaxToken)
	}
	t := &Token{raw: append([]byte(nil), raw...)}
	in := cryptobyte.String(t.raw)
	var resp, status cryptobyte.String
	if !in.ReadASN1(&resp, der.SEQUENCE) || !in.Empty() || !resp.ReadASN1(&status, der.SEQUENCE) {
		return nil, malformed("no TimeStampResp")
	}
	if err := readStatus(status); err != nil {
		return nil, err
	}
	var info, explicit, signed cryptobyte.String
	var oid asn1.ObjectIdentifier
	if !resp.ReadASN1(&info, der.SEQUENCE) || !resp.Empty() ||
		!info.ReadASN1ObjectIdentifier(&oid) || !oid.Equal(oidSignedData) ||
		!info.ReadASN1(&explicit, tag(0)) || !info.Empty() ||
		!explicit.ReadASN1(&signed, der.SEQUENCE) || !explicit.Empty() {
		return nil, malformed("no signed token")
	}
	if err := t.readSignedData(signed); err != nil {
		return nil, err
	}
	return t, nil
}

func tag(n uint8) der.Tag       { return der.Tag(n).ContextSpecific().Constructed() }
func primitive(n uint8) der.Tag { return der.Tag(n).ContextSpecific() }

// readStatus reads PKIStatusInfo, RFC 3161, 2.4.2. Only "granted" is taken: with
// modifications it would be an answer to something else.
func readStatus(s cryptobyte.String) error {
	e := new(StatusError)
	var texts, bits cryptobyte.String
	var has bool
	if !s.ReadASN1Integer(&e.Status) || !s.ReadOptionalASN1(&texts, &has, der.SEQUENCE) {
		return malformed("status")
	}
	for !texts.Empty() {
		var text cryptobyte.String
		if !texts.ReadASN1(&text, der.UTF8String) {
			return malformed("status text")
		}
		if e.Text == "" {
			e.Text = string(text[:min(len(text), maxText)])
		}
	}
	if !s.ReadOptionalASN1(&bits, &has, der.BIT_STRING) || !s.Empty() {
		return malformed("status")
	}
	if len(bits) > 1 {
		b := asn1.BitString{Bytes: bits[1:], BitLength: 8 * (len(bits) - 1)}
		for i := range min(b.BitLength, 32) {
			if b.At(i) == 1 {
				e.Info = append(e.Info, i)
			}
		}
	}
	if e.Status != 0 {
		return e
	}
	if has {
		return malformed("granted, and a failure as well")
	}
	return nil
}

// readSignedData reads RFC 5652, 5.1.
func (t *Token) readSignedData(s cryptobyte.String) error {
	var version int
	var digests, content, explicit, octets, certs, crls, signers cryptobyte.String
	var oid asn1.ObjectIdentifier
	var has bool
	if !s.ReadASN1Integer(&version) || version != 3 {
		return malformed("version of the signed data")
	}
	if !s.ReadASN1(&digests, der.SET) {
		return malformed("digest algorithms")
	}
	// The kind of content is checked here and again in the signed attributes:
	// else another structure that the authority's key signed would do.
	if !s.ReadASN1(&content, der.SEQUENCE) || !content.ReadASN1ObjectIdentifier(&oid) || !oid.Equal(oidTSTInfo) ||
		!content.ReadASN1(&explicit, tag(0)) || !content.Empty() ||
		!explicit.ReadASN1(&octets, der.OCTET_STRING) || !explicit.Empty() {
		return malformed("the content is no TSTInfo")
	}
	t.content = octets
	if !s.ReadOptionalASN1(&certs, &has, tag(0)) || !s.ReadOptionalASN1(&crls, &has, tag(1)) ||
		!s.ReadASN1(&signers, der.SET) || !s.Empty() {
		return malformed("signed data")
	}
	for !certs.Empty() {
		var c cryptobyte.String
		if len(t.certificates) == maxEmbedded || !certs.ReadASN1Element(&c, der.SEQUENCE) {
			return malformed("certificates")
		}
		cert, err := x509.ParseCertificate(c)
		if err != nil {
			return malformed("certificate: %w", err)
		}
		t.certificates = append(t.certificates, cert)
	}
	var signer cryptobyte.String
	if !signers.ReadASN1(&signer, der.SEQUENCE) || !signers.Empty() {
		return malformed("not exactly one signer")
	}
	if err := t.readSigner(signer); err != nil {
		return err
	}
	return t.readInfo(octets)
}

// readSigner reads the SignerInfo, RFC 5652, 5.3.
func (t *Token) readSigner(s cryptobyte.String) error {
	var version int
	var sid, signed cryptobyte.String
	if !s.ReadASN1Integer(&version) || version != 1 ||
		!s.ReadASN1(&sid, der.SEQUENCE) || !sid.ReadASN1Element((*cryptobyte.String)(&t.issuer), der.SEQUENCE) {
		return malformed("signer")
	}
	var err error
	if t.certSerial, err = readBig(&sid, maxSerial); err != nil || !sid.Empty() {
		return malformed("signer's serial number")
	}
	oid, ok := readAlgorithm(&s)
	if !ok {
		return malformed("signer's digest algorithm")
	}
	if t.digest, err = hashOf(oid); err != nil {
		return err
	}
	// Without signed attributes the signature would cover the content itself,
	// and one made over attributes could be passed off as one over content.
	if !s.ReadASN1Element(&signed, tag(0)) {
		return malformed("no signed attributes")
	}
	t.attributes = append([]byte{byte(der.SET)}, signed[1:]...)
	if oid, ok = readAlgorithm(&s); !ok {
		return malformed("signature algorithm")
	}
	if t.algorithm, err = signatureAlgorithm(oid, t.digest); err != nil {
		return err
	}
	if !s.ReadASN1((*cryptobyte.String)(&t.signature), der.OCTET_STRING) {
		return malformed("signature")
	}
	if !s.Empty() {
		return malformed("unsigned attributes")
	}
	var attrs cryptobyte.String
	if !signed.ReadASN1(&attrs, tag(0)) {
		return malformed("signed attributes")
	}
	return t.readAttributes(attrs)
}

// readInfo reads the TSTInfo, RFC 3161, 2.4.2.
func (t *Token) readInfo(s cryptobyte.String) error {
	var info, imprint cryptobyte.String
	var version int
	if !s.ReadASN1(&info, der.SEQUENCE) || !s.Empty() || !info.ReadASN1Integer(&version) || version != 1 ||
		!info.ReadASN1ObjectIdentifier(&t.policy) || !info.ReadASN1(&imprint, der.SEQUENCE) {
		return malformed("TSTInfo")
	}
	oid, ok := readAlgorithm(&imprint)
	if !ok || !imprint.ReadASN1((*cryptobyte.String)(&t.imprint), der.OCTET_STRING) || !imprint.Empty() {
		return malformed("message imprint")
	}
	var err error
	if t.hash, err = hashOf(oid); err != nil {
		return err
	}
	if len(t.imprint) != t.hash.Size() {
		return malformed("an imprint of %d bytes by %v", len(t.imprint), t.hash)
	}
	if t.serial, err = readBig(&info, maxSerial); err != nil {
		return malformed("serial number: %w", err)
	}
	var when cryptobyte.String
	if !info.ReadASN1(&when, der.GeneralizedTime) {
		return malformed("no time")
	}
	if t.time, err = readTime(when); err != nil {
		return err
	}
	if err := t.readAccuracy(&info); err != nil {
		return err
	}
	if info.PeekASN1Tag(der.BOOLEAN) {
		var ordering bool
		if !info.ReadASN1Boolean(&ordering) || !ordering { // DER leaves a default out
			return malformed("ordering")
		}
	}
	if info.PeekASN1Tag(der.INTEGER) {
		if t.nonce, err = readBig(&info, maxNonce); err != nil {
			return malformed("nonce: %w", err)
		}
	}
	var name, extensions cryptobyte.String
	var has bool
	if !info.ReadOptionalASN1(&name, &has, tag(0)) {
		return malformed("name of the authority")
	}
	if has {
		var body cryptobyte.String
		var kind der.Tag
		if !name.ReadAnyASN1(&body, &kind) || !name.Empty() {
			return malformed("name of the authority")
		}
		if kind == tag(4) { // directoryName
			t.directory = body
		}
	}
	if !info.ReadOptionalASN1(&extensions, &has, tag(1)) || !info.Empty() {
		return malformed("TSTInfo has more than it may")
	}
	return readExtensions(extensions)
}

// readExtensions refuses every critical extension: none is understood, and a
// critical one changes what the token means.
func readExtensions(s cryptobyte.String) error {
	for n := 0; !s.Empty(); n++ {
		var ext, value cryptobyte.String
		var oid asn1.ObjectIdentifier
		var critical bool
		if n == maxExtensions || !s.ReadASN1(&ext, der.SEQUENCE) || !ext.ReadASN1ObjectIdentifier(&oid) {
			return malformed("extensions")
		}
		if ext.PeekASN1Tag(der.BOOLEAN) && !ext.ReadASN1Boolean(&critical) {
			return malformed("extensions")
		}
		if !ext.ReadASN1(&value, der.OCTET_STRING) || !ext.Empty() {
			return malformed("extensions")
		}
		if critical {
			return malformed("unknown critical extension %v", oid)
		}
	}
	return nil
}

func (t *Token) readAccuracy(info *cryptobyte.String) error {
	if !info.PeekASN1Tag(der.SEQUENCE) {
		return nil
	}
	var acc cryptobyte.String
	var seconds int64
	if !info.ReadASN1(&acc, der.SEQUENCE) {
		return malformed("accuracy")
	}
	if acc.PeekASN1Tag(der.INTEGER) && (!acc.ReadASN1Integer(&seconds) || seconds < 0 || seconds > 1<<32) {
		return malformed("accuracy")
	}
	t.accuracy = time.Duration(seconds) * time.Second
	for i, unit := range []time.Duration{time.Millisecond, time.Microsecond} {
		if !acc.PeekASN1Tag(primitive(uint8(i))) {
			continue
		}
		var n int64
		if !acc.ReadASN1Int64WithTag(&n, primitive(uint8(i))) || n < 0 || n > 999 {
			return malformed("accuracy")
		}
		t.accuracy += time.Duration(n) * unit
	}
	if !acc.Empty() {
		return malformed("accuracy")
	}
	t.precise = true
	return nil
}

// readBig reads an INTEGER of at most size bytes.
func readBig(s *cryptobyte.String, size int) (*big.Int, error) {
	element := *s
	var body cryptobyte.String
	if !element.ReadASN1(&body, der.INTEGER) || len(body) > size {
		return nil, fmt.Errorf("no integer of at most %d bytes", size)
	}
	n := new(big.Int)
	if !s.ReadASN1Integer(n) {
		return nil, fmt.Errorf("no integer of at most %d bytes", size)
	}
	return n, nil
}

// readTime reads GeneralizedTime as RFC 3161, 2.4.2 has it: UTC with seconds,
// and a fraction without trailing zeros.
func readTime(s []byte) (time.Time, error) {
	const whole = "20060102150405"
	for _, layout := range []string{whole + "Z", whole + ".999999999Z"} {
		if t, err := time.Parse(layout, string(s)); err == nil && t.Format(layout) == string(s) {
			return t, nil
		}
	}
	return time.Time{}, malformed("time %q", s[:min(len(s), 64)])
}
