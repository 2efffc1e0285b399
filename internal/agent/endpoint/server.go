// Package endpoint is what workloads talk to: the SPIFFE Workload API, the
// Issuer and health, on one Unix socket.
package endpoint

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"runtime/debug"
	"time"

	workloadpb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	"github.com/rootlink/rootlink/internal/agent/identity"
	"github.com/rootlink/rootlink/internal/boundcodec"
	"github.com/rootlink/rootlink/internal/measured"
	"github.com/rootlink/rootlink/internal/vouch"
	workloadv1 "github.com/rootlink/rootlink/proto/rootlink/workload/v1"
)

// Bounds on what one connection may send.
const (
	maxRequest     = 256 << 10 // bytes: a CSR with the largest evidence, and room
	maxFields      = 1 << 10   // in it
	maxHeaders     = 16 << 10  // bytes
	maxStreams     = 64        // calls at once on one connection
	connectTimeout = 10 * time.Second
	lastWords      = 2 * time.Second // how long End waits for calls to be answered
	knockTimeout   = 5 * time.Second // how long an unknown workload waits for a sync
)

// Config is what a Server needs.
type Config struct {
	Keeper   *identity.Keeper
	Issuer   *identity.Issuer
	Attestor measured.Attestor
	// Health is what else must be well for SERVING; may be nil.
	Health func() error
	// RecorderGID is the group that the recorder is installed setgid to; 0 when
	// there is none, and then no recorder counts as protected.
	RecorderGID uint32
	// Logs returns the boot event log and IMA log with these digests, nil where
	// they are not at hand.
	Logs vouch.Logs
	Log  *slog.Logger
}

// Server serves the socket.
type Server struct {
	workloadpb.UnimplementedSpiffeWorkloadAPIServer
	workloadv1.UnimplementedIssuerServer
	healthpb.UnimplementedHealthServer

	cfg      Config
	attestor measured.Attestor
	grpc     *grpc.Server

	// life ends, with the answer that every call then gets as its cause, when
	// End is called.
	life context.Context
	end  context.CancelCauseFunc
}

// New returns a Server.
func New(cfg Config) (*Server, error) {
	if cfg.Keeper == nil || cfg.Issuer == nil || cfg.Attestor == nil || cfg.Log == nil {
		return nil, errors.New("endpoint: incomplete configuration")
	}
	s := &Server{cfg: cfg, attestor: cfg.Attestor}
	s.life, s.end = context.WithCancelCause(context.Background())
	s.grpc = grpc.NewServer(
		grpc.Creds(measured.Credentials()),
		grpc.MaxRecvMsgSize(maxRequest),
		grpc.ForceServerCodecV2(boundcodec.New(maxFields)),
		grpc.MaxHeaderListSize(maxHeaders),
		grpc.MaxConcurrentStreams(maxStreams),
		grpc.ConnectionTimeout(connectTimeout),
		grpc.UnaryInterceptor(s.unary),
		grpc.StreamInterceptor(s.stream),
		// Small buffers: an agent has many quiet connections.
		grpc.ReadBufferSize(4<<10), grpc.WriteBufferSize(4<<10),
	)
	workloadpb.RegisterSpiffeWorkloadAPIServer(s.grpc, s)
	workloadv1.RegisterIssuerServer(s.grpc, s)
	healthpb.RegisterHealthServer(s.grpc, s)
	return s, nil
}

// Serve answers on l until ctx ends.
func (s *Server) Serve(ctx context.Context, l *net.UnixListener) error {
	stop := context.AfterFunc(ctx, s.grpc.Stop)
	defer stop()
	err := s.grpc.Serve(measured.NewListener(l))
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// End answers every open and new call with why, a status error, and returns
// when the callers have heard it or after a moment. A caller that only lost its
// socket would not know that asking again is of no use.
func (s *Server) End(why error) {
	s.end(why)
	stop := time.AfterFunc(lastWords, s.grpc.Stop)
	defer stop.Stop()
	s.grpc.GracefulStop()
}

// living returns a context that also ends with s, and what replaces a call's
// error then.
func (s *Server) living(ctx context.Context) (context.Context, func(*error)) {
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(s.life, cancel)
	return ctx, func(err *error) {
		stop()
		cancel()
		if s.life.Err() != nil && *err != nil {
			*err = context.Cause(s.life)
		}
	}
}

func (s *Server) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, h grpc.UnaryHandler) (_ any, err error) {
	ctx, done := s.living(ctx)
	defer done(&err)
	defer s.recovered(info.FullMethod, &err)
	if err := measured.CheckHeader(ctx, info.FullMethod); err != nil {
		return nil, err
	}
	return h(ctx, req)
}

// livingStream is a stream with a shorter life.
type livingStream struct {
	grpc.ServerStream
	ctx context.Context
}

func (l livingStream) Context() context.Context { return l.ctx }

func (s *Server) stream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, h grpc.StreamHandler) (err error) {
	ctx, done := s.living(ss.Context())
	defer done(&err)
	defer s.recovered(info.FullMethod, &err)
	if err := measured.CheckHeader(ctx, info.FullMethod); err != nil {
		return err
	}
	return h(srv, livingStream{ss, ctx})
}

func (s *Server) recovered(method string, err *error) {
	if r := recover(); r != nil {
		s.cfg.Log.Error("panic", "method", method, "panic", r, "stack", string(debug.Stack()))
		*err = status.Error(codes.Internal, "internal error")
	}
}

// healthEvery is how often a watcher's health is looked at when no view changes.
const healthEvery = time.Second

// Check says SERVING once the agent is attested and has synced, and while its
// plugins run.
func (s *Server) Check(_ context.Context, req *healthpb.HealthCheckRequest) (*healthpb.HealthCheckResponse, error) {
	if req.GetService() != "" {
		return nil, status.Error(codes.NotFound, "unknown service")
	}
	st := healthpb.HealthCheckResponse_SERVING
	_, err := s.cfg.Keeper.View()
	if err == nil && s.cfg.Health != nil {
		err = s.cfg.Health()
	}
	if err != nil {
		st = healthpb.HealthCheckResponse_NOT_SERVING
	}
	return &healthpb.HealthCheckResponse{Status: st}, nil
}

// Watch sends the state now and whenever it changes.
func (s *Server) Watch(req *healthpb.HealthCheckRequest, stream healthpb.Health_WatchServer) error {
	last := healthpb.HealthCheckResponse_UNKNOWN
	t := time.NewTicker(healthEvery)
	defer t.Stop()
	for {
		changed := s.cfg.Keeper.Changed()
		r, err := s.Check(stream.Context(), req)
		if err != nil {
			r = &healthpb.HealthCheckResponse{Status: healthpb.HealthCheckResponse_SERVICE_UNKNOWN}
		}
		if r.GetStatus() != last {
			last = r.GetStatus()
			if err := stream.Send(r); err != nil {
				return err
			}
		}
		select {
		case <-stream.Context().Done():
			return status.FromContextError(stream.Context().Err()).Err()
		case <-changed:
		case <-t.C:
		}
	}
}
