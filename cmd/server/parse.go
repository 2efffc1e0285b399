package main

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/pkg/attest"
	adminv1 "github.com/rootlink/rootlink/proto/rootlink/admin/v1"
)

// spiffeID reads a SPIFFE ID; one that begins with / is of the server's own
// trust domain.
func (cl *client) spiffeID(ctx context.Context, flag, s string) (*types.SPIFFEID, error) {
	if strings.HasPrefix(s, "/") {
		td, err := cl.td(ctx)
		if err != nil {
			return nil, err
		}
		s = "spiffe://" + td + s
	}
	id, err := spiffeid.FromString(s)
	if err != nil {
		return nil, cli.Usage("write it as spiffe://TRUST-DOMAIN/PATH, or /PATH for the server's own trust domain", "%s %q: %w", flag, s, err)
	}
	if id.Path() == "" {
		return nil, cli.Usage("name a path, such as /build/hello", "%s %q has no path", flag, s)
	}
	return &types.SPIFFEID{TrustDomain: id.TrustDomain().Name(), Path: id.Path()}, nil
}

func idString(id *types.SPIFFEID) string {
	if id == nil {
		return ""
	}
	return "spiffe://" + id.TrustDomain + id.Path
}

// selectors reads TYPE:VALUE; the value may hold further colons.
func selectors(flag string, in []string) ([]*types.Selector, error) {
	var out []*types.Selector
	for _, s := range in {
		typ, value, ok := strings.Cut(s, ":")
		if !ok || typ == "" || value == "" {
			return nil, cli.Usage("such as binary:uid:1000 or tpmnode:pcr_policy:lab", "%s %q is not TYPE:VALUE", flag, s)
		}
		out = append(out, &types.Selector{Type: typ, Value: value})
	}
	return out, nil
}

func selectorStrings(in []*types.Selector) []string {
	out := make([]string, 0, len(in))
	for _, s := range in {
		out = append(out, s.Type+":"+s.Value)
	}
	return out
}

// moment is a flag value: RFC 3339, or a duration from now.
type moment struct{ time.Time }

func (m *moment) String() string {
	if m.IsZero() {
		return ""
	}
	return m.Format(time.RFC3339)
}

func (m *moment) Type() string { return "time" }

func (m *moment) Set(s string) error {
	if t, err := time.Parse(time.RFC3339, s); err == nil {
		m.Time = t
		return nil
	}
	var d cli.Duration
	if err := d.Set(s); err != nil {
		return fmt.Errorf("%q is neither a time such as 2030-01-31T00:00:00Z nor a duration from now", s)
	}
	m.Time = time.Now().Add(time.Duration(d))
	return nil
}

func (m moment) unix() int64 {
	if m.IsZero() {
		return 0
	}
	return m.Unix()
}

// pcrSelections reads BANK:LIST such as sha256:0-7,14.
func pcrSelections(flag string, in []string) ([]*adminv1.PCRSelection, error) {
	var out []*adminv1.PCRSelection
	for _, text := range in {
		sel, err := attest.ParsePCRs(strings.ToLower(text))
		if err != nil {
			return nil, cli.Usage("such as sha256:7 or sha256:0-7,14", "%s %q is not BANK:LIST with PCRs from 0 to %d", flag, text, attest.MaxPCR)
		}
		for _, s := range sel {
			out = append(out, &adminv1.PCRSelection{Bank: s.Bank, Indices: s.Indices})
		}
	}
	return out, nil
}
