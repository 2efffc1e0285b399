package server

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"net"
	"runtime/debug"
	"strings"
	"syscall"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/rootlink/rootlink/internal/store"
)

// access says who may make a call.
type access uint8

const (
	forAdmin        access = iota // the admin socket, or the SVID of an entry with admin set
	forAnyone                     // also without a client certificate
	forAgent                      // attested agents, and nobody else
	forAgentOrAdmin               // both
	forLocal                      // the admin socket only: it is about this process
)

// accessOf lists the calls that are not for administrators only. A call that
// is forgotten here is closed, not open.
var accessOf = map[string]access{
	attestMethod: forAnyone,
	"/spire.api.server.bundle.v1.Bundle/GetBundle":           forAnyone,
	"/rootlink.node.v1.Node/GetSignedBundle":                 forAnyone,
	"/spire.api.server.agent.v1.Agent/RenewAgent":            forAgent,
	"/spire.api.server.agent.v1.Agent/PostStatus":            forAgent,
	"/spire.api.server.entry.v1.Entry/GetAuthorizedEntries":  forAgent,
	"/spire.api.server.entry.v1.Entry/SyncAuthorizedEntries": forAgent,
	"/spire.api.server.svid.v1.SVID/BatchNewX509SVID":        forAgent,
	"/spire.api.server.svid.v1.SVID/NewJWTSVID":              forAgent,
	"/rootlink.node.v1.Node/GetNonce":                        forAgent,
	"/rootlink.node.v1.Node/GetConfig":                       forAgent,

	"/spire.api.server.bundle.v1.Bundle/GetFederatedBundle": forAgentOrAdmin,

	"/spire.api.server.logger.v1.Logger/GetLogger":     forLocal,
	"/spire.api.server.logger.v1.Logger/SetLogLevel":   forLocal,
	"/spire.api.server.logger.v1.Logger/ResetLogLevel": forLocal,
	"/spire.api.server.debug.v1.Debug/GetInfo":         forLocal,
}

// caller is who makes a call.
type caller struct {
	local bool              // on the admin socket
	cert  *x509.Certificate // nil without one; verified in the handshake
	id    spiffeid.ID       // of cert
	agent *store.Agent      // set in calls that are for agents
	addr  string            // IP address, for rate limits
}

// key is SHA-256 of the SPKI of the caller's key, proved by the handshake.
func (c *caller) key() [32]byte { return sha256.Sum256(c.cert.RawSubjectPublicKeyInfo) }

type callerKey struct{}

func callerOf(ctx context.Context) *caller { return ctx.Value(callerKey{}).(*caller) }

// authorize identifies the caller and decides whether it may call method.
func (s *Server) authorize(ctx context.Context, method string, local bool) (context.Context, error) {
	c, err := s.identify(ctx, local)
	if err != nil {
		return nil, err
	}
	who := accessOf[method]
	if who == forAgentOrAdmin {
		if who = forAdmin; !c.local && c.cert != nil && strings.HasPrefix(c.id.Path(), "/spire/agent/") {
			who = forAgent
		}
	}
	switch who {
	case forAnyone:
	case forAgent:
		if c.agent, err = s.authorizeAgent(ctx, c); err != nil {
			return nil, err
		}
	default:
		if !c.local && (who == forLocal || !s.isAdmin(c)) {
			s.count.add("call_refused/not_admin")
			return nil, status.Errorf(codes.PermissionDenied, "authorization denied for method %s", method)
		}
	}
	return context.WithValue(ctx, callerKey{}, c), nil
}

func (s *Server) identify(ctx context.Context, local bool) (*caller, error) {
	if local {
		return &caller{local: true}, nil
	}
	p, ok := peer.FromContext(ctx)
	if !ok {
		return nil, status.Error(codes.Internal, "no peer")
	}
	c := &caller{addr: p.Addr.String()}
	if host, _, err := net.SplitHostPort(c.addr); err == nil {
		c.addr = host
	}
	info, ok := p.AuthInfo.(credentials.TLSInfo)
	if !ok {
		return nil, status.Error(codes.Internal, "no TLS")
	}
	if certs := info.State.PeerCertificates; len(certs) > 0 {
		id, err := idOf(certs[0], s.cfg.td)
		if err != nil {
			return nil, status.Error(codes.Unauthenticated, "client certificate is not an SVID of this trust domain")
		}
		c.cert, c.id = certs[0], id
	}
	return c, nil
}

