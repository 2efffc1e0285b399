// Package nodeserver is the server side of the tpmnode node attestor: it
// decides whether a machine may have an agent identity, from what its TPM
// proves. It implements SPIRE's plugin interface and runs under our server and
// under a stock SPIRE server alike.
package nodeserver

import (
	"context"
	"crypto/x509"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/spire-plugin-sdk/pluginsdk"
	nodeattestorv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/server/nodeattestor/v1"
	configv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/service/common/config/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/rootlink/rootlink/internal/attestca"
	"github.com/rootlink/rootlink/internal/policy"
	"github.com/rootlink/rootlink/pkg/attest"
)

const (
	// DefaultRoundTimeout is how long an agent has for one answer. Its TPM
	// may take seconds for an activation and a quote, and others may be
	// waiting for the same TPM.
	DefaultRoundTimeout = 30 * time.Second

	// maxSessionRounds times the round timeout bounds a whole attestation.
	maxSessionRounds = 20

	// maxSessions bounds the attestations under way at once, see slots. A room
	// full of machines that come back after a power cut must fit: with fewer slots
	// they would push each other out.
	maxSessions = 1024

	// maxLogBytes bounds the event logs held by all attestations together.
	maxLogBytes = 256 << 20
)

// PinStore remembers which AK belongs to an EK and which EK to a TPM. Every
// method is atomic and durable when it returns.
type PinStore interface {
	// PinAK pins the first AK of an EK and returns the pinned name, which is
	// akName unless another AK was first. With replace the pin moves to
	// akName; what is returned is then the name that was pinned before.
	PinAK(ctx context.Context, ek [32]byte, akName []byte, replace bool) (pinned []byte, err error)
	// PinTPM pins the first EK of a TPM, which the name of its storage key
	// identifies, and returns the pinned one: ek unless another was first.
	PinTPM(ctx context.Context, parentName []byte, ek [32]byte) (pinned [32]byte, err error)
}

// Options are what a host that embeds the plugin provides. Every nil field
// means the default of a stock SPIRE, as the configuration says.
type Options struct {
	// Policies returns the PCR policies in force. An error refuses the
	// attestation for now. Default: the file pcr_policies.
	Policies func(context.Context) ([]policy.Revision, error)
	// Pins keeps the pins. Default: a file in data_dir.
	Pins PinStore
	// Banned says whether an agent is banned. It is asked before the agent's
	// TPM is challenged and again before an AK certificate is signed. An
	// error refuses the attestation for now. Default: nobody is, and SPIRE
	// itself refuses a banned agent.
	Banned func(ctx context.Context, agentID string) (bool, error)
	// OnCertificate is called with each AK certificate before the agent gets
	// it. An error refuses the attestation for now.
	OnCertificate func(ctx context.Context, agentID string, cert *x509.Certificate) error
	// OnAttested is called with all that was proved, before the agent is
	// told. An error refuses the attestation for now.
	OnAttested func(ctx context.Context, a *Attested) error
	// OnAlarm is called beside the log for what somebody should look at.
	OnAlarm func(ctx context.Context, a Alarm)
	// CA signs AK certificates. Default: attestation_ca_cert and
	// attestation_ca_key, or a CA kept in data_dir.
	CA *attestca.CA
	// Now is the clock. Default: time.Now.
	Now func() time.Time
}

// Attested is what one node attestation proved.
type Attested struct {
	AgentID   string
	At        time.Time
	Selectors []string // without the type

	EK      attest.EK
	EKChain [][]byte // DER as sent; empty when the EK has no certificate
	AK      attest.AK
	AKCert  *x509.Certificate

	// AgentKey is SHA-256 of the SPKI of the agent's CSR key. KeyBound says
	// that the quote covers it; else it is zero.
	AgentKey [32]byte
	KeyBound bool

	Nonce       [32]byte
	QuoteAttest []byte // TPMS_ATTEST
	Signature   []byte // TPMT_SIGNATURE
	Quote       attest.Quote
	PCRs        []attest.PCRBank
	Matches     []policy.Match

	EventLog       []byte // nil when there was none; replayed only if Replayed
	EventLogDigest *attest.TypedDigest
	Replayed       bool
	IMALogDigest   *attest.TypedDigest // of what the agent sent; nothing is concluded from it
	SecureBoot     *bool               // nil when the event log proves neither
}

