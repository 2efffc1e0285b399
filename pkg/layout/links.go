package layout

import (
	"errors"
	"fmt"
	"runtime"
	"slices"
	"sync"

	"github.com/in-toto/in-toto-golang/in_toto"

	"github.com/rootlink/rootlink/pkg/link"
)

// stepLink is a link that verified, in the form that rules are applied to.
type stepLink struct {
	name      string
	step      string
	signer    string // SPIFFE ID, or "key:" and a key ID
	ek        string // "" for classic links
	buildID   string
	command   []string
	classic   bool
	materials map[string]in_toto.HashObj
	products  map[string]in_toto.HashObj
	inTree    bool             // artifactsOf checked all names
	result    *link.LinkResult // nil for classic links
}

// verifyLinks judges every link by itself, with the identity that its step
// asks for, and sorts those that verify by step. Every link that was given must
// verify, except those of other builds when a build is named.
func (v *verifier) verifyLinks() {
	v.check("links.count", "verify.md, what is judged", "", link.ErrPolicy, func() (string, error) {
		n := len(v.in.Links) + len(v.in.Classic)
		if n == 0 {
			return "", fmt.Errorf("%w: no link", ErrThreshold)
		}
		if n > MaxLinks {
			return "", fmt.Errorf("%d links, at most %d allowed", n, MaxLinks)
		}
		return fmt.Sprintf("%d links", n), nil
	})
	if len(v.in.Links)+len(v.in.Classic) > MaxLinks {
		v.dead = true
	}
	v.judgeBundles()
	// One forged link does not keep the others from being looked at, and
	// nothing is built on any of them then.
	v.dead = v.dead || errors.Is(v.first.class, link.ErrCrypto)
	for _, in := range v.in.Classic {
		v.check("link.classic", "layouts.md, pinned keys; in-toto specification 4.2", "", link.ErrCrypto, func() (string, error) { return v.verifyClassic(in) })
	}
	v.check("links.build", "layouts.md, one build", "", link.ErrPolicy, v.oneBuild)
}

// judgeBundles has pkg/link judge all bundles in one go, each with the identity
// that its step asks for.
func (v *verifier) judgeBundles() {
	query := link.Input{
		LeastSerial: v.in.LeastSerial, LeastDigest: v.in.LeastDigest, TrustKeys: v.in.TrustKeys,
		NotBefore: v.in.NotBefore, Clock: v.in.Clock, Seen: v.in.Checkpoints,
	}
	report := func(name string, do func() (string, error)) bool {
		return v.check("link.verified", "verify.md, the checks of a link", "", link.ErrPolicy, func() (string, error) {
			text, err := do()
			if err != nil {
				err = &detail{link: name, err: fmt.Errorf("%s: %w", name, err)}
			}
			return text, err
		})
	}
	parsed := parseAll(v.in.Links)
	for i, in := range v.in.Links {
		in.Parsed = parsed[i]
		left, err := v.assign(&in)
		if err != nil || left != "" {
			report(in.Name, func() (string, error) { return left, err })
			continue
		}
		query.Links = append(query.Links, in)
	}
	if v.dead || len(query.Links) == 0 {
		return
	}
	res, _ := link.Verify(query, v.trust, v.now) // each link says how it fared
	v.res.Links, v.res.Checkpoints = res.Links, res.Checkpoints
	for i := range res.Links {
		r := &res.Links[i]
		report(r.Name, func() (string, error) { return v.accept(r) })
	}
}

// parseAll decodes bundles and their statements side by side: of large ones it
// is most of the work. nil stands for one that is malformed.
func parseAll(in []link.LinkInput) []*link.Bundle {
	out := make([]*link.Bundle, len(in))
	if len(in) > MaxLinks {
		return out // nothing is judged
	}
	next := make(chan int)
	var wg sync.WaitGroup
	for range min(len(in), runtime.GOMAXPROCS(0)) {
		wg.Go(func() {
			for i := range next {
				b := in[i].Parsed
				if b == nil {
					b, _ = link.ParseBundle(in[i].Bundle) // nil with an error
				}
				if b != nil {
					_, _ = b.UnverifiedStatement() // which it keeps
					out[i] = b
				}
			}
		})
	}
	for i := range in {
		next <- i
	}
	close(next)
	wg.Wait()
	return out
}

