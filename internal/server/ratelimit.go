package server

import (
	"context"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// Bounds on the lines that one agent can make us log: it asks for 500 SVIDs at
// once that it must not have, as often as it likes, and the log shares its disk
// with the database. Counters go on counting.
const (
	linesPerSecond = 5
	linesAtOnce    = 600
	maxLogValue    = 1024 // bytes of a value that an agent chose
)

// warnOf logs what agent caused.
func (s *Server) warnOf(agent, msg string, args ...any) {
	if !s.lines.of(agent).Allow() {
		s.count.add("log_line_left_out")
		return
	}
	for i, a := range args {
		text, is := a.(string)
		if err, isErr := a.(error); isErr {
			text, is = err.Error(), true
		}
		if is && len(text) > maxLogValue {
			args[i] = text[:maxLogValue] + "…"
		}
	}
	s.cfg.Log.Warn(msg, args...)
}

// maxAddresses bounds the addresses that limits are kept for.
const maxAddresses = 1 << 16

// addressLimiter limits how often one address may do something. Like SPIRE's
// it lets the caller wait rather than refusing it, as long as that is short.
type addressLimiter struct {
	limit rate.Limit
	burst int

	mu sync.Mutex
	m  map[string]*rate.Limiter // guarded by mu
	// shared serves every address that does not fit; it is no larger than one
	// address's, so that a flood of addresses gains nothing.
	shared *rate.Limiter
}

func newAddressLimiter(perSecond float64, burst int) *addressLimiter {
	return &addressLimiter{
		limit: rate.Limit(perSecond), burst: burst,
		m: make(map[string]*rate.Limiter), shared: rate.NewLimiter(rate.Limit(perSecond), burst),
	}
}

// wait waits until addr may go on. It fails at once when that would take longer
// than most, or than ctx allows.
func (a *addressLimiter) wait(ctx context.Context, addr string, most time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, most)
	defer cancel()
	return a.of(addr).Wait(ctx)
}

func (a *addressLimiter) of(addr string) *rate.Limiter {
	addr = network(addr)
	a.mu.Lock()
	defer a.mu.Unlock()
	l := a.m[addr]
	if l == nil {
		if len(a.m) >= maxAddresses {
			a.sweep()
		}
		if len(a.m) >= maxAddresses {
			return a.shared
		}
		l = rate.NewLimiter(a.limit, a.burst)
		a.m[addr] = l
	}
	return l
}

// sweep drops the addresses whose allowance is full again: a new limiter would
// be no different.
func (a *addressLimiter) sweep() {
	for addr, l := range a.m {
		if l.Tokens() >= float64(a.burst) {
			delete(a.m, addr)
		}
	}
}
