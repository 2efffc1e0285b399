package agent

import (
	"crypto/sha256"
	"crypto/x509"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/rootlink/rootlink/pkg/attest"
	workloadv1 "github.com/rootlink/rootlink/proto/rootlink/workload/v1"
)

// stockStepAgent is stepAgent with a stock SPIRE server.
func stockStepAgent(t *testing.T) (*fakeServer, *running, workloadv1.IssuerClient) {
	t.Helper()
	s := newFakeServer(t)
	s.stock = true
	s.start()
	s.addEntry("/step", "binary:tool:sha256:"+hashFile(t, program(t, "true")), unprotected(t))
	r := startAgent(t, s)
	r.waitReady()
	return s, r, workloadv1.NewIssuerClient(r.dial())
}

// TestStepOnAStockServer: the SVID carries nothing, and what the TPM committed to
// it comes beside it. One key for each step, however often it is asked for.
func TestStepOnAStockServer(t *testing.T) {
	s, r, c := stockStepAgent(t)
	ctx := testContext(t)
	if _, err := record(t, ctx, c, "", "true"); err != nil {
		t.Fatal(err)
	}
	st := newStatement(t, "statement")
	ext, err := st.prepare(ctx, c)
	if err != nil || len(ext) != 0 || r.quoter.quotes != 0 {
		t.Fatalf("prepared %d bytes with %d quotes: %v", len(ext), r.quoter.quotes, err)
	}
	// The server is away at the end of a build, and comes back.
	s.stop()
	_, err = c.Issue(ctx, &workloadv1.IssueRequest{Csr: st.csr(t)})
	wantCode(t, "server away", err, codes.Unavailable)
	s.start()
	var resp *workloadv1.IssueResponse
	eventually(t, "issued once the server is back", func() bool {
		resp, err = c.Issue(ctx, &workloadv1.IssueRequest{Csr: st.csr(t)})
		return err == nil
	})
	leaf, err := x509.ParseCertificate(resp.GetX509Svid()[0])
	if err != nil {
		t.Fatal(err)
	}
	if _, err := attest.FromCertificate(leaf); err == nil {
		t.Error("evidence in the SVID of a stock server")
	}
	d, err := attest.ParseDetached(resp.GetDetached())
	if err != nil {
		t.Fatal(err)
	}
	e := d.Evidence
	agentSVID, err := x509.ParseCertificate(d.AgentSVID[0])
	if err != nil {
		t.Fatal(err)
	}
	if e.Kind != attest.KindDetached || e.KeyOrigin != attest.OriginCaller || e.Nonce != attest.DetachedNonce(leaf.Raw) || e.Payload != st.payload {
		t.Errorf("evidence %+v", e)
	}
	if e.AgentKey != sha256.Sum256(agentSVID.RawSubjectPublicKeyInfo) || agentSVID.URIs[0].Path != testAgent {
		t.Errorf("the evidence is not under the agent's SVID, %s", agentSVID.URIs[0])
	}
	if l := r.quoter.leaves[0]; sha256.Sum256(leaf.RawSubjectPublicKeyInfo) != [32]byte(l.SvidKeySha256) || l.SpiffeId != "spiffe://"+testTD+"/step" {
		t.Errorf("the TPM was asked to commit to %v", l)
	}
	_, err = newStatement(t, "another").prepare(ctx, c)
	wantCode(t, "a second statement", err, codes.FailedPrecondition)
}

// TestRefusesCSRWithEvidenceOnAStockServer: it would come back without, and
// nobody would have looked at it.
func TestRefusesCSRWithEvidenceOnAStockServer(t *testing.T) {
	_, _, c := stockStepAgent(t)
	ctx := testContext(t)
	if _, err := record(t, ctx, c, "", "true"); err != nil {
		t.Fatal(err)
	}
	st := newStatement(t, "statement")
	if _, err := st.prepare(ctx, c); err != nil {
		t.Fatal(err)
	}
	for what, csr := range map[string][]byte{
		"evidence":    st.csr(t, []byte{0x30, 0}),
		"another key": newStatement(t, "statement").csr(t),
		"not a CSR":   []byte("x"),
	} {
		_, err := c.Issue(ctx, &workloadv1.IssueRequest{Csr: csr})
		wantCode(t, what, err, codes.InvalidArgument)
	}
}

