package identity

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/rootlink/rootlink/internal/agent/upstream"
	"github.com/rootlink/rootlink/internal/measured"
	"github.com/rootlink/rootlink/pkg/attest"
)

// TestBatchGathers: the first CSR goes out at once, all that come while its
// call runs share the next, and no call has more than the server takes.
func TestBatchGathers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		var sizes []int
		b := &batcher{sign: func(_ context.Context, reqs []upstream.SignRequest) ([]upstream.SignResult, error) {
			mu.Lock()
			sizes = append(sizes, len(reqs))
			mu.Unlock()
			time.Sleep(time.Second)
			out := make([]upstream.SignResult, len(reqs))
			for i, r := range reqs {
				out[i].Chain = [][]byte{r.CSR}
			}
			return out, nil
		}}
		var wg sync.WaitGroup
		ask := func(i int) {
			wg.Go(func() {
				csr := []byte(fmt.Sprint(i))
				if chain, err := b.do(t.Context(), upstream.SignRequest{CSR: csr}); err != nil || string(chain[0]) != string(csr) {
					t.Errorf("CSR %d: %q %v", i, chain, err)
				}
			})
		}
		start := time.Now()
		ask(0)
		synctest.Wait()
		for i := 1; i <= 3*maxBatch-10; i++ {
			ask(i)
		}
		wg.Wait()
		if want := []int{1, maxBatch, maxBatch, maxBatch - 10}; !slices.Equal(sizes, want) {
			t.Errorf("batches %v, want %v", sizes, want)
		}
		if d := time.Since(start); d != 4*time.Second {
			t.Errorf("took %v", d)
		}
	})
}

// TestBatchCallsAtOnce: a second call does not wait for the first, a third does.
func TestBatchCallsAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		running, most := 0, 0
		b := &batcher{calls: 2, sign: func(_ context.Context, reqs []upstream.SignRequest) ([]upstream.SignResult, error) {
			mu.Lock()
			running++
			most = max(most, running)
			mu.Unlock()
			time.Sleep(time.Second)
			mu.Lock()
			running--
			mu.Unlock()
			return make([]upstream.SignResult, len(reqs)), nil
		}}
		var wg sync.WaitGroup
		start := time.Now()
		for range 5 {
			wg.Go(func() {
				if _, err := b.do(t.Context(), upstream.SignRequest{}); err != nil {
					t.Error(err)
				}
			})
			synctest.Wait()
		}
		wg.Wait()
		if d := time.Since(start); most != 2 || d != 2*time.Second {
			t.Errorf("%d calls at once, %v in all", most, d)
		}
	})
}

// TestBatchShortAnswer: a server that keeps its reply small answers a part; the
// rest is asked again, in order.
func TestBatchShortAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		calls := 0
		b := &batcher{sign: func(_ context.Context, reqs []upstream.SignRequest) ([]upstream.SignResult, error) {
			calls++
			time.Sleep(time.Millisecond)
			n := min(2, len(reqs))
			out := make([]upstream.SignResult, n)
			for i := range n {
				out[i].Chain = [][]byte{reqs[i].CSR}
			}
			return out, nil
		}}
		var wg sync.WaitGroup
		for i := range 7 {
			wg.Go(func() {
				if chain, err := b.do(t.Context(), upstream.SignRequest{CSR: []byte{byte(i)}}); err != nil || chain[0][0] != byte(i) {
					t.Errorf("CSR %d: %v %v", i, chain, err)
				}
			})
		}
		wg.Wait()
		if calls < 4 || calls > 5 {
			t.Errorf("%d calls", calls)
		}
	})
}

