package server

import (
	"context"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
)

// healthEvery is how often a watcher's health is looked at.
const healthEvery = time.Second

// healthService answers for the service "": the store takes writes, an
// authority can sign, and every plugin runs.
type healthService struct {
	grpc_health_v1.UnimplementedHealthServer
	s *Server
}

// Check tells the health now.
func (h *healthService) Check(ctx context.Context, req *grpc_health_v1.HealthCheckRequest) (*grpc_health_v1.HealthCheckResponse, error) {
	if req.Service != "" {
		return nil, status.Error(codes.NotFound, "unknown service")
	}
	return &grpc_health_v1.HealthCheckResponse{Status: h.status(ctx)}, nil
}

// List tells the health of each service: there is one.
func (h *healthService) List(ctx context.Context, _ *grpc_health_v1.HealthListRequest) (*grpc_health_v1.HealthListResponse, error) {
	return &grpc_health_v1.HealthListResponse{Statuses: map[string]*grpc_health_v1.HealthCheckResponse{"": {Status: h.status(ctx)}}}, nil
}

// Watch tells the health now and whenever it has changed.
func (h *healthService) Watch(req *grpc_health_v1.HealthCheckRequest, stream grpc_health_v1.Health_WatchServer) error {
	ctx := stream.Context()
	last := grpc_health_v1.HealthCheckResponse_UNKNOWN
	t := time.NewTicker(healthEvery)
	defer t.Stop()
	for {
		// The protocol has a watcher of an unknown service wait for it.
		now := grpc_health_v1.HealthCheckResponse_SERVICE_UNKNOWN
		if req.Service == "" {
			now = h.status(ctx)
		}
		if now != last && ctx.Err() == nil {
			if err := stream.Send(&grpc_health_v1.HealthCheckResponse{Status: now}); err != nil {
				return err
			}
			last = now
		}
		select {
		case <-ctx.Done():
			return status.FromContextError(ctx.Err()).Err()
		case <-h.s.stopping:
			return status.Error(codes.Unavailable, "the server stops")
		case <-t.C:
		}
	}
}

func (h *healthService) status(ctx context.Context) grpc_health_v1.HealthCheckResponse_ServingStatus {
	signer, err := h.s.authorities.signer()
	if err == nil && !h.s.cfg.Now().Before(signer.Authority().NotAfter) {
		err = errAuthorityExpired
	}
	if err == nil {
		err = h.s.jwt.healthy()
	}
	if err == nil {
		err = h.s.store.Check(ctx)
	}
	if err == nil {
		err = h.s.pluginHealth()
	}
	if err != nil {
		if ctx.Err() == nil {
			h.s.cfg.Log.Error("health check", "error", err)
		}
		return grpc_health_v1.HealthCheckResponse_NOT_SERVING
	}
	return grpc_health_v1.HealthCheckResponse_SERVING
}
