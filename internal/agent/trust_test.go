package agent

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/rootlink/rootlink/internal/agent/upstream"
	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/internal/join"
)

func byJoinLine(s *fakeServer) func(*Config) {
	line := s.joinLine()
	return func(c *Config) { c.TrustBundle, c.Join = "", line }
}

// TestJoinLineAfterRotation: a machine that was off while every authority it
// knew was replaced comes back by its join line.
func TestJoinLineAfterRotation(t *testing.T) {
	s := newFakeServer(t)
	s.start()
	dir := t.TempDir()
	r := startIn(t, s, dir, byJoinLine(s))
	r.waitReady()
	r.stop()
	<-r.done
	s.rotate(false)
	r = startIn(t, s, dir, byJoinLine(s))
	r.waitReady()
	if !strings.Contains(r.log.String(), "asked the bootstrap source") {
		t.Error("it did not need the join line: the saved bundle was not used")
	}
}

// TestRefusesEndlessWithdrawal: a server that distrusts the authority that it
// signs with, by mistake or not, has the agent attest once more and no oftener.
func TestRefusesEndlessWithdrawal(t *testing.T) {
	s := newFakeServer(t)
	s.start()
	r := startIn(t, s, t.TempDir(), byJoinLine(s))
	r.waitReady()
	var before int
	s.with(func() { before = s.attests; s.taintAll = true })
	count := func() (attests, syncs int) {
		s.with(func() { attests, syncs = s.attests, s.syncs })
		return attests, syncs
	}
	eventually(t, "the agent attests again", func() bool { n, _ := count(); return n > before })
	_, from := count()
	eventually(t, "ten more syncs", func() bool { _, n := count(); return n >= from+10 })
	if n, _ := count(); n != before+1 {
		t.Errorf("it attested %d times more", n-before)
	}
}

// TestSavedBundleOutlivesTheFile: with a bundle file, the authorities learned
// since it was written are remembered.
func TestSavedBundleOutlivesTheFile(t *testing.T) {
	s := newFakeServer(t)
	s.start()
	dir := t.TempDir()
	bundle := filepath.Join(dir, "bundle.pem")
	if err := os.WriteFile(bundle, s.bundlePEM(), 0o600); err != nil {
		t.Fatal(err)
	}
	byFile := func(c *Config) { c.TrustBundle = bundle }
	r := startIn(t, s, dir, byFile)
	r.waitReady()
	s.rotate(true)
	eventually(t, "the new authority is saved", func() bool {
		return strings.Contains(r.log.String(), "authorities=2")
	})
	r.stop()
	<-r.done
	s.with(func() { s.oldCAs = nil }) // the file's authority is gone
	r = startIn(t, s, dir, byFile)
	r.waitReady()
}

// TestTrustKeyKeptElsewhere: nobody answers join lines then. Agents with a bundle,
// or that attested before, need no answer.
func TestTrustKeyKeptElsewhere(t *testing.T) {
	s := newFakeServer(t)
	s.start()
	before := t.TempDir()
	r := startIn(t, s, before, byJoinLine(s))
	r.waitReady()
	r.stop()
	<-r.done
	s.with(func() { s.keyElsewhere = true })
	r = startIn(t, s, before, byJoinLine(s))
	r.waitReady()
	r.stop()
	<-r.done

	dir := t.TempDir()
	bundle := filepath.Join(dir, "bundle.pem")
	if err := os.WriteFile(bundle, s.bundlePEM(), 0o600); err != nil {
		t.Fatal(err)
	}
	r = startIn(t, s, dir, func(c *Config) { c.TrustBundle = bundle })
	r.waitReady()

	r = startIn(t, s, t.TempDir(), byJoinLine(s))
	eventually(t, "what to do", func() bool { return strings.Contains(r.log.String(), "--trust-bundle FILE in place of --join") })
}

// TestRefusesServerOfUnknownAuthority: a server in the middle, with an
// authority of its own, gets neither an attestation nor a bundle change.
func TestRefusesServerOfUnknownAuthority(t *testing.T) {
	s, imposter := newFakeServer(t), newFakeServer(t)
	imposter.start()
	r := startAgent(t, s, func(c *Config) { c.Server = imposter.addr })
	eventually(t, "refused", func() bool { return strings.Contains(r.log.String(), "unknown authority") })
	if imposter.attests != 0 {
		t.Error("it attested to the imposter")
	}
}

// TestRefusesJoinToAnotherTrustKey: whoever answers must hold the pinned key.
func TestRefusesJoinToAnotherTrustKey(t *testing.T) {
	s, imposter := newFakeServer(t), newFakeServer(t)
	imposter.start()
	_, err := joinSource(t, s, imposter.addr).Authorities(t.Context())
	if !errors.Is(err, join.ErrTrustKey) {
		t.Errorf("got %v", err)
	}
	// It shows the pinned key but cannot sign with it.
	imposter.showKey = s.trustKey
	if _, err = joinSource(t, s, imposter.addr).Authorities(t.Context()); !errors.Is(err, join.ErrTrustKey) {
		t.Errorf("a key that did not sign was believed: %v", err)
	}
}

