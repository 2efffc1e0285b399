package link

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"unicode"

	"github.com/rootlink/rootlink/pkg/attest"
)

// Text renders r for people: the chain as a tree, then what was proved by
// whom. A refusal is short: why, all that failed, and what was established in
// spite of it. Strings out of signed files are cleaned, so that none can move
// the cursor and rewrite the verdict above it.
func (r *Result) Text() string { return r.text(false) }

// VerboseText is Text with every check.
func (r *Result) VerboseText() string { return r.text(true) }

func (r *Result) text(verbose bool) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s\n", r.headline())
	verified := r.Verdict == VerdictVerified
	// What a broken chain claims is not repeated as if it were so.
	broken := r.Failure != nil && r.Failure.Class == ClassCryptographic
	if f := r.Failure; f != nil {
		where := ""
		if f.Link != "" {
			where = Clean(f.Link) + ": "
		}
		fmt.Fprintf(&b, "  %s%s (%s, check %s)\n", where, Clean(f.Message), f.Class, f.Check)
	}
	if !verbose {
		r.listFurther(&b)
	}
	if broken {
		r.gaps(&b)
	} else {
		for i := range r.Links {
			fmt.Fprintln(&b)
			r.Links[i].tree(r).print(&b, "", "")
		}
	}
	for _, a := range r.Artifacts {
		if len(a.Matches) == 0 && !broken {
			fmt.Fprintf(&b, "\n%s  %s\n└── NO LINK\n", Clean(a.Name), a.content())
		}
	}
	if verified || verbose && !broken {
		for i := range r.Links {
			r.Links[i].prose(&b)
		}
	}
	fmt.Fprintf(&b, "\nJudged at %s (%s), with trust.json of %s, serial %d.\n", stamp(r.Time.At), r.Time.Source, Clean(r.Trust.TrustDomain), r.Trust.Serial)
	if !r.AsIf.IsZero() {
		fmt.Fprintf(&b, "AS IF IT WERE %s, as was asked: this says nothing of the present.\n", stamp(r.AsIf))
	}
	fmt.Fprintf(&b, "%s\n", r.Trust.SignedByText())
	if len(r.Artifacts) == 0 && verified {
		b.WriteString("No artifact was given: nothing was compared with the link's products.\n")
	}
	switch {
	case verbose:
		r.listChecks(&b)
	case !verified:
		passed, notRun := r.tally()
		fmt.Fprintf(&b, "%s passed, %d not run.\n", count(passed, "check"), notRun)
	}
	return b.String()
}

// SignedByText says whose trust.json it is.
func (t TrustInfo) SignedByText() string {
	switch {
	case len(t.SignedBy) == 0:
		return "trust.json was not read from a signed file."
	case t.FirstUse:
		return "trust.json is signed by key " + strings.Join(t.SignedBy, ", ") + ", SEEN FOR THE FIRST TIME: compare it with `rootlink-server trust key`."
	}
	keys := make([]string, len(t.SignedBy))
	for i, k := range t.SignedBy {
		keys[i] = short(k)
	}
	return "trust.json is signed by key " + strings.Join(keys, ", ") + "."
}

// gaps says how far each link's chain was established, and what was not.
func (r *Result) gaps(b *strings.Builder) {
	for i := range r.Links {
		c := &r.Links[i].Chain
		var not []string
		for _, part := range []struct {
			missing bool
			name    string
		}{
			{c.SVID == nil, "who signed"},
			{c.Statement == nil, "what was signed"},
			{c.Programs == nil, "tool and recorder"},
			{c.Quote == nil, "boot state"},
			{c.AK == nil || c.EK == nil, "TPM"},
			{c.Maker == nil && (c.EK == nil || c.EK.Basis == "maker"), "TPM maker"},
		} {
			if part.missing {
				not = append(not, part.name)
			}
		}
		if len(not) > 0 {
			fmt.Fprintf(b, "\n%s: not established: %s\n", Clean(r.Links[i].Name), strings.Join(not, ", "))
		}
	}
}

