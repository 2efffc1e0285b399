// Package healthhttp answers probes over HTTP, as Kubernetes sends them. It asks
// the daemon over its own socket, so that a probe sees what a client would.
package healthhttp

import (
	"context"
	"errors"
	"fmt"
	"log"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/spf13/pflag"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"

	"github.com/rootlink/rootlink/internal/cli"
)

// The port may be open to a whole network, and whoever asks costs the daemon a
// look at its database: probes within fresh of each other share one.
const (
	fresh    = time.Second
	timeout  = 5 * time.Second // for each of: the header, the check, the answer
	maxConns = 64
)

// Flags are a daemon's settings for it.
type Flags struct{ Listen, LivePath, ReadyPath string }

// Add adds the flags.
func (f *Flags) Add(fs *pflag.FlagSet) {
	fs.StringVar(&f.Listen, "health-listen", "off", "HOST:PORT for health probes over HTTP, or off")
	fs.StringVar(&f.LivePath, "health-live-path", "/live", "path that answers 200 while the program runs")
	fs.StringVar(&f.ReadyPath, "health-ready-path", "/ready", "path that answers 200 while healthcheck would succeed")
}

// Check fails on flags that cannot be meant.
func (f *Flags) Check() error {
	if f.Listen == "off" {
		return nil
	}
	if _, _, err := net.SplitHostPort(f.Listen); err != nil {
		return cli.Usage("HOST:PORT, or off", "--health-listen %s: %w", f.Listen, err)
	}
	for _, p := range []string{f.LivePath, f.ReadyPath} {
		if !strings.HasPrefix(p, "/") || strings.ContainsAny(p, "{} ?#%") {
			return cli.Usage("such as /ready", "health path %q", p)
		}
	}
	if f.LivePath == f.ReadyPath {
		return cli.Usage("", "--health-live-path and --health-ready-path are both %s", f.LivePath)
	}
	return nil
}

// Start serves probes about the daemon behind a Unix socket until the returned
// function is called. Without --health-listen it does nothing.
func (f *Flags) Start(socket string, logger *slog.Logger) (stop func(), err error) {
	if err := f.Check(); err != nil {
		return nil, err
	}
	if f.Listen == "off" {
		return func() {}, nil
	}
	conn, err := grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, err
	}
	l, err := net.Listen("tcp", f.Listen)
	if err != nil {
		conn.Close()
		return nil, cli.Hint(fmt.Errorf("health probes: %w", err), "choose another address with --health-listen")
	}
	p := &probe{ask: func(ctx context.Context) error { return ask(ctx, conn) }}
	mux := http.NewServeMux()
	mux.HandleFunc("GET "+f.LivePath, func(w http.ResponseWriter, _ *http.Request) { answer(w, nil) })
	mux.HandleFunc("GET "+f.ReadyPath, func(w http.ResponseWriter, _ *http.Request) { answer(w, p.check()) })
	s := &http.Server{
		Handler: mux, ReadTimeout: timeout, WriteTimeout: 3 * timeout, MaxHeaderBytes: 8 << 10,
		ErrorLog: log.New(debug{logger}, "", 0),
	}
	s.SetKeepAlivesEnabled(false) // a place is free again after each answer
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := s.Serve(&limited{Listener: l, places: make(chan struct{}, maxConns)}); !errors.Is(err, http.ErrServerClosed) {
			logger.Error("health probes are answered no more", "error", err)
		}
	}()
	logger.Info("health probes", "address", l.Addr().String(), "live", f.LivePath, "ready", f.ReadyPath)
	return func() { s.Close(); <-done; conn.Close() }, nil
}

func ask(ctx context.Context, conn *grpc.ClientConn) error {
	// SPIFFE Workload Endpoint, 3: the agent's socket demands it of every call.
	ctx = metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", "true")
	r, err := grpc_health_v1.NewHealthClient(conn).Check(ctx, new(grpc_health_v1.HealthCheckRequest))
	if err == nil && r.Status != grpc_health_v1.HealthCheckResponse_SERVING {
		err = errors.New(r.Status.String())
	}
	return err
}

// answer says no more than it must: anybody may ask.
func answer(w http.ResponseWriter, err error) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.Header().Set("Cache-Control", "no-store")
	if err != nil {
		w.WriteHeader(http.StatusServiceUnavailable)
		fmt.Fprintln(w, "not ready")
		return
	}
	fmt.Fprintln(w, "ok")
}

// probe asks at most once in fresh; whoever comes meanwhile has the same answer.
type probe struct {
	ask func(context.Context) error

	mu  sync.Mutex // held while asking
	at  time.Time  // of the last answer
	err error
}

func (p *probe) check() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.at.IsZero() && time.Since(p.at) < fresh {
		return p.err
	}
	// Not the request's: one that goes away must not decide for the others.
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	p.err = p.ask(ctx)
	p.at = time.Now()
	return p.err
}

// limited bounds how many connections are open.
type limited struct {
	net.Listener
	places chan struct{}
}

func (l *limited) Accept() (net.Conn, error) {
	l.places <- struct{}{}
	c, err := l.Listener.Accept()
	if err != nil {
		<-l.places
		return nil, err
	}
	return &place{Conn: c, free: sync.OnceFunc(func() { <-l.places })}, nil
}

type place struct {
	net.Conn
	free func()
}

func (p *place) Close() error {
	defer p.free()
	return p.Conn.Close()
}

// debug is where net/http reports what strangers send.
type debug struct{ log *slog.Logger }

func (d debug) Write(b []byte) (int, error) {
	d.log.Debug("health probes", "error", strings.TrimSpace(string(b)))
	return len(b), nil
}
