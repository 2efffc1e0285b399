package layout

import (
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"

	"github.com/in-toto/in-toto-golang/in_toto"

	"github.com/rootlink/rootlink/pkg/link"
)

// rules applies a step's or an inspection's artifact rules, one side at a time,
// and finds out what a refusal is about. Whatever met does not accept is
// in-toto's engine's to judge.
func (v *verifier) rules(id, name string, materials, products [][]string, src *stepLink, links map[string]in_toto.Metadata, sums map[string]*stepLink, mayBeEmpty bool) {
	// Both sides in one go, which is all there is to it when nothing is amiss.
	ins, outs := side{"materials", materials}, side{"products", products}
	both := src != nil && !v.dead && (met(ins, src, sums) && met(outs, src, sums) || engine(name, links, ins, outs) == nil)
	for _, sd := range []side{ins, outs} {
		v.check(id, "in-toto specification 4.3.3, artifact rules", name, link.ErrPolicy, func() (string, error) {
			if src == nil {
				return "", errSkip // that there is none was said
			}
			if !both {
				if err := engine(name, links, sd); err != nil {
					return "", explain(name, sd, src, sums, err)
				}
			}
			if err := stray(name, sd, src, sums); err != nil {
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
func stray(name string, sd side, src *stepLink, sums map[string]*stepLink) error {
	if !slices.ContainsFunc(sd.rules, func(r []string) bool { return strings.EqualFold(r[0], "match") && len(r) > 6 }) {
		return nil // the shortest form has no prefix
	}
	q := newQueue(sd, src, sums)
	outside := map[string][]int{} // artifact → rules that take it from outside of their prefix
	for k, r := range sd.rules {
		d, err := in_toto.UnpackRule(r)
		if err != nil {
			return err
		}
		if d["type"] != "match" || d["srcPrefix"] == "" {
			continue
		}
		m := newPairing(d, q.names, sums)
		for _, n := range q.names {
			if !m.inside(n) && m.applies(n) && m.same(n, q.artifacts[n]) {
				outside[n] = append(outside[n], k)
			}
		}
	}
	groups := map[string][]string{} // by those rules
	for n, ks := range outside {
		groups[fmt.Sprint(ks)] = append(groups[fmt.Sprint(ks)], n)
	}
	for _, g := range slices.Sorted(maps.Keys(groups)) {
		ks := outside[groups[g][0]]
		var others [][]string
		for i, r := range sd.rules {
			// REQUIRE speaks of the whole, not of some artifacts.
			if !slices.Contains(ks, i) && !strings.EqualFold(r[0], "require") {
				others = append(others, r)
			}
		}
		q.names = groups[g]
		if k, files := q.refuses(others); k >= 0 {
			text, n := strings.Join(sd.rules[ks[0]], " "), files[0]
			return &detail{rule: text, file: n, err: fmt.Errorf("%w: %q, %s, rule %q: %s is not in the directory that it names, and no other rule allows it", ErrRule, name, sd.name, text, n)}
		}
	}
	return nil
}

// overlap refuses MATCH rules that nothing meets. in-toto lets them pass: two
// steps without one artifact in common would count as joined.
func overlap(name string, sd side, src *stepLink, sums map[string]*stepLink) error {
	artifacts, names := src.side(sd.name), []string(nil)
	for _, r := range sd.rules {
		d, err := in_toto.UnpackRule(r)
		if err != nil {
			return err
		}
		if d["type"] != "match" {
			continue
		}
		if names == nil {
			names = newQueue(sd, src, sums).names
		}
		m := newPairing(d, names, sums)
		if !m.linked {
			continue // refused for having no link
		}
		if !slices.ContainsFunc(names, func(n string) bool { return m.inside(n) && m.applies(n) && m.same(n, artifacts[n]) }) {
			return &detail{rule: strings.Join(r, " "), err: fmt.Errorf("%w: %q, %s, rule %q: no artifact meets it", ErrNoOverlap, name, sd.name, strings.Join(r, " "))}
		}
	}
	return nil
}

func cleanPrefix(p string) string {
	if p == "" {
		return ""
	}
	return strings.TrimSuffix(path.Clean(p), "/") + "/"
}

// explain says which rule refused, which artifact, and why no earlier rule took
// it. That something is refused was the engine's to say.
func explain(name string, sd side, src *stepLink, sums map[string]*stepLink, cause error) error {
	k, files := newQueue(sd, src, sums).refuses(sd.rules)
	if k < 0 || len(files) == 0 {
		return fmt.Errorf("%w: %q, %s: %w", ErrRule, name, sd.name, cause)
	}
	text := strings.Join(sd.rules[k], " ")
	fail := func(file, format string, args ...any) error {
		return &detail{rule: text, file: file, err: fmt.Errorf("%w: %q, %s, rule %q: %w", ErrRule, name, sd.name, text, fmt.Errorf(format, args...))}
	}
	file, why := files[0], ""
	if strings.EqualFold(sd.rules[k][0], "require") {
		return fail(file, "%s is not there", file)
	}
	for _, r := range sd.rules[:k] {
		d, err := in_toto.UnpackRule(r)
		if err != nil {
			continue
		}
		w := changeReason(d, file, src)
		if d["type"] == "match" {
			w = matchReason(d, file, src.side(sd.name), sums)
		}
		if w != "" {
			why = "; " + strings.Join(r, " ") + ": " + w
			break
		}
	}
	if n := len(files) - 1; n > 0 {
		why += fmt.Sprintf("; and %d more", n)
	}
	return fail(file, "%s is not allowed%s", file, why)
}

// changeReason says why a CREATE, DELETE or MODIFY rule does not take an
// artifact of a step that it is about; "" for any other.
func changeReason(d map[string]string, name string, src *stepLink) string {
	if !matcher(d["pattern"], []string{name})(name) {
		return ""
	}
	before, after := has(src.materials, name), has(src.products, name)
	switch {
	case d["type"] == "create" && before && after:
		return "it was there before, as a material of the step"
	case d["type"] == "delete" && before && after:
		return "it is there still, as a product of the step"
	case d["type"] == "modify" && !before:
		return "it was not there before, as a material of the step"
	case d["type"] == "modify" && !after:
		return "it is not there afterwards, as a product of the step"
	case d["type"] == "modify" && sameHashes(src.materials[name], src.products[name]):
		return "the step did not change it"
	}
	return ""
}

// matchReason says why a MATCH rule does not take an artifact; "" if it does, or
// is about others.
func matchReason(d map[string]string, name string, artifacts map[string]in_toto.HashObj, sums map[string]*stepLink) string {
	m := newPairing(d, []string{name}, sums)
	switch {
	case !m.applies(name) || m.same(name, artifacts[name]):
		return ""
	case !m.linked:
		return fmt.Sprintf("step %q has no link", d["dstName"])
	}
	there, kind := m.other(name), strings.TrimSuffix(d["dstType"], "s")
	have, ok := m.there[there]
	if !ok {
		return fmt.Sprintf("step %q has no %s %s", d["dstName"], kind, there)
	}
	return fmt.Sprintf("%s %s of step %q has %s, here it is %s", kind, there, d["dstName"], digestText(have), digestText(artifacts[name]))
}
