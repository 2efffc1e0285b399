package forge

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/binary"
	"fmt"
	"testing"
	"time"

	commonv1 "github.com/sigstore/protobuf-specs/gen/pb-go/common/v1"
	rekorv1 "github.com/sigstore/protobuf-specs/gen/pb-go/rekor/v1"

	"github.com/rootlink/rootlink/pkg/tlog"
)

// Log is a transparency log in memory. It signs whatever tree it is told to,
// so that it can also be a dishonest one.
type Log struct {
	Origin    string
	Key       ed25519.PrivateKey
	Bodies    [][]byte
	Witnesses []*LogWitness // who cosign its checkpoints
}

// LogWitness cosigns checkpoints at its own time.
type LogWitness struct {
	Name string
	Key  ed25519.PrivateKey
	Time time.Time
}

// NewLog makes an empty log.
func NewLog(tb testing.TB, origin string) *Log {
	tb.Helper()
	return &Log{Origin: origin, Key: ed25519Key(tb)}
}

// NewLogWitness makes a witness whose clock stands at t.
func NewLogWitness(tb testing.TB, name string, t time.Time) *LogWitness {
	tb.Helper()
	return &LogWitness{Name: name, Key: ed25519Key(tb), Time: t}
}

func ed25519Key(tb testing.TB) ed25519.PrivateKey {
	tb.Helper()
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		tb.Fatal(err)
	}
	return key
}

// Public is the key as a verifier knows it.
func (l *Log) Public() ed25519.PublicKey { return l.Key.Public().(ed25519.PublicKey) }

// Info is the log as a verifier knows it.
func (l *Log) Info() tlog.Log {
	return tlog.Log{Origin: l.Origin, Key: l.Public(), ID: tlog.LogID(l.Origin, l.Public()), URL: "https://" + l.Origin}
}

// Info is the witness as a verifier knows it.
func (w *LogWitness) Info() tlog.Witness {
	return tlog.Witness{Name: w.Name, Key: tlog.WitnessVKey(w.Name, w.Key.Public().(ed25519.PublicKey))}
}

// Cosign returns the witness's signature line under a checkpoint's text.
func (w *LogWitness) Cosign(text []byte) string {
	sig := binary.BigEndian.AppendUint64(nil, uint64(w.Time.Unix()))
	sig = append(sig, ed25519.Sign(w.Key, fmt.Appendf(nil, "cosignature/v1\ntime %d\n%s", w.Time.Unix(), text))...)
	return noteLine(w.Name, 4, w.Key, sig)
}

// noteLine writes a signature as C2SP's signed notes do.
func noteLine(name string, alg byte, key ed25519.PrivateKey, sig []byte) string {
	id := sha256.Sum256(append(append([]byte(name+"\n"), alg), key.Public().(ed25519.PublicKey)...))
	return "\u2014 " + name + " " + base64.StdEncoding.EncodeToString(append(id[:4:4], sig...)) + "\n"
}

// Append adds a body and returns its index.
func (l *Log) Append(body []byte) uint64 {
	l.Bodies = append(l.Bodies, body)
	return uint64(len(l.Bodies) - 1)
}

// AppendCertificate adds cert as its issuer would log it and returns its index.
func (l *Log) AppendCertificate(tb testing.TB, cert, issuer *x509.Certificate, key *ecdsa.PrivateKey) uint64 {
	tb.Helper()
	digest := sha256.Sum256(cert.Raw)
	sig, err := key.Sign(rand.Reader, digest[:], crypto.SHA256)
	if err != nil {
		tb.Fatal(err)
	}
	body, err := tlog.CertificateBody(cert, sig, issuer)
	if err != nil {
		tb.Fatal(err)
	}
	return l.Append(body)
}

// Fill adds n bodies that mean nothing.
func (l *Log) Fill(n int) {
	for range n {
		l.Append([]byte(rand.Text()))
	}
}

// Root is the root of the tree of the first size bodies.
func (l *Log) Root(size uint64) [32]byte { return merkleRoot(l.Bodies[:size]) }

// Text is the text of the checkpoint at size.
func (l *Log) Text(size uint64) []byte {
	return (&tlog.Checkpoint{Origin: l.Origin, Size: size, Root: l.Root(size)}).Marshal()
}

// SignText signs any text as the log, and lets the witnesses cosign it.
func (l *Log) SignText(text []byte) string {
	out := string(text) + "\n" + noteLine(l.Origin, 1, l.Key, ed25519.Sign(l.Key, text))
	for _, w := range l.Witnesses {
		out += w.Cosign(text)
	}
	return out
}

// Checkpoint is the signed checkpoint at size.
func (l *Log) Checkpoint(size uint64) string { return l.SignText(l.Text(size)) }

// Entry is the proof that the body at index is in the whole tree.
func (l *Log) Entry(index uint64) *rekorv1.TransparencyLogEntry {
	return l.EntryAt(index, uint64(len(l.Bodies)))
}

// EntryAt is the proof that the body at index is in the tree of size.
func (l *Log) EntryAt(index, size uint64) *rekorv1.TransparencyLogEntry {
	root := l.Root(size)
	return &rekorv1.TransparencyLogEntry{
		LogIndex:          int64(index),
		LogId:             &commonv1.LogId{KeyId: tlog.LogID(l.Origin, l.Public())},
		KindVersion:       &rekorv1.KindVersion{Kind: tlog.Kind, Version: tlog.Version},
		CanonicalizedBody: l.Bodies[index],
		InclusionProof: &rekorv1.InclusionProof{
			LogIndex: int64(index), RootHash: root[:], TreeSize: int64(size),
			Hashes:     merklePath(index, l.Bodies[:size]),
			Checkpoint: &rekorv1.Checkpoint{Envelope: l.Checkpoint(size)},
		},
	}
}

// Consistency is the proof that the tree of size b continues that of size a.
func (l *Log) Consistency(a, b uint64) [][]byte { return merkleSubproof(a, l.Bodies[:b], true) }

// The tree as RFC 6962 section 2.1 writes it, apart from what verifies it.

func merkleRoot(d [][]byte) [32]byte {
	switch len(d) {
	case 0:
		return sha256.Sum256(nil)
	case 1:
		return sha256.Sum256(append([]byte{0}, d[0]...))
	}
	k := split(len(d))
	left, right := merkleRoot(d[:k]), merkleRoot(d[k:])
	return sha256.Sum256(append(append([]byte{1}, left[:]...), right[:]...))
}

func merklePath(m uint64, d [][]byte) [][]byte {
	if len(d) <= 1 {
		return nil
	}
	k := split(len(d))
	if m < uint64(k) {
		r := merkleRoot(d[k:])
		return append(merklePath(m, d[:k]), r[:])
	}
	r := merkleRoot(d[:k])
	return append(merklePath(m-uint64(k), d[k:]), r[:])
}

func merkleSubproof(m uint64, d [][]byte, whole bool) [][]byte {
	if m == uint64(len(d)) {
		if whole {
			return nil
		}
		r := merkleRoot(d)
		return [][]byte{r[:]}
	}
	k := split(len(d))
	if m <= uint64(k) {
		r := merkleRoot(d[k:])
		return append(merkleSubproof(m, d[:k], whole), r[:])
	}
	r := merkleRoot(d[:k])
	return append(merkleSubproof(m-uint64(k), d[k:], false), r[:])
}

// split is the largest power of two below n.
func split(n int) int {
	k := 1
	for k*2 < n {
		k *= 2
	}
	return k
}
