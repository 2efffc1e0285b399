package main

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/rootlink/rootlink/internal/cli"
)

func bundleCommand(at *location) *cobra.Command {
	return cli.Group("bundle", "The trust domain's authorities", bundleShow(at))
}

type bundleJSON struct {
	TrustDomain     string    `json:"trust_domain"`
	SequenceNumber  uint64    `json:"sequence_number"`
	X509Authorities []string  `json:"x509_authorities"` // PEM
	JWTAuthorities  []jwkJSON `json:"jwt_authorities"`
}

type jwkJSON struct {
	KeyID     string     `json:"kid"`
	PublicKey string     `json:"public_key"` // PEM
	ExpiresAt *time.Time `json:"expires_at"`
}

func bundleShow(at *location) *cobra.Command {
	var format string
	c := &cobra.Command{Use: "show", Short: "Print the authorities, for agents and for openssl", Args: cobra.NoArgs}
	c.Flags().StringVar(&format, "format", "pem", "pem, or spiffe for a SPIFFE bundle document")
	c.RunE = withClient(at, func(ctx context.Context, c *cobra.Command, cl *client, _ []string) error {
		if format != "pem" && format != "spiffe" {
			return cli.Usage("pem for agents and openssl, spiffe for SPIFFE bundle endpoints", "--format %q is neither pem nor spiffe", format)
		}
		b, certs, err := cl.authorities(ctx)
		if err != nil {
			return err
		}
		if format == "spiffe" {
			doc, err := bundleDocument(b, certs)
			if err != nil {
				return err
			}
			_, err = fmt.Fprintf(c.OutOrStdout(), "%s\n", doc)
			return err
		}
		out := bundleJSON{TrustDomain: b.TrustDomain, SequenceNumber: b.SequenceNumber, X509Authorities: []string{}, JWTAuthorities: []jwkJSON{}}
		for _, a := range certs {
			out.X509Authorities = append(out.X509Authorities, string(certPEM(a)))
		}
		for _, k := range b.JwtAuthorities {
			out.JWTAuthorities = append(out.JWTAuthorities, jwkJSON{
				k.KeyId, string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: k.PublicKey})), when(k.ExpiresAt),
			})
		}
		return emit(c, out, func(w io.Writer) error {
			_, err := w.Write(certPEM(certs...))
			return err
		})
	})
	return c
}

// bundleDocument is the SPIFFE bundle of X509-SVID §6.1 and JWT-SVID §6.1.
func bundleDocument(b *types.Bundle, certs []*x509.Certificate) ([]byte, error) {
	td, err := spiffeid.TrustDomainFromString(b.TrustDomain)
	if err != nil {
		return nil, err
	}
	sb := spiffebundle.FromX509Authorities(td, certs)
	for _, k := range b.JwtAuthorities {
		key, err := x509.ParsePKIXPublicKey(k.PublicKey)
		if err != nil {
			return nil, fmt.Errorf("JWT authority %q in the bundle: %w", k.KeyId, err)
		}
		if err := sb.AddJWTAuthority(k.KeyId, key); err != nil {
			return nil, fmt.Errorf("JWT authority %q in the bundle: %w", k.KeyId, err)
		}
	}
	sb.SetSequenceNumber(b.SequenceNumber)
	if b.RefreshHint > 0 {
		sb.SetRefreshHint(time.Duration(b.RefreshHint) * time.Second)
	}
	return sb.Marshal()
}

func certPEM(certs ...*x509.Certificate) (out []byte) {
	for _, a := range certs {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.Raw})...)
	}
	return out
}
