package attest

import (
	"bytes"
	"crypto"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"time"
	"unicode/utf8"
)

// ErrAKCert is wrapped by every error about the form of an AK certificate.
var ErrAKCert = errors.New("not an AK certificate of our profile")

const maxTPMText = 64 // bytes of a manufacturer or firmware name

// AKStatement is what the attestation CA says in an AK certificate: this AK and
// this EK live in one TPM, accepted so. A verifier takes it on the CA's word.
type AKStatement struct {
	EKHash       [32]byte
	EKBasis      string   // BasisMaker or BasisAllowList
	EKRoot       [32]byte // SHA-256 of the maker root certificate; zero for allow_list
	AKName       []byte
	Manufacturer string
	Firmware     string
	Software     bool
	// Boot is in which boot the CA saw the TPM; nil in certificates from before
	// CAs said so.
	Boot *BootCounters
}

// BootCounters are those of a quote's clock. The first grows with every reset of
// the TPM, and so with every boot, the second when it comes back from a suspend.
type BootCounters struct{ Reset, Restart uint32 }

// wireStatement is the statement as it is written (docs/evidence.md).
type wireStatement struct {
	Version      uint64 `cbor:"1,keyasint"`
	Basis        uint64 `cbor:"2,keyasint"` // 1 maker, 2 allow-list
	Root         []byte `cbor:"3,keyasint,omitempty"`
	AKName       []byte `cbor:"4,keyasint"`
	Manufacturer string `cbor:"5,keyasint"`
	Firmware     string `cbor:"6,keyasint"`
	Software     bool   `cbor:"7,keyasint"`
	// reset, restart
	Boot []uint32 `cbor:"8,keyasint,omitempty"`
}

// Object identifiers of the profile, as functions so that nobody can change them.
func oidAKCertificate() asn1.ObjectIdentifier { return asn1.ObjectIdentifier{2, 23, 133, 8, 3} }

func oidPermanentID() asn1.ObjectIdentifier {
	return asn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 7, 8, 3}
}
func oidPermanentIDEK() asn1.ObjectIdentifier { return asn1.ObjectIdentifier{2, 23, 133, 12, 1} }

// permanentIdentifier is PermanentIdentifier of RFC 4043.
type permanentIdentifier struct {
	Value    string `asn1:"utf8"`
	Assigner asn1.ObjectIdentifier
}

// AKTemplate returns the certificate template: EKU 2.23.133.8.3, empty subject,
// critical SAN with permanentIdentifier (2.23.133.12.1) = EK hash, the statement
// as a non-critical extension, at most 24 hours. The caller passes it to
// x509.CreateCertificate with the AK's public key; the serial number is left to
// that function, which makes a random one.
func AKTemplate(s AKStatement, notBefore, notAfter time.Time) (*x509.Certificate, error) {
	if life := notAfter.Sub(notBefore); life <= 0 || life > MaxAKCertLife {
		return nil, fmt.Errorf("%w: life of %v, at most %v", ErrAKCert, life, MaxAKCertLife)
	}
	statement, err := s.extension()
	if err != nil {
		return nil, err
	}
	san, err := sanOf(s.EKHash)
	if err != nil {
		return nil, err
	}
	return &x509.Certificate{
		NotBefore: notBefore, NotAfter: notAfter,
		KeyUsage:              x509.KeyUsageDigitalSignature,
		UnknownExtKeyUsage:    []asn1.ObjectIdentifier{oidAKCertificate()},
		BasicConstraintsValid: true,
		ExtraExtensions:       []pkix.Extension{{Id: oidSAN(), Critical: true, Value: san}, statement},
	}, nil
}

