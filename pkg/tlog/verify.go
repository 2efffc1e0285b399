package tlog

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"fmt"

	rekorv1 "github.com/sigstore/protobuf-specs/gen/pb-go/rekor/v1"
	"github.com/transparency-dev/merkle/proof"
	"github.com/transparency-dev/merkle/rfc6962"
	"google.golang.org/protobuf/encoding/protojson"
)

// Included is a verified entry.
type Included struct {
	Log      *Log
	Index    uint64
	Size     uint64   // of the tree in which it was found
	Root     [32]byte // of that tree
	Cosigned []Cosignature
}

// Checkpoint is the state of the log that the entry was found in, for a
// verifier's memory.
func (i *Included) Checkpoint() Checkpoint { return Checkpoint{i.Log.Origin, i.Size, i.Root} }

// Verify verifies that one of logs holds body, by the entry e that somebody
// gives as proof. The caller rebuilds body from what it verifies (EntryBody):
// what e says of itself proves nothing about that. The log's own window is the
// caller's to judge (Log.ValidAt).
func Verify(e *rekorv1.TransparencyLogEntry, body []byte, logs []Log, ws []Witness) (*Included, error) {
	if err := checkForm(e); err != nil {
		return nil, err
	}
	if len(body) == 0 || len(body) > MaxBody {
		return nil, malformed("a body of %d bytes", len(body))
	}

	// 1. Which log.
	l, err := findLog(e.GetLogId().GetKeyId(), logs)
	if err != nil {
		return nil, err
	}
	key, err := l.key()
	if err != nil {
		return nil, err
	}
	witnesses, err := openWitnesses(ws, key)
	if err != nil {
		return nil, err
	}

	// 2. The entry is about what the caller asks about.
	if !bytes.Equal(e.GetCanonicalizedBody(), body) {
		return nil, fmt.Errorf("%w: its body is not the one expected", ErrOtherEntry)
	}

	// 3. The checkpoint is the log's, by signature and by origin
	// (C2SP tlog-checkpoint).
	p := e.GetInclusionProof()
	cp, cosigned, err := openCheckpoint([]byte(p.GetCheckpoint().GetEnvelope()), l.Origin, key, witnesses)
	if err != nil {
		return nil, err
	}

	// 4. The proof speaks of the checkpoint's tree. Sigstore's verifiers go by
	// the checkpoint alone; an entry that says something else beside it would
	// be read differently by others.
	index := uint64(e.GetLogIndex())
	switch {
	case p.GetLogIndex() != e.GetLogIndex():
		return nil, malformed("two indexes: %d and %d", e.GetLogIndex(), p.GetLogIndex())
	case uint64(p.GetTreeSize()) != cp.Size || !bytes.Equal(p.GetRootHash(), cp.Root[:]):
		return nil, fmt.Errorf("%w: the proof is about another tree than the checkpoint", ErrNotIncluded)
	case index >= cp.Size:
		return nil, fmt.Errorf("%w: index %d in a tree of %d", ErrNotIncluded, index, cp.Size)
	}

	// 5. Inclusion (RFC 6962 section 2.1.1).
	leaf := rfc6962.DefaultHasher.HashLeaf(body)
	if err := proof.VerifyInclusion(rfc6962.DefaultHasher, index, cp.Size, leaf, p.GetHashes(), cp.Root[:]); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNotIncluded, err)
	}
	return &Included{Log: l, Index: index, Size: cp.Size, Root: cp.Root, Cosigned: cosigned}, nil
}

// VerifyCertificate verifies that one of logs holds cert, put there by its
// issuer.
func VerifyCertificate(e *rekorv1.TransparencyLogEntry, cert, issuer *x509.Certificate, logs []Log, ws []Witness) (*Included, error) {
	if err := checkForm(e); err != nil {
		return nil, err
	}
	if cert == nil || issuer == nil {
		return nil, malformed("no certificate to look for")
	}
	entry, err := ParseBody(e.GetCanonicalizedBody())
	if err != nil {
		return nil, err
	}
	if entry.Digest != sha256.Sum256(cert.Raw) {
		return nil, fmt.Errorf("%w: not for this certificate", ErrOtherEntry)
	}
	if !bytes.Equal(entry.Certificate.Raw, issuer.Raw) {
		return nil, fmt.Errorf("%w: not by this certificate's issuer", ErrOtherEntry)
	}
	if err := entry.CheckSignature(); err != nil {
		return nil, err
	}
	body, err := CertificateBody(cert, entry.Signature, issuer)
	if err != nil {
		return nil, err
	}
	return Verify(e, body, logs, ws)
}

