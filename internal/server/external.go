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
	bundlepublisherv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/server/bundlepublisher/v1"
	nodeattestorv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/server/nodeattestor/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/rootlink/rootlink/internal/catalog"
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
	data    string // of an external one, as it was given last; only ReloadPlugins uses it
}

// loadExternal starts the plugins of the configuration.
func (s *Server) loadExternal(ctx context.Context) error {
	for _, c := range s.cfg.Plugins {
		builtIn := len(s.cfg.EKRoots) != 0 || s.cfg.EKAllow != ""
		switch {
		case c.Type != nodeAttestorType && c.Type != bundlePublisherType:
			return fmt.Errorf("%w: %s %q: this server loads NodeAttestor and BundlePublisher plugins", catalog.ErrConfig, c.Type, c.Name)
		case c.Type == bundlePublisherType && s.publishers[c.Name] != nil:
			return fmt.Errorf("%w: two bundle publishers %q", catalog.ErrConfig, c.Name)
		case c.Type == nodeAttestorType && (s.attestors[c.Name] != nil || c.Name == wire.PluginName && builtIn):
			return fmt.Errorf("%w: two node attestors of type %q", catalog.ErrConfig, c.Name)
		}
		p, err := catalog.Load(ctx, c, catalog.Options{
			TrustDomain: s.cfg.TrustDomain, Log: s.cfg.Log, HostServices: s.hostServices(c.Name),
		})
		if err != nil {
			return err
		}
		if c.Type == bundlePublisherType {
			pub := &publisher{plugin: p, client: new(bundlepublisherv1.BundlePublisherPluginClient), data: c.Data}
			s.publishers[c.Name] = pub // closed with the server from here on
			if err := p.Bind(pub.client); err != nil {
				return err
			}
			continue
		}
		a := &attestor{plugin: p, data: c.Data}
		s.attestors[c.Name] = a // closed with the server from here on
		if a.client, err = p.ServerNodeAttestor(); err != nil {
			return err
		}
		s.cfg.Log.Info("agents of this node attestor are nodes without a TPM's evidence", "plugin", c.Name)
	}
	return nil
}

// ReloadPlugins gives each external plugin its data of next where that changed.
// What is refused is logged and leaves in force what was. One call at a time.
func (s *Server) ReloadPlugins(ctx context.Context, next []catalog.Config) {
	seen := 0
	for _, c := range next {
		var p *catalog.Plugin
		var data *string
		if a := s.attestors[c.Name]; c.Type == nodeAttestorType && a != nil && !a.builtIn {
			p, data = a.plugin, &a.data
		} else if b := s.publishers[c.Name]; c.Type == bundlePublisherType && b != nil {
			p, data = b.plugin, &b.data
		} else {
			s.cfg.Log.Warn("this plugin is loaded when the server is started again", "plugin", c.Name)
			continue
		}
		seen++
		if c.Data == *data {
			continue
		}
		if err := p.ConfigureFrom(ctx, c.Data, c.DataFile); err != nil {
			s.cfg.Log.Error("new plugin_data not taken; the plugin keeps what it has", "plugin", c.Name, "error", err, "hint", catalog.Hint(err))
			continue
		}
		*data = c.Data
		s.cfg.Log.Info("new plugin_data taken", "plugin", c.Name)
	}
	if seen < len(s.cfg.Plugins) {
		s.cfg.Log.Warn("a plugin that is gone from the configuration file runs until the server is started again")
	}
}

func (s *Server) attestationTypes() []string { return slices.Sorted(maps.Keys(s.attestors)) }

func (s *Server) pluginHealth() error {
	var errs []error
	for _, a := range s.attestors {
		errs = append(errs, a.plugin.Health())
	}
	for _, p := range s.publishers {
		errs = append(errs, p.plugin.Health())
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
