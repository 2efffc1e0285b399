package catalog

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"reflect"
	"runtime/debug"
	"slices"
	"time"

	"github.com/spiffe/spire-plugin-sdk/pluginsdk"
	configv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/service/common/config/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
)

// pipeBuffer is the size in bytes of the in-memory pipe; a larger message
// passes through in pieces.
const pipeBuffer = 64 << 10

// BuiltIn is a plugin whose code is part of this program.
type BuiltIn struct {
	Name     string
	Plugin   pluginsdk.PluginServer
	Services []pluginsdk.ServiceServer // Config, and any of our own
}

// LoadBuiltIn starts a built-in plugin behind an in-memory connection. The
// plugin is not configured yet.
func LoadBuiltIn(ctx context.Context, b BuiltIn, o Options) (*Plugin, error) {
	switch {
	case b.Name == "":
		return nil, errors.New("plugin has no name")
	case b.Plugin == nil:
		return nil, fmt.Errorf("plugin %q has no implementation", b.Name)
	case o.TrustDomain == "":
		return nil, fmt.Errorf("plugin %q: no trust domain for its core configuration", b.Name)
	case o.Log == nil:
		return nil, fmt.Errorf("plugin %q: no logger", b.Name)
	}
	log := o.Log.With("plugin", b.Name)

	p := &pipe{log: log, drain: drainTimeout}
	if err := p.start(ctx, b, o.HostServices); err != nil {
		return nil, errors.Join(fmt.Errorf("plugin %q: %w", b.Name, err), p.close())
	}
	return &Plugin{
		name: b.Name,
		typ:  b.Plugin.Type(),
		core: &configv1.CoreConfiguration{TrustDomain: o.TrustDomain},
		b:    p,

		timeout: o.configureTimeout(),
	}, nil
}

// pipe is the backend of a built-in plugin.
type pipe struct {
	log    *slog.Logger
	drain  time.Duration
	plugin *served
	host   *served // nil unless the plugin wants host services
	names  []string
	impls  []any // distinct implementations, in the order of registration
}

func (p *pipe) conn() grpc.ClientConnInterface { return p.plugin.client }
func (p *pipe) services() []string             { return p.names }
func (p *pipe) restart()                       {}

func (p *pipe) health() (int, <-chan struct{}, error) { return 0, nil, nil }

func (p *pipe) start(ctx context.Context, b BuiltIn, hostServices []pluginsdk.ServiceServer) error {
	srv := newServer(p.log)
	for _, s := range append([]pluginsdk.ServiceServer{b.Plugin}, b.Services...) {
		name := s.GRPCServiceName()
		if slices.Contains(p.names, name) {
			return fmt.Errorf("service %s is registered twice", name)
		}
		p.names = append(p.names, name)
		// One implementation often backs several services; it is set up once.
		if impl := s.RegisterServer(srv); !slices.ContainsFunc(p.impls, func(o any) bool { return same(o, impl) }) {
			p.impls = append(p.impls, impl)
		}
	}
	for _, impl := range p.impls {
		if l, ok := impl.(pluginsdk.NeedsLogger); ok {
			l.SetLogger(newHCLogger(p.log))
		}
		if h, ok := impl.(pluginsdk.NeedsHostServices); ok {
			if err := p.startHost(hostServices); err != nil {
				return err
			}
			if err := h.BrokerHostServices(broker{p.host.client, names(hostServices)}); err != nil {
				return fmt.Errorf("host services: %w", err)
			}
		}
	}
	var err error
	p.plugin, err = serve(srv)
	return err
}

func (p *pipe) startHost(services []pluginsdk.ServiceServer) error {
	if p.host != nil {
		return nil
	}
	srv := newServer(p.log)
	for _, s := range services {
		s.RegisterServer(srv)
	}
	var err error
	p.host, err = serve(srv)
	return err
}

