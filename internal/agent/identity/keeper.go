package identity

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"golang.org/x/time/rate"

	"github.com/rootlink/rootlink/internal/agent/notify"
	"github.com/rootlink/rootlink/internal/agent/upstream"
)

const (
	// DefaultSyncInterval is between syncs when nobody knocks.
	DefaultSyncInterval = 5 * time.Second
	minSyncGap          = 50 * time.Millisecond // between syncs that knocks cause
	syncBurst           = 4
	slowSync            = 30 * time.Second // between looks at what seldom changes
	// stockGrace is how long a stock server's entry list may stay empty after
	// an attestation (its cache is rebuilt every 5 s).
	stockGrace = 10 * time.Second
)

// maxFederated bounds the other trust domains whose bundles are kept.
const maxFederated = 256

// ErrNotSynced means that the server's entries are not known yet.
var ErrNotSynced = errors.New("agent has not synced with its server yet")

// Keeper keeps a View up to date.
type Keeper struct {
	node     *upstream.Node
	trust    *upstream.Trust
	td       spiffeid.TrustDomain
	interval time.Duration
	log      *slog.Logger
	now      func() time.Time
	limit    *rate.Limiter

	changed notify.Broadcast
	kick    chan struct{} // capacity 1: somebody waits

	mu         sync.Mutex
	view       *View
	waiters    []chan error // wait for a sync that starts from now on
	attestedAt time.Time    // when the present session was first seen

	// Used by Run's goroutine only.
	entries map[string]*types.Entry
	session *upstream.Session
	slowAt  time.Time
	failing bool
}

// NewKeeper returns a Keeper whose Run must be called.
func NewKeeper(node *upstream.Node, trust *upstream.Trust, td spiffeid.TrustDomain, interval time.Duration, log *slog.Logger) *Keeper {
	if interval <= 0 {
		interval = DefaultSyncInterval
	}
	return &Keeper{
		node: node, trust: trust, td: td, interval: interval, log: log, now: time.Now,
		limit: rate.NewLimiter(rate.Every(minSyncGap), syncBurst),
		kick:  make(chan struct{}, 1),
	}
}

// View returns what is known, or ErrNotSynced.
func (k *Keeper) View() (*View, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.view == nil {
		return nil, ErrNotSynced
	}
	return k.view, nil
}

// Changed returns a channel that closes at the next change of the View.
func (k *Keeper) Changed() <-chan struct{} { return k.changed.Wait() }

// SyncNow waits for a sync that starts after the call, and returns its error.
// Any number of callers share one, and syncs keep a distance: an unknown
// workload that knocks all the time costs the server little.
func (k *Keeper) SyncNow(ctx context.Context) error {
	done := make(chan error, 1)
	k.mu.Lock()
	k.waiters = append(k.waiters, done)
	k.mu.Unlock()
	select {
	case k.kick <- struct{}{}:
	default:
	}
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// MayStillFill says whether an empty answer may be due to a stock server that
// has not reloaded its cache since this agent attested.
func (k *Keeper) MayStillFill() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.view != nil && k.view.Stock && k.now().Sub(k.attestedAt) < stockGrace
}

// Run syncs until ctx ends.
func (k *Keeper) Run(ctx context.Context) {
	defer k.release(context.Canceled)
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		session := k.node.Changed()
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		case <-session:
		case <-k.kick:
			if k.limit.Wait(ctx) != nil {
				return
			}
		}
		k.mu.Lock()
		waiters := k.waiters
		k.waiters = nil
		k.mu.Unlock()
		err := k.sync(ctx)
		for _, w := range waiters {
			w <- err
		}
		k.report(ctx, err)
		timer.Reset(k.interval)
	}
}

func (k *Keeper) release(err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, w := range k.waiters {
		w <- err
	}
	k.waiters = nil
}

// report says once that the server is away, and once that it is back.
func (k *Keeper) report(ctx context.Context, err error) {
	switch {
	case ctx.Err() != nil || errors.Is(err, upstream.ErrNotAttested):
	case err != nil && !k.failing:
		k.failing = true
		k.log.Warn("sync failed; serving what is known and trying again", "error", err)
	case err == nil && k.failing:
		k.failing = false
		k.log.Info("sync works again")
	}
}

