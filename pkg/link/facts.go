package link

import (
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"
	"time"
)

// words says in prose what was proved, what only the recorder says, and whose
// word is taken for the rest. Nothing is said of links that were refused on
// cryptographic grounds before the evidence was proved.
func (v *linkVerifier) words() {
	c, out := v.out.Chain, v.out
	if s := c.Statement; s != nil {
		who := "the recorder"
		what := "materials, products and how the step ended"
		if v.stmt != nil {
			out.SaidBy = append(out.SaidBy,
				Said{"command", strings.Join(s.Command, " ")},
				Said{"materials and products", count(s.Materials, "material") + ", " + count(len(s.Subjects), "product")})
		} else {
			what = "that the predicate came from the tool, and which artifacts it is about"
			out.SaidBy = append(out.SaidBy, Said{"predicate", s.PredicateType + " about " + count(len(s.Subjects), "subject")})
		}
		if s.ExitCode != nil {
			out.SaidBy = append(out.SaidBy, Said{"exit code", fmt.Sprint(*s.ExitCode)})
		}
		if s.Git != nil && s.Git.Commit != "" {
			out.SaidBy = append(out.SaidBy, Said{"git commit", gitString(s.Git)})
		}
		if v.stmt != nil {
			out.SaidBy = append(out.SaidBy, v.stmt.said()...)
		}
		if p := c.Programs; p != nil {
			who = "the recorder " + short(p.Recorder)
			if !p.RecorderProtected {
				who += ", UNPROTECTED: or any other process of its user"
			}
		}
		out.TakenOnWordOf = append(out.TakenOnWordOf, Word{What: what, Who: who})
	}
	if v.node == nil {
		return
	}
	if v.verified == nil {
		v.parentWords()
		return
	}
	l := v.verified.Leaf()
	out.ProvedByTPM = append(out.ProvedByTPM,
		fmt.Sprintf("whoever could use AK %s in the TPM with EK %s committed to exactly this statement and SVID key", short(c.AK.Name), short(c.EK.SHA256)),
		fmt.Sprintf("that TPM's PCRs had the values shown, at reset %d, restart %d", c.Quote.ResetCount, c.Quote.RestartCount),
		fmt.Sprintf("the commitment names tool %s, recorder %s and identity %s, and was made after %s", short(hex.EncodeToString(l.Tool[:])), short(hex.EncodeToString(l.Recorder[:])), l.SPIFFEID, v.after()),
	)
	out.TakenOnWordOf = append(out.TakenOnWordOf,
		v.certifiedWord(),
		Word{What: v.after() + "'s time", Who: "SVID authority " + c.SVID.Authority, SameOperator: true},
		Word{What: "tool and recorder hashes", Who: "the agent on that machine, which is as honest as its boot state and its root user"},
	)
	if c.Detached != nil {
		out.TakenOnWordOf = append(out.TakenOnWordOf, c.Detached.words(l.SPIFFEID)...)
	}
	v.commonWords()
}

// after is what the evidence is younger than.
func (v *linkVerifier) after() string {
	if v.kind == EvidenceDetached {
		return "the SVID"
	}
	return "the nonce"
}

// words say what no server checked, so that nobody takes it for the leaf kind.
func (d *DetachedInfo) words(id string) []Word {
	when := Word{What: "when the node spoke", Who: "nobody, the verifier's own clock is used"}
	if d.Attested {
		when.Who, when.SameOperator = "timestamp authority "+d.Authority, d.SameOperator
	}
	key := "the recorder, which made it"
	if d.KeyMadeByAgent {
		key = "every process of that node to which its agent gives " + id
	}
	return []Word{
		{What: "all of the evidence: " + EvidenceMeans(EvidenceDetached), Who: "node " + d.AgentID},
		{What: "that this node may speak for " + id, Who: "trust.json"},
		{What: "who had the SVID's key", Who: key},
		when,
	}
}

func gitString(g *Git) string {
	s := g.Commit
	if g.Dirty != nil && *g.Dirty {
		s += " (with local changes)"
	}
	if g.Remote != "" {
		s += " of " + g.Remote
	}
	return s
}

// sameOperator: both certificates name one organisation. Without a name there
// is nothing that would tell them apart.
func sameOperator(a, b *x509.Certificate) bool {
	return slices.Equal(a.Subject.Organization, b.Subject.Organization)
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }

func hexHash(h [32]byte) string { return hex.EncodeToString(h[:]) }

// short is a hash's beginning, for people.
func short(h string) string {
	if len(h) > 12 {
		return h[:12] + "…"
	}
	return h
}

func digestString(set map[string]string) string {
	var out []string
	for alg, v := range set {
		out = append(out, alg+":"+v)
	}
	slices.Sort(out)
	return strings.Join(out, ", ")
}

func baseName(s string) string { return s[strings.LastIndexByte(s, '/')+1:] }
