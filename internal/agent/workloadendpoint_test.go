package agent

import (
	"bytes"
	"context"
	"slices"
	"strings"
	"testing"

	workloadpb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/rootlink/rootlink/internal/cli"
	workloadv1 "github.com/rootlink/rootlink/proto/rootlink/workload/v1"
)

// The tests here and in workloadapi_test.go are named after the clauses of the
// SPIFFE specifications that they hold us to; docs/workload-api.md lists them.

// endpointMethods are all that the socket offers.
func endpointMethods() (out []string) {
	for _, d := range []grpc.ServiceDesc{workloadpb.SpiffeWorkloadAPI_ServiceDesc, workloadv1.Issuer_ServiceDesc} {
		for _, m := range d.Methods {
			out = append(out, "/"+d.ServiceName+"/"+m.MethodName)
		}
		for _, m := range d.Streams {
			out = append(out, "/"+d.ServiceName+"/"+m.StreamName)
		}
	}
	return out
}

// callEmpty sends an empty message to any method and returns the first answer's
// error.
func callEmpty(ctx context.Context, c *grpc.ClientConn, method string) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := c.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, method)
	if err != nil {
		return err
	}
	// When the call is refused already, the reason comes from RecvMsg.
	_ = stream.SendMsg(&emptypb.Empty{})
	_ = stream.CloseSend()
	return stream.RecvMsg(&emptypb.Empty{})
}

// served is an agent that has one identity for the test binary.
func served(t *testing.T, change ...func(*Config)) (*fakeServer, *running) {
	t.Helper()
	s := newFakeServer(t)
	s.start()
	s.addEntry("/w", selfHash(t))
	r := startAgent(t, s, change...)
	r.waitReady()
	return s, r
}

// A client that is not ours, and speaks gRPC and nothing else, is served.
func TestWorkloadEndpointSection3ServedOverGRPC(t *testing.T) {
	s, r := served(t)
	x, err := workloadapi.FetchX509Context(testContext(t), workloadapi.WithAddr("unix://"+r.socket))
	if err != nil {
		t.Fatal(err)
	}
	if id := x.DefaultSVID().ID.String(); id != "spiffe://"+testTD+"/w" {
		t.Errorf("got %s", id)
	}
	b, err := x.Bundles.GetX509BundleForTrustDomain(x.DefaultSVID().ID.TrustDomain())
	if err != nil || len(b.X509Authorities()) != 1 || !b.X509Authorities()[0].Equal(s.ca) {
		t.Errorf("bundle %v, %v", b, err)
	}
}

// wrongHeaders are requests that a forger who has no say over metadata, or only
// some, can make.
func wrongHeaders(ctx context.Context) map[string]context.Context {
	const key = "workload.spiffe.io"
	out := map[string]context.Context{
		"missing": ctx,
		"twice":   metadata.AppendToOutgoingContext(ctx, key, "true", key, "false"),
	}
	for _, v := range []string{"", "false", "True", "TRUE", "1", "true,true", "true x"} {
		out["value "+v] = metadata.AppendToOutgoingContext(ctx, key, v)
	}
	return out
}

func TestWorkloadEndpointSection3HeaderIsDemanded(t *testing.T) {
	s, r := served(t)
	conn := r.dial()
	s.with(func() { s.batches = nil })
	for name, ctx := range wrongHeaders(t.Context()) {
		if err := callEmpty(ctx, conn, "/SpiffeWorkloadAPI/FetchX509SVID"); err == nil {
			t.Errorf("%s: served", name)
		}
	}
	s.with(func() {
		if len(s.batches) != 0 {
			t.Errorf("%d signing calls for refused requests", len(s.batches))
		}
	})
	if err := callEmpty(testContext(t), conn, "/SpiffeWorkloadAPI/FetchX509SVID"); err != nil {
		t.Errorf("with the header: %v", err)
	}
}

func TestWorkloadEndpointSection6MissingHeaderIsInvalidArgument(t *testing.T) {
	_, r := served(t)
	conn := r.dial()
	for _, method := range endpointMethods() {
		for name, ctx := range wrongHeaders(t.Context()) {
			wantCode(t, method+" "+name, callEmpty(ctx, conn, method), codes.InvalidArgument)
		}
	}
}

func TestHealthNeedsNoHeader(t *testing.T) {
	_, r := served(t)
	resp, err := healthpb.NewHealthClient(r.dial()).Check(t.Context(), &healthpb.HealthCheckRequest{})
	if err != nil || resp.GetStatus() != healthpb.HealthCheckResponse_SERVING {
		t.Errorf("a probe without the header: %v, %v", resp.GetStatus(), err)
	}
}

// r.dial uses no transport security at all.
func TestWorkloadEndpointSection31TransportSecurityIsNotRequired(t *testing.T) {
	_, r := served(t)
	if err := callEmpty(testContext(t), r.dial(), "/SpiffeWorkloadAPI/FetchX509SVID"); err != nil {
		t.Error(err)
	}
}

