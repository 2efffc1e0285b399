package agent

import (
	"context"
	"crypto/sha256"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	workloadpb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/rootlink/rootlink/internal/measured"
	"github.com/rootlink/rootlink/internal/server"
	"github.com/rootlink/rootlink/plugins/tpmnode/nodeagent"
)

// benchAgent is an agent whose inside the benchmark can reach.
type benchAgent struct {
	*parts
	id     string
	socket string
}

func (w *realWorld) benchAgent(b *testing.B, opts ...nodeagent.Option) *benchAgent {
	b.Helper()
	log := slog.New(slog.DiscardHandler)
	cfg, plug := w.agentConfig(log)
	plug.nodeOptions = opts
	a, err := New(cfg)
	if err != nil {
		b.Fatal(err)
	}
	unlock, err := lockDataDir(cfg.DataDir)
	if err != nil {
		b.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	plugins, err := LoadPlugins(ctx, plug, log)
	if err != nil {
		b.Fatal(err)
	}
	p, err := a.assemble(plugins)
	if err != nil {
		b.Fatal(err)
	}
	l, err := measured.Listen(cfg.Socket, "--socket")
	if err != nil {
		b.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() { p.node.Run(ctx) })
	wg.Go(func() { p.keeper.Run(ctx) })
	wg.Go(func() { p.server.Serve(ctx, l) })
	b.Cleanup(func() {
		cancel()
		wg.Wait()
		plugins.Close()
		unlock()
	})
	for {
		changed := p.keeper.Changed()
		if v, err := p.keeper.View(); err == nil {
			return &benchAgent{p, v.AgentID.String(), cfg.Socket}
		}
		<-changed
	}
}

func (a *benchAgent) dial(b *testing.B) *grpc.ClientConn {
	b.Helper()
	c, err := grpc.NewClient("unix:"+a.socket, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithAuthority("localhost"))
	if err != nil {
		b.Fatal(err)
	}
	return c
}

func fetchOnce(ctx context.Context, c *grpc.ClientConn) (*workloadpb.X509SVIDResponse, error) {
	ctx, cancel := context.WithCancel(header(ctx))
	defer cancel()
	stream, err := workloadpb.NewSpiffeWorkloadAPIClient(c).FetchX509SVID(ctx, &workloadpb.X509SVIDRequest{})
	if err != nil {
		return nil, err
	}
	return stream.Recv()
}

// BenchmarkEntryToSVID: an entry is created at the server; how long until the
// workload that waits for it holds its SVID. The workload asks anew each time,
// on a connection of its own.
func BenchmarkEntryToSVID(b *testing.B) {
	w := newRealWorld(b)
	a := w.benchAgent(b)
	selector := selfHash(b)
	entries := entryv1.NewEntryClient(w.admin)
	var worst time.Duration
	for b.Loop() {
		b.StopTimer()
		time.Sleep(60 * time.Millisecond) // beyond the gap between syncs, as a person is
		b.StartTimer()
		start := time.Now()
		id := w.addEntry(a.id, "/w", selector)
		c := a.dial(b)
		if _, err := fetchOnce(b.Context(), c); err != nil {
			b.Fatal(err)
		}
		worst = max(worst, time.Since(start))
		b.StopTimer()
		c.Close()
		if _, err := entries.BatchDeleteEntry(b.Context(), &entryv1.BatchDeleteEntryRequest{Ids: []string{id}}); err != nil {
			b.Fatal(err)
		}
		if err := a.keeper.SyncNow(b.Context()); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
	}
	b.ReportMetric(float64(worst.Microseconds())/1000, "worst-ms")
}

// BenchmarkWarmSVID90MB: a workload whose executable has 90 MB fetches an SVID
// that is in the cache, over a connection that it opens for it.
func BenchmarkWarmSVID90MB(b *testing.B) {
	w := newRealWorld(b)
	a := w.benchAgent(b)
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		b.Fatal(err)
	}
	big := filepath.Join(b.TempDir(), "big")
	self = append(self, make([]byte, max(0, 90_000_000-len(self)))...)
	if err := os.WriteFile(big, self, 0o755); err != nil {
		b.Fatal(err)
	}
	w.addEntry(a.id, "/big", fmt.Sprintf("binary:sha256:%x", sha256.Sum256(self)))
	for b.Loop() {
		cmd := exec.Command(big)
		cmd.Env = append(os.Environ(), "ROOTLINK_TEST_ROLE=warm", "ROOTLINK_TEST_SOCKET="+a.socket, "ROOTLINK_TEST_N=200")
		out, err := cmd.CombinedOutput()
		if err != nil {
			b.Fatalf("%v\n%s", err, out)
		}
		var median, worst float64
		if _, err := fmt.Sscanf(string(out), "%g %g", &median, &worst); err != nil {
			b.Fatalf("%v\n%s", err, out)
		}
		b.ReportMetric(median, "ms/svid")
		b.ReportMetric(worst, "p99-ms")
	}
	b.ReportMetric(0, "ns/op") // of the whole helper, which means nothing
}

// BenchmarkEvidence: SVIDs with evidence from one node while every quote takes
// 250 ms, batched and not.
func BenchmarkEvidence(b *testing.B) {
	for _, c := range []struct {
		name    string
		callers int
		opts    []nodeagent.Option
	}{
		{"batched", 256, nil},
		{"unbatched", 8, []nodeagent.Option{nodeagent.WithMaxBatch(1)}},
	} {
		b.Run(c.name, func(b *testing.B) {
			w := newRealWorld(b, func(c *server.Config) { c.EvidencePatterns = []string{"spiffe://" + testTD + "/hw/*"} })
			a := w.benchAgent(b, append(c.opts, nodeagent.WithQuoteLatency(250*time.Millisecond))...)
			w.addEntry(a.id, "/hw/w", selfHash(b))
			if err := a.keeper.SyncNow(b.Context()); err != nil {
				b.Fatal(err)
			}
			v, err := a.keeper.View()
			if err != nil {
				b.Fatal(err)
			}
			var n atomic.Uint64
			var mu sync.Mutex
			var took []time.Duration
			start := time.Now()
			b.SetParallelism(c.callers) // times GOMAXPROCS
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					// Another path each time, so that none comes from the cache.
					subj, err := measured.NewSubject([]string{strings.TrimPrefix(selfHash(b), "binary:"), fmt.Sprint("path:/", n.Add(1))})
					if err != nil {
						b.Error(err)
						return
					}
					t0 := time.Now()
					if _, err := a.issuer.SVID(b.Context(), v.Entries[0], subj); err != nil {
						b.Error(err)
						return
					}
					mu.Lock()
					took = append(took, time.Since(t0))
					mu.Unlock()
				}
			})
			slices.Sort(took)
			b.ReportMetric(float64(len(took))/time.Since(start).Seconds(), "svids/s")
			if len(took) > 0 {
				b.ReportMetric(float64(took[len(took)*99/100].Milliseconds()), "p99-ms")
			}
		})
	}
}
