package link

import (
	"cmp"
	"errors"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/rootlink/rootlink/pkg/attest"
)

// check is one line of the verifier. do returns a detail for the report; its
// error fails the check, errSkip marks it as not run.
type check struct {
	id     string
	clause string // the rule that it enforces
	class  error  // ErrCrypto or ErrPolicy: what its failure is
	do     func() (detail string, err error)
}

// errSkip: the check has nothing to look at, because trust.json holds no such
// rule or an earlier check failed to produce it.
var errSkip = errors.New("not run")

// Verify judges links and artifacts with nothing but its arguments: no server,
// network or clock. The result is complete whatever the outcome; the error is
// nil exactly when the verdict is "verified", else it is ErrCrypto or
// ErrPolicy. T, the time at which certificates are judged, is the latest time
// that a link's timestamps and cosignatures attest; without any it is now.
func Verify(in Input, trust *Trust, now time.Time) (*Result, error) {
	res := &Result{
		SchemaVersion: ResultSchema,
		Verdict:       VerdictRefused,
		Identity:      in.Identity,
		Trust:         trust.Info(in.TrustKeys),
		Time:          TimeInfo{At: now.UTC(), Source: "the verifier's own clock: no time is attested"},
		Links:         []LinkResult{},
		Artifacts:     []ArtifactResult{},
		Checks:        []attest.Check{},
	}
	if !in.Clock.IsZero() {
		res.AsIf = now.UTC()
		res.Time.Source = "asked for, not the present: no time is attested"
	}
	var first failure
	ok := run(&res.Checks, nil, &first, []check{
		{"trust.signature", "DSSE v1.0; verify.md, trust.json", ErrCrypto, func() (string, error) { return checkTrustSignature(in, trust) }},
		{"trust.window", "verify.md, trust.json", ErrPolicy, func() (string, error) { return checkTrustWindow(trust, now) }},
		{"trust.serial", "verify.md, trust.json", ErrPolicy, func() (string, error) {
			return fmt.Sprintf("serial %d, at least %d", trust.Serial(), in.LeastSerial), trust.CheckSerial(in.LeastSerial)
		}},
		{"trust.history", "verify.md, trust.json", ErrPolicy, func() (string, error) { return "", trust.CheckHistory(in.LeastSerial, in.LeastDigest) }},
		{"input.links", "verify.md, what is judged", ErrPolicy, func() (string, error) { return checkInput(in) }},
	})
	seen := newCheckpoints(in.Seen)
	judged := make([]judgement, len(in.Links))
	judge := func(i int) { judged[i] = judgeLink(in, i, trust, now, seen, ok) }
	if ok {
		sideBySide(len(in.Links), judge)
	}
	for i := range in.Links {
		// What a link shows of logs is compared with what those before it showed.
		if !ok || seen.contradict(judged[i].trees) {
			judge(i)
		}
		seen.merge(judged[i].trees)
		if first.err == nil {
			first = judged[i].first
		}
		res.Links = append(res.Links, judged[i].out)
	}
	res.Checkpoints = seen.largest()
	res.Time.of(res.Links)
	for _, a := range in.Artifacts {
		out := ArtifactResult{Artifact: a, Matches: []Match{}}
		c := check{"artifact.subject", "in-toto Statement v1, subject", ErrPolicy, func() (string, error) { return out.match(res.Links) }}
		if !ok {
			skip(&res.Checks, []check{c})
		} else {
			run(&res.Checks, nil, &first, []check{c})
		}
		res.Artifacts = append(res.Artifacts, out)
	}
	if first.err != nil {
		res.Failure = first.public()
		return res, fmt.Errorf("%w: %w", first.class, first.err)
	}
	res.Verdict = VerdictVerified
	return res, nil
}

// judgement is what became of one link.
type judgement struct {
	out   LinkResult
	first failure
	trees checkpoints // that it showed
}

// judgeLink judges link i with what was seen of logs before. It changes nothing
// that others look at.
func judgeLink(in Input, i int, trust *Trust, now time.Time, seen checkpoints, ok bool) judgement {
	l := in.Links[i]
	v := &linkVerifier{
		in: l, trust: trust, now: now, at: now, clock: in.Clock, seen: seen, trees: checkpoints{}, authorities: map[string]bool{},
		time:     LinkTime{At: now.UTC(), Needed: trust.file.Time.AuthoritiesNeeded, Sources: []TimeSource{}, Logs: []LogEntry{}},
		identity: cmp.Or(l.Identity, in.Identity), notBefore: in.NotBefore, exitCode: l.ExitCode, wantType: cmp.Or(in.Type, PredicateType),
		out: &LinkResult{Name: l.Name, Verdict: VerdictRefused, ProvedByTPM: []string{}, SaidBy: []Said{}, TakenOnWordOf: []Word{}, Checks: []attest.Check{}},
	}
	first := failure{link: l.Name}
	switch {
	case !ok:
		skip(&v.out.Checks, v.checks())
	case run(&v.out.Checks, &v.sub, &first, v.checks()):
		v.out.Verdict = VerdictVerified
	default:
		v.out.Failure = first.public()
	}
	v.time.Authorities = len(v.authorities)
	v.out.Time = v.time
	v.words()
	return judgement{*v.out, first, v.trees}
}

