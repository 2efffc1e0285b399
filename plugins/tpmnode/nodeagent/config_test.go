package nodeagent

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hashicorp/go-hclog"
	agentv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/agent/nodeattestor/v1"
	configv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/service/common/config/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/rootlink/rootlink/internal/swtpmtest"
	tpmv1 "github.com/rootlink/rootlink/proto/rootlink/tpm/v1"
)

func configure(p *Plugin, trustDomain, hcl string) error {
	_, err := p.Configure(context.Background(), &configv1.ConfigureRequest{
		CoreConfiguration: &configv1.CoreConfiguration{TrustDomain: trustDomain}, HclConfiguration: hcl,
	})
	return err
}

func validate(t *testing.T, p *Plugin, trustDomain, hcl string) (bool, string) {
	t.Helper()
	r, err := p.Validate(context.Background(), &configv1.ValidateRequest{
		CoreConfiguration: &configv1.CoreConfiguration{TrustDomain: trustDomain}, HclConfiguration: hcl,
	})
	if err != nil {
		t.Fatal(err)
	}
	return r.GetValid(), strings.Join(r.GetNotes(), " ")
}

func TestRefusesBadConfiguration(t *testing.T) {
	p := New()
	for name, c := range map[string]struct{ td, hcl, says string }{
		"not HCL":              {"example.org", `data_dir = "/d`, "read"},
		"misspelt key":         {"example.org", "data_dir = \"/d\"\nallow_shared_devices = true", "allow_shared_devices"},
		"no data_dir":          {"example.org", `tpm_path = "/dev/tpmrm0"`, "data_dir"},
		"relative data_dir":    {"example.org", `data_dir = "d"`, "absolute"},
		"bad tpm_path":         {"example.org", "data_dir = \"/d\"\ntpm_path = \"tpm0\"", "tpm_path"},
		"no agent_data_dir":    {"example.org", "data_dir = \"/d\"\nquoter_socket = \"/run/q\"", "agent_data_dir"},
		"relative socket":      {"example.org", "data_dir = \"/d\"\nquoter_socket = \"q\"\nagent_data_dir = \"/a\"", "absolute"},
		"long socket":          {"example.org", "data_dir = \"/d\"\nquoter_socket = \"/" + strings.Repeat("q", 120) + "\"\nagent_data_dir = \"/a\"", "quoter_socket"},
		"relative data":        {"example.org", "data_dir = \"/d\"\nquoter_socket = \"/q\"\nagent_data_dir = \"a\"", "absolute"},
		"data without socket":  {"example.org", "data_dir = \"/d\"\nagent_data_dir = \"/a\"", "not set"},
		"group without socket": {"example.org", "data_dir = \"/d\"\nrecorder_group = \"none\"", "not set"},
		"no such group":        {"example.org", "data_dir = \"/d\"\nquoter_socket = \"/q\"\nagent_data_dir = \"/a\"\nrecorder_group = \"no-such-group\"", "recorder_group"},
		"negative budget":      {"example.org", "data_dir = \"/d\"\nquoter_socket = \"/q\"\nagent_data_dir = \"/a\"\nhash_bytes_per_uid = -1", "negative"},
		"unknown EK type":      {"example.org", "data_dir = \"/d\"\nek_types = [\"rsa-1024\"]", "rsa-1024"},
		"EK type twice":        {"example.org", "data_dir = \"/d\"\nek_types = [\"rsa-2048\", \"rsa-2048\"]", "twice"},
		"no trust domain":      {"", `data_dir = "/d"`, "trust domain"},
		"string for a boolean": {"example.org", "data_dir = \"/d\"\nallow_shared_device = \"perhaps\"", "read"},
	} {
		err := configure(p, c.td, c.hcl)
		if status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: err = %v", name, err)
		}
		if ok, notes := validate(t, p, c.td, c.hcl); ok || !strings.Contains(notes, c.says) {
			t.Errorf("%s: valid %v: %s", name, ok, notes)
		}
	}
	if ok, notes := validate(t, p, "example.org", `data_dir = "/d"`); !ok {
		t.Errorf("the least configuration is refused: %s", notes)
	}
}

func TestConfigureSaysWhatIsWrongWithTheDevice(t *testing.T) {
	sw := swtpmtest.Start(t)
	dir := t.TempDir()
	hcl := fmt.Sprintf("data_dir = %q\ntpm_path = %q\n", dir, sw.Device())
	p := New()
	t.Cleanup(func() { p.Close() })
	if err := configure(p, "example.org", fmt.Sprintf("data_dir = %q\ntpm_path = \"unix:/does/not/exist\"", dir)); status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "hint:") {
		t.Errorf("no device: err = %v", err)
	}
	if err := configure(p, "example.org", hcl); err != nil {
		t.Fatal(err)
	}
	// The same data directory again: the old device lets go of it first.
	if err := configure(p, "example.org", hcl); err != nil {
		t.Errorf("configured anew: %v", err)
	}
	other := New()
	t.Cleanup(func() { other.Close() })
	if err := configure(other, "example.org", hcl); status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), "hint:") {
		t.Errorf("a second agent: err = %v", err)
	}
	p.Close()
	if err := configure(other, "example.org", hcl); err != nil {
		t.Errorf("after the first has gone: %v", err)
	}
	if _, err := p.Quote(t.Context(), &tpmv1.QuoteRequest{}); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("after Close: err = %v", err)
	}
}

func TestRefusesDeviceThatOthersCanOpenUnlessTold(t *testing.T) {
	sw := swtpmtest.Start(t)
	for _, path := range []string{sw.Socket(), filepath.Dir(sw.Socket())} {
		if err := os.Chmod(path, 0o777|os.ModeSticky); err != nil {
			t.Fatal(err)
		}
	}
	p := New()
	t.Cleanup(func() { p.Close() })
	hcl := fmt.Sprintf("data_dir = %q\ntpm_path = %q\n", t.TempDir(), sw.Device())
	if err := configure(p, "example.org", hcl); status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), "hint:") {
		t.Errorf("err = %v", err)
	}
	if err := configure(p, "example.org", hcl+"allow_shared_device = true\n"); err != nil {
		t.Errorf("allowed: %v", err)
	}
}

// TestPanicIsAnError: a panic in an external plugin would end it until SPIRE is
// restarted.
func TestPanicIsAnError(t *testing.T) {
	p := New()
	p.SetLogger(hclog.NewNullLogger())
	p.node = &node{config: &config{}} // without a device: every use panics
	if _, err := p.Info(t.Context(), nil); status.Code(err) != codes.Internal {
		t.Errorf("Info: err = %v", err)
	}
	if err := p.AidAttestation(stream{}); status.Code(err) != codes.Internal {
		t.Errorf("AidAttestation: err = %v", err)
	}
}

// stream is one on which nothing ever arrives.
type stream struct {
	agentv1.NodeAttestor_AidAttestationServer
}

func (stream) Context() context.Context {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	return ctx
}

func (stream) Recv() (*agentv1.Challenge, error) { return nil, context.Canceled }