func findLog(id []byte, logs []Log) (*Log, error) {
	if len(logs) > MaxLogs {
		return nil, fmt.Errorf("%w: %d logs, at most %d allowed", ErrKey, len(logs), MaxLogs)
	}
	for i := range logs {
		key, err := logs[i].key()
		if err != nil {
			return nil, err
		}
		if bytes.Equal(id, LogID(logs[i].Origin, key)) {
			return &logs[i], nil
		}
	}
	return nil, fmt.Errorf("%w: no log with the ID %x", ErrUnknownLog, id)
}

// checkForm bounds an entry and wants every part of it that is verified, and
// none that nothing verifies.
func checkForm(e *rekorv1.TransparencyLogEntry) error {
	p := e.GetInclusionProof()
	switch {
	case e == nil:
		return malformed("no entry")
	case e.GetKindVersion().GetKind() != Kind || e.GetKindVersion().GetVersion() != Version:
		return fmt.Errorf("%w: kind %.64q version %.64q, want %s %s", ErrMalformed,
			e.GetKindVersion().GetKind(), e.GetKindVersion().GetVersion(), Kind, Version)
	case len(e.GetLogId().GetKeyId()) != hashSize:
		return malformed("a log ID of %d bytes", len(e.GetLogId().GetKeyId()))
	case len(e.GetCanonicalizedBody()) == 0 || len(e.GetCanonicalizedBody()) > MaxBody:
		return malformed("a body of %d bytes", len(e.GetCanonicalizedBody()))
	case e.GetInclusionPromise() != nil || e.GetIntegratedTime() != 0:
		// Only Rekor v1 signs a time; in this form it is anybody's word.
		return malformed("a time or promise that this kind of log does not sign")
	case p == nil:
		return malformed("no inclusion proof")
	case p.GetCheckpoint().GetEnvelope() == "" || len(p.GetCheckpoint().GetEnvelope()) > MaxCheckpoint:
		return malformed("a checkpoint of %d bytes", len(p.GetCheckpoint().GetEnvelope()))
	case e.GetLogIndex() < 0 || p.GetLogIndex() < 0 || p.GetTreeSize() < 1:
		return malformed("index %d, %d of a tree of %d", e.GetLogIndex(), p.GetLogIndex(), p.GetTreeSize())
	case len(p.GetRootHash()) != hashSize:
		return malformed("a root hash of %d bytes", len(p.GetRootHash()))
	case len(p.GetHashes()) > MaxProof:
		return malformed("a proof of %d hashes, at most %d allowed", len(p.GetHashes()), MaxProof)
	}
	for _, h := range p.GetHashes() {
		if len(h) != hashSize {
			return malformed("a proof with a hash of %d bytes", len(h))
		}
	}
	return nil
}

// ParseEntry reads an entry in Sigstore's JSON form and bounds it. Unknown and
// duplicate fields are errors.
func ParseEntry(raw []byte) (*rekorv1.TransparencyLogEntry, error) {
	if len(raw) > MaxEntryJSON {
		return nil, malformed("%d bytes, at most %d allowed", len(raw), MaxEntryJSON)
	}
	e := new(rekorv1.TransparencyLogEntry)
	if err := protojson.Unmarshal(raw, e); err != nil {
		return nil, malformed("%w", err)
	}
	if err := checkForm(e); err != nil {
		return nil, err
	}
	return e, nil
}

// MarshalEntry writes an entry in Sigstore's JSON form, the same bytes each
// time.
func MarshalEntry(e *rekorv1.TransparencyLogEntry) ([]byte, error) {
	if err := checkForm(e); err != nil {
		return nil, err
	}
	raw, err := protojson.Marshal(e)
	if err != nil {
		return nil, malformed("%w", err)
	}
	// protojson varies its spaces on purpose.
	var out bytes.Buffer
	if err := json.Compact(&out, raw); err != nil {
		return nil, malformed("%w", err)
	}
	if out.Len() > MaxEntryJSON {
		return nil, malformed("%d bytes, at most %d allowed", out.Len(), MaxEntryJSON)
	}
	return out.Bytes(), nil
}
