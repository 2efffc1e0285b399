package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"

	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/internal/files"
)

func jwtCommand(at *location) *cobra.Command {
	return cli.Group("jwt", "JWT-SVIDs by an administrator's word", jwtMint(at))
}

type jwtJSON struct {
	SPIFFEID  string     `json:"spiffe_id"`
	Audience  []string   `json:"audience"`
	ExpiresAt *time.Time `json:"expires_at"`
	Token     string     `json:"token"` // with --write its path
}

func jwtMint(at *location) *cobra.Command {
	var id, path string
	var audience []string
	var ttl cli.Duration
	c := &cobra.Command{
		Use: "mint --spiffe-id ID --audience NAME [--write FILE]", Short: "Sign a JWT-SVID", Args: cobra.NoArgs,
		Long: "Sign a JWT-SVID on an administrator's word alone. It is a bearer token: whoever reads it can use it until it ends.",
	}
	c.Flags().StringVar(&id, "spiffe-id", "", "the identity: spiffe://TRUST-DOMAIN/PATH or /PATH")
	c.Flags().StringArrayVar(&audience, "audience", nil, "who the token is for (repeatable; each of them can use it towards the others)")
	c.Flags().Var(&ttl, "ttl", "lifetime, at most 24h (default that of the server)")
	c.Flags().StringVar(&path, "write", "", "write the token to this file, mode 0600, instead of stdout")
	_ = c.MarkFlagRequired("spiffe-id")
	_ = c.MarkFlagRequired("audience")
	c.RunE = withClient(at, func(ctx context.Context, c *cobra.Command, cl *client, _ []string) error {
		sid, err := cl.spiffeID(ctx, "--spiffe-id", id)
		if err != nil {
			return err
		}
		r, err := cl.svid.MintJWTSVID(ctx, &svidv1.MintJWTSVIDRequest{Id: sid, Audience: audience, Ttl: ttl.Seconds()})
		if err != nil {
			return err
		}
		if r.GetSvid().GetToken() == "" {
			return errors.New("the server sent no token")
		}
		out := jwtJSON{SPIFFEID: idString(sid), Audience: audience, ExpiresAt: when(r.Svid.ExpiresAt), Token: r.Svid.Token}
		if path != "" {
			if err := files.Write(path, []byte(out.Token), 0o600); err != nil {
				return err
			}
			out.Token = path
		}
		return emit(c, out, func(w io.Writer) error {
			_, err := fmt.Fprintln(w, out.Token)
			return err
		})
	})
	return c
}
