package nodeagent_test

import (
	"context"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/rootlink/rootlink/plugins/tpmnode/nodeagent"
	tpmv1 "github.com/rootlink/rootlink/proto/rootlink/tpm/v1"
)

// slowQuote is what a quote takes on a slow hardware TPM.
const slowQuote = 250 * time.Millisecond

// bench collects how long each record took.
type bench struct {
	*world
	b    *testing.B
	wg   sync.WaitGroup
	mu   sync.Mutex
	took []time.Duration // guarded by mu
}

func newBench(b *testing.B, opts ...nodeagent.Option) *bench {
	w := newWorld(b, setup{opts: append(opts, nodeagent.WithQuoteLatency(slowQuote))})
	if _, err := w.attest(context.Background(), nil); err != nil {
		b.Fatal(err)
	}
	b.ResetTimer()
	return &bench{world: w, b: b}
}

func (n *bench) request() {
	defer n.wg.Done()
	start := time.Now()
	if _, err := n.quoter.Quote(context.Background(), &tpmv1.QuoteRequest{Leaf: leaf()}); err != nil {
		n.b.Error(err)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.took = append(n.took, time.Since(start))
}

func (n *bench) report() {
	n.wg.Wait()
	n.b.StopTimer()
	slices.Sort(n.took)
	p99 := n.took[len(n.took)*99/100]
	n.b.ReportMetric(float64(n.b.N)/n.b.Elapsed().Seconds(), "evidence/s")
	n.b.ReportMetric(float64(p99.Milliseconds()), "p99-ms")
	n.b.ReportMetric(p99.Seconds()/slowQuote.Seconds(), "p99-quotes")
}

// BenchmarkEvidenceBatched offers 1,200 requests a second, whoever is waiting,
// while every quote takes 250 ms. The worst a request can meet is a quote that
// has just begun, then its own: two quotes.
func BenchmarkEvidenceBatched(b *testing.B) {
	const every, each = 5 * time.Millisecond, 6
	n := newBench(b)
	tick := time.NewTicker(every)
	defer tick.Stop()
	for i := range b.N {
		if i%each == 0 {
			<-tick.C
		}
		n.wg.Add(1)
		go n.request()
	}
	n.report()
}

// BenchmarkEvidenceBurst has a thousand callers ask again as soon as they are
// served, so that all arrive at once, when a quote has just begun.
func BenchmarkEvidenceBurst(b *testing.B) { closedLoop(newBench(b), 1000) }

// BenchmarkEvidenceUnbatched gives each request a quote of its own, to show what
// sharing is worth. Run it with a small -benchtime.
func BenchmarkEvidenceUnbatched(b *testing.B) {
	closedLoop(newBench(b, nodeagent.WithMaxBatch(1)), 4)
}

func closedLoop(n *bench, callers int) {
	work := make(chan struct{})
	var done sync.WaitGroup
	for range min(callers, n.b.N) {
		done.Add(1)
		go func() {
			defer done.Done()
			for range work {
				n.request()
			}
		}()
	}
	n.wg.Add(n.b.N)
	for range n.b.N {
		work <- struct{}{}
	}
	close(work)
	done.Wait()
	n.report()
}
