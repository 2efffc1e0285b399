package nodeagent_test

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	agentv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/agent/nodeattestor/v1"
	serverv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/server/nodeattestor/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/rootlink/rootlink/internal/catalog"
	"github.com/rootlink/rootlink/internal/swtpmtest"
	"github.com/rootlink/rootlink/pkg/attest"
	"github.com/rootlink/rootlink/plugins/tpmnode/nodeagent"
	"github.com/rootlink/rootlink/plugins/tpmnode/nodeserver"
	"github.com/rootlink/rootlink/plugins/tpmnode/wire"
	tpmv1 "github.com/rootlink/rootlink/proto/rootlink/tpm/v1"
)

const trustDomain = "example.org"

// world is an agent plugin and a server plugin, each loaded as its host does,
// with a real software TPM between them.
type world struct {
	sw     *swtpmtest.TPM
	agent  agentv1.NodeAttestorClient
	quoter tpmv1.QuoterClient
	server serverv1.NodeAttestorClient

	configure func() error // the agent plugin, once more

	mu       sync.Mutex
	attested []nodeserver.Attested // guarded by mu
}

type setup struct {
	tpm    []swtpmtest.Option
	agent  string // more HCL
	server string
	opts   []nodeagent.Option
}

func newWorld(t testing.TB, s setup) *world {
	t.Helper()
	w := &world{sw: swtpmtest.Start(t, s.tpm...)}
	log := slog.New(slog.DiscardHandler)

	ap := nodeagent.New(s.opts...)
	plugin, services := ap.Servers()
	loaded, err := catalog.LoadBuiltIn(context.Background(), catalog.BuiltIn{Name: wire.PluginName, Plugin: plugin, Services: services},
		catalog.Options{TrustDomain: trustDomain, Log: log})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { loaded.Close() })
	hcl := fmt.Sprintf("tpm_path = %q\ndata_dir = %q\n", w.sw.Device(), t.TempDir())
	w.configure = func() error { return loaded.Configure(context.Background(), hcl+s.agent) }
	if err := w.configure(); err != nil {
		t.Fatal(err)
	}
	if w.agent, err = loaded.AgentNodeAttestor(); err != nil {
		t.Fatal(err)
	}
	var q wire.QuoterClient
	if err := loaded.Bind(&q); err != nil {
		t.Fatal(err)
	}
	w.quoter = q

	dir := t.TempDir()
	roots := filepath.Join(dir, "roots.pem")
	if err := os.WriteFile(roots, append(w.sw.RootPEM(), w.sw.Maker.IntermediatePEM()...), 0o600); err != nil {
		t.Fatal(err)
	}
	sp := nodeserver.New(nodeserver.Options{OnAttested: func(_ context.Context, a *nodeserver.Attested) error {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.attested = append(w.attested, *a)
		return nil
	}})
	plugin, services = sp.Servers()
	server, err := catalog.LoadBuiltIn(context.Background(), catalog.BuiltIn{Name: wire.PluginName, Plugin: plugin, Services: services},
		catalog.Options{TrustDomain: trustDomain, Log: log})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { server.Close() })
	serverHCL := fmt.Sprintf("ek_roots = %q\ndata_dir = %q\n", roots, filepath.Join(dir, "data"))
	if err := server.Configure(context.Background(), serverHCL+s.server); err != nil {
		t.Fatal(err)
	}
	if w.server, err = server.ServerNodeAttestor(); err != nil {
		t.Fatal(err)
	}
	return w
}

// attest carries messages between the two plugins, as SPIRE does.
func (w *world) attest(ctx context.Context, key *[32]byte) (*serverv1.AgentAttributes, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if key != nil {
		ctx = wire.WithAgentKey(ctx, *key)
	}
	a, err := w.agent.AidAttestation(ctx)
	if err != nil {
		return nil, err
	}
	s, err := w.server.Attest(ctx)
	if err != nil {
		return nil, err
	}
	for {
		m, err := a.Recv()
		if err != nil {
			return nil, fmt.Errorf("agent: %w", err)
		}
		req := &serverv1.AttestRequest{Request: &serverv1.AttestRequest_Payload{Payload: m.GetPayload()}}
		if m.GetPayload() == nil {
			req.Request = &serverv1.AttestRequest_ChallengeResponse{ChallengeResponse: m.GetChallengeResponse()}
		}
		if err := s.Send(req); err != nil && err != io.EOF {
			return nil, err
		}
		r, err := s.Recv()
		if err != nil {
			return nil, fmt.Errorf("server: %w", err)
		}
		if attrs := r.GetAgentAttributes(); attrs != nil {
			return attrs, nil
		}
		if err := a.Send(&agentv1.Challenge{Challenge: r.GetChallenge()}); err != nil && err != io.EOF {
			return nil, err
		}
	}
}

