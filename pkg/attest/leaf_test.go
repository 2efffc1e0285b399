package attest

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"testing"
	"time"
)

func testLeaf() *Leaf {
	return &Leaf{
		Kind: KindLeaf, KeyOrigin: OriginCaller,
		TrustDomain: "example.org", SPIFFEID: "spiffe://example.org/build",
		Selectors: []string{"binary:sha256:00", "binary:uid:0"},
	}
}

func TestLeafHashCommitsToEveryField(t *testing.T) {
	base, err := testLeaf().Hash()
	if err != nil {
		t.Fatal(err)
	}
	seen := map[[32]byte]string{base: "base"}
	for name, change := range map[string]func(*Leaf){
		"kind":         func(l *Leaf) { l.Kind = KindDetached },
		"origin":       func(l *Leaf) { l.KeyOrigin = OriginAgent },
		"trust domain": func(l *Leaf) { l.TrustDomain = "example.com" },
		"SPIFFE ID":    func(l *Leaf) { l.SPIFFEID += "2" },
		"boundary":     func(l *Leaf) { l.TrustDomain, l.SPIFFEID = "example.orgs", "piffe://example.org/build" },
		"SVID key":     func(l *Leaf) { l.SVIDKey[31] = 1 },
		"agent key":    func(l *Leaf) { l.AgentKey[0] = 1 },
		"executable":   func(l *Leaf) { l.Executable[0] = 1 },
		"recorder":     func(l *Leaf) { l.Recorder[0] = 1 },
		"tool":         func(l *Leaf) { l.Tool[0] = 1 },
		"payload":      func(l *Leaf) { l.Payload[0] = 1 },
		"selectors":    func(l *Leaf) { l.Selectors = l.Selectors[:1] },
		"nonce":        func(l *Leaf) { l.Nonce[0] = 1 },
		"salt":         func(l *Leaf) { l.Salt[15] = 1 },
	} {
		l := testLeaf()
		change(l)
		h, err := l.Hash()
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if other, dup := seen[h]; dup {
			t.Errorf("a change of %s gives the same hash as %s", name, other)
		}
		seen[h] = name
	}
}

func TestRefusesMalformedLeaf(t *testing.T) {
	long := string(make([]byte, MaxName+1))
	for name, change := range map[string]func(*Leaf){
		"kind 0":               func(l *Leaf) { l.Kind = 0 },
		"kind 3":               func(l *Leaf) { l.Kind = 3 },
		"origin 0":             func(l *Leaf) { l.KeyOrigin = 0 },
		"no trust domain":      func(l *Leaf) { l.TrustDomain = "" },
		"no SPIFFE ID":         func(l *Leaf) { l.SPIFFEID = "" },
		"long SPIFFE ID":       func(l *Leaf) { l.SPIFFEID = long },
		"no selectors":         func(l *Leaf) { l.Selectors = nil },
		"unsorted selectors":   func(l *Leaf) { l.Selectors = []string{"b:1", "a:1"} },
		"repeated selectors":   func(l *Leaf) { l.Selectors = []string{"a:1", "a:1"} },
		"selector sans type":   func(l *Leaf) { l.Selectors = []string{":1"} },
		"selector sans colon":  func(l *Leaf) { l.Selectors = []string{"a"} },
		"selector not UTF-8":   func(l *Leaf) { l.Selectors = []string{"a:\xff"} },
		"too many selectors":   func(l *Leaf) { l.Selectors = make([]string, MaxSelectors+1) },
		"selector over limits": func(l *Leaf) { l.Selectors = []string{"a:" + long} },
	} {
		l := testLeaf()
		change(l)
		if _, err := l.Hash(); !errors.Is(err, ErrLeaf) {
			t.Errorf("%s: %v, want ErrLeaf", name, err)
		}
	}
}

func TestSelectorsHashKeepsBoundaries(t *testing.T) {
	if SelectorsHash([]string{"a:1", "b:2"}) == SelectorsHash([]string{"a:1b:2"}) {
		t.Error("two selectors hash like their concatenation")
	}
}

// slowRoot is RFC 6962 §2.1 as written, to judge the tree against.
func slowRoot(l [][32]byte) [32]byte {
	if len(l) == 1 {
		return l[0]
	}
	k := 1
	for k*2 < len(l) {
		k *= 2
	}
	a, b := slowRoot(l[:k]), slowRoot(l[k:])
	return sha256.Sum256(append(append([]byte{1}, a[:]...), b[:]...))
}

