package main

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"

	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/internal/files"
	"github.com/rootlink/rootlink/internal/keyfile"
	"github.com/rootlink/rootlink/pkg/envelope"
	"github.com/rootlink/rootlink/pkg/link"
	adminv1 "github.com/rootlink/rootlink/proto/rootlink/admin/v1"
)

func trustCommand(at *location) *cobra.Command {
	return cli.Group("trust", "What verifiers take as given", trustExport(at), trustKey(at))
}

func trustExport(at *location) *cobra.Command {
	var format, out, revocations string
	var layoutKeys, allowTypes, acceptParent, acceptDetached []string
	var lifetime cli.Duration
	var anyNode, unsigned bool
	var sources sourceFlags
	c := &cobra.Command{
		Use: "export [--out FILE]", Short: "Write trust.json, all that `rootlink verify` needs to know", Args: cobra.NoArgs,
	}
	fs := c.Flags()
	fs.StringVar(&format, "format", "rootlink", "rootlink, or sigstore for the part that cosign reads")
	fs.StringVar(&out, "out", "", "`FILE` to write (default stdout)")
	fs.Var(&lifetime, "lifetime", "how long the file may be used (default 90d)")
	fs.StringArrayVar(&layoutKeys, "layout-key", nil, "`[NAME=]FILE` with the public key or certificate of a person who may sign layouts (repeatable)")
	fs.StringArrayVar(&acceptParent, "accept-parent", nil, "SPIFFE ID `PATTERN` of identities whose links are accepted with parent evidence, which binds no workload key and names no tool (repeatable)")
	fs.StringArrayVar(&acceptDetached, "accept-detached", nil, "SPIFFE ID `PATTERN` of identities whose links are accepted with detached evidence, by which the node vouches and the server checked nothing; their entries must lead to a TPM or a PCR policy (repeatable)")
	fs.StringArrayVar(&allowTypes, "allow-type", nil, "`ID=TYPE`: identities that match this SPIFFE ID pattern sign statements of this predicate type, and links only if that is listed too (repeatable)")
	fs.StringVar(&revocations, "revocations", "", "`FILE` of further revocations to put in")
	sources.register(fs)
	fs.BoolVar(&unsigned, "unsigned", false, "write the bare document, for rootlink trust sign where the trust key is kept")
	fs.BoolVar(&anyNode, "any-node", false, "accept any genuine TPM, not only those that attested here")
	demand := demandFlags(fs)
	c.RunE = withClient(at, func(ctx context.Context, c *cobra.Command, cl *client, _ []string) error {
		if format != "rootlink" && format != "sigstore" {
			return cli.Usage("rootlink for `rootlink verify`, sigstore for cosign", "--format %q is neither rootlink nor sigstore", format)
		}
		var err error
		req := &adminv1.ExportTrustRequest{Format: format, LifetimeSeconds: int64(lifetime.Seconds()), AnyNode: anyNode, Unsigned: unsigned, AcceptParent: acceptParent, AcceptDetached: acceptDetached}
		if req.Demands, err = demand(); err != nil {
			return err
		}
		for _, a := range allowTypes {
			id, name, ok := strings.Cut(a, "=")
			if !ok {
				return cli.Usage("such as --allow-type spiffe://example.org/sbom=cyclonedx", "--allow-type %q is not ID=TYPE", a)
			}
			uri, err := link.ResolvePredicateType(name)
			if err != nil {
				return cli.Usage("a short name, or the predicate type's whole URI", "--allow-type: %w", err)
			}
			req.AllowTypes = append(req.AllowTypes, &adminv1.AllowedType{Identity: id, Type: uri})
		}
		for _, k := range layoutKeys {
			key, err := readLayoutKey(k)
			if err != nil {
				return err
			}
			req.LayoutKeys = append(req.LayoutKeys, key)
		}
		if revocations != "" {
			b, err := cli.ReadInput(revocations, link.MaxRevocations)
			if err != nil {
				return err
			}
			req.RevocationsJson = b
		}
		if req.SourcesJson, err = sources.json(c); err != nil {
			return err
		}
		req.ResetSources = sources.reset
		if format == "sigstore" && (len(req.SourcesJson) > 0 || sources.reset) {
			return cli.Usage("name them to an export of trust.json: later ones of both formats hold them", "further time sources with --format sigstore")
		}
		r, err := cl.admin.ExportTrust(ctx, req)
		if err != nil {
			if err = cli.FromRPC(err); rpcCode(err) == codes.FailedPrecondition {
				if strings.Contains(err.Error(), "trust key") {
					return cli.Hint(err, "write the document with --unsigned and sign it where the key is: rootlink trust sign --key trust.key")
				}
				return cli.Hint(err, "start the server with --ek-roots or --ek-allow")
			}
			return err
		}
		for _, n := range r.Notes {
			note(c, "%s", n)
		}
		if out == "" {
			_, err := c.OutOrStdout().Write(r.Document)
			return err
		}
		// World-readable: it holds nothing secret and verifiers need it.
		if err := files.Write(out, r.Document, 0o644); err != nil {
			return err
		}
		return emit(c, struct {
			Out    string   `json:"out"`
			Format string   `json:"format"`
			Serial uint64   `json:"serial,omitempty"`
			Signed string   `json:"signed_by,omitempty"`
			Notes  []string `json:"notes"`
		}{out, format, r.Serial, r.SignedBy, list(r.Notes)}, func(w io.Writer) error {
			if r.Serial == 0 {
				_, err := fmt.Fprintf(w, "wrote %s\n", out)
				return err
			}
			_, err := fmt.Fprintf(w, "wrote %s, serial %d\n", out, r.Serial)
			return err
		})
	})
	return c
}

