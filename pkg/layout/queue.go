package layout

import (
	"maps"
	"path"
	"slices"
	"strings"

	"github.com/in-toto/in-toto-golang/in_toto"
)

// queue is in-toto's queue of artifacts that no rule has taken yet
// (specification 4.3.3). It does what in-toto-golang's does, in one look at
// every artifact for a rule and without new sets: that makes it good for two
// things. It accepts what is common, so that the slower engine need not run; and
// it says what the engine refused. A refusal is always the engine's, and a fuzz
// test compares the two.
//
// The names must be clean, which the engine makes them: see stepLink.inTree.
type queue struct {
	names     []string
	src       *stepLink
	artifacts map[string]in_toto.HashObj
	sums      map[string]*stepLink
}

func newQueue(sd side, src *stepLink, sums map[string]*stepLink) *queue {
	q := &queue{src: src, artifacts: src.side(sd.name), sums: sums}
	q.names = make([]string, 0, len(q.artifacts))
	for n := range q.artifacts {
		q.names = append(q.names, n)
	}
	return q
}

// met says that the rules are common ones and are met. false says nothing.
func met(sd side, src *stepLink, sums map[string]*stepLink) bool {
	if !src.inTree {
		return false
	}
	q := newQueue(sd, src, sums)
	for _, r := range sd.rules {
		d, err := in_toto.UnpackRule(r)
		if err != nil || common(d["pattern"]) == nil {
			return false
		}
		if d["type"] == "match" {
			if dst := sums[d["dstName"]]; dst != nil && !dst.inTree || d["dstType"] != "materials" && d["dstType"] != "products" {
				return false
			}
		}
		if refused := q.apply(d); len(refused) > 0 {
			return false
		}
	}
	return true
}

// refuses returns the first rule that refuses, and what it refuses, sorted; -1
// when none does.
func (q *queue) refuses(rules [][]string) (rule int, files []string) {
	for i, r := range rules {
		d, err := in_toto.UnpackRule(r)
		if err != nil {
			return i, nil
		}
		if files := q.apply(d); len(files) > 0 {
			slices.Sort(files)
			return i, files
		}
	}
	return -1, nil
}

// apply has a rule take what it takes, and returns what it refuses.
func (q *queue) apply(d map[string]string) (refused []string) {
	if d["type"] == "require" {
		if _, ok := q.artifacts[d["pattern"]]; !ok || !slices.Contains(q.names, d["pattern"]) {
			return []string{d["pattern"]}
		}
		return nil
	}
	if d["type"] == "match" {
		m := newPairing(d, q.names, q.sums)
		q.drop(func(n string) bool { return m.applies(n) && m.same(n, q.artifacts[n]) })
		return nil
	}
	applies := matcher(d["pattern"], q.names)
	materials, products := q.src.materials, q.src.products
	switch d["type"] {
	case "allow":
		q.drop(applies)
	case "create":
		q.drop(func(n string) bool { return applies(n) && !has(materials, n) && has(products, n) })
	case "delete":
		q.drop(func(n string) bool { return applies(n) && has(materials, n) && !has(products, n) })
	case "modify":
		q.drop(func(n string) bool {
			return applies(n) && has(materials, n) && has(products, n) && !sameHashes(materials[n], products[n])
		})
	case "disallow":
		for _, n := range q.names {
			if applies(n) {
				refused = append(refused, n)
			}
		}
	}
	return refused
}

func (q *queue) drop(taken func(string) bool) { q.names = slices.DeleteFunc(q.names, taken) }

func has(m map[string]in_toto.HashObj, n string) bool { _, ok := m[n]; return ok }

// sameHashes is reflect.DeepEqual for what the engine compares with it.
func sameHashes(a, b in_toto.HashObj) bool { return (a == nil) == (b == nil) && maps.Equal(a, b) }

// common returns what a pattern means when it is a name, or a beginning and a
// star, and nil for every other: those are in-toto's to interpret. Its star
// takes slashes too.
func common(pattern string) func(string) bool {
	if pattern == "" {
		return nil // ALLOW takes it for ".", MATCH does not
	}
	pattern = path.Clean(pattern)
	start := strings.TrimRight(pattern, "*")
	switch {
	case strings.ContainsAny(start, `*?[\`):
		return nil
	case start == pattern:
		return func(n string) bool { return n == pattern }
	}
	return func(n string) bool { return strings.HasPrefix(n, start) }
}

// matcher says which of the names a pattern means.
func matcher(pattern string, names []string) func(string) bool {
	if f := common(pattern); f != nil {
		return f
	}
	return in_toto.NewSet(names...).Filter(path.Clean(pattern)).Has
}

// pairing is what a MATCH rule does: it compares artifacts with those of another
// step that have the same name, prefixes apart.
type pairing struct {
	from, to string // prefixes
	pattern  func(string) bool
	there    map[string]in_toto.HashObj
	linked   bool // the other step has a link; else there is nothing, and nothing is the same
}

func newPairing(d map[string]string, names []string, sums map[string]*stepLink) *pairing {
	m := &pairing{from: cleanPrefix(d["srcPrefix"]), to: cleanPrefix(d["dstPrefix"])}
	if dst := sums[d["dstName"]]; dst != nil {
		m.there, m.linked = dst.side(d["dstType"]), true
	}
	if m.pattern = common(d["pattern"]); m.pattern == nil {
		short := in_toto.NewSet()
		for _, n := range names {
			short.Add(strings.TrimPrefix(n, m.from))
		}
		m.pattern = short.Filter(path.Clean(d["pattern"])).Has
	}
	return m
}

// applies: the rule is about an artifact of this name.
func (m *pairing) applies(name string) bool { return m.pattern(strings.TrimPrefix(name, m.from)) }

// inside: the artifact lies where the rule's first prefix says.
func (m *pairing) inside(name string) bool {
	return strings.HasPrefix(name, strings.TrimPrefix(m.from, "./"))
}

// other is the name of the artifact that it is compared with.
func (m *pairing) other(name string) string {
	name = strings.TrimPrefix(name, m.from)
	if m.to != "" {
		name = path.Join(m.to, name)
	}
	return path.Clean(name)
}

func (m *pairing) same(name string, have in_toto.HashObj) bool {
	there, ok := m.there[m.other(name)]
	return ok && sameHashes(have, there)
}