// AlarmKind says what an alarm is about.
type AlarmKind string

// What raises an alarm.
const (
	AlarmAKChanged AlarmKind = "ak_changed" // another AK on a known EK
	AlarmSecondEK  AlarmKind = "second_ek"  // one TPM under two EKs: always refused
	AlarmTwoAgents AlarmKind = "two_agents" // two agents seem to share a TPM
)

// Alarm is an event that may mean that somebody copies a node's identity.
type Alarm struct {
	Kind    AlarmKind
	AgentID string
	Detail  string
	Refused bool
}

// Plugin implements SPIRE's NodeAttestor (server) and Config services.
type Plugin struct {
	nodeattestorv1.UnimplementedNodeAttestorServer
	configv1.UnimplementedConfigServer

	opts  Options
	judge *policy.Judge
	live  *live
	slots slots        // of the attestations under way
	logs  atomic.Int64 // bytes of event logs held

	log   hclog.Logger // set once, before the first call
	state atomic.Pointer[settings]
}

// New returns a plugin that has still to be configured.
func New(o Options) *Plugin {
	if o.Now == nil {
		o.Now = time.Now
	}
	return &Plugin{opts: o, judge: policy.NewJudge(), live: newLive(), log: hclog.NewNullLogger()}
}

// Servers returns the services that the plugin registers.
func (p *Plugin) Servers() (pluginsdk.PluginServer, []pluginsdk.ServiceServer) {
	return nodeattestorv1.NodeAttestorPluginServer(p), []pluginsdk.ServiceServer{configv1.ConfigServiceServer(p)}
}

// SetLogger implements pluginsdk.NeedsLogger.
func (p *Plugin) SetLogger(l hclog.Logger) { p.log = l }

// Configure implements the Config service. An earlier configuration stays in
// force when it fails.
func (p *Plugin) Configure(_ context.Context, r *configv1.ConfigureRequest) (*configv1.ConfigureResponse, error) {
	s, notes, err := p.load(r.GetCoreConfiguration(), r.GetHclConfiguration(), true)
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, withHint(err))
	}
	p.state.Store(s)
	for _, n := range notes {
		p.log.Warn(n)
	}
	p.log.Info("configured", "trust_domain", s.trustDomain, "attestation_ca", s.ca.Certificate().Subject.String())
	return &configv1.ConfigureResponse{}, nil
}

// Validate implements the Config service. It writes nothing: files that
// Configure would make need not exist yet.
func (p *Plugin) Validate(_ context.Context, r *configv1.ValidateRequest) (*configv1.ValidateResponse, error) {
	_, notes, err := p.load(r.GetCoreConfiguration(), r.GetHclConfiguration(), false)
	if err != nil {
		return &configv1.ValidateResponse{Notes: append(notes, withHint(err))}, nil
	}
	return &configv1.ValidateResponse{Valid: true, Notes: notes}, nil
}

// AttestationCA returns the CA in use, nil before Configure.
func (p *Plugin) AttestationCA() *attestca.CA {
	if s := p.state.Load(); s != nil {
		return s.ca
	}
	return nil
}

// EKRoots returns the makers' certificates and lists in use, for a trust
// export, as the files hold them now.
func (p *Plugin) EKRoots() (attest.EKRoots, error) {
	s := p.state.Load()
	if s == nil {
		return attest.EKRoots{}, errNotConfigured
	}
	return s.ekRoots()
}

func (p *Plugin) alarm(ctx context.Context, a Alarm) {
	p.log.Error("ALARM: "+a.Detail, "kind", string(a.Kind), "agent_id", a.AgentID, "refused", a.Refused)
	if p.opts.OnAlarm != nil {
		p.opts.OnAlarm(ctx, a)
	}
}
