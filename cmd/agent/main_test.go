package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/internal/swtpmtest"
)

func call(t *testing.T, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	code = cli.Main(t.Context(), newRoot(), args, &out, &errs)
	return code, out.String(), errs.String()
}

// TestUsageErrors: a wrong command line is exit code 2 and says what to do.
func TestUsageErrors(t *testing.T) {
	t.Setenv(envSocket, "")
	dir := t.TempDir()
	bad := filepath.Join(dir, "bad.hcl")
	if err := os.WriteFile(bad, []byte("agent {\n  no_such_key = \"x\"\n}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	external := filepath.Join(dir, "external.hcl")
	if err := os.WriteFile(external, []byte("plugins {\n  NodeAttestor \"x509pop\" { }\n}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	join := "rootlink-join:v1:example.org:" + strings.Repeat("ab", 32)
	for name, args := range map[string][]string{
		"no command":              {},
		"unknown flag":            {"run", "--no-such-flag"},
		"no trust domain":         {"run"},
		"neither bundle nor join": {"run", "--trust-domain", "example.org"},
		"bad join line":           {"run", "--trust-domain", "example.org", "--join", "x"},
		"other trust domain":      {"run", "--trust-domain", "example.com", "--join", join},
		"log level":               {"run", "--trust-domain", "example.org", "--join", join, "--log-level", "loud"},
		"recorder group":          {"run", "--trust-domain", "example.org", "--join", join, "--recorder-group", "no-such-group"},
		"root's group":            {"run", "--trust-domain", "example.org", "--join", join, "--recorder-group", "0"},
		"unknown key in file":     {"run", "--trust-domain", "example.org", "--join", join, "--config", bad},
		"plugin without program":  {"run", "--trust-domain", "example.org", "--join", join, "--config", external, "--data-dir", dir},
		"no audience":             {"api", "fetch", "jwt"},
	} {
		code, _, stderr := call(t, args...)
		if code != cli.ExitUsage || !strings.HasPrefix(stderr, "error: ") {
			t.Errorf("%s: code %d, stderr %q", name, code, stderr)
		}
		if name != "root's group" && !strings.Contains(stderr, "hint: ") {
			t.Errorf("%s: no hint in %q", name, stderr)
		}
	}
}

func TestNobodyAnswers(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	for _, args := range [][]string{{"healthcheck"}, {"api", "fetch", "x509"}} {
		if code, _, stderr := call(t, append(args, "--socket", socket)...); code != cli.ExitInternal || !strings.Contains(stderr, "hint: start rootlink-agent") {
			t.Errorf("%v: code %d, %q", args, code, stderr)
		}
	}
}

func TestTPMInfo(t *testing.T) {
	tpm := swtpmtest.Start(t)
	code, out, stderr := call(t, "tpm", "info", "--tpm", tpm.Device(), "--trust-domain", "example.org", "--output", "json")
	if code != 0 || !strings.Contains(out, `"agent_id": "spiffe://example.org/spire/agent/tpmnode/`) || !strings.Contains(out, `"software": true`) {
		t.Errorf("code %d\n%s%s", code, out, stderr)
	}
	code, out, _ = call(t, "tpm", "info", "--tpm", tpm.Device())
	if code != 0 || !strings.Contains(out, "SOFTWARE") || !strings.Contains(out, "sha256") {
		t.Errorf("code %d\n%s", code, out)
	}
	if code, _, stderr = call(t, "tpm", "info", "--tpm", "unix:/nonexistent"); code != cli.ExitInternal || !strings.Contains(stderr, "hint: ") {
		t.Errorf("no TPM: code %d %q", code, stderr)
	}
}

// TestRefusesRecorderGroupWithMembers: a member can connect with the group's
// gid and pose as the recorder.