// sync fetches what may have changed and publishes a View.
func (k *Keeper) sync(ctx context.Context) error {
	next := &View{TrustDomain: k.td}
	slow := false
	err := k.node.Do(ctx, func(ctx context.Context, s *upstream.Session) error {
		if s != k.session {
			k.session, k.slowAt = s, time.Time{}
			k.mu.Lock()
			k.attestedAt = k.now()
			k.mu.Unlock()
		}
		entries, err := s.SyncEntries(ctx, k.entries)
		if err != nil {
			return err
		}
		k.entries = entries
		next.AgentID = s.ID
		if slow = !k.now().Before(k.slowAt); !slow {
			return nil
		}
		cfg, err := s.Config(ctx)
		if err != nil {
			return err
		}
		next.Stock = cfg == nil
		next.Patterns = cfg.GetEvidencePatterns()
		next.TimestampURLs, next.LogURL = cfg.GetTimestampUrls(), cfg.GetLogUrl()
		for _, p := range cfg.GetQuotePcrs() {
			next.PCRs = append(next.PCRs, PCRSelection{p.GetBank(), p.GetIndices()})
		}
		return s.SyncBundle(ctx)
	})
	if err != nil {
		return err
	}
	old, _ := k.View()
	if !slow && old != nil {
		next.Stock, next.Patterns, next.PCRs = old.Stock, old.Patterns, old.PCRs
		next.TimestampURLs, next.LogURL = old.TimestampURLs, old.LogURL
	}
	for _, id := range slices.Sorted(maps.Keys(k.entries)) {
		if e := newEntry(k.entries[id]); e != nil {
			next.Entries = append(next.Entries, e)
		}
	}
	if old != nil {
		next.Federated = old.Federated
	}
	// An entry that names another trust domain is not published without its
	// bundle: the message would not be the full set.
	if slow || next.Federated == nil || !slices.Equal(federatesWith(old.Entries), federatesWith(next.Entries)) {
		if next.Federated, err = k.federated(ctx, next.Entries); err != nil {
			return err
		}
	}
	next.Authorities, next.JWT = k.trust.Authorities(), k.trust.JWT()
	next.Tainted = k.trust.Tainted()
	if slow {
		k.slowAt = k.now().Add(min(slowSync, k.interval))
	}
	k.publish(next)
	return nil
}

// federatesWith are the trust domains that entries name, each once and in order.
func federatesWith(entries []*Entry) []string {
	var names []string
	for _, e := range entries {
		for _, td := range e.FederatesWith {
			names = append(names, td.Name())
		}
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// federated fetches the bundles of the other trust domains that entries name.
func (k *Keeper) federated(ctx context.Context, entries []*Entry) (map[spiffeid.TrustDomain]upstream.Bundle, error) {
	out := make(map[spiffeid.TrustDomain]upstream.Bundle)
	for _, e := range entries {
		for _, td := range e.FederatesWith {
			if _, ok := out[td]; ok {
				continue
			}
			if td == k.td {
				continue // by an entry of a foreign ID: this bundle comes from nowhere else
			}
			if len(out) == maxFederated {
				return nil, fmt.Errorf("entries federate with more than %d trust domains", maxFederated)
			}
			err := k.node.Do(ctx, func(ctx context.Context, s *upstream.Session) (err error) {
				out[td], err = s.FederatedBundle(ctx, td)
				return err
			})
			if err != nil {
				return nil, err
			}
		}
	}
	maps.DeleteFunc(out, func(_ spiffeid.TrustDomain, b upstream.Bundle) bool { return len(b.X509) == 0 && len(b.JWT) == 0 })
	return out, nil
}

func (k *Keeper) publish(next *View) {
	k.mu.Lock()
	same := k.view != nil && sameView(k.view, next)
	if !same {
		k.view = next
	}
	k.mu.Unlock()
	if !same {
		k.changed.Fire()
	}
}

func sameView(a, b *View) bool {
	return a.AgentID == b.AgentID && a.Stock == b.Stock &&
		slices.Equal(a.Patterns, b.Patterns) &&
		slices.Equal(a.TimestampURLs, b.TimestampURLs) && a.LogURL == b.LogURL &&
		slices.EqualFunc(a.PCRs, b.PCRs, func(x, y PCRSelection) bool { return x.Bank == y.Bank && slices.Equal(x.Indices, y.Indices) }) &&
		slices.EqualFunc(a.Entries, b.Entries, func(x, y *Entry) bool {
			return x.ID == y.ID && x.Revision == y.Revision && x.CreatedAt == y.CreatedAt
		}) &&
		sameCerts(a.Authorities, b.Authorities) &&
		sameCerts(a.Tainted, b.Tainted) &&
		a.JWT.Equal(b.JWT) &&
		maps.EqualFunc(a.Federated, b.Federated, upstream.Bundle.Equal)
}

func sameCerts(a, b []*x509.Certificate) bool {
	return slices.EqualFunc(a, b, (*x509.Certificate).Equal)
}
