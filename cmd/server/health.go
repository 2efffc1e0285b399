package main

import (
	"context"
	"fmt"
	"io"
	"maps"
	"slices"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/health/grpc_health_v1"

	"github.com/rootlink/rootlink/internal/cli"
	adminv1 "github.com/rootlink/rootlink/proto/rootlink/admin/v1"
)

func healthcheckCommand(at *location) *cobra.Command {
	return &cobra.Command{
		Use: "healthcheck", Short: "Exit with 0 if the server answers and can work", Args: cobra.NoArgs,
		RunE: withClient(at, func(ctx context.Context, c *cobra.Command, cl *client, _ []string) error {
			r, err := cl.health.Check(ctx, &grpc_health_v1.HealthCheckRequest{})
			if err != nil {
				return err
			}
			if r.Status != grpc_health_v1.HealthCheckResponse_SERVING {
				return cli.Hint(fmt.Errorf("the server answers and says %s", r.Status), "look at its log")
			}
			return emit(c, map[string]string{"status": "serving"}, func(w io.Writer) error {
				_, err := fmt.Fprintln(w, "serving")
				return err
			})
		}),
	}
}

func countersCommand(at *location) *cobra.Command {
	return &cobra.Command{
		Use: "counters", Short: "Print what was issued and refused since the server started", Args: cobra.NoArgs,
		RunE: withClient(at, func(ctx context.Context, c *cobra.Command, cl *client, _ []string) error {
			r, err := cl.admin.Counters(ctx, &adminv1.CountersRequest{})
			if err != nil {
				return err
			}
			all := r.Counters
			if all == nil {
				all = map[string]uint64{}
			}
			return emit(c, map[string]any{"counters": all}, func(w io.Writer) error {
				var rows [][]string
				for _, name := range slices.Sorted(maps.Keys(all)) {
					rows = append(rows, []string{name, fmt.Sprint(all[name])})
				}
				return table(w, rows...)
			})
		}),
	}
}
