package nodeserver

import (
	"cmp"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"time"

	"github.com/hashicorp/hcl"
	"github.com/hashicorp/hcl/hcl/token"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	configv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/service/common/config/v1"

	"github.com/rootlink/rootlink/internal/attestca"
	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/internal/ekfiles"
	"github.com/rootlink/rootlink/internal/hclkeys"
	"github.com/rootlink/rootlink/internal/policy"
	"github.com/rootlink/rootlink/pkg/attest"
	"github.com/rootlink/rootlink/plugins/tpmnode/hostside"
)

var (
	errNotConfigured = errors.New("plugin is not configured")
	errConfig        = errors.New("configuration")
)

// config is plugin_data as an operator writes it (docs/plugin-tpmnode.md).
type config struct {
	EKRoots   any      `hcl:"ek_roots"` // a path or a list of them
	EKAllow   string   `hcl:"ek_allow"`
	EKDeny    string   `hcl:"ek_deny"`
	EKTypes   []string `hcl:"ek_types"`
	CACert    string   `hcl:"attestation_ca_cert"`
	CAKey     string   `hcl:"attestation_ca_key"`
	DataDir   string   `hcl:"data_dir"`
	Policies  string   `hcl:"pcr_policies"`
	PCRs      string   `hcl:"pcrs"`
	Selectors string   `hcl:"pcr_selectors"`

	WantEventLog    *bool  `hcl:"want_event_log"`
	RequireEventLog bool   `hcl:"require_event_log"`
	WantIMALog      bool   `hcl:"want_ima_log"`
	RefuseAKChange  bool   `hcl:"refuse_ak_change"`
	RoundTimeout    string `hcl:"round_timeout"`

	Unused map[string][]token.Pos `hcl:",unusedKeyPositions"`
}

// settings is a config that was checked and completed.
type settings struct {
	trustDomain     string
	roots           attest.EKRoots // Roots and Intermediates; the lists are read anew each time
	allow, deny     string
	ekTypes         []string
	ca              *attestca.CA
	policies        func(context.Context) ([]policy.Revision, error)
	pins            PinStore
	pcrs            []attest.PCRSelection
	selectors       []attest.PCRSelection
	wantEventLog    bool
	requireEventLog bool
	wantIMALog      bool
	refuseAKChange  bool
	roundTimeout    time.Duration
}

// ekTypes in the order in which agents prefer them. An agent takes the first
// that its TPM has; a server that lists fewer types refuses the others.
func ekTypes() []string { return []string{"ecc-p256", "rsa-2048", "ecc-p384", "rsa-3072"} }

// ekType names the type of an EK's key, "" for one we do not take.
func ekType(public any) string {
	switch k := public.(type) {
	case *ecdsa.PublicKey:
		switch k.Curve {
		case elliptic.P256():
			return "ecc-p256"
		case elliptic.P384():
			return "ecc-p384"
		}
	case *rsa.PublicKey:
		switch k.N.BitLen() {
		case 2048:
			return "rsa-2048"
		case 3072:
			return "rsa-3072"
		}
	}
	return ""
}

// withHint is err for somebody who sees nothing but this text.
func withHint(err error) string { return cli.JoinHint(err.Error(), cli.HintOf(err)) }

