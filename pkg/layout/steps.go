package layout

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/in-toto/in-toto-golang/in_toto"

	"github.com/rootlink/rootlink/pkg/link"
)

// pipeline judges the steps of l in order and returns what the whole of it took
// in and put out: in-toto's summary of a sublayout, the materials of its first
// step and the products of its last. nil when a step has nothing to judge.
func (v *verifier) pipeline(l *Layout, depth int) *stepLink {
	sums := map[string]*stepLink{}
	for i := range l.Steps {
		s := &l.Steps[i]
		if s.Sublayout != "" {
			if f := v.subs[s.Sublayout]; f != nil && v.used[s.Sublayout] && depth < MaxDepth {
				sums[s.Name] = v.summary(s, f.layout, depth)
			}
			continue
		}
		if one := v.step(l, s); one != nil {
			sums[s.Name] = one
			v.order = append(v.order, &product{s.Name, one})
		}
	}
	links := make(map[string]in_toto.Metadata, len(sums))
	for name, sl := range sums {
		if sl != nil {
			links[name] = &in_toto.Metablock{Signed: sl.metadata()}
		}
	}
	for i := range l.Steps {
		s := &l.Steps[i]
		v.rules("step.rules", s.Name, s.Materials, s.Products, sums[s.Name], links, sums, s.MayMatchNothing)
	}
	first, last := sums[l.edge(0)], sums[l.edge(len(l.Steps)-1)]
	if first == nil || last == nil {
		return nil
	}
	return &stepLink{step: l.Name, signer: last.signer, materials: first.materials, products: last.products, command: last.command, name: last.name, inTree: first.inTree && last.inTree}
}

// edge is the name of step i, "" if there is none.
func (l *Layout) edge(i int) string {
	if i < 0 || i >= len(l.Steps) {
		return ""
	}
	return l.Steps[i].Name
}

// summary judges the sublayout that stands for s.
func (v *verifier) summary(s *Step, sub *Layout, depth int) *stepLink {
	out := StepResult{
		Name: s.Name, Verdict: link.VerdictRefused, Threshold: 1, Sublayout: sub.Name,
		Links: []string{}, SignedBy: []string{}, Hosts: []string{}, LeftOut: []string{},
	}
	if owner := v.owner[s.Name]; owner != nil {
		out.Layout = owner.Name
	}
	before := len(v.res.Checks)
	sum := v.pipeline(sub, depth+1)
	ok := sum != nil
	for _, c := range v.res.Checks[before:] {
		ok = ok && c.Outcome != "failed"
	}
	if ok {
		out.Verdict, out.Materials, out.Products = link.VerdictVerified, len(sum.materials), len(sum.products)
	}
	v.res.Steps = append(v.res.Steps, out)
	return sum
}

// metadata is l as in-toto's engine takes it.
func (l *stepLink) metadata() in_toto.Link {
	return in_toto.Link{Type: "link", Name: l.step, Materials: l.materials, Products: l.products, Command: l.command}
}

// step judges who vouched for a step, with what, and whether they agree. It
// returns one of the links, for all of them.
func (v *verifier) step(l *Layout, s *Step) *stepLink {
	out := StepResult{
		Layout: l.Name, Name: s.Name, Verdict: link.VerdictRefused, Threshold: s.Threshold,
		Links: []string{}, SignedBy: []string{}, Hosts: []string{}, LeftOut: orEmpty(v.leftOut[s.Name]),
	}
	links := v.links[s.Name]
	before := len(v.res.Checks)
	for _, c := range s.demandChecks() {
		v.check("step."+c.id, "layouts.md, demands", s.Name, link.ErrPolicy, func() (string, error) {
			if !c.wanted {
				return "", errSkip
			}
			for _, sl := range links {
				if sl.classic {
					continue // counted only where the step allows pinned keys, and then nothing of this is asked
				}
				if err := c.do(sl); err != nil {
					return "", &detail{link: sl.name, err: fmt.Errorf("%s: %w", sl.name, err)}
				}
			}
			return fmt.Sprintf("%d links", len(links)), nil
		})
	}
	v.check("step.threshold", "layouts.md, thresholds; in-toto specification 4.3.1", s.Name, link.ErrPolicy, func() (string, error) {
		return s.threshold(links, &out, v.owner[s.Name] == l)
	})
	v.check("step.agreement", "in-toto specification 5.2, step 7", s.Name, link.ErrPolicy, func() (string, error) { return agree(links) })
	v.check("step.command", "layouts.md, commands", s.Name, link.ErrPolicy, func() (string, error) { return s.command(links) })
	ok := !v.dead && len(links) > 0
	for _, c := range v.res.Checks[before:] {
		ok = ok && c.Outcome != "failed"
	}
	if ok {
		out.Verdict, out.Materials, out.Products = link.VerdictVerified, len(links[0].materials), len(links[0].products)
	}
	v.res.Steps = append(v.res.Steps, out)
	if v.dead || len(links) == 0 {
		return nil
	}
	return links[0]
}

