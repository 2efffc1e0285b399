package report

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/rootlink/rootlink/pkg/link"
)

const (
	proved  = "proved"
	said    = "said"
	word    = "word"
	missing = "missing"
)

// draw draws one link's stations from the statement to the maker, those of the
// TPM once for all links that lead to it. A station that was not established is
// drawn as missing, never left out: a reader who counts seven boxes must not
// take five for a shorter way.
func (p *Page) draw(l *link.LinkResult) {
	c := chain(l)
	if n := len(p.Machines); n > 0 && c.machine != "" && p.Machines[n-1].Chains[0].machine == c.machine {
		p.Machines[n-1].Chains = append(p.Machines[n-1].Chains, c)
		return
	}
	p.Machines = append(p.Machines, Machine{Chains: []Chain{c}, Box: machine(l)})
}

func chain(l *link.LinkResult) Chain {
	c := l.Chain
	out := Chain{Name: link.Clean(short(l.Name)), OK: l.Verdict == link.VerdictVerified}
	if c.AK != nil && c.EK != nil {
		out.machine = c.AK.Name + " " + c.EK.SHA256
	}
	out.Box = []Box{
		box("link "+out.Name, said, c.Statement != nil, func() []string {
			s := c.Statement
			lines := []string{"step " + s.Step, abbreviate(strings.Join(s.Command, " "), 60), fmt.Sprintf("%d materials, %d products", s.Materials, len(s.Subjects))}
			if s.ExitCode != nil {
				lines = append(lines, fmt.Sprintf("exit code %d", *s.ExitCode))
			}
			if s.Git != nil && s.Git.Commit != "" {
				lines = append(lines, "git "+hash(s.Git.Commit))
			}
			return lines
		}),
		box("SVID", word, c.SVID != nil, func() []string {
			return []string{c.SVID.SPIFFEID, "key " + hash(c.SVID.KeySHA256), fmt.Sprintf("for %s from %s", c.SVID.NotAfter.Sub(c.SVID.NotBefore), at(c.SVID.NotBefore))}
		}),
		moment(l),
		box("programs", proved, c.Programs != nil, func() []string {
			p := c.Programs
			lines := []string{}
			for _, t := range p.Tools {
				lines = append(lines, "tool "+hash(t))
			}
			recorder := "recorder " + hash(p.Recorder)
			if !p.RecorderProtected {
				recorder += ", UNPROTECTED"
			}
			return append(lines, recorder)
		}),
		box("quote", proved, c.Quote != nil, func() []string {
			q := c.Quote
			policy := "boot state NOT JUDGED"
			if q.Policy != nil {
				policy = fmt.Sprintf("PCR policy %s, revision %d", q.Policy.Name, q.Policy.Revision)
			}
			lines := []string{pcrs(q.PCRs), l.QuoteTime(), fmt.Sprintf("reset %d, restart %d", q.ResetCount, q.RestartCount), policy}
			switch d := c.Detached; {
			case c.Parent != nil:
				lines = append([]string{"PARENT EVIDENCE: " + l.EvidenceMeans}, lines...)
			case d != nil:
				lines = append([]string{"DETACHED: " + l.EvidenceMeans}, lines...)
				if !d.Attested {
					lines = append(lines, "when: attested by nobody")
				}
			}
			return lines
		}),
	}
	return out
}

// moment is when the link was signed, and who says so. Without anybody the
// verifier's clock stands in, and the box says that it is missing.
func moment(l *link.LinkResult) Box {
	b := box("time", word, !l.Time.At.IsZero(), func() []string {
		lines := []string{at(l.Time.At)}
		for _, s := range l.Time.Sources {
			line := s.Authority
			if !s.Counted {
				line += " (not counted: " + s.Why + ")"
			}
			lines = append(lines, line)
		}
		for _, e := range l.Time.Logs {
			if e.Counted && e.Of == link.LoggedSignature {
				lines = append(lines, fmt.Sprintf("entry %d of %s", e.Index, e.Log))
			}
		}
		return lines
	})
	if b.Kind == word && !l.Time.Attested {
		b.Kind, b.Lines = missing, append(b.Lines, "attested by nobody")
	}
	return b
}

func machine(l *link.LinkResult) []Box {
	c := l.Chain
	return []Box{
		box("AK", word, c.AK != nil, func() []string {
			lines := []string{hash(c.AK.Name), "maker " + c.AK.Manufacturer, "by " + c.AK.CertifiedBy}
			if c.AK.Software {
				lines = append(lines, "SOFTWARE TPM")
			}
			return lines
		}),
		box("EK", proved, c.EK != nil, func() []string { return []string{hash(c.EK.SHA256), host(c.EK)} }),
		box("TPM maker", word, c.EK != nil && (c.Maker != nil || c.EK.Basis != "maker"), func() []string {
			if c.Maker == nil {
				return []string{"ALLOW-LIST of trust.json, no maker's root"}
			}
			return []string{c.Maker.Subject, hash(c.Maker.SHA256)}
		}),
	}
}

func box(title, kind string, there bool, lines func() []string) Box {
	b := Box{Title: title, Kind: kind}
	if !there {
		b.Kind, b.Lines = missing, []string{"not established"}
		return b
	}
	for _, s := range lines() {
		if s != "" {
			b.Lines = append(b.Lines, link.Clean(s))
		}
	}
	return b
}

func host(ek *link.EKInfo) string {
	if strings.HasSuffix(ek.Host, "/"+ek.SHA256) {
		return "" // an agent's ID, which repeats the hash
	}
	return ek.Host
}

func pcrs(banks map[string]map[string]string) string {
	var out []string
	for _, bank := range slices.Sorted(maps.Keys(banks)) {
		out = append(out, fmt.Sprintf("%d PCRs of %s", len(banks[bank]), bank))
	}
	return strings.Join(out, ", ")
}

func hash(s string) string { return abbreviate(s, 12) }

func abbreviate(s string, most int) string {
	if r := []rune(s); len(r) > most {
		return string(r[:most]) + "…"
	}
	return s
}
