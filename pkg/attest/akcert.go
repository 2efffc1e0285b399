package attest

import (
	"crypto/x509"
	"time"
)

// AKStatement is what the attestation CA says in an AK certificate: this AK and
// this EK live in one TPM, accepted so. A verifier takes it on the CA's word.
type AKStatement struct {
	EKHash       [32]byte
	EKBasis      string   // "maker" or "allow_list"
	EKRoot       [32]byte // zero for allow_list
	AKName       []byte
	Manufacturer string
	Firmware     string
	Software     bool
}

// AKTemplate returns the certificate template of §3: EKU 2.23.133.8.3, empty
// subject, critical SAN with permanentIdentifier (2.23.133.12.1) = EK hash, the
// statement as a non-critical extension, at most 24 hours.
func AKTemplate(s AKStatement, notBefore, notAfter time.Time) (*x509.Certificate, error) {
	return nil, errNotImplemented
}

// ParseAKCertificate reads and checks the form of an AK certificate (not its
// signature): exactly the profile of AKTemplate.
func ParseAKCertificate(c *x509.Certificate) (*AKStatement, error) { return nil, errNotImplemented }
