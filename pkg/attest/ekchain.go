package attest

import (
	"bytes"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"fmt"
	"time"
)

// oidEKCertificate returns tcg-kp-EKCertificate.
func oidEKCertificate() asn1.ObjectIdentifier { return asn1.ObjectIdentifier{2, 23, 133, 8, 1} }

func oidSAN() asn1.ObjectIdentifier { return asn1.ObjectIdentifier{2, 5, 29, 17} }

// parseChain reads an EK chain within the limits.
func parseChain(chain [][]byte) ([]*x509.Certificate, error) {
	if len(chain) > MaxChain {
		return nil, fmt.Errorf("%w: chain of %d certificates, at most %d", ErrEKCert, len(chain), MaxChain)
	}
	var certs []*x509.Certificate
	for i, der := range chain {
		if len(der) > MaxCertificate {
			return nil, fmt.Errorf("%w: certificate %d of %d bytes, at most %d", ErrEKCert, i, len(der), MaxCertificate)
		}
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("%w: certificate %d: %v", ErrEKCert, i, err)
		}
		certs = append(certs, c)
	}
	return certs, nil
}

// verifyEKChain finds a path from certs[0] to a maker root, top down: the form
// of the EK certificate, then issuer by issuer. Go's own Verify is not used
// because it stops at the critical directoryName that TCG puts in the SAN, and
// looks at host names, none of which a TPM has.
func verifyEKChain(certs []*x509.Certificate, r EKRoots, at time.Time, known *Signatures) (*x509.Certificate, error) {
	if len(r.Roots) == 0 {
		return nil, fmt.Errorf("%w: no maker roots are configured", ErrEKCert)
	}
	if len(r.Roots)+len(r.Intermediates) > maxCandidates {
		return nil, fmt.Errorf("%w: more than %d roots and intermediates", ErrEKCert, maxCandidates)
	}
	if err := checkEKCert(certs[0]); err != nil {
		return nil, err
	}
	s := &chainSearch{
		roots: r.Roots, at: at, budget: maxPathSignature, known: known,
		intermediates: append(append([]*x509.Certificate(nil), certs[1:]...), r.Intermediates...),
	}
	root := s.climb(certs[0], 0)
	if root == nil {
		if s.last == nil {
			s.last = fmt.Errorf("no issuer %.200q among roots and intermediates", certs[0].Issuer)
		}
		return nil, fmt.Errorf("%w: %w", ErrEKCert, s.last)
	}
	return root, nil
}

type chainSearch struct {
	roots, intermediates []*x509.Certificate
	at                   time.Time
	budget               int // signature checks left
	known                *Signatures
	last                 error // why the most promising path failed
}

// climb returns the root that c, with below intermediates under it, leads to.
func (s *chainSearch) climb(c *x509.Certificate, below int) *x509.Certificate {
	if err := checkTime(c, s.at); err != nil {
		s.last = err
		return nil
	}
	for _, root := range s.roots {
		if s.signed(c, root, below) {
			if err := checkTime(root, s.at); err != nil {
				s.last = err
				continue
			}
			return root
		}
	}
	if below >= MaxChain {
		return nil
	}
	for _, ca := range s.intermediates {
		if bytes.Equal(ca.Raw, c.Raw) || !s.signed(c, ca, below) {
			continue
		}
		if root := s.climb(ca, below+1); root != nil {
			return root
		}
	}
	return nil
}

// signed says whether ca, fit to be a CA over a path with below intermediates,
// signed c. Names only pick candidates: two makers may use the same name, the
// signature decides.
func (s *chainSearch) signed(c, ca *x509.Certificate, below int) bool {
	if !bytes.Equal(c.RawIssuer, ca.RawSubject) {
		return false
	}
	if err := checkCA(ca, below); err != nil {
		s.last = err
		return false
	}
	if s.budget--; s.budget < 0 {
		s.last = fmt.Errorf("gave up after %d signature checks", maxPathSignature)
		return false
	}
	if err := s.known.signedBy(c, ca); err != nil {
		s.last = fmt.Errorf("%.200q is not signed by the configured %.200q: %w", c.Subject, ca.Subject, err)
		return false
	}
	return true
}

