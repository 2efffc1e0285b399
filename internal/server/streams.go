package server

import (
	"context"
	"net"
	"net/netip"
	"strings"
	"sync"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/tap"
)

// gRPC reads a request, of up to 4 MiB, before it asks an interceptor who sent
// it, and waits for the rest of one as long as the sender likes. These bound
// what that costs.
const (
	maxStreamsOfOne   = 64  // calls open at once by one agent, or from one address without an agent's SVID
	maxStreamsOfCrowd = 256 // by all addresses together
)

// openStreams counts the calls that are open.
type openStreams struct {
	mu    sync.Mutex
	by    map[string]int // guarded by mu; by agent ID or address
	crowd int            // guarded by mu; of addresses
}

func (o *openStreams) begin(who string, agent bool) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.by[who] >= maxStreamsOfOne || !agent && o.crowd >= maxStreamsOfCrowd {
		return false
	}
	if o.by == nil {
		o.by = make(map[string]int)
	}
	o.by[who]++
	if !agent {
		o.crowd++
	}
	return true
}

func (o *openStreams) end(who string, agent bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.by[who]--; o.by[who] == 0 {
		delete(o.by, who)
	}
	if !agent {
		o.crowd--
	}
}

// tap looks at a call on TCP when its headers have come, before any of its
// request is read. What it lets through is authorised as ever: see authorize.
func (s *Server) tap(ctx context.Context, info *tap.Info) (context.Context, error) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return nil, status.Error(codes.Internal, "no peer")
	}
	tls, ok := p.AuthInfo.(credentials.TLSInfo)
	if !ok {
		return nil, status.Error(codes.Internal, "no TLS")
	}
	certs := tls.State.PeerCertificates
	if len(certs) == 0 && accessOf[info.FullMethodName] != forAnyone {
		s.count.add("call_refused/no_certificate")
		return nil, status.Errorf(codes.PermissionDenied, "authorization denied for method %s", info.FullMethodName)
	}
	who, agent := addressOf(p.Addr), false
	if len(certs) > 0 {
		if id, err := idOf(certs[0], s.cfg.td); err == nil && strings.HasPrefix(id.Path(), "/spire/agent/") {
			who, agent = id.String(), true
		}
	}
	if !s.streams.begin(who, agent) {
		s.count.add("call_refused/too_many")
		return nil, status.Error(codes.ResourceExhausted, "too many calls at once")
	}
	context.AfterFunc(ctx, func() { s.streams.end(who, agent) })
	if agent || info.FullMethodName == attestMethod { // which counts its rounds itself
		return ctx, nil
	}
	limited, cancel := context.WithTimeout(ctx, s.cfg.RoundTimeout)
	context.AfterFunc(ctx, cancel)
	return limited, nil
}

const attestMethod = "/spire.api.server.agent.v1.Agent/AttestAgent"

// addressOf is the IP address, of IPv6 the /64 that one host calls from.
func addressOf(a net.Addr) string {
	host, _, err := net.SplitHostPort(a.String())
	if err != nil {
		host = a.String()
	}
	return network(host)
}

// network maps an IPv6 address to its /64: one host has all of it.
func network(addr string) string {
	if ip, err := netip.ParseAddr(addr); err == nil && ip.Is6() && !ip.Is4In6() {
		if p, err := ip.WithZone("").Prefix(64); err == nil {
			return p.String()
		}
	}
	return addr
}
