package main

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	agentv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/agent/nodeattestor/v1"
	configv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/service/common/config/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/rootlink/rootlink/internal/swtpmtest"
	tpmv1 "github.com/rootlink/rootlink/proto/rootlink/tpm/v1"
)

func binary(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "rootlink-tpmnode")
	if out, err := exec.Command("go", "build", "-o", path, ".").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return path
}

// start runs the binary as SPIRE does: a cookie in the environment, a first line
// on stdout that says where the plugin listens.
func start(t *testing.T, path, role string) *grpc.ClientConn {
	t.Helper()
	cmd := exec.Command(path, role)
	// The socket is made in TMPDIR, and its path must be short.
	dir, err := os.MkdirTemp("", "pl")
	if err != nil {
		t.Fatal(err)
	}
	cmd.Env = append(os.Environ(), "NodeAttestor=NodeAttestor", "BundlePublisher=BundlePublisher", "CredentialComposer=CredentialComposer", "TMPDIR="+dir, "PLUGIN_UNIX_SOCKET_DIR="+dir)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Signal(syscall.SIGKILL)
		cmd.Wait()
		os.RemoveAll(dir)
	})
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatalf("no handshake: %v", err)
	}
	// core protocol | plugin protocol | network | address | protocol | certificate
	f := strings.Split(strings.TrimSpace(line), "|")
	if len(f) < 5 || f[0] != "1" || f[1] != "1" || f[2] != "unix" || f[4] != "grpc" {
		t.Fatalf("the first line on stdout is no handshake: %q", line)
	}
	c, err := grpc.NewClient("unix:"+f[3], grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// TestPluginBinary builds the program once for all that is asked of it.
func TestPluginBinary(t *testing.T) {
	path := binary(t)
	t.Run("usage", func(t *testing.T) { testUsage(t, path) })
	t.Run("serves both roles", func(t *testing.T) { testServesBothRoles(t, path) })
	t.Run("serves the server's other roles", func(t *testing.T) { testServesTheServersOtherRoles(t, path) })
	t.Run("agent side reaches the TPM", func(t *testing.T) { testAgentSideReachesTheTPM(t, path) })
}

func testUsage(t *testing.T, path string) {
	for _, args := range [][]string{nil, {"both"}, {"agent", "server"}} {
		var stdout, stderr bytes.Buffer
		cmd := exec.Command(path, args...)
		cmd.Stdout, cmd.Stderr = &stdout, &stderr
		cmd.Run()
		if code := cmd.ProcessState.ExitCode(); code != 2 || stdout.Len() > 0 || !strings.Contains(stderr.String(), "usage:") {
			t.Errorf("%q: exit %d, stdout %q, stderr %q", args, code, &stdout, &stderr)
		}
	}
}

func testServesBothRoles(t *testing.T, path string) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	core := &configv1.CoreConfiguration{TrustDomain: "example.org"}
	for _, role := range []string{"agent", "server"} {
		conn := start(t, path, role)
		r, err := configv1.NewConfigClient(conn).Validate(ctx, &configv1.ValidateRequest{CoreConfiguration: core, HclConfiguration: `no_such_key = 1`})
		if err != nil || r.GetValid() || !strings.Contains(strings.Join(r.GetNotes(), " "), "no_such_key") {
			t.Errorf("%s: %v, %v", role, r, err)
		}
		// Only an agent in the same process measures what it has quoted.
		if _, err := tpmv1.NewQuoterClient(conn).Info(ctx, &tpmv1.InfoRequest{}); status.Code(err) != codes.Unimplemented {
			t.Errorf("%s serves a quoter: err = %v", role, err)
		}
	}
}

func testAgentSideReachesTheTPM(t *testing.T, path string) {
	sw := swtpmtest.Start(t)
	conn := start(t, path, "agent")
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if _, err := configv1.NewConfigClient(conn).Configure(ctx, &configv1.ConfigureRequest{
		CoreConfiguration: &configv1.CoreConfiguration{TrustDomain: "example.org"},
		HclConfiguration:  fmt.Sprintf("tpm_path = %q\ndata_dir = %q\n", sw.Device(), t.TempDir()),
	}); err != nil {
		t.Fatal(err)
	}
	stream, err := agentv1.NewNodeAttestorClient(conn).AidAttestation(ctx)
	if err != nil {
		t.Fatal(err)
	}
	m, err := stream.Recv()
	if err != nil {
		t.Fatal(err)
	}
	if len(m.GetPayload()) == 0 {
		t.Errorf("the first message is %T", m.GetData())
	}
}

func testServesTheServersOtherRoles(t *testing.T, path string) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	core := &configv1.CoreConfiguration{TrustDomain: "example.org"}
	for _, role := range []string{"bundles", "composer"} {
		r, err := configv1.NewConfigClient(start(t, path, role)).Validate(ctx, &configv1.ValidateRequest{CoreConfiguration: core, HclConfiguration: `no_such_key = 1`})
		if err != nil || r.GetValid() || !strings.Contains(strings.Join(r.GetNotes(), " "), "no_such_key") {
			t.Errorf("%s: %v, %v", role, r, err)
		}
	}
}