func numbered(n int) [][32]byte {
	l := make([][32]byte, n)
	for i := range l {
		binary.BigEndian.PutUint32(l[i][:], uint32(i+1))
	}
	return l
}

func TestTreeIsRFC6962(t *testing.T) {
	for n := 1; n <= 70; n++ {
		leaves := numbered(n)
		tree, err := NewTree(leaves)
		if err != nil {
			t.Fatal(err)
		}
		if tree.Root() != slowRoot(leaves) {
			t.Fatalf("root over %d leaves differs from RFC 6962", n)
		}
		for i := range leaves {
			root, err := RootFromPath(leaves[i], uint64(i), uint64(n), tree.Path(uint64(i)))
			if err != nil || root != tree.Root() {
				t.Fatalf("path of leaf %d of %d: %v", i, n, err)
			}
		}
	}
	tree, err := NewTree(numbered(MaxLeaves))
	if err != nil {
		t.Fatal(err)
	}
	if got := len(tree.Path(7)); got != maxPath {
		t.Errorf("longest path has %d hashes, maxPath says %d", got, maxPath)
	}
	if _, err := NewTree(numbered(MaxLeaves + 1)); err == nil {
		t.Error("a tree over too many leaves was built")
	}
	if _, err := NewTree(nil); err == nil {
		t.Error("an empty tree was built")
	}
}

func TestRefusesMerklePathWithWrongSizeOrIndex(t *testing.T) {
	for n := uint64(1); n <= 20; n++ {
		leaves := numbered(int(n))
		tree, _ := NewTree(leaves)
		for i := range n {
			path := tree.Path(i)
			for size := uint64(0); size <= 36; size++ {
				for index := uint64(0); index <= 20; index++ {
					root, err := RootFromPath(leaves[i], index, size, path)
					if err != nil || (index == i && size == n) {
						continue
					}
					// The size is under the quote's hash too, so a size that
					// has the same shape does not pass either.
					var name []byte
					if QuoteExtraData(size, root, name) == QuoteExtraData(n, tree.Root(), name) {
						t.Fatalf("leaf %d of %d passes as %d of %d", i, n, index, size)
					}
				}
			}
			for _, p := range [][][32]byte{append(path[:len(path):len(path)], leaves[0]), path[:max(0, len(path)-1)]} {
				if len(p) == len(path) {
					continue
				}
				if _, err := RootFromPath(leaves[i], i, n, p); !errors.Is(err, ErrPath) {
					t.Fatalf("leaf %d of %d: path of length %d: %v", i, n, len(p), err)
				}
			}
		}
	}
	if _, err := RootFromPath([32]byte{}, 0, MaxLeaves+1, make([][32]byte, 13)); !errors.Is(err, ErrPath) {
		t.Errorf("size over the limit: %v", err)
	}
}

func TestNonce(t *testing.T) {
	now := time.UnixMilli(1_800_000_000_123)
	m := NewNonceMaker([32]byte{1})
	n := m.Make("spiffe://example.org/spire/agent/tpmnode/aa", now)
	if got := NonceTime(n); !got.Equal(now) {
		t.Errorf("NonceTime = %v", got)
	}
	for name, c := range map[string]struct {
		maker *NonceMaker
		agent string
		now   time.Time
		want  error
	}{
		"fresh":           {m, "spiffe://example.org/spire/agent/tpmnode/aa", now.Add(59 * time.Second), nil},
		"expired":         {m, "spiffe://example.org/spire/agent/tpmnode/aa", now.Add(61 * time.Second), ErrNonceExpired},
		"from the future": {m, "spiffe://example.org/spire/agent/tpmnode/aa", now.Add(-time.Second), ErrNonceFuture},
		"other agent":     {m, "spiffe://example.org/spire/agent/tpmnode/ab", now, ErrNonceForeign},
		"other server":    {NewNonceMaker([32]byte{2}), "spiffe://example.org/spire/agent/tpmnode/aa", now, ErrNonceForeign},
	} {
		if err := c.maker.Check(n, c.agent, c.now); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
	n[7]++ // a later time under the old MAC
	if err := m.Check(n, "spiffe://example.org/spire/agent/tpmnode/aa", now); !errors.Is(err, ErrNonceForeign) {
		t.Errorf("re-dated nonce: %v", err)
	}
	var huge [32]byte
	huge[0] = 0xff
	if !NonceTime(huge).IsZero() {
		t.Error("a time beyond this era was accepted")
	}
}
