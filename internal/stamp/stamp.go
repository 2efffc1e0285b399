package stamp

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	rekorv1 "github.com/sigstore/protobuf-specs/gen/pb-go/rekor/v1"

	"github.com/rootlink/rootlink/pkg/attest"
	"github.com/rootlink/rootlink/pkg/link"
)

// None switches an address off.
const None = "none"

// All, for Plan.Needed: every authority that is asked.
const All = -1

// Plan is what a bundle is to have.
type Plan struct {
	Timestamps []string // URLs of RFC 3161 authorities; all are asked
	Needed     int      // tokens of distinct authorities without which it is not complete; All
	Log        string   // base URL of the log; empty: none
	// HaveProof says whether a file of this name, a proof of the AK
	// certificate, is there already; nil: no.
	HaveProof func(name string) bool
}

// Empty: nothing is wanted.
func (p Plan) Empty() bool { return len(p.Timestamps) == 0 && p.Log == "" }

// Needs is how many tokens must come.
func (p Plan) Needs() int {
	if p.Needed == All {
		return len(p.Timestamps)
	}
	return min(p.Needed, len(p.Timestamps))
}

// Check fails on a plan that cannot be carried out.
func (p Plan) Check() error {
	for _, u := range p.Timestamps {
		if err := CheckURL(u); err != nil {
			return err
		}
	}
	if len(p.Timestamps) > link.MaxTokens {
		return fmt.Errorf("%d timestamp authorities, a bundle holds at most %d tokens", len(p.Timestamps), link.MaxTokens)
	}
	if len(p.Timestamps) > 0 && p.Needed > len(p.Timestamps) {
		return fmt.Errorf("%d timestamps are needed and %d authorities known", p.Needed, len(p.Timestamps))
	}
	if p.Log != "" {
		return CheckLogURL(p.Log)
	}
	return nil
}

// Outcome is what was obtained, and what was not.
type Outcome struct {
	Bundle  *link.Bundle // with all that was obtained
	Proof   []byte       // the log's proof of the AK certificate; nil without
	ProofAs string       // the file name it belongs under
	Changed bool         // the bundle has more than before
	// Detached is the record beside the bundle with its token; nil when that is
	// as it was.
	Detached *attest.Detached
	Missing  []Missing
}

// Missing is one thing that was asked for in vain.
type Missing struct {
	What   string // "timestamp", "log entry", "proof of the AK certificate"
	URL    string
	Err    error
	Needed bool
}

func (m Missing) String() string { return fmt.Sprintf("%s from %s: %s", m.What, m.URL, m.Err) }

// ErrIncomplete: something that is needed is missing.
var ErrIncomplete = errors.New("the bundle is not complete")

// Err is ErrIncomplete with the reasons, or nil.
func (o *Outcome) Err() error {
	var why []string
	for _, m := range o.Missing {
		if m.Needed {
			why = append(why, m.String())
		}
	}
	if len(why) == 0 {
		return nil
	}
	return fmt.Errorf("%w: %s", ErrIncomplete, strings.Join(why, "; "))
}

// ErrTooLate: the SVID has expired, so what is obtained now would prove nothing.
var ErrTooLate = errors.New("the SVID has expired")

// Complete obtains what b lacks of p. It asks everybody at once, and again with
// growing pauses, until ctx ends or the SVID expires. The error is not nil only
// when nothing could be tried, or the caller's context was cancelled; what could
// not be had is in the outcome. waiting is told why something takes longer.
func (c *Client) Complete(ctx context.Context, b *link.Bundle, p Plan, waiting func(what, url string, why error)) (*Outcome, error) {
	return c.CompleteWith(ctx, b, nil, p, waiting)
}

// CompleteWith is Complete for a bundle and the detached record beside it, which
// wants a token of its own: over its own signature, which may be younger than the
// link's. d may be nil.
func (c *Client) CompleteWith(ctx context.Context, b *link.Bundle, d *attest.Detached, p Plan, waiting func(what, url string, why error)) (*Outcome, error) {
	if err := p.Check(); err != nil {
		return nil, err
	}
	j, err := newJob(c, b, p, waiting)
	if err != nil {
		return nil, err
	}
	if d != nil && len(d.Token) == 0 && len(p.Timestamps) > 0 {
		if len(d.Signature) == 0 {
			return nil, fmt.Errorf("%w: the detached record beside it is not signed", attest.ErrDetached)
		}
		j.record = d
	}
	if j.done() {
		return &j.out, nil
	}
	until := b.UnverifiedCertificate().NotAfter
	if !time.Now().Before(until) {
		if len(j.have) >= len(p.Timestamps) && !j.wantEntry && !j.wantProof && j.record == nil {
			return &j.out, nil // as far as can be told, nothing is missing
		}
		return nil, fmt.Errorf("%w: it was valid until %s", ErrTooLate, until.UTC().Format(time.RFC3339))
	}
	limited, cancel := context.WithDeadline(ctx, until)
	defer cancel()
	j.run(limited)
	if errors.Is(ctx.Err(), context.Canceled) {
		return nil, ctx.Err()
	}
	return &j.out, j.assemble()
}

// job is one Complete.
type job struct {
	client  *Client
	plan    Plan
	bundle  *link.Bundle
	akCert  []byte
	record  *attest.Detached // that lacks its token; nil: none does
	waiting func(what, url string, why error)

	wantTokens, wantEntry, wantProof bool

	mu     sync.Mutex // guards all below
	have   map[[32]byte]bool
	tokens [][]byte
	entry  *rekorv1.TransparencyLogEntry
	out    Outcome
	enough context.CancelFunc // ends what is not needed, after a while
}

