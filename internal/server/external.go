package server

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"unicode"
	"unicode/utf8"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/spire-plugin-sdk/pluginsdk"
	agentstorev1 "github.com/spiffe/spire-plugin-sdk/proto/spire/hostservice/server/agentstore/v1"
	identityproviderv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/hostservice/server/identityprovider/v1"
	composerv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/server/credentialcomposer/v1"
	nodeattestorv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/server/nodeattestor/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/rootlink/rootlink/internal/catalog"
	"github.com/rootlink/rootlink/internal/server/compose"
	"github.com/rootlink/rootlink/internal/store"
	"github.com/rootlink/rootlink/plugins/tpmnode/wire"
)

const (
	nodeAttestorType = "NodeAttestor"

	maxNodeSelectors    = 512  // that an external attestor may give a node
	maxNodeSelectorSize = 1024 // bytes of each
	maxPluginMetrics    = 256  // different keys that one plugin may count
)

// errSlowAttestor is what ends an attestation whose plugin does not answer.
var errSlowAttestor = errors.New("the node attestor did not answer in time")

// attestor is a node attestor.
type attestor struct {
	plugin  *catalog.Plugin
	client  nodeattestorv1.NodeAttestorClient
	builtIn bool
}

// external is a plugin of the configuration.
type external struct {
	plugin *catalog.Plugin
	data   string // as it was given last; only ReloadPlugins uses it
}

// checkExternal refuses what this server loads no plugins for.
func checkExternal(c *settings) error {
	seen := make(map[[2]string]bool)
	for _, p := range c.Plugins {
		switch p.Type {
		case nodeAttestorType, bundlePublisherType, notifierType, composerType:
		default:
			return fmt.Errorf("%w: %s %q: this server loads NodeAttestor, BundlePublisher, Notifier and CredentialComposer plugins", catalog.ErrConfig, p.Type, p.Name)
		}
		builtIn := p.Type == nodeAttestorType && p.Name == wire.PluginName && (len(c.EKRoots) != 0 || c.EKAllow != "")
		id := [2]string{p.Type, p.Name}
		if seen[id] || builtIn {
			return fmt.Errorf("%w: two plugins %s %q", catalog.ErrConfig, p.Type, p.Name)
		}
		seen[id] = true
	}
	return nil
}

