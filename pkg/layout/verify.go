package layout

import (
	"cmp"
	"crypto"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/rootlink/rootlink/pkg/attest"
	"github.com/rootlink/rootlink/pkg/link"
)

// errSkip: the check has nothing to look at.
var errSkip = errors.New("not run")

// Verify judges a pipeline with nothing but its arguments. The result is
// complete whatever the outcome; the error is nil exactly when the verdict is
// "verified", else it is link.ErrCrypto or link.ErrPolicy.
//
// The order: trust.json, the layout and its sublayouts (form, signature,
// window, serial, demands), every link by itself, the steps in the layout's
// order (who, with what, agreement, artifact rules), inspections, artifacts.
func Verify(in Input, trust *link.Trust, now time.Time) (*Result, error) {
	v := &verifier{
		in: in, trust: trust, now: now, owner: map[string]*Layout{}, links: map[string][]*stepLink{},
		leftOut: map[string][]string{}, subs: map[string]*File{}, used: map[string]bool{},
		res: &Result{
			SchemaVersion: ResultSchema, Verdict: link.VerdictRefused, Layouts: []Info{}, Steps: []StepResult{},
			Links: []link.LinkResult{}, Artifacts: []ArtifactResult{}, Checks: []Check{},
			Trust: trust.Info(in.TrustKeys),
		},
	}
	if !in.Clock.IsZero() {
		v.res.AsIf = now.UTC()
	}
	v.check("trust.window", "verify.md, trust.json", "", link.ErrPolicy, func() (string, error) { return "", trust.CheckWindow(now) })
	v.check("trust.serial", "verify.md, trust.json", "", link.ErrPolicy, func() (string, error) {
		return fmt.Sprintf("serial %d, at least %d", trust.Serial(), in.LeastSerial), trust.CheckSerial(in.LeastSerial)
	})
	top := v.layouts()
	if top == nil {
		v.dead = true // without a layout to go by there is nothing to judge links with
	}
	v.verifyLinks()
	if top != nil {
		v.pipeline(top, 0)
		v.inspections(top)
	}
	v.artifacts(top)
	if v.first.err != nil {
		v.res.Failure = v.first.public()
		return v.res, fmt.Errorf("%w: %w", v.first.class, v.first.err)
	}
	v.res.Verdict = link.VerdictVerified
	return v.res, nil
}

type verifier struct {
	in    Input
	trust *link.Trust
	now   time.Time
	res   *Result
	first failure
	dead  bool // nothing that follows would mean anything

	subs    map[string]*File       // by layout name
	used    map[string]bool        // sublayouts that a step asked for
	owner   map[string]*Layout     // step name → its layout
	links   map[string][]*stepLink // step name → links that verified
	leftOut map[string][]string    // step name → links of other builds
	order   []*product             // steps in order, sublayouts' before the step they stand for
}

// product is what a step left, for artifacts.
type product struct {
	step string
	link *stepLink
}

type failure struct {
	check, step string
	class, err  error
}

// detail is an error that knows which rule, file and link it is about.
type detail struct {
	rule, file, link string
	err              error
}

func (d *detail) Error() string { return d.err.Error() }
func (d *detail) Unwrap() error { return d.err }

func (f failure) public() *Failure {
	out := &Failure{Class: link.ClassPolicy, Check: f.check, Step: f.step, Message: f.err.Error()}
	if errors.Is(f.class, link.ErrCrypto) {
		out.Class = link.ClassCryptographic
	}
	for err := f.err; ; { // each layer knows something
		var d *detail
		if !errors.As(err, &d) {
			return out
		}
		out.Rule, out.File, out.Link = cmp.Or(out.Rule, d.rule), cmp.Or(out.File, d.file), cmp.Or(out.Link, d.link)
		err = d.err
	}
}

