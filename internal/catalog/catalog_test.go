package catalog

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/spire-plugin-sdk/pluginsdk"
	metricsv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/hostservice/common/metrics/v1"
	workloadv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/agent/workloadattestor/v1"
	configv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/service/common/config/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"
)

// attestor is a workload attestor whose answer the test chooses.
type attestor struct {
	workloadv1.UnimplementedWorkloadAttestorServer
	configv1.UnimplementedConfigServer

	attest func(context.Context, *workloadv1.AttestRequest) (*workloadv1.AttestResponse, error)

	mu      sync.Mutex
	log     hclog.Logger                // guarded by mu
	core    *configv1.CoreConfiguration // guarded by mu
	hcl     string                      // guarded by mu
	loggers int                         // guarded by mu
	closed  int                         // guarded by mu
	inside  int                         // guarded by mu: calls in flight
	atClose int                         // guarded by mu: calls in flight when Close ran
	broker  func(pluginsdk.ServiceBroker) error
}

func (a *attestor) Attest(ctx context.Context, r *workloadv1.AttestRequest) (*workloadv1.AttestResponse, error) {
	a.mu.Lock()
	a.inside++
	a.mu.Unlock()
	defer func() {
		a.mu.Lock()
		a.inside--
		a.mu.Unlock()
	}()
	return a.attest(ctx, r)
}

func (a *attestor) Configure(_ context.Context, r *configv1.ConfigureRequest) (*configv1.ConfigureResponse, error) {
	if r.HclConfiguration == "bad" {
		return nil, status.Error(codes.InvalidArgument, "the value is bad")
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.core, a.hcl = r.CoreConfiguration, r.HclConfiguration
	return &configv1.ConfigureResponse{}, nil
}

func (a *attestor) Validate(_ context.Context, r *configv1.ValidateRequest) (*configv1.ValidateResponse, error) {
	return &configv1.ValidateResponse{Valid: r.HclConfiguration != "bad", Notes: []string{"a note"}}, nil
}

func (a *attestor) SetLogger(l hclog.Logger) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.log = l
	a.loggers++
}

func (a *attestor) BrokerHostServices(b pluginsdk.ServiceBroker) error {
	if a.broker == nil {
		return nil
	}
	return a.broker(b)
}

func (a *attestor) Close() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.closed++
	a.atClose = a.inside
	return nil
}

func load(t *testing.T, a *attestor, edit func(*Options)) *Plugin {
	t.Helper()
	o := Options{TrustDomain: "example.org", Log: slog.New(slog.DiscardHandler)}
	if edit != nil {
		edit(&o)
	}
	p, err := LoadBuiltIn(t.Context(), BuiltIn{
		Name:     "binary",
		Plugin:   workloadv1.WorkloadAttestorPluginServer(a),
		Services: []pluginsdk.ServiceServer{configv1.ConfigServiceServer(a)},
	}, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	})
	return p
}

