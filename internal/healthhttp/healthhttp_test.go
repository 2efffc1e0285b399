package healthhttp

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"

	"github.com/rootlink/rootlink/internal/cli"
)

func TestProbes(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	var log strings.Builder
	f := Flags{Listen: "127.0.0.1:0", LivePath: "/live", ReadyPath: "/ready"}
	stop, err := f.Start(socket, slog.New(slog.NewTextHandler(&log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	stopped := sync.OnceFunc(stop)
	defer stopped()
	addr := regexp.MustCompile(`address=(\S+)`).FindStringSubmatch(log.String())[1]
	get := func(path string) int {
		r, err := http.Get("http://" + addr + path)
		if err != nil {
			t.Fatal(err)
		}
		r.Body.Close()
		return r.StatusCode
	}
	// Nobody is behind the socket yet.
	if live, ready := get("/live"), get("/ready"); live != 200 || ready != 503 || get("/") != 404 {
		t.Errorf("live %d, ready %d", live, ready)
	}
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	g, h := grpc.NewServer(), health.NewServer()
	grpc_health_v1.RegisterHealthServer(g, h)
	go g.Serve(l)
	defer g.Stop()
	for _, step := range []struct {
		status grpc_health_v1.HealthCheckResponse_ServingStatus
		want   int
	}{{grpc_health_v1.HealthCheckResponse_SERVING, 200}, {grpc_health_v1.HealthCheckResponse_NOT_SERVING, 503}} {
		h.SetServingStatus("", step.status)
		for get("/ready") != step.want {
			select {
			case <-t.Context().Done():
				t.Fatalf("never %d", step.want)
			case <-time.After(50 * time.Millisecond):
			}
		}
	}
	if live := get("/live"); live != 200 {
		t.Errorf("live %d", live)
	}
	stopped()
	if _, err := http.Get("http://" + addr + "/live"); err == nil {
		t.Error("still answered after stop")
	}
}

// However many ask, the daemon is asked once a second.
func TestRefusesToMultiplyProbes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var asked atomic.Int64
		p := &probe{ask: func(context.Context) error { asked.Add(1); return errors.New("down") }}
		var wg sync.WaitGroup
		for range 100 {
			wg.Go(func() {
				if p.check() == nil {
					t.Error("well")
				}
			})
		}
		wg.Wait()
		if n := asked.Load(); n != 1 {
			t.Errorf("asked %d times", n)
		}
		time.Sleep(fresh)
		p.check()
		if n := asked.Load(); n != 2 {
			t.Errorf("asked %d times", n)
		}
	})
}

func TestRefusesFlags(t *testing.T) {
	for _, f := range []Flags{
		{"8080", "/live", "/ready"}, {"", "/live", "/ready"}, {":1", "live", "/ready"}, {":1", "/live", ""}, {":1", "/a", "/a"}, {":1", "/{x}", "/ready"},
	} {
		if err := f.Check(); cli.ExitCode(err) != cli.ExitUsage {
			t.Errorf("%+v: %v", f, err)
		}
	}
}
