package layout

import (
	"fmt"
	"maps"
	"path"
	"slices"
	"sort"
	"strings"

	"github.com/in-toto/in-toto-golang/in_toto"

	"github.com/rootlink/rootlink/pkg/link"
)

// rules has in-toto's engine apply a step's or an inspection's artifact rules,
// one side at a time, and finds out what a refusal is about.
func (v *verifier) rules(id, name string, materials, products [][]string, src *stepLink, links map[string]in_toto.Metadata, sums map[string]*stepLink, mayBeEmpty bool) {
	// Both sides in one go, which is all there is to it when nothing is amiss.
	both := src != nil && !v.dead && engine(name, links, side{"materials", materials}, side{"products", products}) == nil
	for _, sd := range []side{{"materials", materials}, {"products", products}} {
		v.check(id, "in-toto specification 4.3.3, artifact rules", name, link.ErrPolicy, func() (string, error) {
			if src == nil {
				return "", errSkip // that there is none was said
			}
			if !both {
				if err := engine(name, links, sd); err != nil {
					return "", explain(name, sd, src, links, sums, err)
				}
			}
			if err := stray(name, sd, src, links, sums); err != nil {
				return "", err
			}
			if !mayBeEmpty {
				if err := overlap(name, sd, src, sums); err != nil {
					return "", err
				}
			}
			return fmt.Sprintf("%d rules on %d %s", len(sd.rules), len(src.side(sd.name)), sd.name), nil
		})
	}
}

func (l *stepLink) side(name string) map[string]in_toto.HashObj {
	if name == "materials" {
		return l.materials
	}
	return l.products
}

func engine(name string, links map[string]in_toto.Metadata, sides ...side) error {
	s := in_toto.Step{SupplyChainItem: in_toto.SupplyChainItem{Name: name}}
	for _, sd := range sides {
		if sd.name == "materials" {
			s.ExpectedMaterials = sd.rules
		} else {
			s.ExpectedProducts = sd.rules
		}
	}
	return in_toto.VerifyArtifacts([]interface{}{s}, links)
}

// stray refuses what passes by MATCH rules alone from outside of the place that
// their IN names. in-toto-golang takes a prefix off where there is one and goes
// on where there is none; in-toto's specification and its Python go by the
// prefix. A file of the other step could so lie where the rule does not want it.
func stray(name string, sd side, src *stepLink, links map[string]in_toto.Metadata, sums map[string]*stepLink) error {
	artifacts := src.side(sd.name)
	outside := map[string][]int{} // artifact → rules that take it from outside of their prefix
	for k, r := range sd.rules {
		d, err := in_toto.UnpackRule(r)
		if err != nil {
			return err
		}
		prefix := cleanPrefix(d["srcPrefix"])
		if d["type"] != "match" || prefix == "" || prefix == "./" || sums[d["dstName"]] == nil {
			continue
		}
		for _, n := range candidates(d, artifacts) {
			if !strings.HasPrefix(n, prefix) && matchReason(d, n, artifacts, sums[d["dstName"]]) == "" {
				outside[n] = append(outside[n], k)
			}
		}
	}
	groups := map[string][]string{} // by those rules
	for n, ks := range outside {
		groups[fmt.Sprint(ks)] = append(groups[fmt.Sprint(ks)], n)
	}
	for _, g := range slices.Sorted(maps.Keys(groups)) {
		names := slices.Sorted(slices.Values(groups[g]))
		ks := outside[names[0]]
		var others [][]string
		for i, r := range sd.rules {
			// REQUIRE speaks of the whole, not of some artifacts.
			if !slices.Contains(ks, i) && !strings.EqualFold(r[0], "require") {
				others = append(others, r)
			}
		}
		if n := firstRefused(name, side{sd.name, others}, src, links, names); n != "" {
			text := strings.Join(sd.rules[ks[0]], " ")
			return &detail{rule: text, file: n, err: fmt.Errorf("%w: %q, %s, rule %q: %s is not in the directory that it names, and no other rule allows it", ErrRule, name, sd.name, text, n)}
		}
	}
	return nil
}

// refused says whether the engine refuses when these are all there is. Rules
// other than REQUIRE look at one artifact at a time.
func refused(name string, sd side, src *stepLink, links map[string]in_toto.Metadata, names []string) bool {
	some := *src
	some.materials, some.products = pick(src.materials, names), pick(src.products, names)
	with := maps.Clone(links)
	with[name] = &in_toto.Metablock{Signed: some.metadata()}
	return engine(name, with, sd) != nil
}

// firstRefused returns the first of names that the engine refuses, "" if none. It
// halves: each question costs as much as all artifacts of the other steps, and
// who made the link chose how many files to have refused.
func firstRefused(name string, sd side, src *stepLink, links map[string]in_toto.Metadata, names []string) string {
	i := sort.Search(len(names), func(i int) bool { return refused(name, sd, src, links, names[:i+1]) })
	if i == len(names) {
		return ""
	}
	return names[i]
}

