package identity

import (
	"context"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/rootlink/rootlink/internal/agent/upstream"
)

const (
	// maxBatch is how many CSRs share a call; stock SPIRE refuses more than 500.
	// All of a call are answered together, so large ones would make the oldest
	// wait for the youngest.
	maxBatch      = 64
	maxBatchBytes = 2 << 20          // bytes of CSRs in one call, half of gRPC's default limit
	signTimeout   = 10 * time.Second // one call
)

// batcher gathers CSRs: the first ones go out at once, those that arrive while
// calls run share the next.
type batcher struct {
	sign  func(context.Context, []upstream.SignRequest) ([]upstream.SignResult, error)
	calls int // at once; 0 means 1

	mu      sync.Mutex
	queue   []*signItem
	running int // loops, each with at most one call
}

type signItem struct {
	ctx  context.Context
	req  upstream.SignRequest
	done chan upstream.SignResult // capacity 1
}

// do has one CSR signed.
func (b *batcher) do(ctx context.Context, req upstream.SignRequest) ([][]byte, error) {
	it := &signItem{ctx: ctx, req: req, done: make(chan upstream.SignResult, 1)}
	b.mu.Lock()
	b.queue = append(b.queue, it)
	if b.running < max(1, b.calls) {
		b.running++
		go b.loop()
	}
	b.mu.Unlock()
	select {
	case r := <-it.done:
		return r.Chain, r.Err
	case <-ctx.Done():
		return nil, status.FromContextError(ctx.Err()).Err()
	}
}

// loop runs while there is work.
func (b *batcher) loop() {
	for {
		batch := b.take()
		if len(batch) == 0 {
			return
		}
		reqs := make([]upstream.SignRequest, len(batch))
		for i, it := range batch {
			reqs[i] = it.req
		}
		// Not the context of any one caller: others wait for the same call.
		ctx, cancel := context.WithTimeout(context.Background(), signTimeout)
		results, err := b.sign(ctx, reqs)
		cancel()
		if err != nil {
			for _, it := range batch {
				it.done <- upstream.SignResult{Err: err}
			}
			continue
		}
		if len(results) == 0 { // else the queue would never get shorter
			results = []upstream.SignResult{{Err: status.Error(codes.Internal, "server signed nothing of a batch")}}
		}
		for i, r := range results {
			batch[i].done <- r
		}
		if rest := batch[len(results):]; len(rest) > 0 {
			b.mu.Lock()
			b.queue = append(rest, b.queue...)
			b.mu.Unlock()
		}
	}
}

// take removes the next batch, leaving out what nobody waits for any more. An
// empty batch ends the loop.
func (b *batcher) take() []*signItem {
	b.mu.Lock()
	defer b.mu.Unlock()
	var batch []*signItem
	size, n := 0, 0
	for _, it := range b.queue {
		if len(batch) == maxBatch || (len(batch) > 0 && size+len(it.req.CSR) > maxBatchBytes) {
			break
		}
		n++
		if it.ctx.Err() != nil {
			continue
		}
		size += len(it.req.CSR)
		batch = append(batch, it)
	}
	b.queue = b.queue[n:]
	if len(batch) == 0 {
		b.running--
	}
	return batch
}
