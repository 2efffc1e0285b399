package agent

import (
	"context"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// watched is what a helper that writes SVIDs to files keeps of a watch: the last
// update, and every error, after which it goes on.
type watched struct {
	mu     sync.Mutex
	ids    []string
	jwt    int // JWT keys of our trust domain
	denied int
	gone   int
}

func (w *watched) OnX509ContextUpdate(c *workloadapi.X509Context) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.ids = nil
	for _, s := range c.SVIDs {
		w.ids = append(w.ids, s.ID.Path())
	}
}

func (w *watched) OnX509ContextWatchError(err error) { w.failed(err) }
func (w *watched) OnJWTBundlesWatchError(err error)  { w.failed(err) }

func (w *watched) failed(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	switch status.Code(err) {
	case codes.PermissionDenied:
		w.denied++
	default:
		w.gone++
	}
}

func (w *watched) OnJWTBundlesUpdate(s *jwtbundle.Set) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if b, ok := s.Get(spiffeid.RequireTrustDomainFromString(testTD)); ok {
		w.jwt = len(b.JWTAuthorities())
	}
}

func (w *watched) is(f func() bool) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return f()
}

// go-spiffe's watches, on which spiffe-helper rests: without an identity they are
// refused and try again; they have each change, what is withdrawn is refused
// again, and a new agent on the same socket is found.
func TestGoSPIFFEWatches(t *testing.T) {
	s := newFakeServer(t)
	s.jwt.ttl = 5 * time.Minute
	s.rotateJWT(true)
	s.start()
	r := startAgent(t, s)
	r.waitReady()
	client, err := workloadapi.New(testContext(t), workloadapi.WithAddr("unix:"+r.socket))
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	ctx, cancel := context.WithCancel(t.Context())
	w := new(watched)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	wg.Go(func() { _ = client.WatchX509Context(ctx, w) })
	wg.Go(func() { _ = client.WatchJWTBundles(ctx, w) })

	eventually(t, "both are refused", func() bool { return w.is(func() bool { return w.denied >= 2 }) })
	id := s.addEntry("/w", selfHash(t))
	eventually(t, "both are served", func() bool { return w.is(func() bool { return len(w.ids) == 1 && w.jwt == 1 }) })
	s.addEntry("/second", selfHash(t))
	s.rotateJWT(true)
	eventually(t, "changes are seen", func() bool { return w.is(func() bool { return len(w.ids) == 2 && w.jwt == 2 }) })

	x509Source, err := workloadapi.NewX509Source(ctx, workloadapi.WithClient(client))
	if err != nil {
		t.Fatal(err)
	}
	defer x509Source.Close()
	if got, err := x509Source.GetX509SVID(); err != nil || got.ID.Path() != "/w" {
		t.Fatal(got, err)
	}
	jwtSource, err := workloadapi.NewJWTSource(ctx, workloadapi.WithClient(client))
	if err != nil {
		t.Fatal(err)
	}
	defer jwtSource.Close()
	token, err := jwtSource.FetchJWTSVID(ctx, jwtsvid.Params{Audience: "reports", Subject: spiffeid.RequireFromString("spiffe://" + testTD + "/second")})
	if err != nil || token.ID.Path() != "/second" {
		t.Fatal(token, err)
	}
	if got, err := jwtsvid.ParseAndValidate(token.Marshal(), jwtSource, []string{"reports"}); err != nil || got.ID != token.ID {
		t.Fatal(got, err)
	}
	if got, err := client.ValidateJWTSVID(ctx, token.Marshal(), "reports"); err != nil || got.ID != token.ID {
		t.Fatal(got, err)
	}
	if _, err := client.ValidateJWTSVID(ctx, token.Marshal(), "payroll"); status.Code(err) != codes.InvalidArgument {
		t.Error(err)
	}

	s.deleteEntry(id)
	eventually(t, "one is withdrawn", func() bool { return w.is(func() bool { return len(w.ids) == 1 && w.ids[0] == "/second" }) })
	var before int
	w.is(func() bool { before = w.gone; return true })
	r.stop()
	<-r.done
	eventually(t, "the agent's end is seen", func() bool { return w.is(func() bool { return w.gone > before }) })
	s.addEntry("/third", selfHash(t))
	again := startAgent(t, s, func(c *Config) { c.Socket = r.socket })
	again.waitReady()
	eventually(t, "another agent on the socket is found", func() bool { return w.is(func() bool { return len(w.ids) == 2 && w.ids[1] == "/third" }) })
}