// overlap refuses MATCH rules that nothing meets. in-toto lets them pass: two
// steps without one artifact in common would count as joined.
func overlap(name string, sd side, src *stepLink, sums map[string]*stepLink) error {
	for _, r := range sd.rules {
		d, err := in_toto.UnpackRule(r)
		if err != nil {
			return err
		}
		if d["type"] != "match" {
			continue
		}
		dst := sums[d["dstName"]]
		if dst == nil {
			continue // refused for having no link
		}
		if !slices.ContainsFunc(candidates(d, src.side(sd.name)), func(n string) bool {
			return strings.HasPrefix(n, strings.TrimPrefix(cleanPrefix(d["srcPrefix"]), "./")) && matchReason(d, n, src.side(sd.name), dst) == ""
		}) {
			return &detail{rule: strings.Join(r, " "), err: fmt.Errorf("%w: %q, %s, rule %q: no artifact meets it", ErrNoOverlap, name, sd.name, strings.Join(r, " "))}
		}
	}
	return nil
}

// candidates are the names that a rule's pattern applies to.
func candidates(d map[string]string, artifacts map[string]in_toto.HashObj) []string {
	var out []string
	prefix := cleanPrefix(d["srcPrefix"])
	short := in_toto.NewSet()
	for n := range artifacts {
		short.Add(strings.TrimPrefix(n, prefix))
	}
	matched := short.Filter(path.Clean(d["pattern"]))
	for n := range artifacts {
		if matched.Has(strings.TrimPrefix(n, prefix)) {
			out = append(out, n)
		}
	}
	slices.Sort(out)
	return out
}

func cleanPrefix(p string) string {
	if p == "" {
		return ""
	}
	return strings.TrimSuffix(path.Clean(p), "/") + "/"
}

// matchReason says why a MATCH rule does not take an artifact; "" if it does.
func matchReason(d map[string]string, name string, artifacts map[string]in_toto.HashObj, dst *stepLink) string {
	if dst == nil {
		return fmt.Sprintf("step %q has no link", d["dstName"])
	}
	there := path.Clean(path.Join(cleanPrefix(d["dstPrefix"]), strings.TrimPrefix(name, cleanPrefix(d["srcPrefix"]))))
	have, ok := dst.side(d["dstType"])[there]
	kind := strings.TrimSuffix(d["dstType"], "s")
	if !ok {
		return fmt.Sprintf("step %q has no %s %s", d["dstName"], kind, there)
	}
	if !maps.Equal(have, artifacts[name]) {
		return fmt.Sprintf("%s %s of step %q has %s, here it is %s", kind, there, d["dstName"], digestText(have), digestText(artifacts[name]))
	}
	return ""
}

// explain finds the rule that refused, the artifact, and why no earlier rule
// took it. The engine refuses; this only asks it again with less.
func explain(name string, sd side, src *stepLink, links map[string]in_toto.Metadata, sums map[string]*stepLink, cause error) error {
	k := 1
	for k < len(sd.rules) && engine(name, links, side{sd.name, sd.rules[:k]}) == nil {
		k++
	}
	rule := sd.rules[k-1]
	text := strings.Join(rule, " ")
	d, err := in_toto.UnpackRule(rule)
	if err != nil {
		return cause
	}
	fail := func(file, format string, args ...any) error {
		return &detail{rule: text, file: file, err: fmt.Errorf("%w: %q, %s, rule %q: %w", ErrRule, name, sd.name, text, fmt.Errorf(format, args...))}
	}
	if d["type"] == "require" {
		return fail(d["pattern"], "%s is not there", d["pattern"])
	}
	artifacts := src.side(sd.name)
	all := candidates(d, artifacts)
	// What an earlier REQUIRE wants is not among some of the artifacts.
	upTo := side{sd.name, slices.DeleteFunc(slices.Clone(sd.rules[:k]), func(r []string) bool { return strings.EqualFold(r[0], "require") })}
	file, why := firstRefused(name, upTo, src, links, all), ""
	if file == "" {
		return fail("", "%w", cause)
	}
	for _, r := range sd.rules[:k-1] {
		if m, err := in_toto.UnpackRule(r); err == nil && m["type"] == "match" && slices.Contains(candidates(m, pick(artifacts, []string{file})), file) {
			why = "; " + strings.Join(r, " ") + ": " + matchReason(m, file, artifacts, sums[m["dstName"]])
			break
		}
	}
	if i := slices.Index(all, file); i+1 < len(all) && refused(name, upTo, src, links, all[i+1:]) {
		why += "; and others"
	}
	return fail(file, "%s is not allowed%s", file, why)
}

func pick(m map[string]in_toto.HashObj, names []string) map[string]in_toto.HashObj {
	out := make(map[string]in_toto.HashObj, len(names))
	for _, n := range names {
		if d, ok := m[n]; ok {
			out[n] = d
		}
	}
	return out
}
