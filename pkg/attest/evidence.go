package attest

import (
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
)

// ErrNoEvidence means that a certificate or CSR carries no evidence extension.
var ErrNoEvidence = errors.New("no evidence extension")

// PCRBank holds the values of one bank by PCR index.
type PCRBank struct {
	Bank   string // "sha1", "sha256", "sha384", "sha512"
	Values map[uint32][]byte
}

// PolicyRef names the PCR policy revision that the server matched.
type PolicyRef struct {
	Name     string
	Revision uint64
	Digest   TypedDigest
}

// TypedDigest is a digest with its algorithm.
type TypedDigest struct {
	Alg   string // "sha256", …
	Value []byte
}

// Evidence is a decoded record of §4.2. It is a claim: nothing in it has been
// checked but its form.
type Evidence struct {
	Attest    []byte   // TPMS_ATTEST
	Signature []byte   // TPMT_SIGNATURE
	AKCert    []byte   // DER
	EKChain   [][]byte // DER, EK certificate first; empty for an allow-listed EK without one
	EKPublic  []byte   // SPKI DER of the EK, only when EKChain is empty
	PCRs      []PCRBank
	Policy    *PolicyRef   // set by the server when it embeds the record, absent in a CSR
	EventLog  *TypedDigest // logs are content-addressed and ship beside the link
	IMALog    *TypedDigest

	// Leaf fields that the certificate does not hold.
	Kind       Kind
	KeyOrigin  KeyOrigin
	AgentKey   [32]byte
	Executable [32]byte
	Recorder   [32]byte
	Tool       [32]byte
	Payload    [32]byte
	Selectors  []string
	Nonce      [32]byte
	Salt       [16]byte

	Index uint64
	Size  uint64
	Path  [][32]byte
}

// ParseRecord decodes one deterministic CBOR record. Unknown keys or versions,
// duplicate or unsorted keys, non-minimal lengths and trailing bytes are errors.
func ParseRecord(b []byte) (*Evidence, error) { return nil, errNotImplemented }

// MarshalRecord encodes e; ParseRecord(MarshalRecord(e)) is e.
func (e *Evidence) MarshalRecord() ([]byte, error) { return nil, errNotImplemented }

// Extension returns e as the non-critical id-pe-cmw extension (RFC 9999, cbor choice).
func (e *Evidence) Extension() (pkix.Extension, error) {
	return pkix.Extension{}, errNotImplemented
}

// ParseExtensionValue decodes the DER value of an id-pe-cmw extension.
func ParseExtensionValue(der []byte) (*Evidence, error) { return nil, errNotImplemented }

// FromExtensions finds the one evidence extension: ErrNoEvidence when there is
// none, another error when there are two or it is critical or malformed.
func FromExtensions(exts []pkix.Extension) (*Evidence, error) { return nil, errNotImplemented }

// FromCertificate is FromExtensions of a certificate.
func FromCertificate(c *x509.Certificate) (*Evidence, error) {
	return FromExtensions(c.Extensions)
}

// Leaf completes the leaf with what the certificate or CSR and entry say.
func (e *Evidence) Leaf(trustDomain, spiffeID string, svidKey [32]byte) *Leaf { return nil }
