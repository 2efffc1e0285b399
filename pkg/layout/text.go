package layout

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/rootlink/rootlink/pkg/link"
)

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
		flag(s.Evidence != "", "evidence at least "+s.Evidence)
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
