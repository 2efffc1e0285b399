package identity

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/rootlink/rootlink/internal/agent/upstream"
	"github.com/rootlink/rootlink/pkg/svid"
)

// Bounds on JWT-SVIDs. They are for each entry, so that a workload that asks for
// one audience after the other gets in nobody's way but its own.
const (
	maxJWTs       = 64 // kept for each entry; the one unused for longest goes first
	maxJWTFlights = 8  // calls to the server at once for each entry
)

// JWT is a JWT-SVID that the trust domain's keys verify.
type JWT struct {
	Token  string
	KeyID  string
	Expiry time.Time
}

type jwtKey struct {
	entry    string
	revision int64
	created  int64
}

// jwtCache holds JWT-SVIDs in memory only.
type jwtCache struct {
	mu      sync.Mutex
	entries map[jwtKey]*jwtEntry
}

// jwtEntry is what is kept for one entry.
type jwtEntry struct {
	turns chan struct{}       // a token for each call to the server
	slots map[string]*jwtSlot // by audience; guarded by jwtCache.mu
}

type jwtSlot struct {
	jwt    *JWT // last good one, nil at first
	renew  time.Time
	used   time.Time
	flight *jwtFlight
}

type jwtFlight struct {
	done chan struct{}
	jwt  *JWT
	err  error
}

// audienceKey is one string for a list of them, whatever is in them.
func audienceKey(audience []string) string {
	var b strings.Builder
	for _, a := range audience {
		b.WriteString(strconv.Itoa(len(a)) + ":" + a)
	}
	return b.String()
}

// JWT returns a JWT-SVID for e and audience, which was checked: one that is in
// the first half of its life, else a new one, else (the server is away) one
// that is still valid.
func (i *Issuer) JWT(ctx context.Context, e *Entry, audience []string) (*JWT, error) {
	c, key := &i.jwts, jwtKey{e.ID, e.Revision, e.CreatedAt}
	now := i.now()
	c.mu.Lock()
	if c.entries == nil {
		c.entries = make(map[jwtKey]*jwtEntry)
	}
	of := c.entries[key]
	if of == nil {
		of = &jwtEntry{turns: make(chan struct{}, maxJWTFlights), slots: make(map[string]*jwtSlot)}
		c.entries[key] = of
	}
	aud := audienceKey(audience)
	sl := of.slots[aud]
	if sl == nil {
		of.shrink()
		sl = new(jwtSlot)
		of.slots[aud] = sl
	}
	sl.used = now
	if sl.flight == nil && now.Before(sl.renew) && i.goodJWT(sl.jwt) {
		defer c.mu.Unlock()
		return sl.jwt, nil
	}
	if sl.flight == nil {
		sl.flight = &jwtFlight{done: make(chan struct{})}
		go i.flyJWT(of, aud, sl, sl.flight, e, audience)
	}
	f := sl.flight
	c.mu.Unlock()
	select {
	case <-f.done:
		return f.jwt, f.err
	case <-ctx.Done():
		return nil, status.FromContextError(ctx.Err()).Err()
	}
}

// goodJWT says whether a token can still be handed out: there is some life in
// it, and its authority is not being withdrawn.
func (i *Issuer) goodJWT(j *JWT) bool {
	if j == nil || !i.now().Before(j.Expiry.Add(-expiryReserve)) {
		return false
	}
	key, ok := i.trust.JWT()[j.KeyID]
	return ok && !key.Tainted
}

// flyJWT gets a token. It belongs to no caller: one that goes away must not take
// it from the others.
func (i *Issuer) flyJWT(of *jwtEntry, aud string, sl *jwtSlot, f *jwtFlight, e *Entry, audience []string) {
	ctx, cancel := context.WithTimeout(context.Background(), issueTimeout)
	defer cancel()
	var token *JWT
	var err error
	select {
	case of.turns <- struct{}{}:
		token, err = i.newJWT(ctx, e, audience)
		<-of.turns
	case <-ctx.Done():
		err = status.FromContextError(ctx.Err()).Err()
	}
	now := i.now()
	i.jwts.mu.Lock()
	defer i.jwts.mu.Unlock()
	sl.flight = nil
	switch {
	case err == nil:
		sl.jwt, f.jwt = token, token
		sl.renew = now.Add(upstream.HalfLife(now, token.Expiry))
	case !refused(err) && i.goodJWT(sl.jwt):
		i.log.Warn("JWT-SVID not renewed; the present one stays in use", "spiffe_id", e.SPIFFEID.String(),
			"expires", sl.jwt.Expiry.Format(time.RFC3339), "retry_in", minRetry, "error", err)
		sl.renew = now.Add(minRetry)
		f.jwt = sl.jwt
	default:
		i.log.Warn("JWT-SVID not issued", "spiffe_id", e.SPIFFEID.String(), "entry", e.ID, "error", err)
		f.err = err
		delete(of.slots, aud)
	}
	close(f.done)
}

// refused says whether the server said no, rather than being away.
func refused(err error) bool {
	if errors.Is(err, upstream.ErrBanned) {
		return true
	}
	switch status.Code(err) {
	case codes.InvalidArgument, codes.PermissionDenied, codes.FailedPrecondition, codes.NotFound, codes.Unimplemented:
		return true
	}
	return false
}

// newJWT asks the server for a token and checks it: it is what was asked for,
// and whoever has the bundle can verify it.
func (i *Issuer) newJWT(ctx context.Context, e *Entry, audience []string) (*JWT, error) {
	var token string
	err := i.node.Do(ctx, func(ctx context.Context, s *upstream.Session) (err error) {
		token, err = s.JWT(ctx, e.ID, audience)
		return err
	})
	if err != nil {
		return nil, err
	}
	u, err := svid.ParseJWT(token)
	if err != nil {
		return nil, fmt.Errorf("issued JWT-SVID: %w", err)
	}
	if u.ID != e.SPIFFEID {
		return nil, fmt.Errorf("server issued a JWT-SVID of %q for an entry of %q", u.ID, e.SPIFFEID)
	}
	if !slices.Equal(u.Audience, audience) {
		return nil, fmt.Errorf("server issued a JWT-SVID for audience %q instead of %q", u.Audience, audience)
	}
	if !i.now().Before(u.Expiry) {
		return nil, fmt.Errorf("server issued a JWT-SVID that ended %s", u.Expiry.Format(time.RFC3339))
	}
	if _, ok := i.trust.JWT()[u.KeyID]; !ok {
		// The server began to sign with an authority that it published after
		// our last look.
		if err := i.node.Do(ctx, func(ctx context.Context, s *upstream.Session) error { return s.SyncBundle(ctx) }); err != nil {
			return nil, fmt.Errorf("issued JWT-SVID: bundle: %w", err)
		}
	}
	err = i.InTurn(func() error {
		_, err := jwtsvid.ParseAndValidate(token, i.trust.JWT().Bundle(e.SPIFFEID.TrustDomain()), audience[:1])
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("issued JWT-SVID: %w", err)
	}
	return &JWT{Token: token, KeyID: u.KeyID, Expiry: u.Expiry}, nil
}

// shrink makes room for one more. jwtCache.mu is held.
func (of *jwtEntry) shrink() {
	makeRoom(of.slots, maxJWTs, func(sl *jwtSlot) (time.Time, bool) { return sl.used, sl.flight != nil })
}

// prune drops what is kept for entries that are gone or changed. A flight keeps
// what it needs of them.
func (c *jwtCache) prune(present func(jwtKey) bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for k := range c.entries {
		if !present(k) {
			delete(c.entries, k)
		}
	}
}
