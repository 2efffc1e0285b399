package agent

import (
	"context"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	workloadpb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	nodeattestorv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/agent/nodeattestor/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"

	"github.com/rootlink/rootlink/internal/catalog"
	"github.com/rootlink/rootlink/internal/config"
	"github.com/rootlink/rootlink/plugins/workloadattestor/binary"
)

// running is an agent under test.
type running struct {
	t      *testing.T
	dir    string
	socket string
	quoter *fakeQuoter
	log    *logBuffer
	ready  chan string
	done   chan struct{} // closed when Run returned
	err    error         // of Run; read after done
	stop   context.CancelFunc
}

type logBuffer struct {
	mu sync.Mutex
	b  strings.Builder
	t  *testing.T
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.b.Write(p)
	return len(p), nil
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// startAgent runs an agent against s. Its workload attestor is the real one,
// its TPM is not.
func startAgent(t *testing.T, s *fakeServer, change ...func(*Config)) *running {
	t.Helper()
	dir := t.TempDir()
	bundle := filepath.Join(dir, "bundle.pem")
	if err := os.WriteFile(bundle, s.bundlePEM(), 0o600); err != nil {
		t.Fatal(err)
	}
	return startIn(t, s, dir, append([]func(*Config){func(c *Config) { c.TrustBundle = bundle }}, change...)...)
}

func startIn(t *testing.T, s *fakeServer, dir string, change ...func(*Config)) *running {
	t.Helper()
	sock, err := os.MkdirTemp("", "rl") // short: t.TempDir may be too long for sun_path
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(sock) })
	r := &running{
		t: t, dir: dir, socket: filepath.Join(sock, "api.sock"), quoter: &fakeQuoter{}, log: &logBuffer{t: t},
		ready: make(chan string, 1), done: make(chan struct{}),
	}
	log := slog.New(slog.NewTextHandler(r.log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	cfg := Config{
		TrustDomain: testTD, Server: s.addr, DataDir: filepath.Join(dir, "data"), Socket: r.socket,
		SyncInterval: 200 * time.Millisecond, Log: log, Ready: func(id string) { r.ready <- id },
	}
	for _, fn := range change {
		fn(&cfg)
	}
	a, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	unlock, err := lockDataDir(cfg.DataDir)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	r.stop = cancel
	p := &Plugins{Quoter: r.quoter}
	l, err := catalog.LoadBuiltIn(ctx, catalog.BuiltIn{Name: "tpmnode", Plugin: nodeattestorv1.NodeAttestorPluginServer(fakeAttestor{})},
		catalog.Options{TrustDomain: testTD, Log: log})
	if err != nil {
		t.Fatal(err)
	}
	p.loaded = append(p.loaded, loadedPlugin{Plugin: l})
	if p.NodeAttestor, err = l.AgentNodeAttestor(); err != nil {
		t.Fatal(err)
	}
	if err := p.loadWorkloadAttestor(ctx, testTD, config.Plugin{}, binary.New(), log); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(r.done)
		defer unlock()
		r.err = a.Run(ctx, p)
		if err := p.Close(); err != nil {
			r.err = errors.Join(r.err, err)
		}
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

// patience is how long a test waits for what should happen at once.
const patience = 20 * time.Second

func (r *running) waitReady() string {
	r.t.Helper()
	select {
	case id := <-r.ready:
		return id
	case <-r.done:
		r.t.Fatalf("agent ended: %v", r.err)
	case <-time.After(patience):
		r.t.Fatal("agent is not ready")
	}
	return ""
}

// eventually polls cond, for states that cannot be waited for.
func eventually(t *testing.T, what string, cond func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if cond() {
			return
		}
	}
	t.Fatalf("never: %s", what)
}

func (r *running) dial() *grpc.ClientConn {
	r.t.Helper()
	c, err := grpc.NewClient("unix:"+r.socket, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithAuthority("localhost"))
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { c.Close() })
	return c
}

func header(ctx context.Context) context.Context {
	return metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", "true")
}

// testContext ends with the test or when patience is over.
func testContext(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	return header(ctx)
}

// fetch opens a stream and returns it with its first message.
func (r *running) fetch() (workloadpb.SpiffeWorkloadAPI_FetchX509SVIDClient, *workloadpb.X509SVIDResponse, error) {
	r.t.Helper()
	stream, err := workloadpb.NewSpiffeWorkloadAPIClient(r.dial()).FetchX509SVID(testContext(r.t), &workloadpb.X509SVIDRequest{})
	if err != nil {
		return nil, nil, err
	}
	resp, err := stream.Recv()
	return stream, resp, err
}

// selfHash is the selector of the test binary.
func selfHash(t testing.TB) string {
	t.Helper()
	sel, err := ownSelector()
	if err != nil {
		t.Fatal(err)
	}
	return sel
}

var ownSelector = sync.OnceValues(func() (string, error) {
	b, err := os.ReadFile("/proc/self/exe")
	h := sha256.Sum256(b)
	return "binary:sha256:" + hex.EncodeToString(h[:]), err
})

func selfUID() string { return fmt.Sprintf("binary:uid:%d", os.Geteuid()) }

func discard() *slog.Logger { return slog.New(slog.DiscardHandler) }

// joinLineOf is the join line for a server's trust key in PEM.
func joinLineOf(t testing.TB, keyPEM []byte) string {
	t.Helper()
	block, _ := pem.Decode(keyPEM)
	if block == nil {
		t.Fatal("trust key is not PEM")
	}
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	spki, err := x509.MarshalPKIXPublicKey(key.(crypto.Signer).Public())
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("rootlink-join:v1:%s:%x", testTD, sha256.Sum256(spki))
}
