//go:build bench

package fleet

import (
	"context"
	"fmt"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"

	"github.com/rootlink/rootlink/bench/figures"
	"github.com/rootlink/rootlink/internal/forge"
)

const (
	callers   = 8
	roundTime = 3 * time.Second
	batchSize = 50
)

// rounds are what was measured of one server.
type rounds struct {
	rates []float64       // SVIDs a second, by round
	waits figures.Samples // of calls
	cpu   time.Duration   // that the server used for all of them
	svids int
}

// round has callers call s at once for a while; each call is worth n SVIDs.
func (r *rounds) round(t *testing.T, s *side, callers, n int, call func(i int) error) {
	t.Helper()
	before, err := figures.CPUTime(s.pid)
	if err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	rate, err := figures.PerSecond(roundTime, callers, func(i int) error {
		start := time.Now()
		err := call(i)
		mu.Lock()
		r.waits, r.svids = append(r.waits, time.Since(start)), r.svids+n
		mu.Unlock()
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	after, err := figures.CPUTime(s.pid)
	if err != nil {
		t.Fatal(err)
	}
	r.rates, r.cpu = append(r.rates, rate*float64(n)), r.cpu+after-before
}

// each is the CPU time for one SVID.
func (r *rounds) each() time.Duration { return r.cpu / time.Duration(max(1, r.svids)) }

func (r *rounds) String() string {
	return fmt.Sprintf("%.0f/s (p99 of a call %s)", figures.Middle(r.rates), figures.Short(r.waits.At(0.99)))
}

// beside prints ours and the stock server's figures of the same rounds, and how
// far each is from the floor of the run. Rates are what callers and server make
// of all cores together; the server's CPU time holds on a busy machine too.
func beside(out *figures.Table, figure string, least float64, ours, stock, floor *rounds) {
	var ratios []float64
	for i := range ours.rates {
		ratios = append(ratios, ours.rates[i]/stock.rates[i])
	}
	aim := fmt.Sprintf("≥ %g × stock", least)
	if figures.Middle(ratios) < least {
		aim += " MISSED"
	}
	base := figures.Middle(floor.rates)
	line := func(r *rounds) string {
		return fmt.Sprintf("%.0f %% of the floor; CPU of the server for one: %s", 100*figures.Middle(r.rates)/base, figures.Short(r.each()))
	}
	out.Line(figure, ours.String(), aim, fmt.Sprintf("%.2f × stock (%.2f … %.2f), by the server's CPU time %.2f ×; %s",
		figures.Middle(ratios), slices.Min(ratios), slices.Max(ratios), float64(stock.each())/float64(ours.each()), line(ours)))
	out.Line("  stock spire-server", stock.String(), "", line(stock))
	out.Line("  the floor: check a CSR, sign", fmt.Sprintf("%.0f/s", base), "",
		fmt.Sprintf("no server, no callers, all cores: %.2f × stock; CPU for one: %s, by which %.2f × stock is all there is",
			base/figures.Middle(stock.rates), figures.Short(floor.each()), float64(stock.each())/float64(floor.each())))
}

// floor is the least that SVIDs cost: the same check and signature in this
// process and nothing else.
func (r *rounds) floor(t *testing.T, csrs [][]byte) {
	t.Helper()
	before, err := figures.CPUTime(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	rate, err := figures.MintFloor(csrs)
	if err != nil {
		t.Fatal(err)
	}
	took := time.Since(start)
	after, err := figures.CPUTime(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	r.rates, r.cpu, r.svids = append(r.rates, rate), r.cpu+after-before, r.svids+int(rate*took.Seconds())
}

// mint: MintX509SVID over the admin sockets, turn and turn about.
func mint(t *testing.T, out *figures.Table) {
	maker := forge.NewMaker(t, "Bench TPMs")
	both := []*side{ours(t, maker), stock(t, maker)}
	var csrs [][]byte
	for i := range callers {
		csrs = append(csrs, newCSR(t, fmt.Sprintf("/mint/%d", i)))
	}
	results, floor := []*rounds{{}, {}}, new(rounds)
	for range *runs {
		for i, s := range both {
			client := svidv1.NewSVIDClient(s.admin)
			results[i].round(t, s, callers, 1, func(i int) error {
				_, err := client.MintX509SVID(t.Context(), &svidv1.MintX509SVIDRequest{Csr: csrs[i]})
				return err
			})
		}
		floor.floor(t, csrs)
	}
	beside(out, "MintX509SVID, 8 callers", 1.8, results[0], results[1], floor)
}

// batch: BatchNewX509SVID as a stock agent asks for SVIDs, 50 CSRs a call, by
// eight agents at once and by one. Every CSR is of its own key: no answer can be
// known from an earlier item of the call.
func batch(t *testing.T, out *figures.Table) {
	maker := forge.NewMaker(t, "Bench TPMs")
	both := []*side{ours(t, maker), stock(t, maker)}
	csrs := make([][]byte, callers*batchSize)
	for i := range csrs {
		csrs[i] = newCSR(t, fmt.Sprintf("/batch/%d", i/batchSize))
	}
	clients := make([][]svidv1.SVIDClient, len(both)) // by side and caller
	requests := make([][]*svidv1.BatchNewX509SVIDRequest, len(both))
	for k, s := range both {
		for i := range callers {
			n := newNode(t, maker, i)
			if err := n.attest(t.Context(), t, s.address); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(n.close)
			id := s.create(entry(n.path, fmt.Sprintf("/batch/%d", i), "unix:uid:0"))[0]
			req := new(svidv1.BatchNewX509SVIDRequest)
			for _, csr := range csrs[i*batchSize:][:batchSize] {
				req.Params = append(req.Params, &svidv1.NewX509SVIDParams{EntryId: id, Csr: csr})
			}
			clients[k], requests[k] = append(clients[k], svidv1.NewSVIDClient(n.conn)), append(requests[k], req)
		}
		// Stock SPIRE learns of entries every few seconds.
		for i := range callers {
			s.until("", func() bool { return ask(t.Context(), clients[k][i], requests[k][i]) == nil })
		}
	}
	for _, c := range []struct {
		figure  string
		callers int
	}{{"BatchNewX509SVID, 50 a call, 8 agents", callers}, {"BatchNewX509SVID, 50 a call, one agent", 1}} {
		results, floor := []*rounds{{}, {}}, new(rounds)
		for range *runs {
			for k, s := range both {
				results[k].round(t, s, c.callers, batchSize, func(i int) error { return ask(t.Context(), clients[k][i], requests[k][i]) })
			}
			floor.floor(t, csrs[:callers])
		}
		beside(out, c.figure, 2, results[0], results[1], floor)
	}
}

// ask sends one batch and fails unless every SVID came.
func ask(ctx context.Context, client svidv1.SVIDClient, req *svidv1.BatchNewX509SVIDRequest) error {
	resp, err := client.BatchNewX509SVID(ctx, req)
	if err != nil {
		return err
	}
	if len(resp.Results) != len(req.Params) {
		return fmt.Errorf("%d results for %d CSRs", len(resp.Results), len(req.Params))
	}
	for _, r := range resp.Results {
		if r.GetStatus().GetCode() != 0 || len(r.GetSvid().GetCertChain()) == 0 {
			return fmt.Errorf("refused: %s", r.GetStatus().GetMessage())
		}
	}
	return nil
}
