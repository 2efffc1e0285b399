// Package notify wakes any number of waiters when something changed.
package notify

import "sync"

// Broadcast is a reusable "it changed" signal. The zero value is ready. Take
// Wait before looking at the state, so that no change falls in between.
type Broadcast struct {
	mu sync.Mutex
	ch chan struct{} // closed by Fire; guarded by mu
}

// Wait returns a channel that the next Fire closes.
func (b *Broadcast) Wait() <-chan struct{} {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.ch == nil {
		b.ch = make(chan struct{})
	}
	return b.ch
}

// Fire wakes everybody who waits.
func (b *Broadcast) Fire() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.ch != nil {
		close(b.ch)
		b.ch = nil
	}
}
