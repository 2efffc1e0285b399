package agent

import (
	"context"
	"crypto/x509"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/rootlink/rootlink/internal/agent/upstream"
	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/internal/server"
	"github.com/rootlink/rootlink/internal/swtpmtest"
	"github.com/rootlink/rootlink/pkg/attest"
	workloadv1 "github.com/rootlink/rootlink/proto/rootlink/workload/v1"
)

// realWorld is our server, our plugins and a software TPM.
type realWorld struct {
	t     testing.TB
	dir   string
	tpm   *swtpmtest.TPM
	cfg   server.Config
	admin *grpc.ClientConn
	stop  func()
}

func newRealWorld(t testing.TB, change ...func(*server.Config)) *realWorld {
	t.Helper()
	dir, err := os.MkdirTemp("", "rl") // short, for the sockets in it
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	w := &realWorld{t: t, dir: dir, tpm: swtpmtest.Start(t)}
	roots := filepath.Join(dir, "maker.pem")
	if err := os.WriteFile(roots, append(w.tpm.RootPEM(), w.tpm.Maker.IntermediatePEM()...), 0o600); err != nil {
		t.Fatal(err)
	}
	w.cfg = server.Config{
		TrustDomain: testTD, DataDir: filepath.Join(dir, "server"), Listen: "127.0.0.1:0", AdminSocket: filepath.Join(dir, "admin"),
		EKRoots: []string{roots}, AttestationRate: 1000, AttestationBurst: 1000, Log: slog.New(slog.DiscardHandler),
	}
	for _, fn := range change {
		fn(&w.cfg)
	}
	w.serve()
	if w.admin, err = grpc.NewClient("unix:"+w.cfg.AdminSocket, grpc.WithTransportCredentials(insecure.NewCredentials())); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.admin.Close() })
	return w
}

// serve starts the server, again on the same address after a stop.
func (w *realWorld) serve() {
	w.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	s, err := server.New(ctx, w.cfg)
	if err != nil {
		w.t.Fatal(err)
	}
	w.cfg.Listen = s.Addr().String()
	done := make(chan struct{})
	go func() { defer close(done); s.Run(ctx) }()
	stopped := false
	w.stop = func() {
		if !stopped {
			stopped = true
			cancel()
			<-done
			s.Close()
		}
	}
	w.t.Cleanup(w.stop)
}

// joinLine is as the server prints it.
func (w *realWorld) joinLine() string {
	w.t.Helper()
	b, err := os.ReadFile(filepath.Join(w.cfg.DataDir, "trust.key"))
	if err != nil {
		w.t.Fatal(err)
	}
	return joinLineOf(w.t, b)
}