// check runs one check and reports it. After a cryptographic failure nothing
// runs, since it would judge unproven data; after a policy failure the others
// still do, so that a person sees all of them.
func (v *verifier) check(id, clause, step string, class error, do func() (string, error)) bool {
	c := Check{Check: attest.Check{ID: id, Clause: clause, Outcome: attest.NotRun}, Step: step}
	defer func() { v.res.Checks = append(v.res.Checks, c) }()
	if v.dead {
		return false
	}
	text, err := do()
	switch {
	case err == nil:
		c.Outcome, c.Detail = attest.Passed, text
		return true
	case errors.Is(err, errSkip):
		return true
	}
	if step != "" && !strings.Contains(err.Error(), fmt.Sprintf("%q", step)) {
		err = fmt.Errorf("step %q: %w", step, err)
	}
	forged := errors.Is(class, link.ErrCrypto)
	if errors.Is(err, link.ErrCrypto) {
		class = link.ErrCrypto // of a link: the exit code tells a forged one from an unwanted one
	}
	c.Outcome, c.Detail = attest.Failed, err.Error()
	if v.first.err == nil {
		v.first = failure{id, step, class, err}
	}
	v.dead = v.dead || forged
	return false
}

// layouts opens the layout and the sublayouts that it leads to. It returns nil
// unless all of them may be gone by.
func (v *verifier) layouts() *Layout {
	keys, names := v.trust.LayoutKeys()
	var top *File
	v.check("layout.form", "layouts.md, format; in-toto specification 4.3", "", link.ErrCrypto, func() (_ string, err error) {
		top, err = ParseFile(v.in.Layout.Raw)
		if err != nil {
			return "", fmt.Errorf("%s: %w", v.in.Layout.Name, err)
		}
		if len(v.in.Sublayouts) > MaxSublayouts {
			return "", malformed("%d sublayouts, at most %d allowed", len(v.in.Sublayouts), MaxSublayouts)
		}
		for _, s := range v.in.Sublayouts {
			f, err := ParseFile(s.Raw)
			if err != nil {
				return "", fmt.Errorf("%s: %w", s.Name, err)
			}
			if v.subs[f.layout.Name] != nil {
				return "", malformed("%s: two sublayouts %q", s.Name, f.layout.Name)
			}
			v.subs[f.layout.Name] = f
		}
		return fmt.Sprintf("%s, %d sublayouts", formText(top.form), len(v.in.Sublayouts)), nil
	})
	if top == nil || v.dead {
		v.notRun("layout.signature", "layout.window", "layout.serial", "layout.demands", "layout.steps")
		return nil
	}
	l := v.open(v.in.Layout.Name, top, keys, names, 0)
	v.check("layout.steps", "layouts.md, sublayouts", "", link.ErrPolicy, func() (string, error) {
		for name := range v.subs {
			if !v.used[name] {
				return "", fmt.Errorf("no step asks for sublayout %q", name)
			}
		}
		return fmt.Sprintf("%d steps in all", len(v.owner)), nil
	})
	return l
}

func (v *verifier) notRun(ids ...string) {
	for _, id := range ids {
		v.res.Checks = append(v.res.Checks, Check{Check: attest.Check{ID: id, Clause: "layouts.md", Outcome: attest.NotRun}})
	}
}

func formText(form string) string {
	if form == "" {
		return "no signatures"
	}
	return form
}

