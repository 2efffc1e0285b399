package server

import (
	"context"
	"net"
	"net/netip"
	"runtime"
	"strings"
	"sync"

	"google.golang.org/grpc"
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
	maxCallsOfAgent = 64 // open at once, with the SVID of one agent
	// Of one address without such an SVID. An attestation reads nothing before
	// the rate limit lets it, so there is no bound on those of all addresses: a
	// few of them could keep every node out.
	maxAttestationsOfAddress = 64
	maxCallsOfAddress        = 16
	maxCallsOfAddresses      = 128 // of all together, attestations apart

	// maxRequestFields bounds what a request becomes in memory, as boundcodec
	// counts: an agent asks for so many entries at once, or for 500 SVIDs.
	maxRequestFields = 1 << 17

	// window is how much of what nobody has asked for yet is kept of a call; by
	// itself gRPC lets it grow to megabytes.
	window     = 256 << 10
	connWindow = 1 << 20

	// readBuffer is a connection's for as long as it is open, on top of the
	// record that TLS holds. The requests of a sync fit.
	readBuffer = 4 << 10
)

// workers take one call after another. A goroutine of its own for every call
// grows its stack, and copies it, each time that a certificate is made.
func workers() grpc.ServerOption {
	return grpc.NumStreamWorkers(uint32(4 * runtime.GOMAXPROCS(0)))
}

// openCalls counts the calls that are open.
type openCalls struct {
	mu    sync.Mutex
	by    map[string]int // guarded by mu
	crowd int            // guarded by mu; not by agents, and no attestations
}

func (o *openCalls) begin(who string, most int, crowd bool) (end func(), ok bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.by[who] >= most || crowd && o.crowd >= maxCallsOfAddresses {
		return nil, false
	}
	if o.by == nil {
		o.by = make(map[string]int)
	}
	add := func(n int) {
		if o.by[who] += n; o.by[who] == 0 {
			delete(o.by, who)
		}
		if crowd {
			o.crowd += n
		}
	}
	add(1)
	return func() {
		o.mu.Lock()
		defer o.mu.Unlock()
		add(-1)
	}, true
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
	who, most, crowd := "call "+addressOf(p.Addr), maxCallsOfAddress, true
	if info.FullMethodName == attestMethod {
		who, most, crowd = "attestation "+addressOf(p.Addr), maxAttestationsOfAddress, false
	} else if len(certs) > 0 {
		if id, err := idOf(certs[0], s.cfg.td); err == nil && strings.HasPrefix(id.Path(), "/spire/agent/") {
			who, most, crowd = id.String(), maxCallsOfAgent, false
		}
	}
	end, ok := s.calls.begin(who, most, crowd)
	if !ok {
		s.count.add("call_refused/too_many")
		return nil, status.Error(codes.ResourceExhausted, "too many calls at once")
	}
	context.AfterFunc(ctx, end)
	if !crowd {
		return ctx, nil
	}
	// Agents wait for signatures, and attestations count their rounds.
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