func leaf() *tpmv1.Leaf {
	one := make([]byte, 32)
	one[0] = 1
	return &tpmv1.Leaf{
		Kind: 1, KeyOrigin: 1, TrustDomain: trustDomain, SpiffeId: "spiffe://example.org/build",
		SvidKeySha256: one, AgentKeySha256: one, Nonce: one,
		Selectors: []string{"binary:sha256:" + strings.Repeat("0", 64)},
	}
}

func TestAttestsThenQuotes(t *testing.T) {
	for _, c := range []struct {
		name string
		opts []swtpmtest.Option
	}{
		{"ECC P-256 EK", nil},
		{"RSA-2048 EK", []swtpmtest.Option{swtpmtest.WithEK(swtpmtest.RSA2048)}},
		{"ECC P-384 EK", []swtpmtest.Option{swtpmtest.WithEK(swtpmtest.ECCP384)}},
		{"chain in NV", []swtpmtest.Option{swtpmtest.WithChainInNV()}},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld(t, setup{tpm: c.opts})
			key := sha256.Sum256([]byte("csr key"))
			attrs, err := w.attest(t.Context(), &key)
			if err != nil {
				t.Fatal(err)
			}
			info, err := w.quoter.Info(t.Context(), &tpmv1.InfoRequest{})
			if err != nil {
				t.Fatal(err)
			}
			if attrs.GetSpiffeId() != "spiffe://"+trustDomain+info.GetAgentIdPath() || !attrs.GetCanReattest() {
				t.Errorf("agent ID %s, can re-attest %v; the plugin says %s", attrs.GetSpiffeId(), attrs.GetCanReattest(), info.GetAgentIdPath())
			}
			if !info.GetSoftware() || len(info.GetAkCertificate()) == 0 || info.GetDevice() != w.sw.Device() {
				t.Errorf("info = %v", info)
			}
			if at := w.attested[0]; !at.KeyBound || at.AgentKey != key {
				t.Error("the agent's key is not bound")
			}
			res, err := w.quoter.Quote(t.Context(), &tpmv1.QuoteRequest{Leaf: leaf()})
			if err != nil {
				t.Fatal(err)
			}
			e, err := attest.ParseRecord(res.GetEvidence())
			if err != nil {
				t.Fatal(err)
			}
			checkEvidence(t, w, e)
			if len(res.GetEvidence()) > 4096 && c.opts == nil {
				t.Errorf("evidence of %d bytes with an ECC EK", len(res.GetEvidence()))
			}
		})
	}
}

// checkEvidence recomputes the commitment as a verifier does.
func checkEvidence(t *testing.T, w *world, e *attest.Evidence) {
	t.Helper()
	cert, err := x509.ParseCertificate(e.AKCert)
	if err != nil {
		t.Fatal(err)
	}
	st, err := attest.ParseAKCertificate(cert)
	if err != nil {
		t.Fatal(err)
	}
	h, err := e.Leaf(trustDomain, "spiffe://example.org/build", [32]byte{1}).Hash()
	if err != nil {
		t.Fatal(err)
	}
	root, err := attest.RootFromPath(h, e.Index, e.Size, e.Path)
	if err != nil {
		t.Fatal(err)
	}
	ak := w.attested[0].AK
	if _, err := attest.VerifyQuote(e.Attest, e.Signature, &ak, attest.QuoteExtraData(e.Size, root, st.AKName), e.PCRs, attest.DefaultPCRs()); err != nil {
		t.Errorf("leaf %d of %d: %v", e.Index, e.Size, err)
	}
}

