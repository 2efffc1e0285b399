package catalog

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
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

// What Attest does for these process IDs.
const (
	pidPlain = iota + 1
	pidExit
	pidPanic
	pidHuge
	pidHang
	pidFlood
	pidMetrics
	pidWho // answers the plugin's process ID
	pidStop
)

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

func TestExternalPluginWorksLikeABuiltInOne(t *testing.T) {
	o := newOutside(t, "ok")
	m := &metrics{keys: make(chan string, 1)}
	o.opts.HostServices = []pluginsdk.ServiceServer{metricsv1.MetricsServiceServer(m)}
	o.config.Data = "one"
	o.copyProgram()
	p := o.load()
	if got, err := attestPid(t, p, pidPlain); err != nil || got != "hcl:one" {
		t.Errorf("got %q, %v", got, err)
	}
	if _, err := attestPid(t, p, pidMetrics); err != nil || len(m.keys) != 1 {
		t.Errorf("host service: %d calls, %v", len(m.keys), err)
	}
	if err := p.Configure(t.Context(), "two"); err != nil {
		t.Error(err)
	}
	if got, _ := attestPid(t, p, pidPlain); got != "hcl:two" {
		t.Errorf("after a reload: %q", got)
	}
	if err := p.Health(); err != nil || p.Restarts() != 0 || len(p.Services()) != 2 {
		t.Errorf("%v, %d, %v", err, p.Restarts(), p.Services())
	}
	who, err := attestPid(t, p, pidWho)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Close(); err != nil {
		t.Error(err)
	}
	pid, _ := strconv.Atoi(who)
	gone(t, pid)
	if _, err := attestPid(t, p, pidPlain); status.Code(err) != codes.Unavailable {
		t.Errorf("after Close: %v", err)
	}
}

// TestRestartsAPluginThatDied: in the middle of a call, again and again; the
// last good configuration is in force before a call gets through.
func TestRestartsAPluginThatDied(t *testing.T) {
	o := newOutside(t, "ok")
	o.config.Data = "first"
	p := o.load()
	if err := p.Configure(t.Context(), "second"); err != nil {
		t.Fatal(err)
	}
	for n, how := range []int32{pidExit, pidPanic, pidExit} {
		if _, err := attestPid(t, p, how); status.Code(err) != codes.Unavailable {
			t.Errorf("the call that it died in: %v", err)
		}
		up(t, p, n+1)
		if got, err := attestPid(t, p, pidPlain); err != nil || got != "hcl:second" {
			t.Errorf("after restart %d: %q, %v", n+1, got, err)
		}
	}
	if !strings.Contains(o.log.String(), "as an attacker would have it") || !strings.Contains(o.log.String(), "restarts=3") {
		t.Error("the log lacks the panic or the count")
	}
}

func TestReplacesAPluginThatNoLongerAnswers(t *testing.T) {
	o := newOutside(t, "ok")
	o.opts.pace.pulse = 50 * time.Millisecond
	p := o.load()
	if _, err := attestPid(t, p, pidStop); status.Code(err) != codes.Unavailable {
		t.Errorf("the call that it stopped in: %v", err)
	}
	up(t, p, 1)
	if _, err := attestPid(t, p, pidPlain); err != nil {
		t.Error(err)
	}
}

// TestRefusesCallsWhileDown: at once, and Health says why.
func TestRefusesCallsWhileDown(t *testing.T) {
	o := newOutside(t, "once", filepath.Join(t.TempDir(), "ran"))
	p := o.load()
	if _, err := attestPid(t, p, pidExit); status.Code(err) != codes.Unavailable {
		t.Errorf("got %v", err)
	}
	until(t, p, "down for the program's own reason", func(err error) bool {
		var down *DownError
		return errors.As(err, &down) && down.Plugin == "outside" && down.Restarts == 0
	})
	began := time.Now()
	if _, err := attestPid(t, p, pidPlain); status.Code(err) != codes.Unavailable || time.Since(began) > 5*time.Second {
		t.Errorf("after %v: %v", time.Since(began), err)
	}
	var e *ConfigureError
	if err := p.Configure(t.Context(), "x"); !errors.As(err, &e) || e.Code != codes.Unavailable {
		t.Errorf("configure: %v", err)
	}
}

