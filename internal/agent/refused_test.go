package agent

import (
	"crypto/x509"
	"strings"
	"testing"
	"time"

	workloadpb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	"github.com/rootlink/rootlink/internal/agent/upstream"
	workloadv1 "github.com/rootlink/rootlink/proto/rootlink/workload/v1"
)

// slowly keeps the keeper from noticing anything before a call does.
func slowly(c *Config) { c.SyncInterval = time.Hour }

// TestEvictedWhileAStepSigns: the build has run, so the step must not be lost to
// a server that wants the agent to attest again. At each of its calls.
func TestEvictedWhileAStepSigns(t *testing.T) {
	for _, before := range []string{"Prepare", "Issue"} {
		t.Run(before, func(t *testing.T) {
			s := newFakeServer(t)
			s.start()
			s.addEntry("/step", "binary:tool:sha256:"+hashFile(t, program(t, "true")), unprotected(t))
			r := startAgent(t, s, slowly)
			r.waitReady()
			c, ctx := workloadv1.NewIssuerClient(r.dial()), testContext(t)
			if _, err := record(t, ctx, c, "", "true"); err != nil {
				t.Fatal(err)
			}
			st := newStatement(t, "statement")
			var ext []byte
			var err error
			if before == "Issue" {
				if ext, err = st.prepare(ctx, c); err != nil {
					t.Fatal(err)
				}
				s.with(func() { s.active = nil })
				_, err = c.Issue(ctx, &workloadv1.IssueRequest{Csr: st.csr(t, ext)})
				wantCode(t, "evidence under the old agent SVID", err, codes.Aborted)
			} else {
				s.with(func() { s.active = nil })
			}
			if ext, err = st.prepare(ctx, c); err != nil {
				t.Fatalf("Prepare: %v", err)
			}
			if _, err = c.Issue(ctx, &workloadv1.IssueRequest{Csr: st.csr(t, ext)}); err != nil {
				t.Fatalf("Issue: %v", err)
			}
			if s.stale != 0 {
				t.Error("evidence under the old agent SVID was sent: a server notes that as an attack")
			}
		})
	}
}

// TestEvictedAndCannotAttest: a server that is not reached a second time is
// "later", never "no".
func TestEvictedAndCannotAttest(t *testing.T) {
	t.Parallel() // it waits, and computes little
	s := newFakeServer(t)
	s.start()
	s.addEntry("/w", selfHash(t))
	r := startAgent(t, s, slowly)
	r.waitReady()
	s.with(func() { s.active, s.noAttest = nil, true })
	_, _, err := r.fetch()
	wantCode(t, "evicted", err, codes.Unavailable)
}

// TestBannedWhileAStepSigns: whoever waits hears of the ban, not of a socket
// that went away.
func TestBannedWhileAStepSigns(t *testing.T) {
	s := newFakeServer(t)
	s.start()
	s.addEntry("/step", "binary:tool:sha256:"+hashFile(t, program(t, "true")), unprotected(t))
	s.addEntry("/w", selfHash(t))
	r := startAgent(t, s, slowly)
	r.waitReady()
	conn, ctx := r.dial(), testContext(t)
	c := workloadv1.NewIssuerClient(conn)
	if _, err := record(t, ctx, c, "", "true"); err != nil {
		t.Fatal(err)
	}
	watch, err := healthpb.NewHealthClient(conn).Watch(ctx, &healthpb.HealthCheckRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := watch.Recv(); err != nil {
		t.Fatal(err)
	}
	stream, _, err := r.fetch()
	if err != nil {
		t.Fatal(err)
	}
	s.with(func() { s.banned = true })
	banned := func(who string, err error) {
		t.Helper()
		wantCode(t, who, err, codes.PermissionDenied)
		if m := status.Convert(err).Message(); !strings.Contains(m, upstream.ErrBanned.Error()) || !strings.Contains(m, "; hint: ") {
			t.Errorf("%s: %q names no ban or says not what to do", who, m)
		}
	}
	_, err = newStatement(t, "statement").prepare(ctx, c)
	banned("the step", err)
	_, err = watch.Recv()
	banned("who watches", err)
	_, err = stream.Recv()
	banned("a workload's stream", err)
	<-r.done
}

// TestSVIDVerifiesWithTheBundleBesideIt: the server signs with an authority
// that the agent has not seen yet. No workload gets an SVID and a bundle that do
// not fit together.
func TestSVIDVerifiesWithTheBundleBesideIt(t *testing.T) {
	s := newFakeServer(t)
	s.start()
	r := startAgent(t, s, slowly)
	r.waitReady()
	s.rotate(true)
	s.addEntry("/w", selfHash(t))
	_, resp, err := r.fetch()
	if err != nil {
		t.Fatal(err)
	}
	fits(t, resp)
}

// fits verifies each SVID with the bundle it came with.
func fits(t *testing.T, resp *workloadpb.X509SVIDResponse) {
	t.Helper()
	for _, svid := range resp.Svids {
		roots := x509.NewCertPool()
		as, err := x509.ParseCertificates(svid.Bundle)
		if err != nil {
			t.Fatal(err)
		}
		for _, a := range as {
			roots.AddCert(a)
		}
		if _, err := leafOf(t, svid).Verify(x509.VerifyOptions{Roots: roots, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err != nil {
			t.Errorf("%s does not verify with its bundle of %d: %v", svid.SpiffeId, len(as), err)
		}
	}
}
