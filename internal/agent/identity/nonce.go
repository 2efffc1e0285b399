package identity

import (
	"context"
	"sync"
	"time"

	"github.com/rootlink/rootlink/pkg/attest"
)

const (
	// A nonce is good for 60 s at the server; ours leaves 40 for the quote and
	// the signature.
	nonceMaxAge  = 20 * time.Second
	nonceRefresh = 12 * time.Second // age at which the next one is fetched in the background
	nonceIdle    = time.Minute      // stop fetching when none was asked for
)

// nonces hands out a fresh server nonce without a round trip while it is in
// use. Leaves may share a nonce: each has a salt of its own.
type nonces struct {
	fetch func(context.Context) ([32]byte, error)
	now   func() time.Time
	seen  func(serverTime time.Time) // told what the server's clock said

	mu     sync.Mutex
	value  [32]byte
	at     time.Time // zero: none
	usedAt time.Time
	flight *nonceFlight
}

type nonceFlight struct {
	done  chan struct{}
	value [32]byte
	err   error
}

// get returns a nonce that is at most nonceMaxAge old.
func (n *nonces) get(ctx context.Context) ([32]byte, error) {
	n.mu.Lock()
	n.usedAt = n.now()
	if !n.at.IsZero() && n.now().Sub(n.at) < nonceMaxAge {
		v := n.value
		n.mu.Unlock()
		return v, nil
	}
	f := n.start()
	n.mu.Unlock()
	select {
	case <-f.done:
		return f.value, f.err
	case <-ctx.Done():
		return [32]byte{}, ctx.Err()
	}
}

// forget drops v, which the server did not like (it was restarted).
func (n *nonces) forget(v [32]byte) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.value == v {
		n.at = time.Time{}
	}
}

// start begins a fetch unless one runs. n.mu is held.
func (n *nonces) start() *nonceFlight {
	if n.flight != nil {
		return n.flight
	}
	f := &nonceFlight{done: make(chan struct{})}
	n.flight = f
	go func() {
		defer close(f.done)
		asked := n.now()
		f.value, f.err = n.fetch(context.Background())
		n.mu.Lock()
		defer n.mu.Unlock()
		n.flight = nil
		if f.err != nil {
			return
		}
		n.value, n.at = f.value, asked
		time.AfterFunc(nonceRefresh, n.refresh)
		if n.seen != nil {
			n.seen(attest.NonceTime(f.value))
		}
	}()
	return f
}

// refresh runs some time after each fetch.
func (n *nonces) refresh() {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.now().Sub(n.usedAt) < nonceIdle {
		n.start()
	}
}
