// Package unix is the workload attestor "unix": whose process it is. Selectors
// and keys are those of SPIRE's attestor of that name, so that the entries of a
// SPIRE deployment match as they are. docs/plugin-unix.md lists them.
package unix

import (
	"context"
	"errors"
	"fmt"
	"os/user"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"unicode"
	"unicode/utf8"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/hcl"
	"github.com/hashicorp/hcl/hcl/token"
	workloadattestorv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/agent/workloadattestor/v1"
	configv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/service/common/config/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/internal/hclkeys"
	"github.com/rootlink/rootlink/internal/measured"
	"github.com/rootlink/rootlink/internal/workload"
)

// Name is the plugin's name, and so the type of its selectors.
const Name = "unix"

// config is plugin_data.
type config struct {
	DiscoverWorkloadPath bool  `hcl:"discover_workload_path"`
	WorkloadSizeLimit    int64 `hcl:"workload_size_limit"`

	Unknown map[string][]token.Pos `hcl:",unusedKeyPositions"`
}

// Plugin implements the WorkloadAttestor and Config services.
type Plugin struct {
	workloadattestorv1.UnimplementedWorkloadAttestorServer
	configv1.UnimplementedConfigServer

	log    hclog.Logger
	shared func() *workload.Measurer

	mu    sync.RWMutex
	cfg   *config            // nil until configured
	extra *workload.Measurer // nil while shared has one, or none is needed
}

// New returns a plugin that is not configured yet. shared returns a measurer
// whose cache and rules the plugin uses; with nil, or while it returns nil, it has
// one of its own.
func New(shared func() *workload.Measurer) *Plugin {
	if shared == nil {
		shared = func() *workload.Measurer { return nil }
	}
	return &Plugin{log: hclog.NewNullLogger(), shared: shared}
}

// SetLogger is called by the host before anything else.
func (p *Plugin) SetLogger(log hclog.Logger) { p.log = log }

// parse reads plugin_data. SPIRE passes over what it does not know; a misspelt
// key must not leave its default in force unnoticed.
func parse(text string) (*config, error) {
	c := new(config)
	if err := hcl.Decode(c, text); err != nil {
		return nil, fmt.Errorf("configuration cannot be read: %w", err)
	}
	return c, hclkeys.Unknown(c.Unknown)
}

// Configure replaces the configuration.
func (p *Plugin) Configure(_ context.Context, req *configv1.ConfigureRequest) (_ *configv1.ConfigureResponse, err error) {
	defer p.recovered(&err)
	c, err := parse(req.GetHclConfiguration())
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	var own *workload.Measurer
	if c.DiscoverWorkloadPath && p.shared() == nil {
		if own, err = workload.NewMeasurer(workload.Options{}); err != nil {
			return nil, status.Error(codes.FailedPrecondition, cli.JoinHint(err.Error(), workload.Hint(err)))
		}
	}
	p.mu.Lock()
	p.cfg, p.extra = c, own
	p.mu.Unlock()
	return &configv1.ConfigureResponse{}, nil
}

// Validate says whether Configure would accept a configuration.
func (p *Plugin) Validate(_ context.Context, req *configv1.ValidateRequest) (_ *configv1.ValidateResponse, err error) {
	defer p.recovered(&err)
	if _, err := parse(req.GetHclConfiguration()); err != nil {
		return &configv1.ValidateResponse{Notes: []string{err.Error()}}, nil
	}
	return &configv1.ValidateResponse{Valid: true}, nil
}

// Attest returns the selectors of a process, without their type.
func (p *Plugin) Attest(ctx context.Context, req *workloadattestorv1.AttestRequest) (_ *workloadattestorv1.AttestResponse, err error) {
	defer p.recovered(&err)
	p.mu.RLock()
	c, m := p.cfg, p.extra
	p.mu.RUnlock()
	if c == nil {
		return nil, status.Error(codes.FailedPrecondition, "not configured")
	}
	if m == nil {
		m = p.shared()
	}
	out, err := c.selectors(ctx, int(req.GetPid()), m)
	if err != nil {
		p.log.Warn("A process could not be looked at", "pid", fmt.Sprint(req.GetPid()), "reason", err.Error(), "hint", workload.Hint(err))
		return nil, status.Error(measured.Code(err), err.Error())
	}
	return &workloadattestorv1.AttestResponse{SelectorValues: out}, nil
}

var errNoMeasurer = errors.New("nothing measures executables here")

func (c *config) selectors(ctx context.Context, pid int, m *workload.Measurer) ([]string, error) {
	who, err := workload.CredentialsOf(pid)
	if err != nil {
		return nil, err
	}
	var out []string
	add := func(kind, value string) { out = append(out, kind+":"+value) }
	id := func(n uint32) string { return strconv.FormatUint(uint64(n), 10) }
	// A number without a name has no selector of the name, as with SPIRE.
	group := func(kind, byName string, n uint32) {
		add(kind, id(n))
		if g, err := user.LookupGroupId(id(n)); err == nil && printable(g.Name) {
			add(byName, g.Name)
		}
	}
	add("uid", id(who.UID))
	if u, err := user.LookupId(id(who.UID)); err == nil && printable(u.Username) {
		add("user", u.Username)
	}
	group("gid", "group", who.GID)
	for _, g := range who.Groups {
		group("supplementary_gid", "supplementary_group", g)
	}
	if !c.DiscoverWorkloadPath {
		return out, nil
	}
	if m == nil {
		return nil, errNoMeasurer
	}
	got, err := m.Measure(ctx, pid)
	if err != nil {
		return nil, err
	}
	if got.UID != who.UID || got.GID != who.GID {
		return nil, fmt.Errorf("process %d changed its user or group: %w", pid, workload.ErrChanged)
	}
	// Where the process could choose its own path there is none.
	if got.Path != "" {
		add("path", got.Path)
	}
	switch limit := c.WorkloadSizeLimit; {
	case limit > 0 && got.Size > limit:
		return nil, fmt.Errorf("executable of process %d has %d bytes, workload_size_limit is %d: %w", pid, got.Size, limit, workload.ErrTooLarge)
	case limit >= 0:
		add("sha256", fmt.Sprintf("%x", got.SHA256))
	}
	return out, nil
}

// printable: a name of the directory service that is no selector is left out,
// rather than have it fail every workload of its user.
func printable(s string) bool {
	return s != "" && utf8.ValidString(s) && !strings.ContainsFunc(s, unicode.IsControl)
}

// recovered keeps a panic in one call from ending the agent.
func (p *Plugin) recovered(err *error) {
	if r := recover(); r != nil {
		p.log.Error("Panic", "panic", fmt.Sprint(r), "stack", string(debug.Stack()))
		*err = status.Error(codes.Internal, "internal error")
	}
}
