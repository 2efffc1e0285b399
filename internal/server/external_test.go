package server

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"github.com/spiffe/spire-plugin-sdk/pluginmain"
	"github.com/spiffe/spire-plugin-sdk/pluginsdk"
	metricsv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/hostservice/common/metrics/v1"
	agentstorev1 "github.com/spiffe/spire-plugin-sdk/proto/spire/hostservice/server/agentstore/v1"
	identityproviderv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/hostservice/server/identityprovider/v1"
	bundlepublisherv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/server/bundlepublisher/v1"
	composerv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/server/credentialcomposer/v1"
	nodeattestorv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/server/nodeattestor/v1"
	notifierv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/server/notifier/v1"
	plugintypes "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/types"
	configv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/service/common/config/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/rootlink/rootlink/internal/catalog"
	"github.com/rootlink/rootlink/internal/forge"
	"github.com/rootlink/rootlink/internal/store"
)

// The tests' own executable is an external node attestor.
func TestMain(m *testing.M) {
	if len(os.Args) == 2 && os.Args[1] == "plugin" {
		p := new(papers)
		pluginmain.Serve(nodeattestorv1.NodeAttestorPluginServer(p), configv1.ConfigServiceServer(p))
		return
	}
	if len(os.Args) == 3 && os.Args[1] == "publish" {
		pluginmain.Serve(bundlepublisherv1.BundlePublisherPluginServer(board{}))
		return
	}
	if len(os.Args) == 3 && os.Args[1] == "compose" {
		pluginmain.Serve(composerv1.CredentialComposerPluginServer(composer{}))
		return
	}
	if len(os.Args) == 3 && os.Args[1] == "notify" {
		pluginmain.Serve(notifierv1.NotifierPluginServer(new(notifier)))
		return
	}
	os.Exit(m.Run())
}

// board publishes a bundle to the file of the command line.
type board struct {
	bundlepublisherv1.UnimplementedBundlePublisherServer
}

func (board) PublishBundle(_ context.Context, r *bundlepublisherv1.PublishBundleRequest) (*bundlepublisherv1.PublishBundleResponse, error) {
	b, err := proto.Marshal(r.Bundle)
	if err == nil {
		err = os.WriteFile(os.Args[2]+".new", b, 0o600)
	}
	if err == nil {
		err = os.Rename(os.Args[2]+".new", os.Args[2])
	}
	return &bundlepublisherv1.PublishBundleResponse{}, err
}

// TestPublishesTheBundle: what a publisher gets is what GetBundle answers.
func TestPublishesTheBundle(t *testing.T) {
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "bundle")
	w := newWorld(t, func(c *Config) {
		c.Plugins = []catalog.Config{{Type: "BundlePublisher", Name: "board", Cmd: exe, Args: []string{"publish", file}}}
	})
	want := bundleOf(t, w.admin)
	got := new(plugintypes.Bundle)
	for {
		b, err := os.ReadFile(file)
		if err == nil {
			if err := proto.Unmarshal(b, got); err != nil {
				t.Fatal(err)
			}
			break
		}
		select {
		case <-t.Context().Done():
			t.Fatal("never published")
		case <-time.After(10 * time.Millisecond):
		}
	}
	if got.TrustDomain != td || len(got.X509Authorities) != len(want.X509Authorities) || len(got.JwtAuthorities) != len(want.JwtAuthorities) ||
		!bytes.Equal(got.X509Authorities[0].Asn1, want.X509Authorities[0].Asn1) || got.SequenceNumber != want.SequenceNumber {
		t.Errorf("published %v, want %v", got, want)
	}
}

// papers attests whatever the caller says it is.
type papers struct {
	nodeattestorv1.UnimplementedNodeAttestorServer
	configv1.UnimplementedConfigServer
	identity identityproviderv1.IdentityProviderServiceClient
	agents   agentstorev1.AgentStoreServiceClient
	metrics  metricsv1.MetricsServiceClient

	mu  sync.Mutex
	hcl string
}

// claim is a payload.
type claim struct {
	ID        string
	Selectors []string
	Do        string // "exit", "hang", "challenge" or nothing
}

func (p *papers) BrokerHostServices(b pluginsdk.ServiceBroker) error {
	if !b.BrokerClient(&p.identity) || !b.BrokerClient(&p.agents) || !b.BrokerClient(&p.metrics) {
		return status.Error(codes.FailedPrecondition, "a host service is missing")
	}
	return nil
}