// load checks a configuration and reads what it names. Without create it only
// checks, and makes neither a CA nor a directory.
func (p *Plugin) load(core *configv1.CoreConfiguration, text string, create bool) (*settings, []string, error) {
	var c config
	if err := hcl.Decode(&c, text); err != nil {
		return nil, nil, fmt.Errorf("%w: %w", errConfig, err)
	}
	if err := hclkeys.Unknown(c.Unused); err != nil {
		return nil, nil, fmt.Errorf("%w: %w", errConfig, err)
	}
	td, err := spiffeid.TrustDomainFromString(core.GetTrustDomain())
	if err != nil {
		return nil, nil, fmt.Errorf("%w: trust domain: %w", errConfig, err)
	}
	s := &settings{
		trustDomain: td.Name(), allow: c.EKAllow, deny: c.EKDeny,
		wantEventLog: c.WantEventLog == nil || *c.WantEventLog, requireEventLog: c.RequireEventLog,
		wantIMALog: c.WantIMALog, refuseAKChange: c.RefuseAKChange,
	}
	if s.requireEventLog && !s.wantEventLog {
		return nil, nil, fmt.Errorf("%w: require_event_log needs want_event_log", errConfig)
	}
	var notes []string
	for _, step := range []func(*config) ([]string, error){s.readEKs, s.readPCRs, s.readTimeout} {
		n, err := step(&c)
		if notes = append(notes, n...); err != nil {
			return nil, notes, fmt.Errorf("%w: %w", errConfig, err)
		}
	}
	n, err := s.readPolicies(&c, p.opts)
	if notes = append(notes, n...); err != nil {
		return nil, notes, fmt.Errorf("%w: %w", errConfig, err)
	}
	if err := s.readState(&c, p.opts, p.state.Load(), create); err != nil {
		return nil, notes, fmt.Errorf("%w: %w", errConfig, err)
	}
	return s, notes, nil
}

func (s *settings) readEKs(c *config) (notes []string, err error) {
	paths, err := hostside.StringList("ek_roots", c.EKRoots)
	if err != nil {
		return nil, err
	}
	if len(paths) == 0 && c.EKAllow == "" {
		return nil, cli.Hint(errors.New("neither ek_roots nor ek_allow: no TPM could ever be accepted"),
			"give the TPM makers' root certificates in ek_roots, or EK hashes in ek_allow")
	}
	for _, path := range paths {
		if err := ekfiles.AddRoots(&s.roots, path); err != nil {
			return nil, err
		}
	}
	if len(paths) > 0 && len(s.roots.Roots) == 0 {
		return nil, cli.Hint(fmt.Errorf("ek_roots %q: no self-signed certificate", paths),
			"add the maker's root beside its intermediates")
	}
	if _, err := s.ekRoots(); err != nil { // the lists are there and read well
		return nil, err
	}
	s.ekTypes = c.EKTypes
	if len(s.ekTypes) == 0 {
		s.ekTypes = ekTypes()
	}
	for _, t := range s.ekTypes {
		if !slices.Contains(ekTypes(), t) {
			return nil, fmt.Errorf("ek_types: unknown type %q, want some of %v", t, ekTypes())
		}
	}
	if c.EKDeny == "" {
		notes = append(notes, "no ek_deny: a stolen machine can be shut out by `agent ban` only")
	}
	return notes, nil
}

func (s *settings) readPCRs(c *config) (notes []string, err error) {
	if s.pcrs, err = attest.ParsePCRs(cmp.Or(c.PCRs, attest.FormatPCRs(attest.DefaultPCRs()))); err != nil {
		return nil, fmt.Errorf("pcrs: %w", err)
	}
	for _, sel := range s.pcrs {
		if sel.Bank == "sha1" {
			return nil, errors.New("pcrs: SHA-1 can be forged; quote another bank")
		}
		if i := slices.IndexFunc(sel.Indices, attest.ResettablePCR); i >= 0 {
			return nil, fmt.Errorf("pcrs: PCR %d: %w", sel.Indices[i], policy.ErrResettable)
		}
	}
	switch c.Selectors {
	case "":
		s.selectors = s.pcrs
	case "none":
	default:
		if s.selectors, err = attest.ParsePCRs(c.Selectors); err != nil {
			return nil, fmt.Errorf("pcr_selectors: %w", err)
		}
	}
	for _, sel := range s.selectors {
		i := slices.IndexFunc(s.pcrs, func(q attest.PCRSelection) bool { return q.Bank == sel.Bank })
		for _, n := range sel.Indices {
			if i < 0 || !slices.Contains(s.pcrs[i].Indices, n) {
				return nil, fmt.Errorf("pcr_selectors: %s:%d is not among pcrs", sel.Bank, n)
			}
		}
	}
	if !covers(s.pcrs, "sha256", 7) {
		notes = append(notes, "pcrs lack sha256:7: Secure Boot cannot be proved")
	}
	return notes, nil
}

