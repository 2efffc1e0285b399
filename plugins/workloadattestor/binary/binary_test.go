package binary

import (
	"os"
	"strings"
	"testing"

	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/spire-plugin-sdk/pluginsdk"
	"github.com/spiffe/spire-plugin-sdk/plugintest"
	workloadattestorv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/agent/workloadattestor/v1"
	configv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/service/common/config/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

func load(t *testing.T) (*workloadattestorv1.WorkloadAttestorPluginClient, *configv1.ConfigServiceClient) {
	t.Helper()
	p := New()
	wa, cfg := new(workloadattestorv1.WorkloadAttestorPluginClient), new(configv1.ConfigServiceClient)
	plugintest.ServeInBackground(t, plugintest.Config{
		PluginServer:   workloadattestorv1.WorkloadAttestorPluginServer(p),
		PluginClient:   wa,
		ServiceServers: []pluginsdk.ServiceServer{configv1.ConfigServiceServer(p)},
		ServiceClients: []pluginsdk.ServiceClient{cfg},
		Logger:         hclog.NewNullLogger(),
	})
	return wa, cfg
}

func configure(t *testing.T, cfg *configv1.ConfigServiceClient, hcl string) error {
	t.Helper()
	_, err := cfg.Configure(t.Context(), &configv1.ConfigureRequest{
		CoreConfiguration: &configv1.CoreConfiguration{TrustDomain: "example.org"},
		HclConfiguration:  hcl,
	})
	return err
}

func TestAttest(t *testing.T) {
	wa, cfg := load(t)
	req := &workloadattestorv1.AttestRequest{Pid: int32(os.Getpid())}
	if _, err := wa.Attest(t.Context(), req); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("before Configure: %v", err)
	}
	if err := configure(t, cfg, ""); err != nil {
		t.Fatal(err)
	}
	resp, err := wa.Attest(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	var hash bool
	for _, s := range resp.SelectorValues {
		if strings.HasPrefix(s, "binary:") {
			t.Errorf("%q repeats the type", s)
		}
		hash = hash || strings.HasPrefix(s, "sha256:") && len(s) == 7+64
	}
	if !hash {
		t.Errorf("no hash in %v", resp.SelectorValues)
	}
}

func TestAttestFailsRatherThanSayingNothing(t *testing.T) {
	wa, cfg := load(t)
	if err := configure(t, cfg, ""); err != nil {
		t.Fatal(err)
	}
	for pid, want := range map[int32]codes.Code{0: codes.InvalidArgument, -1: codes.InvalidArgument, 1<<31 - 1: codes.Aborted} {
		resp, err := wa.Attest(t.Context(), &workloadattestorv1.AttestRequest{Pid: pid})
		if status.Code(err) != want {
			t.Errorf("pid %d: %v, %v; want %v", pid, resp, err, want)
		}
	}
}

func TestConfig(t *testing.T) {
	_, cfg := load(t)
	for _, tc := range []struct{ name, hcl, want string }{
		{"empty", "", ""},
		{"all keys", "hash_bytes_per_uid = 1048576\nallow_file_systems = [\"virtiofs\"]\n", ""},
		{"unknown key", "hash_bytes_per_uid = 1\nhash_byte_per_uid = 2\n", `unknown key hash_byte_per_uid (line 2)`},
		{"wrong type", `hash_bytes_per_uid = "many"`, "cannot be read"},
		{"negative", "hash_bytes_per_uid = -1", "negative"},
		{"no file system type", `allow_file_systems = ["a b"]`, "file system type"},
		{"not HCL", "a = = b", "cannot be read"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			resp, err := cfg.Validate(t.Context(), &configv1.ValidateRequest{HclConfiguration: tc.hcl})
			if err != nil {
				t.Fatal(err)
			}
			if resp.Valid != (tc.want == "") || !strings.Contains(strings.Join(resp.Notes, "\n"), tc.want) {
				t.Errorf("Validate: %v %q", resp.Valid, resp.Notes)
			}
			err = configure(t, cfg, tc.hcl)
			if (err == nil) != (tc.want == "") || (err != nil && !strings.Contains(err.Error(), tc.want)) {
				t.Errorf("Configure: %v", err)
			}
		})
	}
}

func TestPanicBecomesError(t *testing.T) {
	p := New()
	err := func() (err error) {
		defer p.recovered(&err)
		panic("boom")
	}()
	if status.Code(err) != codes.Internal || strings.Contains(err.Error(), "boom") {
		t.Errorf("%v", err)
	}
}
