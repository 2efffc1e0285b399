package attest

import (
	"bytes"
	"fmt"
	"maps"
	"slices"
)

const recordVersion = 1

// wireRecord is the record as it is written. Key numbers are never used again
// for another meaning. The table in docs/evidence.md is the specification.
type wireRecord struct {
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
	Kind       uint64                       `cbor:"11,keyasint"`
	KeyOrigin  uint64                       `cbor:"12,keyasint"`
	AgentKey   []byte                       `cbor:"13,keyasint"`
	Executable []byte                       `cbor:"14,keyasint"`
	Recorder   []byte                       `cbor:"15,keyasint"`
	Tool       []byte                       `cbor:"16,keyasint"`
	Payload    []byte                       `cbor:"17,keyasint"`
	Selectors  []string                     `cbor:"18,keyasint"`
	Nonce      []byte                       `cbor:"19,keyasint"`
	Salt       []byte                       `cbor:"20,keyasint"`
	Index      uint64                       `cbor:"21,keyasint"`
	Size       uint64                       `cbor:"22,keyasint"`
	Path       [][]byte                     `cbor:"23,keyasint,omitempty"`
}

type wirePolicy struct {
	_        struct{} `cbor:",toarray"`
	Name     string
	Revision uint64
	Digest   wireDigest
}

type wireDigest struct {
	_     struct{} `cbor:",toarray"`
	Alg   uint64
	Value []byte
}

// ParseRecord decodes one deterministic CBOR record. Unknown keys or versions,
// duplicate or unsorted keys, non-minimal lengths and trailing bytes are errors.
func ParseRecord(b []byte) (*Evidence, error) {
	var w wireRecord
	if err := decode(b, &w, MaxEvidence, ErrRecord); err != nil {
		return nil, err
	}
	if w.Version != recordVersion {
		return nil, fmt.Errorf("%w: version %d, want %d", ErrRecord, w.Version, recordVersion)
	}
	e, err := w.evidence()
	if err != nil {
		return nil, err
	}
	// One evidence has one encoding.
	again, err := e.MarshalRecord()
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(again, b) {
		return nil, fmt.Errorf("%w: not in deterministic encoding", ErrRecord)
	}
	return e, nil
}

// MarshalRecord encodes e; ParseRecord(MarshalRecord(e)) is e.
func (e *Evidence) MarshalRecord() ([]byte, error) {
	w, err := e.wire()
	if err != nil {
		return nil, err
	}
	return encode(w, MaxEvidence, ErrRecord)
}

func (w *wireRecord) evidence() (*Evidence, error) {
	e := &Evidence{
		Attest: w.Attest, Signature: w.Signature, AKCert: w.AKCert,
		EKChain: w.EKChain, EKPublic: w.EKPublic,
		Kind: Kind(w.Kind), KeyOrigin: KeyOrigin(w.KeyOrigin),
		Selectors: w.Selectors, Index: w.Index, Size: w.Size,
	}
	if w.Kind > 0xff || w.KeyOrigin > 0xff {
		return nil, fmt.Errorf("%w: kind %d, key origin %d", ErrRecord, w.Kind, w.KeyOrigin)
	}
	for _, f := range []struct {
		name string
		dst  []byte
		src  []byte
	}{
		{"agent key", e.AgentKey[:], w.AgentKey},
		{"executable", e.Executable[:], w.Executable},
		{"recorder", e.Recorder[:], w.Recorder},
		{"tool", e.Tool[:], w.Tool},
		{"payload", e.Payload[:], w.Payload},
		{"nonce", e.Nonce[:], w.Nonce},
		{"salt", e.Salt[:], w.Salt},
	} {
		if len(f.src) != len(f.dst) {
			return nil, fmt.Errorf("%w: %s of %d bytes, want %d", ErrRecord, f.name, len(f.src), len(f.dst))
		}
		copy(f.dst, f.src)
	}
	if len(w.Path) > maxPath {
		return nil, fmt.Errorf("%w: path of %d hashes", ErrRecord, len(w.Path))
	}
	for _, h := range w.Path {
		if len(h) != 32 {
			return nil, fmt.Errorf("%w: path hash of %d bytes", ErrRecord, len(h))
		}
		e.Path = append(e.Path, [32]byte(h))
	}
	var err error
	if e.PCRs, err = banksFromWire(w.PCRs); err != nil {
		return nil, err
	}
	if e.EventLog, err = digestFromWire(w.EventLog); err != nil {
		return nil, err
	}
	if e.IMALog, err = digestFromWire(w.IMALog); err != nil {
		return nil, err
	}
	if e.Policy, err = policyFromWire(w.Policy); err != nil {
		return nil, err
	}
	return e, nil
}

