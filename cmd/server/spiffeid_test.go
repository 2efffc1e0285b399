package main

import (
	"testing"

	"github.com/rootlink/rootlink/internal/cli"
)

func TestSPIFFEIDSection2SchemeAndComponents(t *testing.T) {
	cl := &client{}
	for name, s := range map[string]string{
		"no scheme": "example.org/a", "other scheme": "https://example.org/a", "upper-case scheme": "SPIFFE://example.org/a",
		"no trust domain": "spiffe:///a", "one slash": "spiffe:/example.org/a", "opaque": "spiffe:example.org/a",
		"query": "spiffe://example.org/a?b=c", "empty query": "spiffe://example.org/a?",
		"fragment": "spiffe://example.org/a#b", "empty fragment": "spiffe://example.org/a#",
		"user": "spiffe://u@example.org/a", "port": "spiffe://example.org:443/a", "colon": "spiffe://example.org:/a",
		"no path": "spiffe://example.org", "trailing slash": "spiffe://example.org/a/", "empty": "",
	} {
		if id, err := cl.spiffeID(t.Context(), "--spiffe-id", s); cli.ExitCode(err) != cli.ExitUsage {
			t.Errorf("%s: %v, %v", name, id, err)
		}
	}
	if id, err := cl.spiffeID(t.Context(), "--spiffe-id", "spiffe://example.org/a/B-c_d.e"); err != nil || idString(id) != "spiffe://example.org/a/B-c_d.e" {
		t.Errorf("%v, %v", id, err)
	}
}