func covers(sel []attest.PCRSelection, bank string, pcr uint32) bool {
	return slices.ContainsFunc(sel, func(s attest.PCRSelection) bool { return s.Bank == bank && slices.Contains(s.Indices, pcr) })
}

func (s *settings) readTimeout(c *config) (_ []string, err error) {
	s.roundTimeout = DefaultRoundTimeout
	if c.RoundTimeout != "" {
		if s.roundTimeout, err = time.ParseDuration(c.RoundTimeout); err != nil {
			return nil, fmt.Errorf("round_timeout: %w", err)
		}
	}
	if s.roundTimeout < time.Millisecond || s.roundTimeout > time.Hour {
		return nil, fmt.Errorf("round_timeout %v is not between 1ms and 1h", s.roundTimeout)
	}
	return nil, nil
}

// readPolicies reads the file once, so that a mistake in it is seen at the
// start, and then again at each attestation, so that a change needs no restart.
func (s *settings) readPolicies(c *config, o Options) (notes []string, err error) {
	switch {
	case o.Policies != nil && c.Policies != "":
		return nil, errors.New("pcr_policies: this server keeps PCR policies itself")
	case o.Policies != nil:
		s.policies = o.Policies
		return nil, nil
	case c.Policies == "":
		s.policies = func(context.Context) ([]policy.Revision, error) { return nil, nil }
		return []string{"no pcr_policies: nodes are accepted in any boot state and get no pcr_policy selector"}, nil
	}
	s.policies = func(context.Context) ([]policy.Revision, error) {
		list, err := policy.ReadFile(c.Policies)
		if err != nil {
			return nil, err
		}
		return policy.Current(list), nil
	}
	current, err := s.policies(context.Background())
	if err != nil {
		return nil, err
	}
	for _, r := range current {
		for _, profile := range r.Policy.Profiles {
			for bank := range profile.Banks {
				if !slices.ContainsFunc(s.pcrs, func(q attest.PCRSelection) bool { return q.Bank == bank }) {
					notes = append(notes, fmt.Sprintf("PCR policy %q profile %q names bank %s, which pcrs does not quote: it is never met", r.Policy.Name, profile.Name, bank))
				}
			}
		}
	}
	return notes, nil
}

// readState opens what the plugin keeps: the CA and the pins. was is the
// configuration in force, nil at the start.
func (s *settings) readState(c *config, o Options, was *settings, create bool) (err error) {
	if (c.CACert == "") != (c.CAKey == "") {
		return errors.New("attestation_ca_cert and attestation_ca_key go together")
	}
	if o.CA != nil && c.CACert != "" {
		return errors.New("attestation_ca_cert: this server loads the attestation CA itself")
	}
	needDir := o.Pins == nil || (o.CA == nil && c.CACert == "")
	if needDir && c.DataDir == "" {
		return cli.Hint(errors.New("no data_dir"), "name a directory that only the server's user can open")
	}
	switch {
	case o.CA != nil:
		s.ca = o.CA
	case c.CACert != "":
		s.ca, err = attestca.Load(c.CACert, c.CAKey, o.Now())
	case create:
		s.ca, err = attestca.LoadOrCreate(c.DataDir, o.Now())
	default:
		err = attestca.Check(c.DataDir, o.Now())
	}
	if err != nil {
		return err
	}
	if s.pins = o.Pins; s.pins != nil {
		return nil
	}
	path := filepath.Join(c.DataDir, pinsFile)
	if was != nil {
		// Sessions of the configuration before may still write: two copies of
		// one file would lose what the other adds.
		if p, ok := was.pins.(*filePins); ok && p.path == path {
			s.pins = p
			return nil
		}
	}
	s.pins, err = openPins(path)
	return err
}

// ekRoots returns the makers' certificates with the lists as their files are
// now: a machine that is denied stays out from that moment on.
func (s *settings) ekRoots() (attest.EKRoots, error) {
	r := s.roots
	var err error
	if r.Allow, err = ekfiles.ReadHashes("ek_allow", s.allow); err != nil {
		return attest.EKRoots{}, err
	}
	if r.Deny, err = ekfiles.ReadHashes("ek_deny", s.deny); err != nil {
		return attest.EKRoots{}, err
	}
	return r, nil
}
