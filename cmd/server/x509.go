package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"net/url"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"

	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/internal/files"
)

func x509Command(at *location) *cobra.Command {
	return cli.Group("x509", "X509-SVIDs by an administrator's word", x509Mint(at))
}

type mintJSON struct {
	SPIFFEID  string     `json:"spiffe_id"`
	ExpiresAt *time.Time `json:"expires_at"`
	// With --write the paths, else the PEM texts.
	SVID   string `json:"svid"`
	Key    string `json:"key"`
	Bundle string `json:"bundle"`
}

func x509Mint(at *location) *cobra.Command {
	var id, dir string
	var dns []string
	var ttl cli.Duration
	c := &cobra.Command{
		Use: "mint --spiffe-id ID [--write DIR]", Short: "Make a key and an SVID for it", Args: cobra.NoArgs,
		Long: "Make a key and an SVID for it, on an administrator's word alone. It carries no hardware evidence, so no verifier takes it for an attested one.",
	}
	c.Flags().StringVar(&id, "spiffe-id", "", "the identity: spiffe://TRUST-DOMAIN/PATH or /PATH")
	c.Flags().Var(&ttl, "ttl", "lifetime (default that of the server)")
	c.Flags().StringArrayVar(&dns, "dns", nil, "DNS name in the SVID (repeatable)")
	c.Flags().StringVar(&dir, "write", "", "write svid.pem, key.pem and bundle.pem to this directory instead of stdout")
	_ = c.MarkFlagRequired("spiffe-id")
	c.RunE = withClient(at, func(ctx context.Context, c *cobra.Command, cl *client, _ []string) error {
		sid, err := cl.spiffeID(ctx, "--spiffe-id", id)
		if err != nil {
			return err
		}
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return err
		}
		keyDER, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			return err
		}
		csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
			URIs:     []*url.URL{{Scheme: "spiffe", Host: sid.TrustDomain, Path: sid.Path}},
			DNSNames: dns,
		}, key)
		if err != nil {
			return err
		}
		r, err := cl.svid.MintX509SVID(ctx, &svidv1.MintX509SVIDRequest{Csr: csr, Ttl: ttl.Seconds()})
		if err != nil {
			return err
		}
		_, bundle, err := cl.authorities(ctx)
		if err != nil {
			return err
		}
		var chain []*x509.Certificate
		for _, der := range r.GetSvid().GetCertChain() {
			cert, err := x509.ParseCertificate(der)
			if err != nil {
				return fmt.Errorf("the SVID that the server sent: %w", err)
			}
			chain = append(chain, cert)
		}
		if len(chain) == 0 {
			return fmt.Errorf("the server sent no certificate")
		}
		out := mintJSON{SPIFFEID: idString(sid), ExpiresAt: when(r.Svid.ExpiresAt)}
		outs := []struct {
			name string
			data []byte
			mode os.FileMode
			to   *string
		}{
			// The key goes first: an svid.pem without its key would look usable.
			{"key.pem", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}), 0o600, &out.Key},
			{"svid.pem", certPEM(chain...), 0o644, &out.SVID},
			{"bundle.pem", certPEM(bundle...), 0o644, &out.Bundle},
		}
		if dir == "" {
			for _, f := range outs {
				*f.to = string(f.data)
			}
			return emit(c, out, func(w io.Writer) error {
				_, err := fmt.Fprint(w, out.SVID, out.Key, out.Bundle)
				return err
			})
		}
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return err
		}
		for _, f := range outs {
			*f.to = filepath.Join(dir, f.name)
			if err := files.Write(*f.to, f.data, f.mode); err != nil {
				return err
			}
		}
		return emit(c, out, func(w io.Writer) error {
			return table(w, []string{"SVID:", out.SVID}, []string{"Key:", out.Key}, []string{"Bundle:", out.Bundle})
		})
	})
	return c
}
