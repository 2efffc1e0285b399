package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"
	workloadpb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/pkg/svid"
)

// jwtView is what `api fetch jwt` prints for each token.
type jwtView struct {
	SPIFFEID string   `json:"spiffe_id"`
	Hint     string   `json:"hint,omitempty"`
	Audience []string `json:"audience"`
	NotAfter string   `json:"not_after"`
	SVID     string   `json:"svid"`
}

func fetchJWTCommand() *cobra.Command {
	c := &cobra.Command{
		Use: "jwt --audience NAME", Short: "Fetch JWT-SVIDs of this program", Args: cobra.NoArgs,
		Long: "Fetch JWT-SVIDs as a workload does. They are bearer tokens: whoever reads one can use it until it ends.",
	}
	socket := socketFlag(c)
	audience := c.Flags().StringArray("audience", nil, "who the token is for (required, may be repeated)")
	id := c.Flags().String("spiffe-id", "", "the identity to have it of (default: of each that this program has)")
	c.RunE = func(c *cobra.Command, _ []string) error {
		if len(*audience) == 0 {
			return cli.Usage("name who the token is for with --audience", "no audience is given")
		}
		ctx, cancel := context.WithTimeout(c.Context(), clientTimeout)
		defer cancel()
		conn, err := dial(ctx, *socket)
		if err != nil {
			return err
		}
		defer conn.Close()
		resp, err := workloadpb.NewSpiffeWorkloadAPIClient(conn).FetchJWTSVID(withHeader(ctx), &workloadpb.JWTSVIDRequest{Audience: *audience, SpiffeId: *id})
		if err != nil {
			return explain(err)
		}
		views, err := readJWTs(resp, *audience)
		if err != nil {
			return cli.Hint(fmt.Errorf("the agent's answer is not valid: %w", err), "look whether rootlink-agent serves this socket")
		}
		return emit(c, map[string]any{"svids": views}, func(w io.Writer) {
			for i, v := range views {
				if i > 0 {
					fmt.Fprintln(w)
				}
				fmt.Fprintf(w, "SPIFFE ID  %s\naudience   %s\nvalid      to %s\n", v.SPIFFEID, strings.Join(v.Audience, ", "), v.NotAfter)
				if v.Hint != "" {
					fmt.Fprintf(w, "hint       %s\n", v.Hint)
				}
				fmt.Fprintln(w, v.SVID)
			}
		})
	}
	return c
}

// readJWTs reads the message whole: one without a mandatory field is discarded
// (SPIFFE Workload API §4.5). The signature is the business of whom it is for.
func readJWTs(resp *workloadpb.JWTSVIDResponse, audience []string) ([]jwtView, error) {
	if len(resp.GetSvids()) == 0 {
		return nil, errors.New("no SVID in it")
	}
	var views []jwtView
	for _, s := range resp.GetSvids() {
		token, err := jwtsvid.ParseInsecure(s.GetSvid(), audience[:1])
		if err != nil {
			return nil, err
		}
		if s.GetSpiffeId() != token.ID.String() {
			return nil, fmt.Errorf("the SVID of %q comes as that of %q", token.ID, s.GetSpiffeId())
		}
		views = append(views, jwtView{
			SPIFFEID: s.GetSpiffeId(), Hint: s.GetHint(), Audience: token.Audience,
			NotAfter: token.Expiry.UTC().Format(time.RFC3339), SVID: s.GetSvid(),
		})
	}
	return views, nil
}

func validateJWTCommand() *cobra.Command {
	c := &cobra.Command{
		Use: "jwt --audience NAME --svid TOKEN", Short: "Validate a JWT-SVID", Args: cobra.NoArgs,
		Long: "Have the agent validate a JWT-SVID with the keys of the trust domain, and of those that this program's entries federate with.",
	}
	socket := socketFlag(c)
	audience := c.Flags().String("audience", "", "who it must be for: you (required)")
	token := c.Flags().String("svid", "", "the token, or - to read it from stdin, where no other user sees it (required)")
	c.RunE = func(c *cobra.Command, _ []string) error {
		if *audience == "" {
			return cli.Usage("name who the token must be for with --audience", "no audience is given")
		}
		if *token == "-" {
			b, err := io.ReadAll(io.LimitReader(c.InOrStdin(), svid.MaxJWT+2))
			if err != nil {
				return err
			}
			*token = string(bytes.TrimSpace(b))
		}
		if *token == "" {
			return cli.Usage("give it with --svid, or --svid - and on stdin", "no token is given")
		}
		ctx, cancel := context.WithTimeout(c.Context(), clientTimeout)
		defer cancel()
		conn, err := dial(ctx, *socket)
		if err != nil {
			return err
		}
		defer conn.Close()
		resp, err := workloadpb.NewSpiffeWorkloadAPIClient(conn).ValidateJWTSVID(withHeader(ctx), &workloadpb.ValidateJWTSVIDRequest{Audience: *audience, Svid: *token})
		if status.Code(err) == codes.InvalidArgument {
			return &cli.Error{Code: cli.ExitCrypto, Err: errors.New(status.Convert(err).Message()), Hint: "do not take its word: whoever shows this token has not proved to be its subject, or it is not for this audience"}
		}
		if err != nil {
			return explain(err)
		}
		if resp.GetSpiffeId() == "" || resp.GetClaims() == nil {
			return cli.Hint(errors.New("the agent's answer is not valid: a mandatory field is missing"), "look whether rootlink-agent serves this socket")
		}
		claims := resp.GetClaims().AsMap()
		return emit(c, map[string]any{"spiffe_id": resp.GetSpiffeId(), "claims": claims}, func(w io.Writer) {
			text, err := json.Marshal(claims)
			if err != nil {
				text = []byte(err.Error())
			}
			fmt.Fprintf(w, "SPIFFE ID  %s\nclaims     %s\n", resp.GetSpiffeId(), text)
		})
	}
	return c
}
