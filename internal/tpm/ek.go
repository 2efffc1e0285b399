package tpm

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"errors"
	"fmt"
	"math/big"

	"github.com/google/go-tpm/tpm2"

	"github.com/rootlink/rootlink/pkg/attest"
)

// NV range of certificates above the EK certificate (TCG EK Credential Profile, 2.2.1.5.2).
const (
	firstChainIndex tpm2.TPMHandle = 0x01c00100
	lastChainIndex  tpm2.TPMHandle = 0x01c001ff
)

// EK is a TPM's endorsement key as the device shows it. It proves nothing
// before pkg/attest has verified it.
type EK struct {
	Type   EKType
	Chain  [][]byte // DER, the EK certificate first; empty when NV holds none
	Public []byte   // TPMT_PUBLIC
	SPKI   []byte   // DER of the same key

	spec ekSpec // as created: with the template or nonce found in NV
}

// Hash is SHA-256 of the SPKI DER: the node's identity.
func (e *EK) Hash() [32]byte { return sha256.Sum256(e.SPKI) }

// EK reads the EK certificate, first in the configured order, and creates the
// key from the template that belongs to it. Without any certificate it is the
// first type that the TPM supports.
func (d *Device) EK(ctx context.Context) (*EK, error) {
	return do(ctx, d, "read the EK", (*state).readEK)
}

func (s *state) readEK() (*EK, error) {
	if s.ek != nil {
		return s.ek, nil
	}
	for _, t := range s.d.opts.EKTypes {
		spec, err := ekSpecOf(t)
		if err != nil {
			return nil, err
		}
		raw, err := s.nvRead(spec.cert, maxNV)
		if errors.Is(err, errNoIndex) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("EK certificate %s: %w", t, err)
		}
		der, _, err := firstDER(raw)
		if err != nil {
			return nil, fmt.Errorf("EK certificate %s at NV %#x: %w", t, uint32(spec.cert), err)
		}
		if len(der) > attest.MaxCertificate {
			return nil, fmt.Errorf("EK certificate %s: %w: %d bytes", t, ErrTooLarge, len(der))
		}
		ek, err := s.describeEK(spec)
		if err != nil {
			return nil, err
		}
		if err := certifies(der, ek.SPKI); err != nil {
			return nil, fmt.Errorf("%w (%s, NV %#x): %w", ErrEKMismatch, t, uint32(spec.cert), err)
		}
		if ek.Chain, err = s.ekChain(der); err != nil {
			return nil, err
		}
		s.ek = ek
		return ek, nil
	}
	// No certificate: an allow-list can still know the key.
	var last error
	for _, t := range s.d.opts.EKTypes {
		spec, err := ekSpecOf(t)
		if err != nil {
			return nil, err
		}
		ek, err := s.describeEK(spec)
		if err == nil {
			s.ek = ek
			return ek, nil
		}
		if !unsupported(err) {
			return nil, err
		}
		last = err
	}
	return nil, fmt.Errorf("the TPM supports none of the EK types %v: %w", s.d.opts.EKTypes, last)
}

// unsupported reports the codes with which a TPM refuses an algorithm.
func unsupported(err error) bool {
	for _, rc := range []tpm2.TPMRC{tpm2.TPMRCCurve, tpm2.TPMRCKeySize, tpm2.TPMRCAsymmetric, tpm2.TPMRCHash, tpm2.TPMRCValue, tpm2.TPMRCSymmetric, tpm2.TPMRCType} {
		if errors.Is(err, rc) {
			return true
		}
	}
	return false
}

// describeEK creates the EK, reads what it is, and flushes it.
func (s *state) describeEK(spec *ekSpec) (*EK, error) {
	if err := s.adoptTemplate(spec); err != nil {
		return nil, err
	}
	h, pub, _, err := s.createEK(spec)
	if err != nil {
		return nil, err
	}
	s.flush(h)
	key, err := tpm2.Pub(*pub)
	if err != nil {
		return nil, fmt.Errorf("EK %s: %w", spec.typ, err)
	}
	spki, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		return nil, fmt.Errorf("EK %s: %w", spec.typ, err)
	}
	return &EK{Type: spec.typ, Public: tpm2.Marshal(pub), SPKI: spki, spec: *spec}, nil
}

// adoptTemplate applies the template, or else the nonce, that the maker put in
// NV for this EK (profile 2.2.1.4 and 2.2.1.5).
func (s *state) adoptTemplate(spec *ekSpec) error {
	if spec.template != 0 {
		raw, err := s.nvRead(spec.template, 2048)
		if err == nil {
			pub, err := tpm2.Unmarshal[tpm2.TPMTPublic](raw)
			if err != nil {
				return fmt.Errorf("EK template at NV %#x: %w", uint32(spec.template), err)
			}
			if pub.Type != spec.public.Type {
				return fmt.Errorf("EK template at NV %#x is of type %#x", uint32(spec.template), uint16(pub.Type))
			}
			spec.public = *pub
			return nil
		}
		if !errors.Is(err, errNoIndex) {
			return err
		}
	}
	if spec.nonce == 0 {
		return nil
	}
	nonce, err := s.nvRead(spec.nonce, 256)
	if errors.Is(err, errNoIndex) {
		return nil
	}
	if err != nil {
		return err
	}
	// The nonce fills the start of the unique field, zeros the rest.
	switch spec.public.Type {
	case tpm2.TPMAlgRSA:
		buf := make([]byte, 256)
		copy(buf, nonce)
		spec.public.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgRSA, &tpm2.TPM2BPublicKeyRSA{Buffer: buf})
	case tpm2.TPMAlgECC:
		if len(nonce) > 32 {
			return fmt.Errorf("EK nonce at NV %#x: %w: %d bytes", uint32(spec.nonce), ErrTooLarge, len(nonce))
		}
		x := make([]byte, 32)
		copy(x, nonce)
		spec.public.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{
			X: tpm2.TPM2BECCParameter{Buffer: x},
			Y: tpm2.TPM2BECCParameter{Buffer: make([]byte, 32)},
		})
	}
	return nil
}

