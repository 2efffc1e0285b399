// Package catalog loads plugins and hands out clients to the services they
// offer.
//
// A built-in plugin is reached exactly as an external one would be: over gRPC,
// with the same message size limit, configured with the same HCL text. The
// code of the agent and the server therefore cannot tell the two apart, and a
// plugin that works here works under a stock SPIRE.
package catalog

import (
	"cmp"
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

	// StartTimeout bounds the start of an external plugin up to its handshake,
	// ConfigureTimeout each Configure and Validate. Zero means the default.
	StartTimeout     time.Duration
	ConfigureTimeout time.Duration

	pace pace // tests only
}

func (o *Options) startTimeout() time.Duration { return cmp.Or(o.StartTimeout, DefaultStartTimeout) }

func (o *Options) configureTimeout() time.Duration {
	return cmp.Or(o.ConfigureTimeout, DefaultConfigureTimeout)
}

// backend is one way of reaching a plugin: the in-memory pipe, or a process of
// its own. It owns the connection.
type backend interface {
	conn() grpc.ClientConnInterface
	// services lists the full names of the gRPC services that are offered.
	services() []string
	// health says whether calls can reach the plugin, how often that was mended,
	// and when to ask again; a nil channel: never.
	health() (restarts int, changed <-chan struct{}, err error)
	// restart begins anew with the last good configuration, where that is
	// possible. It does not wait.
	restart()
	// close ends calls in flight and releases the plugin.
	close() error
}

// Plugin is a loaded plugin.
type Plugin struct {
	name string
	typ  string
	core *configv1.CoreConfiguration
	b    backend

	timeout time.Duration // of Configure and Validate

	// configuring is held for a whole Configure, by reconfigure too: what a new
	// process is given must be what the last Configure left in force.
	configuring sync.Mutex
	good        *string // the HCL in force, nil before the first; guarded by configuring

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
	File    string     // whose lines Message counts, when it is not the configuration file
	Code    codes.Code // InvalidArgument: the configuration itself is wrong
	Message string
	Hint    string // may be empty
}

func (e *ConfigureError) Error() string {
	if e.File != "" {
		return fmt.Sprintf("plugin %q: configure: %s: %s", e.Plugin, e.File, e.Message)
	}
	return fmt.Sprintf("plugin %q: configure: %s", e.Plugin, e.Message)
}

// Configure gives the plugin its HCL configuration, the first or another. When
// another is refused the one before stays in force.
func (p *Plugin) Configure(ctx context.Context, hcl string) error {
	p.configuring.Lock()
	defer p.configuring.Unlock()
	err := p.configure(ctx, p.b.conn(), hcl)
	if err == nil {
		p.good = &hcl
		return nil
	}
	if e, ok := errors.AsType[*ConfigureError](err); p.good == nil || !ok {
		return err
	} else if e.Code == codes.Unavailable {
		return err // it is being started again, which gives it the one before
	}
	// What a plugin does with half of a configuration that it refuses is its
	// own: the one before is said again, and a plugin that does not take even
	// that, or that hangs, starts anew.
	if again := p.configure(context.WithoutCancel(ctx), p.b.conn(), *p.good); again != nil {
		p.b.restart()
	}
	return err
}

// ConfigureFrom is Configure with what a file of its own holds, which an error
// names; file is empty when the text is in the configuration file itself.
func (p *Plugin) ConfigureFrom(ctx context.Context, hcl, file string) error {
	err := p.Configure(ctx, hcl)
	if e, ok := errors.AsType[*ConfigureError](err); ok {
		e.File = file
	}
	return err
}

// reconfigure gives a process that was started again what was in force.
func (p *Plugin) reconfigure(ctx context.Context, conn grpc.ClientConnInterface) error {
	p.configuring.Lock()
	defer p.configuring.Unlock()
	if p.good == nil {
		return nil
	}
	return p.configure(ctx, conn, *p.good)
}

func (p *Plugin) configure(ctx context.Context, conn grpc.ClientConnInterface, hcl string) error {
	c := new(configv1.ConfigServiceClient)
	if !slices.Contains(p.b.services(), c.GRPCServiceName()) {
		if hcl == "" {
			return nil
		}
		return fmt.Errorf("plugin %q: %w", p.name, ErrNotConfigurable)
	}
	c.InitClient(conn)
	ctx, cancel := context.WithTimeout(ctx, p.timeout)
	defer cancel()
	_, err := c.Configure(ctx, &configv1.ConfigureRequest{CoreConfiguration: p.core, HclConfiguration: hcl})
	if err != nil {
		return refusal(p.name, status.Code(err), message(err))
	}
	return nil
}

// Health says whether calls reach the plugin; an error is a *DownError. A
// built-in plugin is always well.
func (p *Plugin) Health() error {
	_, _, err := p.b.health()
	return err
}

// Restarts counts how often an external plugin was started again.
func (p *Plugin) Restarts() int {
	n, _, _ := p.b.health()
	return n
}

// Changed returns a channel that closes when Health changes; nil when it never
// does.
func (p *Plugin) Changed() <-chan struct{} {
	_, c, _ := p.b.health()
	return c
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
	ctx, cancel := context.WithTimeout(ctx, p.timeout)
	defer cancel()
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
