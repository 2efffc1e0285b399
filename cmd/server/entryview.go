package main

import (
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
)

// entryJSON is the stable form of an entry for scripts.
type entryJSON struct {
	ID            string     `json:"id"`
	SPIFFEID      string     `json:"spiffe_id"`
	ParentID      string     `json:"parent_id"`
	Selectors     []string   `json:"selectors"`
	X509TTL       int32      `json:"x509_svid_ttl_seconds"` // 0: the server's default
	JWTTTL        int32      `json:"jwt_svid_ttl_seconds"`
	ExpiresAt     *time.Time `json:"expires_at"`
	DNSNames      []string   `json:"dns_names"`
	FederatesWith []string   `json:"federates_with"`
	Hint          string     `json:"hint"`
	Admin         bool       `json:"admin"`
	Downstream    bool       `json:"downstream"`
	Revision      int64      `json:"revision"`
	CreatedAt     *time.Time `json:"created_at"`
}

func toEntryJSON(e *types.Entry) entryJSON {
	return entryJSON{
		ID: e.Id, SPIFFEID: idString(e.SpiffeId), ParentID: idString(e.ParentId),
		Selectors: selectorStrings(e.Selectors), X509TTL: e.X509SvidTtl, JWTTTL: e.JwtSvidTtl,
		ExpiresAt: when(e.ExpiresAt), DNSNames: list(e.DnsNames), FederatesWith: list(e.FederatesWith),
		Hint: e.Hint, Admin: e.Admin, Downstream: e.Downstream,
		Revision: e.RevisionNumber, CreatedAt: when(e.CreatedAt),
	}
}

// list makes an absent list an empty one, so that its JSON is never null.
func list[T any](in []T) []T {
	if in == nil {
		return []T{}
	}
	return in
}

func emitEntry(c *cobra.Command, e *types.Entry) error {
	return emit(c, toEntryJSON(e), func(w io.Writer) error { return printEntry(w, e) })
}

func emitEntries(c *cobra.Command, all []*types.Entry) error {
	out := struct {
		Entries []entryJSON `json:"entries"`
	}{[]entryJSON{}}
	for _, e := range all {
		out.Entries = append(out.Entries, toEntryJSON(e))
	}
	return emit(c, out, func(w io.Writer) error {
		if len(all) == 0 {
			note(c, "no entries")
		}
		for i, e := range all {
			if i > 0 {
				fmt.Fprintln(w)
			}
			if err := printEntry(w, e); err != nil {
				return err
			}
		}
		return nil
	})
}

func printEntry(w io.Writer, e *types.Entry) error {
	var f fields
	f.add("Entry ID", e.Id)
	f.add("SPIFFE ID", idString(e.SpiffeId))
	parent := idString(e.ParentId)
	if e.ParentId.GetPath() == "/spire/server" {
		parent += " (a node alias)"
	}
	f.add("Parent ID", parent)
	for i, s := range selectorStrings(e.Selectors) {
		name := "Selectors:"
		if i > 0 {
			name = ""
		}
		f = append(f, []string{name, s})
	}
	ttl := "default"
	if e.X509SvidTtl != 0 {
		ttl = (time.Duration(e.X509SvidTtl) * time.Second).String()
	}
	f.add("X509-SVID TTL", ttl)
	if e.JwtSvidTtl != 0 {
		f.add("JWT-SVID TTL", (time.Duration(e.JwtSvidTtl) * time.Second).String())
	}
	f.add("Expires", whenText(e.ExpiresAt))
	f.add("DNS name", e.DnsNames...)
	f.add("Federates with", e.FederatesWith...)
	f.add("Hint", e.Hint)
	if e.Admin {
		f.add("Admin", "yes")
	}
	if e.Downstream {
		f.add("Downstream", "yes")
	}
	f.add("Revision", fmt.Sprint(e.RevisionNumber))
	f.add("Created", whenText(e.CreatedAt))
	return f.print(w)
}