func (r *Result) headline() string {
	if r.Verdict != VerdictVerified {
		return "✗ REFUSED"
	}
	signers, tiers, software := map[string]bool{}, map[string]bool{}, false
	for _, l := range r.Links {
		if l.Chain.SVID != nil {
			signers[Clean(l.Chain.SVID.SPIFFEID)] = true
		}
		tiers[l.TierText()] = true
		software = software || l.SoftwareTPM
	}
	head := "✓ VERIFIED  " + strings.Join(slices.Sorted(maps.Keys(signers)), ", ") + "  tier: " + strings.Join(slices.Sorted(maps.Keys(tiers)), ", ")
	if software {
		head += "  SOFTWARE TPM"
	}
	if slices.ContainsFunc(r.Links, func(l LinkResult) bool { return l.Evidence == EvidenceParent }) {
		head += "  PARENT EVIDENCE ONLY"
	}
	return head
}

// Tree is one line with further lines under it.
type Tree struct {
	text  string
	notes []string
	kids  []*Tree
}

// NewTree starts a tree. What is not our own text has to be cleaned before.
func NewTree(text string, notes ...string) *Tree { return &Tree{text: text, notes: notes} }

// Add puts a line under n and returns it.
func (n *Tree) Add(text string, notes ...string) *Tree {
	kid := NewTree(text, notes...)
	n.kids = append(n.kids, kid)
	return kid
}

// String draws the tree.
func (n *Tree) String() string {
	var b strings.Builder
	n.print(&b, "", "")
	return b.String()
}

func (n *Tree) print(b *strings.Builder, first, rest string) {
	fmt.Fprintf(b, "%s%s\n", first, n.text)
	for _, note := range n.notes {
		bar := "    "
		if len(n.kids) > 0 {
			bar = "│   "
		}
		fmt.Fprintf(b, "%s%s%s\n", rest, bar, note)
	}
	for i, k := range n.kids {
		if i == len(n.kids)-1 {
			k.print(b, rest+"└── ", rest+"    ")
		} else {
			k.print(b, rest+"├── ", rest+"│   ")
		}
	}
}

// tree is the chain: artifact ← link ← SVID ← programs, quote ← AK ← EK ← maker.
// It ends where the first cryptographic check failed.
func (l *LinkResult) tree(r *Result) *Tree {
	top := &Tree{text: Clean(l.Name)}
	for _, a := range r.Artifacts {
		for _, m := range a.Matches {
			if m.Link == l.Name {
				how := a.content()
				if m.Files > 0 {
					how = count(m.Files, "file") + ", one by one"
				}
				top = &Tree{text: Clean(a.Name) + "  " + how, kids: []*Tree{top}}
			}
		}
	}
	leaf := top
	for len(leaf.kids) > 0 {
		leaf = leaf.kids[0]
	}
	c := l.Chain
	s := c.Statement
	if s == nil {
		leaf.notes = append(leaf.notes, "not established: the signature was not verified")
		return top
	}
	facts := []string{count(s.Materials, "material") + ", " + count(len(s.Subjects), "product")}
	if s.PredicateType == PredicateType {
		leaf.text = fmt.Sprintf("link %s: step %q", Clean(l.Name), Clean(s.Step))
		leaf.notes = append(leaf.notes, "command "+abbreviate(Clean(strings.Join(s.Command, " "))))
	} else {
		leaf.text = fmt.Sprintf("attestation %s: %s", Clean(l.Name), Clean(s.PredicateType))
		facts = []string{"about " + count(len(s.Subjects), "subject")}
	}
	if s.ExitCode != nil {
		facts = append(facts, fmt.Sprintf("exit code %d", *s.ExitCode))
	}
	if s.Git != nil && s.Git.Commit != "" {
		facts = append(facts, "git "+Clean(gitString(s.Git)))
	}
	leaf.notes = append(leaf.notes, strings.Join(facts, ", "))
	leaf.notes = append(leaf.notes, l.ranNotes()...)
	l.Time.tree(leaf)
	svid := leaf.Add("SVID "+Clean(c.SVID.SPIFFEID)+"  key "+short(c.SVID.KeySHA256),
		"valid "+stamp(c.SVID.NotBefore)+" to "+stamp(c.SVID.NotAfter), "issued by "+Clean(c.SVID.Authority))
	if c.Quote == nil {
		svid.Add("NO HARDWARE EVIDENCE")
		return top
	}
	if p := c.Programs; p != nil {
		for _, t := range p.Tools {
			svid.Add("tool      " + Clean(t))
		}
		if p.RecorderProtected {
			svid.Add("recorder  " + Clean(p.Recorder) + "  protected")
		} else {
			svid.Add("recorder  "+Clean(p.Recorder)+"  UNPROTECTED", "an unprotected recorder: any process of its user could have spoken in its name")
		}
	}
	l.hardware(svid)
	return top
}

