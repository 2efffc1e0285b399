package attest

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
)

// ErrDetached is wrapped by every error about the form of a detached record.
var ErrDetached = errors.New("malformed detached evidence")

const (
	detachedVersion = 1
	detachedLabel   = "rootlink/detached/v1\x00"
)

// Detached is evidence that travels beside a link, because the server that
// issued the SVID puts none inside (docs/evidence.md, "Detached"). It is a
// claim: nothing in it has been checked but its form.
type Detached struct {
	Evidence  *Evidence // of kind detached
	AgentSVID [][]byte  // DER, leaf first: whose key the evidence names
	Signature []byte    // by the SVID's key, ECDSA in ASN.1 DER; none until it was signed
	Token     []byte    // RFC 3161 response over Signature; none when nobody attests the time
}

// wireDetached is the record as it is written.
type wireDetached struct {
	Version   uint64   `cbor:"1,keyasint"`
	Evidence  []byte   `cbor:"2,keyasint"`
	AgentSVID [][]byte `cbor:"3,keyasint"`
	Signature []byte   `cbor:"4,keyasint,omitempty"`
	Token     []byte   `cbor:"5,keyasint,omitempty"`
}

// DetachedNonce is the nonce of detached evidence: SHA-256 of the SVID it
// vouches for. No server takes part, so the SVID itself is what makes the
// evidence younger than the SVID and good for no other.
func DetachedNonce(svidDER []byte) [32]byte { return sha256.Sum256(svidDER) }

// DetachedFile is the name of the file beside a bundle that holds its record.
// The SVID alone would not do: on a SPIRE agent's socket every step of an hour
// may sign with the same one.
func DetachedFile(svidDER []byte, payload [32]byte) string {
	h := sha256.Sum256(slices.Concat(svidDER, payload[:]))
	return "sha256-" + hex.EncodeToString(h[:]) + DetachedSuffix
}

// DetachedSuffix ends the names of files with detached records.
const DetachedSuffix = ".evidence.cbor"

// NewDetached returns the record of evidence that was just quoted, for the SVID's
// key to sign.
func NewDetached(e *Evidence, agentSVID [][]byte) (*Detached, error) {
	d := &Detached{Evidence: e, AgentSVID: agentSVID}
	if err := d.checkForm(); err != nil {
		return nil, err
	}
	return d, nil
}

// SigningInput returns what the SVID's key signs, ECDSA over SHA-256 of it:
// label ‖ lp(evidence) ‖ u32be(certificates) ‖ lp(certificate)… ‖ SHA-256(SVID).
// Without this signature anybody who may ask the node's agent could put a record
// beside a link that its signer never saw.
func (d *Detached) SigningInput(svidDER []byte) ([]byte, error) {
	if err := d.checkForm(); err != nil {
		return nil, err
	}
	record, err := d.Evidence.MarshalRecord()
	if err != nil {
		return nil, err
	}
	b := make([]byte, 0, len(record)+4*len(d.AgentSVID)+256)
	b = append(b, detachedLabel...)
	b = appendLP(b, record)
	b = binary.BigEndian.AppendUint32(b, uint32(len(d.AgentSVID)))
	for _, c := range d.AgentSVID {
		b = appendLP(b, c)
	}
	svid := sha256.Sum256(svidDER)
	return append(b, svid[:]...), nil
}

// Marshal encodes d, with or without signature and token.
func (d *Detached) Marshal() ([]byte, error) {
	if err := d.checkForm(); err != nil {
		return nil, err
	}
	record, err := d.Evidence.MarshalRecord()
	if err != nil {
		return nil, err
	}
	return encode(wireDetached{
		Version: detachedVersion, Evidence: record, AgentSVID: d.AgentSVID, Signature: d.Signature, Token: d.Token,
	}, MaxDetached, ErrDetached)
}

// ParseDetached decodes one record, strictly: ParseDetached(b).Marshal() is b.
// The signature may be missing, as in what an agent answers; VerifyDetached
// refuses such a record.
func ParseDetached(b []byte) (*Detached, error) {
	var w wireDetached
	if err := decode(b, &w, MaxDetached, ErrDetached); err != nil {
		return nil, err
	}
	if w.Version != detachedVersion {
		return nil, fmt.Errorf("%w: version %d, want %d", ErrDetached, w.Version, detachedVersion)
	}
	d := &Detached{AgentSVID: w.AgentSVID, Signature: w.Signature, Token: w.Token}
	var err error
	if d.Evidence, err = ParseRecord(w.Evidence); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrDetached, err)
	}
	again, err := d.Marshal()
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(again, b) {
		return nil, fmt.Errorf("%w: not in deterministic encoding", ErrDetached)
	}
	return d, nil
}

func (d *Detached) checkForm() error {
	bad := func(format string, a ...any) error {
		return fmt.Errorf("%w: "+format, append([]any{ErrDetached}, a...)...)
	}
	e := d.Evidence
	switch {
	case e == nil:
		return bad("no evidence")
	case e.Kind != KindDetached:
		return bad("its evidence is of kind %d", e.Kind)
	case e.Policy != nil:
		return bad("it names a PCR policy, which only a server that judged one says")
	case e.Payload == [32]byte{}:
		return bad("it is about no statement")
	case e.AgentKey == [32]byte{}:
		return bad("it is of no agent")
	case len(d.AgentSVID) == 0 || len(d.AgentSVID) > MaxAgentChain:
		return bad("an agent SVID of %d certificates, 1 to %d allowed", len(d.AgentSVID), MaxAgentChain)
	case len(d.Signature) > MaxECDSASignature:
		return bad("a signature of %d bytes, at most %d", len(d.Signature), MaxECDSASignature)
	case len(d.Token) > MaxDetachedToken:
		return bad("a token of %d bytes, at most %d", len(d.Token), MaxDetachedToken)
	case len(d.Signature) == 0 && len(d.Token) != 0:
		return bad("a token over no signature")
	}
	for _, c := range d.AgentSVID {
		if len(c) == 0 || len(c) > MaxCertificate {
			return bad("an agent certificate of %d bytes", len(c))
		}
	}
	return nil
}
