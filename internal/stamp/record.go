package stamp

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/rootlink/rootlink/pkg/attest"
)

const recordToken = "timestamp of the detached record"

// recordTimestamp gets the record its one token, of the first authority that
// answers in the order in which they are named. Which one is asked first so is
// the caller's choice, not that of whoever is fastest.
func (j *job) recordTimestamp(ctx context.Context) {
	d, err := retry(ctx, func(why error) { j.waiting(recordToken, strings.Join(j.plan.Timestamps, ", "), why) },
		func(ctx context.Context) (*attest.Detached, error) {
			var all error
			lasting := true
			for _, url := range j.plan.Timestamps {
				d, err := j.stampRecord(ctx, url)
				if err == nil || len(j.plan.Timestamps) == 1 {
					return d, err
				}
				if temporary(err) {
					lasting = false
				}
				all = errors.Join(all, err)
			}
			if !lasting { // one of them may yet answer
				return nil, errors.New(oneLine(all))
			}
			return nil, fmt.Errorf("%w: %s", ErrAnswer, oneLine(all))
		})
	j.mu.Lock()
	defer j.mu.Unlock()
	if err != nil {
		j.miss(recordToken, strings.Join(j.plan.Timestamps, ", "), err)
		return
	}
	j.out.Detached = d
}

func oneLine(err error) string { return strings.ReplaceAll(err.Error(), "\n", "; ") }

func (j *job) stampRecord(ctx context.Context, url string) (*attest.Detached, error) {
	raw, at, err := j.client.TimestampOf(ctx, url, j.record.Signature)
	if err != nil {
		return nil, err
	}
	if err := within(at, j.bundle.UnverifiedCertificate()); err != nil {
		return nil, err
	}
	d := *j.record
	d.Token = raw
	if _, err := d.Marshal(); err != nil { // more than a record may hold
		return nil, fmt.Errorf("%w: %w", ErrAnswer, err)
	}
	return &d, nil
}
