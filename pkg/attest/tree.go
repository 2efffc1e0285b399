package attest

import (
	"crypto/sha256"
	"errors"
	"fmt"
)

// ErrPath means that a Merkle path does not have the one shape that its index
// and size demand.
var ErrPath = errors.New("malformed Merkle path")

// Tree is a Merkle tree in the shape of RFC 6962 over leaf hashes: a node
// without a sibling moves up unchanged, it is never paired with itself.
type Tree struct{ levels [][][32]byte }

// NewTree builds a tree over at least 1 and at most MaxLeaves leaf hashes.
func NewTree(leaves [][32]byte) (*Tree, error) {
	if len(leaves) == 0 || len(leaves) > MaxLeaves {
		return nil, fmt.Errorf("a tree over %d leaves, want 1 to %d", len(leaves), MaxLeaves)
	}
	level := append([][32]byte(nil), leaves...)
	t := &Tree{levels: [][][32]byte{level}}
	for len(level) > 1 {
		next := make([][32]byte, 0, (len(level)+1)/2)
		for i := 0; i+1 < len(level); i += 2 {
			next = append(next, nodeHash(level[i], level[i+1]))
		}
		if len(level)%2 == 1 {
			next = append(next, level[len(level)-1])
		}
		t.levels = append(t.levels, next)
		level = next
	}
	return t, nil
}

// Size returns the number of leaves.
func (t *Tree) Size() uint64 { return uint64(len(t.levels[0])) }

// Root returns the root hash.
func (t *Tree) Root() [32]byte { return t.levels[len(t.levels)-1][0] }

// Path returns the inclusion path of leaf i, deepest sibling first; nil when
// there is no such leaf.
func (t *Tree) Path(i uint64) [][32]byte {
	if i >= t.Size() {
		return nil
	}
	var path [][32]byte
	for _, level := range t.levels[:len(t.levels)-1] {
		if s := i ^ 1; s < uint64(len(level)) {
			path = append(path, level[s])
		}
		i >>= 1
	}
	return path
}

// RootFromPath recomputes a root. It fails on an index ≥ size, a size over
// MaxLeaves, or a path of any length but the one size and index demand.
func RootFromPath(leaf [32]byte, index, size uint64, path [][32]byte) ([32]byte, error) {
	if size == 0 || size > MaxLeaves || index >= size {
		return [32]byte{}, fmt.Errorf("%w: leaf %d of %d", ErrPath, index, size)
	}
	h := leaf
	for last := size - 1; last > 0; index, last = index>>1, last>>1 {
		if index == last && index%2 == 0 {
			continue // no sibling at this level
		}
		if len(path) == 0 {
			return [32]byte{}, fmt.Errorf("%w: too short", ErrPath)
		}
		if index%2 == 1 {
			h = nodeHash(path[0], h)
		} else {
			h = nodeHash(h, path[0])
		}
		path = path[1:]
	}
	if len(path) != 0 {
		return [32]byte{}, fmt.Errorf("%w: %d hashes too many", ErrPath, len(path))
	}
	return h, nil
}

func nodeHash(l, r [32]byte) [32]byte {
	var b [65]byte
	b[0] = 0x01
	copy(b[1:], l[:])
	copy(b[33:], r[:])
	return sha256.Sum256(b[:])
}
