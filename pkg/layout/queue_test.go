package layout

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/in-toto/in-toto-golang/in_toto"
)

// dice makes steps and rules out of a seed: few names, so that they meet.
type dice struct{ *rand.Rand }

func (d dice) of(list ...string) string { return list[d.IntN(len(list))] }

func (d dice) artifacts() map[string]in_toto.HashObj {
	out := map[string]in_toto.HashObj{}
	for range d.IntN(8) {
		h := in_toto.HashObj{"sha256": d.of("1", "2")}
		if d.IntN(4) == 0 {
			h["sha512"] = d.of("1", "2")
		}
		out[d.of("a", "b", "src", "src/a", "src/b", "src/x/a", "srcs/a", "dist/a", "dist/src/a", "a*", "[a]", `a\b`, "é", "src/é.go", "...", "a b")] = h
	}
	return out
}

func (d dice) rule(complex bool) []string {
	patterns := []string{"*", "**", "a", "b", "src/*", "src/**", "src*", "./src/*", "src//a", "src/../a", "src/a", "é", "a ", "srcs/", ".", "./", "]", "src/]"}
	if complex {
		patterns = append(patterns, "", "?", "*a", "s*c/*", "src/?", "[a-b]", "[!a]", `\a`, `a\*`, "[", "src/[", "*/a", "*.go", "[a", `\`, "a**b")
	}
	p := d.of(patterns...)
	prefix := func() string { return d.of("src", "src/", "./src", "dist", "/", ".", "..", "src/x", "dist/src") }
	switch kind := d.of("CREATE", "modify", "DELETE", "Allow", "DISALLOW", "REQUIRE", "MATCH", "MATCH", "MATCH"); kind {
	case "MATCH":
		r := []string{kind, p}
		if d.IntN(3) == 0 {
			r = append(r, "IN", prefix())
		}
		r = append(r, "WITH", d.of("MATERIALS", "Products"))
		if d.IntN(3) == 0 {
			r = append(r, "in", prefix())
		}
		return append(r, "FROM", d.of("one", "two", "one", "none"))
	default:
		return []string{kind, p}
	}
}

// in-toto-golang's engine and the queue must say the same of any rules.
func againstTheEngine(t *testing.T, seed uint64, complex bool) (accepted, refused bool) {
	d := dice{rand.New(rand.NewPCG(seed, 7))}
	sums := map[string]*stepLink{"none": nil}
	links := map[string]in_toto.Metadata{}
	for _, n := range []string{"one", "two"} {
		sums[n] = &stepLink{step: n, materials: d.artifacts(), products: d.artifacts(), inTree: true}
		if d.IntN(2) == 0 {
			for name, h := range sums[n].materials { // most files stay as they are
				sums[n].products[name] = h
			}
		}
		links[n] = &in_toto.Metablock{Signed: sums[n].metadata()}
	}
	sd := side{name: d.of("materials", "products")}
	for range d.IntN(6) {
		sd.rules = append(sd.rules, d.rule(complex))
	}
	about := func() string {
		return fmt.Sprintf("seed %d: %s of %v, %v, two %v: %q", seed, sd.name, sums["one"].materials, sums["one"].products, sums["two"], sd.rules)
	}
	src := sums["one"]
	err := engine("one", links, sd)
	fast := met(sd, src, sums)
	if fast && err != nil {
		t.Fatalf("the queue accepts, in-toto refuses: %v\n%s", err, about())
	}
	if !complex && !fast && err == nil {
		t.Fatalf("common rules, and in-toto accepts alone\n%s", about())
	}
	k, files := newQueue(sd, src, sums).refuses(sd.rules)
	if (k < 0) != (err == nil) {
		t.Fatalf("rule %d refuses %q, in-toto says %v\n%s", k, files, err, about())
	}
	if k < 0 {
		return fast, false
	}
	if engine("one", links, side{sd.name, sd.rules[:k]}) != nil || engine("one", links, side{sd.name, sd.rules[:k+1]}) == nil {
		t.Fatalf("in-toto refuses by another rule than %d\n%s", k, about())
	}
	if strings.EqualFold(sd.rules[k][0], "disallow") {
		for _, f := range files { // in-toto lists what it refused, in no order
			if !strings.Contains(err.Error(), f) {
				t.Fatalf("in-toto did not refuse %s: %v\n%s", f, err, about())
			}
		}
		list := fmt.Sprintf("%s", slices.Sorted(slices.Values(files)))
		if n := len(list); !strings.Contains(err.Error(), sd.name+" ") || len(err.Error()) != len(fmt.Sprintf("artifact verification failed for Step 'one', %s %s disallowed by rule %s", sd.name, strings.Repeat("x", n), sd.rules[k])) {
			t.Fatalf("in-toto refused others than %s: %v\n%s", list, err, about())
		}
	}
	return false, true
}

func FuzzQueueIsInTotos(f *testing.F) {
	for i := range uint64(64) {
		f.Add(i, i%2 == 0)
	}
	f.Fuzz(func(t *testing.T, seed uint64, complex bool) { againstTheEngine(t, seed, complex) })
}

func TestQueueIsInTotos(t *testing.T) {
	yes, no := 0, 0
	for i := range uint64(20_000) {
		a, r := againstTheEngine(t, i, i%3 == 0)
		if a {
			yes++
		}
		if r {
			no++
		}
	}
	if yes < 2000 || no < 2000 {
		t.Errorf("%d accepted, %d refused: the dice are loaded", yes, no)
	}
}

func TestQueueLeavesUncheckedNamesToTheEngine(t *testing.T) {
	// in-toto cleans names before it compares them.
	l := &stepLink{step: "s", materials: hashes(map[string]string{"./a": sum("1")}), products: hashes(map[string]string{})}
	if met(side{"materials", rules("ALLOW *")}, l, nil) {
		t.Error("names that nobody checked were judged")
	}
	l.inTree = true
	other := &stepLink{products: l.materials}
	if met(side{"materials", rules("MATCH * WITH PRODUCTS FROM o")}, l, map[string]*stepLink{"o": other}) {
		t.Error("names of the other step that nobody checked were judged")
	}
}

// A link may name 65,536 files, each of them wrong: finding out what to say of
// that must not look at all of them for each of them, or for each rule.
func TestExplainsWhatIsRefusedInOneLook(t *testing.T) {
	files, others := map[string]string{}, map[string]string{}
	for i := range 1 << 16 {
		n := fmt.Sprintf("src/%05d", i)
		files[n], others[n] = "1", "2"
	}
	src := &stepLink{step: "build", materials: hashes(files), inTree: true}
	sums := map[string]*stepLink{"build": src, "fetch": {step: "fetch", products: hashes(others), inTree: true}}
	sd := side{"materials", rules("REQUIRE src/00001", "MATCH src/* WITH PRODUCTS FROM fetch", "DISALLOW *")}
	err := explain("build", sd, src, sums, nil)
	for _, w := range []string{`"build", materials, rule "DISALLOW *"`, "src/00000 is not allowed", "fetch", "and 65535 more"} {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("%v lacks %q", err, w)
		}
	}
}

// What a step was to make was lying there already: the rule that names the file
// is the one to talk about, not the last one that takes everything.
func TestExplainsWhyAChangeIsNone(t *testing.T) {
	for name, c := range map[string]struct {
		side, rule    string
		before, after string
		want          string
	}{
		"made again":    {"products", "CREATE hello", "1", "2", "it was there before"},
		"new, modified": {"products", "MODIFY hello", "", "2", "it was not there before"},
		"unchanged":     {"products", "MODIFY hello", "1", "1", "did not change it"},
		"removed":       {"materials", "MODIFY hello", "1", "", "not there afterwards"},
		"kept":          {"materials", "DELETE hello", "1", "2", "it is there still"},
	} {
		before, after := map[string]string{}, map[string]string{}
		if c.before != "" {
			before["hello"] = c.before
		}
		if c.after != "" {
			after["hello"] = c.after
		}
		src := &stepLink{step: "build", materials: hashes(before), products: hashes(after), inTree: true}
		err := explain("build", side{c.side, rules("CREATE other", c.rule, "DISALLOW *")}, src, nil, nil)
		if want := "hello is not allowed; " + c.rule + ": "; !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v lacks %q or %q", name, err, want, c.want)
		}
	}
}