// TestBatchFailure: an error reaches all of its batch and none after it, and
// whoever has gone away is not asked for.
func TestBatchFailure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fail := true
		var asked []int
		b := &batcher{sign: func(_ context.Context, reqs []upstream.SignRequest) ([]upstream.SignResult, error) {
			asked = append(asked, len(reqs))
			time.Sleep(time.Second)
			if fail {
				fail = false
				return nil, status.Error(codes.Unavailable, "away")
			}
			return make([]upstream.SignResult, len(reqs)), nil
		}}
		gone, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() {
			if _, err := b.do(t.Context(), upstream.SignRequest{}); status.Code(err) != codes.Unavailable {
				t.Errorf("first: %v", err)
			}
		})
		synctest.Wait()
		wg.Go(func() {
			if _, err := b.do(gone, upstream.SignRequest{}); status.Code(err) != codes.Canceled {
				t.Errorf("gone: %v", err)
			}
		})
		wg.Go(func() {
			if _, err := b.do(t.Context(), upstream.SignRequest{}); err != nil {
				t.Errorf("after the failure: %v", err)
			}
		})
		synctest.Wait()
		cancel()
		wg.Wait()
		if !slices.Equal(asked, []int{1, 1}) {
			t.Errorf("calls of %v CSRs, want 1 and 1", asked)
		}
	})
}

func TestBatchBytes(t *testing.T) {
	b := &batcher{}
	for range 100 {
		b.queue = append(b.queue, &signItem{ctx: t.Context(), req: upstream.SignRequest{CSR: make([]byte, 60<<10)}})
	}
	if n := len(b.take()); n != maxBatchBytes/(60<<10) {
		t.Errorf("%d CSRs of 60 KiB in one call", n)
	}
	b.queue = []*signItem{{ctx: t.Context(), req: upstream.SignRequest{CSR: make([]byte, maxBatchBytes+1)}}}
	if n := len(b.take()); n != 1 {
		t.Error("a large one never goes out")
	}
}

// TestNonceIsPrefetched: while in use a nonce is always at hand and never older
// than 20 s; out of use none is fetched.
func TestNonceIsPrefetched(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		made := map[[32]byte]time.Time{}
		var mu sync.Mutex
		n := &nonces{now: time.Now, fetch: func(context.Context) (v [32]byte, err error) {
			time.Sleep(100 * time.Millisecond)
			mu.Lock()
			defer mu.Unlock()
			v[0], v[1] = byte(len(made)+1), 1
			made[v] = time.Now()
			return v, nil
		}}
		get := func() (age, took time.Duration) {
			start := time.Now()
			v, err := n.get(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			mu.Lock()
			defer mu.Unlock()
			return time.Since(made[v]), time.Since(start)
		}
		if _, took := get(); took != 100*time.Millisecond {
			t.Errorf("the first took %v", took)
		}
		for range 200 {
			time.Sleep(700 * time.Millisecond)
			if age, took := get(); took != 0 || age > nonceMaxAge {
				t.Fatalf("age %v, took %v", age, took)
			}
		}
		time.Sleep(nonceIdle + 2*nonceRefresh)
		mu.Lock()
		before := len(made)
		mu.Unlock()
		time.Sleep(time.Hour)
		mu.Lock()
		if len(made) != before {
			t.Errorf("%d fetched while idle", len(made)-before)
		}
		mu.Unlock()
		if age, took := get(); took == 0 || age > time.Second {
			t.Errorf("after idling: age %v, took %v", age, took)
		}
		// One that the server refused is not handed out again.
		v, _ := n.get(t.Context())
		n.forget(v)
		if w, err := n.get(t.Context()); err != nil || w == v {
			t.Errorf("refused nonce came back (%v)", err)
		}
		time.Sleep(time.Hour) // lets the last refresh end
	})
}

func TestNonceErrorIsNotKept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fail := errors.New("away")
		n := &nonces{now: time.Now, fetch: func(context.Context) ([32]byte, error) { return [32]byte{1}, fail }}
		if _, err := n.get(t.Context()); err == nil {
			t.Error("no error")
		}
		fail = nil
		if _, err := n.get(t.Context()); err != nil {
			t.Error(err)
		}
		time.Sleep(time.Hour)
	})
}

