// Package report draws a verification result as one self-contained page: the
// chain, what the TPM proved, what the recorder said, whose word is taken, and
// which checks did not run.
package report

import (
	_ "embed"
	"fmt"
	"html/template"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/rootlink/rootlink/pkg/attest"
	"github.com/rootlink/rootlink/pkg/link"
)

// page.html has no script, font, image or address of another machine: the page
// must look the same in ten years, and what it shows comes from strangers. Its
// policy forbids the browser to load or run anything.
//
//go:embed page.html
var page string

var tmpl = template.Must(template.New("page").Parse(page))

// Page is what the page shows, in its order. All strings are cleaned: what a
// signed file says can neither hide nor reorder what stands beside it.
type Page struct {
	Verified  bool
	Headline  string // who signed
	Tier      string
	Software  bool // a software TPM is in the chain
	Failure   string
	FailureBy string // class and check

	Steps     []Step // the pipeline's steps, in order; nil without a layout
	Artifacts []Artifact
	Machines  []Machine

	Proved []Line // by the TPM
	Said   []Line // by the recorder alone
	Words  []Line // whose word is taken
	Failed []Line
	NotRun []Line
	Passed int
	Checks []Check

	Judged  string // at which time, by which trust.json
	Made    string // when and by what the page was made
	Caveats []string
}

// Step is one step of a layout.
type Step struct {
	Name, Detail string
	OK           bool
}

// Artifact is one file that was compared with the links' products.
type Artifact struct {
	Name, Digest, Match string
	OK                  bool
}

// Machine is one TPM and the links that lead to it, in the result's order.
type Machine struct {
	Chains []Chain
	Box    []Box // AK, EK, maker
}

// Chain is the way from one link to the TPM: link, SVID, time, programs, quote.
type Chain struct {
	Name string
	OK   bool
	Box  []Box

	machine string // the key of its AK, "" when not established
}

// Box is one station on the way. Kind says on whose authority it stands:
// "proved", "said", "word" or "missing".
type Box struct {
	Title, Kind string
	Lines       []string
}

// Line is one sentence, and the links that it was found for.
type Line struct {
	Text, Links string
}

// Check is one line of the whole list.
type Check struct {
	Link, ID, Clause, Outcome, Detail string
}

// Options are what the result itself does not hold.
type Options struct {
	Steps []Step    // of the layout that was verified
	Now   time.Time // when the page is made
	By    string    // program and version
}

// Write writes the page about r.
func Write(w io.Writer, r *link.Result, o Options) error {
	return tmpl.Execute(w, build(r, o))
}

func build(r *link.Result, o Options) *Page {
	p := &Page{
		Verified: r.Verdict == link.VerdictVerified,
		Made:     fmt.Sprintf("%s, %s", link.Clean(o.By), at(o.Now)),
	}
	for _, s := range o.Steps {
		p.Steps = append(p.Steps, Step{Name: link.Clean(s.Name), Detail: link.Clean(s.Detail), OK: s.OK})
	}
	if f := r.Failure; f != nil {
		p.Failure = link.Clean(f.Message)
		p.FailureBy = fmt.Sprintf("%s failure, check %s", f.Class, f.Check)
		if f.Link != "" {
			p.FailureBy += ", link " + link.Clean(f.Link)
		}
	}
	var signers, tiers []string
	for i := range r.Links {
		l := &r.Links[i]
		p.draw(l)
		if l.Verdict == link.VerdictVerified && l.Chain.SVID != nil {
			signers = add(signers, link.Clean(l.Chain.SVID.SPIFFEID))
		}
		tiers = add(tiers, l.TierText())
		p.Software = p.Software || l.SoftwareTPM
	}
	p.Headline, p.Tier = strings.Join(signers, ", "), strings.Join(tiers, ", ")
	if len(signers) > 3 {
		p.Headline = fmt.Sprintf("%d identities", len(signers)) // each is drawn below
	}
	for _, a := range r.Artifacts {
		p.Artifacts = append(p.Artifacts, artifact(a))
	}
	p.collect(r)
	p.Judged = fmt.Sprintf("Judged at %s (%s), with trust.json of %s, serial %d, which expires at %s.",
		at(r.Time.At), link.Clean(r.Time.Source), link.Clean(r.Trust.TrustDomain), r.Trust.Serial, at(r.Trust.Expires))
	if !r.AsIf.IsZero() {
		p.Caveats = append(p.Caveats, "AS IF IT WERE "+at(r.AsIf)+", as was asked: this says nothing of the present.")
	}
	if p.Software {
		p.Caveats = append(p.Caveats, "A SOFTWARE TPM is in the chain: it is as good as its host and proves no hardware.")
	}
	if len(r.Artifacts) == 0 {
		p.Caveats = append(p.Caveats, "No artifact was given: nothing was compared with the links' products.")
	}
	return p
}