// open judges one layout file: who signed it, whether it is the newest, and
// whether it demands anything. Then it opens what stands for its steps.
func (v *verifier) open(file string, f *File, keys []crypto.PublicKey, names []string, depth int) *Layout {
	var l *Layout
	info := Info{File: file}
	v.check("layout.signature", "layouts.md, signatures; DSSE v1.0, protocol", "", link.ErrCrypto, func() (string, error) {
		opened, by, err := f.Open(keys)
		if err != nil {
			return "", fmt.Errorf("%s: %w", file, err)
		}
		sum, err := f.Digest()
		if err != nil {
			return "", err
		}
		l = opened
		info.Name, info.Serial, info.Issued, info.Expires, info.Digest = l.Name, l.Serial, l.Issued, l.Expires, hex.EncodeToString(sum[:])
		for _, i := range by {
			info.Signers = append(info.Signers, names[i])
		}
		v.res.Layouts = append(v.res.Layouts, info)
		return fmt.Sprintf("%s, by %s", l.Name, strings.Join(info.Signers, ", ")), nil
	})
	if l == nil {
		v.notRun("layout.window", "layout.serial", "layout.demands")
		return nil
	}
	v.check("layout.window", "in-toto specification 4.3, expires", "", link.ErrPolicy, func() (string, error) {
		if v.now.Before(l.Issued.Add(-link.MaxClockSkew)) {
			return "", fmt.Errorf("layout %q is %w: issued at %s, it is %s", l.Name, link.ErrNotYetValid, stamp(l.Issued), stamp(v.now))
		}
		// An archive outlives its layout: what counts is that it was in force when
		// it was laid down, which a token over the archive shows.
		if at := v.in.ArchivedAt; !at.IsZero() && at.Before(l.Expires) && !v.now.Before(l.Expires) {
			return fmt.Sprintf("expired at %s, in force when it was archived at %s", stamp(l.Expires), stamp(at)), nil
		}
		if !v.now.Before(l.Expires) {
			return "", fmt.Errorf("%w: %q at %s, it is %s", ErrExpired, l.Name, stamp(l.Expires), stamp(v.now))
		}
		return fmt.Sprintf("issued %s, expires %s", stamp(l.Issued), stamp(l.Expires)), nil
	})
	v.check("layout.serial", "layouts.md, editions", "", link.ErrPolicy, func() (string, error) {
		return fmt.Sprintf("%s, serial %d", l.Name, l.Serial), v.in.Seen[l.Name].Check(l.Name, l.Serial, info.Digest)
	})
	v.check("layout.demands", "layouts.md, what a layout must say", "", link.ErrPolicy, func() (string, error) {
		if err := l.Lint(); err != nil {
			return "", fmt.Errorf("layout %q: %w", l.Name, err)
		}
		return fmt.Sprintf("%d steps, %d inspections", len(l.Steps), len(l.Inspections)), nil
	})
	for i := range l.Steps {
		v.adopt(l, &l.Steps[i], depth)
	}
	return l
}

// adopt makes l the layout of a step, and opens the sublayout that stands for
// it. Step names are unique over all of them, so that a link is of one step.
func (v *verifier) adopt(l *Layout, s *Step, depth int) {
	const clause = "layouts.md, sublayouts"
	if v.owner[s.Name] != nil {
		v.check("layout.sublayout", clause, s.Name, link.ErrPolicy, func() (string, error) {
			return "", fmt.Errorf("layouts %q and %q both have a step %q", v.owner[s.Name].Name, l.Name, s.Name)
		})
		return
	}
	v.owner[s.Name] = l
	if s.Sublayout == "" {
		return
	}
	var keys []crypto.PublicKey
	var names []string
	ok := v.check("layout.sublayout", clause, s.Name, link.ErrPolicy, func() (string, error) {
		switch {
		case depth+1 > MaxDepth:
			return "", fmt.Errorf("sublayouts deeper than %d", MaxDepth)
		case v.subs[s.Sublayout] == nil:
			return "", fmt.Errorf("sublayout %q is missing", s.Sublayout)
		case v.used[s.Sublayout]:
			return "", fmt.Errorf("sublayout %q stands for two steps", s.Sublayout)
		case len(v.subs[s.Sublayout].layout.Inspections) > 0:
			return "", fmt.Errorf("sublayout %q has inspections, which only the outermost layout may", s.Sublayout)
		}
		for _, id := range s.PubKeys {
			k, err := publicKey(l.Keys[id])
			if err != nil {
				return "", err
			}
			keys, names = append(keys, k), append(names, "key "+id)
		}
		v.used[s.Sublayout] = true
		return s.Sublayout, nil
	})
	if ok {
		v.open("sublayout "+s.Sublayout, v.subs[s.Sublayout], keys, names, depth+1)
	}
}

// Check fails with ErrRolledBack when a newer edition was seen, or another one
// under the same serial: an old layout brings back the demands that were too
// weak, and two of one number mean that somebody is shown another pipeline.
func (s Seen) Check(name string, serial uint64, digest string) error {
	switch {
	case serial < s.Serial:
		return fmt.Errorf("%w: %q has serial %d, %d was seen before", ErrRolledBack, name, serial, s.Serial)
	case serial == s.Serial && s.Digest != "" && s.Digest != digest:
		return fmt.Errorf("%w: another layout %q with serial %d was seen before", ErrRolledBack, name, serial)
	}
	return nil
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }
