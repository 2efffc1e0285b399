package agent

import (
	"context"
	"testing"

	workloadpb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/rootlink/rootlink/internal/cli"
	workloadv1 "github.com/rootlink/rootlink/proto/rootlink/workload/v1"
)

// TestSecurityHeader is SPIFFE Workload Endpoint §6.1: every call without the
// header is refused with InvalidArgument, whatever its value else is.
func TestSecurityHeader(t *testing.T) {
	s := newFakeServer(t)
	s.start()
	s.addEntry("/w", selfHash(t))
	r := startAgent(t, s)
	r.waitReady()
	conn := r.dial()
	api, issuer := workloadpb.NewSpiffeWorkloadAPIClient(conn), workloadv1.NewIssuerClient(conn)
	for name, ctx := range map[string]context.Context{
		"missing": t.Context(),
		"false":   metadata.AppendToOutgoingContext(t.Context(), "workload.spiffe.io", "false"),
		"True":    metadata.AppendToOutgoingContext(t.Context(), "workload.spiffe.io", "True"),
		"twice":   metadata.AppendToOutgoingContext(t.Context(), "workload.spiffe.io", "true", "workload.spiffe.io", "false"),
	} {
		t.Run(name, func(t *testing.T) {
			stream, err := api.FetchX509SVID(ctx, &workloadpb.X509SVIDRequest{})
			if err == nil {
				_, err = stream.Recv()
			}
			wantCode(t, "FetchX509SVID", err, codes.InvalidArgument)
			bundles, err := api.FetchX509Bundles(ctx, &workloadpb.X509BundlesRequest{})
			if err == nil {
				_, err = bundles.Recv()
			}
			wantCode(t, "FetchX509Bundles", err, codes.InvalidArgument)
			_, err = api.FetchJWTSVID(ctx, &workloadpb.JWTSVIDRequest{})
			wantCode(t, "FetchJWTSVID", err, codes.InvalidArgument)
			_, err = issuer.Whoami(ctx, &workloadv1.WhoamiRequest{})
			wantCode(t, "Whoami", err, codes.InvalidArgument)
			_, err = issuer.Issue(ctx, &workloadv1.IssueRequest{})
			wantCode(t, "Issue", err, codes.InvalidArgument)
		})
	}
}

// TestUnimplementedProfiles is SPIFFE Workload API §4: a profile that is not
// supported answers Unimplemented.
func TestUnimplementedProfiles(t *testing.T) {
	s := newFakeServer(t)
	s.start()
	s.addEntry("/w", selfHash(t))
	r := startAgent(t, s)
	r.waitReady()
	api, ctx := workloadpb.NewSpiffeWorkloadAPIClient(r.dial()), testContext(t)
	_, err := api.FetchJWTSVID(ctx, &workloadpb.JWTSVIDRequest{Audience: []string{"a"}})
	wantCode(t, "FetchJWTSVID", err, codes.Unimplemented)
	_, err = api.ValidateJWTSVID(ctx, &workloadpb.ValidateJWTSVIDRequest{})
	wantCode(t, "ValidateJWTSVID", err, codes.Unimplemented)
	bundles, err := api.FetchJWTBundles(ctx, &workloadpb.JWTBundlesRequest{})
	if err == nil {
		_, err = bundles.Recv()
	}
	wantCode(t, "FetchJWTBundles", err, codes.Unimplemented)
	if what, hint := cli.CutHint(status.Convert(err).Message()); what == "" || hint == "" {
		t.Error("no sentence that says why, and what to do")
	}
}

// TestNoIdentity is SPIFFE Workload API §5.3: no identity, PermissionDenied, for
// bundles too.
func TestNoIdentity(t *testing.T) {
	s := newFakeServer(t)
	s.start()
	r := startAgent(t, s)
	r.waitReady()
	_, _, err := r.fetch()
	wantCode(t, "FetchX509SVID", err, codes.PermissionDenied)
	stream, err := workloadpb.NewSpiffeWorkloadAPIClient(r.dial()).FetchX509Bundles(testContext(t), &workloadpb.X509BundlesRequest{})
	if err == nil {
		_, err = stream.Recv()
	}
	wantCode(t, "FetchX509Bundles", err, codes.PermissionDenied)
	if n := len(status.Convert(err).Message()); n > 2000 {
		t.Errorf("message of %d bytes", n)
	}
}

// TestHints is SPIFFE Workload API §5.2: hints are passed on and are unique.
func TestHints(t *testing.T) {
	s := newFakeServer(t)
	s.start()
	for _, path := range []string{"/a", "/b", "/c"} {
		s.addEntry(path, selfHash(t))
	}
	s.with(func() { s.entries[0].Hint, s.entries[1].Hint = "internal", "internal" })
	r := startAgent(t, s)
	r.waitReady()
	_, resp, err := r.fetch()
	if err != nil {
		t.Fatal(err)
	}
	if len(resp.Svids) != 2 || resp.Svids[0].Hint != "internal" || resp.Svids[1].SpiffeId != "spiffe://"+testTD+"/c" {
		t.Errorf("got %d SVIDs, first hint %q", len(resp.Svids), resp.Svids[0].Hint)
	}
}

// TestHealth needs no header and says SERVING only when workloads can be served.
func TestHealth(t *testing.T) {
	s := newFakeServer(t)
	s.start()
	s.stop() // the address is taken and nobody answers
	r := startAgent(t, s)
	eventually(t, "the socket is there", func() bool {
		resp, err := healthpb.NewHealthClient(r.dial()).Check(t.Context(), &healthpb.HealthCheckRequest{})
		return err == nil && resp.Status == healthpb.HealthCheckResponse_NOT_SERVING
	})
	_, _, err := r.fetch()
	wantCode(t, "before the first sync", err, codes.Unavailable)
	watch, err := healthpb.NewHealthClient(r.dial()).Watch(t.Context(), &healthpb.HealthCheckRequest{})
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