func TestRefusesAWrongChecksum(t *testing.T) {
	o := newOutside(t, "once", filepath.Join(t.TempDir(), "ran"))
	o.config.Checksum = strings.Repeat("ab", 32)
	if _, err := Load(t.Context(), o.config, o.opts); !errors.Is(err, ErrChecksum) {
		t.Errorf("got %v", err)
	}
	if _, err := os.Stat(o.config.Args[2]); !errors.Is(err, os.ErrNotExist) {
		t.Error("it ran")
	}
}

// TestRefusesAProgramSwappedBetweenRestarts: the pin is judged at every start,
// and a plugin that was refused comes back when its own program does.
func TestRefusesAProgramSwappedBetweenRestarts(t *testing.T) {
	o := newOutside(t, "ok")
	o.copyProgram()
	p := o.load()
	good := o.config.Cmd + ".good"
	if err := os.Rename(o.config.Cmd, good); err != nil {
		t.Fatal(err)
	}
	ran := filepath.Join(t.TempDir(), "ran")
	if err := os.WriteFile(o.config.Cmd, []byte("#!/bin/sh\ntouch "+ran+"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	attestPid(t, p, pidExit)
	until(t, p, "refused", func(err error) bool { return errors.Is(err, ErrChecksum) })
	if _, err := os.Stat(ran); !errors.Is(err, os.ErrNotExist) {
		t.Error("the other program ran")
	}
	if err := os.Rename(good, o.config.Cmd); err != nil {
		t.Fatal(err)
	}
	up(t, p, 1)
}

func TestWarnsOfAProgramThatIsNotPinned(t *testing.T) {
	o := newOutside(t, "ok")
	o.copyProgram()
	sum := o.config.Checksum
	o.config.Checksum = ""
	o.load()
	if !strings.Contains(o.log.String(), "level=WARN") || !strings.Contains(o.log.String(), sum) {
		t.Errorf("the log does not name the digest to pin:\n%s", o.log)
	}
}

func TestRefusesAProgramThatOthersCanReplace(t *testing.T) {
	o := newOutside(t, "ok")
	o.copyProgram()
	sum := o.config.Checksum
	o.config.Checksum = ""
	if err := os.Chmod(o.config.Cmd, 0o777); err != nil {
		t.Fatal(err)
	}
	if _, err := Load(t.Context(), o.config, o.opts); !errors.Is(err, ErrOpenProgram) {
		t.Errorf("got %v", err)
	}
	o.config.Checksum = sum // which makes it no matter
	o.load()
}

func TestRefusesWhatIsNoPlugin(t *testing.T) {
	for _, mode := range []string{"mute", "talk", "shout", "orphan"} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			o := newOutside(t, mode)
			o.opts.StartTimeout = 3 * time.Second
			began := time.Now()
			if p, err := Load(t.Context(), o.config, o.opts); err == nil {
				p.Close()
				t.Error("loaded")
			}
			if d := time.Since(began); d > 20*time.Second {
				t.Errorf("took %v", d)
			}
		})
	}
	for name, edit := range map[string]func(*Config){
		"a directory":          func(c *Config) { c.Cmd = t.TempDir() },
		"a missing program":    func(c *Config) { c.Cmd = filepath.Join(t.TempDir(), "none") },
		"a device":             func(c *Config) { c.Cmd = "/dev/zero" },
		"another type":         func(c *Config) { c.Type = "NodeAttestor" },
		"a name with a colon":  func(c *Config) { c.Name = "binary:sha256" },
		"no name":              func(c *Config) { c.Name = "" },
		"a type of variables":  func(c *Config) { c.Type = "LD_PRELOAD=x" },
		"half a checksum":      func(c *Config) { c.Checksum = "abcd" },
		"arguments of nothing": func(c *Config) { c.Cmd = "" },
	} {
		t.Run(name, func(t *testing.T) {
			o := newOutside(t, "ok")
			edit(&o.config)
			if p, err := Load(t.Context(), o.config, o.opts); err == nil {
				p.Close()
				t.Error("loaded")
			}
		})
	}
}

