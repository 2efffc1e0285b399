package attest

import "errors"

var errNotImplemented = errors.New("attest: not implemented")

// Kind says what a leaf commits to (first field of the leaf, §4.1).
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

// Hash returns the leaf hash of §4.1. It fails on unsorted or duplicate
// selectors, unknown kinds or origins, and fields over their limits.
func (l *Leaf) Hash() ([32]byte, error) { return [32]byte{}, errNotImplemented }

// Tree is a Merkle tree in the shape of RFC 6962 over leaf hashes.
type Tree struct{ levels [][][32]byte }

// NewTree builds a tree over at least 1 and at most MaxLeaves leaf hashes.
func NewTree(leaves [][32]byte) (*Tree, error) { return nil, errNotImplemented }

// Root returns the root hash.
func (t *Tree) Root() [32]byte { return [32]byte{} }

// Path returns the inclusion path of leaf i, deepest sibling first.
func (t *Tree) Path(i uint64) [][32]byte { return nil }

// RootFromPath recomputes a root. It fails on an index ≥ size, a size over
// MaxLeaves, or a path of any length but the one size and index demand.
func RootFromPath(leaf [32]byte, index, size uint64, path [][32]byte) ([32]byte, error) {
	return [32]byte{}, errNotImplemented
}

// QuoteExtraData is the extraData of a quote over committed leaves:
// SHA-256("rootlink/quote/v1\0" ‖ u64be(size) ‖ root ‖ AK name).
func QuoteExtraData(size uint64, root [32]byte, akName []byte) [32]byte { return [32]byte{} }

// NodeExtraData is the extraData of a node attestation quote (§3 step 3).
// agentKey is SHA-256 of the SPKI of the agent's CSR key, or zero when hidden.
func NodeExtraData(nonce [32]byte, akName []byte, trustDomain string, agentKey [32]byte) [32]byte {
	return [32]byte{}
}
