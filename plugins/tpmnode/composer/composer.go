// Package composer is the CredentialComposer rootlink_composer for a stock SPIRE
// server: it adds the extended key usage codeSigning to the X509-SVIDs of
// workloads that sign, since verifiers of signatures ask for it and SPIRE gives
// serverAuth and clientAuth alone. Nothing else is touched.
package composer

import (
	"context"
	"encoding/asn1"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/hcl"
	"github.com/hashicorp/hcl/hcl/token"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/spire-plugin-sdk/pluginsdk"
	composerv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/server/credentialcomposer/v1"
	configv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/service/common/config/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/internal/hclkeys"
	"github.com/rootlink/rootlink/pkg/link"
)

// PluginName is the plugin's name in SPIRE's configuration.
const PluginName = "rootlink_composer"

const maxPatterns = 1024

// Extension and purposes, RFC 5280, 4.2.1.12.
var (
	oidExtKeyUsage = asn1.ObjectIdentifier{2, 5, 29, 37}
	oidServerAuth  = asn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 7, 3, 1}
	oidClientAuth  = asn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 7, 3, 2}
	oidCodeSigning = asn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 7, 3, 3}
)

var (
	errConfig    = errors.New("configuration")
	errReserved  = errors.New("it matches identities of SPIRE's own servers or agents")
	errExtension = errors.New("extended key usage of another plugin")
)

// config is plugin_data as an operator writes it (docs/keeper.md).
type config struct {
	CodeSigning []string `hcl:"code_signing"`

	Unused map[string][]token.Pos `hcl:",unusedKeyPositions"`
}

type settings struct {
	trustDomain spiffeid.TrustDomain
	patterns    []string
}

// Plugin implements SPIRE's CredentialComposer and Config services. What it has
// no opinion on is left Unimplemented, which SPIRE takes for "as it is".
type Plugin struct {
	composerv1.UnimplementedCredentialComposerServer
	configv1.UnimplementedConfigServer

	log   hclog.Logger // set once, before the first call
	state atomic.Pointer[settings]
}

// New returns a plugin that has still to be configured.
func New() *Plugin { return &Plugin{log: hclog.NewNullLogger()} }

// Servers returns the services that the plugin registers.
func (p *Plugin) Servers() (pluginsdk.PluginServer, []pluginsdk.ServiceServer) {
	return composerv1.CredentialComposerPluginServer(p), []pluginsdk.ServiceServer{configv1.ConfigServiceServer(p)}
}

// SetLogger implements pluginsdk.NeedsLogger.
func (p *Plugin) SetLogger(l hclog.Logger) { p.log = l }

// Configure implements the Config service. An earlier configuration stays in
// force when it fails.
func (p *Plugin) Configure(_ context.Context, r *configv1.ConfigureRequest) (*configv1.ConfigureResponse, error) {
	s, err := load(r.GetCoreConfiguration(), r.GetHclConfiguration())
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, cli.JoinHint(err.Error(), cli.HintOf(err)))
	}
	p.state.Store(s)
	p.log.Info("configured", "trust_domain", s.trustDomain.Name(), "code_signing", strings.Join(s.patterns, " "))
	return &configv1.ConfigureResponse{}, nil
}

// Validate implements the Config service.
func (p *Plugin) Validate(_ context.Context, r *configv1.ValidateRequest) (*configv1.ValidateResponse, error) {
	if _, err := load(r.GetCoreConfiguration(), r.GetHclConfiguration()); err != nil {
		return &configv1.ValidateResponse{Notes: []string{cli.JoinHint(err.Error(), cli.HintOf(err))}}, nil
	}
	return &configv1.ValidateResponse{Valid: true}, nil
}

func load(core *configv1.CoreConfiguration, text string) (*settings, error) {
	var c config
	if err := hcl.Decode(&c, text); err != nil {
		return nil, fmt.Errorf("%w: %w", errConfig, err)
	}
	if err := hclkeys.Unknown(c.Unused); err != nil {
		return nil, fmt.Errorf("%w: %w", errConfig, err)
	}
	td, err := spiffeid.TrustDomainFromString(core.GetTrustDomain())
	if err != nil {
		return nil, fmt.Errorf("%w: trust domain: %w", errConfig, err)
	}
	if len(c.CodeSigning) == 0 || len(c.CodeSigning) > maxPatterns {
		return nil, cli.Hint(fmt.Errorf("%w: code_signing has %d patterns, 1 to %d allowed", errConfig, len(c.CodeSigning), maxPatterns),
			fmt.Sprintf(`name who signs, such as code_signing = ["%s/build/*"]`, td.IDString()))
	}
	for _, pattern := range c.CodeSigning {
		if err := checkPattern(td, pattern); err != nil {
			return nil, fmt.Errorf("%w: code_signing %q: %w", errConfig, pattern, err)
		}
	}
	return &settings{td, c.CodeSigning}, nil
}

