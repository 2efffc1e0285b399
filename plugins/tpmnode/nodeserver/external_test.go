package nodeserver

import (
	"testing"

	"github.com/spiffe/spire-plugin-sdk/pluginsdk"
	"github.com/spiffe/spire-plugin-sdk/plugintest"
	nodeattestorv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/server/nodeattestor/v1"
	configv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/service/common/config/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/rootlink/rootlink/internal/forge"
)

// The SDK's own loader judges the plugin: what it serves, its initialisation,
// and one attestation over go-plugin's transport with file-backed defaults only.
func TestLoadsThroughTheSDK(t *testing.T) {
	h := newHost(t, "", nil)
	plugin, services := New(Options{Now: h.clock}).Servers()
	client, config := new(nodeattestorv1.NodeAttestorPluginClient), new(configv1.ConfigServiceClient)
	plugintest.ServeInBackground(t, plugintest.Config{
		PluginServer: plugin, PluginClient: client, ServiceServers: services,
		ServiceClients: []pluginsdk.ServiceClient{config},
	})
	h.client = client
	if _, err := newAgent(t, h).do(t, h); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("before it was configured: %v", err)
	}
	core := &configv1.CoreConfiguration{TrustDomain: trustDomain}
	bad, err := config.Validate(t.Context(), &configv1.ValidateRequest{CoreConfiguration: core, HclConfiguration: "nonsense = 1"})
	if err != nil || bad.Valid || len(bad.Notes) == 0 {
		t.Errorf("validate: %v, %v", bad, err)
	}
	if _, err := config.Configure(t.Context(), &configv1.ConfigureRequest{CoreConfiguration: core, HclConfiguration: h.hcl("")}); err != nil {
		t.Fatal(err)
	}
	a := newAgent(t, h)
	if r := mustAttest(t, h, a); !r.attributes.CanReattest || len(r.attributes.SelectorValues) < 3 {
		t.Errorf("attributes %v", r.attributes)
	}
	stranger := &agent{tpm: forge.NewTPM(t, forge.NewMaker(t, "Nobody"), forge.TPMOptions{})}
	if _, err := stranger.do(t, h); status.Code(err) != codes.PermissionDenied {
		t.Errorf("got %v", err)
	}
}
