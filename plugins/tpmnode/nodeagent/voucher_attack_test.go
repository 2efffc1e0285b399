package nodeagent_test

import (
	"bytes"
	"context"
	"crypto/elliptic"
	"crypto/sha256"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	workloadv1 "github.com/rootlink/rootlink/proto/rootlink/workload/v1"
)

// TestRefusesStrangers: without the header a browser could be made to ask.
func TestRefusesStrangers(t *testing.T) {
	n := newStockNode(t)
	n.attested()
	c := n.dial()
	plain, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for what, ctx := range map[string]context.Context{
		"no header":    plain,
		"header false": metadata.AppendToOutgoingContext(plain, "workload.spiffe.io", "false"),
		"header twice": metadata.AppendToOutgoingContext(plain, "workload.spiffe.io", "true", "workload.spiffe.io", "true"),
	} {
		if _, err := c.Measure(ctx, &workloadv1.MeasureRequest{}); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%s: Measure: %v", what, err)
		}
		if _, err := c.Vouch(ctx, &workloadv1.VouchRequest{X509Svid: [][]byte{n.ca.workload()}, PayloadSha256: payload[:]}); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%s: Vouch: %v", what, err)
		}
	}
	// And with it, nobody who was not measured.
	if _, err := c.vouch(n.ca.workload()); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("nothing measured: %v", err)
	}
	if _, err := c.Measure(c.ctx, &workloadv1.MeasureRequest{}); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("no tool: %v", err)
	}
	if _, err := c.Measure(c.ctx, &workloadv1.MeasureRequest{SpiffeId: "spiffe://" + trustDomain + "/build"}); status.Code(err) != codes.InvalidArgument {
		t.Errorf("a SPIFFE ID: %v", err)
	}
}

// TestRefusesSVIDs that no verifier would take, or that are no workload's.
func TestRefusesSVIDs(t *testing.T) {
	n := newStockNode(t)
	n.attested()
	c := n.dial()
	c.record()
	other := newAuthority(t, trustDomain)
	get := func(a *authority, path string, ago, in time.Duration, curve elliptic.Curve) [][]byte {
		der, _ := a.svid(path, ago, in, curve)
		return [][]byte{der}
	}
	for what, x := range map[string]struct {
		svid [][]byte
		want codes.Code
	}{
		"of another trust domain": {get(newAuthority(t, "example.com"), "/build", time.Minute, time.Hour, elliptic.P256()), codes.PermissionDenied},
		"of another authority":    {get(other, "/build", time.Minute, time.Hour, elliptic.P256()), codes.PermissionDenied},
		"expired":                 {get(n.ca, "/build", time.Hour, -time.Minute, elliptic.P256()), codes.PermissionDenied},
		"not yet valid":           {get(n.ca, "/build", -time.Minute, time.Hour, elliptic.P256()), codes.PermissionDenied},
		"of an agent":             {get(n.ca, n.path, time.Minute, time.Hour, elliptic.P256()), codes.PermissionDenied},
		"of the server":           {get(n.ca, "/spire/server", time.Minute, time.Hour, elliptic.P256()), codes.PermissionDenied},
		"an authority":            {[][]byte{n.ca.cert.Raw}, codes.PermissionDenied},
		"P-384":                   {get(n.ca, "/build", time.Minute, time.Hour, elliptic.P384()), codes.InvalidArgument},
		"garbage":                 {[][]byte{[]byte("x")}, codes.InvalidArgument},
		"none":                    {nil, codes.InvalidArgument},
		"too many":                {slices.Repeat([][]byte{n.ca.workload()}, 6), codes.InvalidArgument},
		"too large":               {[][]byte{make([]byte, 100<<10)}, codes.InvalidArgument},
		"larger than a message":   {[][]byte{make([]byte, 300<<10)}, codes.ResourceExhausted},
		"followed by another":     {append(get(n.ca, "/build", time.Minute, time.Hour, elliptic.P256()), []byte("x")), codes.InvalidArgument},
	} {
		if _, err := c.vouch(x.svid...); status.Code(err) != x.want {
			t.Errorf("%s: %v, want %v", what, err, x.want)
		}
	}
	for what, digest := range map[string][]byte{"no digest": nil, "short digest": payload[:31], "zero digest": make([]byte, 32)} {
		if _, err := c.Vouch(c.ctx, &workloadv1.VouchRequest{X509Svid: [][]byte{n.ca.workload()}, PayloadSha256: digest}); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%s: %v", what, err)
		}
	}
	if _, err := c.vouch(n.ca.workload()); err != nil {
		t.Errorf("a good one after all these: %v", err)
	}
	another := sha256.Sum256([]byte("another"))
	if _, err := c.Vouch(c.ctx, &workloadv1.VouchRequest{X509Svid: [][]byte{n.ca.workload()}, PayloadSha256: another[:]}); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("another statement under the same measurement: %v", err)
	}
}

