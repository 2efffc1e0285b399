// Package bundles is the BundlePublisher rootlink_bundles for a stock SPIRE
// server: it keeps every authority that SPIRE publishes, and writes the signed
// trust.json by which links are verified when SPIRE has long forgotten them.
// The work is internal/keeper's.
package bundles

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/hcl"
	"github.com/hashicorp/hcl/hcl/token"
	"github.com/spiffe/spire-plugin-sdk/pluginsdk"
	publisherv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/server/bundlepublisher/v1"
	configv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/service/common/config/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/internal/hclkeys"
	"github.com/rootlink/rootlink/internal/keeper"
	"github.com/rootlink/rootlink/plugins/tpmnode/hostside"
)

// PluginName is the plugin's name in SPIRE's configuration.
const PluginName = "rootlink_bundles"

var errConfig = errors.New("configuration")

// config is plugin_data as an operator writes it (docs/keeper.md).
type config struct {
	DataDir           string   `hcl:"data_dir"`
	TrustFile         string   `hcl:"trust_file"`
	SigstoreFile      string   `hcl:"sigstore_file"`
	TrustKey          any      `hcl:"trust_key"`
	Unsigned          bool     `hcl:"unsigned"`
	TrustKeyPublic    any      `hcl:"trust_key_public"`
	AttestationCAs    any      `hcl:"attestation_ca_certs"`
	EKRoots           any      `hcl:"ek_roots"`
	EKAllow           string   `hcl:"ek_allow"`
	EKDeny            string   `hcl:"ek_deny"`
	EKInventory       any      `hcl:"ek_inventory"`
	PCRPolicies       string   `hcl:"pcr_policies"`
	TSAChains         any      `hcl:"tsa_chains"`
	AuthoritiesNeeded int      `hcl:"authorities_needed"`
	Requirements      string   `hcl:"requirements"`
	LayoutKeys        any      `hcl:"layout_keys"`
	Revocations       string   `hcl:"revocations"`
	Operator          string   `hcl:"operator"`
	Lifetime          string   `hcl:"lifetime"`
	Forget            []string `hcl:"forget"`

	Unused map[string][]token.Pos `hcl:",unusedKeyPositions"`
}

// Options are what a host that embeds the plugin, or a test, provides.
type Options struct {
	Now func() time.Time // default time.Now
}

// Plugin implements SPIRE's BundlePublisher and Config services.
type Plugin struct {
	publisherv1.UnimplementedBundlePublisherServer
	configv1.UnimplementedConfigServer

	opts Options
	log  hclog.Logger // set once, before the first call

	mu     sync.Mutex
	keeper *keeper.Keeper // guarded by mu; nil before Configure
	stop   func()         // guarded by mu; ends keeper's Run
}

// New returns a plugin that has still to be configured.
func New(o Options) *Plugin { return &Plugin{opts: o, log: hclog.NewNullLogger(), stop: func() {}} }

// Servers returns the services that the plugin registers.
func (p *Plugin) Servers() (pluginsdk.PluginServer, []pluginsdk.ServiceServer) {
	return publisherv1.BundlePublisherPluginServer(p), []pluginsdk.ServiceServer{configv1.ConfigServiceServer(p)}
}

// SetLogger implements pluginsdk.NeedsLogger.
func (p *Plugin) SetLogger(l hclog.Logger) { p.log = l }

// Close stops looking at files.
func (p *Plugin) Close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.stop()
	p.stop = func() {}
	return nil
}

// Configure implements the Config service. An earlier configuration stays in
// force when it fails.
func (p *Plugin) Configure(_ context.Context, r *configv1.ConfigureRequest) (*configv1.ConfigureResponse, error) {
	k, err := p.load(r.GetCoreConfiguration(), r.GetHclConfiguration())
	if err == nil {
		err = k.Open()
	}
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, cli.JoinHint(err.Error(), cli.HintOf(err)))
	}
	// Ends with the plugin, not with this call.
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	p.mu.Lock()
	defer p.mu.Unlock()
	p.stop()
	p.keeper, p.stop = k, func() { cancel(); <-done }
	go func() {
		defer close(done)
		k.Run(ctx)
	}()
	p.log.Info("configured", "trust_domain", r.GetCoreConfiguration().GetTrustDomain())
	return &configv1.ConfigureResponse{}, nil
}