func trustKey(at *location) *cobra.Command {
	return &cobra.Command{
		Use: "key", Short: "Print the fingerprint of the key that signs trust.json, for `rootlink verify --trust-key`", Args: cobra.NoArgs,
		RunE: withClient(at, func(ctx context.Context, c *cobra.Command, cl *client, _ []string) error {
			r, err := cl.admin.TrustKey(ctx, &adminv1.TrustKeyRequest{})
			if err != nil {
				return err
			}
			pub, err := x509.ParsePKIXPublicKey(r.SpkiDer)
			if err != nil {
				return err
			}
			id, err := envelope.Fingerprint(pub)
			if err != nil {
				return err
			}
			return emit(c, struct {
				Fingerprint string `json:"fingerprint"`
				PublicKey   string `json:"public_key"`
				Here        bool   `json:"private_key_on_server"`
			}{id, string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: r.SpkiDer})), r.Here}, func(w io.Writer) error {
				_, err := fmt.Fprintln(w, id)
				return err
			})
		}),
	}
}

func readLayoutKey(s string) (*adminv1.LayoutKey, error) {
	name, path, ok := strings.Cut(s, "=")
	if !ok {
		path = s
		name = strings.TrimSuffix(filepath.Base(s), filepath.Ext(s))
	}
	pub, err := keyfile.Public(path)
	if err != nil {
		return nil, err
	}
	der, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		return nil, err
	}
	return &adminv1.LayoutKey{Name: name, SpkiDer: der}, nil
}

func joinLineCommand(at *location) *cobra.Command {
	return &cobra.Command{
		Use: "join-line", Short: "Print the line that a new agent is started with", Args: cobra.NoArgs,
		RunE: withClient(at, func(ctx context.Context, c *cobra.Command, cl *client, _ []string) error {
			r, err := cl.admin.JoinLine(ctx, &adminv1.JoinLineRequest{})
			if err = cli.FromRPC(err); rpcCode(err) == codes.FailedPrecondition {
				return cli.Hint(err, "start agents with --trust-bundle FILE: rootlink-server bundle show prints that file")
			}
			if err != nil {
				return err
			}
			return emit(c, map[string]string{"join_line": r.Line}, func(w io.Writer) error {
				_, err := fmt.Fprintln(w, r.Line)
				return err
			})
		}),
	}
}

func authorityCommand(at *location) *cobra.Command {
	return cli.Group("authority", "The X.509 authorities that sign SVIDs", authorityList(at), authorityRotate(at))
}

type authorityJSON struct {
	ID          string     `json:"id"`
	State       string     `json:"state"`
	Subject     string     `json:"subject"`
	NotBefore   time.Time  `json:"not_before"`
	NotAfter    time.Time  `json:"not_after"`
	PreparedAt  *time.Time `json:"prepared_at"`
	ActivatedAt *time.Time `json:"activated_at"`
	RetiredAt   *time.Time `json:"retired_at"`
}

func authorityList(at *location) *cobra.Command {
	return &cobra.Command{
		Use: "list", Short: "List every authority there ever was, with its windows", Args: cobra.NoArgs,
		RunE: withClient(at, func(ctx context.Context, c *cobra.Command, cl *client, _ []string) error {
			r, err := cl.admin.ListAuthorities(ctx, &adminv1.ListAuthoritiesRequest{})
			if err != nil {
				return err
			}
			out := struct {
				Authorities []authorityJSON `json:"authorities"`
			}{[]authorityJSON{}}
			rows := [][]string{{"AUTHORITY", "STATE", "SIGNED FROM", "UNTIL", "EXPIRES"}}
			for _, a := range r.Authorities {
				cert, err := x509.ParseCertificate(a.Certificate)
				if err != nil {
					return err
				}
				out.Authorities = append(out.Authorities, authorityJSON{
					ID: a.Id, State: a.State, Subject: cert.Subject.String(),
					NotBefore: cert.NotBefore.UTC(), NotAfter: cert.NotAfter.UTC(),
					PreparedAt: when(a.PreparedUnix), ActivatedAt: when(a.ActivatedUnix), RetiredAt: when(a.RetiredUnix),
				})
				rows = append(rows, []string{a.Id, a.State, dash(whenText(a.ActivatedUnix)), dash(whenText(a.RetiredUnix)), cert.NotAfter.UTC().Format(time.RFC3339)})
			}
			return emit(c, out, func(w io.Writer) error { return table(w, rows...) })
		}),
	}
}

func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

func authorityRotate(at *location) *cobra.Command {
	return &cobra.Command{
		Use: "rotate", Short: "Make a new authority and sign with it from now on", Args: cobra.NoArgs,
		RunE: withClient(at, func(ctx context.Context, c *cobra.Command, cl *client, _ []string) error {
			r, err := cl.admin.RotateAuthority(ctx, &adminv1.RotateAuthorityRequest{})
			if err != nil {
				return err
			}
			cert, err := x509.ParseCertificate(r.Certificate)
			if err != nil {
				return err
			}
			note(c, "verifiers need a new trust.json: `%s trust export`", program)
			return emit(c, struct {
				ID       string    `json:"id"`
				Subject  string    `json:"subject"`
				NotAfter time.Time `json:"not_after"`
			}{fmt.Sprintf("%x", cert.SubjectKeyId), cert.Subject.String(), cert.NotAfter.UTC()}, func(w io.Writer) error {
				_, err := fmt.Fprintf(w, "active: %x, until %s\n", cert.SubjectKeyId, cert.NotAfter.UTC().Format(time.RFC3339))
				return err
			})
		}),
	}
}