// createEK loads the EK. The caller flushes it.
func (s *state) createEK(spec *ekSpec) (tpm2.TPMHandle, *tpm2.TPMTPublic, tpm2.TPM2BName, error) {
	rsp, err := tpm2.CreatePrimary{
		PrimaryHandle: tpm2.TPMRHEndorsement,
		InPublic:      tpm2.New2B(spec.public),
	}.Execute(s.conn)
	if err != nil {
		return 0, nil, tpm2.TPM2BName{}, hierarchy("create the EK "+string(spec.typ), err)
	}
	pub, err := rsp.OutPublic.Contents()
	if err != nil {
		s.flush(rsp.ObjectHandle)
		return 0, nil, tpm2.TPM2BName{}, fmt.Errorf("EK public area: %w", err)
	}
	return rsp.ObjectHandle, pub, rsp.Name, nil
}

// certifies fails unless the certificate is for the key.
func certifies(der, spki []byte) error {
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return fmt.Errorf("cannot parse it: %w", err)
	}
	want, err := x509.ParsePKIXPublicKey(spki)
	if err != nil {
		return err
	}
	switch want := want.(type) {
	case *ecdsa.PublicKey:
		if want.Equal(cert.PublicKey) {
			return nil
		}
	case *rsa.PublicKey:
		if got := rsaKeyOf(cert); got != nil && want.Equal(got) {
			return nil
		}
	}
	return fmt.Errorf("the certificate (serial %x, issuer %q) is for another key", cert.SerialNumber, cert.Issuer)
}

// rsaKeyOf also reads keys that are marked id-RSAES-OAEP, which some makers use
// for EKs and crypto/x509 leaves unparsed.
func rsaKeyOf(cert *x509.Certificate) *rsa.PublicKey {
	if k, ok := cert.PublicKey.(*rsa.PublicKey); ok {
		return k
	}
	var spki struct {
		Algorithm asn1.RawValue
		Key       asn1.BitString
	}
	if rest, err := asn1.Unmarshal(cert.RawSubjectPublicKeyInfo, &spki); err != nil || len(rest) != 0 {
		return nil
	}
	var k struct {
		N *big.Int
		E int
	}
	if rest, err := asn1.Unmarshal(spki.Key.RightAlign(), &k); err != nil || len(rest) != 0 || k.N.Sign() <= 0 {
		return nil
	}
	return &rsa.PublicKey{N: k.N, E: k.E}
}

// ekChain returns leaf and the certificates in NV that lead up from it. Which of
// them to believe is the server's affair; here they are only put in order.
func (s *state) ekChain(leaf []byte) ([][]byte, error) {
	indices, err := s.handles(firstChainIndex, int(lastChainIndex-firstChainIndex)+1)
	if err != nil {
		return nil, fmt.Errorf("EK certificate chain: %w", err)
	}
	var raw []byte
	for _, h := range indices {
		if h > lastChainIndex {
			break
		}
		part, err := s.nvRead(h, maxNV)
		if errors.Is(err, errNoIndex) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("EK certificate chain: %w", err)
		}
		if raw = append(raw, part...); len(raw) > maxNV {
			return nil, fmt.Errorf("EK certificate chain: %w: more than %d bytes", ErrTooLarge, maxNV)
		}
	}
	var found []*x509.Certificate
	for len(raw) > 0 && len(found) < 32 {
		der, rest, err := firstDER(raw)
		if err != nil {
			break // padding
		}
		if c, err := x509.ParseCertificate(der); err == nil && len(der) <= attest.MaxCertificate {
			found = append(found, c)
		}
		raw = rest
	}
	chain := [][]byte{leaf}
	at, err := x509.ParseCertificate(leaf)
	if err != nil {
		return nil, err
	}
	for len(chain) < attest.MaxChain {
		next := issuerOf(at, found)
		if next == nil || bytes.Equal(next.Raw, at.Raw) {
			break
		}
		chain, at = append(chain, next.Raw), next
	}
	return chain, nil
}

func issuerOf(c *x509.Certificate, among []*x509.Certificate) *x509.Certificate {
	for _, p := range among {
		if bytes.Equal(p.RawSubject, c.RawIssuer) && c.CheckSignatureFrom(p) == nil {
			return p
		}
	}
	// A signature that crypto/x509 cannot check is for the verifier to refuse.
	for _, p := range among {
		if bytes.Equal(p.RawSubject, c.RawIssuer) {
			return p
		}
	}
	return nil
}
