package attest

import (
	"bytes"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"time"
)

// Media type of parent evidence in an SVID's id-pe-cmw extension. Another type
// than leaf evidence's, so that neither parser takes the other's bytes.
const (
	parentType      = "application/vnd.rootlink.parent+cbor"
	parentIndicator = 4
)

// Parent is a decoded parent record (docs/evidence.md, Parent): the last
// attestation of the node whose agent asked for an SVID. It binds no workload
// key and is a claim: nothing in it has been checked but its form.
type Parent struct {
	Attest    []byte   // TPMS_ATTEST
	Signature []byte   // TPMT_SIGNATURE
	AKCert    []byte   // DER
	EKChain   [][]byte // DER, EK certificate first; empty for an allow-listed EK without one
	EKPublic  []byte   // SPKI DER of the EK, only when EKChain is empty
	PCRs      []PCRBank
	Policy    *PolicyRef // that the server matched
	EventLog  *TypedDigest
	IMALog    *TypedDigest

	AgentKey   [32]byte  // as in the quote's extraData; zero where the plugin interface hides it
	Nonce      [32]byte  // of the attestation: random, it holds no time
	AttestedAt time.Time // by the server's clock, whole milliseconds
}

// wireParent is the record as it is written. A key means what it means in an
// evidence record; 24 is its own.
type wireParent struct {
	Version    uint64                       `cbor:"1,keyasint"`
	Attest     []byte                       `cbor:"2,keyasint"`
	Signature  []byte                       `cbor:"3,keyasint"`
	AKCert     []byte                       `cbor:"4,keyasint"`
	EKChain    [][]byte                     `cbor:"5,keyasint,omitempty"`
	EKPublic   []byte                       `cbor:"6,keyasint,omitempty"`
	PCRs       map[uint64]map[uint64][]byte `cbor:"7,keyasint"`
	Policy     *wirePolicy                  `cbor:"8,keyasint,omitempty"`
	EventLog   *wireDigest                  `cbor:"9,keyasint,omitempty"`
	IMALog     *wireDigest                  `cbor:"10,keyasint,omitempty"`
	AgentKey   []byte                       `cbor:"13,keyasint"`
	Nonce      []byte                       `cbor:"19,keyasint"`
	AttestedAt uint64                       `cbor:"24,keyasint"` // Unix milliseconds
}

// ParentFromCertificate is ParentFromExtensions of a certificate.
func ParentFromCertificate(c *x509.Certificate) (*Parent, error) {
	return ParentFromExtensions(c.Extensions)
}

// ParentFromExtensions finds parent evidence: ErrNoEvidence when there is no
// evidence extension, another error when there are two, or it is of another
// kind or malformed.
func ParentFromExtensions(exts []pkix.Extension) (*Parent, error) {
	value, err := oneCMW(exts)
	if err != nil {
		return nil, err
	}
	if value == nil {
		return nil, ErrNoEvidence
	}
	b, err := parseCMW(value, parentType, parentIndicator)
	if err != nil {
		return nil, err
	}
	return ParseParent(b)
}

// Extension returns p as the non-critical id-pe-cmw extension (cbor choice).
func (p *Parent) Extension() (pkix.Extension, error) {
	b, err := p.Marshal()
	if err != nil {
		return pkix.Extension{}, err
	}
	return marshalCMW(parentType, parentIndicator, b)
}

// ParseParent decodes one deterministic CBOR record, as strictly as ParseRecord.
func ParseParent(b []byte) (*Parent, error) {
	var w wireParent
	if err := decode(b, &w, MaxParent, ErrRecord); err != nil {
		return nil, err
	}
	p, err := w.parent()
	if err != nil {
		return nil, err
	}
	again, err := p.Marshal()
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(again, b) {
		return nil, fmt.Errorf("%w: not in deterministic encoding", ErrRecord)
	}
	return p, nil
}

// Marshal encodes p; ParseParent(Marshal(p)) is p.
func (p *Parent) Marshal() ([]byte, error) {
	w, err := p.wire()
	if err != nil {
		return nil, err
	}
	return encode(w, MaxParent, ErrRecord)
}

func (w *wireParent) parent() (*Parent, error) {
	if w.Version != recordVersion {
		return nil, fmt.Errorf("%w: version %d, want %d", ErrRecord, w.Version, recordVersion)
	}
	if len(w.AgentKey) != 32 || len(w.Nonce) != 32 {
		return nil, fmt.Errorf("%w: agent key of %d bytes, nonce of %d, want 32", ErrRecord, len(w.AgentKey), len(w.Nonce))
	}
	if w.AttestedAt == 0 || w.AttestedAt > maxUnixMilli {
		return nil, fmt.Errorf("%w: attested at %d", ErrRecord, w.AttestedAt)
	}
	p := &Parent{
		Attest: w.Attest, Signature: w.Signature, AKCert: w.AKCert, EKChain: w.EKChain, EKPublic: w.EKPublic,
		AgentKey: [32]byte(w.AgentKey), Nonce: [32]byte(w.Nonce), AttestedAt: time.UnixMilli(int64(w.AttestedAt)).UTC(),
	}
	var err error
	if p.PCRs, err = banksFromWire(w.PCRs); err != nil {
		return nil, err
	}
	if p.EventLog, err = digestFromWire(w.EventLog); err != nil {
		return nil, err
	}
	if p.IMALog, err = digestFromWire(w.IMALog); err != nil {
		return nil, err
	}
	if p.Policy, err = policyFromWire(w.Policy); err != nil {
		return nil, err
	}
	return p, nil
}

func (p *Parent) wire() (*wireParent, error) {
	if ms := p.AttestedAt.UnixMilli(); ms <= 0 || ms > maxUnixMilli {
		return nil, fmt.Errorf("%w: attested at %v", ErrRecord, p.AttestedAt)
	}
	if err := p.node().checkNodeForm(); err != nil {
		return nil, err
	}
	return &wireParent{
		Version: recordVersion,
		Attest:  p.Attest, Signature: p.Signature, AKCert: p.AKCert, EKChain: p.EKChain, EKPublic: p.EKPublic,
		PCRs: banksToWire(p.PCRs), Policy: policyToWire(p.Policy),
		EventLog: digestToWire(p.EventLog), IMALog: digestToWire(p.IMALog),
		AgentKey: p.AgentKey[:], Nonce: p.Nonce[:], AttestedAt: uint64(p.AttestedAt.UnixMilli()),
	}, nil
}

// node is what p says of the node, in the shape in which all kinds of evidence
// are checked for that. It is no record: it has no kind.
func (p *Parent) node() *Evidence {
	return &Evidence{
		Attest: p.Attest, Signature: p.Signature, AKCert: p.AKCert, EKChain: p.EKChain, EKPublic: p.EKPublic,
		PCRs: p.PCRs, Policy: p.Policy, EventLog: p.EventLog, IMALog: p.IMALog,
	}
}