// agent starts one with the real plugins.
func (w *realWorld) agent(t *testing.T) *running {
	t.Helper()
	r := &running{t: t, dir: w.dir, socket: filepath.Join(w.dir, "api"), log: &logBuffer{t: t}, ready: make(chan string, 1), done: make(chan struct{})}
	log := slog.New(slog.NewTextHandler(r.log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	cfg, plug := w.agentConfig(log)
	cfg.Socket, cfg.Ready = r.socket, func(id string) { r.ready <- id }
	a, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	r.stop = cancel
	go func() {
		defer close(r.done)
		r.err = a.RunWith(ctx, plug)
	}()
	t.Cleanup(func() {
		cancel()
		<-r.done
		if t.Failed() {
			t.Logf("agent log:\n%s", r.log)
		}
	})
	return r
}

func (w *realWorld) agentConfig(log *slog.Logger) (Config, PluginConfig) {
	data := filepath.Join(w.dir, "agent")
	plugins := PluginConfig{TrustDomain: testTD, DataDir: data, TPM: w.tpm.Device()}
	return Config{
		TrustDomain: testTD, Server: w.cfg.Listen, Join: w.joinLine(), DataDir: data,
		Socket: filepath.Join(w.dir, "api"), SyncInterval: 300 * time.Millisecond, Log: log,
	}, plugins
}

func (w *realWorld) addEntry(agentID, path string, selectors ...string) string {
	w.t.Helper()
	e := &types.Entry{
		SpiffeId: &types.SPIFFEID{TrustDomain: testTD, Path: path},
		ParentId: &types.SPIFFEID{TrustDomain: testTD, Path: strings.TrimPrefix(agentID, "spiffe://"+testTD)},
	}
	for _, s := range selectors {
		e.Selectors = append(e.Selectors, &types.Selector{Type: "binary", Value: strings.TrimPrefix(s, "binary:")})
	}
	resp, err := entryv1.NewEntryClient(w.admin).BatchCreateEntry(context.Background(), &entryv1.BatchCreateEntryRequest{Entries: []*types.Entry{e}})
	if err != nil {
		w.t.Fatal(err)
	}
	if r := resp.Results[0]; codes.Code(r.Status.Code) != codes.OK {
		w.t.Fatal(r.Status.Message)
	}
	return resp.Results[0].Entry.Id
}

func (w *realWorld) idOf(agentID string) *types.SPIFFEID {
	return &types.SPIFFEID{TrustDomain: testTD, Path: strings.TrimPrefix(agentID, "spiffe://"+testTD)}
}

// TestRealChain: our server, a software TPM, evidence for a workload and for a
// step.
func TestRealChain(t *testing.T) {
	w := newRealWorld(t, func(c *server.Config) { c.EvidencePatterns = []string{"spiffe://" + testTD + "/hw/*"} })
	r := w.agent(t)
	id := r.waitReady()
	w.addEntry(id, "/plain", selfHash(t))
	_, resp, err := r.fetch()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := attest.FromCertificate(leafOf(t, resp.Svids[0])); err == nil {
		t.Error("evidence that nobody asked for")
	}
	w.addEntry(id, "/hw/w", selfHash(t), selfUID())
	eventually(t, "the second entry is known", func() bool {
		_, resp, err = r.fetch()
		return err == nil && len(resp.Svids) == 2
	})
	var withEvidence *x509.Certificate
	for _, s := range resp.Svids {
		if s.SpiffeId == "spiffe://"+testTD+"/hw/w" {
			withEvidence = leafOf(t, s)
		}
	}
	if ev, err := attest.FromCertificate(withEvidence); err != nil || ev.KeyOrigin != attest.OriginAgent {
		t.Errorf("evidence of a Workload API SVID: %+v %v", ev, err)
	}

	w.addEntry(id, "/step", "binary:tool:sha256:"+hashFile(t, program(t, "true")), unprotected(t))
	ctx, c := testContext(t), workloadv1.NewIssuerClient(r.dial())
	if _, err := record(t, ctx, c, "", "true"); err != nil {
		t.Fatal(err)
	}
	st := newStatement(t, "statement")
	ext, err := st.prepare(ctx, c)
	if err != nil {
		t.Fatal(err)
	}
	issued, err := c.Issue(ctx, &workloadv1.IssueRequest{Csr: st.csr(t, ext)})
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(issued.X509Svid[0])
	if err != nil {
		t.Fatal(err)
	}
	if ev, err := attest.FromCertificate(cert); err != nil || ev.Payload != st.payload {
		t.Errorf("evidence of a step: %+v %v", ev, err)
	}
	// The same leaf a second time is a replay, and the server says so.
	if _, err := c.Issue(ctx, &workloadv1.IssueRequest{Csr: st.csr(t, ext)}); err == nil {
		t.Error("the same leaf was accepted twice")
	}
}

// TestRealRotation: the agent's SVID is renewed by attesting again, with a TPM,
// and an open stream lives through it.
func TestRealRotation(t *testing.T) {
	t.Parallel() // it waits, and computes little
	w := newRealWorld(t, func(c *server.Config) { c.AgentTTL = 6 * time.Second; c.X509TTL = 14 * time.Second })
	r := w.agent(t)
	id := r.waitReady()
	w.addEntry(id, "/w", selfHash(t))
	stream, resp, err := r.fetch()
	if err != nil {
		t.Fatal(err)
	}
	first := leafOf(t, resp.Svids[0])
	if resp, err = stream.Recv(); err != nil {
		t.Fatal(err)
	}
	if leafOf(t, resp.Svids[0]).SerialNumber.Cmp(first.SerialNumber) == 0 {
		t.Error("the stream was not renewed")
	}
	if n := strings.Count(r.log.String(), "msg=attested "); n < 2 {
		t.Errorf("%d attestations", n)
	}
}

func TestRealEvictAndBan(t *testing.T) {
	w := newRealWorld(t)
	r := w.agent(t)
	id := r.waitReady()
	w.addEntry(id, "/w", selfHash(t))
	agents := agentv1.NewAgentClient(w.admin)
	if _, err := agents.DeleteAgent(t.Context(), &agentv1.DeleteAgentRequest{Id: w.idOf(id)}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "attested again after the eviction", func() bool { return strings.Count(r.log.String(), "msg=attested ") == 2 })
	if _, _, err := r.fetch(); err != nil {
		t.Errorf("after the eviction: %v", err)
	}
	if _, err := agents.BanAgent(t.Context(), &agentv1.BanAgentRequest{Id: w.idOf(id)}); err != nil {
		t.Fatal(err)
	}
	select {
	case <-r.done:
	case <-time.After(patience):
		t.Fatal("still running after the ban")
	}
	if cli.ExitCode(r.err) != cli.ExitPolicy || !strings.Contains(r.err.Error(), upstream.ErrBanned.Error()) {
		t.Errorf("ended with %v", r.err)
	}
}

// TestRealServerAwayAndBack: nonces of a restarted server are others; evidence
// is made again.
func TestRealServerAwayAndBack(t *testing.T) {
	w := newRealWorld(t, func(c *server.Config) { c.EvidencePatterns = []string{"spiffe://" + testTD + "/hw/*"} })
	r := w.agent(t)
	id := r.waitReady()
	w.addEntry(id, "/hw/w", selfHash(t))
	_, _, err := r.fetch()
	if err != nil {
		t.Fatal(err)
	}
	w.stop()
	if _, _, err := r.fetch(); err != nil {
		t.Errorf("server away: %v", err)
	}
	w.serve()
	w.addEntry(id, "/hw/again", selfHash(t))
	eventually(t, "a new SVID with evidence", func() bool {
		_, resp, err := r.fetch()
		return err == nil && len(resp.Svids) == 2
	})
}

// TestRealTPMRestart: the device is reset under the agent; it attests again by
// itself when evidence of the old boot is of no use any more.
func TestRealTPMRestart(t *testing.T) {
	w := newRealWorld(t, func(c *server.Config) { c.EvidencePatterns = []string{"spiffe://" + testTD + "/hw/*"} })
	r := w.agent(t)
	id := r.waitReady()
	w.addEntry(id, "/hw/w", selfHash(t))
	if _, _, err := r.fetch(); err != nil {
		t.Fatal(err)
	}
	w.tpm.Restart()
	w.addEntry(id, "/hw/after", selfHash(t))
	eventually(t, "an SVID with evidence of the new boot", func() bool {
		_, resp, err := r.fetch()
		return err == nil && len(resp.Svids) == 2
	})
}
