package tlog

import (
	"bytes"
	"crypto"
	"crypto/ed25519"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/binary"
	"fmt"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	fnote "github.com/transparency-dev/formats/note"
	"golang.org/x/mod/sumdb/note"
)

// Log is a log that a verifier knows.
type Log struct {
	Origin   string           // its name, the first line of its checkpoints
	Key      crypto.PublicKey // Ed25519
	ID       []byte           // LogID(Origin, Key), or empty for just that
	URL      string           // where it is read, informative
	Operator string           // who runs it, informative
	Start    time.Time        // of its validity; zero: for ever
	End      time.Time        // zero: for ever
}

// Witness is somebody who cosigns checkpoints: "this tree continues every one
// of this log that I saw before, and it was there at this time".
type Witness struct {
	Name     string
	Key      string // C2SP verifier key, Ed25519
	Operator string
	Start    time.Time // of its validity; zero: for ever
	End      time.Time // zero: for ever
}

const (
	algEd25519     = 1
	algCosignature = 4
)

// LogID is the identity of a log as Sigstore's bundles carry it: the C2SP key
// ID, not cut to four bytes.
func LogID(origin string, key ed25519.PublicKey) []byte {
	h := sha256.New()
	h.Write([]byte(origin + "\n"))
	h.Write([]byte{algEd25519})
	h.Write(key)
	return h.Sum(nil)
}

// VKey is a log's key as C2SP writes it.
func VKey(origin string, key ed25519.PublicKey) string {
	return vkey(origin, algEd25519, key)
}

// WitnessVKey is a witness's key as C2SP writes it.
func WitnessVKey(name string, key ed25519.PublicKey) string {
	return vkey(name, algCosignature, key)
}

func vkey(name string, alg byte, key ed25519.PublicKey) string {
	sum := sha256.Sum256(append([]byte(name+"\n"), append([]byte{alg}, key...)...))
	return fmt.Sprintf("%s+%08x+%s", name, binary.BigEndian.Uint32(sum[:4]), base64.StdEncoding.EncodeToString(append([]byte{alg}, key...)))
}

// CheckOrigin says whether a log may have this name.
func CheckOrigin(s string) error {
	if s == "" || len(s) > MaxOrigin || !utf8.ValidString(s) || strings.ContainsFunc(s, unicode.IsSpace) || strings.Contains(s, "+") {
		return fmt.Errorf("%w: %q cannot be a log's name", ErrKey, s)
	}
	return nil
}

// ValidAt says whether t is inside the log's window. Nothing in an entry is the
// log's word about time, so it is the caller who has a time to judge at.
func (l *Log) ValidAt(t time.Time) error {
	if !inWindow(t, l.Start, l.End) {
		return fmt.Errorf("%w: log %s at %s", ErrWindow, l.Origin, t.UTC().Format(time.RFC3339))
	}
	return nil
}

func inWindow(t, start, end time.Time) bool {
	return (start.IsZero() || !t.Before(start)) && (end.IsZero() || !t.After(end))
}

func (l *Log) key() (ed25519.PublicKey, error) {
	if err := CheckOrigin(l.Origin); err != nil {
		return nil, err
	}
	key, ok := l.Key.(ed25519.PublicKey)
	if !ok || len(key) != ed25519.PublicKeySize {
		return nil, fmt.Errorf("%w: log %s: not an Ed25519 key", ErrKey, l.Origin)
	}
	if len(l.ID) > 0 && !bytes.Equal(l.ID, LogID(l.Origin, key)) {
		return nil, fmt.Errorf("%w: log %s: its ID does not belong to its origin and key", ErrKey, l.Origin)
	}
	return key, nil
}

// witness is a Witness with its key read.
type witness struct {
	verifier note.Verifier
	key      ed25519.PublicKey
	entries  []*Witness // of this name and key: windows may be several
}

// Check says whether a verifier can use w.
func (w *Witness) Check() error {
	_, _, err := w.open()
	return err
}

// ID is the SHA-256 of the witness's public key, whatever names it goes by: what
// counts as one witness. Keys of other kinds of authorities are named likewise.
func (w *Witness) ID() [32]byte {
	_, key, err := w.open()
	if err != nil {
		return sha256.Sum256([]byte(w.Key)) // no key, which vouches for nothing
	}
	der, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		return sha256.Sum256([]byte(w.Key))
	}
	return sha256.Sum256(der)
}

func (w *Witness) open() (note.Verifier, ed25519.PublicKey, error) {
	if len(w.Key) > MaxVKey {
		return nil, nil, fmt.Errorf("%w: witness %.64q: a key of %d bytes", ErrKey, w.Name, len(w.Key))
	}
	// The name cannot hold a plus, the base64 can.
	parts := strings.SplitN(w.Key, "+", 3)
	if len(parts) != 3 {
		return nil, nil, fmt.Errorf("%w: witness %q: not a verifier key", ErrKey, w.Name)
	}
	raw, err := base64.StdEncoding.Strict().DecodeString(parts[2])
	if err != nil || len(raw) != 1+ed25519.PublicKeySize || (raw[0] != algCosignature && raw[0] != algEd25519) {
		return nil, nil, fmt.Errorf("%w: witness %q: not an Ed25519 verifier key", ErrKey, w.Name)
	}
	key := ed25519.PublicKey(raw[1:])
	if w.Key != vkey(parts[0], raw[0], key) {
		return nil, nil, fmt.Errorf("%w: witness %q: the key's hash is not that of its name and key", ErrKey, w.Name)
	}
	v, err := fnote.NewVerifierForCosignatureV1(w.Key)
	if err != nil {
		return nil, nil, fmt.Errorf("%w: witness %q: %w", ErrKey, w.Name, err)
	}
	return v, key, nil
}

// openWitnesses reads the keys. The log's own key is no witness of the log.
func openWitnesses(ws []Witness, logKey ed25519.PublicKey) ([]*witness, error) {
	if len(ws) > MaxWitnesses {
		return nil, fmt.Errorf("%w: %d witnesses, at most %d allowed", ErrKey, len(ws), MaxWitnesses)
	}
	var out []*witness
	for i := range ws {
		v, key, err := ws[i].open()
		if err != nil {
			return nil, err
		}
		if key.Equal(logKey) {
			continue
		}
		known := false
		for _, o := range out {
			if o.verifier.Name() == v.Name() && o.key.Equal(key) {
				o.entries, known = append(o.entries, &ws[i]), true
			}
		}
		if !known {
			out = append(out, &witness{v, key, []*Witness{&ws[i]}})
		}
	}
	return out, nil
}