// collect gathers sentences and checks of all links; what was found for several
// is said once.
func (p *Page) collect(r *link.Result) {
	several := len(r.Links) > 1
	name := func(l *link.LinkResult) string {
		if several {
			return short(l.Name)
		}
		return ""
	}
	defer func() { // a sentence that holds for all links needs no list of them
		for _, lines := range [][]Line{p.Proved, p.Said, p.Words, p.NotRun} {
			for i := range lines {
				if several && strings.Count(lines[i].Links, ", ") == len(r.Links)-1 {
					lines[i].Links = "all links"
				}
			}
		}
	}()
	for i := range r.Links {
		l := &r.Links[i]
		for _, s := range l.ProvedByTPM {
			p.Proved = merge(p.Proved, s, name(l))
		}
		for _, s := range l.SaidBy {
			p.Said = merge(p.Said, s.What+": "+s.Value, name(l))
		}
		for _, s := range l.TakenOnWordOf {
			text := s.What + ": " + s.Who
			if s.SameOperator {
				text += " (same operator as the SVID authority)"
			}
			p.Words = merge(p.Words, text, name(l))
		}
	}
	see := func(where string, c attest.Check) {
		p.Checks = append(p.Checks, Check{Link: link.Clean(where), ID: c.ID, Clause: c.Clause, Outcome: string(c.Outcome), Detail: link.Clean(c.Detail)})
		switch c.Outcome {
		case attest.Passed:
			p.Passed++
		case attest.Failed:
			p.Failed = merge(p.Failed, c.ID+": "+c.Detail, where)
		default:
			p.NotRun = merge(p.NotRun, c.ID, where)
		}
	}
	for _, c := range r.Checks {
		see("", c)
	}
	for i := range r.Links {
		l := &r.Links[i]
		for _, c := range l.Checks {
			see(name(l), c)
		}
	}
}

func merge(lines []Line, text, where string) []Line {
	text, where = link.Clean(text), link.Clean(where)
	i := slices.IndexFunc(lines, func(l Line) bool { return l.Text == text })
	switch {
	case i < 0:
		return append(lines, Line{Text: text, Links: where})
	case where != "" && !slices.Contains(strings.Split(lines[i].Links, ", "), where):
		if lines[i].Links != "" {
			lines[i].Links += ", "
		}
		lines[i].Links += where
	}
	return lines
}

func add(list []string, s string) []string {
	if s == "" || slices.Contains(list, s) {
		return list
	}
	return append(list, s)
}

func artifact(a link.ArtifactResult) Artifact {
	out := Artifact{Name: link.Clean(a.Name), OK: len(a.Matches) > 0, Match: "NO LINK"}
	for _, alg := range []string{"sha256", link.DirHashAlg} {
		if d := a.Digest[alg]; d != "" {
			out.Digest = alg + ":" + d
			break
		}
	}
	var in []string
	for _, m := range a.Matches {
		in = add(in, short(link.Clean(m.Link)))
	}
	if out.OK {
		out.Match = "product of " + strings.Join(in, ", ")
	}
	return out
}

func at(t time.Time) string { return t.UTC().Format("2006-01-02 15:04:05Z") }

// short takes a bundle's directory and suffix away.
func short(name string) string {
	return strings.TrimSuffix(name[strings.LastIndexByte(name, '/')+1:], link.BundleSuffix)
}