// TestRefusesWhatAStockServerSwapped: whatever comes back is checked before the
// TPM says anything about it.
func TestRefusesWhatAStockServerSwapped(t *testing.T) {
	s, r, c := stockStepAgent(t)
	ctx := testContext(t)
	if _, err := record(t, ctx, c, "", "true"); err != nil {
		t.Fatal(err)
	}
	st, stranger := newStatement(t, "statement"), newStatement(t, "stranger")
	if _, err := st.prepare(ctx, c); err != nil {
		t.Fatal(err)
	}
	other := newFakeServer(t)
	for what, answer := range map[string]func() []byte{
		"another key":       func() []byte { return s.sign("/step", stranger.key.Public(), s.svidTTL, nil) },
		"another SPIFFE ID": func() []byte { return s.sign("/admin", st.key.Public(), s.svidTTL, nil) },
		"expired":           func() []byte { return s.sign("/step", st.key.Public(), -time.Second, nil) },
		"another authority": func() []byte { return other.sign("/step", st.key.Public(), s.svidTTL, nil) },
		"not a certificate": func() []byte { return []byte("x") },
	} {
		s.with(func() { s.answer = answer })
		_, err := c.Issue(ctx, &workloadv1.IssueRequest{Csr: st.csr(t)})
		if err == nil || status.Code(err) == codes.OK {
			t.Errorf("%s: accepted", what)
		}
	}
	if r.quoter.quotes != 0 {
		t.Errorf("the TPM quoted %d times", r.quoter.quotes)
	}
	s.with(func() { s.answer = nil })
	if _, err := c.Issue(ctx, &workloadv1.IssueRequest{Csr: st.csr(t)}); err != nil {
		t.Errorf("the honest answer: %v", err)
	}
}

// TestStockServerWaits: an entry made while its workload already asks is seen by
// the server only when its cache is read again. The answer is not no.
func TestStockServerWaits(t *testing.T) {
	s := newFakeServer(t)
	s.stock = true
	s.start()
	r := startAgent(t, s)
	r.waitReady()
	done := make(chan error, 1)
	go func() { _, _, err := r.fetch(); done <- err }()
	eventually(t, "the server was asked for the workload's sake", func() bool {
		n := 0
		s.with(func() { n = s.syncs })
		return n > 2
	})
	s.addEntry("/w", selfHash(t))
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// TestRefusesUnknownOfAStockServer: but no is the answer in the end, with the
// command line of that server.
func TestRefusesUnknownOfAStockServer(t *testing.T) {
	s := newFakeServer(t)
	s.stock = true
	s.start()
	r := startAgent(t, s)
	r.waitReady()
	_, _, err := r.fetch()
	wantCode(t, "an unknown workload", err, codes.PermissionDenied)
	if err == nil || !strings.Contains(err.Error(), "spire-server entry create -spiffeID") || !strings.Contains(err.Error(), "-selector "+selfHash(t)) {
		t.Errorf("no way out in %v", err)
	}
}

// TestRefusesJoinLineOfAStockServer and says what to use in its place.
func TestRefusesJoinLineOfAStockServer(t *testing.T) {
	s := newFakeServer(t)
	s.stock = true
	s.start()
	r := startIn(t, s, t.TempDir(), func(c *Config) { c.Join = s.joinLine() })
	eventually(t, "a hint to use a bundle", func() bool {
		return strings.Contains(r.log.String(), "--trust-bundle FILE in place of --join")
	})
}
