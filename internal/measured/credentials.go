package measured

import (
	"context"
	"errors"
	"net"
	"strings"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
)

type peerCredentials struct{}

// Credentials carry the caller of each connection from Listener to the handlers.
func Credentials() credentials.TransportCredentials { return peerCredentials{} }

type authInfo struct {
	credentials.CommonAuthInfo
	caller *Caller
}

func (authInfo) AuthType() string { return "unix-peer" }

var errNotUnix = errors.New("connection did not come from a listener of measured callers")

func (peerCredentials) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	c, ok := raw.(*conn)
	if !ok {
		return nil, nil, errNotUnix
	}
	return c, authInfo{credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity}, c.caller}, nil
}

func (peerCredentials) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("server side only")
}

func (peerCredentials) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "unix-peer"}
}
func (peerCredentials) Clone() credentials.TransportCredentials { return peerCredentials{} }
func (peerCredentials) OverrideServerName(string) error         { return nil }

// CallerOf returns who calls.
func CallerOf(ctx context.Context) (*Caller, error) {
	if p, ok := peer.FromContext(ctx); ok {
		if a, ok := p.AuthInfo.(authInfo); ok {
			return a.caller, nil
		}
	}
	return nil, status.Error(codes.Internal, errNotUnix.Error())
}

// CheckHeader demands the header of SPIFFE Workload Endpoint §3, which keeps
// server-side request forgery out: a browser or proxy that is made to speak to
// the socket does not send it. Health is not of the Workload API and says
// nothing of anybody; the probes that people have, SPIRE's among them, ask for it
// without the header.
func CheckHeader(ctx context.Context, method string) error {
	if strings.HasPrefix(method, "/"+healthpb.Health_ServiceDesc.ServiceName+"/") {
		return nil
	}
	v := metadata.ValueFromIncomingContext(ctx, "workload.spiffe.io")
	if len(v) != 1 || v[0] != "true" {
		return status.Error(codes.InvalidArgument, "security header missing from request: workload.spiffe.io must be true")
	}
	return nil
}
