package catalog

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/spire-plugin-sdk/pluginsdk"
	metricsv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/hostservice/common/metrics/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

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
	if err := os.Chmod(o.config.Cmd, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(filepath.Dir(o.config.Cmd), 0o777); err != nil {
		t.Fatal(err)
	}
	if _, err := Load(t.Context(), o.config, o.opts); !errors.Is(err, ErrOpenProgram) {
		t.Errorf("in a directory of all: got %v", err)
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