func TestKeyHiddenByStockHost(t *testing.T) {
	w := newWorld(t, setup{})
	if _, err := w.attest(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	if at := w.attested[0]; at.KeyBound {
		t.Error("a key that nobody named is said to be bound")
	}
}

func TestSendsLogsInChunks(t *testing.T) {
	ima := filepath.Join(t.TempDir(), "ima")
	content := make([]byte, 3*attest.LogChunk+5)
	for i := range content {
		content[i] = byte(i % 251)
	}
	if err := os.WriteFile(ima, content, 0o600); err != nil {
		t.Fatal(err)
	}
	w := newWorld(t, setup{agent: fmt.Sprintf("ima_log_path = %q\n", ima), server: "want_ima_log = true\n"})
	if _, err := w.attest(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(content)
	if d := w.attested[0].IMALogDigest; d == nil || string(d.Value) != string(sum[:]) {
		t.Error("the IMA log did not arrive whole")
	}
}

func TestRefusesToQuoteBeforeAttestation(t *testing.T) {
	w := newWorld(t, setup{})
	_, err := w.quoter.Quote(t.Context(), &tpmv1.QuoteRequest{Leaf: leaf()})
	if status.Code(err) != codes.FailedPrecondition {
		t.Errorf("err = %v", err)
	}
}

func TestAKCertificateSurvivesRestartAndExpires(t *testing.T) {
	now := time.Now()
	var mu sync.Mutex
	clock := func() time.Time { mu.Lock(); defer mu.Unlock(); return now }
	w := newWorld(t, setup{opts: []nodeagent.Option{nodeagent.WithClock(clock)}})
	if _, err := w.attest(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	if _, err := w.quoter.Quote(t.Context(), &tpmv1.QuoteRequest{Leaf: leaf()}); err != nil {
		t.Fatal(err)
	}
	if err := w.configure(); err != nil { // opens everything anew, from the data directory
		t.Fatal(err)
	}
	if _, err := w.quoter.Quote(t.Context(), &tpmv1.QuoteRequest{Leaf: leaf()}); err != nil {
		t.Fatalf("after a restart: %v", err)
	}
	mu.Lock()
	now = now.Add(25 * time.Hour)
	mu.Unlock()
	if _, err := w.quoter.Quote(t.Context(), &tpmv1.QuoteRequest{Leaf: leaf()}); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("with an expired AK certificate: err = %v", err)
	}
}

func TestRefusesEvidenceUnderAnUncertifiedAK(t *testing.T) {
	w := newWorld(t, setup{})
	if _, err := w.attest(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	w.sw.Clear() // the next quote is by a new AK
	for range 2 {
		if _, err := w.quoter.Quote(t.Context(), &tpmv1.QuoteRequest{Leaf: leaf()}); status.Code(err) != codes.FailedPrecondition {
			t.Errorf("err = %v", err)
		}
	}
}

func TestRefusesBadLeaves(t *testing.T) {
	w := newWorld(t, setup{})
	if _, err := w.attest(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	for name, edit := range map[string]func(*tpmv1.QuoteRequest){
		"no leaf":            func(r *tpmv1.QuoteRequest) { r.Leaf = nil },
		"other trust domain": func(r *tpmv1.QuoteRequest) { r.Leaf.TrustDomain = "other.org" },
		"kind 0":             func(r *tpmv1.QuoteRequest) { r.Leaf.Kind = 0 },
		"kind 257":           func(r *tpmv1.QuoteRequest) { r.Leaf.Kind = 257 },
		"short key":          func(r *tpmv1.QuoteRequest) { r.Leaf.SvidKeySha256 = r.Leaf.SvidKeySha256[1:] },
		"no agent key":       func(r *tpmv1.QuoteRequest) { r.Leaf.AgentKeySha256 = nil },
		"zero nonce":         func(r *tpmv1.QuoteRequest) { r.Leaf.Nonce = make([]byte, 32) },
		"short tool":         func(r *tpmv1.QuoteRequest) { r.Leaf.Tool = []byte{1} },
		"no selectors":       func(r *tpmv1.QuoteRequest) { r.Leaf.Selectors = nil },
		"unsorted selectors": func(r *tpmv1.QuoteRequest) { r.Leaf.Selectors = []string{"b:1", "a:1"} },
		"resettable PCR 16": func(r *tpmv1.QuoteRequest) {
			r.Pcrs = []*tpmv1.PCRSelection{{Bank: "sha256", Indices: []uint32{0, 16}}}
		},
		"resettable PCR 23":    func(r *tpmv1.QuoteRequest) { r.Pcrs = []*tpmv1.PCRSelection{{Bank: "sha384", Indices: []uint32{23}}} },
		"bank that is unknown": func(r *tpmv1.QuoteRequest) { r.Pcrs = []*tpmv1.PCRSelection{{Bank: "md5", Indices: []uint32{0}}} },
	} {
		r := &tpmv1.QuoteRequest{Leaf: leaf()}
		edit(r)
		if _, err := w.quoter.Quote(t.Context(), r); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%s: err = %v", name, err)
		}
	}
}

func TestRefusesChallengeForResettablePCRs(t *testing.T) {
	w := newWorld(t, setup{})
	for _, pcr := range []uint32{16, 23} {
		a, err := w.agent.AidAttestation(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := a.Recv(); err != nil {
			t.Fatal(err)
		}
		b, err := wire.EncodeServer(&tpmv1.ServerMessage{Step: &tpmv1.ServerMessage_Challenge{Challenge: &tpmv1.Challenge{
			CredentialBlob: make([]byte, 68), EncryptedSecret: make([]byte, 68), Nonce: make([]byte, 32),
			Pcrs: []*tpmv1.PCRSelection{{Bank: "sha256", Indices: []uint32{0, pcr}}},
		}}})
		if err != nil {
			t.Fatal(err)
		}
		if err := a.Send(&agentv1.Challenge{Challenge: b}); err != nil {
			t.Fatal(err)
		}
		if _, err := a.Recv(); status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), fmt.Sprint(pcr)) {
			t.Errorf("PCR %d: err = %v", pcr, err)
		}
	}
}

func TestRefusesMessagesOutOfOrder(t *testing.T) {
	w := newWorld(t, setup{})
	for name, m := range map[string]*tpmv1.ServerMessage{
		"log request first": {Step: &tpmv1.ServerMessage_LogRequest{LogRequest: &tpmv1.LogRequest{Kind: tpmv1.LogKind_LOG_KIND_IMA}}},
		"certificate first": {Step: &tpmv1.ServerMessage_AkCertificate{AkCertificate: &tpmv1.AKCertificate{Certificate: []byte{1}, CaChain: [][]byte{{1}}}}},
	} {
		a, err := w.agent.AidAttestation(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := a.Recv(); err != nil {
			t.Fatal(err)
		}
		b, err := wire.EncodeServer(m)
		if err != nil {
			t.Fatal(err)
		}
		if err := a.Send(&agentv1.Challenge{Challenge: b}); err != nil {
			t.Fatal(err)
		}
		if _, err := a.Recv(); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%s: err = %v", name, err)
		}
	}
}

func TestManyLeavesShareQuotes(t *testing.T) {
	w := newWorld(t, setup{opts: []nodeagent.Option{nodeagent.WithQuoteLatency(50 * time.Millisecond)}})
	if _, err := w.attest(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	const n = 64
	records := make([]*attest.Evidence, n)
	errs := make([]error, n)
	var wg sync.WaitGroup
	for i := range n {
		wg.Add(1)
		go func() {
			defer wg.Done()
			var r *tpmv1.QuoteResponse
			if r, errs[i] = w.quoter.Quote(t.Context(), &tpmv1.QuoteRequest{Leaf: leaf()}); errs[i] == nil {
				records[i], errs[i] = attest.ParseRecord(r.GetEvidence())
			}
		}()
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
	quotes, salts := map[string]bool{}, map[[16]byte]bool{}
	for _, e := range records {
		checkEvidence(t, w, e)
		quotes[string(e.Attest)] = true
		salts[e.Salt] = true
	}
	if len(quotes) > n/4 {
		t.Errorf("%d leaves took %d quotes", n, len(quotes))
	}
	if len(salts) != n {
		t.Errorf("%d salts for %d leaves", len(salts), n)
	}
}

func TestSelectionsAreNotMixedInOneQuote(t *testing.T) {
	w := newWorld(t, setup{opts: []nodeagent.Option{nodeagent.WithQuoteLatency(20 * time.Millisecond)}})
	if _, err := w.attest(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for i := range 12 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			sel := []*tpmv1.PCRSelection{{Bank: "sha256", Indices: []uint32{uint32(i % 3)}}}
			r, err := w.quoter.Quote(t.Context(), &tpmv1.QuoteRequest{Leaf: leaf(), Pcrs: sel})
			if err != nil {
				t.Error(err)
				return
			}
			e, err := attest.ParseRecord(r.GetEvidence())
			if err != nil {
				t.Error(err)
				return
			}
			if len(e.PCRs) != 1 || len(e.PCRs[0].Values) != 1 || e.PCRs[0].Values[uint32(i%3)] == nil {
				t.Errorf("asked for PCR %d, got %v", i%3, e.PCRs)
			}
		}()
	}
	wg.Wait()
}

func TestSurvivesRebootOfTheTPM(t *testing.T) {
	w := newWorld(t, setup{})
	for range 3 {
		if _, err := w.attest(t.Context(), nil); err != nil {
			t.Fatal(err)
		}
		w.sw.Restart()
		if _, err := w.quoter.Quote(t.Context(), &tpmv1.QuoteRequest{Leaf: leaf()}); err != nil {
			t.Fatal(err)
		}
	}
	a, b := w.attested[0], w.attested[2]
	if a.AgentID != b.AgentID || string(a.AK.Name) != string(b.AK.Name) {
		t.Error("another node after a reboot")
	}
	if b.Quote.ResetCount != a.Quote.ResetCount+2 {
		t.Errorf("reset count %d, then %d after two reboots", a.Quote.ResetCount, b.Quote.ResetCount)
	}
}
