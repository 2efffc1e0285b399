// Package nodeagent is the agent side of node attestation type "tpmnode": a
// NodeAttestor plugin of SPIRE's plugin SDK, and the Quoter that makes the TPM
// vouch for workload keys. Our agent runs it built in, a stock SPIRE agent as
// the external plugin "rootlink-tpmnode agent".
package nodeagent

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/spire-plugin-sdk/pluginsdk"
	nodeattestorv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/agent/nodeattestor/v1"
	configv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/service/common/config/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/internal/tpm"
	"github.com/rootlink/rootlink/plugins/tpmnode/hostside"
	"github.com/rootlink/rootlink/plugins/tpmnode/wire"
	tpmv1 "github.com/rootlink/rootlink/proto/rootlink/tpm/v1"
)

// roundTimeout bounds one round of attestation. SPIRE holds a lock while it
// re-attests and sets no deadline of its own.
const roundTimeout = 90 * time.Second

// Plugin serves NodeAttestor, Config and Quoter.
type Plugin struct {
	nodeattestorv1.UnimplementedNodeAttestorServer
	configv1.UnimplementedConfigServer
	tpmv1.UnimplementedQuoterServer

	quoteLatency time.Duration
	maxBatch     int
	now          func() time.Time

	log     hclog.Logger
	builtIn bool // in our agent, whose own socket gives evidence

	configuring sync.Mutex // held by Configure and Close
	voucher     *voucher   // guarded by configuring; nil without quoter_socket

	mu   sync.RWMutex // guards node
	node *node        // nil before Configure and after Close
}

// node is what one configuration opened. It is never changed, only replaced.
type node struct {
	*config
	dev *tpm.Device
	q   *quoter
}

// Option changes how New makes a plugin.
type Option func(*Plugin)

// WithQuoteLatency adds to every quote, to measure on a software TPM how the
// rest behaves with a slow one.
func WithQuoteLatency(d time.Duration) Option { return func(p *Plugin) { p.quoteLatency = d } }

// WithMaxBatch bounds how many leaves share a quote; 1 turns batching off, to
// measure what it is worth.
func WithMaxBatch(n int) Option { return func(p *Plugin) { p.maxBatch = n } }

// WithClock replaces the clock that AK certificates expire by.
func WithClock(now func() time.Time) Option { return func(p *Plugin) { p.now = now } }

// New returns a plugin that waits to be configured.
func New(opts ...Option) *Plugin {
	p := &Plugin{now: time.Now, log: hclog.NewNullLogger()}
	for _, o := range opts {
		o(p)
	}
	return p
}

var _ pluginsdk.NeedsLogger = (*Plugin)(nil)

// SetLogger is called by the host.
func (p *Plugin) SetLogger(l hclog.Logger) { p.log = l }

// Servers returns what our agent loads: the plugin, its configuration and the
// Quoter.
func (p *Plugin) Servers() (pluginsdk.PluginServer, []pluginsdk.ServiceServer) {
	p.builtIn = true
	plugin, services := p.ExternalServers()
	return plugin, append(services, wire.QuoterService(p))
}

// ExternalServers returns what an external plugin serves to a stock SPIRE. The
// Quoter is for our agent, which measures what it asks quotes for.
func (p *Plugin) ExternalServers() (pluginsdk.PluginServer, []pluginsdk.ServiceServer) {
	return nodeattestorv1.NodeAttestorPluginServer(p), []pluginsdk.ServiceServer{configv1.ConfigServiceServer(p)}
}

// Configure checks the configuration, the device's permissions and the data
// directory. It does not need the TPM to answer.
func (p *Plugin) Configure(_ context.Context, req *configv1.ConfigureRequest) (_ *configv1.ConfigureResponse, err error) {
	defer p.recover("Configure", &err)
	c, err := p.parse(req.GetCoreConfiguration().GetTrustDomain(), req.GetHclConfiguration())
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, cli.JoinHint(err.Error(), cli.HintOf(err)))
	}
	p.configuring.Lock()
	defer p.configuring.Unlock()
	// First: a socket that cannot be had leaves everything as it was.
	next, err := p.voucher.prepare(c, p.log)
	if err != nil {
		return nil, status.Error(codes.FailedPrecondition, cli.JoinHint(err.Error(), cli.HintOf(err)))
	}
	if err := p.open(c); err != nil {
		next.abandon()
		return nil, err
	}
	p.voucher = p.voucher.replace(next, p)
	return &configv1.ConfigureResponse{}, nil
}