// checkPattern refuses what could match spiffe://TD/spire/server or anything
// below spiffe://TD/spire/agent: a server or agent never signs for a build, and
// who could make one of them a signer would have every node's name to sign with.
func checkPattern(td spiffeid.TrustDomain, pattern string) error {
	if err := link.ValidatePattern(pattern); err != nil {
		return err
	}
	path, ok := strings.CutPrefix(pattern, td.IDString()+"/")
	if !ok {
		return fmt.Errorf("it is not of trust domain %s", td.Name())
	}
	segments := strings.Split(path, "/")
	// One segment at a time, as patterns are matched.
	can := func(i int, name string) bool {
		return segments[i] == "**" || link.MatchPattern(td.IDString()+"/"+segments[i], td.IDString()+"/"+name)
	}
	if !can(0, "spire") || segments[0] != "**" && len(segments) == 1 {
		return nil
	}
	if segments[0] == "**" || can(1, "agent") || can(1, "server") && len(segments) == 2 {
		return cli.Hint(errReserved, "begin the pattern with a path of your own, such as "+td.IDString()+"/build/**")
	}
	return nil
}

// ComposeWorkloadX509SVID implements the CredentialComposer service.
func (p *Plugin) ComposeWorkloadX509SVID(_ context.Context, r *composerv1.ComposeWorkloadX509SVIDRequest) (*composerv1.ComposeWorkloadX509SVIDResponse, error) {
	s := p.state.Load()
	if s == nil {
		return nil, status.Error(codes.FailedPrecondition, "plugin is not configured")
	}
	if !s.signs(r.GetSpiffeId()) {
		return &composerv1.ComposeWorkloadX509SVIDResponse{}, nil // as it is
	}
	if r.GetAttributes() == nil {
		return nil, status.Error(codes.InvalidArgument, "no attributes")
	}
	// Changed and sent back whole: fields of a later SPIRE stay as they were.
	out := proto.CloneOf(r.GetAttributes())
	if err := addCodeSigning(out); err != nil {
		p.log.Error("X509-SVID", "spiffe_id", r.GetSpiffeId(), "error", err)
		return nil, status.Error(codes.Internal, err.Error())
	}
	return &composerv1.ComposeWorkloadX509SVIDResponse{Attributes: out}, nil
}

func (s *settings) signs(id string) bool {
	if strings.HasPrefix(id, s.trustDomain.IDString()+"/spire/") {
		return false // whatever a pattern says
	}
	return slices.ContainsFunc(s.patterns, func(p string) bool { return link.MatchPattern(p, id) })
}

// addCodeSigning adds the purpose. SPIRE has no attribute for it: an extension
// given here takes the place of the one that SPIRE would write, so that this one
// must name serverAuth and clientAuth too, which SPIRE demands of every SVID.
func addCodeSigning(a *composerv1.X509SVIDAttributes) error {
	for _, e := range a.ExtraExtensions {
		if e.GetOid() != oidExtKeyUsage.String() {
			continue
		}
		// Another composer was here first: a second extension of the same kind
		// would make a certificate that nobody reads (RFC 5280, 4.2).
		var have []asn1.ObjectIdentifier
		if rest, err := asn1.Unmarshal(e.GetValue(), &have); err != nil || len(rest) > 0 {
			return fmt.Errorf("%w: malformed", errExtension)
		}
		if slices.ContainsFunc(have, oidCodeSigning.Equal) {
			return nil
		}
		value, err := asn1.Marshal(append(have, oidCodeSigning))
		e.Value = value
		return err
	}
	value, err := asn1.Marshal([]asn1.ObjectIdentifier{oidServerAuth, oidClientAuth, oidCodeSigning})
	if err != nil {
		return err
	}
	// Not critical, as SPIRE's own.
	a.ExtraExtensions = append(a.ExtraExtensions, &composerv1.X509Extension{Oid: oidExtKeyUsage.String(), Value: value})
	return nil
}