func (p *papers) Configure(_ context.Context, r *configv1.ConfigureRequest) (*configv1.ConfigureResponse, error) {
	if r.HclConfiguration == "bad" {
		return nil, status.Error(codes.InvalidArgument, "bad")
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.hcl = r.HclConfiguration
	return &configv1.ConfigureResponse{}, nil
}

func (p *papers) Attest(stream nodeattestorv1.NodeAttestor_AttestServer) error {
	ctx := stream.Context()
	req, err := stream.Recv()
	if err != nil {
		return err
	}
	var c claim
	if err := json.Unmarshal(req.GetPayload(), &c); err != nil {
		return status.Error(codes.InvalidArgument, "no papers")
	}
	switch c.Do {
	case "exit":
		os.Exit(1)
	case "hang":
		<-ctx.Done()
		return ctx.Err()
	case "challenge":
		stream.Send(&nodeattestorv1.AttestResponse{Response: &nodeattestorv1.AttestResponse_Challenge{Challenge: []byte("?")}})
		if _, err := stream.Recv(); err != nil {
			return err
		}
	}
	// What the host is there for.
	p.metrics.IncrCounter(ctx, &metricsv1.IncrCounterRequest{Key: []string{"papers", "seen"}, Val: 1})
	if id, err := p.identity.FetchX509Identity(ctx, &identityproviderv1.FetchX509IdentityRequest{}); err != nil || len(id.Identity.CertChain) == 0 || len(id.Bundle.X509Authorities) == 0 {
		return status.Errorf(codes.Internal, "identity: %v", err)
	}
	known := "known:no"
	if _, err := p.agents.GetAgentInfo(ctx, &agentstorev1.GetAgentInfoRequest{AgentId: c.ID}); err == nil {
		known = "known:yes"
	} else if status.Code(err) != codes.NotFound {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return stream.Send(&nodeattestorv1.AttestResponse{Response: &nodeattestorv1.AttestResponse_AgentAttributes{AgentAttributes: &nodeattestorv1.AgentAttributes{
		SpiffeId: c.ID, SelectorValues: append(c.Selectors, known, "hcl:"+p.hcl), CanReattest: true,
	}}})
}

func withPapers(t *testing.T, data string) func(*Config) {
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return func(c *Config) {
		c.Plugins = []catalog.Config{{Type: "NodeAttestor", Name: "papers", Cmd: exe, Args: []string{"plugin"}, Data: data}}
		c.RoundTimeout = 2 * time.Second
	}
}

// show attests with papers of type typ.
func (w *world) show(typ string, c claim) (*x509.Certificate, error) {
	w.t.Helper()
	payload, err := json.Marshal(c)
	if err != nil {
		w.t.Fatal(err)
	}
	stream, err := agentv1.NewAgentClient(w.dialTCP(nil)).AttestAgent(w.t.Context())
	if err != nil {
		return nil, err
	}
	err = stream.Send(&agentv1.AttestAgentRequest{Step: &agentv1.AttestAgentRequest_Params_{Params: &agentv1.AttestAgentRequest_Params{
		Data:   &types.AttestationData{Type: typ, Payload: payload},
		Params: &agentv1.AgentX509SVIDParams{Csr: newCSR(w.t, forge.P256(w.t), nil)},
	}}})
	if err != nil {
		return nil, err
	}
	for {
		resp, err := stream.Recv()
		if err != nil {
			return nil, err
		}
		if r := resp.GetResult(); r != nil {
			return x509.ParseCertificate(r.Svid.CertChain[0])
		}
		if err := stream.Send(&agentv1.AttestAgentRequest{Step: &agentv1.AttestAgentRequest_ChallengeResponse{ChallengeResponse: []byte("!")}}); err != nil {
			return nil, err
		}
	}
}

const papersID = "spiffe://" + td + "/spire/agent/papers/one"

// TestNodesOfAnExternalAttestor: they are nodes, with selectors of the
// attestor's name, beside those with a TPM; and they have no evidence.
func TestNodesOfAnExternalAttestor(t *testing.T) {
	w := newWorld(t, withPapers(t, "one"))
	w.attest(w.newTPM(), attestOptions{})
	for _, known := range []string{"no", "yes"} {
		cert, err := w.show("papers", claim{ID: papersID, Selectors: []string{"tpmnode:pcr_policy:good"}, Do: "challenge"})
		if err != nil {
			t.Fatal(err)
		}
		if got := cert.URIs[0].String(); got != papersID {
			t.Errorf("SVID of %s", got)
		}
		a, err := w.srv.store.Agent(papersID)
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, s := range a.Selectors {
			got = append(got, s.String())
		}
		slices.Sort(got)
		if want := []string{"papers:hcl:one", "papers:known:" + known, "papers:tpmnode:pcr_policy:good"}; !slices.Equal(got, want) {
			t.Errorf("selectors %q", got)
		}
		if a.Attestation != nil || a.KeyBound || a.AttestationType != "papers" || !a.CanReattest {
			t.Errorf("%+v", a)
		}
	}
	if n := w.srv.count.all()["plugin/papers/papers.seen"]; n != 2 {
		t.Errorf("counted %d", n)
	}
	// Attestors keep their callers apart: a TPM's messages prove nothing here.
	if _, err := w.show("tpmnode", claim{ID: papersID}); err == nil {
		t.Error("tpmnode took papers")
	}
}

func TestRefusesWhatAnExternalAttestorMayNotSay(t *testing.T) {
	w := newWorld(t, withPapers(t, ""))
	tpm := w.attest(w.newTPM(), attestOptions{})
	for name, c := range map[string]claim{
		"another attestor's node":  {ID: tpm.id},
		"an ID outside agents":     {ID: "spiffe://" + td + "/build"},
		"the server's ID":          {ID: "spiffe://" + td + "/spire/server"},
		"a prefix of its type":     {ID: "spiffe://" + td + "/spire/agent/papersplease/one"},
		"its type alone":           {ID: "spiffe://" + td + "/spire/agent/papers"},
		"dots":                     {ID: "spiffe://" + td + "/spire/agent/papers/../tpmnode/x"},
		"another trust domain":     {ID: "spiffe://elsewhere.org/spire/agent/papers/one"},
		"no ID":                    {},
		"a selector of two lines":  {ID: papersID, Selectors: []string{"a\nb"}},
		"an empty selector":        {ID: papersID, Selectors: []string{""}},
		"a huge selector":          {ID: papersID, Selectors: []string{strings.Repeat("x", maxNodeSelectorSize+1)}},
		"a thousand selectors":     {ID: papersID, Selectors: slices.Repeat([]string{"x"}, 1000)},
		"more than a message":      {ID: papersID, Selectors: []string{strings.Repeat("x", catalog.MaxMessage)}},
		"no verdict for very long": {ID: papersID, Do: "hang"},
	} {
		if _, err := w.show("papers", c); err == nil {
			t.Errorf("%s: attested", name)
		}
	}
	if _, err := w.srv.store.Agent(papersID); err == nil {
		t.Error("a refused node is on record")
	}
	if a, err := w.srv.store.Agent(tpm.id); err != nil || a.AttestationType != "tpmnode" || a.Attestation == nil {
		t.Errorf("the TPM's node: %+v, %v", a, err)
	}
	if _, err := w.show("nobody", claim{ID: papersID}); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("an unknown type: %v", err)
	}
}

// TestAttestorThatDiesInTheMiddle: the caller is told to try again, health says
// it, and then all is well again.
func TestAttestorThatDiesInTheMiddle(t *testing.T) {
	w := newWorld(t, withPapers(t, "kept"))
	if _, err := w.show("papers", claim{Do: "exit"}); status.Code(err) != codes.Unavailable {
		t.Errorf("got %v", err)
	}
	w.attest(w.newTPM(), attestOptions{}) // the others go on
	p := w.srv.attestors["papers"].plugin
	for changed := p.Changed(); p.Restarts() == 0; changed = p.Changed() {
		select {
		case <-changed:
		case <-time.After(100 * time.Millisecond): // it changed before we looked
		case <-t.Context().Done():
			t.Fatal("never came back")
		}
	}
	if _, err := w.show("papers", claim{ID: papersID}); err != nil {
		t.Error(err)
	}
	if a, err := w.srv.store.Agent(papersID); err != nil || !slices.ContainsFunc(a.Selectors, func(s store.Selector) bool { return s.Value == "hcl:kept" }) {
		t.Errorf("not its configuration: %+v, %v", a, err)
	}
}

func TestReloadsPlugins(t *testing.T) {
	w := newWorld(t, withPapers(t, "one"))
	next := slices.Clone(w.cfg.Plugins)
	for _, step := range []struct{ data, want string }{{"bad", "one"}, {"two", "two"}, {"bad", "two"}} {
		next[0].Data = step.data
		w.srv.ReloadPlugins(t.Context(), next)
		if _, err := w.show("papers", claim{ID: papersID}); err != nil {
			t.Fatal(err)
		}
		a, err := w.srv.store.Agent(papersID)
		if err != nil || !slices.ContainsFunc(a.Selectors, func(s store.Selector) bool { return s.Value == "hcl:"+step.want }) {
			t.Errorf("after %q: %+v, %v", step.data, a.Selectors, err)
		}
	}
}

func TestRefusesToStartWithAPlugin(t *testing.T) {
	for name, bend := range map[string]func(*Config){
		"of the built-in's name": func(c *Config) { c.Plugins[0].Name = "tpmnode" },
		"twice":                  func(c *Config) { c.Plugins = append(c.Plugins, c.Plugins[0]) },
		"of another type":        func(c *Config) { c.Plugins[0].Type = "KeyManager" },
		"that is misconfigured":  func(c *Config) { c.Plugins[0].Data = "bad" },
		"with a wrong checksum":  func(c *Config) { c.Plugins[0].Checksum = strings.Repeat("00", 32) },
	} {
		w := newWorld(t, nil)
		w.stop()
		cfg := w.cfg
		cfg.DataDir = filepath.Join(w.dir, "other")
		withPapers(t, "")(&cfg)
		bend(&cfg)
		if s, err := New(t.Context(), cfg); err == nil {
			s.Close()
			t.Errorf("%s: started", name)
		}
		if _, err := os.Stat(cfg.DataDir); err == nil {
			t.Errorf("%s: a data directory was made", name)
		}
	}
}