// Validate implements the Config service. It writes nothing.
func (p *Plugin) Validate(_ context.Context, r *configv1.ValidateRequest) (*configv1.ValidateResponse, error) {
	if _, err := p.load(r.GetCoreConfiguration(), r.GetHclConfiguration()); err != nil {
		return &configv1.ValidateResponse{Notes: []string{cli.JoinHint(err.Error(), cli.HintOf(err))}}, nil
	}
	return &configv1.ValidateResponse{Valid: true}, nil
}

func (p *Plugin) load(core *configv1.CoreConfiguration, text string) (*keeper.Keeper, error) {
	var c config
	if err := hcl.Decode(&c, text); err != nil {
		return nil, fmt.Errorf("%w: %w", errConfig, err)
	}
	if err := hclkeys.Unknown(c.Unused); err != nil {
		return nil, fmt.Errorf("%w: %w", errConfig, err)
	}
	out := keeper.Config{
		TrustDomain: core.GetTrustDomain(), DataDir: c.DataDir, TrustFile: c.TrustFile, SigstoreFile: c.SigstoreFile,
		Unsigned: c.Unsigned, EKAllow: c.EKAllow, EKDeny: c.EKDeny, PCRPolicies: c.PCRPolicies,
		Requirements: c.Requirements, Revocations: c.Revocations, Operator: c.Operator,
		AuthoritiesNeeded: c.AuthoritiesNeeded, Forget: c.Forget, Now: p.opts.Now, Log: hostside.Logger(p.log),
	}
	for _, l := range []struct {
		key string
		in  any
		out *[]string
	}{
		{"trust_key", c.TrustKey, &out.TrustKeys},
		{"trust_key_public", c.TrustKeyPublic, &out.TrustKeysPublic},
		{"attestation_ca_certs", c.AttestationCAs, &out.AttestationCAs},
		{"ek_roots", c.EKRoots, &out.EKRoots},
		{"ek_inventory", c.EKInventory, &out.EKInventory},
		{"tsa_chains", c.TSAChains, &out.TSAChains},
		{"layout_keys", c.LayoutKeys, &out.LayoutKeys},
	} {
		var err error
		if *l.out, err = hostside.StringList(l.key, l.in); err != nil {
			return nil, fmt.Errorf("%w: %w", errConfig, err)
		}
	}
	if c.Lifetime != "" {
		var d cli.Duration
		if err := d.Set(c.Lifetime); err != nil {
			return nil, fmt.Errorf("%w: lifetime: %w", errConfig, err)
		}
		out.Lifetime = time.Duration(d)
	}
	return keeper.New(out)
}

// PublishBundle implements the BundlePublisher service.
func (p *Plugin) PublishBundle(_ context.Context, r *publisherv1.PublishBundleRequest) (*publisherv1.PublishBundleResponse, error) {
	p.mu.Lock()
	k := p.keeper
	p.mu.Unlock()
	if k == nil {
		return nil, status.Error(codes.FailedPrecondition, "plugin is not configured")
	}
	if r.GetBundle() == nil {
		return nil, status.Error(codes.InvalidArgument, "no bundle")
	}
	b := keeper.Bundle{TrustDomain: r.Bundle.TrustDomain, Sequence: r.Bundle.SequenceNumber}
	for _, a := range r.Bundle.X509Authorities {
		b.Authorities = append(b.Authorities, keeper.Authority{Certificate: a.GetAsn1(), Tainted: a.GetTainted()})
	}
	if err := k.Publish(b); err != nil {
		code := codes.Internal
		switch {
		case errors.Is(err, keeper.ErrBundle):
			code = codes.InvalidArgument
		case errors.Is(err, keeper.ErrKey), errors.Is(err, keeper.ErrForeign), errors.Is(err, keeper.ErrDamaged), errors.Is(err, keeper.ErrPolicy):
			code = codes.FailedPrecondition
		}
		return nil, status.Error(code, cli.JoinHint(err.Error(), cli.HintOf(err)))
	}
	return &publisherv1.PublishBundleResponse{}, nil
}
