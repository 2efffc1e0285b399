package tlog

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/transparency-dev/tessera/client"

	pub "github.com/rootlink/rootlink/pkg/tlog"
)

// publication is the newest checkpoint and those who wait for a newer one.
type publication struct {
	read func(context.Context) ([]byte, error)

	mu      sync.Mutex
	size    uint64
	signed  []byte
	waiting map[chan error]uint64 // the size that each waits for
	polling bool
	closed  bool
}

func (p *publication) set(size uint64, signed []byte) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if size > p.size {
		p.size, p.signed = size, signed
	}
}

// await returns a published checkpoint that covers idx.
func (p *publication) await(ctx context.Context, idx uint64) (uint64, []byte, error) {
	p.mu.Lock()
	for p.size <= idx {
		if p.closed {
			p.mu.Unlock()
			return 0, nil, ErrClosed
		}
		if p.waiting == nil {
			p.waiting = map[chan error]uint64{}
		}
		ch := make(chan error, 1)
		p.waiting[ch] = idx + 1
		if !p.polling {
			p.polling = true
			go p.poll()
		}
		p.mu.Unlock()
		var err error
		select {
		case <-ctx.Done():
			err = ctx.Err()
		case err = <-ch:
		}
		p.mu.Lock()
		delete(p.waiting, ch)
		if err != nil {
			p.mu.Unlock()
			return 0, nil, err
		}
	}
	defer p.mu.Unlock()
	return p.size, p.signed, nil
}

// poll looks for checkpoints while somebody waits for one.
func (p *publication) poll() {
	t := time.NewTicker(pollInterval)
	defer t.Stop()
	for range t.C {
		signed, err := p.read(context.Background())
		var size uint64
		if err == nil {
			size, err = unverifiedSize(signed)
		}
		p.mu.Lock()
		if err == nil && size > p.size {
			p.size, p.signed = size, signed
		}
		if p.closed {
			err = ErrClosed
		}
		for ch, want := range p.waiting {
			if err != nil || want <= p.size {
				delete(p.waiting, ch)
				ch <- err
			}
		}
		if len(p.waiting) == 0 || p.closed {
			p.polling = false
			p.mu.Unlock()
			return
		}
		p.mu.Unlock()
	}
}

func (p *publication) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
	for ch := range p.waiting {
		delete(p.waiting, ch)
		ch <- ErrClosed
	}
}

// proofCache shares the tiles that the proofs of one checkpoint read.
type proofCache struct {
	mu      sync.Mutex
	size    uint64
	cp      *pub.Checkpoint
	builder *client.ProofBuilder
	uses    int
}

// maxProofUses bounds what a builder remembers.
const maxProofUses = 4096

func (p *proofCache) inclusion(ctx context.Context, l *Log, idx, size uint64, signed []byte) (*pub.Checkpoint, [][]byte, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.builder == nil || p.size != size || p.uses >= maxProofUses {
		cp, _, err := pub.OpenCheckpoint(signed, &l.info, nil)
		if err != nil {
			return nil, nil, fmt.Errorf("%w: %w", ErrLost, err)
		}
		b, err := client.NewProofBuilder(ctx, size, l.reader.ReadTile)
		if err != nil {
			return nil, nil, err
		}
		p.builder, p.cp, p.size, p.uses = b, cp, size, 0
	}
	p.uses++
	hashes, err := p.builder.InclusionProof(ctx, idx)
	if err != nil {
		p.builder = nil // what it remembers may be half of something
		return nil, nil, err
	}
	return p.cp, hashes, nil
}