// close drains the plugin's calls first, because an implementation that is
// closed under a running call is the usual source of crashes at shutdown; the
// host services go last, since those calls may use them until they end.
func (p *pipe) close() error {
	var errs []error
	if p.plugin != nil && !p.plugin.stop(p.drain) {
		p.log.Warn("plugin calls did not end in time and were abandoned", "timeout", p.drain)
	}
	for _, impl := range slices.Backward(p.impls) {
		if c, ok := impl.(io.Closer); ok {
			if err := c.Close(); err != nil {
				errs = append(errs, fmt.Errorf("close plugin: %w", err))
			}
		}
	}
	if p.host != nil {
		p.host.stop(p.drain)
	}
	return errors.Join(errs...)
}

// served is a gRPC server on an in-memory pipe and the client at its other end.
type served struct {
	server *grpc.Server
	client *grpc.ClientConn
	done   chan struct{} // closed when Serve has returned
}

func newServer(log *slog.Logger) *grpc.Server {
	return grpc.NewServer(
		grpc.MaxRecvMsgSize(MaxMessage),
		grpc.WaitForHandlers(true),
		grpc.ChainUnaryInterceptor(recoverUnary(log)),
		grpc.ChainStreamInterceptor(recoverStream(log)),
	)
}

func serve(srv *grpc.Server) (*served, error) {
	lis := bufconn.Listen(pipeBuffer)
	client, err := grpc.NewClient("passthrough:plugin",
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return lis.DialContext(ctx) }),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(MaxMessage)),
	)
	if err != nil {
		return nil, err
	}
	s := &served{server: srv, client: client, done: make(chan struct{})}
	go func() {
		defer close(s.done)
		_ = srv.Serve(lis) // ends with an error only when it was stopped
	}()
	return s, nil
}

// stop reports whether every handler had returned when it gave up waiting.
func (s *served) stop(timeout time.Duration) bool {
	defer s.client.Close()
	drained := make(chan struct{})
	go func() {
		defer close(drained)
		s.server.GracefulStop()
	}()
	if within(drained, timeout) {
		<-s.done
		return true
	}
	// Stop cancels the contexts of the calls and then waits for their
	// handlers, which a handler that ignores its context can make endless.
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		s.server.Stop()
	}()
	return within(stopped, timeout)
}

func within(done <-chan struct{}, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-done:
		return true
	case <-t.C:
		return false
	}
}

// broker lets a plugin reach the host's services.
type broker struct {
	conn  grpc.ClientConnInterface
	names []string
}

func (b broker) BrokerClient(c pluginsdk.ServiceClient) bool {
	if !slices.Contains(b.names, c.GRPCServiceName()) {
		return false
	}
	c.InitClient(b.conn)
	return true
}

func names(services []pluginsdk.ServiceServer) []string {
	var out []string
	for _, s := range services {
		out = append(out, s.GRPCServiceName())
	}
	return out
}

// same reports whether two implementations are one; values of types that
// cannot be compared never are.
func same(a, b any) bool {
	if a == nil || b == nil || !reflect.TypeOf(a).Comparable() || !reflect.TypeOf(b).Comparable() {
		return false
	}
	return a == b
}

// A panic in a handler would take the whole host with it, and the input that
// causes one comes from unauthenticated callers.
func recoverUnary(log *slog.Logger) grpc.UnaryServerInterceptor {
	return func(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (resp any, err error) {
		defer recovered(log, info.FullMethod, &err)
		return handler(ctx, req)
	}
}

func recoverStream(log *slog.Logger) grpc.StreamServerInterceptor {
	return func(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) (err error) {
		defer recovered(log, info.FullMethod, &err)
		return handler(srv, ss)
	}
}

func recovered(log *slog.Logger, method string, err *error) {
	if r := recover(); r != nil {
		log.Error("plugin panicked", "method", method, "panic", fmt.Sprint(r), "stack", string(debug.Stack()))
		*err = status.Error(codes.Internal, "internal error in plugin")
	}
}