// sideBySide calls do for 0 to n-1, on all cores.
func sideBySide(n int, do func(i int)) {
	var next atomic.Int64
	var wg sync.WaitGroup
	for range min(n, runtime.GOMAXPROCS(0)) {
		wg.Go(func() {
			for i := int(next.Add(1)) - 1; i < n; i = int(next.Add(1)) - 1 {
				do(i)
			}
		})
	}
	wg.Wait()
}

// failure is the first check that failed.
type failure struct {
	check, link string
	class       error // ErrCrypto or ErrPolicy
	err         error // nil: nothing failed
}

func (f failure) public() *Failure {
	out := &Failure{Class: ClassPolicy, Check: f.check, Link: f.link, Message: f.err.Error()}
	if errors.Is(f.class, ErrCrypto) {
		out.Class = ClassCryptographic
	}
	return out
}

// run performs checks in order and reports every one. Nothing runs after a
// cryptographic failure, since what follows would judge unproven data; after a
// policy failure the others still run, so that a person sees all of them. The
// checks that one check consists of are found in sub after it.
func run(report, sub *[]attest.Check, first *failure, checks []check) bool {
	ok := true
	for i, c := range checks {
		detail, err := c.do()
		line := attest.Check{ID: c.id, Clause: c.clause, Outcome: attest.Passed, Detail: detail}
		switch {
		case errors.Is(err, errSkip):
			line.Outcome = attest.NotRun
		case err != nil:
			ok = false
			line.Outcome, line.Detail = attest.Failed, err.Error()
			if first.err == nil {
				first.check, first.class, first.err = c.id, c.class, err
			}
		}
		*report = append(*report, line)
		if sub != nil {
			*report = append(*report, *sub...)
			*sub = nil
		}
		if line.Outcome == attest.Failed && errors.Is(c.class, ErrCrypto) {
			skip(report, checks[i+1:])
			break
		}
	}
	return ok
}

func skip(report *[]attest.Check, checks []check) {
	for _, c := range checks {
		*report = append(*report, attest.Check{ID: c.id, Clause: c.clause, Outcome: attest.NotRun})
	}
}

// Info names t for a result. known are the keys that were pinned or seen before.
func (t *Trust) Info(known []string) TrustInfo {
	return TrustInfo{
		TrustDomain: t.TrustDomain(), Serial: t.Serial(), Expires: t.Expires(), Operator: t.Operator(),
		Digest: t.digest, SignedBy: append([]string{}, t.signers...), FirstUse: len(known) == 0 && len(t.signers) > 0,
	}
}

func checkTrustSignature(in Input, t *Trust) (string, error) {
	switch {
	case t.digest == "" && len(in.TrustKeys) == 0:
		return "not read from a file: the caller vouches for it", nil
	case len(in.TrustKeys) > 0:
		return "by a key that was pinned or seen before", t.CheckSigner(in.TrustKeys)
	}
	return "by a key not seen before", t.CheckSigner(t.trustKeyIDs)
}

func checkTrustWindow(t *Trust, now time.Time) (string, error) {
	if now.Before(t.Issued().Add(-MaxClockSkew)) {
		return "", fmt.Errorf("trust.json is %w: issued at %s, it is %s", ErrNotYetValid, stamp(t.Issued()), stamp(now))
	}
	// An attacker who can withhold updates must not be able to for ever.
	if !now.Before(t.Expires()) {
		return "", fmt.Errorf("trust.json expired at %s", stamp(t.Expires()))
	}
	return fmt.Sprintf("issued %s, expires %s", stamp(t.Issued()), stamp(t.Expires())), nil
}

func checkInput(in Input) (string, error) {
	if len(in.Links) == 0 {
		return "", errors.New("no link")
	}
	for _, l := range in.Links {
		identity := cmp.Or(l.Identity, in.Identity)
		if identity == "" {
			return "", errors.New("no identity to expect: any enrolled signer would do")
		}
		if err := ValidatePattern(identity); err != nil {
			return "", err
		}
	}
	if len(in.Links) > MaxLinks {
		return "", fmt.Errorf("%d links, at most %d allowed", len(in.Links), MaxLinks)
	}
	return fmt.Sprintf("%d links, %d artifacts", len(in.Links), len(in.Artifacts)), nil
}