// open replaces the node by that of c.
func (p *Plugin) open(c *config) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	// The old device holds the data directory that the new one may want.
	p.closeNode()
	c.device.Log = hostside.Logger(p.log)
	c.device.QuoteLatency = p.quoteLatency
	dev, err := tpm.Open(c.device)
	if err != nil {
		return deviceStatus("open the TPM", err)
	}
	p.node = &node{config: c, dev: dev}
	p.node.q = newQuoter(p.node, p.maxBatch, p.now)
	return nil
}

func (p *Plugin) parse(trustDomain, hcl string) (*config, error) {
	c, err := parseConfig(trustDomain, hcl, hostside.Logger(p.log))
	if err == nil && c.voucher != nil && p.builtIn {
		return nil, errors.New("quoter_socket is for a stock SPIRE agent: this agent's own socket gives evidence")
	}
	return c, err
}

// Validate checks a configuration without touching the device.
func (p *Plugin) Validate(_ context.Context, req *configv1.ValidateRequest) (_ *configv1.ValidateResponse, err error) {
	defer p.recover("Validate", &err)
	if _, err := p.parse(req.GetCoreConfiguration().GetTrustDomain(), req.GetHclConfiguration()); err != nil {
		return &configv1.ValidateResponse{Valid: false, Notes: []string{cli.JoinHint(err.Error(), cli.HintOf(err))}}, nil
	}
	return &configv1.ValidateResponse{Valid: true}, nil
}

// Close releases the TPM and the data directory, and removes the socket.
func (p *Plugin) Close() error {
	p.configuring.Lock()
	defer p.configuring.Unlock()
	p.voucher = p.voucher.replace(nil, p)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closeNode()
	return nil
}

// closeNode is called with p.mu held.
func (p *Plugin) closeNode() {
	if p.node == nil {
		return
	}
	p.node.q.close()
	p.node.dev.Close()
	p.node = nil
}

func (p *Plugin) configured() (*node, error) {
	p.mu.RLock()
	defer p.mu.RUnlock()
	if p.node == nil {
		return nil, status.Error(codes.FailedPrecondition, "not configured")
	}
	return p.node, nil
}

// recover keeps a panic from ending an external plugin, which SPIRE would not
// start again.
func (p *Plugin) recover(what string, err *error) {
	if r := recover(); r != nil {
		p.log.Error("panic", "in", what, "panic", fmt.Sprint(r), "stack", string(debug.Stack()))
		*err = status.Errorf(codes.Internal, "internal error in %s", what)
	}
}

// deviceStatus is the one place where errors of internal/tpm become gRPC
// statuses. Unavailable is what callers try again.
func deviceStatus(what string, err error) error {
	if err == nil {
		return nil
	}
	code := codes.Internal
	switch {
	case errors.Is(err, context.Canceled):
		code = codes.Canceled
	case errors.Is(err, tpm.ErrUnreachable), errors.Is(err, tpm.ErrPCRsChanging), errors.Is(err, context.DeadlineExceeded), errors.Is(err, tpm.ErrClosed):
		code = codes.Unavailable
	case errors.Is(err, tpm.ErrAddress), errors.Is(err, tpm.ErrBankDisabled):
		code = codes.InvalidArgument
	case tpm.Hint(err) != "", errors.Is(err, tpm.ErrTPMChanged), errors.Is(err, tpm.ErrNoAKCertificate):
		code = codes.FailedPrecondition
	case errors.Is(err, tpm.ErrCredential):
		// Not PermissionDenied, on which a SPIRE agent gives up for good.
		code = codes.Aborted
	}
	return status.Error(code, cli.JoinHint(fmt.Sprintf("%s: %v", what, err), tpm.Hint(err)))
}