func newJob(c *Client, b *link.Bundle, p Plan, waiting func(what, url string, why error)) (*job, error) {
	have, err := signers(b)
	if err != nil {
		return nil, err
	}
	j := &job{client: c, plan: p, bundle: b, waiting: waiting, have: have, out: Outcome{Bundle: b}}
	// Which authority a URL belongs to only its answer tells: a bundle with a
	// token may lack the one that is asked for. What is there already is not
	// put in twice.
	j.wantTokens = len(p.Timestamps) > 0
	j.wantEntry = p.Log != "" && len(b.LogEntries()) == 0
	if ak := AKCertificate(b); ak != nil && p.Log != "" {
		j.akCert, j.wantProof = ak, p.HaveProof == nil || !p.HaveProof(link.LogProofName(ak))
	}
	return j, nil
}

// AKCertificate is the certificate of the AK in the bundle's evidence, nil
// without one.
func AKCertificate(b *link.Bundle) []byte {
	e, err := attest.FromCertificate(b.UnverifiedCertificate())
	if err != nil || len(e.AKCert) == 0 {
		return nil
	}
	return e.AKCert
}

func (j *job) done() bool {
	return !j.wantTokens && !j.wantEntry && !j.wantProof && j.record == nil
}

func (j *job) run(ctx context.Context) {
	var wg sync.WaitGroup
	tokens, cancel := context.WithCancel(ctx)
	defer cancel()
	j.enough = cancel
	if j.wantTokens {
		if len(j.have) >= j.plan.Needs() {
			time.AfterFunc(j.client.grace, cancel)
		}
		for _, url := range j.plan.Timestamps {
			wg.Go(func() { j.timestamp(tokens, url) })
		}
	}
	if j.record != nil {
		wg.Go(func() { j.recordTimestamp(ctx) })
	}
	if j.wantEntry {
		wg.Go(func() { j.append(ctx) })
	}
	if j.wantProof {
		wg.Go(func() { j.proof(ctx) })
	}
	wg.Wait()
}

func (j *job) timestamp(ctx context.Context, url string) {
	const what = "timestamp"
	raw, err := retry(ctx, func(why error) { j.waiting(what, url, why) }, func(ctx context.Context) ([]byte, error) {
		return j.client.Timestamp(ctx, url, j.bundle)
	})
	j.mu.Lock()
	defer j.mu.Unlock()
	if err != nil {
		j.miss(what, url, err)
		return
	}
	signer, err := signerOf(raw)
	if err != nil {
		j.miss(what, url, err)
		return
	}
	if !j.have[signer] { // the older one, of the two, is as good
		j.have[signer] = true
		j.tokens = append(j.tokens, raw)
	}
	if len(j.have) >= j.plan.Needs() {
		time.AfterFunc(j.client.grace, j.enough)
	}
}

func (j *job) append(ctx context.Context) {
	const what = "log entry"
	e, err := retry(ctx, func(why error) { j.waiting(what, j.plan.Log, why) }, func(ctx context.Context) (*rekorv1.TransparencyLogEntry, error) {
		return j.client.Append(ctx, j.plan.Log, j.bundle)
	})
	j.mu.Lock()
	defer j.mu.Unlock()
	if err != nil {
		j.miss(what, j.plan.Log, err)
		return
	}
	j.entry = e
}

func (j *job) proof(ctx context.Context) {
	const what = "proof of the AK certificate"
	raw, err := retry(ctx, func(why error) { j.waiting(what, j.plan.Log, why) }, func(ctx context.Context) ([]byte, error) {
		return j.client.CertificateProof(ctx, j.plan.Log, j.akCert)
	})
	j.mu.Lock()
	defer j.mu.Unlock()
	if err != nil {
		j.miss(what, j.plan.Log, err)
		return
	}
	j.out.Proof, j.out.ProofAs = raw, link.LogProofName(j.akCert)
}

// miss notes a failure; the caller holds mu.
func (j *job) miss(what, url string, err error) {
	j.out.Missing = append(j.out.Missing, Missing{What: what, URL: url, Err: err})
}

// assemble puts what was obtained into the bundle, and decides what of the rest
// was needed.
func (j *job) assemble() (err error) {
	o := &j.out
	if len(j.tokens) > 0 {
		if o.Bundle, err = o.Bundle.WithTimestamps(j.tokens...); err != nil {
			return err
		}
	}
	if j.entry != nil {
		if o.Bundle, err = o.Bundle.WithLogEntry(j.entry); err != nil {
			return err
		}
	}
	o.Changed = len(j.tokens) > 0 || j.entry != nil
	for i := range o.Missing {
		m := &o.Missing[i]
		switch m.What {
		case "timestamp":
			m.Needed = len(j.have) < j.plan.Needs()
		default:
			// Another's log, such as a public one, knows nothing of our AKs.
			m.Needed = !errors.Is(m.Err, ErrUnknown)
		}
	}
	// Two URLs of one authority give one witness, not two.
	if n := j.plan.Needs(); j.wantTokens && len(j.have) < n && !slices.ContainsFunc(o.Missing, func(m Missing) bool { return m.What == "timestamp" }) {
		o.Missing = append(o.Missing, Missing{
			What: "timestamp", URL: strings.Join(j.plan.Timestamps, ", "), Needed: true,
			Err: fmt.Errorf("%d different authorities answered, %d are needed", len(j.have), n),
		})
	}
	slices.SortFunc(o.Missing, func(a, b Missing) int { return strings.Compare(a.What+a.URL, b.What+b.URL) })
	return nil
}