func checkTime(c *x509.Certificate, at time.Time) error {
	if at.Before(c.NotBefore) || at.After(c.NotAfter) {
		return fmt.Errorf("%.200q is valid from %s to %s, not at %s", c.Subject,
			c.NotBefore.UTC().Format(time.RFC3339), c.NotAfter.UTC().Format(time.RFC3339), at.UTC().Format(time.RFC3339))
	}
	return nil
}

// checkCA fails unless ca may sign certificates over a path with below
// intermediates. Name constraints are refused, as nothing here applies them.
func checkCA(ca *x509.Certificate, below int) error {
	if !ca.BasicConstraintsValid || !ca.IsCA {
		return fmt.Errorf("%.200q is not a CA", ca.Subject)
	}
	if ca.KeyUsage != 0 && ca.KeyUsage&x509.KeyUsageCertSign == 0 {
		return fmt.Errorf("%.200q may not sign certificates", ca.Subject)
	}
	if k, ok := ca.PublicKey.(*rsa.PublicKey); ok && k.N.BitLen() > maxCARSABits {
		return fmt.Errorf("%.200q has an RSA key of %d bits, at most %d", ca.Subject, k.N.BitLen(), maxCARSABits)
	}
	if (ca.MaxPathLen > 0 || ca.MaxPathLenZero) && below > ca.MaxPathLen {
		return fmt.Errorf("%.200q allows %d intermediates under it, not %d", ca.Subject, ca.MaxPathLen, below)
	}
	if len(ca.UnhandledCriticalExtensions) > 0 {
		return fmt.Errorf("%.200q has the unknown critical extension %v", ca.Subject, ca.UnhandledCriticalExtensions[0])
	}
	for _, x := range ca.Extensions {
		if x.Id.Equal(asn1.ObjectIdentifier{2, 5, 29, 30}) {
			return fmt.Errorf("%.200q has name constraints, which are not applied here", ca.Subject)
		}
	}
	return nil
}

// checkEKCert checks the form of an EK certificate (TCG EK Credential Profile
// 2.6, section 3.2).
func checkEKCert(c *x509.Certificate) error {
	if c.IsCA || c.KeyUsage&x509.KeyUsageCertSign != 0 {
		return fmt.Errorf("%w: it is a CA certificate", ErrEKCert)
	}
	if len(c.ExtKeyUsage)+len(c.UnknownExtKeyUsage) > 0 {
		ok := false
		for _, u := range c.UnknownExtKeyUsage {
			ok = ok || u.Equal(oidEKCertificate())
		}
		if !ok {
			return fmt.Errorf("%w: its extended key usage is not that of an EK", ErrEKCert)
		}
	}
	for _, id := range c.UnhandledCriticalExtensions {
		if id.Equal(oidSAN()) && sanIsDirectoryNames(c.Extensions) {
			continue
		}
		return fmt.Errorf("%w: unknown critical extension %v", ErrEKCert, id)
	}
	return nil
}

// sanIsDirectoryNames says whether the SAN holds well-formed directoryNames
// only, which is where TCG puts manufacturer, model and version.
func sanIsDirectoryNames(exts []pkix.Extension) bool {
	for _, x := range exts {
		if !x.Id.Equal(oidSAN()) {
			continue
		}
		var names []asn1.RawValue
		if rest, err := asn1.Unmarshal(x.Value, &names); err != nil || len(rest) != 0 || len(names) == 0 {
			return false
		}
		for _, n := range names {
			var rdn pkix.RDNSequence
			if n.Class != asn1.ClassContextSpecific || n.Tag != 4 || !n.IsCompound {
				return false
			}
			if rest, err := asn1.Unmarshal(n.Bytes, &rdn); err != nil || len(rest) != 0 {
				return false
			}
		}
		return true
	}
	return false
}