// wire is the only way to bytes, for parsing too (by re-encoding), so every
// rule about form stands here once.
func (e *Evidence) wire() (*wireRecord, error) {
	if err := e.checkForm(); err != nil {
		return nil, err
	}
	w := &wireRecord{
		Version: recordVersion,
		Attest:  e.Attest, Signature: e.Signature, AKCert: e.AKCert,
		EKChain: e.EKChain, EKPublic: e.EKPublic,
		PCRs: banksToWire(e.PCRs), Policy: policyToWire(e.Policy),
		Kind: uint64(e.Kind), KeyOrigin: uint64(e.KeyOrigin),
		AgentKey: e.AgentKey[:], Executable: e.Executable[:], Recorder: e.Recorder[:],
		Tool: e.Tool[:], Payload: e.Payload[:], Selectors: e.Selectors,
		Nonce: e.Nonce[:], Salt: e.Salt[:], Index: e.Index, Size: e.Size,
	}
	for i := range e.Path {
		w.Path = append(w.Path, e.Path[i][:])
	}
	w.EventLog = digestToWire(e.EventLog)
	w.IMALog = digestToWire(e.IMALog)
	return w, nil
}

func (e *Evidence) checkForm() error {
	bad := func(format string, a ...any) error {
		return fmt.Errorf("%w: "+format, append([]any{ErrRecord}, a...)...)
	}
	switch {
	case e.Kind != KindLeaf && e.Kind != KindDetached:
		return bad("unknown kind %d", e.Kind)
	case e.KeyOrigin != OriginCaller && e.KeyOrigin != OriginAgent:
		return bad("unknown key origin %d", e.KeyOrigin)
	case e.Size == 0 || e.Size > MaxLeaves || e.Index >= e.Size:
		return bad("leaf %d of %d", e.Index, e.Size)
	case len(e.Path) > maxPath:
		return bad("path of %d hashes", len(e.Path))
	}
	if err := CheckSelectors(e.Selectors); err != nil {
		return fmt.Errorf("%w: %w", ErrRecord, err)
	}
	return e.checkNodeForm()
}

// checkNodeForm checks what says something of the node: the fields that leaf,
// detached and parent evidence share.
func (e *Evidence) checkNodeForm() error {
	bad := func(format string, a ...any) error {
		return fmt.Errorf("%w: "+format, append([]any{ErrRecord}, a...)...)
	}
	switch {
	case len(e.Attest) == 0 || len(e.Attest) > MaxTPMStructure:
		return bad("attest of %d bytes", len(e.Attest))
	case len(e.Signature) == 0 || len(e.Signature) > MaxTPMStructure:
		return bad("signature of %d bytes", len(e.Signature))
	case len(e.AKCert) == 0 || len(e.AKCert) > MaxCertificate:
		return bad("AK certificate of %d bytes", len(e.AKCert))
	case len(e.EKChain) > MaxChain:
		return bad("EK chain of %d certificates, at most %d", len(e.EKChain), MaxChain)
	case (len(e.EKChain) == 0) == (len(e.EKPublic) == 0):
		return bad("want either an EK chain or an EK public key")
	case len(e.EKPublic) > MaxTPMStructure:
		return bad("EK public key of %d bytes", len(e.EKPublic))
	}
	for _, c := range e.EKChain {
		if len(c) == 0 || len(c) > MaxCertificate {
			return bad("EK chain certificate of %d bytes", len(c))
		}
	}
	if err := checkBanks(e.PCRs); err != nil {
		return fmt.Errorf("%w: %w", ErrRecord, err)
	}
	for _, d := range []*TypedDigest{e.EventLog, e.IMALog} {
		if d != nil {
			if err := d.check(); err != nil {
				return err
			}
		}
	}
	if p := e.Policy; p != nil {
		if p.Name == "" || len(p.Name) > MaxPolicyName {
			return bad("policy name of %d bytes", len(p.Name))
		}
		return p.Digest.check()
	}
	return nil
}

