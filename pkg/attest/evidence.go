package attest

import (
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"slices"
)

// Errors of decoding.
var (
	// ErrNoEvidence means that a certificate or CSR carries no evidence extension.
	ErrNoEvidence = errors.New("no evidence extension")
	// ErrRecord is wrapped by every error about the form of a record or extension.
	ErrRecord = errors.New("malformed evidence record")
)

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
	Alg   string // "sha256", "sha384", "sha512"
	Value []byte
}

// Evidence is a decoded record (docs/evidence.md). It is a claim: nothing in it
// has been checked but its form.
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

// FromCertificate is FromExtensions of a certificate.
func FromCertificate(c *x509.Certificate) (*Evidence, error) {
	return FromExtensions(c.Extensions)
}

// FromExtensions finds the one evidence extension: ErrNoEvidence when there is
// none, another error when there are two or it is critical or malformed.
func FromExtensions(exts []pkix.Extension) (*Evidence, error) {
	value, err := oneCMW(exts)
	if err != nil {
		return nil, err
	}
	if value == nil {
		return nil, ErrNoEvidence
	}
	return ParseExtensionValue(value)
}

// Leaf completes the leaf with what the certificate or CSR and entry say.
func (e *Evidence) Leaf(trustDomain, spiffeID string, svidKey [32]byte) *Leaf {
	return &Leaf{
		Kind: e.Kind, KeyOrigin: e.KeyOrigin,
		TrustDomain: trustDomain, SPIFFEID: spiffeID,
		SVIDKey: svidKey, AgentKey: e.AgentKey,
		Executable: e.Executable, Recorder: e.Recorder, Tool: e.Tool, Payload: e.Payload,
		Selectors: slices.Clone(e.Selectors), Nonce: e.Nonce, Salt: e.Salt,
	}
}
