package identity

import (
	"context"
	"errors"
	"sync"
	"time"

	"google.golang.org/grpc/status"

	"github.com/rootlink/rootlink/internal/measured"
)

const (
	maxCached     = 4096             // SVIDs kept; the one unused for longest goes first
	issueTimeout  = 30 * time.Second // one issuance, a quote on a slow TPM included
	minRetry      = time.Second      // between tries to renew while the server is away
	maxRetry      = 20 * time.Second
	expiryReserve = 5 * time.Second // an SVID this close to its end is not handed out as good
)

type cacheKey struct {
	entry      string
	revision   int64
	created    int64
	executable [32]byte
	selectors  [32]byte // zero without evidence
}

// cache holds SVIDs in memory only, so it ends with the boot session.
type cache struct {
	issuer *Issuer

	mu    sync.Mutex
	slots map[cacheKey]*slot
}

type slot struct {
	svid   *SVID // last good one, nil at first
	used   time.Time
	flight *flight
	wait   time.Duration // back-off after failures
	retry  time.Time     // no new try before this
}

type flight struct {
	done chan struct{}
	svid *SVID
	err  error
}

func (c *cache) init(i *Issuer) {
	c.issuer = i
	c.slots = make(map[cacheKey]*slot)
}

// SVID returns an SVID for e held by s: a cached one when it is in the first
// half of its life, else a new one, else (the server is away) a cached one that
// is still valid. RenewAt tells when to ask again.
func (i *Issuer) SVID(ctx context.Context, e *Entry, s measured.Subject) (*SVID, error) {
	view, err := i.keeper.View()
	if err != nil {
		return nil, err
	}
	key := i.cacheKey(e, s, view.NeedsEvidence(e.SPIFFEID))
	f, ready := i.cache.start(key, e, s)
	if ready != nil {
		return ready, nil
	}
	select {
	case <-f.done:
		return f.svid, f.err
	case <-ctx.Done():
		return nil, status.FromContextError(ctx.Err()).Err()
	}
}

// start returns a good SVID, or the flight that will bring one.
func (c *cache) start(key cacheKey, e *Entry, s measured.Subject) (*flight, *SVID) {
	now := c.issuer.now()
	c.mu.Lock()
	defer c.mu.Unlock()
	sl := c.slots[key]
	if sl == nil {
		c.shrink()
		sl = &slot{}
		c.slots[key] = sl
	}
	sl.used = now
	if sl.svid != nil && sl.flight == nil {
		valid := now.Before(sl.svid.NotAfter.Add(-expiryReserve)) && c.known(sl.svid)
		// What a withdrawn authority signed is replaced as if half its life were over.
		withdrawn := IssuedBy(c.issuer.trust.Tainted(), sl.svid.Chain)
		if valid && !withdrawn && now.Before(sl.svid.RenewAt) {
			return nil, sl.svid
		}
		if valid && now.Before(sl.retry) {
			again := *sl.svid
			again.RenewAt = sl.retry
			return nil, &again
		}
	}
	if sl.flight == nil {
		sl.flight = &flight{done: make(chan struct{})}
		go c.fly(key, sl, sl.flight, e, s)
	}
	return sl.flight, nil
}

// known says whether the SVID's authority is still one of the trust domain's;
// if not, workloads can no longer use it whatever its dates say.
func (c *cache) known(s *SVID) bool {
	return IssuedBy(c.issuer.trust.Authorities(), s.Chain)
}

// fly issues. It belongs to no caller: one that goes away must not take the
// SVID from the others.
func (c *cache) fly(key cacheKey, sl *slot, f *flight, e *Entry, s measured.Subject) {
	ctx, cancel := context.WithTimeout(context.Background(), issueTimeout)
	defer cancel()
	svid, err := c.issuer.issue(ctx, e, s)

	now := c.issuer.now()
	c.mu.Lock()
	defer c.mu.Unlock()
	sl.flight = nil
	if err == nil {
		sl.svid, sl.wait = svid, 0
		f.svid = svid
		close(f.done)
		return
	}
	sl.wait = min(max(2*sl.wait, minRetry), maxRetry)
	sl.retry = now.Add(sl.wait)
	if sl.svid != nil && now.Before(sl.svid.NotAfter) && c.known(sl.svid) {
		c.issuer.log.Warn("SVID not renewed; the present one stays in use", "spiffe_id", e.SPIFFEID.String(),
			"expires", sl.svid.NotAfter.UTC().Format(time.RFC3339), "retry_in", sl.wait, "error", err)
		again := *sl.svid
		again.RenewAt = sl.retry
		f.svid = &again
	} else {
		c.issuer.log.Warn("SVID not issued", "spiffe_id", e.SPIFFEID.String(), "entry", e.ID, "error", err)
		f.err = err
		if sl.svid == nil {
			delete(c.slots, key)
		}
	}
	close(f.done)
}

// shrink makes room for one more. c.mu is held.
func (c *cache) shrink() {
	makeRoom(c.slots, maxCached, func(sl *slot) (time.Time, bool) { return sl.used, sl.flight != nil })
}

// makeRoom drops what was not used for longest until there are fewer than most.
// What is being issued stays: its callers bound it.
func makeRoom[K comparable, S any](slots map[K]S, most int, state func(S) (used time.Time, busy bool)) {
	for len(slots) >= most {
		var oldest K
		var at time.Time
		for k, s := range slots {
			if used, busy := state(s); !busy && (at.IsZero() || used.Before(at)) {
				oldest, at = k, used
			}
		}
		if at.IsZero() {
			return
		}
		delete(slots, oldest)
	}
}

// Prune drops SVIDs of entries that are gone or changed, and expired ones.
func (i *Issuer) Prune(view *View) {
	type version struct {
		revision, created int64
	}
	present := make(map[string]version, len(view.Entries))
	for _, e := range view.Entries {
		present[e.ID] = version{e.Revision, e.CreatedAt}
	}
	i.jwts.prune(func(k jwtKey) bool {
		v, ok := present[k.entry]
		return ok && v == version{k.revision, k.created}
	})
	now := i.now()
	i.cache.mu.Lock()
	defer i.cache.mu.Unlock()
	for k, sl := range i.cache.slots {
		v, ok := present[k.entry]
		gone := !ok || v != version{k.revision, k.created}
		expired := sl.svid != nil && now.After(sl.svid.NotAfter)
		if sl.flight == nil && (gone || expired) {
			delete(i.cache.slots, k)
		}
	}
}

// Run prunes until ctx ends.
func (i *Issuer) Run(ctx context.Context) {
	tick := time.NewTicker(time.Minute)
	defer tick.Stop()
	for {
		changed := i.keeper.Changed()
		if view, err := i.keeper.View(); err == nil {
			i.Prune(view)
		} else if !errors.Is(err, ErrNotSynced) {
			i.log.Error("prune", "error", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-changed:
		case <-tick.C:
		}
	}
}
