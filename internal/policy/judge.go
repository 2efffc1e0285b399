// Package policy judges quoted PCR values against PCR policies, and captures
// and compares such policies.
//
// It is the only maker of a Grant, which stands between verified evidence and
// the signing of an SVID.
package policy

import (
	"cmp"
	"encoding/hex"
	"errors"
	"slices"
	"sync"
	"time"

	"github.com/rootlink/rootlink/pkg/attest"
)

// SelectorPrefix precedes a policy's name in the selectors of a node.
const SelectorPrefix = "pcr_policy:"

// maxVerdicts bounds the cache. A full cache is emptied: it saves work, and no
// answer depends on it.
const maxVerdicts = 16 << 10

// ErrNotVerified means that somebody asked for a Grant without evidence.
var ErrNotVerified = errors.New("no verified evidence to judge")

// Revision is a policy as it is in force, with the digest that goes into
// evidence. The digest is stored, not made anew, so that a later encoding of
// policies does not change what old evidence says.
type Revision struct {
	Policy *attest.PCRPolicy
	Digest [32]byte
}

// Match is one policy that was met, and by which of its profiles.
type Match struct {
	Name     string
	Revision uint64
	Digest   [32]byte
	Profile  string
}

// Ref is how evidence names the policy.
func (m Match) Ref() *attest.PolicyRef {
	return &attest.PolicyRef{Name: m.Name, Revision: m.Revision, Digest: attest.TypedDigest{Alg: "sha256", Value: slices.Clone(m.Digest[:])}}
}

// Miss is one policy that was not met, and what was nearest.
type Miss struct {
	Name     string
	Revision uint64
	Reason   error
}

// Verdict is the outcome for every policy that was judged, by name.
type Verdict struct {
	matches []Match
	misses  []Miss
}

// Matches returns the policies that were met.
func (v *Verdict) Matches() []Match { return slices.Clone(v.matches) }

// Misses returns the policies that were not met.
func (v *Verdict) Misses() []Miss { return slices.Clone(v.misses) }

// Match returns the match of the policy called name.
func (v *Verdict) Match(name string) (Match, bool) {
	i := slices.IndexFunc(v.matches, func(m Match) bool { return m.Name == name })
	if i < 0 {
		return Match{}, false
	}
	return v.matches[i], true
}

// Selectors returns the selector values of the policies that were met, without
// the attestor's type: "pcr_policy:<name>".
func (v *Verdict) Selectors() []string {
	var out []string
	for _, m := range v.matches {
		out = append(out, SelectorPrefix+m.Name)
	}
	return out
}

// Grant is verified evidence that has been judged. It has no exported fields
// and no other maker than Judge.Grant. What may be signed with it depends on
// which policies it meets: possibly none.
type Grant struct {
	verified *attest.Verified
	verdict  *Verdict
	at       time.Time
}

// Verified returns the evidence that was judged.
func (g *Grant) Verified() *attest.Verified { return g.verified }

// Verdict returns how it was judged.
func (g *Grant) Verdict() *Verdict { return g.verdict }

// At returns the time it was judged for.
func (g *Grant) At() time.Time { return g.at }

// Judge holds the verdicts it has given. Many leaves share one quote, so that
// most questions have been asked before.
type Judge struct {
	mu       sync.Mutex
	verdicts map[key]outcome // guarded by mu
}

// NewJudge returns a Judge that remembers nothing yet.
func NewJudge() *Judge { return &Judge{verdicts: map[key]outcome{}} }

// key holds everything that a verdict depends on. The whole selection is in it:
// the same digest under another selection says something else. The counters are
// in it so that a reboot is never answered from before.
type key struct {
	ak             string
	reset, restart uint32
	selection      string
	alg, digest    string
	policy         string
	revision       uint64
	policyDigest   [32]byte
	window         int // between which two of the policy's dates
}

type outcome struct {
	profile string
	err     error
}