// authorizeAgent applies SPIRE's rules, with the reasons that its agents act
// on: not attested makes them attest again, banned makes them exit.
func (s *Server) authorizeAgent(ctx context.Context, c *caller) (*store.Agent, error) {
	deny := func(reason types.PermissionDeniedDetails_Reason, format string, args ...any) error {
		s.count.add("agent_refused/" + strings.ToLower(reason.String()))
		s.warnOf(c.id.String(), "agent refused", "agent", c.id.String(), "reason", reason.String(), "address", c.addr)
		return permissionDenied(reason, format, args...)
	}
	if c.cert == nil {
		return nil, status.Error(codes.PermissionDenied, "this call is for attested agents")
	}
	if !strings.HasPrefix(c.id.Path(), "/spire/agent/") {
		return nil, status.Errorf(codes.PermissionDenied, "%s is not an agent", c.id)
	}
	// A connection outlives the certificate that it was made with.
	if s.cfg.Now().After(c.cert.NotAfter) {
		return nil, deny(types.PermissionDeniedDetails_AGENT_EXPIRED, "agent SVID has expired")
	}
	a, err := s.store.Agent(c.id.String())
	switch {
	case errors.Is(err, store.ErrNotFound):
		return nil, deny(types.PermissionDeniedDetails_AGENT_NOT_ATTESTED, "agent is not attested")
	case err != nil:
		return nil, s.internal("look up agent", err)
	case a.Banned:
		return nil, deny(types.PermissionDeniedDetails_AGENT_BANNED, "agent is banned")
	}
	switch serial := c.cert.SerialNumber.String(); serial {
	case a.Serial:
		s.rivals.inUse(a.ID, serial, s.cfg.Now())
		return a, nil
	case a.NewSerial:
		// The first use of a renewed SVID ends the one before.
		a, err := s.store.ActivateNewSerial(ctx, a.ID, serial)
		switch {
		case errors.Is(err, store.ErrBanned):
			return nil, deny(types.PermissionDeniedDetails_AGENT_BANNED, "agent is banned")
		case errors.Is(err, store.ErrNotFound), errors.Is(err, store.ErrConflict):
			return nil, deny(types.PermissionDeniedDetails_AGENT_NOT_ACTIVE, "agent SVID is not active")
		case err != nil:
			return nil, s.internal("activate renewed SVID", err)
		}
		s.rivals.inUse(a.ID, serial, s.cfg.Now())
		return a, nil
	default:
		s.noteReplaced(ctx, c, a)
		return nil, deny(types.PermissionDeniedDetails_AGENT_NOT_ACTIVE, "agent SVID is not active: the node has attested again since")
	}
}

// isAdmin reports whether an entry makes the caller's identity an
// administrator's.
func (s *Server) isAdmin(c *caller) bool {
	if c.cert == nil || s.cfg.Now().After(c.cert.NotAfter) {
		return false
	}
	entries, err := s.store.Entries()
	if err != nil {
		return false
	}
	for _, e := range entries {
		if e.Admin && e.SPIFFEID == c.id.String() && !s.expired(e) {
			return true
		}
	}
	return false
}

func permissionDenied(reason types.PermissionDeniedDetails_Reason, format string, args ...any) error {
	st := status.Newf(codes.PermissionDenied, format, args...)
	if d, err := st.WithDetails(&types.PermissionDeniedDetails{Reason: reason}); err == nil {
		st = d
	}
	return st.Err()
}

// internal logs err and returns what the caller may know of it.
func (s *Server) internal(what string, err error) error {
	if c := status.FromContextError(err).Code(); c == codes.Canceled || c == codes.DeadlineExceeded {
		return status.Errorf(c, "%s: %v", what, err)
	}
	s.cfg.Log.Error(what, "error", err)
	s.count.add("internal_error")
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return status.Errorf(codes.ResourceExhausted, "%s: the server's disk is full", what)
	}
	return status.Errorf(codes.Internal, "%s failed; the server's log has the reason", what)
}

// interceptors authorise every call, and keep a panic in one from ending all.
func (s *Server) interceptors(local bool) []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.UnaryInterceptor(func(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (resp any, err error) {
			defer s.recovered(info.FullMethod, &err)
			if ctx, err = s.authorize(ctx, info.FullMethod, local); err != nil {
				return nil, err
			}
			return next(ctx, req)
		}),
		grpc.StreamInterceptor(func(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, next grpc.StreamHandler) (err error) {
			defer s.recovered(info.FullMethod, &err)
			ctx, err := s.authorize(ss.Context(), info.FullMethod, local)
			if err != nil {
				return err
			}
			return next(srv, &serverStream{ss, ctx})
		}),
	}
}

func (s *Server) recovered(method string, err *error) {
	if p := recover(); p != nil {
		s.cfg.Log.Error("panic in a call", "method", method, "panic", p, "stack", string(debug.Stack()))
		s.count.add("panic")
		*err = status.Error(codes.Internal, "internal error")
	}
}

type serverStream struct {
	grpc.ServerStream
	ctx context.Context
}

func (s *serverStream) Context() context.Context { return s.ctx }
