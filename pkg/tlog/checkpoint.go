package tlog

import (
	"bytes"
	"crypto/ed25519"
	"encoding/base64"
	"fmt"
	"strconv"
	"strings"
	"time"

	fnote "github.com/transparency-dev/formats/note"
	"github.com/transparency-dev/merkle/proof"
	"github.com/transparency-dev/merkle/rfc6962"
	"golang.org/x/mod/sumdb/note"
)

// Checkpoint names one state of a log's tree.
type Checkpoint struct {
	Origin string
	Size   uint64
	Root   [32]byte
}

// Cosignature is a witness's word that it saw a checkpoint.
type Cosignature struct {
	Witness *Witness
	Time    time.Time
}

// OpenCheckpoint verifies a signed checkpoint of l. The cosignatures it returns
// are by distinct keys, each inside its witness's window; signatures by others
// count for nothing, a bad one by a known witness is an error.
func OpenCheckpoint(signed []byte, l *Log, ws []Witness) (*Checkpoint, []Cosignature, error) {
	key, err := l.key()
	if err != nil {
		return nil, nil, err
	}
	witnesses, err := openWitnesses(ws, key)
	if err != nil {
		return nil, nil, err
	}
	return openCheckpoint(signed, l.Origin, key, witnesses)
}

func openCheckpoint(signed []byte, origin string, key ed25519.PublicKey, ws []*witness) (*Checkpoint, []Cosignature, error) {
	if len(signed) > MaxCheckpoint {
		return nil, nil, malformed("a checkpoint of %d bytes, at most %d allowed", len(signed), MaxCheckpoint)
	}
	logVerifier, err := note.NewVerifier(VKey(origin, key))
	if err != nil {
		return nil, nil, fmt.Errorf("%w: %w", ErrKey, err)
	}
	known := []note.Verifier{logVerifier}
	for _, w := range ws {
		known = append(known, w.verifier)
	}
	n, err := note.Open(signed, note.VerifierList(known...))
	if err != nil {
		return nil, nil, fmt.Errorf("%w: %w", ErrCheckpoint, err)
	}
	// With witnesses among the keys, an open note may lack the log's signature.
	byLog := false
	for _, s := range n.Sigs {
		byLog = byLog || s.Name == logVerifier.Name() && s.Hash == logVerifier.KeyHash()
	}
	if !byLog {
		return nil, nil, fmt.Errorf("%w: not signed by %s", ErrCheckpoint, origin)
	}
	cp, err := parseCheckpoint(n.Text)
	if err != nil {
		return nil, nil, err
	}
	if cp.Origin != origin {
		return nil, nil, fmt.Errorf("%w: it is of %q, not of %q", ErrCheckpoint, cp.Origin, origin)
	}
	return cp, countCosignatures(n.Sigs, ws), nil
}

// countCosignatures counts keys: a witness known under two names, or one that
// signed twice, is one witness.
func countCosignatures(sigs []note.Signature, ws []*witness) []Cosignature {
	var out []Cosignature
	var seen []ed25519.PublicKey
	for _, s := range sigs {
	next:
		for _, w := range ws {
			if s.Name != w.verifier.Name() || s.Hash != w.verifier.KeyHash() {
				continue
			}
			for _, k := range seen {
				if k.Equal(w.key) {
					continue next
				}
			}
			t, err := fnote.CoSigV1Timestamp(s)
			if err != nil || t.Unix() <= 0 || t.Year() > 9999 {
				continue // no time that could be in a window
			}
			for _, e := range w.entries {
				if inWindow(t, e.Start, e.End) {
					out, seen = append(out, Cosignature{e, t.UTC()}), append(seen, w.key)
					break
				}
			}
		}
	}
	return out
}

// parseCheckpoint reads the text of a checkpoint (C2SP tlog-checkpoint).
// Extension lines are signed and mean nothing here.
func parseCheckpoint(text string) (*Checkpoint, error) {
	lines := strings.SplitN(text, "\n", 4)
	if len(lines) < 4 {
		return nil, fmt.Errorf("%w: too few lines", ErrCheckpoint)
	}
	size, err := strconv.ParseUint(lines[1], 10, 63)
	if err != nil || strconv.FormatUint(size, 10) != lines[1] {
		return nil, fmt.Errorf("%w: not a size: %.32q", ErrCheckpoint, lines[1])
	}
	root, err := base64.StdEncoding.Strict().DecodeString(lines[2])
	if err != nil || len(root) != hashSize {
		return nil, fmt.Errorf("%w: not a hash: %.64q", ErrCheckpoint, lines[2])
	}
	return &Checkpoint{lines[0], size, [32]byte(root)}, nil
}

// Marshal returns the text that a log signs.
func (c *Checkpoint) Marshal() []byte {
	return fmt.Appendf(nil, "%s\n%d\n%s\n", c.Origin, c.Size, base64.StdEncoding.EncodeToString(c.Root[:]))
}

// CheckConsistent says whether of two checkpoints of one log the larger
// continues the smaller. Of one size, they must be the same tree. Of different
// sizes, only a consistency proof decides; an error that wraps ErrUndecided
// says that there is none, and it is not an alarm. A proof that fails is one
// only if it came from the log itself.
func CheckConsistent(a, b Checkpoint, consistency [][]byte) error {
	if a.Origin != b.Origin {
		return fmt.Errorf("%w: checkpoints of %q and %q", ErrOtherEntry, a.Origin, b.Origin)
	}
	if a.Size > b.Size {
		a, b = b, a
	}
	empty := [32]byte(rfc6962.DefaultHasher.EmptyRoot())
	switch {
	case len(consistency) > MaxProof:
		return malformed("a consistency proof of %d hashes", len(consistency))
	case a.Size == 0 && a.Root != empty:
		return fmt.Errorf("%w: an empty tree of %s with a root", ErrFork, a.Origin)
	case a.Size == b.Size && a.Root != b.Root:
		return fmt.Errorf("%w: two trees of %s at size %d", ErrFork, a.Origin, a.Size)
	case a.Size == b.Size, a.Size == 0:
		return nil
	case len(consistency) == 0:
		return fmt.Errorf("%w between %s at sizes %d and %d", ErrUndecided, a.Origin, a.Size, b.Size)
	}
	if err := proof.VerifyConsistency(rfc6962.DefaultHasher, a.Size, b.Size, consistency, a.Root[:], b.Root[:]); err != nil {
		return fmt.Errorf("%w: %s from size %d to %d: %w", ErrFork, a.Origin, a.Size, b.Size, err)
	}
	return nil
}

// UnverifiedOrigin returns the origin that a signed checkpoint claims, to say
// whose it would be; nothing has been verified.
func UnverifiedOrigin(signed []byte) string {
	line, _, _ := bytes.Cut(signed[:min(len(signed), MaxOrigin+1)], []byte("\n"))
	if CheckOrigin(string(line)) != nil {
		return ""
	}
	return string(line)
}
