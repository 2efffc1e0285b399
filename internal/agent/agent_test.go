package agent

import (
	"bytes"
	"crypto/x509"
	"errors"
	"math/big"
	"strings"
	"testing"
	"time"

	workloadpb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/rootlink/rootlink/internal/agent/upstream"
	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/pkg/attest"
)

func leafOf(t *testing.T, s *workloadpb.X509SVID) *x509.Certificate {
	t.Helper()
	svid, err := x509svid.ParseRaw(s.X509Svid, s.X509SvidKey)
	if err != nil {
		t.Fatal(err)
	}
	return svid.Certificates[0]
}

// TestAttestAndServe is the first thing an agent is for: attest, sync, and give
// a workload the SVID that its entry names, with the bundle to use it.
func TestAttestAndServe(t *testing.T) {
	s := newFakeServer(t)
	s.start()
	s.addEntry("/first", selfHash(t), selfUID())
	s.addEntry("/second", selfHash(t))
	s.addEntry("/somebody-else", "binary:sha256:"+strings.Repeat("0", 64))
	s.addEntry("/step", selfHash(t), "binary:tool:sha256:"+strings.Repeat("0", 64), "binary:recorder:sha256:"+strings.Repeat("0", 64))
	r := startAgent(t, s)
	if id := r.waitReady(); id != "spiffe://"+testTD+testAgent {
		t.Errorf("agent ID %q", id)
	}
	_, resp, err := r.fetch()
	if err != nil {
		t.Fatal(err)
	}
	if len(resp.Svids) != 2 {
		t.Fatalf("%d SVIDs, want 2", len(resp.Svids))
	}
	if got := resp.Svids[0].SpiffeId; got != "spiffe://"+testTD+"/first" {
		t.Errorf("default identity %q: the oldest entry should come first", got)
	}
	c := leafOf(t, resp.Svids[0])
	ca, err := x509.ParseCertificates(resp.Svids[0].Bundle)
	if err != nil || len(ca) != 1 || c.CheckSignatureFrom(ca[0]) != nil {
		t.Errorf("SVID does not chain to the bundle beside it (%v)", err)
	}
	if !bytes.Equal(resp.Svids[0].Bundle, s.ca.Raw) {
		t.Error("bundle is not the server's authority")
	}
	// A second caller of the same executable gets the same SVID.
	_, again, err := r.fetch()
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(again.Svids[0].X509Svid, resp.Svids[0].X509Svid) {
		t.Error("a second call was not served from the cache")
	}
}

// TestUnknownWorkloadKnocks: an entry made a moment ago is found at once, not
// at the next sync.
func TestUnknownWorkloadKnocks(t *testing.T) {
	s := newFakeServer(t)
	s.start()
	r := startAgent(t, s, func(c *Config) { c.SyncInterval = time.Hour })
	r.waitReady()
	_, _, err := r.fetch()
	if status.Code(err) != codes.PermissionDenied {
		t.Fatalf("without an entry: %v", err)
	}
	msg := status.Convert(err).Message()
	if !strings.Contains(msg, "rootlink-server entry create") || !strings.Contains(msg, selfHash(t)) || !strings.Contains(msg, selfUID()) || !strings.Contains(msg, testAgent) {
		t.Errorf("refusal does not say what to register: %s", msg)
	}
	s.addEntry("/new", selfHash(t))
	if _, _, err := r.fetch(); err != nil {
		t.Fatalf("the entry exists: %v", err)
	}
}

func TestRevisionsInPages(t *testing.T) {
	s := newFakeServer(t)
	s.pageSize = 3
	s.start()
	for range 10 {
		s.addEntry("/filler", "binary:uid:4294967294")
	}
	s.addEntry("/mine", selfHash(t))
	r := startAgent(t, s)
	r.waitReady()
	stream, resp, err := r.fetch()
	if err != nil {
		t.Fatal(err)
	}
	if resp.Svids[0].SpiffeId != "spiffe://"+testTD+"/mine" {
		t.Fatal(resp.Svids[0].SpiffeId)
	}
	// An update raises the revision, and the open stream sees it.
	s.with(func() {
		e := s.entries[len(s.entries)-1]
		e.SpiffeId.Path, e.RevisionNumber = "/renamed", 1
	})
	resp, err = stream.Recv()
	if err != nil {
		t.Fatal(err)
	}
	if resp.Svids[0].SpiffeId != "spiffe://"+testTD+"/renamed" {
		t.Errorf("after the update: %s", resp.Svids[0].SpiffeId)
	}
}

