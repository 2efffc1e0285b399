package inspection

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/rootlink/rootlink/pkg/layout"

	"github.com/rootlink/rootlink/internal/needs"
)

func TestMain(m *testing.M) {
	if IsStub() {
		RunStub()
	}
	os.Exit(m.Run())
}

func shell(script string) layout.Inspection {
	return layout.Inspection{Name: "i", Run: []string{"/bin/sh", "-c", script}}
}

func TestInspectionSeesCopiesOfTheArtifacts(t *testing.T) {
	t.Chdir(t.TempDir())
	if err := os.MkdirAll("d/sub", 0o755); err != nil {
		t.Fatal(err)
	}
	for _, f := range []string{"a", "d/b", "d/sub/c"} {
		if err := os.WriteFile(f, []byte(f), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	out, err := Run(shell("cat a > new; echo changed > d/b; rm d/sub/c"), []string{"./a", "d"}, Timeout)
	if err != nil || out.ExitCode != 0 {
		t.Fatal(out, err)
	}
	if len(out.Materials) != 3 || len(out.Products) != 3 || out.Products["new"] != out.Materials["a"] || out.Products["d/b"] == out.Materials["d/b"] {
		t.Errorf("%+v", out)
	}
	if b, _ := os.ReadFile("d/b"); string(b) != "d/b" {
		t.Errorf("the artifact itself was changed: %q", b)
	}
}

func TestInspectionsExitCode(t *testing.T) {
	if out, err := Run(shell("exit 3"), nil, Timeout); err != nil || out.ExitCode != 3 {
		t.Error(out, err)
	}
	if _, err := Run(layout.Inspection{Run: []string{"no-such-command"}}, nil, Timeout); err == nil || errors.Is(err, ErrNoSandbox) {
		t.Error(err)
	}
	if _, err := Run(shell("kill -9 $$; sleep 1"), nil, Timeout); err != nil && !strings.Contains(err.Error(), "signal") {
		t.Error(err)
	}
}

func TestRefusesInspectionThatReachesOut(t *testing.T) {
	secret := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(secret, []byte("s"), 0o644); err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	port := ln.Addr().(*net.TCPAddr).Port
	for name, script := range map[string]string{
		"write /etc":         "echo x > /etc/rootlink-inspection-test",
		"write /usr":         "echo x > /usr/rootlink-inspection-test",
		"the user's files":   "cat " + secret,
		"a home":             "test -n \"$(ls -A /root /home 2>/dev/null | grep -v :)\"",
		"open it again":      "mount -o remount,rw / || unshare -Ur mount -o remount,rw /",
		"other processes":    "test $(ls -d /proc/[0-9]* 2>/dev/null | wc -l) -gt 6",
		"the network":        "exec 3<>/dev/tcp/127.0.0.1/" + strconv.Itoa(port),
		"privileges":         "grep -q 'CapEff:.*[1-9a-f]$' /proc/self/status",
		"the real directory": "test \"$(pwd)\" != /tmp/work",
	} {
		in := layout.Inspection{Name: name, Run: []string{"/bin/bash", "-c", script}}
		out, err := Run(in, nil, Timeout)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if out.ExitCode == 0 {
			t.Errorf("it can: %s", name)
		}
	}
}

func TestRefusesInspectionWithoutEnd(t *testing.T) {
	start := time.Now()
	if _, err := Run(shell("sleep 1000 & sleep 1000"), nil, 200*time.Millisecond); !errors.Is(err, ErrTimeout) {
		t.Error(err)
	}
	if d := time.Since(start); d > 20*time.Second {
		t.Errorf("ended after %s", d)
	}
}

func TestRefusesInspectionThatLeavesALink(t *testing.T) {
	if _, err := Run(shell("ln -s /etc/passwd stolen"), nil, Timeout); err == nil || !strings.Contains(err.Error(), "stolen") {
		t.Error(err)
	}
}

func TestRefusesTwoArtifactsOfOneName(t *testing.T) {
	t.Chdir(t.TempDir())
	for _, d := range []string{"a", "b"} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(d+"/x", nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := Run(shell("true"), []string{"a/x", "b/x"}, Timeout); err == nil {
		t.Error("accepted")
	}
}

// A service's home, with what it logs in by, need not lie below /home.
func TestRefusesToShowAHomeThatLiesElsewhere(t *testing.T) {
	var home string
	for _, place := range []string{"/var/lib", "/opt", "."} {
		dir, err := os.MkdirTemp(place, "rootlink-home-")
		if err != nil {
			continue
		}
		t.Cleanup(func() { os.RemoveAll(dir) })
		if home, err = filepath.Abs(dir); err != nil {
			t.Fatal(err)
		}
		break
	}
	if home == "" {
		needs.Missing(t, "no place for a home outside of those that are hidden anyway")
	}
	secret := filepath.Join(home, "credentials")
	if err := os.WriteFile(secret, []byte("s3cret"), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("HOME", home)
	if out, err := Run(shell("test -e "+secret+" && exit 7; exit 0"), nil, Timeout); err != nil || out.ExitCode != 0 {
		t.Error(out, err)
	}
	for _, all := range []string{"/", "/usr", ""} {
		t.Setenv("HOME", all)
		if out, err := Run(shell("exit 0"), nil, Timeout); err != nil || out.ExitCode != 0 {
			t.Errorf("HOME=%q: %v, %v", all, out, err)
		}
	}
}