// Hardware adds the way from a link's quote to the TPM's maker, if it was
// established, and says whether it was.
func (l *LinkResult) Hardware(under *Tree) bool {
	if c := l.Chain; c.Quote == nil || c.AK == nil || c.EK == nil {
		return false
	}
	l.hardware(under)
	return true
}

func (l *LinkResult) hardware(svid *Tree) {
	c := l.Chain
	q := c.Quote
	policy := "boot state NOT JUDGED by a PCR policy"
	if l.failed("requirement.pcr_policy") {
		policy = "boot state MEETS NO PCR POLICY asked for"
	} else if q.Policy != nil {
		policy = fmt.Sprintf("PCR policy %s revision %d, profile %s", Clean(q.Policy.Name), q.Policy.Revision, Clean(q.Policy.Profile))
	}
	notes := []string{policy}
	if q.SecureBoot != nil {
		notes = append(notes, fmt.Sprintf("Secure Boot on: %t (event log replayed)", *q.SecureBoot))
	}
	if c.Parent != nil {
		notes = append([]string{"of the agent's node, PARENT EVIDENCE: " + EvidenceMeans(EvidenceParent)}, notes...)
	}
	if d := c.Detached; d != nil {
		notes = append(notes, "DETACHED: "+EvidenceMeans(EvidenceDetached), d.text())
	}
	quote := svid.Add(fmt.Sprintf("quote of %s %s, reset %d, restart %d", pcrList(q.PCRs), l.QuoteTime(), q.ResetCount, q.RestartCount), notes...)
	software := ""
	if c.AK.Software {
		software = "SOFTWARE TPM, proves no hardware: "
	}
	ak := quote.Add("AK "+c.AK.Name, software+"maker "+Clean(c.AK.Manufacturer)+", firmware "+Clean(c.AK.Firmware), "certified by "+Clean(c.AK.CertifiedBy))
	host := ""
	if c.EK.Host != "" {
		host = "  " + hostName(c.EK.Host, c.EK.SHA256)
	}
	ek := ak.Add("EK " + c.EK.SHA256 + host)
	if c.Maker != nil {
		ek.Add("maker's root " + Clean(c.Maker.Subject) + "  " + short(c.Maker.SHA256))
	} else {
		ek.Add("ON THE ALLOW-LIST of trust.json, no maker's root")
	}
}

// hostName is what the inventory calls the TPM's machine. An agent's ID repeats
// the hash that stands before it.
func hostName(host, ek string) string {
	if path, ok := strings.CutSuffix(host, "/"+ek); ok && strings.HasPrefix(host, "spiffe://") {
		return "agent " + Clean(path[strings.LastIndex(path, "/")+1:]) + "/" + short(ek)
	}
	return "host " + Clean(host)
}

func (l *LinkResult) failed(id string) bool {
	return slices.ContainsFunc(l.Checks, func(c attest.Check) bool { return c.ID == id && c.Outcome == attest.Failed })
}

