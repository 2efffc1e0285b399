package main

import (
	"bytes"
	"context"
	"os"
	"strings"
	"testing"

	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/internal/recorder"
	workloadv1 "github.com/rootlink/rootlink/proto/rootlink/workload/v1"
)

func TestMain(m *testing.M) {
	if recorder.IsStub() {
		recorder.RunStub()
	}
	os.Exit(m.Run())
}

func rootlink(args ...string) (code int, stdout, stderr string) {
	var out, errs bytes.Buffer
	code = cli.Main(context.Background(), newRoot(), args, &out, &errs)
	return code, out.String(), errs.String()
}

func TestOwnFailuresOfRunAre125(t *testing.T) {
	t.Setenv(recorder.EnvSocket, "")
	t.Chdir(t.TempDir())
	for _, tc := range []struct{ name, args, hint string }{
		{"unknown flag", "run --stp x", "--help"},
		{"nothing at all", "run", "--step NAME, --products PATH"},
		{"no step", "run --products x -- true", "missing: --step"},
		{"bad step", "run --step a/b --products x -- true", "letters"},
		{"no command", "run --step s --products x", "behind --"},
		{"command not behind --", "run --step s --products x true", "behind --"},
		{"argument before --", "run --step s --products x a -- true", "behind --"},
		{"bad choice", "run --on-failure maybe --step s --products x -- true", "--help"},
		{"JSON on the command's stdout", "run --output json --step s --products x -- true", "inspect --output json"},
		{"two outputs", "run --bundle-dir . --bundle-out f --step s --products x -- true", "one of them"},
		{"bad build ID", "run --build-id a;b --step s --products x -- true", "job's number"},
		{"no agent", "run --step s --products x -- true", "--socket"},
	} {
		code, out, errs := rootlink(strings.Fields(tc.args)...)
		if code != 125 || out != "" || !strings.Contains(errs, "hint:") || !strings.Contains(errs, tc.hint) {
			t.Errorf("%s: code %d, stdout %q, stderr %q", tc.name, code, out, errs)
		}
	}
	if code, _, errs := rootlink("run", "--step", "s", "--products", "x", "--", "no-such-command-anywhere"); code != 127 && code != 126 {
		t.Errorf("unknown command: %d, %s", code, errs)
	}
	if code, _, _ := rootlink("whoami"); code != 1 {
		t.Errorf("whoami without an agent: %d", code)
	}
}

func TestWhoamiText(t *testing.T) {
	var b bytes.Buffer
	line := "rootlink-server entry create --spiffe-id spiffe://example.org/step/go --selector binary:tool:sha256:00"
	err := printWhoami(&b, &workloadv1.WhoamiResponse{
		TrustDomain: "example.org", AgentId: "spiffe://example.org/spire/agent/tpmnode/00",
		Measurement: &workloadv1.Measurement{Executable: []byte{1}, Tool: []byte{2}, Recorder: []byte{1}, UnprotectedReason: "plain", Selectors: []string{"binary:uid:0"}},
		Nearest:     &workloadv1.Match{EntryId: "e1", SpiffeId: "spiffe://example.org/x", Missing: []string{"binary:uid:1"}},
		EntryCreate: line,
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"\n" + line + "\n", "unprotected: plain", "also needs binary:uid:1", "identity", "none"} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("no %q in\n%s", want, b.String())
		}
	}
}
