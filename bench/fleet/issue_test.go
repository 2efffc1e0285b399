//go:build bench

package fleet

import (
	"context"
	"fmt"
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

// round measures calls by all callers at once for a while; each call is worth n.
func round(t *testing.T, waits *figures.Samples, n int, call func(i int) error) float64 {
	t.Helper()
	var mu sync.Mutex
	rate, err := figures.PerSecond(roundTime, callers, func(i int) error {
		start := time.Now()
		err := call(i)
		mu.Lock()
		*waits = append(*waits, time.Since(start))
		mu.Unlock()
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return rate * float64(n)
}

// beside prints ours and the stock server's rates of the same rounds, and how
// far each is from the floor of the run.
func beside(out *figures.Table, figure, unit string, least float64, ours, stock, floor []float64, ourWaits, stockWaits figures.Samples, what string) {
	var ratios []float64
	for i := range ours {
		ratios = append(ratios, ours[i]/stock[i])
	}
	aim := fmt.Sprintf("≥ %g × stock", least)
	if figures.Middle(ratios) < least {
		aim += " MISSED"
	}
	out.Line(figure, fmt.Sprintf("%.0f/s (p99 of a call %s)", figures.Middle(ours), figures.Short(ourWaits.At(0.99))), aim,
		fmt.Sprintf("%.2f × stock (%.2f … %.2f); %.0f %% of the floor", figures.Middle(ratios), slices.Min(ratios), slices.Max(ratios), 100*figures.Middle(ours)/figures.Middle(floor)))
	out.Line("  stock spire-server", fmt.Sprintf("%.0f/s (p99 of a call %s)", figures.Middle(stock), figures.Short(stockWaits.At(0.99))), "",
		fmt.Sprintf("%.0f %% of the floor", 100*figures.Middle(stock)/figures.Middle(floor)))
	out.Line("  the floor: "+what, fmt.Sprintf("%.0f%s/s", figures.Middle(floor), unit), "", "no server; the same callers, all cores")
}

// mint: MintX509SVID over the admin sockets, turn and turn about.
func mint(t *testing.T, out *figures.Table) {
	maker := forge.NewMaker(t, "Bench TPMs")
	both := []*side{ours(t, maker), stock(t, maker)}
	var csrs [][]byte
	for i := range callers {
		csrs = append(csrs, newCSR(t, fmt.Sprintf("/mint/%d", i)))
	}
	rates, waits, floors := make([][]float64, 2), make([]figures.Samples, 2), []float64{}
	for range *runs {
		for i, s := range both {
			client := svidv1.NewSVIDClient(s.admin)
			rates[i] = append(rates[i], round(t, &waits[i], 1, func(i int) error {
				_, err := client.MintX509SVID(t.Context(), &svidv1.MintX509SVIDRequest{Csr: csrs[i]})
				return err
			}))
		}
		f, err := figures.MintFloor(csrs)
		if err != nil {
			t.Fatal(err)
		}
		floors = append(floors, f)
	}
	beside(out, "MintX509SVID, 8 callers", "", 1.8, rates[0], rates[1], floors, waits[0], waits[1], "check a CSR, sign")
}

// batch: BatchNewX509SVID as a stock agent asks for SVIDs, 50 CSRs a call.
func batch(t *testing.T, out *figures.Table) {
	maker := forge.NewMaker(t, "Bench TPMs")
	both := []*side{ours(t, maker), stock(t, maker)}
	var csrs [][]byte
	for i := range callers {
		csrs = append(csrs, newCSR(t, fmt.Sprintf("/batch/%d", i)))
	}
	var clients []svidv1.SVIDClient
	var requests [][]*svidv1.BatchNewX509SVIDRequest
	for _, s := range both {
		n := newNode(t, maker, 0)
		if err := n.attest(t.Context(), t, s.address); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(n.close)
		client := svidv1.NewSVIDClient(n.conn)
		clients = append(clients, client)
		var all []*svidv1.BatchNewX509SVIDRequest
		for i := range callers {
			id := s.create(entry(n.path, fmt.Sprintf("/batch/%d", i), "unix:uid:0"))[0]
			req := new(svidv1.BatchNewX509SVIDRequest)
			for range batchSize {
				req.Params = append(req.Params, &svidv1.NewX509SVIDParams{EntryId: id, Csr: csrs[i]})
			}
			all = append(all, req)
		}
		requests = append(requests, all)
		s.until("", func() bool { return ask(t.Context(), client, all[callers-1]) == nil }) // stock SPIRE's cache
	}
	rates, waits, floors := make([][]float64, 2), make([]figures.Samples, 2), []float64{}
	for range *runs {
		for i := range both {
			rates[i] = append(rates[i], round(t, &waits[i], batchSize, func(c int) error {
				return ask(t.Context(), clients[i], requests[i][c])
			}))
		}
		f, err := figures.MintFloor(csrs)
		if err != nil {
			t.Fatal(err)
		}
		floors = append(floors, f)
	}
	beside(out, "BatchNewX509SVID, 50 a call, 8 callers", "", 2, rates[0], rates[1], floors, waits[0], waits[1], "check a CSR, sign")
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
