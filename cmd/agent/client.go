package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"

	"github.com/rootlink/rootlink/internal/cli"
)

// socketFlag adds --socket with the default that SPIFFE clients use.
func socketFlag(c *cobra.Command) *string {
	return c.Flags().String("socket", "", "socket of the agent (default $"+envSocket+", else "+defaultSocket+")")
}

func dial(ctx context.Context, flag string) (*grpc.ClientConn, error) {
	path := flag
	switch env := os.Getenv(envSocket); {
	case path != "":
		if strings.HasPrefix(path, "tcp:") {
			return nil, cli.Usage("name it as /path/to/agent.sock", "--socket %s: %w", path, cli.ErrEndpointTCP)
		}
	case env != "":
		var err error
		if path, err = cli.EndpointSocket(env); err != nil {
			return nil, cli.Usage("set it to unix:///path/to/agent.sock, or name the socket with --socket", "%w", err)
		}
	default:
		path = defaultSocket
	}
	return cli.Socket{Path: path, Daemon: program, Flag: "--socket"}.Dial(ctx)
}

// withHeader adds what SPIFFE Workload Endpoint §3 demands of every call, against
// requests that are forged by way of a browser or proxy.
func withHeader(ctx context.Context) context.Context {
	return metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", "true")
}

func healthcheckCommand() *cobra.Command {
	c := &cobra.Command{Use: "healthcheck", Short: "Exit with 0 if the agent is attested and serves", Args: cobra.NoArgs}
	socket := socketFlag(c)
	c.RunE = func(c *cobra.Command, _ []string) error {
		ctx, cancel := context.WithTimeout(c.Context(), clientTimeout)
		defer cancel()
		conn, err := dial(ctx, *socket)
		if err != nil {
			return err
		}
		defer conn.Close()
		r, err := healthpb.NewHealthClient(conn).Check(withHeader(ctx), &healthpb.HealthCheckRequest{})
		if err != nil {
			return cli.FromRPC(err)
		}
		if r.Status != healthpb.HealthCheckResponse_SERVING {
			return cli.Hint(fmt.Errorf("the agent answers and says %s", r.Status),
				"it has not attested and synced yet: its log says why")
		}
		return emit(c, map[string]string{"status": "serving"}, func(w io.Writer) { fmt.Fprintln(w, "serving") })
	}
	return c
}

// emit prints v as JSON or what text writes, as --output says.
func emit(c *cobra.Command, v any, text func(io.Writer)) error {
	if cli.WantsJSON(c) {
		return cli.PrintJSON(c.OutOrStdout(), v)
	}
	text(c.OutOrStdout())
	return nil
}
