package layout

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/rootlink/rootlink/pkg/attest"
	"github.com/rootlink/rootlink/pkg/link"
)

// Text is the result for people: the pipeline as a tree, the machines that its
// links lead to, and whose word is taken.
func (r *Result) Text() string {
	var b strings.Builder
	line := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	machines := r.machines()
	line("%s", r.headline())
	if f := r.Failure; f != nil {
		line("  %s (%s, check %s)", link.Clean(f.Message), f.Class, f.Check)
	}
	r.listFailed(&b)
	if len(r.Layouts) > 0 {
		line("")
		b.WriteString(r.tree(machines).String())
	}
	for _, m := range machines {
		t := link.NewTree(m.name)
		if r.Links[m.first].Hardware(t) {
			line("")
			b.WriteString(t.String())
		}
	}
	if r.Verdict == link.VerdictVerified {
		r.prose(&b)
	}
	line("")
	if !r.AsIf.IsZero() {
		line("AS IF IT WERE %s, as was asked: this says nothing of the present.", stamp(r.AsIf))
	}
	line("Each link judged at its own time, with trust.json of %s, serial %d.", link.Clean(r.Trust.TrustDomain), r.Trust.Serial)
	if s := r.Trust.SignedByText(); s != "" {
		line("%s", s)
	}
	if len(r.Artifacts) == 0 && r.Verdict == link.VerdictVerified {
		line("No artifact was given: nothing was compared with the pipeline's products.")
	}
	return b.String()
}

func (r *Result) headline() string {
	if r.Verdict != link.VerdictVerified {
		return "✗ REFUSED"
	}
	head := "✓ VERIFIED"
	if len(r.Layouts) > 0 {
		head += "  layout " + link.Clean(r.Layouts[0].Name)
	}
	tiers, software := map[string]bool{}, false
	for i := range r.Links {
		l := &r.Links[i]
		if l.Tier != "" {
			tiers[l.TierText()] = true
		}
		software = software || l.SoftwareTPM
	}
	if len(tiers) > 0 {
		head += "  tier: " + strings.Join(slices.Sorted(maps.Keys(tiers)), ", ")
	}
	if software {
		head += "  SOFTWARE TPM"
	}
	if slices.ContainsFunc(r.Links, func(l link.LinkResult) bool { return l.Evidence == link.EvidenceParent }) {
		head += "  PARENT EVIDENCE ONLY"
	}
	for _, s := range r.Steps {
		if s.Unproved {
			return head + "  KEY-PINNED STEPS"
		}
	}
	return head
}

// listFailed lists what failed beside the failure that decided.
func (r *Result) listFailed(b *strings.Builder) {
	for _, c := range r.Checks {
		if c.Outcome == attest.Failed && (r.Failure == nil || c.ID != r.Failure.Check || c.Step != r.Failure.Step) {
			fmt.Fprintf(b, "  ✗ %s: %s\n", strings.TrimSpace(c.ID+" "+c.Step), link.Clean(c.Detail))
		}
	}
}

// machine is a TPM in one boot state, and the links that lead to it.
type machine struct {
	name  string
	first int // index of a link
	links map[string]bool
}

// machines numbers the TPMs in the order in which links lead to them. One that
// was reset in between, or met another policy, is drawn again.
func (r *Result) machines() (out []machine) {
	seen := map[string]int{}
	for i := range r.Links {
		c := r.Links[i].Chain
		if c.Quote == nil || c.AK == nil || c.EK == nil {
			continue
		}
		// Under another kind of evidence the same quote says less.
		key := fmt.Sprint(r.Links[i].Evidence, c.AK.Name, c.EK.SHA256, c.Quote.ResetCount, c.Quote.RestartCount, c.Quote.PCRs)
		if p := c.Quote.Policy; p != nil {
			key += fmt.Sprint(*p)
		}
		n, ok := seen[key]
		if !ok {
			n = len(out)
			seen[key] = n
			out = append(out, machine{name: fmt.Sprintf("TPM %d", n+1), first: i, links: map[string]bool{}})
		}
		out[n].links[r.Links[i].Name] = true
	}
	return out
}

// tree is the pipeline: layout, steps, and each step's links.
func (r *Result) tree(machines []machine) *link.Tree {
	var top *link.Tree
	for i, l := range r.Layouts {
		text := fmt.Sprintf("layout %s, serial %d, until %s", link.Clean(l.Name), l.Serial, stamp(l.Expires))
		signed := "signed by " + link.Clean(strings.Join(l.Signers, ", "))
		if i == 0 {
			top = link.NewTree(text, signed)
		} else {
			top.Add("sub"+text, signed)
		}
	}
	for _, s := range r.Steps {
		mark := "✓"
		if s.Verdict != link.VerdictVerified {
			mark = "✗"
		}
		what := strings.Join(s.SignedBy, ", ")
		if s.Threshold > 1 {
			what = fmt.Sprintf("%d of %d: %s", len(s.SignedBy), s.Threshold, what)
		}
		if s.Sublayout != "" {
			what = "by layout " + s.Sublayout
		}
		step := top.Add(mark+" "+link.Clean(s.Name)+"  "+link.Clean(what), count(s.Materials, "material")+", "+count(s.Products, "product"))
		if s.Unproved {
			step.Add("KEY-PINNED: no hardware evidence stands behind it")
		}
		if len(s.LeftOut) > 0 {
			step.Add("of other builds and left out: " + link.Clean(strings.Join(s.LeftOut, ", ")))
		}
		for i := range r.Links {
			if l := &r.Links[i]; slices.Contains(s.Links, l.Name) {
				linkTree(step, l, machines)
			}
		}
		for _, a := range r.Artifacts {
			if a.Step == s.Name {
				step.Add("made " + link.Clean(a.Name) + "  " + link.Clean(a.Subject))
			}
		}
	}
	return top
}