// assign says whom a bundle is compared with. What the bundle claims of itself
// chooses no more than that. left is why it is not judged at all.
func (v *verifier) assign(in *link.LinkInput) (left string, err error) {
	in.Identity = "spiffe://" + v.trust.TrustDomain() + "/**"
	b := in.Parsed
	if b == nil {
		return "", nil // it is refused for its form
	}
	claim, err := b.UnverifiedStatement()
	if err != nil {
		return "", err
	}
	if id := claim.Environment.BuildID; v.in.BuildID != "" && id != v.in.BuildID && id != "" {
		v.leftOut[claim.Step] = append(v.leftOut[claim.Step], in.Name)
		return fmt.Sprintf("%s is of build %s: left out", in.Name, id), nil
	}
	owner := v.owner[claim.Step]
	if owner == nil {
		return "", fmt.Errorf("it is of step %q, which the layout does not have", claim.Step)
	}
	step := owner.step(claim.Step)
	if len(step.Identities) == 0 {
		return "", fmt.Errorf("step %q takes no bundles: the layout names no SPIFFE identity for it", step.Name)
	}
	in.Identity, in.ExitCode = step.Identities[0], step.ExitCode
	if uris := b.UnverifiedCertificate().URIs; len(uris) == 1 {
		for _, p := range step.Identities {
			if link.MatchPattern(p, uris[0].String()) {
				in.Identity = p
				break
			}
		}
	}
	return "", nil
}

// accept takes a link that verified into its step.
func (v *verifier) accept(r *link.LinkResult) (_ string, err error) {
	if r.Verdict != link.VerdictVerified {
		if f := r.Failure; f == nil {
			return "", errors.New("it was not judged")
		} else if f.Class == link.ClassCryptographic {
			return "", fmt.Errorf("%w: %s: %s", link.ErrCrypto, f.Check, f.Message)
		} else {
			return "", fmt.Errorf("%s: %s", f.Check, f.Message)
		}
	}
	s := r.Statement()
	l := &stepLink{
		name: r.Name, step: s.Step, signer: r.Chain.SVID.SPIFFEID, ek: r.Chain.EK.SHA256, buildID: s.Environment.BuildID,
		command: s.Command, result: r, inTree: true,
	}
	if l.materials, err = artifactsOf(s.Materials); err != nil {
		return "", err
	}
	if l.products, err = artifactsOf(s.Subjects); err != nil {
		return "", err
	}
	v.links[s.Step] = append(v.links[s.Step], l)
	return fmt.Sprintf("%s: step %q by %s", r.Name, s.Step, l.signer), nil
}

// artifactsOf refuses names that do not stay in the tree: a rule about "src/*"
// must not be met by "src/../../etc/passwd".
func artifactsOf(rs []link.Resource) (map[string]in_toto.HashObj, error) {
	out := make(map[string]in_toto.HashObj, len(rs))
	for _, r := range rs {
		if !inTree(r.Name) {
			return nil, &detail{file: r.Name, err: fmt.Errorf("%q: %w", r.Name, ErrEscape)}
		}
		out[r.Name] = r.Digest
	}
	return out, nil
}

// oneBuild refuses a mix of runs: a genuine link of yesterday's build of the
// same pipeline would otherwise fit wherever its artifacts did not change.
func (v *verifier) oneBuild() (string, error) {
	first, has := "", false
	var named *stepLink
	for _, step := range v.steps() {
		for _, l := range v.links[step] {
			switch {
			case v.in.BuildID != "" && l.buildID != v.in.BuildID:
				return "", &detail{link: l.name, err: fmt.Errorf("%w: %s carries no build ID, asked for was %s", ErrBuildID, l.name, v.in.BuildID)}
			case has && l.buildID != first:
				return "", &detail{link: l.name, err: fmt.Errorf("%w: %s is of build %q, %s of build %q", ErrBuildID, named.name, first, l.name, l.buildID)}
			}
			first, has, named = l.buildID, true, l
		}
	}
	if !has {
		return "", errSkip
	}
	if first == "" {
		return "no link names its build: whether they are of one run is not known", nil
	}
	return first, nil
}

// steps lists the names of all steps, in a fixed order.
func (v *verifier) steps() []string {
	var out []string
	for name := range v.owner {
		out = append(out, name)
	}
	slices.Sort(out)
	return out
}