// Neither a credential that is absent nor one that is wrong makes a difference.
func TestWorkloadEndpointSection5NoClientAuthentication(t *testing.T) {
	_, r := served(t)
	_, plain, err := r.fetch()
	if err != nil {
		t.Fatal(err)
	}
	ctx := metadata.AppendToOutgoingContext(testContext(t), "authorization", "Bearer forged", "x-forwarded-client-cert", "URI=spiffe://"+testTD+"/admin")
	stream, err := workloadpb.NewSpiffeWorkloadAPIClient(r.dial()).FetchX509SVID(ctx, &workloadpb.X509SVIDRequest{})
	if err != nil {
		t.Fatal(err)
	}
	resp, err := stream.Recv()
	if err != nil {
		t.Fatal(err)
	}
	if len(resp.Svids) != 1 || !bytes.Equal(resp.Svids[0].X509Svid, plain.Svids[0].X509Svid) {
		t.Error("metadata that claims an identity changed the answer")
	}
}

func TestWorkloadEndpointSection6NoIdentityIsPermissionDenied(t *testing.T) {
	s := newFakeServer(t)
	s.start()
	r := startAgent(t, s)
	r.waitReady()
	conn, ctx := r.dial(), testContext(t)
	for _, method := range []string{"FetchX509SVID", "FetchX509Bundles"} {
		wantCode(t, method, callEmpty(ctx, conn, "/SpiffeWorkloadAPI/"+method), codes.PermissionDenied)
	}
}

func TestWorkloadEndpointSection6NotReadyIsUnavailable(t *testing.T) {
	s := newFakeServer(t)
	s.start()
	s.stop() // the address is taken and nobody answers
	r := startAgent(t, s)
	conn, ctx := r.dial(), testContext(t)
	eventually(t, "the socket is there", func() bool {
		return callEmpty(ctx, conn, "/grpc.health.v1.Health/Check") == nil
	})
	for _, method := range []string{"FetchX509SVID", "FetchX509Bundles"} {
		wantCode(t, method, callEmpty(ctx, conn, "/SpiffeWorkloadAPI/"+method), codes.Unavailable)
	}
}

// The service has the methods of the specification and no other; what we add is
// a service of its own.
func TestWorkloadEndpointSection7WorkloadAPIIsNotExtended(t *testing.T) {
	want := []string{
		"FetchJWTBundles", "FetchJWTSVID", "FetchWITBundles", "FetchWITSVID", "FetchX509Bundles", "FetchX509SVID", "ValidateJWTSVID",
	}
	var got []string
	for _, m := range endpointMethods() {
		if name, ok := strings.CutPrefix(m, "/SpiffeWorkloadAPI/"); ok {
			got = append(got, name)
		}
	}
	if slices.Sort(got); !slices.Equal(got, want) {
		t.Errorf("methods %v", got)
	}
	_, r := served(t)
	conn, ctx := r.dial(), testContext(t)
	for _, m := range []string{"/SpiffeWorkloadAPI/Measure", "/SpiffeWorkloadAPI/Issue", "/SpiffeWorkloadAPI/Whoami", "/SpiffeWorkloadAPI/FetchEvidence"} {
		wantCode(t, m, callEmpty(ctx, conn, m), codes.Unimplemented)
	}
}

// TestHealth says SERVING only when workloads can be served.
func TestHealth(t *testing.T) {
	s := newFakeServer(t)
	s.start()
	s.stop() // the address is taken and nobody answers
	r := startAgent(t, s)
	ctx := testContext(t)
	eventually(t, "the socket is there", func() bool {
		resp, err := healthpb.NewHealthClient(r.dial()).Check(ctx, &healthpb.HealthCheckRequest{})
		return err == nil && resp.Status == healthpb.HealthCheckResponse_NOT_SERVING
	})
	watch, err := healthpb.NewHealthClient(r.dial()).Watch(ctx, &healthpb.HealthCheckRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if m, err := watch.Recv(); err != nil || m.Status != healthpb.HealthCheckResponse_NOT_SERVING {
		t.Errorf("%v %v", m, err)
	}
	s.start()
	if m, err := watch.Recv(); err != nil || m.Status != healthpb.HealthCheckResponse_SERVING {
		t.Errorf("%v %v", m, err)
	}
}

// The variable that this and every SPIFFE client falls back to is one our own
// clients read the same way.
func TestWorkloadEndpointSection4VariableLeadsToTheEndpoint(t *testing.T) {
	_, r := served(t)
	t.Setenv(cli.EnvEndpoint, "unix://"+r.socket)
	if _, err := workloadapi.FetchX509Context(testContext(t)); err != nil {
		t.Error(err)
	}
}
