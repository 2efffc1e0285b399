package workload

import (
	"context"
	"fmt"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

const (
	defaultBytesPerUID = 256 << 20 // bytes of executables hashed per second and user
	burstSeconds       = 8         // what a user may ask for at once, in seconds of its rate
	maxBudgetWait      = 5 * time.Second
	maxUIDs            = 4096 // users remembered
	hashesPerUID       = 2    // files of one user hashed at the same time
)

// budget keeps one user from taking all the agent's time: anybody can start
// large, ever new executables and connect with them.
type budget struct {
	perSecond int64

	mu   sync.Mutex
	uids map[uint32]*share
}

type share struct {
	limit *rate.Limiter
	slots chan struct{} // one token for each of the user's files being hashed or waiting for it
	users int           // takes in progress, under budget.mu
}

func newBudget(bytesPerUID int64) *budget {
	if bytesPerUID == 0 {
		bytesPerUID = defaultBytesPerUID
	}
	return &budget{perSecond: bytesPerUID, uids: map[uint32]*share{}}
}

// take waits until uid may hash size bytes more, at most maxBudgetWait. The
// caller releases when it has hashed them.
func (b *budget) take(ctx context.Context, uid uint32, size int64) (release func(), err error) {
	s, err := b.share(uid)
	if err != nil {
		return nil, err
	}
	done := func() {
		b.mu.Lock()
		s.users--
		b.mu.Unlock()
	}
	r := s.limit.ReserveN(time.Now(), int(min(size, b.perSecond*burstSeconds)))
	wait := r.Delay()
	if !r.OK() || wait > maxBudgetWait {
		r.Cancel()
		done()
		return nil, fmt.Errorf("uid %d: %w", uid, ErrBudget)
	}
	ctx, cancel := context.WithTimeout(ctx, 2*maxBudgetWait)
	defer cancel()
	if wait > 0 {
		t := time.NewTimer(wait)
		defer t.Stop()
		select {
		case <-t.C:
		case <-ctx.Done():
			r.Cancel()
			done()
			return nil, fmt.Errorf("uid %d: %w: %w", uid, ErrBudget, context.Cause(ctx))
		}
	}
	select {
	case s.slots <- struct{}{}:
		return func() { <-s.slots; done() }, nil
	case <-ctx.Done():
		done()
		return nil, fmt.Errorf("uid %d: %w: %w", uid, ErrBudget, context.Cause(ctx))
	}
}

func (b *budget) share(uid uint32) (*share, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	s, ok := b.uids[uid]
	if !ok {
		if len(b.uids) >= maxUIDs {
			b.forget()
		}
		if len(b.uids) >= maxUIDs {
			return nil, fmt.Errorf("uid %d: too many users at once: %w", uid, ErrBudget)
		}
		s = &share{
			limit: rate.NewLimiter(rate.Limit(b.perSecond), int(b.perSecond*burstSeconds)),
			slots: make(chan struct{}, hashesPerUID),
		}
		b.uids[uid] = s
	}
	s.users++
	return s, nil
}

// forget drops users whose budget is whole again: they lose nothing by it.
func (b *budget) forget() {
	for uid, s := range b.uids {
		if s.users == 0 && s.limit.Tokens() >= float64(b.perSecond*burstSeconds) {
			delete(b.uids, uid)
		}
	}
}
