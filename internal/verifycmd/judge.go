package verifycmd

import (
	"context"
	"time"

	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/pkg/archive"
	"github.com/rootlink/rootlink/pkg/link"
)

// question is what is to be judged, at which time, and where it lies.
type question struct {
	// now is the time to judge at; present is the real one when another was
	// asked for.
	now, present, notBefore time.Time
	archived                time.Time // when the archive was made, as its token shows
	wantType                string
	placed                  *fetched         // files that were fetched or unpacked
	args                    []string         // bundles and artifacts
	notes                   []string         // for whoever verifies, see unpacked
	archive                 *archive.Archive // --archive; nil without
}

// prepare checks the flags and brings what is to be judged to this machine. The
// caller removes what was placed.
func (o *verifyOptions) prepare(ctx context.Context, clock time.Time, args []string) (_ *question, err error) {
	q := &question{placed: &fetched{}, args: args}
	defer func() {
		if err != nil {
			q.placed.remove()
		}
	}()
	var u *unpacked
	if o.archive != "" {
		if u, q.args, err = o.unpack(clock, args); err != nil {
			return nil, err
		}
		q.placed, q.notes, q.archived, q.archive = u.fetched, u.notes, u.stamped, u.Archive
	}
	if q.notBefore, err = o.check(q.args); err != nil {
		return nil, err
	}
	if q.now, q.present, err = o.asIf(clock); err != nil {
		return nil, err
	}
	if u != nil && !u.at.IsZero() {
		if o.at != "" {
			return nil, cli.Usage("leave --at away", "the archive's token says when trust.json is judged")
		}
		if o.vsa.out != "" {
			return nil, cli.Usage("lay a newer trust.json beside the archive (--trust) for a summary", "--vsa with a trust.json that has expired: a summary says that something was verified now")
		}
		q.now, q.present = u.at, clock
	}
	if q.wantType, err = link.ResolvePredicateType(o.predicate); err != nil {
		return nil, cli.Usage("a short name, or the predicate type's whole URI", "--type: %w", err)
	}
	if u == nil {
		q.placed, q.args, err = o.fetch(ctx, q.wantType, q.args)
	}
	return q, err
}

// judged is what a verification by identity read and found.
type judged struct {
	Input  link.Input
	Trust  *link.Trust
	Result *link.Result
	doc    []byte // trust.json
}

// judgeLinks verifies, and remembers what good trust.json and logs have shown.
func judgeLinks(o *verifyOptions, q *question) (*judged, error) {
	pins, err := fingerprints(o.trustKeys)
	if err != nil {
		return nil, err
	}
	trust, doc, err := readTrust(o.trust, pins, o.revocations)
	if err != nil {
		return nil, err
	}
	in := link.Input{Identity: o.identity, NotBefore: q.notBefore, Type: q.wantType, Clock: q.present}
	if err := readInputs(&in, q.args); err != nil {
		return nil, err
	}
	q.placed.rename(in.Links)
	in.Artifacts = q.placed.orArchived(in.Artifacts)
	state, err := openState(o.state, trust)
	if err != nil {
		return nil, err
	}
	defer state.close()
	state.known(&in, pins)
	res, verdict := link.Verify(in, trust, q.now)
	// Remembered only once trust.json itself was found good: a file that is
	// expired, rolled back or another's must not lock out the right one. Nor is
	// anything remembered of a time that was only asked for.
	if res.TrustAccepted() && q.present.IsZero() {
		if err := state.remember(trust, res.Checkpoints); err != nil {
			return nil, err
		}
	}
	return &judged{in, trust, res, doc}, verdict
}
