//go:build bench

package fleet

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/rootlink/rootlink/bench/figures"
	"github.com/rootlink/rootlink/internal/forge"
)

const (
	syncInterval = 5 * time.Second // of stock SPIRE's agent and of ours
	syncTime     = 30 * time.Second
	entriesEach  = 10 // that every agent is given
	attesters    = 64
)

// attestAll attests every node, some at a time, and returns how long each took.
func attestAll(t *testing.T, nodes []*node, address string, atOnce int) figures.Samples {
	t.Helper()
	waits := make(figures.Samples, len(nodes))
	var next atomic.Int64
	var wg sync.WaitGroup
	var failed atomic.Pointer[error]
	for range atOnce {
		wg.Go(func() {
			for failed.Load() == nil {
				i := int(next.Add(1)) - 1
				if i >= len(nodes) {
					return
				}
				start := time.Now()
				ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
				err := nodes[i].attest(ctx, t, address)
				cancel()
				if err != nil {
					failed.Store(&err)
				}
				waits[i] = time.Since(start)
			}
		})
	}
	wg.Wait()
	if err := failed.Load(); err != nil {
		t.Fatal(*err)
	}
	return waits
}

func makeNodes(t *testing.T, maker *forge.Maker, n int) []*node {
	t.Helper()
	nodes := make([]*node, n)
	for i := range nodes {
		nodes[i] = newNode(t, maker, i)
	}
	t.Cleanup(func() {
		for _, n := range nodes {
			n.close()
		}
	})
	return nodes
}

// fleet: many attested agents, each with a connection of its own, ask for their
// entries and the bundle every five seconds, spread evenly.
func fleet(t *testing.T, out *figures.Table) {
	maker := forge.NewMaker(t, "Bench TPMs")
	s := ours(t, maker)
	list := []*types.Entry{entry("/spire/server", "/fleet", "tpmnode:ek_basis:maker")}
	for i := range entriesEach {
		list = append(list, entry("/fleet", fmt.Sprintf("/workload/%d", i), fmt.Sprintf("unix:uid:%d", i)))
	}
	s.create(list...)

	nodes := makeNodes(t, maker, *agents)
	start := time.Now()
	waits := attestAll(t, nodes, s.address, attesters)
	took := time.Since(start)
	out.Line(fmt.Sprintf("%d agents attest, %d at a time", *agents, attesters), fmt.Sprintf("%.0f/s (p99 %s)", float64(len(nodes))/took.Seconds(), figures.Short(waits.At(0.99))), "",
		"credential activation and quote, by forged TPMs in the client's process on the same cores")

	// Once each, before the clock runs: the TLS handshakes of all agents at once are
	// not what a sync costs.
	connect(t, nodes)
	cpu, err := figures.CPUTime(s.pid)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), syncTime)
	defer cancel()
	var mu sync.Mutex
	var syncs figures.Samples
	var late, failed int
	var first error
	var wg sync.WaitGroup
	start = time.Now()
	for _, n := range nodes {
		wg.Go(func() {
			next := time.Now().Add(rand.N(syncInterval))
			for {
				select {
				case <-ctx.Done():
					return
				case <-time.After(time.Until(next)):
				}
				began := time.Now()
				err := n.sync(ctx)
				if ctx.Err() != nil {
					return
				}
				mu.Lock()
				if err != nil {
					failed++
					first = err
				} else {
					syncs = append(syncs, time.Since(began))
				}
				if next = next.Add(syncInterval); time.Now().After(next) {
					late++
					next = time.Now()
				}
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	took = time.Since(start)
	if first != nil {
		t.Fatalf("%d syncs failed, the last: %v", failed, first)
	}
	after, err := figures.CPUTime(s.pid)
	if err != nil {
		t.Fatal(err)
	}
	now, peak, err := figures.RSS(s.pid)
	if err != nil {
		t.Fatal(err)
	}
	used := after - cpu
	out.Line(fmt.Sprintf("%d agents sync every %s", *agents, figures.Short(syncInterval)), fmt.Sprintf("%.0f syncs/s, %s", float64(len(syncs))/took.Seconds(), syncs), "",
		fmt.Sprintf("a sync is SyncAuthorizedEntries of %d entries and GetBundle, on an open connection; %d of %d began late", entriesEach, late, len(syncs)))
	out.Line("  CPU of rootlink-server", fmt.Sprintf("%.2f cores, %s a sync", used.Seconds()/took.Seconds(), figures.Short(used/time.Duration(max(1, len(syncs))))), "",
		"the simulated agents use the same cores")
	out.Line("  its memory", fmt.Sprintf("%s (peak %s)", figures.Bytes(now), figures.Bytes(peak)), "",
		fmt.Sprintf("%s for each open connection of an agent", figures.Bytes(now/int64(len(nodes)))))
}

// connect has every node sync once, some at a time.
func connect(t *testing.T, nodes []*node) {
	t.Helper()
	var next atomic.Int64
	var wg sync.WaitGroup
	for range attesters {
		wg.Go(func() {
			for i := next.Add(1) - 1; i < int64(len(nodes)); i = next.Add(1) - 1 {
				if err := nodes[i].sync(t.Context()); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	if t.Failed() {
		t.FailNow()
	}
}

// sync is what a stock agent does every five seconds.
func (n *node) sync(ctx context.Context) error {
	stream, err := entryv1.NewEntryClient(n.conn).SyncAuthorizedEntries(ctx)
	if err != nil {
		return err
	}
	if err := stream.Send(&entryv1.SyncAuthorizedEntriesRequest{OutputMask: &types.EntryMask{
		SpiffeId: true, Selectors: true, FederatesWith: true, Admin: true, Downstream: true, RevisionNumber: true, StoreSvid: true, Hint: true, CreatedAt: true,
	}}); err != nil {
		return err
	}
	resp, err := stream.Recv()
	if err != nil {
		return err
	}
	if len(resp.Entries) != entriesEach {
		return fmt.Errorf("%d entries, want %d", len(resp.Entries), entriesEach)
	}
	if err := stream.CloseSend(); err != nil {
		return err
	}
	if _, err := stream.Recv(); !errors.Is(err, io.EOF) {
		return fmt.Errorf("the stream does not end: %w", err)
	}
	_, err = bundlev1.NewBundleClient(n.conn).GetBundle(ctx, &bundlev1.GetBundleRequest{})
	return err
}

// storms: agents that all attest again in the same moment, as after a power cut.
func storms(t *testing.T, out *figures.Table) {
	maker := forge.NewMaker(t, "Bench TPMs")
	for _, s := range []struct {
		name string
		*side
	}{{"stock spire-server with our plugin", stock(t, maker)}, {"rootlink-server", ours(t, maker)}} {
		nodes := makeNodes(t, maker, *storm)
		attestAll(t, nodes, s.address, attesters)
		start := time.Now()
		waits := attestAll(t, nodes, s.address, len(nodes))
		took := time.Since(start)
		out.Line(fmt.Sprintf("%d agents attest again at once", len(nodes)), fmt.Sprintf("all after %s; %s", figures.Short(took), waits), "", s.name)
	}
}