func (l *LinkResult) prose(b *strings.Builder) {
	if len(l.ProvedByTPM) > 0 {
		fmt.Fprintf(b, "\nProved by the TPM%s\n", map[bool]string{true: " (a SOFTWARE TPM: as good as its host)"}[l.SoftwareTPM])
		for _, p := range l.ProvedByTPM {
			fmt.Fprintf(b, "  · %s\n", Clean(p))
		}
	}
	if len(l.TakenOnWordOf) > 0 {
		fmt.Fprintln(b, "\nTaken on somebody's word")
		for _, w := range l.TakenOnWordOf {
			same := ""
			if w.SameOperator && !strings.HasPrefix(w.Who, "SVID authority") {
				same = " (one operator runs it and the SVID authority)"
			}
			fmt.Fprintf(b, "  · %s: %s%s\n", Clean(w.What), Clean(w.Who), same)
		}
	}
}

// eachCheck calls f with every check, and the link that it is about where
// there are several.
func (r *Result) eachCheck(f func(where, link string, c attest.Check)) {
	for _, c := range r.Checks {
		f("", "", c)
	}
	for _, l := range r.Links {
		where := ""
		if len(r.Links) > 1 {
			where = Clean(l.Name) + " "
		}
		for _, c := range l.Checks {
			f(where, l.Name, c)
		}
	}
}

// listFurther lists what failed beside the failure that decided.
func (r *Result) listFurther(b *strings.Builder) {
	first := true
	r.eachCheck(func(where, link string, c attest.Check) {
		f := r.Failure
		if c.Outcome != attest.Failed || f != nil && f.Check == c.ID && f.Link == link {
			return
		}
		if first {
			b.WriteString("\nAlso failed\n")
			first = false
		}
		fmt.Fprintf(b, "  ✗ %s%s: %s\n", where, c.ID, Clean(c.Detail))
	})
}

func (r *Result) tally() (passed, notRun int) {
	r.eachCheck(func(_, _ string, c attest.Check) {
		switch c.Outcome {
		case attest.Passed:
			passed++
		case attest.NotRun:
			notRun++
		}
	})
	return passed, notRun
}

func (r *Result) listChecks(b *strings.Builder) {
	b.WriteString("\nChecks\n")
	r.eachCheck(func(where, _ string, c attest.Check) {
		switch c.Outcome {
		case attest.Passed:
			fmt.Fprintf(b, "  ✓ %s%s\n", where, c.ID)
		case attest.Failed:
			fmt.Fprintf(b, "  ✗ %s%s: %s\n", where, c.ID, Clean(c.Detail))
		default:
			fmt.Fprintf(b, "  – %s%s: not run\n", where, c.ID)
		}
	})
}

// pcrList is "sha256:0-15" for the banks and indices in a quote.
func pcrList(banks map[string]map[string]string) string {
	var out []string
	for _, bank := range slices.Sorted(maps.Keys(banks)) {
		var idx []int
		for k := range banks[bank] {
			if n, err := strconv.Atoi(k); err == nil {
				idx = append(idx, n)
			}
		}
		slices.Sort(idx)
		var runs []string
		for i := 0; i < len(idx); {
			j := i
			for j+1 < len(idx) && idx[j+1] == idx[j]+1 {
				j++
			}
			if i == j {
				runs = append(runs, strconv.Itoa(idx[i]))
			} else {
				runs = append(runs, fmt.Sprintf("%d-%d", idx[i], idx[j]))
			}
			i = j + 1
		}
		out = append(out, bank+":"+strings.Join(runs, ","))
	}
	return "PCRs " + strings.Join(out, " ")
}

func count(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

// abbreviate keeps a line one that a person reads; the rest is in the JSON.
func abbreviate(s string) string {
	const most = 160 // characters
	if r := []rune(s); len(r) > most {
		return string(r[:most]) + "…"
	}
	return s
}

// Clean makes characters that a terminal might obey, or that hide others, visible.
func Clean(s string) string {
	var b strings.Builder
	for _, r := range s {
		if unicode.IsPrint(r) {
			b.WriteRune(r)
		} else {
			fmt.Fprintf(&b, "\\u%04x", r)
		}
	}
	return b.String()
}