// linkTree is one link of a step, without its machine.
func linkTree(step *link.Tree, l *link.LinkResult, machines []machine) {
	c := l.Chain
	if c.EK == nil || c.Programs == nil && c.Parent == nil || c.SVID == nil {
		step.Add(link.Clean(l.Name) + ": NOT PROVED")
		return
	}
	on := ""
	for _, m := range machines {
		if m.links[l.Name] {
			on = "  on " + m.name
		}
	}
	when := "signed at a time that nobody attests"
	if l.Time.Attested {
		when = "signed " + stamp(l.Time.At) + ", " + l.Time.Summary()
	}
	for _, e := range l.Time.Logs {
		if e.Counted && e.Of == link.LoggedSignature {
			when += fmt.Sprintf(", entry %d of log %s", e.Index, link.Clean(e.Log))
		}
	}
	who := "no tool or recorder was measured"
	if p := c.Programs; p != nil {
		who = "tool " + short(p.Tool) + ", recorder " + short(p.Recorder)
		if p.RecorderProtected {
			who += " protected"
		} else {
			who += " UNPROTECTED"
		}
	}
	if l.Evidence != link.EvidenceLeaf {
		who += "  " + strings.ToUpper(l.Evidence) + ": " + link.EvidenceMeans(l.Evidence)
	}
	notes := []string{when, who}
	if s := c.Statement; s != nil && len(s.Command) > 0 {
		notes = append([]string{"command " + abbreviate(link.Clean(strings.Join(s.Command, " ")))}, notes...)
	}
	step.Add(link.Clean(l.Name)+"  "+link.Clean(c.SVID.SPIFFEID)+on, notes...)
}

// prose says what holds of all links, each thing once.
func (r *Result) prose(b *strings.Builder) {
	proved, software := map[string]int{}, ""
	var words []string
	for i := range r.Links {
		l := &r.Links[i]
		if len(l.ProvedByTPM) > 0 {
			proved[l.Evidence]++
		}
		if l.SoftwareTPM {
			software = " (a SOFTWARE TPM: as good as its host)"
		}
		for _, w := range l.TakenOnWordOf {
			what, _, timed := strings.Cut(w.What, "the signing time ")
			if timed && what == "" {
				w.What = "the signing times"
			}
			text := w.What + ": " + w.Who
			if w.SameOperator && !strings.HasPrefix(w.Who, "SVID authority") {
				text += " (one operator runs it and the SVID authority)"
			}
			if !slices.Contains(words, text) {
				words = append(words, text)
			}
		}
	}
	for _, kind := range link.EvidenceKinds() {
		if proved[kind] == 0 {
			continue
		}
		by := ""
		if kind != link.EvidenceLeaf {
			by = " by " + kind + " evidence"
		}
		fmt.Fprintf(b, "\nProved by the TPM%s, for %s of %d%s\n", software, count(proved[kind], "link"), len(r.Links), by)
		switch kind {
		case link.EvidenceParent:
			fmt.Fprintln(b, "  · the TPM shown answered a nonce of the server, with the PCR values judged; it committed to no statement, key or program")
			continue
		case link.EvidenceDetached:
			fmt.Fprintln(b, "  · whoever could use the AK shown committed to exactly that statement and SVID key, after the SVID began")
		default:
			fmt.Fprintln(b, "  · whoever could use the AK shown committed to exactly that statement and SVID key, after the nonce")
		}
		fmt.Fprintln(b, "  · the commitment names the tool, the recorder and the identity shown; the PCRs had the values judged")
	}
	if len(words) > 0 {
		fmt.Fprintln(b, "\nTaken on somebody's word")
		for _, w := range words {
			fmt.Fprintf(b, "  · %s\n", link.Clean(w))
		}
	}
}

// abbreviate keeps a line one that a person reads; the rest is in the JSON.
func abbreviate(s string) string {
	const most = 120 // characters
	if r := []rune(s); len(r) > most {
		return string(r[:most]) + "…"
	}
	return s
}

// VerboseText also lists every check.
func (r *Result) VerboseText() string {
	var b strings.Builder
	b.WriteString(r.Text())
	put := func(at string, c attest.Check) {
		fmt.Fprintf(&b, "  %-8s %s%s: %s [%s]\n", c.Outcome, at, c.ID, link.Clean(c.Detail), c.Clause)
	}
	b.WriteString("checks\n")
	for _, c := range r.Checks {
		at := ""
		if c.Step != "" {
			at = c.Step + " "
		}
		put(at, c.Check)
	}
	for _, l := range r.Links {
		fmt.Fprintf(&b, "checks of %s\n", link.Clean(l.Name))
		for _, c := range l.Checks {
			put("", c)
		}
	}
	return b.String()
}
