package tsa_test

import (
	"bytes"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/rootlink/rootlink/internal/tsa"
	"github.com/rootlink/rootlink/pkg/timestamp"
)

// Tokens are for anybody; 2,000 connections that asked for them without end kept
// those who wait for an SVID waiting for ten seconds.
func TestRefusesToSignForAllAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var inside atomic.Int32
		var hold chan struct{}
		c := tsa.Config{Dir: t.TempDir(), Name: "example.org", Log: slog.New(slog.DiscardHandler), Now: func() time.Time {
			if hold != nil {
				inside.Add(1)
				<-hold
			}
			return time.Now()
		}}
		a, err := tsa.Open(c)
		if err != nil {
			t.Fatal(err)
		}
		hold = make(chan struct{})
		q := query(t, nil)
		most := max(1, runtime.GOMAXPROCS(0)/2)
		var wg sync.WaitGroup
		for range most + 20 {
			wg.Go(func() {
				r := httptest.NewRequestWithContext(t.Context(), http.MethodPost, "/tsa", bytes.NewReader(q))
				r.Header.Set("Content-Type", timestamp.QueryType)
				w := httptest.NewRecorder()
				a.ServeHTTP(w, r)
				if w.Code != http.StatusOK || w.Body.Len() == 0 {
					t.Errorf("status %d", w.Code)
				}
			})
		}
		synctest.Wait()
		if n := int(inside.Load()); n != most {
			t.Errorf("%d at once, want %d", n, most)
		}
		close(hold) // and all are answered
		wg.Wait()
	})
}