// Grant judges verified leaf evidence under the policies in force at time at.
func (j *Judge) Grant(v *attest.Verified, in []Revision, at time.Time) (*Grant, error) {
	if v == nil {
		return nil, ErrNotVerified
	}
	ak, q := v.AK(), v.Quote()
	if len(ak.Name) == 0 || len(q.Digest) == 0 {
		return nil, ErrNotVerified // a zero Verified, which Verify never returns
	}
	return &Grant{verified: v, verdict: j.Node(ak.Name, &q, v.PCRs(), in, at), at: at}, nil
}

// Node judges the quote of a node attestation. q must have come from
// attest.VerifyQuote over pcrs, signed by the AK with that name.
func (j *Judge) Node(akName []byte, q *attest.Quote, pcrs []attest.PCRBank, in []Revision, at time.Time) *Verdict {
	v := new(Verdict)
	pcrs = quoted(pcrs, q.Selection)
	for _, r := range in {
		o := j.one(akName, q, pcrs, r, at)
		if o.err != nil {
			v.misses = append(v.misses, Miss{Name: r.Policy.Name, Revision: r.Policy.Revision, Reason: o.err})
			continue
		}
		v.matches = append(v.matches, Match{Name: r.Policy.Name, Revision: r.Policy.Revision, Digest: r.Digest, Profile: o.profile})
	}
	slices.SortFunc(v.matches, func(a, b Match) int { return cmp.Compare(a.Name, b.Name) })
	return v
}

func (j *Judge) one(akName []byte, q *attest.Quote, pcrs []attest.PCRBank, r Revision, at time.Time) outcome {
	window, inside := window(r.Policy, at)
	if !inside {
		profile, err := r.Policy.Match(pcrs, at)
		return outcome{profile, err}
	}
	k := key{
		ak: string(akName), reset: q.ResetCount, restart: q.RestartCount,
		selection: selectionKey(q.Selection), alg: q.DigestAlg, digest: string(q.Digest),
		policy: r.Policy.Name, revision: r.Policy.Revision, policyDigest: r.Digest, window: window,
	}
	j.mu.Lock()
	o, ok := j.verdicts[k]
	j.mu.Unlock()
	if ok {
		return o
	}
	o.profile, o.err = r.Policy.Match(pcrs, at)
	j.mu.Lock()
	defer j.mu.Unlock()
	if len(j.verdicts) >= maxVerdicts {
		clear(j.verdicts)
	}
	j.verdicts[k] = o
	return o
}

// window says between which two of the policy's dates at lies, where the
// verdict cannot change. On a date itself it is not inside of any: whether that
// moment still counts is for Match to say.
func window(p *attest.PCRPolicy, at time.Time) (n int, inside bool) {
	for _, profile := range p.Profiles {
		for _, t := range []time.Time{profile.NotBefore, profile.NotAfter} {
			switch {
			case t.IsZero():
			case t.Equal(at):
				return 0, false
			case t.Before(at):
				n++
			}
		}
	}
	return n, true
}

// selectionKey writes a selection down, in the order it was quoted in.
func selectionKey(sel []attest.PCRSelection) string {
	var mask [3]byte
	var out []byte
	for _, s := range sel {
		mask = [3]byte{}
		for _, i := range s.Indices {
			if i < 24 {
				mask[i/8] |= 1 << (i % 8)
			}
		}
		out = append(out, s.Bank...)
		out = append(out, ':')
		out = hex.AppendEncode(out, mask[:])
		out = append(out, ';')
	}
	return string(out)
}

// quoted drops values that the quote does not cover, and those that user space
// can reset. A policy that names one of them is then not met.
func quoted(pcrs []attest.PCRBank, sel []attest.PCRSelection) []attest.PCRBank {
	var out []attest.PCRBank
	for _, s := range sel {
		i := slices.IndexFunc(pcrs, func(b attest.PCRBank) bool { return b.Bank == s.Bank })
		if i < 0 {
			continue
		}
		b := attest.PCRBank{Bank: s.Bank, Values: map[uint32][]byte{}}
		for _, n := range s.Indices {
			if v, ok := pcrs[i].Values[n]; ok && !attest.ResettablePCR(n) {
				b.Values[n] = v
			}
		}
		out = append(out, b)
	}
	return out
}