// TestOpenStreamRenews: a stream that stays open gets a new SVID at about half
// of the old one's life.
func TestOpenStreamRenews(t *testing.T) {
	t.Parallel() // it waits, and computes little
	s := newFakeServer(t)
	s.svidTTL = 14 * time.Second
	s.start()
	s.addEntry("/w", selfHash(t))
	r := startAgent(t, s)
	r.waitReady()
	stream, resp, err := r.fetch()
	if err != nil {
		t.Fatal(err)
	}
	first := leafOf(t, resp.Svids[0])
	if resp, err = stream.Recv(); err != nil {
		t.Fatal(err)
	}
	second := leafOf(t, resp.Svids[0])
	if first.SerialNumber.Cmp(second.SerialNumber) == 0 || !time.Now().Before(first.NotAfter) {
		t.Error("not renewed before it expired")
	}
}

// TestEntryDeletedEndsTheStream: what an operator takes away stops being renewed.
func TestEntryDeletedEndsTheStream(t *testing.T) {
	s := newFakeServer(t)
	s.start()
	id := s.addEntry("/w", selfHash(t))
	r := startAgent(t, s)
	r.waitReady()
	stream, _, err := r.fetch()
	if err != nil {
		t.Fatal(err)
	}
	s.deleteEntry(id)
	if _, err := stream.Recv(); status.Code(err) != codes.PermissionDenied {
		t.Errorf("after deletion: %v", err)
	}
}

// TestServerAwayAndBack: valid SVIDs are served without a server, and the agent
// recovers when it returns.
func TestServerAwayAndBack(t *testing.T) {
	t.Parallel() // it waits, and computes little
	s := newFakeServer(t)
	s.svidTTL = 12 * time.Second
	s.start()
	s.addEntry("/w", selfHash(t))
	r := startAgent(t, s)
	r.waitReady()
	stream, resp, err := r.fetch()
	if err != nil {
		t.Fatal(err)
	}
	first := leafOf(t, resp.Svids[0])
	s.stop()
	if _, again, err := r.fetch(); err != nil {
		t.Errorf("server away: %v", err)
	} else if leafOf(t, again.Svids[0]).SerialNumber.Cmp(first.SerialNumber) != 0 {
		t.Error("server away: another SVID from nowhere")
	}
	eventually(t, "the agent notices", func() bool { return strings.Contains(r.log.String(), "sync failed") })
	// Somebody it does not know is told "later", not "no".
	s.start()
	if resp, err = stream.Recv(); err != nil {
		t.Fatalf("server back: %v", err)
	}
	if leafOf(t, resp.Svids[0]).SerialNumber.Cmp(first.SerialNumber) == 0 {
		t.Error("not renewed after the server came back")
	}
}

func TestUnknownWorkloadWhileServerIsAway(t *testing.T) {
	s := newFakeServer(t)
	s.start()
	r := startAgent(t, s)
	r.waitReady()
	s.stop()
	if _, _, err := r.fetch(); status.Code(err) != codes.Unavailable {
		t.Errorf("want Unavailable (it is not known), got %v", err)
	}
}

// TestEvictedAttestsAgain: evicting an agent means "attest again now".
func TestEvictedAttestsAgain(t *testing.T) {
	s := newFakeServer(t)
	s.start()
	s.addEntry("/w", selfHash(t))
	r := startAgent(t, s)
	r.waitReady()
	s.with(func() { s.active = nil })
	eventually(t, "a second attestation", func() bool { s.mu.Lock(); defer s.mu.Unlock(); return s.attests == 2 })
	if _, _, err := r.fetch(); err != nil {
		t.Errorf("after re-attestation: %v", err)
	}
}

// TestAgentSVIDRotates: by re-attestation, with a new key, before it expires,
// and open streams do not notice.
func TestAgentSVIDRotates(t *testing.T) {
	t.Parallel() // it waits, and computes little
	s := newFakeServer(t)
	s.agentTTL = 3 * time.Second
	s.start()
	s.addEntry("/w", selfHash(t))
	r := startAgent(t, s)
	r.waitReady()
	eventually(t, "three attestations", func() bool { s.mu.Lock(); defer s.mu.Unlock(); return s.attests >= 3 })
	if _, _, err := r.fetch(); err != nil {
		t.Error(err)
	}
	if strings.Contains(r.log.String(), "ALARM") {
		t.Error("its own rotation looked like a second agent")
	}
}

// TestRivalAgentAlarmsOnce: while another agent has the node, each sync is
// refused; a log that repeats its alarm is one that nobody reads.
func TestRivalAgentAlarmsOnce(t *testing.T) {
	s := newFakeServer(t)
	s.start()
	r := startAgent(t, s)
	r.waitReady()
	s.with(func() { s.active = big.NewInt(1) })
	eventually(t, "three refused calls", func() bool { s.mu.Lock(); defer s.mu.Unlock(); return s.notActive >= 3 })
	if n := strings.Count(r.log.String(), "ALARM"); n != 1 {
		t.Errorf("%d alarms, want one", n)
	}
}