// ParseAKCertificate reads and checks the form of an AK certificate (not its
// signature): exactly the profile of AKTemplate.
func ParseAKCertificate(c *x509.Certificate) (*AKStatement, error) {
	bad := func(format string, a ...any) (*AKStatement, error) {
		return nil, fmt.Errorf("%w: "+format, append([]any{ErrAKCert}, a...)...)
	}
	if c.Version != 3 || c.IsCA || !bytes.Equal(c.RawSubject, []byte{0x30, 0x00}) {
		return bad("version %d, CA %t, subject %.100q", c.Version, c.IsCA, c.Subject)
	}
	if life := c.NotAfter.Sub(c.NotBefore); life <= 0 || life > MaxAKCertLife {
		return bad("life of %v, at most %v", life, MaxAKCertLife)
	}
	if c.KeyUsage != x509.KeyUsageDigitalSignature {
		return bad("key usage %#x", int(c.KeyUsage))
	}
	// The one extended key usage keeps an AK certificate from being an SVID, and
	// an SVID from being an AK certificate.
	if len(c.ExtKeyUsage) != 0 || len(c.UnknownExtKeyUsage) != 1 || !c.UnknownExtKeyUsage[0].Equal(oidAKCertificate()) {
		return bad("extended key usage is not tcg-kp-AIKCertificate alone")
	}
	if err := checkAKKey(c.PublicKey); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrAKCert, err)
	}
	san, err := profileExtensions(c.Extensions)
	if err != nil {
		return nil, err
	}
	value, err := oneCMW(c.Extensions)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrAKCert, err)
	}
	s, err := parseStatement(value)
	if err != nil {
		return nil, err
	}
	if s.EKHash, err = parseSAN(san); err != nil {
		return nil, err
	}
	return s, nil
}

// profileExtensions fails unless every extension is one of the profile, once,
// with its criticality, and returns the SAN. Go's parser leaves a critical SAN
// that holds an otherName among the unhandled extensions, so the list of
// unhandled ones says nothing; this list does.
func profileExtensions(exts []pkix.Extension) ([]byte, error) {
	allowed := []struct {
		id       asn1.ObjectIdentifier
		critical bool
		required bool
	}{
		{asn1.ObjectIdentifier{2, 5, 29, 15}, true, true},  // key usage
		{asn1.ObjectIdentifier{2, 5, 29, 19}, true, true},  // basic constraints
		{asn1.ObjectIdentifier{2, 5, 29, 37}, false, true}, // extended key usage
		{asn1.ObjectIdentifier{2, 5, 29, 35}, false, true}, // authority key identifier
		{oidSAN(), true, true},
		{ExtensionID(), false, true},
	}
	var san []byte
	seen := make([]bool, len(allowed))
next:
	for _, x := range exts {
		for i, a := range allowed {
			if !x.Id.Equal(a.id) {
				continue
			}
			if seen[i] || x.Critical != a.critical {
				return nil, fmt.Errorf("%w: extension %v repeated or of the wrong criticality", ErrAKCert, x.Id)
			}
			seen[i] = true
			if a.id.Equal(oidSAN()) {
				san = x.Value
			}
			continue next
		}
		return nil, fmt.Errorf("%w: extension %v does not belong there", ErrAKCert, x.Id)
	}
	for i, a := range allowed {
		if a.required && !seen[i] {
			return nil, fmt.Errorf("%w: extension %v is missing", ErrAKCert, a.id)
		}
	}
	return san, nil
}

// sanOf returns the SAN with one otherName: the EK hash as permanentIdentifier.
func sanOf(ekHash [32]byte) ([]byte, error) {
	id, err := asn1.Marshal(permanentIdentifier{hex.EncodeToString(ekHash[:]), oidPermanentIDEK()})
	if err != nil {
		return nil, err
	}
	typeID, err := asn1.Marshal(oidPermanentID())
	if err != nil {
		return nil, err
	}
	explicit, err := asn1.Marshal(asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: 0, IsCompound: true, Bytes: id})
	if err != nil {
		return nil, err
	}
	other := asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: 0, IsCompound: true, Bytes: append(typeID, explicit...)}
	return asn1.Marshal([]asn1.RawValue{other})
}

