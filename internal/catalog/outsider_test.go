package catalog

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/spire-plugin-sdk/pluginmain"
	"github.com/spiffe/spire-plugin-sdk/pluginsdk"
	metricsv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/hostservice/common/metrics/v1"
	workloadv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/agent/workloadattestor/v1"
	configv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/service/common/config/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// The tests' own executable is the external plugin: with the argument "plugin"
// it serves one that does as its second argument and its callers say.
func TestMain(m *testing.M) {
	if len(os.Args) > 2 && os.Args[1] == "plugin" {
		servePlugin(os.Args[2])
		os.Exit(0)
	}
	os.Exit(m.Run())
}

type outsider struct {
	workloadv1.UnimplementedWorkloadAttestorServer
	configv1.UnimplementedConfigServer
	log     hclog.Logger
	metrics metricsv1.MetricsServiceClient

	mu  sync.Mutex
	hcl string

	closed string // file to make when it is deinitialised
}

func servePlugin(mode string) {
	switch mode {
	case "mute":
		time.Sleep(time.Hour)
	case "talk":
		fmt.Println("hello, I am no plugin")
		time.Sleep(time.Hour)
	case "shout":
		for {
			fmt.Print(strings.Repeat("x", 1<<16))
		}
	case "orphan": // leaves a child that keeps its pipes
		c := exec.Command("/bin/sleep", "600")
		c.Stdout, c.Stderr = os.Stdout, os.Stderr
		c.Start()
		fmt.Fprintln(os.Stderr, c.Process.Pid)
		os.Exit(1)
	case "once": // runs the first time only
		marker := os.Args[3]
		if _, err := os.Stat(marker); err == nil {
			os.Exit(7)
		}
		os.WriteFile(marker, nil, 0o600)
	}
	p := &outsider{}
	if mode == "closes" {
		p.closed = os.Args[3]
	}
	pluginmain.Serve(workloadv1.WorkloadAttestorPluginServer(p), configv1.ConfigServiceServer(p))
}

// Close is what the SDK calls for Deinit.
func (p *outsider) Close() error {
	if p.closed == "" {
		return nil
	}
	return os.WriteFile(p.closed, nil, 0o600)
}

func (p *outsider) SetLogger(l hclog.Logger) { p.log = l }

func (p *outsider) BrokerHostServices(b pluginsdk.ServiceBroker) error {
	b.BrokerClient(&p.metrics)
	return nil
}

func (p *outsider) Configure(ctx context.Context, r *configv1.ConfigureRequest) (*configv1.ConfigureResponse, error) {
	switch hcl := r.HclConfiguration; hcl {
	case "bad":
		p.mu.Lock()
		p.hcl = "half of bad" // as a careless plugin would
		p.mu.Unlock()
		return nil, status.Error(codes.InvalidArgument, "the value is bad; hint: give another")
	case "hang":
		<-time.After(time.Hour)
	case "exit":
		os.Exit(5)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.hcl = r.HclConfiguration
	return &configv1.ConfigureResponse{}, nil
}

func (p *outsider) Attest(ctx context.Context, r *workloadv1.AttestRequest) (*workloadv1.AttestResponse, error) {
	answer := func(s string) (*workloadv1.AttestResponse, error) {
		return &workloadv1.AttestResponse{SelectorValues: []string{s}}, nil
	}
	switch r.Pid {
	case pidExit:
		os.Exit(3)
	case pidPanic:
		panic("as an attacker would have it")
	case pidHuge:
		return answer(strings.Repeat("x", MaxMessage))
	case pidHang:
		<-ctx.Done()
		return nil, ctx.Err()
	case pidFlood:
		for i := range 20000 {
			p.log.Warn("flood", "n", strconv.Itoa(i), "plugin", "another", "long", strings.Repeat("y", 1<<13))
			fmt.Fprintln(os.Stdout, "flood")
			fmt.Fprintln(os.Stderr, "flood")
		}
	case pidMetrics:
		p.metrics.IncrCounter(ctx, &metricsv1.IncrCounterRequest{Key: []string{"seen"}, Val: 1})
	case pidWho:
		return answer(strconv.Itoa(os.Getpid()))
	case pidStop:
		syscall.Kill(os.Getpid(), syscall.SIGSTOP)
		<-ctx.Done() // the signal takes a moment
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return answer("hcl:" + p.hcl)
}

// syncBuffer is a log that a test reads while it is written.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(b []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(b)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

type outside struct {
	t      *testing.T
	config Config
	opts   Options
	log    *syncBuffer
}

// fast is the pace of tests that are not about it.
var fast = pace{first: time.Millisecond, last: 20 * time.Millisecond, steady: time.Hour, pulse: time.Hour}

func newOutside(t *testing.T, mode string, more ...string) *outside {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	o := &outside{t: t, log: new(syncBuffer)}
	o.config = Config{Type: "WorkloadAttestor", Name: "outside", Cmd: exe, Args: append([]string{"plugin", mode}, more...)}
	o.opts = Options{
		TrustDomain: "example.org", pace: fast,
		Log: slog.New(slog.NewTextHandler(o.log, &slog.HandlerOptions{Level: slog.LevelDebug})),
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("log:\n%.20000s", o.log)
		}
	})
	return o
}

// copyProgram gives the test an executable of its own to tamper with.
func (o *outside) copyProgram() {
	o.t.Helper()
	b, err := os.ReadFile(o.config.Cmd)
	if err != nil {
		o.t.Fatal(err)
	}
	o.config.Cmd = filepath.Join(o.t.TempDir(), "plugin")
	if err := os.WriteFile(o.config.Cmd, b, 0o700); err != nil {
		o.t.Fatal(err)
	}
	sum := sha256.Sum256(b)
	o.config.Checksum = hex.EncodeToString(sum[:])
}

func (o *outside) load() *Plugin {
	o.t.Helper()
	p, err := Load(o.t.Context(), o.config, o.opts)
	if err != nil {
		o.t.Fatal(err)
	}
	o.t.Cleanup(func() { p.Close() })
	return p
}

func attestPid(t *testing.T, p *Plugin, pid int32) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	r, err := client(t, p).Attest(ctx, &workloadv1.AttestRequest{Pid: pid})
	if err != nil {
		return "", err
	}
	return r.SelectorValues[0], nil
}

// until waits for Health to be what is wanted.
func until(t *testing.T, p *Plugin, what string, ok func(error) bool) {
	t.Helper()
	deadline := time.NewTimer(30 * time.Second)
	defer deadline.Stop()
	for {
		changed := p.Changed()
		if ok(p.Health()) {
			return
		}
		select {
		case <-changed:
		case <-time.After(10 * time.Millisecond): // why it is down may change without a change of state
		case <-deadline.C:
			t.Fatalf("never %s: %v", what, p.Health())
		}
	}
}

func up(t *testing.T, p *Plugin, restarts int) {
	t.Helper()
	until(t, p, "up again", func(err error) bool { return err == nil && p.Restarts() == restarts })
}

// gone fails unless the process ends.
func gone(t *testing.T, pid int) {
	t.Helper()
	for range 1000 {
		if b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid)); err != nil || strings.Contains(string(b), ") Z ") {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Errorf("process %d is still there", pid)
}
