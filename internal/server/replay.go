package server

import (
	"errors"
	"sync"
	"time"

	"github.com/rootlink/rootlink/pkg/attest"
)

var (
	errLeafUsed   = errors.New("this leaf was used before")
	errReplayFull = errors.New("too many leaves in the last minute")
)

// maxRemembered bounds the replay cache: a minute of 8,000 SVIDs a second, at
// about 64 bytes each.
const maxRemembered = 1 << 19

// replayCache remembers leaves for as long as their nonce is good. It holds two
// generations and drops the older one, so that forgetting costs nothing.
type replayCache struct {
	mu       sync.Mutex
	now, old map[[32]byte]struct{}
	turned   time.Time
}

// use fails when leaf was used before. A full cache refuses: forgetting would
// let a leaf be used twice.
func (c *replayCache) use(leaf [32]byte, at time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	// A nonce is good for NonceLifetime, so a leaf that came in at the very
	// start of the older generation is past its own when that is dropped. A
	// clock that was put back keeps everything until it has caught up.
	if c.now == nil || at.Sub(c.turned) > attest.NonceLifetime+time.Second {
		c.old, c.now, c.turned = c.now, make(map[[32]byte]struct{}), at
	}
	if _, ok := c.now[leaf]; ok {
		return errLeafUsed
	}
	if _, ok := c.old[leaf]; ok {
		return errLeafUsed
	}
	if len(c.now) >= maxRemembered {
		return errReplayFull
	}
	c.now[leaf] = struct{}{}
	return nil
}