func TestRefusesAConfigurationAndKeepsTheOneBefore(t *testing.T) {
	o := newOutside(t, "ok")
	o.opts.ConfigureTimeout = 2 * time.Second
	o.config.Data = "good"
	p := o.load()
	var e *ConfigureError
	if err := p.Configure(t.Context(), "bad"); !errors.As(err, &e) || e.Code != codes.InvalidArgument || e.Hint != "give another" {
		t.Errorf("got %v", err)
	}
	if got, err := attestPid(t, p, pidPlain); err != nil || got != "hcl:good" {
		t.Errorf("after the refusal: %q, %v", got, err)
	}
	for n, hcl := range []string{"exit"} {
		if err := p.Configure(t.Context(), hcl); err == nil {
			t.Errorf("%s was taken", hcl)
		}
		up(t, p, n+1)
		if got, err := attestPid(t, p, pidPlain); err != nil || got != "hcl:good" {
			t.Errorf("after %s: %q, %v", hcl, got, err)
		}
	}
	if err := p.Configure(t.Context(), "hang"); !errors.As(err, &e) || e.Code != codes.DeadlineExceeded {
		t.Errorf("got %v", err)
	}
	if got, err := attestPid(t, p, pidPlain); err != nil || got != "hcl:good" {
		t.Errorf("after a hang: %q, %v", got, err)
	}
}

func TestRefusesToStartWithABadConfiguration(t *testing.T) {
	for _, hcl := range []string{"bad", "exit", "hang"} {
		t.Run(hcl, func(t *testing.T) {
			t.Parallel()
			o := newOutside(t, "ok")
			o.opts.ConfigureTimeout = time.Second
			o.config.Data = hcl
			var e *ConfigureError
			if _, err := Load(t.Context(), o.config, o.opts); !errors.As(err, &e) {
				t.Errorf("got %v", err)
			}
		})
	}
}

func TestRefusesAHugeAnswer(t *testing.T) {
	o := newOutside(t, "ok")
	p := o.load()
	if _, err := attestPid(t, p, pidHuge); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("got %v", err)
	}
	if _, err := attestPid(t, p, pidPlain); err != nil || p.Restarts() != 0 {
		t.Errorf("afterwards: %v", err)
	}
}

// TestRefusesToLogAFlood: 60,000 lines of 8 KiB come out as a few hundred, and
// the plugin is not held up.
func TestRefusesToLogAFlood(t *testing.T) {
	o := newOutside(t, "ok")
	p := o.load()
	if _, err := attestPid(t, p, pidFlood); err != nil {
		t.Error(err)
	}
	p.Close()
	text := o.log.String()
	if n := strings.Count(text, "\n"); n > 5000 {
		t.Errorf("%d lines", n)
	}
	if !strings.Contains(text, "plugin=outside") || !strings.Contains(text, "plugin_plugin=another") || strings.Contains(text, strings.Repeat("y", maxLogLine+1)) {
		t.Error("not as the host's own: a name is missing, or a line is too long")
	}
}

// TestCloseDeinitialisesThePlugin before it ends it: some have files to close.
func TestCloseDeinitialisesThePlugin(t *testing.T) {
	marker := filepath.Join(t.TempDir(), "closed")
	p := newOutside(t, "closes", marker).load()
	if _, err := attestPid(t, p, pidPlain); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(marker); err == nil {
		t.Fatal("it was deinitialised before its end")
	}
	if err := p.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(marker); err != nil {
		t.Errorf("it was never deinitialised: %v", err)
	}
}

func TestCloseEndsAPluginThatHangs(t *testing.T) {
	o := newOutside(t, "ok")
	p := o.load()
	who, err := attestPid(t, p, pidWho)
	if err != nil {
		t.Fatal(err)
	}
	pid, _ := strconv.Atoi(who)
	call := make(chan error, 1)
	go func() { _, err := attestPid(t, p, pidStop); call <- err }()
	for { // until it is stopped
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil || strings.Contains(string(b), ") T ") {
			break
		}
		time.Sleep(time.Millisecond)
	}
	began := time.Now()
	p.Close()
	if d := time.Since(began); d > 4*drainTimeout {
		t.Errorf("took %v", d)
	}
	gone(t, pid)
	if err := <-call; err == nil {
		t.Error("the call succeeded")
	}
}

func TestPaceIsBounded(t *testing.T) {
	for n := range 100 {
		if d := usualPace.delay(n); d < 160*time.Millisecond || d > 72*time.Second {
			t.Errorf("after %d failures %v", n, d)
		}
	}
}