func (d *TypedDigest) check() error {
	a, ok := hashByName(d.Alg)
	if !ok || a.weak || len(d.Value) != a.size {
		return fmt.Errorf("%w: digest %.20q of %d bytes", ErrRecord, d.Alg, len(d.Value))
	}
	return nil
}

func digestToWire(d *TypedDigest) *wireDigest {
	if d == nil {
		return nil
	}
	a, _ := hashByName(d.Alg)
	return &wireDigest{Alg: uint64(a.id), Value: d.Value}
}

func digestFromWire(w *wireDigest) (*TypedDigest, error) {
	if w == nil {
		return nil, nil
	}
	a, ok := hashByID(w.Alg)
	if !ok {
		return nil, fmt.Errorf("%w: digest algorithm %#x", ErrRecord, w.Alg)
	}
	return &TypedDigest{Alg: a.name, Value: w.Value}, nil
}

func policyToWire(p *PolicyRef) *wirePolicy {
	if p == nil {
		return nil
	}
	return &wirePolicy{Name: p.Name, Revision: p.Revision, Digest: *digestToWire(&p.Digest)}
}

func policyFromWire(w *wirePolicy) (*PolicyRef, error) {
	if w == nil {
		return nil, nil
	}
	d, err := digestFromWire(&w.Digest)
	if err != nil {
		return nil, err
	}
	return &PolicyRef{Name: w.Name, Revision: w.Revision, Digest: *d}, nil
}

func banksToWire(banks []PCRBank) map[uint64]map[uint64][]byte {
	out := make(map[uint64]map[uint64][]byte, len(banks))
	for _, b := range banks {
		alg, _ := hashByName(b.Bank)
		m := make(map[uint64][]byte, len(b.Values))
		for i, v := range b.Values {
			m[uint64(i)] = v
		}
		out[uint64(alg.id)] = m
	}
	return out
}

func banksFromWire(w map[uint64]map[uint64][]byte) ([]PCRBank, error) {
	var banks []PCRBank
	for _, id := range slices.Sorted(maps.Keys(w)) {
		a, ok := hashByID(id)
		if !ok {
			return nil, fmt.Errorf("%w: PCR bank %#x", ErrRecord, id)
		}
		b := PCRBank{Bank: a.name, Values: make(map[uint32][]byte, len(w[id]))}
		for i, v := range w[id] {
			if i > MaxPCR {
				return nil, fmt.Errorf("%w: PCR %d", ErrRecord, i)
			}
			b.Values[uint32(i)] = v
		}
		banks = append(banks, b)
	}
	return banks, nil
}

// checkBanks fails unless banks are known, distinct, in the order of their
// algorithm identifiers, not empty, and hold digests of the right length.
func checkBanks(banks []PCRBank) error {
	if len(banks) == 0 || len(banks) > MaxBanks {
		return fmt.Errorf("%d PCR banks, want 1 to %d", len(banks), MaxBanks)
	}
	last := uint16(0)
	for _, b := range banks {
		a, ok := hashByName(b.Bank)
		if !ok || a.id <= last {
			return fmt.Errorf("PCR bank %.20q unknown, repeated or out of order", b.Bank)
		}
		last = a.id
		if len(b.Values) == 0 {
			return fmt.Errorf("PCR bank %s without values", b.Bank)
		}
		for i, v := range b.Values {
			if i > MaxPCR || len(v) != a.size {
				return fmt.Errorf("PCR %s:%d of %d bytes", b.Bank, i, len(v))
			}
		}
	}
	return nil
}