// loadExternal starts the plugins of the configuration.
func (s *Server) loadExternal(ctx context.Context) error {
	if err := checkExternal(s.cfg); err != nil {
		return err
	}
	for _, c := range s.cfg.Plugins {
		p, err := catalog.Load(ctx, c, catalog.Options{
			TrustDomain: s.cfg.TrustDomain, Log: s.cfg.Log, HostServices: s.hostServices(c.Name),
		})
		if err != nil {
			return err
		}
		s.external = append(s.external, &external{p, c.Data}) // closed with the server from here on
		switch c.Type {
		case nodeAttestorType:
			a := &attestor{plugin: p}
			if a.client, err = p.ServerNodeAttestor(); err == nil {
				s.attestors[c.Name] = a
				s.cfg.Log.Info("agents of this node attestor are nodes without a TPM's evidence", "plugin", c.Name)
			}
		case bundlePublisherType:
			err = s.addPublisher(p)
		case notifierType:
			err = s.addNotifier(p)
		case composerType:
			client := new(composerv1.CredentialComposerPluginClient)
			if err = p.Bind(client); err == nil {
				s.composers = append(s.composers, compose.Composer{Name: c.Name, Client: client})
			}
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// ReloadPlugins gives each external plugin its data of next where that changed.
// What is refused is logged and leaves in force what was. One call at a time.
func (s *Server) ReloadPlugins(ctx context.Context, next []catalog.Config) {
	seen := 0
	for _, c := range next {
		i := slices.IndexFunc(s.external, func(x *external) bool { return x.plugin.Type() == c.Type && x.plugin.Name() == c.Name })
		if i < 0 {
			s.cfg.Log.Warn("this plugin is loaded when the server is started again", "plugin", c.Name)
			continue
		}
		seen++
		x := s.external[i]
		if c.Data == x.data {
			continue
		}
		if err := x.plugin.ConfigureFrom(ctx, c.Data, c.DataFile); err != nil {
			s.cfg.Log.Error("new plugin_data not taken; the plugin keeps what it has", "plugin", c.Name, "error", err, "hint", catalog.Hint(err))
			continue
		}
		x.data = c.Data
		s.cfg.Log.Info("new plugin_data taken", "plugin", c.Name)
	}
	if seen < len(s.external) {
		s.cfg.Log.Warn("a plugin that is gone from the configuration file runs until the server is started again")
	}
}

func (s *Server) attestationTypes() []string { return slices.Sorted(maps.Keys(s.attestors)) }

func (s *Server) pluginHealth() error {
	var errs []error
	for _, x := range s.external {
		errs = append(errs, x.plugin.Health())
	}
	return errors.Join(errs...)
}

// attestedID checks what an attestor of type typ concluded. It names nodes of
// its own type only: else any attestor could make its callers nodes of another,
// whose aliases and entries they would then have.
func (s *Server) attestedID(typ string, attrs *nodeattestorv1.AgentAttributes) (spiffeid.ID, error) {
	id, err := spiffeid.FromString(attrs.GetSpiffeId())
	if err != nil {
		return id, fmt.Errorf("agent ID %.200q: %w", attrs.GetSpiffeId(), err)
	}
	if prefix := "/spire/agent/" + typ + "/"; id.TrustDomain() != s.cfg.td || !strings.HasPrefix(id.Path(), prefix) || len(id.Path()) == len(prefix) {
		return id, fmt.Errorf("agent ID %.200q is not under spiffe://%s%s", id, s.cfg.TrustDomain, prefix)
	}
	if n := len(attrs.SelectorValues); n > maxNodeSelectors {
		return id, fmt.Errorf("%d selectors", n)
	}
	for _, v := range attrs.SelectorValues {
		if v == "" || len(v) > maxNodeSelectorSize || !utf8.ValidString(v) || strings.ContainsFunc(v, unicode.IsControl) {
			return id, fmt.Errorf("malformed selector %.64q", v)
		}
	}
	return id, nil
}

// hostServices are what plugins may ask of the server.
func (s *Server) hostServices(plugin string) []pluginsdk.ServiceServer {
	h := &hostService{s: s}
	return []pluginsdk.ServiceServer{
		identityproviderv1.IdentityProviderServiceServer(h),
		agentstorev1.AgentStoreServiceServer(h),
		catalog.Metrics(s.pluginCounter(plugin)),
	}
}

// pluginCounter bounds the names that a plugin can make us remember.
func (s *Server) pluginCounter(plugin string) func(string) {
	var mu sync.Mutex
	known := make(map[string]bool)
	return func(key string) {
		mu.Lock()
		defer mu.Unlock()
		if !known[key] && len(known) == maxPluginMetrics {
			key = "other"
		}
		known[key] = true
		s.count.add("plugin/" + plugin + "/" + key)
	}
}

type hostService struct {
	identityproviderv1.UnimplementedIdentityProviderServer
	agentstorev1.UnimplementedAgentStoreServer
	s *Server
}

var errNotReady = status.Error(codes.Unavailable, "the server is not up")

// FetchX509Identity hands a plugin the server's own SVID with its key, as SPIRE
// does: a plugin runs as the server's user and could read the key files as well.
func (h *hostService) FetchX509Identity(context.Context, *identityproviderv1.FetchX509IdentityRequest) (*identityproviderv1.FetchX509IdentityResponse, error) {
	if !h.s.ready.Load() {
		return nil, errNotReady
	}
	own := h.s.authorities.own.Load()
	if own == nil {
		return nil, errNotReady
	}
	key, err := x509.MarshalPKCS8PrivateKey(own.PrivateKey)
	if err != nil {
		return nil, h.s.internal("identity for a plugin", err)
	}
	b, err := h.s.pluginBundle()
	if err != nil {
		return nil, h.s.internal("bundle for a plugin", err)
	}
	return &identityproviderv1.FetchX509IdentityResponse{
		Identity: &identityproviderv1.X509Identity{CertChain: own.Certificate, PrivateKey: key}, Bundle: b,
	}, nil
}

// GetAgentInfo tells whether a node has attested: what attestors ask that trust
// the first to come.
func (h *hostService) GetAgentInfo(_ context.Context, req *agentstorev1.GetAgentInfoRequest) (*agentstorev1.GetAgentInfoResponse, error) {
	if !h.s.ready.Load() {
		return nil, errNotReady
	}
	a, err := h.s.store.Agent(req.GetAgentId())
	switch {
	case errors.Is(err, store.ErrNotFound):
		return nil, status.Error(codes.NotFound, "no such agent")
	case err != nil:
		return nil, h.s.internal("agent for a plugin", err)
	}
	return &agentstorev1.GetAgentInfoResponse{Info: &agentstorev1.AgentInfo{AgentId: a.ID}}, nil
}