// TestJoinLineOfAnotherServer: at the first start it is somebody's mistake and
// nothing mends it; later it may be an attack or a detour, and ends by itself.
func TestJoinLineOfAnotherServer(t *testing.T) {
	s, other := newFakeServer(t), newFakeServer(t)
	s.start()
	other.start()
	dir := t.TempDir()
	at := func(addr string) *running {
		return startIn(t, s, dir, func(c *Config) { c.Join, c.Server = s.joinLine(), addr })
	}
	r := at(other.addr)
	select {
	case <-r.done:
	case <-time.After(patience):
		t.Fatal("it tries for ever")
	}
	if !errors.Is(r.err, upstream.ErrWrongServer) || cli.ExitCode(r.err) != cli.ExitCrypto || cli.HintOf(r.err) == "" {
		t.Errorf("ended with %v (code %d)", r.err, cli.ExitCode(r.err))
	}
	r = at(s.addr)
	r.waitReady()
	r.stop()
	<-r.done
	r = at(other.addr)
	eventually(t, "a second try", func() bool { return strings.Count(r.log.String(), "attestation failed") >= 2 })
	if !strings.Contains(r.log.String(), "hint=\"the server at --server is not the one") {
		t.Error("no hint")
	}
	select {
	case <-r.done:
		t.Errorf("an agent that has attested before ended: %v", r.err)
	default:
	}
}

func joinSource(t *testing.T, s *fakeServer, addr string) *upstream.Join {
	t.Helper()
	line, err := join.Parse(s.joinLine())
	if err != nil {
		t.Fatal(err)
	}
	return &upstream.Join{Line: line, Server: addr, Now: time.Now}
}

// TestRefusesReplayedSignedBundle: an old answer would revive authorities that
// were retired for a reason.
func TestRefusesReplayedSignedBundle(t *testing.T) {
	s := newFakeServer(t)
	s.replayBundle = true
	s.start()
	src := joinSource(t, s, s.addr)
	if _, err := src.Authorities(t.Context()); err != nil {
		t.Fatalf("the first answer: %v", err)
	}
	if _, err := src.Authorities(t.Context()); !errors.Is(err, join.ErrTrustKey) {
		t.Errorf("the same answer again: %v", err)
	}
}

// TestClockAnHourOff says which clock and by how much, not "bad certificate".
func TestClockAnHourOff(t *testing.T) {
	for name, c := range map[string]struct {
		clock time.Duration
		word  string
		join  bool
	}{
		"server ahead":         {time.Hour, "behind", false},
		"server behind":        {-time.Hour, "ahead of", false},
		"server ahead, joined": {time.Hour, "behind", true},
	} {
		t.Run(name, func(t *testing.T) {
			s := newFakeServer(t)
			s.clock = c.clock
			s.start()
			change := func(*Config) {}
			if c.join {
				change = byJoinLine(s)
			}
			r := startAgent(t, s, change)
			eventually(t, "the log explains", func() bool {
				l := r.log.String()
				return strings.Contains(l, "this machine's clock says") && strings.Contains(l, c.word) && strings.Contains(l, "hint=")
			})
		})
	}
}

// TestRefusesBundleOfAnotherSource: pointing the agent at other trust forgets
// what the old one taught it.
func TestRefusesBundleOfAnotherSource(t *testing.T) {
	old, s := newFakeServer(t), newFakeServer(t)
	old.start()
	dir := t.TempDir()
	r := startIn(t, old, dir, byJoinLine(old))
	r.waitReady()
	r.stop()
	<-r.done
	s.start()
	r = startIn(t, old, dir, func(c *Config) { c.Join = s.joinLine() }) // the old server, the new line
	select {
	case <-r.done:
	case <-time.After(patience):
		t.Fatal("still running")
	}
	if !errors.Is(r.err, join.ErrTrustKey) {
		t.Errorf("ended with %v", r.err)
	}
}

func TestConfigIsRefusedWithAHint(t *testing.T) {
	s := newFakeServer(t)
	good := func() Config {
		return Config{TrustDomain: testTD, Server: "h:1", Join: s.joinLine(), DataDir: t.TempDir(), Socket: "/x", Log: discard()}
	}
	if _, err := New(good()); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*Config){
		"trust domain":      func(c *Config) { c.TrustDomain = "spiffe://x" },
		"no server":         func(c *Config) { c.Server = "" },
		"no data directory": func(c *Config) { c.DataDir = "" },
		"no socket":         func(c *Config) { c.Socket = "" },
		"both":              func(c *Config) { c.TrustBundle = "x" },
		"neither":           func(c *Config) { c.Join = "" },
		"join line":         func(c *Config) { c.Join = "x" },
	} {
		c := good()
		change(&c)
		if _, err := New(c); cli.ExitCode(err) != cli.ExitUsage || cli.HintOf(err) == "" {
			t.Errorf("%s: %v (code %d, hint %q)", name, err, cli.ExitCode(err), cli.HintOf(err))
		}
	}
	c := good()
	c.TrustDomain = "other.org"
	if _, err := New(c); cli.ExitCode(err) != cli.ExitUsage {
		t.Errorf("join line of another trust domain: %v", err)
	}
	c = good()
	c.Join, c.TrustBundle = "", filepath.Join(t.TempDir(), "missing.pem")
	if _, err := New(c); err == nil || cli.HintOf(err) == "" {
		t.Errorf("missing bundle: %v", err)
	}
}

func TestRefusesSecondAgentOnOneDataDirectory(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "data")
	unlock, err := lockDataDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := lockDataDir(dir); err == nil || cli.HintOf(err) == "" {
		t.Errorf("a second agent: %v", err)
	}
	unlock()
	unlock, err = lockDataDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	unlock()
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	if _, err := lockDataDir(dir); err == nil || cli.HintOf(err) == "" {
		t.Errorf("writable for others: %v", err)
	}
}
