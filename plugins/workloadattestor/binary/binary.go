// Package binary is the workload attestor "binary": a process is what its
// executable hashes to. docs/plugin-binary.md lists configuration and selectors.
package binary

import (
	"context"
	"fmt"
	"runtime/debug"
	"sync"

	"github.com/hashicorp/go-hclog"
	workloadattestorv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/agent/workloadattestor/v1"
	configv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/service/common/config/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/internal/measured"
	"github.com/rootlink/rootlink/internal/workload"
)

// Name is the plugin's name, and so the type of its selectors.
const Name = "binary"

// Plugin implements the WorkloadAttestor and Config services.
type Plugin struct {
	workloadattestorv1.UnimplementedWorkloadAttestorServer
	configv1.UnimplementedConfigServer

	log hclog.Logger

	mu       sync.RWMutex
	measurer *workload.Measurer // nil until configured
}

// New returns a plugin that is not configured yet.
func New() *Plugin { return &Plugin{log: hclog.NewNullLogger()} }

// SetLogger is called by the host before anything else.
func (p *Plugin) SetLogger(log hclog.Logger) { p.log = log }

// Measurer returns the measurer of the present configuration, nil before
// Configure. A host that has the plugin built in shares its cache.
func (p *Plugin) Measurer() *workload.Measurer {
	p.mu.RLock()
	defer p.mu.RUnlock()
	return p.measurer
}

// Configure replaces the configuration.
func (p *Plugin) Configure(_ context.Context, req *configv1.ConfigureRequest) (_ *configv1.ConfigureResponse, err error) {
	defer p.recovered(&err)
	opts, err := parseConfig(req.GetHclConfiguration())
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	m, err := workload.NewMeasurer(opts)
	if err != nil {
		return nil, status.Error(codes.FailedPrecondition, cli.JoinHint(err.Error(), workload.Hint(err)))
	}
	if err := m.Limitation(); err != nil {
		p.log.Warn("Only processes of this user can be attested", "reason", err.Error(), "hint", workload.Hint(err))
	}
	p.mu.Lock()
	p.measurer = m
	p.mu.Unlock()
	return &configv1.ConfigureResponse{}, nil
}

// Validate says whether Configure would accept a configuration.
func (p *Plugin) Validate(_ context.Context, req *configv1.ValidateRequest) (_ *configv1.ValidateResponse, err error) {
	defer p.recovered(&err)
	opts, err := parseConfig(req.GetHclConfiguration())
	if err == nil {
		_, err = workload.NewMeasurer(opts)
	}
	if err != nil {
		return &configv1.ValidateResponse{Notes: []string{err.Error()}}, nil
	}
	return &configv1.ValidateResponse{Valid: true}, nil
}

// Attest returns the selectors of a process, without their type. A process
// that cannot be measured is an error, never an empty answer: entries with
// selectors of other attestors would then still match it.
func (p *Plugin) Attest(ctx context.Context, req *workloadattestorv1.AttestRequest) (_ *workloadattestorv1.AttestResponse, err error) {
	defer p.recovered(&err)
	m := p.Measurer()
	if m == nil {
		return nil, status.Error(codes.FailedPrecondition, "not configured")
	}
	got, err := m.Measure(ctx, int(req.GetPid()))
	if err != nil {
		p.log.Warn("A process could not be measured", "pid", fmt.Sprint(req.GetPid()), "reason", err.Error(), "hint", workload.Hint(err))
		return nil, status.Error(measured.Code(err), err.Error())
	}
	return &workloadattestorv1.AttestResponse{SelectorValues: got.Selectors()}, nil
}

// recovered keeps a panic in one call from ending the plugin: SPIRE does not
// start a dead one again.
func (p *Plugin) recovered(err *error) {
	if r := recover(); r != nil {
		p.log.Error("Panic", "panic", fmt.Sprint(r), "stack", string(debug.Stack()))
		*err = status.Error(codes.Internal, "internal error")
	}
}