// parseSAN reads the EK hash and compares the SAN with the one sanOf makes of
// it, so that no second name and no other encoding gets past.
func parseSAN(san []byte) (hash [32]byte, err error) {
	const digits = 64
	// The hash is the only thing that varies, and an OID of 8 bytes follows it.
	like, err := sanOf(hash)
	if err != nil {
		return hash, err
	}
	if len(san) != len(like) {
		return hash, fmt.Errorf("%w: SAN of %d bytes, want %d", ErrAKCert, len(san), len(like))
	}
	at := bytes.Index(like, bytes.Repeat([]byte{'0'}, digits))
	b, err := hex.DecodeString(string(san[at : at+digits]))
	if err != nil {
		return hash, fmt.Errorf("%w: EK hash in SAN: %v", ErrAKCert, err)
	}
	copy(hash[:], b)
	if like, err = sanOf(hash); err != nil || !bytes.Equal(like, san) {
		return hash, fmt.Errorf("%w: SAN is not the EK's permanentIdentifier alone", ErrAKCert)
	}
	return hash, nil
}

func (s *AKStatement) extension() (pkix.Extension, error) {
	if err := s.check(); err != nil {
		return pkix.Extension{}, err
	}
	w := wireStatement{
		Version: 1, Basis: 2, AKName: s.AKName,
		Manufacturer: s.Manufacturer, Firmware: s.Firmware, Software: s.Software,
	}
	if s.EKBasis == BasisMaker {
		w.Basis, w.Root = 1, s.EKRoot[:]
	}
	if s.Boot != nil {
		w.Boot = []uint32{s.Boot.Reset, s.Boot.Restart}
	}
	b, err := encode(w, MaxEvidence, ErrAKCert)
	if err != nil {
		return pkix.Extension{}, err
	}
	return marshalCMW(akType, akIndicator, b)
}

func (s *AKStatement) check() error {
	switch {
	case s.EKBasis != BasisMaker && s.EKBasis != BasisAllowList:
		return fmt.Errorf("%w: EK basis %.20q", ErrAKCert, s.EKBasis)
	case (s.EKBasis == BasisMaker) == (s.EKRoot == [32]byte{}):
		return fmt.Errorf("%w: a maker's EK has a root, an allow-listed one has none", ErrAKCert)
	}
	if err := checkName(s.AKName); err != nil {
		return fmt.Errorf("%w: %w", ErrAKCert, err)
	}
	for _, t := range []string{s.Manufacturer, s.Firmware} {
		if len(t) > maxTPMText || !utf8.ValidString(t) || strings.ContainsFunc(t, func(r rune) bool { return r < 0x20 || r == 0x7f }) {
			return fmt.Errorf("%w: manufacturer or firmware is not plain text of at most %d bytes", ErrAKCert, maxTPMText)
		}
	}
	return nil
}

func parseStatement(value []byte) (*AKStatement, error) {
	b, err := parseCMW(value, akType, akIndicator)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrAKCert, err)
	}
	var w wireStatement
	if err := decode(b, &w, MaxEvidence, ErrAKCert); err != nil {
		return nil, err
	}
	if w.Version != 1 {
		return nil, fmt.Errorf("%w: statement version %d", ErrAKCert, w.Version)
	}
	s := &AKStatement{AKName: w.AKName, Manufacturer: w.Manufacturer, Firmware: w.Firmware, Software: w.Software}
	switch {
	case w.Basis == 1 && len(w.Root) == 32:
		s.EKBasis, s.EKRoot = BasisMaker, [32]byte(w.Root)
	case w.Basis == 2 && len(w.Root) == 0:
		s.EKBasis = BasisAllowList
	default:
		return nil, fmt.Errorf("%w: EK basis %d with a root of %d bytes", ErrAKCert, w.Basis, len(w.Root))
	}
	switch len(w.Boot) {
	case 0:
	case 2:
		s.Boot = &BootCounters{Reset: w.Boot[0], Restart: w.Boot[1]}
	default:
		return nil, fmt.Errorf("%w: %d boot counters, want 2", ErrAKCert, len(w.Boot))
	}
	again, err := s.extension()
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(again.Value, value) {
		return nil, fmt.Errorf("%w: statement is not in deterministic encoding", ErrAKCert)
	}
	return s, nil
}

// akOf is the AK that a checked certificate and its statement name.
func akOf(key crypto.PublicKey, s *AKStatement) *AK {
	return &AK{Name: s.AKName, Public: key, Manufacturer: s.Manufacturer, Firmware: s.Firmware, Software: s.Software}
}