func client(t *testing.T, p *Plugin) workloadv1.WorkloadAttestorClient {
	t.Helper()
	c, err := p.WorkloadAttestor()
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestCallsConfiguresAndCloses(t *testing.T) {
	a := &attestor{attest: func(_ context.Context, r *workloadv1.AttestRequest) (*workloadv1.AttestResponse, error) {
		return &workloadv1.AttestResponse{SelectorValues: []string{"pid:" + string('0'+r.Pid)}}, nil
	}}
	p := load(t, a, nil)
	if err := p.Configure(t.Context(), "x = 1"); err != nil {
		t.Fatal(err)
	}
	if a.core.TrustDomain != "example.org" || a.hcl != "x = 1" {
		t.Errorf("configured with %v, %q", a.core, a.hcl)
	}
	if a.loggers != 1 {
		t.Errorf("one implementation behind two services got %d loggers", a.loggers)
	}
	resp, err := client(t, p).Attest(t.Context(), &workloadv1.AttestRequest{Pid: 7})
	if err != nil || len(resp.SelectorValues) != 1 || resp.SelectorValues[0] != "pid:7" {
		t.Errorf("attest: %v, %v", resp, err)
	}
	for range 2 {
		if err := p.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if a.closed != 1 {
		t.Errorf("closed %d times", a.closed)
	}
}

func TestConfigurationErrorsReadWell(t *testing.T) {
	p := load(t, &attestor{}, nil)
	err := p.Configure(t.Context(), "bad")
	if err == nil || strings.Contains(err.Error(), "rpc error") || !strings.Contains(err.Error(), "the value is bad") {
		t.Errorf("got %v", err)
	}
	var invalid *InvalidConfigError
	if notes, err := p.Validate(t.Context(), "bad"); !errors.As(err, &invalid) || len(notes) != 1 {
		t.Errorf("got %v, %v", notes, err)
	}
	if _, err := p.Validate(t.Context(), ""); err != nil {
		t.Errorf("valid configuration refused: %v", err)
	}
}

func TestRefusesAMissingServiceAndIgnoredConfiguration(t *testing.T) {
	p, err := LoadBuiltIn(t.Context(), BuiltIn{Name: "bare", Plugin: workloadv1.WorkloadAttestorPluginServer(&attestor{})},
		Options{TrustDomain: "example.org", Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	if _, err := p.ServerNodeAttestor(); !errors.Is(err, ErrNoService) {
		t.Errorf("got %v", err)
	}
	if err := p.Configure(t.Context(), "x = 1"); !errors.Is(err, ErrNotConfigurable) {
		t.Errorf("got %v", err)
	}
	if err := p.Configure(t.Context(), ""); err != nil {
		t.Errorf("nothing to configure: %v", err)
	}
}

func TestPanicInAPluginIsAnErrorOfThatCall(t *testing.T) {
	var logged bytes.Buffer
	fine := false
	a := &attestor{attest: func(context.Context, *workloadv1.AttestRequest) (*workloadv1.AttestResponse, error) {
		if !fine {
			panic("a secret detail")
		}
		return &workloadv1.AttestResponse{}, nil
	}}
	p := load(t, a, func(o *Options) { o.Log = slog.New(slog.NewTextHandler(&logged, nil)) })
	_, err := client(t, p).Attest(t.Context(), &workloadv1.AttestRequest{})
	if status.Code(err) != codes.Internal || strings.Contains(err.Error(), "secret") {
		t.Errorf("got %v", err)
	}
	fine = true
	if _, err := client(t, p).Attest(t.Context(), &workloadv1.AttestRequest{}); err != nil {
		t.Errorf("the plugin did not survive: %v", err)
	}
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(logged.String(), "a secret detail") {
		t.Errorf("the log does not say what happened: %s", logged.String())
	}
}

func TestRefusesAMessageOverTheLimitOfAnExternalPlugin(t *testing.T) {
	a := &attestor{attest: func(context.Context, *workloadv1.AttestRequest) (*workloadv1.AttestResponse, error) {
		return &workloadv1.AttestResponse{SelectorValues: []string{strings.Repeat("x", MaxMessage)}}, nil
	}}
	_, err := client(t, load(t, a, nil)).Attest(t.Context(), &workloadv1.AttestRequest{})
	if status.Code(err) != codes.ResourceExhausted {
		t.Errorf("got %v", err)
	}
}

func TestCloseWaitsForCallsInFlight(t *testing.T) {
	entered, release := make(chan struct{}), make(chan struct{})
	a := &attestor{attest: func(context.Context, *workloadv1.AttestRequest) (*workloadv1.AttestResponse, error) {
		close(entered)
		<-release
		return &workloadv1.AttestResponse{SelectorValues: []string{"late"}}, nil
	}}
	p := load(t, a, nil)
	c := client(t, p)
	got := make(chan error, 1)
	go func() {
		_, err := c.Attest(context.Background(), &workloadv1.AttestRequest{})
		got <- err
	}()
	<-entered
	closed := make(chan error, 1)
	go func() { closed <- p.Close() }()
	close(release)
	if err := <-got; err != nil {
		t.Errorf("a call in flight was cut off: %v", err)
	}
	if err := <-closed; err != nil {
		t.Error(err)
	}
	if a.atClose != 0 {
		t.Errorf("closed under %d running calls", a.atClose)
	}
}

func TestCloseCancelsCallsThatDoNotEnd(t *testing.T) {
	entered := make(chan struct{})
	a := &attestor{attest: func(ctx context.Context, _ *workloadv1.AttestRequest) (*workloadv1.AttestResponse, error) {
		close(entered)
		<-ctx.Done()
		return nil, ctx.Err()
	}}
	p := load(t, a, nil)
	p.b.(*pipe).drain = 20 * time.Millisecond
	c := client(t, p)
	got := make(chan error, 1)
	go func() {
		_, err := c.Attest(context.Background(), &workloadv1.AttestRequest{})
		got <- err
	}()
	<-entered
	if err := p.Close(); err != nil {
		t.Error(err)
	}
	if err := <-got; err == nil {
		t.Error("the call was not cancelled")
	}
	if a.closed != 1 || a.atClose != 0 {
		t.Errorf("closed %d times, under %d running calls", a.closed, a.atClose)
	}
	if _, err := c.Attest(t.Context(), &workloadv1.AttestRequest{}); err == nil {
		t.Error("a closed plugin answers")
	}
}

func TestCloseGivesUpOnAHandlerThatIgnoresItsContext(t *testing.T) {
	entered, release := make(chan struct{}), make(chan struct{})
	a := &attestor{attest: func(context.Context, *workloadv1.AttestRequest) (*workloadv1.AttestResponse, error) {
		close(entered)
		<-release
		return nil, errors.New("at last")
	}}
	p := load(t, a, nil)
	p.b.(*pipe).drain = 20 * time.Millisecond
	c := client(t, p)
	go func() { _, _ = c.Attest(context.Background(), &workloadv1.AttestRequest{}) }()
	<-entered
	if err := p.Close(); err != nil {
		t.Error(err)
	}
	close(release)
}

// metrics is a host service.
type metrics struct {
	metricsv1.UnimplementedMetricsServer
	keys chan string
}

func (m *metrics) IncrCounter(_ context.Context, r *metricsv1.IncrCounterRequest) (*emptypb.Empty, error) {
	m.keys <- strings.Join(r.Key, ".")
	return &emptypb.Empty{}, nil
}

func TestBrokersHostServices(t *testing.T) {
	var c metricsv1.MetricsServiceClient
	var offered, unknown bool
	a := &attestor{broker: func(b pluginsdk.ServiceBroker) error {
		offered = b.BrokerClient(&c)
		unknown = b.BrokerClient(&configv1.ConfigServiceClient{})
		return nil
	}}
	m := &metrics{keys: make(chan string, 1)}
	load(t, a, func(o *Options) { o.HostServices = []pluginsdk.ServiceServer{metricsv1.MetricsServiceServer(m)} })
	if !offered || unknown {
		t.Fatalf("offered %v, unknown %v", offered, unknown)
	}
	if _, err := c.IncrCounter(t.Context(), &metricsv1.IncrCounterRequest{Key: []string{"a", "b"}}); err != nil {
		t.Fatal(err)
	}
	if k := <-m.keys; k != "a.b" {
		t.Errorf("got %q", k)
	}
}

func TestLoadingFailsWithItsHostServices(t *testing.T) {
	a := &attestor{broker: func(pluginsdk.ServiceBroker) error { return errors.New("needs metrics") }}
	_, err := LoadBuiltIn(t.Context(), BuiltIn{Name: "binary", Plugin: workloadv1.WorkloadAttestorPluginServer(a)},
		Options{TrustDomain: "example.org", Log: slog.New(slog.DiscardHandler)})
	if err == nil || !strings.Contains(err.Error(), "needs metrics") {
		t.Errorf("got %v", err)
	}
	if a.closed != 1 {
		t.Error("the half-loaded plugin was not closed")
	}
}

func TestForwardsLogsWithTheirFields(t *testing.T) {
	var out bytes.Buffer
	base := slog.New(slog.NewTextHandler(&out, &slog.HandlerOptions{Level: slog.LevelInfo}))
	l := newHCLogger(base).With("a", 1).Named("sub").Named("deep")
	l.Debug("too low")
	l.Warn("careful", "hex", hclog.Fmt("%x", 255), "err", errors.New("boom"), "odd")
	for _, want := range []string{"level=WARN", "msg=careful", "a=1", "subsystem=sub.deep", "hex=ff", "err=boom"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("no %q in %s", want, out.String())
		}
	}
	if strings.Contains(out.String(), "too low") || l.IsDebug() || !l.IsInfo() || l.GetLevel() != hclog.Info {
		t.Errorf("level is not slog's: %s, %v", out.String(), l.GetLevel())
	}
}