// threshold counts who vouches. Certificates and keys do not count: an identity
// rotates them every few minutes.
func (s *Step) threshold(links []*stepLink, out *StepResult, owned bool) (string, error) {
	if !owned {
		return "", fmt.Errorf("%w: its links are of another layout's step %q", ErrThreshold, s.Name)
	}
	ids, eks := map[string]bool{}, map[string]bool{}
	for _, l := range links {
		out.Links = append(out.Links, l.name)
		ids[l.signer] = true
		if l.ek != "" {
			eks[l.ek] = true
		}
		out.Unproved = out.Unproved || l.classic
	}
	out.SignedBy, out.Hosts = slices.Sorted(maps.Keys(ids)), slices.Sorted(maps.Keys(eks))
	left := ""
	if n := len(out.LeftOut); n > 0 {
		left = fmt.Sprintf("; of other builds and left out: %s", strings.Join(out.LeftOut, ", "))
	}
	if len(links) == 0 {
		return "", fmt.Errorf("%w: step %q has no link%s", ErrThreshold, s.Name, left)
	}
	if len(ids) < s.Threshold {
		return "", fmt.Errorf("%w: step %q needs %d different identities, its %d links are by %s%s", ErrThreshold, s.Name, s.Threshold, len(links), strings.Join(out.SignedBy, ", "), left)
	}
	what := fmt.Sprintf("%d of %d identities", len(ids), s.Threshold)
	if s.DistinctHosts {
		n := distinctPairs(links)
		if n < s.Threshold {
			return "", fmt.Errorf("%w: step %q needs %d different identities on as many TPMs, and its links give %d (EK %s)", ErrThreshold, s.Name, s.Threshold, n, strings.Join(out.Hosts, ", "))
		}
		what += fmt.Sprintf(", each on a TPM of its own: %d", n)
	}
	if out.Unproved {
		what += "; key-pinned: no hardware evidence"
	}
	return what, nil
}

// distinctPairs is the most links that can be chosen so that no two share an
// identity or a TPM: a matching between the two. Counting each for itself would
// let two identities on one host and one of them on a second host pass for
// more than they are.
func distinctPairs(links []*stepLink) int {
	hosts := map[string][]string{} // identity → EKs
	for _, l := range links {
		if l.ek != "" {
			hosts[l.signer] = append(hosts[l.signer], l.ek)
		}
	}
	taken := map[string]string{} // EK → identity
	var place func(id string, tried map[string]bool) bool
	place = func(id string, tried map[string]bool) bool {
		for _, ek := range hosts[id] {
			if tried[ek] {
				continue
			}
			tried[ek] = true
			if other, ok := taken[ek]; !ok || place(other, tried) {
				taken[ek] = id
				return true
			}
		}
		return false
	}
	n := 0
	for _, id := range slices.Sorted(maps.Keys(hosts)) {
		if place(id, map[string]bool{}) {
			n++
		}
	}
	return n
}

// agree wants the same artifacts from every link of a step.
func agree(links []*stepLink) (string, error) {
	if len(links) < 2 {
		return "", errSkip
	}
	a := links[0]
	for _, b := range links[1:] {
		for _, x := range []struct {
			what string
			a, b map[string]in_toto.HashObj
		}{{"material", a.materials, b.materials}, {"product", a.products, b.products}} {
			if name, why := differs(x.a, x.b); name != "" {
				return "", &detail{file: name, link: b.name, err: fmt.Errorf("%w: %s %s: %s in %s, %s in %s", ErrDisagree, x.what, name, why[0], a.name, why[1], b.name)}
			}
		}
	}
	return fmt.Sprintf("%d links, the same artifacts", len(links)), nil
}

