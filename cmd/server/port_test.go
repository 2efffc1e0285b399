package main

import (
	"context"
	"crypto/tls"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/rootlink/rootlink/internal/server"
	adminv1 "github.com/rootlink/rootlink/proto/rootlink/admin/v1"
)

// The agents' port is reachable by every machine. What administers the server
// must not be, with or without a client certificate.
func TestRefusesAdministrationOnTheAgentsPort(t *testing.T) {
	dir, err := os.MkdirTemp("", "rls") // short enough for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	s, err := server.New(t.Context(), server.Config{
		TrustDomain: "example.org", DataDir: dir, Listen: "127.0.0.1:0",
		AdminServices: []func(grpc.ServiceRegistrar, *server.Server){registerAdmin},
		Log:           slog.New(slog.NewTextHandler(io.Discard, nil)),
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("the server ended with %v", err)
		}
	})
	dial := func(target string, creds credentials.TransportCredentials) *grpc.ClientConn {
		c, err := grpc.NewClient(target, grpc.WithTransportCredentials(creds))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	remote := dial(s.Addr().String(), credentials.NewTLS(&tls.Config{InsecureSkipVerify: true}))
	local := dial("unix:"+filepath.Join(dir, "admin.sock"), insecure.NewCredentials())

	calls := map[string]func(*grpc.ClientConn) error{
		"counters": func(c *grpc.ClientConn) error {
			_, err := adminv1.NewAdminClient(c).Counters(t.Context(), &adminv1.CountersRequest{})
			return err
		},
		"rotate": func(c *grpc.ClientConn) error {
			_, err := adminv1.NewAdminClient(c).RotateAuthority(t.Context(), &adminv1.RotateAuthorityRequest{})
			return err
		},
		"policies": func(c *grpc.ClientConn) error {
			_, err := adminv1.NewAdminClient(c).ListPCRPolicies(t.Context(), &adminv1.ListPCRPoliciesRequest{})
			return err
		},
		"entries": func(c *grpc.ClientConn) error {
			_, err := entryv1.NewEntryClient(c).ListEntries(t.Context(), &entryv1.ListEntriesRequest{})
			return err
		},
		"agents": func(c *grpc.ClientConn) error {
			_, err := agentv1.NewAgentClient(c).ListAgents(t.Context(), &agentv1.ListAgentsRequest{})
			return err
		},
	}
	for name, call := range calls {
		if err := call(local); err != nil {
			t.Errorf("%s on the admin socket: %v", name, err)
		}
		switch err := call(remote); status.Code(err) {
		case codes.PermissionDenied, codes.Unauthenticated, codes.Unimplemented:
		default:
			t.Errorf("%s on the agents' port: %v", name, err)
		}
	}
	_, err = svidv1.NewSVIDClient(remote).MintX509SVID(t.Context(), &svidv1.MintX509SVIDRequest{})
	if c := status.Code(err); c != codes.PermissionDenied && c != codes.Unauthenticated {
		t.Errorf("minting on the agents' port: %v", err)
	}
	// The port itself works: the bundle is public.
	if _, err := bundlev1.NewBundleClient(remote).GetBundle(t.Context(), &bundlev1.GetBundleRequest{}); err != nil {
		t.Errorf("bundle on the agents' port: %v", err)
	}
}
