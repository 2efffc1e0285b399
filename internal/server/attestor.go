package server

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/rootlink/rootlink/internal/catalog"
	"github.com/rootlink/rootlink/internal/policy"
	"github.com/rootlink/rootlink/pkg/attest"
	"github.com/rootlink/rootlink/plugins/tpmnode/nodeserver"
	"github.com/rootlink/rootlink/plugins/tpmnode/wire"
)

// loadAttestor starts the built-in node attestor on our own store and
// attestation CA. Without anything that makes an EK genuine there is none to
// start: the server then runs and attests nobody.
func (s *Server) loadAttestor(ctx context.Context) error {
	if len(s.cfg.EKRoots) == 0 && s.cfg.EKAllow == "" {
		return nil
	}
	s.nodeserver = nodeserver.New(nodeserver.Options{
		Policies: func(context.Context) ([]policy.Revision, error) { return s.policies() },
		Pins:     s.store,
		Banned: func(ctx context.Context, agentID string) (bool, error) {
			banned, err := s.store.Banned(agentID)
			if banned {
				s.running.with(ctx, func(a *attestation) { a.banned = true })
			}
			return banned, err
		},
		OnCertificate: s.logAKCertificate,
		OnAttested: func(ctx context.Context, a *nodeserver.Attested) error {
			if !s.running.with(ctx, func(at *attestation) { at.proved = a }) {
				return errors.New("no such attestation")
			}
			return nil
		},
		OnAlarm: func(ctx context.Context, a nodeserver.Alarm) {
			s.count.add("alarm/" + string(a.Kind))
			if err := s.store.AddAgentEvent(context.WithoutCancel(ctx), a.AgentID, string(a.Kind), a.Detail); err != nil {
				s.cfg.Log.Error("record alarm", "error", err)
			}
		},
		CA:  s.attestationCA,
		Now: s.cfg.Now,
	})
	impl, services := s.nodeserver.Servers()
	p, err := catalog.Load(ctx, catalog.Config{
		Type: nodeAttestorType, Name: wire.PluginName, Data: s.attestorConfig(s.ekTrust()),
		BuiltIn: &catalog.BuiltIn{Plugin: impl, Services: services},
	}, catalog.Options{TrustDomain: s.cfg.TrustDomain, Log: s.cfg.Log})
	if err != nil {
		return err
	}
	a := &attestor{plugin: p, builtIn: true}
	s.attestors[wire.PluginName] = a
	a.client, err = p.ServerNodeAttestor()
	return err
}

// checkAttestor has the node attestor look at its configuration before anything
// is made: a wrong path should not leave keys and a database behind.
func (s *Server) checkAttestor(ctx context.Context) error {
	if len(s.cfg.EKRoots) == 0 && s.cfg.EKAllow == "" {
		return nil
	}
	impl, services := nodeserver.New(nodeserver.Options{
		Policies: func(context.Context) ([]policy.Revision, error) { return nil, nil }, Now: s.cfg.Now,
	}).Servers()
	plugin, err := catalog.LoadBuiltIn(ctx, catalog.BuiltIn{Name: wire.PluginName, Plugin: impl, Services: services},
		catalog.Options{TrustDomain: s.cfg.TrustDomain, Log: s.cfg.Log})
	if err != nil {
		return err
	}
	defer plugin.Close()
	_, err = plugin.Validate(ctx, s.attestorConfig(s.ekTrust())+s.stateConfig())
	if invalid, ok := errors.AsType[*catalog.InvalidConfigError](err); ok {
		return invalid.Refusal()
	}
	return err
}

// stateConfig names the files that the node attestor is otherwise given open.
func (s *Server) stateConfig() string {
	if s.cfg.AttestationCACert != "" {
		return fmt.Sprintf("data_dir = %q\nattestation_ca_cert = %q\nattestation_ca_key = %q\n",
			s.cfg.DataDir, s.cfg.AttestationCACert, s.cfg.AttestationCAKey)
	}
	return fmt.Sprintf("data_dir = %q\n", s.cfg.DataDir)
}

// EKTrust names the files that say which endorsement keys are genuine.
type EKTrust struct {
	Roots       []string // PEM files, or directories of them
	Allow, Deny string   // files of hashes; "" is none
}

func (s *Server) ekTrust() EKTrust { return EKTrust{s.cfg.EKRoots, s.cfg.EKAllow, s.cfg.EKDeny} }

// ReloadEKTrust reads EK roots anew, from these files from now on. What cannot be
// taken is logged and leaves in force what was.
func (s *Server) ReloadEKTrust(ctx context.Context, t EKTrust) {
	a := s.attestors[wire.PluginName]
	if a == nil || !a.builtIn {
		if len(t.Roots) != 0 || t.Allow != "" {
			s.cfg.Log.Warn("the built-in node attestor is loaded when the server is started again")
		}
		return
	}
	if err := a.plugin.Configure(ctx, s.attestorConfig(t)); err != nil {
		s.cfg.Log.Error("EK roots and lists not taken; the node attestor keeps what it has", "error", err, "hint", catalog.Hint(err))
		return
	}
	s.cfg.Log.Info("EK roots and lists taken", "ek_roots", t.Roots, "ek_allow", t.Allow, "ek_deny", t.Deny)
}

// attestorConfig is plugin_data as an operator would write it.
func (s *Server) attestorConfig(t EKTrust) string {
	var b strings.Builder
	list := func(key string, values []string) {
		quoted := make([]string, len(values))
		for i, v := range values {
			quoted[i] = strconv.Quote(v)
		}
		fmt.Fprintf(&b, "%s = [%s]\n", key, strings.Join(quoted, ", "))
	}
	text := func(key, value string) {
		if value != "" {
			fmt.Fprintf(&b, "%s = %s\n", key, strconv.Quote(value))
		}
	}
	if len(t.Roots) > 0 {
		list("ek_roots", t.Roots)
	}
	text("ek_allow", t.Allow)
	text("ek_deny", t.Deny)
	text("pcrs", attest.FormatPCRs(s.cfg.QuotePCRs))
	text("pcr_selectors", attest.FormatPCRs(s.cfg.PCRSelectors))
	text("round_timeout", s.cfg.RoundTimeout.String())
	fmt.Fprintf(&b, "want_event_log = %t\nwant_ima_log = %t\nrefuse_ak_change = %t\n",
		!s.cfg.NoEventLog, s.cfg.WantIMALog, s.cfg.RefuseAKChange)
	return b.String()
}

// policies returns the PCR policies in force, as they are judged.
func (s *Server) policies() ([]policy.Revision, error) {
	list, err := s.store.PCRPolicies()
	if err != nil {
		return nil, err
	}
	out := make([]policy.Revision, len(list))
	for i := range list {
		out[i] = policy.Revision{Policy: &list[i].Policy, Digest: list[i].Digest}
	}
	return out, nil
}

// EKRoots returns what makes an endorsement key genuine, as the node attestor
// judges it now; trust.json carries it to verifiers.
func (s *Server) EKRoots() (attest.EKRoots, error) {
	if s.nodeserver == nil {
		return attest.EKRoots{}, errors.New("no TPM can attest here: the server was given neither EK roots nor an allow-list")
	}
	return s.nodeserver.EKRoots()
}