// differs returns the first name, in order, whose digests are not the same.
func differs(a, b map[string]in_toto.HashObj) (string, [2]string) {
	names := map[string]bool{}
	for n, d := range a {
		if !maps.Equal(d, b[n]) {
			names[n] = true
		}
	}
	for n := range b {
		if _, ok := a[n]; !ok {
			names[n] = true
		}
	}
	if len(names) == 0 {
		return "", [2]string{}
	}
	name := slices.Sorted(maps.Keys(names))[0]
	return name, [2]string{digestText(a[name]), digestText(b[name])}
}

func digestText(d in_toto.HashObj) string {
	if len(d) == 0 {
		return "absent"
	}
	var out []string
	for _, alg := range slices.Sorted(maps.Keys(d)) {
		out = append(out, alg+":"+d[alg])
	}
	return strings.Join(out, " ")
}

// command: what in-toto warns of fails here. A genuine tool told to do
// something else makes something else.
func (s *Step) command(links []*stepLink) (string, error) {
	if len(s.Command) == 0 {
		return "", errSkip
	}
	for _, l := range links {
		if !slices.Equal(l.command, s.Command) {
			return "", &detail{link: l.name, err: fmt.Errorf("%s: ran %q, expected was %q", l.name, strings.Join(l.command, " "), strings.Join(s.Command, " "))}
		}
	}
	return strings.Join(s.Command, " "), nil
}

// demand is one thing that a step wants of each of its links.
type demand struct {
	id     string
	wanted bool
	do     func(*stepLink) error
}

// errNoPrograms: parent evidence is about a machine alone.
var errNoPrograms = errors.New("the link's evidence names no program")

func (s *Step) demandChecks() []demand {
	in := func(what string, list []string, have ...string) error {
		for _, h := range have {
			if !slices.Contains(list, h) {
				return fmt.Errorf("%s %s is not among the %d allowed", what, cmp.Or(h, "(none)"), len(list))
			}
		}
		return nil
	}
	return []demand{
		{"authority", len(s.Authorities) > 0, func(l *stepLink) error {
			return in("SVID authority", s.Authorities, l.result.Chain.SVID.AuthorityKey)
		}},
		{"ek", len(s.EKs) > 0, func(l *stepLink) error { return in("EK", s.EKs, l.ek) }},
		{"pcr_policy", len(s.PCRPolicies) > 0, func(l *stepLink) error {
			p := l.result.Chain.Quote.Policy
			if p == nil {
				return fmt.Errorf("no PCR policy was judged: trust.json demands none of %s", l.signer)
			}
			return in("PCR policy", s.PCRPolicies, p.Name)
		}},
		// trust.json may allow less for this identity than the layout wants here.
		{"evidence", s.Evidence != "", func(l *stepLink) error {
			if !link.EvidenceAtLeast(l.result.Evidence, s.Evidence) {
				return fmt.Errorf("%s evidence, demanded is %s", cmp.Or(l.result.Evidence, "no"), s.Evidence)
			}
			return nil
		}},
		{"tier", s.Tier != "" && s.Tier != link.TierTPM, func(l *stepLink) error {
			if l.result.Tier != s.Tier {
				return fmt.Errorf("tier %s, demanded is %s", l.result.Tier, s.Tier)
			}
			return nil
		}},
		{"tools", len(s.Tools) > 0, func(l *stepLink) error {
			p := l.result.Chain.Programs
			if p == nil {
				return errNoPrograms
			}
			return in("tool", s.Tools, p.Tools...)
		}},
		{"recorder", len(s.Recorders) > 0 || s.ProtectedRecorder, func(l *stepLink) error {
			p := l.result.Chain.Programs
			if p == nil {
				return errNoPrograms
			}
			if s.ProtectedRecorder && !p.RecorderProtected {
				return fmt.Errorf("recorder %s was unprotected: any process of its user could have spoken in its name", p.Recorder)
			}
			if len(s.Recorders) == 0 {
				return nil
			}
			return in("recorder", s.Recorders, p.Recorder)
		}},
		{"executables", len(s.Executables) > 0, func(l *stepLink) error {
			if l.result.Chain.Programs == nil {
				return errNoPrograms // nor the recorder whose word it would be
			}
			return link.CheckExecutables(l.result.Statement(), s.Executables)
		}},
		{"caches", s.CachesPerJob, func(l *stepLink) error {
			if l.result.Chain.Programs == nil {
				return errNoPrograms
			}
			return link.CheckCaches(l.result.Statement())
		}},
	}
}
