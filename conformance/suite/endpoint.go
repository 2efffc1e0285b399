package suite

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"path/filepath"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// callTimeout bounds one call: an endpoint that hangs fails, it does not stop us.
const callTimeout = 15 * time.Second

const headerKey = "workload.spiffe.io"

// ErrSocket: the address is not of the form that the Workload Endpoint has.
var ErrSocket = errors.New("not a Workload Endpoint address")

// target reads the address by the rules of SPIFFE_ENDPOINT_SOCKET.
func target(socket string) (string, error) {
	u, err := url.Parse(socket)
	switch {
	case err != nil:
		return "", fmt.Errorf("%w: %v", ErrSocket, err)
	case u.RawQuery != "" || u.ForceQuery || u.Fragment != "" || u.User != nil || u.Opaque != "":
		return "", fmt.Errorf("%w: %q has more than scheme, address and path", ErrSocket, socket)
	case u.Scheme == "unix" && u.Host == "" && filepath.IsAbs(u.Path):
		return "unix://" + u.Path, nil
	case u.Scheme == "tcp" && u.Path == "":
		if _, err := netip.ParseAddrPort(u.Host); err == nil {
			return "passthrough:///" + u.Host, nil
		}
	}
	return "", fmt.Errorf("%w: %q is neither unix:///absolute/path nor tcp://IP:PORT", ErrSocket, socket)
}

func dial(socket string) (*grpc.ClientConn, error) {
	addr, err := target(socket)
	if err != nil {
		return nil, err
	}
	// No TLS and no credentials: the documents forbid endpoints to want either.
	return grpc.NewClient(addr, grpc.WithTransportCredentials(insecure.NewCredentials()))
}

func withHeader(ctx context.Context, values ...string) context.Context {
	md := metadata.MD{}
	md.Set(headerKey, values...)
	return metadata.NewOutgoingContext(ctx, md)
}

// call is the context of an ordinary call.
func call(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(withHeader(ctx, "true"), callTimeout)
}

// first opens a stream, takes its first message and closes it.
func first[M any](ctx context.Context, open func(context.Context) (grpc.ServerStreamingClient[M], error)) (*M, error) {
	ctx, cancel := call(ctx)
	defer cancel()
	s, err := open(ctx)
	if err != nil {
		return nil, err
	}
	return s.Recv()
}

// answers tells an endpoint that is not there, the error, from one that is there
// and cannot be spoken to, which is a finding.
func (r *run) answers(ctx context.Context) (dead, err error) {
	limited, cancel := context.WithTimeout(withHeader(ctx, "true"), r.Prompt)
	defer cancel()
	err = firstError(r.api.FetchX509Bundles(limited, &workload.X509BundlesRequest{}))
	if c := status.Code(err); c != codes.Unavailable && c != codes.DeadlineExceeded || r.conn.GetState() == connectivity.Ready {
		return nil, nil
	}
	c, dialErr := r.raw(ctx)
	if dialErr != nil {
		return nil, fmt.Errorf("%w: %w", ErrUnreachable, dialErr)
	}
	c.Close()
	return err, nil
}

// raw is a connection without gRPC.
func (r *run) raw(ctx context.Context) (net.Conn, error) {
	network, addr, _ := strings.Cut(r.Socket, "://")
	return (&net.Dialer{Timeout: callTimeout}).DialContext(ctx, network, addr)
}

// speaksTLS tries what the endpoint may not demand.
func (r *run) speaksTLS(ctx context.Context) bool {
	c, err := r.raw(ctx)
	if err != nil {
		return false
	}
	defer c.Close()
	ctx, cancel := context.WithTimeout(ctx, r.Prompt)
	defer cancel()
	// Whose certificate it is does not matter: nothing is sent or believed.
	return tls.Client(c, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}}).HandshakeContext(ctx) == nil
}

// rpc is one method of the Workload API, called so that a caller with an identity
// gets an answer.
type rpc struct {
	name, profile string
	call          func(context.Context, *run) error
}

var rpcs = []rpc{
	{"FetchX509SVID", "x509", func(ctx context.Context, r *run) error {
		return firstError(r.api.FetchX509SVID(ctx, &workload.X509SVIDRequest{}))
	}},
	{"FetchX509Bundles", "x509", func(ctx context.Context, r *run) error {
		return firstError(r.api.FetchX509Bundles(ctx, &workload.X509BundlesRequest{}))
	}},
	{"FetchJWTSVID", "jwt", func(ctx context.Context, r *run) error {
		_, err := r.api.FetchJWTSVID(ctx, &workload.JWTSVIDRequest{Audience: []string{r.Audience}})
		return err
	}},
	{"FetchJWTBundles", "jwt", func(ctx context.Context, r *run) error {
		return firstError(r.api.FetchJWTBundles(ctx, &workload.JWTBundlesRequest{}))
	}},
	{"ValidateJWTSVID", "jwt", func(ctx context.Context, r *run) error {
		// A good token: for a bad one the answer would be InvalidArgument anyhow,
		// and a check of the header by that code would see nothing.
		token, err := r.goodToken()
		if err != nil {
			return err
		}
		_, err = r.api.ValidateJWTSVID(ctx, &workload.ValidateJWTSVIDRequest{Audience: r.Audience, Svid: token})
		return err
	}},
}

func firstError[M any](s grpc.ServerStreamingClient[M], err error) error {
	if err == nil {
		_, err = s.Recv()
	}
	return err
}

// eachRPC calls every method of the profiles that are not disabled.
func (r *run) eachRPC(ctx context.Context, judge func(name string, err error)) error {
	called := 0
	for _, m := range rpcs {
		if r.disabled(m.profile) {
			continue
		}
		one, cancel := context.WithTimeout(ctx, callTimeout)
		err := m.call(one, r)
		cancel()
		if nr := notRun(""); errors.As(err, &nr) {
			continue
		}
		judge(m.name, err)
		called++
	}
	if called == 0 {
		return notRun("no profile is enabled")
	}
	return nil
}

func short(err error) string {
	if err == nil {
		return "answered"
	}
	s := status.Convert(err)
	text, _, _ := strings.Cut(s.Message(), "\n")
	const most = 120
	if len(text) > most {
		text = text[:most] + "…"
	}
	return fmt.Sprintf("%s (%s)", s.Code(), text)
}
