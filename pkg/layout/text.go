package layout

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/rootlink/rootlink/pkg/attest"
	"github.com/rootlink/rootlink/pkg/link"
)

// Text is the result for people.
func (r *Result) Text() string {
	var b strings.Builder
	line := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	if r.Verdict == link.VerdictVerified {
		line("VERIFIED")
	} else {
		line("REFUSED: %s", link.Clean(r.Failure.Message))
	}
	if !r.AsIf.IsZero() {
		line("AS IF IT WERE %s: it says nothing of now", stamp(r.AsIf))
	}
	for _, l := range r.Layouts {
		line("layout %s, serial %d, signed by %s, until %s", l.Name, l.Serial, link.Clean(strings.Join(l.Signers, ", ")), stamp(l.Expires))
	}
	for _, s := range r.Steps {
		mark := "✓"
		if s.Verdict != link.VerdictVerified {
			mark = "✗"
		}
		what := fmt.Sprintf("%d of %d: %s", len(s.SignedBy), s.Threshold, strings.Join(s.SignedBy, ", "))
		if s.Sublayout != "" {
			what = "layout " + s.Sublayout
		}
		line("  %s %-12s %s", mark, s.Name, link.Clean(what))
		line("    %s, %s", count(s.Materials, "material"), count(s.Products, "product"))
		if s.Unproved {
			line("    KEY-PINNED: no hardware evidence stands behind it")
		}
		if len(s.LeftOut) > 0 {
			line("    of other builds and left out: %s", link.Clean(strings.Join(s.LeftOut, ", ")))
		}
		for _, l := range r.Links {
			if slices.Contains(s.Links, l.Name) {
				b.WriteString(chainText(&l))
			}
		}
	}
	for _, a := range r.Artifacts {
		if a.Step != "" {
			line("artifact %s: product %s of step %s", link.Clean(a.Name), link.Clean(a.Subject), a.Step)
		}
	}
	for _, c := range r.Checks {
		if c.Outcome == attest.Failed {
			line("failed: %s: %s", strings.TrimSpace(c.ID+" "+c.Step), link.Clean(c.Detail))
		}
	}
	return b.String()
}

// chainText is one link of a step on two lines: machine and programs.
func chainText(l *link.LinkResult) string {
	c := l.Chain
	if c.EK == nil || c.Programs == nil || c.SVID == nil {
		return fmt.Sprintf("    %s: not proved\n", link.Clean(l.Name))
	}
	where := "TPM " + short(c.EK.SHA256)
	if c.EK.Host != "" {
		where += " (" + c.EK.Host + ")"
	}
	if l.SoftwareTPM {
		where += " SOFTWARE TPM"
	}
	who := "recorder " + short(c.Programs.Recorder)
	if !c.Programs.RecorderProtected {
		who += " UNPROTECTED"
	}
	return fmt.Sprintf("    %s: %s\n      %s, %s, tool %s, %s\n", link.Clean(l.Name), c.SVID.SPIFFEID, link.Clean(where), l.Tier, short(c.Programs.Tool), who)
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

// Text describes a layout for people.
func (l *Layout) Text() string {
	var b strings.Builder
	line := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	line("layout %s, serial %d", l.Name, l.Serial)
	line("issued %s, expires %s", stamp(l.Issued), stamp(l.Expires))
	if l.Readme != "" {
		line("%s", link.Clean(l.Readme))
	}
	list := func(what string, items []string) {
		if len(items) > 0 {
			line("  %s: %s", what, link.Clean(strings.Join(items, ", ")))
		}
	}
	flag := func(set bool, text string) {
		if set {
			line("  %s", text)
		}
	}
	for _, s := range l.Steps {
		line("\nstep %s", s.Name)
		list("by", s.Identities)
		list("by pinned keys", s.PubKeys)
		flag(s.KeyPinned, "classic links are accepted: no hardware evidence")
		flag(s.Sublayout != "", "by sublayout "+s.Sublayout)
		flag(s.Threshold > 1, fmt.Sprintf("by %d different identities", s.Threshold))
		flag(s.DistinctHosts, "each on a TPM of its own")
		list("SVID authorities", s.Authorities)
		list("EKs", s.EKs)
		list("PCR policies", s.PCRPolicies)
		flag(s.Tier != "", "tier at least "+s.Tier)
		list("tools", s.Tools)
		list("recorders", s.Recorders)
		flag(s.ProtectedRecorder, "recorder out of its user's reach")
		list("nothing else may run but", s.Executables)
		flag(s.CachesPerJob, "caches empty before the step")
		flag(len(s.Command) > 0, "command: "+link.Clean(strings.Join(s.Command, " ")))
		flag(s.ExitCode != 0, fmt.Sprintf("exit code %d", s.ExitCode))
		b.WriteString(rulesText("materials", s.Materials) + rulesText("products", s.Products))
	}
	for _, in := range l.Inspections {
		line("\ninspection %s: %s", in.Name, link.Clean(strings.Join(in.Run, " ")))
		b.WriteString(rulesText("materials", in.Materials) + rulesText("products", in.Products))
	}
	if len(l.Keys) > 0 {
		line("\nfunctionary keys")
		for _, id := range slices.Sorted(maps.Keys(l.Keys)) {
			line("  %s %s", l.Keys[id].KeyType, id)
		}
	}
	return b.String()
}

func rulesText(what string, rules [][]string) string {
	var b strings.Builder
	for _, r := range rules {
		fmt.Fprintf(&b, "  %-10s %s\n", what, link.Clean(strings.Join(r, " ")))
	}
	return b.String()
}

func count(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

func short(h string) string {
	if len(h) > 12 {
		return h[:12] + "…"
	}
	return h
}