// TestRefusesAgentData that is not this node's, or that others could have put there.
func TestRefusesAgentData(t *testing.T) {
	n := newStockNode(t)
	n.attested()
	good, err := os.ReadFile(filepath.Join(n.data, "agent-data.json"))
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(n.data, "agent-data.json")
	strange, _ := n.ca.svid("/spire/agent/tpmnode/"+strings.Repeat("ab", 32), time.Minute, time.Hour, elliptic.P256())
	token, _ := n.ca.svid("/spire/agent/join_token/x", time.Minute, time.Hour, elliptic.P256())
	foreign, _ := newAuthority(t, trustDomain).svid(n.path, time.Minute, time.Hour, elliptic.P256())
	own, _ := n.ca.svid(n.path, time.Minute, time.Hour, elliptic.P256())
	c := n.dial()
	c.record()
	for _, x := range []struct {
		what string
		do   func()
		says string
	}{
		{"of another TPM", func() { n.save(strange) }, "not that of this TPM"},
		{"attested by other means", func() { n.save(token) }, "not that of this TPM"},
		{"signed by another authority", func() { n.save(foreign) }, "agent SVID"},
		{"not JSON", func() { n.write([]byte("\x00garbage")) }, "agent-data.json"},
		{"not certificates", func() { n.write([]byte(`{"svid":["AAAA"],"bundle":["AAAA"]}`)) }, "svid"},
		{"too large", func() { n.write(bytes.Repeat([]byte(" "), 2<<20)) }, "bytes"},
		{"a chain of many", func() { n.save(slices.Repeat([][]byte{own}, 6)...) }, "at most"},
		{"writable for others", func() { n.write(good); chmod(t, file, 0o666) }, "writable"},
		{"writable for its group", func() { n.write(good); chmod(t, file, 0o660) }, "writable"},
		{"in a directory that others write", func() { n.write(good); chmod(t, n.data, 0o777) }, "writable"},
		{"a link", func() {
			chmod(t, n.data, 0o700)
			elsewhere := filepath.Join(t.TempDir(), "x")
			if err := os.WriteFile(elsewhere, good, 0o600); err != nil {
				t.Fatal(err)
			}
			os.Remove(file)
			if err := os.Symlink(elsewhere, file); err != nil {
				t.Fatal(err)
			}
		}, "symbolic links"},
		{"a directory", func() {
			os.Remove(file)
			if err := os.Mkdir(file, 0o700); err != nil {
				t.Fatal(err)
			}
		}, "no regular file"},
	} {
		x.do()
		_, err := c.vouch(n.ca.workload())
		if status.Code(err) != codes.FailedPrecondition || !strings.Contains(status.Convert(err).Message(), x.says) || !strings.Contains(status.Convert(err).Message(), "hint:") {
			t.Errorf("%s: %v", x.what, err)
		}
	}
	// It is read anew each time.
	os.Remove(file)
	n.write(good)
	if _, err := c.vouch(n.ca.workload()); err != nil {
		t.Errorf("the good one again: %v", err)
	}
}

func chmod(t *testing.T, path string, mode os.FileMode) {
	t.Helper()
	if err := os.Chmod(path, mode); err != nil {
		t.Fatal(err)
	}
}

// A caller decides how often it is refused: the disk that the log is on must not
// fill with it.
func TestRefusesInFewLines(t *testing.T) {
	n := newStockNode(t)
	n.attested()
	c := n.dial()
	c.record()
	svid, _ := newAuthority(t, "example.com").svid("/build", time.Minute, time.Hour, elliptic.P256())
	began := time.Now()
	const calls = 1500
	for range calls {
		if _, err := c.vouch(svid); status.Code(err) != codes.PermissionDenied {
			t.Fatal(err)
		}
	}
	most := 510 + int(20*time.Since(began).Seconds())
	if lines := strings.Count(n.log.String(), "no detached evidence"); lines == 0 || lines > most {
		t.Errorf("%d lines, at most %d", lines, most)
	}
}