func entry(id string, selectors ...string) *Entry {
	e := &types.Entry{Id: id, SpiffeId: &types.SPIFFEID{TrustDomain: "example.test", Path: "/" + id}}
	for _, s := range selectors {
		typ, value, _ := strings.Cut(s, ":")
		e.Selectors = append(e.Selectors, &types.Selector{Type: typ, Value: value})
	}
	return newEntry(e)
}

func names(es []*Entry) string {
	var out []string
	for _, e := range es {
		out = append(out, e.ID)
	}
	return strings.Join(out, " ")
}

func TestMatching(t *testing.T) {
	const (
		self, uid    = "binary:sha256:s", "binary:uid:1"
		rec, unprot  = attest.SelectorRecorder + "s", attest.SelectorUnprotectedRecorder + "s"
		env, gocmd   = attest.SelectorTool + "env", attest.SelectorTool + "go"
		other, extra = attest.SelectorTool + "other", "k8s:ns:x"
	)
	v := &View{Entries: []*Entry{
		entry("plain", self), entry("both", self, uid), entry("elsewhere", self, extra),
		entry("go", gocmd, rec), entry("go-unprotected", gocmd, unprot), entry("env-go", env, gocmd, rec),
		entry("go-as-uid", gocmd, rec, uid), entry("no-tool", rec), entry("no-recorder", gocmd),
	}}
	if got := names(v.Workload([]string{self, uid})); got != "plain both" {
		t.Errorf("workload: %s", got)
	}
	// Even a caller whose selectors hold a step's (no plugin may say so) is no step.
	if got := names(v.Workload([]string{self, rec, gocmd})); got != "plain" {
		t.Errorf("workload with a step's selectors: %s", got)
	}
	for _, c := range []struct {
		base, tools       []string
		complete, partial string
	}{
		{[]string{self, uid, rec}, []string{gocmd}, "go go-as-uid", "env-go"},
		{[]string{self, rec}, []string{gocmd}, "go", "env-go"},
		{[]string{self, unprot}, []string{gocmd}, "go-unprotected", ""},
		{[]string{self, rec}, []string{env}, "", "env-go"},
		{[]string{self, rec}, []string{env, gocmd}, "env-go", ""},
		{[]string{self, rec}, []string{env, gocmd, other}, "", ""},
		{[]string{self, rec}, []string{other}, "", ""},
		{[]string{self}, []string{gocmd}, "", ""},
	} {
		complete, partial := v.Steps(measured.Seen{Base: c.base, Tools: c.tools})
		if names(complete) != c.complete || names(partial) != c.partial {
			t.Errorf("base %v, tools %v: complete %q, partial %q", c.base, c.tools, names(complete), names(partial))
		}
	}
	if e := v.Nearest([]string{self}, false); e.ID != "both" && e.ID != "plain" {
		t.Errorf("nearest %s", e.ID)
	}
	if e := v.Nearest([]string{"binary:uid:9"}, false); e != nil {
		t.Errorf("nearest of nothing in common: %s", e.ID)
	}
	if e := v.Nearest([]string{rec, other}, true); e == nil || !e.Step() {
		t.Errorf("nearest step: %v", e)
	}
}

func TestEntriesThatNameNoWorkload(t *testing.T) {
	good := func() *types.Entry {
		return &types.Entry{Id: "x", SpiffeId: &types.SPIFFEID{TrustDomain: "example.test", Path: "/x"}, Selectors: []*types.Selector{{Type: "a", Value: "b"}}}
	}
	if newEntry(good()) == nil {
		t.Fatal("a good one is left out")
	}
	for what, change := range map[string]func(*types.Entry){
		"no selector":      func(e *types.Entry) { e.Selectors = nil },
		"stored":           func(e *types.Entry) { e.StoreSvid = true },
		"no ID":            func(e *types.Entry) { e.SpiffeId = nil },
		"bad path":         func(e *types.Entry) { e.SpiffeId.Path = "//" },
		"bad trust domain": func(e *types.Entry) { e.SpiffeId.TrustDomain = "A B" },
	} {
		e := good()
		change(e)
		if newEntry(e) != nil {
			t.Errorf("%s: taken", what)
		}
	}
}