// TestOwnAttestationIsNoRival: the server ends the old SVID a moment before the
// agent has the new one. Calls in between wait, and nobody is alarmed.
func TestOwnAttestationIsNoRival(t *testing.T) {
	s := newFakeServer(t)
	s.agentTTL = 3 * time.Second
	s.hold = make(chan struct{})
	close(s.hold)
	s.start()
	s.addEntry("/w", selfHash(t))
	r := startAgent(t, s)
	r.waitReady()
	hold := make(chan struct{})
	s.with(func() { s.hold = hold })
	denials := func() (n int) { s.with(func() { n = s.notActive }); return n }
	eventually(t, "a call on the SVID that was ended", func() bool { return denials() > 0 })
	close(hold)
	eventually(t, "sync with the new SVID", func() (ok bool) { s.with(func() { ok = s.syncs > 0 && s.attests == 2 }); return ok })
	if _, _, err := r.fetch(); err != nil {
		t.Error(err)
	}
	if log := r.log.String(); strings.Contains(log, "ALARM") || strings.Contains(log, "sync failed") {
		t.Error("its own rotation looked like a second agent")
	}
}

func TestBannedExits(t *testing.T) {
	for _, when := range []string{"before it attests", "before it attests to a stock server", "while it runs"} {
		t.Run(when, func(t *testing.T) {
			s := newFakeServer(t)
			s.stock = strings.Contains(when, "stock")
			s.start()
			if when != "while it runs" {
				s.banned = true
			}
			r := startAgent(t, s)
			if !s.banned {
				r.waitReady()
				s.with(func() { s.banned = true })
			}
			select {
			case <-r.done:
			case <-time.After(patience):
				t.Fatal("still running")
			}
			if !errors.Is(r.err, upstream.ErrBanned) || cli.ExitCode(r.err) != cli.ExitPolicy || cli.HintOf(r.err) == "" {
				t.Errorf("ended with %v (code %d)", r.err, cli.ExitCode(r.err))
			}
		})
	}
}

// TestEvidencePatterns: an SVID whose ID the server wants evidence for carries
// it, bound to the caller; another does not.
func TestEvidencePatterns(t *testing.T) {
	s := newFakeServer(t)
	s.patterns = []string{"spiffe://" + testTD + "/hw/*"}
	s.start()
	s.addEntry("/hw/w", selfHash(t))
	s.addEntry("/plain", selfHash(t))
	r := startAgent(t, s)
	r.waitReady()
	_, resp, err := r.fetch()
	if err != nil {
		t.Fatal(err)
	}
	ev, err := attest.FromCertificate(leafOf(t, resp.Svids[0]))
	if err != nil {
		t.Fatal(err)
	}
	if ev.KeyOrigin != attest.OriginAgent || ev.Payload != ([32]byte{}) || ev.Tool != ([32]byte{}) || ev.Recorder != ([32]byte{}) {
		t.Errorf("evidence of a Workload API SVID: %+v", ev)
	}
	if !strings.Contains(strings.Join(ev.Selectors, " "), selfHash(t)) {
		t.Errorf("committed selectors %q", ev.Selectors)
	}
	if _, err := attest.FromCertificate(leafOf(t, resp.Svids[1])); !errors.Is(err, attest.ErrNoEvidence) {
		t.Errorf("evidence that nobody asked for: %v", err)
	}
	// The server was restarted: it knows none of its old nonces.
	s.with(func() { s.badNonce = true; s.lastNonce = [32]byte{}; s.entries[0].RevisionNumber++ })
	eventually(t, "an SVID with a new nonce", func() bool {
		_, again, err := r.fetch()
		return err == nil && len(again.Svids) == 2 && !bytes.Equal(again.Svids[0].X509Svid, resp.Svids[0].X509Svid)
	})
}

// TestRefusesSVIDWithEvidenceStripped: a server that drops the extension would
// leave workloads with less than the operator asked for.
func TestRefusesSVIDWithEvidenceStripped(t *testing.T) {
	s := newFakeServer(t)
	s.patterns = []string{"spiffe://" + testTD + "/hw/*"}
	s.stripExt = true
	s.start()
	s.addEntry("/hw/w", selfHash(t))
	r := startAgent(t, s)
	r.waitReady()
	if _, _, err := r.fetch(); err == nil || !strings.Contains(err.Error(), "evidence") {
		t.Errorf("got %v", err)
	}
}

func TestStockServer(t *testing.T) {
	s := newFakeServer(t)
	s.stock = true
	s.start()
	s.addEntry("/w", selfHash(t))
	r := startAgent(t, s)
	r.waitReady()
	if _, _, err := r.fetch(); err != nil {
		t.Error(err)
	}
}
