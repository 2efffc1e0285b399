package attest

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
	"unicode/utf8"
)

// Kind says what a leaf commits to (first field of the leaf).
type Kind uint8

const (
	KindLeaf     Kind = 1 // evidence inside the SVID
	KindDetached Kind = 2 // evidence beside a link, nonce = SHA-256(SVID DER)
)

// KeyOrigin says who made the SVID key.
type KeyOrigin uint8

const (
	OriginCaller KeyOrigin = 1
	OriginAgent  KeyOrigin = 2
)

// Domain separators, each ended by a zero byte so that none is a prefix of another.
const (
	leafLabel   = "rootlink/leaf/v1\x00"
	quoteLabel  = "rootlink/quote/v1\x00"
	attestLabel = "rootlink/attest/v1\x00"
	nonceLabel  = "rootlink/nonce/v1\x00"
)

// ErrLeaf is wrapped by every error about the form of a leaf.
var ErrLeaf = errors.New("malformed leaf")

// Leaf is what one commitment binds together. Unmeasured digests are 32 zero bytes.
type Leaf struct {
	Kind        Kind
	KeyOrigin   KeyOrigin
	TrustDomain string
	SPIFFEID    string
	SVIDKey     [32]byte // SHA-256 of the SPKI DER of the SVID key
	AgentKey    [32]byte // SHA-256 of the SPKI DER of the agent SVID
	Executable  [32]byte // SHA-256 of the process that holds the key
	Recorder    [32]byte
	Tool        [32]byte
	Payload     [32]byte // SHA-256 of the DSSE pre-authentication encoding; zero for Workload API SVIDs
	Selectors   []string // "type:value", sorted, unique
	Nonce       [32]byte
	Salt        [16]byte
}

// Hash returns the leaf hash (docs/evidence.md, "Leaf"). It fails on unsorted
// or duplicate selectors, unknown kinds or origins, and fields over their limits.
func (l *Leaf) Hash() ([32]byte, error) {
	if l.Kind != KindLeaf && l.Kind != KindDetached {
		return [32]byte{}, fmt.Errorf("%w: unknown kind %d", ErrLeaf, l.Kind)
	}
	if l.KeyOrigin != OriginCaller && l.KeyOrigin != OriginAgent {
		return [32]byte{}, fmt.Errorf("%w: unknown key origin %d", ErrLeaf, l.KeyOrigin)
	}
	if n := len(l.TrustDomain); n == 0 || n > MaxTrustDomain {
		return [32]byte{}, fmt.Errorf("%w: trust domain of %d bytes", ErrLeaf, n)
	}
	if n := len(l.SPIFFEID); n == 0 || n > MaxName {
		return [32]byte{}, fmt.Errorf("%w: SPIFFE ID of %d bytes", ErrLeaf, n)
	}
	if err := CheckSelectors(l.Selectors); err != nil {
		return [32]byte{}, err
	}
	sel := SelectorsHash(l.Selectors)

	b := make([]byte, 0, 512)
	b = append(b, 0x00)
	b = append(b, leafLabel...)
	b = append(b, byte(l.Kind), byte(l.KeyOrigin))
	b = appendLP(b, l.TrustDomain)
	b = appendLP(b, l.SPIFFEID)
	b = append(b, l.SVIDKey[:]...)
	b = append(b, l.AgentKey[:]...)
	b = append(b, l.Executable[:]...)
	b = append(b, l.Recorder[:]...)
	b = append(b, l.Tool[:]...)
	b = append(b, l.Payload[:]...)
	b = append(b, sel[:]...)
	b = append(b, l.Nonce[:]...)
	b = append(b, l.Salt[:]...)
	return sha256.Sum256(b), nil
}

// Beginnings of the selectors that say what a program's hash, in lower-case hex
// behind it, is the hash of. One never stands for another: anybody can start a
// genuine tool and ask in its name.
const (
	SelectorExecutable          = "binary:sha256:"                      // the process that holds the key
	SelectorTool                = "binary:tool:sha256:"                 // a main program of a recorded step
	SelectorRecorder            = "binary:recorder:sha256:"             // what recorded it, out of its user's reach
	SelectorUnprotectedRecorder = "binary:recorder_unprotected:sha256:" // what recorded it, or posed as that
)

// CheckSelectors fails unless s is a non-empty, sorted, unique list of
// "type:value" strings within the limits. An empty list is an error because a
// verifier could not tell it from one that was taken away.
func CheckSelectors(s []string) error {
	if len(s) == 0 || len(s) > MaxSelectors {
		return fmt.Errorf("%w: %d selectors, want 1 to %d", ErrLeaf, len(s), MaxSelectors)
	}
	for i, v := range s {
		if len(v) > MaxSelector || !utf8.ValidString(v) || strings.IndexByte(v, ':') < 1 {
			return fmt.Errorf("%w: selector %d is not a type:value of at most %d bytes", ErrLeaf, i, MaxSelector)
		}
		if i > 0 && s[i-1] >= v {
			return fmt.Errorf("%w: selectors are not sorted and unique", ErrLeaf)
		}
	}
	return nil
}

// SortSelectors returns s sorted and without duplicates, as leaves want it.
func SortSelectors(s []string) []string {
	s = slices.Clone(s)
	slices.Sort(s)
	return slices.Compact(s)
}

// SelectorsHash is SHA-256 over each selector with its length before it. The
// list must already be sorted and unique.
func SelectorsHash(s []string) [32]byte {
	var b []byte
	for _, v := range s {
		b = appendLP(b, v)
	}
	return sha256.Sum256(b)
}

// appendLP appends the length of s as u32be, then s.
func appendLP[T string | []byte](b []byte, s T) []byte {
	b = binary.BigEndian.AppendUint32(b, uint32(len(s)))
	return append(b, s...)
}

// QuoteExtraData is the extraData of a quote over committed leaves:
// SHA-256("rootlink/quote/v1\0" ‖ u64be(size) ‖ root ‖ AK name).
func QuoteExtraData(size uint64, root [32]byte, akName []byte) [32]byte {
	b := make([]byte, 0, 128)
	b = append(b, quoteLabel...)
	b = binary.BigEndian.AppendUint64(b, size)
	b = append(b, root[:]...)
	b = append(b, akName...)
	return sha256.Sum256(b)
}

// NodeExtraData is the extraData of a node attestation quote. agentKey is
// SHA-256 of the SPKI of the agent's CSR key, or zero when hidden.
func NodeExtraData(nonce [32]byte, akName []byte, trustDomain string, agentKey [32]byte) [32]byte {
	b := make([]byte, 0, 256)
	b = append(b, attestLabel...)
	b = appendLP(b, nonce[:])
	b = appendLP(b, akName)
	b = appendLP(b, trustDomain)
	b = append(b, agentKey[:]...)
	return sha256.Sum256(b)
}
