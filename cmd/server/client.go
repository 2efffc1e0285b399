package main

import (
	"context"
	"crypto/x509"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	"github.com/rootlink/rootlink/internal/cli"
	adminv1 "github.com/rootlink/rootlink/proto/rootlink/admin/v1"
)

const (
	adminTimeout = 30 * time.Second // of one administrative command
	pageSize     = 500
	maxReply     = 64 << 20 // bytes; trust.json has no pages
)

// location says where a server's admin socket is.
type location struct {
	dataDir, socket string
}

func (l *location) adminSocket() string {
	if l.socket != "" {
		return l.socket
	}
	return filepath.Join(l.dataDir, "admin.sock")
}

// client is a connection to the admin socket.
type client struct {
	conn   *grpc.ClientConn
	entry  entryv1.EntryClient
	agent  agentv1.AgentClient
	bundle bundlev1.BundleClient
	svid   svidv1.SVIDClient
	admin  adminv1.AdminClient
	health grpc_health_v1.HealthClient

	trustDomain string // cached by td
}

// withClient makes a command's RunE of f, which gets a client and prints to c.
func withClient(at *location, f func(ctx context.Context, c *cobra.Command, cl *client, args []string) error) func(*cobra.Command, []string) error {
	return func(c *cobra.Command, args []string) error {
		ctx, cancel := context.WithTimeout(c.Context(), adminTimeout)
		defer cancel()
		path := at.adminSocket()
		if env := os.Getenv(envAdminSocket); env != "" && !c.Flags().Changed("admin-socket") && !c.Flags().Changed("data-dir") {
			path = env
		}
		s := cli.Socket{Path: path, Daemon: "`" + program + " run`", Flag: "--admin-socket or --data-dir", OwnOnly: true}
		conn, err := s.Dial(ctx, grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxReply), grpc.MaxCallSendMsgSize(maxReply)))
		if err != nil {
			return err
		}
		defer conn.Close()
		cl := &client{
			conn:   conn,
			entry:  entryv1.NewEntryClient(conn),
			agent:  agentv1.NewAgentClient(conn),
			bundle: bundlev1.NewBundleClient(conn),
			svid:   svidv1.NewSVIDClient(conn),
			admin:  adminv1.NewAdminClient(conn),
			health: grpc_health_v1.NewHealthClient(conn),
		}
		return cli.FromRPC(f(ctx, c, cl, args))
	}
}

// td asks the server for its trust domain, once.
func (cl *client) td(ctx context.Context) (string, error) {
	if cl.trustDomain == "" {
		b, err := cl.bundle.GetBundle(ctx, &bundlev1.GetBundleRequest{OutputMask: &types.BundleMask{}})
		if err != nil {
			return "", err
		}
		cl.trustDomain = b.TrustDomain
	}
	return cl.trustDomain, nil
}

// authorities returns the X.509 authorities of the bundle.
func (cl *client) authorities(ctx context.Context) (*types.Bundle, []*x509.Certificate, error) {
	b, err := cl.bundle.GetBundle(ctx, &bundlev1.GetBundleRequest{})
	if err != nil {
		return nil, nil, err
	}
	var out []*x509.Certificate
	for _, a := range b.X509Authorities {
		cs, err := x509.ParseCertificates(a.Asn1)
		if err != nil {
			return nil, nil, fmt.Errorf("authority in the bundle: %w", err)
		}
		out = append(out, cs...)
	}
	return b, out, nil
}

// itemError turns the status of one item of a batch into an error.
func itemError(st *types.Status) error {
	if st == nil {
		return fmt.Errorf("the server sent no status")
	}
	if codes.Code(st.Code) == codes.OK {
		return nil
	}
	return cli.FromStatus(status.New(codes.Code(st.Code), st.Message))
}
