// Package catalog loads plugins and hands out clients to the services they
// offer.
//
// A built-in plugin is reached exactly as an external one would be: over gRPC,
// with the same message size limit, configured with the same HCL text. The
// code of the agent and the server therefore cannot tell the two apart, and a
// plugin that works here works under a stock SPIRE.
package catalog

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/spiffe/spire-plugin-sdk/pluginsdk"
	agentnodev1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/agent/nodeattestor/v1"
	workloadv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/agent/workloadattestor/v1"
	servernodev1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/server/nodeattestor/v1"
	configv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/service/common/config/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/rootlink/rootlink/internal/cli"
)

// MaxMessage is the largest message in bytes that either end of a plugin
// connection accepts: gRPC's default, which external plugins live with.
const MaxMessage = 4 << 20

// drainTimeout is how long Close waits for calls in flight before it cancels
// them, and then again for their handlers to return.
const drainTimeout = 5 * time.Second

// Errors that callers branch on.
var (
	// ErrNoService means that the plugin does not offer the wanted service.
	ErrNoService = errors.New("plugin does not offer the service")
	// ErrNotConfigurable means that a plugin without a Config service was
	// given configuration, which would have been ignored in silence.
	ErrNotConfigurable = errors.New("plugin takes no configuration")
)

// InvalidConfigError is Validate's verdict on a configuration.
type InvalidConfigError struct {
	Plugin string
	Notes  []string
}

func (e *InvalidConfigError) Error() string {
	return fmt.Sprintf("plugin %q: configuration is not valid: %q", e.Plugin, e.Notes)
}

// Refusal is e as Configure would have said it: a plugin's last note is why.
func (e *InvalidConfigError) Refusal() *ConfigureError {
	text := "the plugin does not say why"
	if n := len(e.Notes); n > 0 {
		text = e.Notes[n-1]
	}
	return refusal(e.Plugin, codes.InvalidArgument, text)
}

// Options are what a host gives every plugin it loads.
type Options struct {
	// TrustDomain is the name in the core configuration, without a scheme.
	TrustDomain string
	// Log receives what plugins log; each line carries the plugin's name.
	Log *slog.Logger
	// HostServices are offered to plugins that ask for them.
	HostServices []pluginsdk.ServiceServer
}

// backend is one way of reaching a plugin: today the in-memory pipe. It owns
// the connection.
type backend interface {
	conn() grpc.ClientConnInterface
	// services lists the full names of the gRPC services that are offered.
	services() []string
	// close ends calls in flight and releases the plugin.
	close() error
}

// Plugin is a loaded plugin.
type Plugin struct {
	name string
	typ  string
	core *configv1.CoreConfiguration
	b    backend

	closeOnce sync.Once
	closeErr  error
}

// Name returns the configured name, which is the selector type of an attestor.
func (p *Plugin) Name() string { return p.name }

// Type returns the SDK's plugin type, "NodeAttestor" for example.
func (p *Plugin) Type() string { return p.typ }

// Services returns the full names of the gRPC services the plugin offers.
func (p *Plugin) Services() []string { return slices.Clone(p.b.services()) }

// Bind initialises c, a client type of the SDK or one of ours, on the plugin's
// connection. It fails with ErrNoService when the plugin does not offer it.
func (p *Plugin) Bind(c pluginsdk.ServiceClient) error {
	if !slices.Contains(p.b.services(), c.GRPCServiceName()) {
		return fmt.Errorf("plugin %q: %s: %w", p.name, c.GRPCServiceName(), ErrNoService)
	}
	c.InitClient(p.b.conn())
	return nil
}

// AgentNodeAttestor returns the agent side of a node attestor.
func (p *Plugin) AgentNodeAttestor() (agentnodev1.NodeAttestorClient, error) {
	c := new(agentnodev1.NodeAttestorPluginClient)
	if err := p.Bind(c); err != nil {
		return nil, err
	}
	return c.NodeAttestorClient, nil
}

// ServerNodeAttestor returns the server side of a node attestor.
func (p *Plugin) ServerNodeAttestor() (servernodev1.NodeAttestorClient, error) {
	c := new(servernodev1.NodeAttestorPluginClient)
	if err := p.Bind(c); err != nil {
		return nil, err
	}
	return c.NodeAttestorClient, nil
}

// WorkloadAttestor returns a workload attestor.
func (p *Plugin) WorkloadAttestor() (workloadv1.WorkloadAttestorClient, error) {
	c := new(workloadv1.WorkloadAttestorPluginClient)
	if err := p.Bind(c); err != nil {
		return nil, err
	}
	return c.WorkloadAttestorClient, nil
}

// ConfigureError is a plugin's refusal of its configuration. Text is all that
// the plugin interface carries, so the hint comes at the end of it.
type ConfigureError struct {
	Plugin  string
	Code    codes.Code // InvalidArgument: the configuration itself is wrong
	Message string
	Hint    string // may be empty
}

func (e *ConfigureError) Error() string {
	return fmt.Sprintf("plugin %q: configure: %s", e.Plugin, e.Message)
}

// Configure gives the plugin its HCL configuration.
func (p *Plugin) Configure(ctx context.Context, hcl string) error {
	c := new(configv1.ConfigServiceClient)
	if err := p.Bind(c); err != nil {
		if hcl == "" {
			return nil
		}
		return fmt.Errorf("plugin %q: %w", p.name, ErrNotConfigurable)
	}
	_, err := c.Configure(ctx, &configv1.ConfigureRequest{CoreConfiguration: p.core, HclConfiguration: hcl})
	if err != nil {
		return refusal(p.name, status.Code(err), message(err))
	}
	return nil
}

func refusal(plugin string, code codes.Code, text string) *ConfigureError {
	msg, hint := cli.CutHint(text)
	return &ConfigureError{Plugin: plugin, Code: code, Message: msg, Hint: hint}
}

// Validate asks whether the plugin could use a configuration, and returns its
// notes. A refusal is an *InvalidConfigError.
func (p *Plugin) Validate(ctx context.Context, hcl string) ([]string, error) {
	c := new(configv1.ConfigServiceClient)
	if err := p.Bind(c); err != nil {
		if hcl == "" {
			return nil, nil
		}
		return nil, fmt.Errorf("plugin %q: %w", p.name, ErrNotConfigurable)
	}
	resp, err := c.Validate(ctx, &configv1.ValidateRequest{CoreConfiguration: p.core, HclConfiguration: hcl})
	switch {
	case err != nil && status.Code(err) == codes.Unimplemented:
		return nil, fmt.Errorf("plugin %q: validate: %w", p.name, ErrNoService)
	case err != nil:
		return nil, fmt.Errorf("plugin %q: validate: %s", p.name, message(err))
	case !resp.Valid:
		return resp.Notes, &InvalidConfigError{Plugin: p.name, Notes: resp.Notes}
	}
	return resp.Notes, nil
}

// Close waits for calls in flight, cancels those that do not end in time, and
// then releases the plugin. It is safe to call more than once.
func (p *Plugin) Close() error {
	p.closeOnce.Do(func() { p.closeErr = p.b.close() })
	return p.closeErr
}

// message is a gRPC error without the "rpc error: code = …" that means nothing
// to the operator who reads it.
func message(err error) string {
	if st, ok := status.FromError(err); ok {
		return st.Message()
	}
	return err.Error()
}
