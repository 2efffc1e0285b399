package nodeserver

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"
	nodeattestorv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/server/nodeattestor/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/rootlink/rootlink/internal/catalog"
	"github.com/rootlink/rootlink/internal/forge"
	"github.com/rootlink/rootlink/pkg/attest"
	"github.com/rootlink/rootlink/plugins/tpmnode/wire"
	tpmv1 "github.com/rootlink/rootlink/proto/rootlink/tpm/v1"
)

const trustDomain = "example.org"

// host loads the plugin as our server does and keeps what it reports.
type host struct {
	plugin *Plugin
	client nodeattestorv1.NodeAttestorClient
	loaded *catalog.Plugin
	dir    string
	maker  *forge.Maker

	mu       sync.Mutex
	now      time.Time  // guarded by mu
	alarms   []Alarm    // guarded by mu
	attested []Attested // guarded by mu
	log      strings.Builder
	logMu    sync.Mutex // guards log
}

func (h *host) Write(b []byte) (int, error) {
	h.logMu.Lock()
	defer h.logMu.Unlock()
	return h.log.Write(b)
}

func (h *host) logged() string {
	h.logMu.Lock()
	defer h.logMu.Unlock()
	return h.log.String()
}

func (h *host) clock() time.Time {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.now
}

func (h *host) advance(d time.Duration) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.now = h.now.Add(d)
}

func (h *host) alarmKinds() string {
	h.mu.Lock()
	defer h.mu.Unlock()
	var out []string
	for _, a := range h.alarms {
		out = append(out, fmt.Sprintf("%s:%t", a.Kind, a.Refused))
	}
	return strings.Join(out, " ")
}

// newHost returns a configured host; config is added to the HCL that every
// test needs, and edit may change the options.
func newHost(t *testing.T, config string, edit func(*Options)) *host {
	t.Helper()
	return newHostAt(t, forge.Epoch(), config, edit)
}

func newHostAt(t *testing.T, now time.Time, config string, edit func(*Options)) *host {
	t.Helper()
	h := &host{dir: t.TempDir(), maker: forge.NewMaker(t, "Forge Semiconductor"), now: now}
	h.write(t, "roots.pem", string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: h.maker.Root.Raw})))
	h.write(t, "allow", "")
	h.write(t, "deny", "")
	o := Options{
		Now: h.clock,
		OnAlarm: func(_ context.Context, a Alarm) {
			h.mu.Lock()
			defer h.mu.Unlock()
			h.alarms = append(h.alarms, a)
		},
		OnAttested: func(_ context.Context, a *Attested) error {
			h.mu.Lock()
			defer h.mu.Unlock()
			h.attested = append(h.attested, *a)
			return nil
		},
	}
	if edit != nil {
		edit(&o)
	}
	h.load(t, config, o)
	return h
}

func (h *host) path(name string) string { return filepath.Join(h.dir, name) }

func (h *host) write(t *testing.T, name, content string) {
	t.Helper()
	if err := os.WriteFile(h.path(name), []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

func (h *host) hcl(config string) string {
	return fmt.Sprintf("ek_roots = %q\nek_allow = %q\nek_deny = %q\ndata_dir = %q\n", h.path("roots.pem"), h.path("allow"), h.path("deny"), h.path("data")) + config
}

func (h *host) load(t *testing.T, config string, o Options) {
	t.Helper()
	h.plugin = New(o)
	plugin, services := h.plugin.Servers()
	var err error
	h.loaded, err = catalog.LoadBuiltIn(t.Context(), catalog.BuiltIn{Name: wire.PluginName, Plugin: plugin, Services: services},
		catalog.Options{TrustDomain: trustDomain, Log: slog.New(slog.NewTextHandler(h, nil))})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := h.loaded.Close(); err != nil {
			t.Error(err)
		}
	})
	if err := h.loaded.Configure(t.Context(), h.hcl(config)); err != nil {
		t.Fatal(err)
	}
	if h.client, err = h.loaded.ServerNodeAttestor(); err != nil {
		t.Fatal(err)
	}
}

// agent is the other side, with hooks to bend one thing.
type agent struct {
	tpm      *forge.TPM
	key      *[32]byte // known to the server's host; nil as under a stock SPIRE
	eventLog []byte
	imaLog   []byte
	chunk    int // size of log chunks; 0 for the largest allowed

	request   func(*tpmv1.AttestRequest)
	challenge func(*tpmv1.Challenge)
	secret    func(blob, encrypted []byte) ([]byte, error)
	quote     func(*tpm2.TPMSAttest)
	pcrs      []attest.PCRSelection // instead of those asked for
	proof     func(*tpmv1.Proof)
	log       func(*tpmv1.LogChunk)
	ack       func(*tpmv1.Ack)
	pause     func(step string) // called before each answer is sent
	stall     string            // the step that is never answered
}

func newAgent(t *testing.T, h *host) *agent {
	t.Helper()
	return &agent{tpm: forge.NewTPM(t, h.maker, forge.TPMOptions{})}
}

// result is what an agent and its host get out of an attestation.
type result struct {
	attributes *nodeattestorv1.AgentAttributes
	akCert     *x509.Certificate
	caChain    [][]byte
	challenge  *tpmv1.Challenge
	proof      *tpmv1.Proof
}

func (a *agent) do(t *testing.T, h *host) (*result, error) {
	t.Helper()
	ctx := t.Context()
	if a.key != nil {
		ctx = wire.WithAgentKey(ctx, *a.key)
	}
	stream, err := h.client.Attest(ctx)
	if err != nil {
		t.Fatal(err)
	}
	r := &tpmv1.AttestRequest{
		Version: wire.Version, EkChain: a.tpm.EKChain, EkPublic: a.tpm.EKPublic, AkPublic: a.tpm.AKPublic,
		AkCreationData: a.tpm.AKCreationData, AkCreationAttest: a.tpm.AKCreationAttest, AkCreationSignature: a.tpm.AKCreationSig,
		TrustDomain: trustDomain,
	}
	if a.request != nil {
		a.request(r)
	}
	b := marshal(t, r)
	// Sends to a stream that has ended show in the next Recv.
	send := func(step string, m *nodeattestorv1.AttestRequest) {
		if a.pause != nil {
			a.pause(step)
		}
		if a.stall != step {
			_ = stream.Send(m)
		}
	}
	send("request", &nodeattestorv1.AttestRequest{Request: &nodeattestorv1.AttestRequest_Payload{Payload: b}})
	out := new(result)
	for {
		m, err := stream.Recv()
		if err != nil {
			return out, err
		}
		if out.attributes = m.GetAgentAttributes(); out.attributes != nil {
			return out, nil
		}
		answer, step := a.answer(t, m.GetChallenge(), out)
		send(step, &nodeattestorv1.AttestRequest{Request: &nodeattestorv1.AttestRequest_ChallengeResponse{ChallengeResponse: marshal(t, answer)}})
	}
}

func (a *agent) answer(t *testing.T, b []byte, out *result) (*tpmv1.AgentMessage, string) {
	t.Helper()
	m, err := wire.DecodeServer(b)
	if err != nil {
		t.Fatal(err)
	}
	switch s := m.Step.(type) {
	case *tpmv1.ServerMessage_Challenge:
		out.challenge = s.Challenge
		out.proof = a.prove(t, s.Challenge)
		return &tpmv1.AgentMessage{Step: &tpmv1.AgentMessage_Proof{Proof: out.proof}}, "proof"
	case *tpmv1.ServerMessage_LogRequest:
		log := a.eventLog
		if s.LogRequest.Kind == tpmv1.LogKind_LOG_KIND_IMA {
			log = a.imaLog
		}
		size := a.chunk
		if size == 0 {
			size = attest.LogChunk
		}
		rest := log[s.LogRequest.Offset:]
		c := &tpmv1.LogChunk{Kind: s.LogRequest.Kind, Offset: s.LogRequest.Offset, Data: rest[:min(len(rest), size)]}
		if a.log != nil {
			a.log(c)
		}
		return &tpmv1.AgentMessage{Step: &tpmv1.AgentMessage_LogChunk{LogChunk: c}}, "log"
	case *tpmv1.ServerMessage_AkCertificate:
		if out.akCert, err = x509.ParseCertificate(s.AkCertificate.Certificate); err != nil {
			t.Fatal(err)
		}
		out.caChain = s.AkCertificate.CaChain
		sum := sha256.Sum256(s.AkCertificate.Certificate)
		ack := &tpmv1.Ack{AkCertificateSha256: sum[:]}
		if a.ack != nil {
			a.ack(ack)
		}
		return &tpmv1.AgentMessage{Step: &tpmv1.AgentMessage_Ack{Ack: ack}}, "ack"
	}
	t.Fatalf("unexpected %T", m.Step)
	return nil, ""
}

func (a *agent) prove(t *testing.T, c *tpmv1.Challenge) *tpmv1.Proof {
	t.Helper()
	if a.challenge != nil {
		a.challenge(c)
	}
	activate := a.secret
	if activate == nil {
		activate = a.tpm.ActivateCredential
	}
	secret, err := activate(c.CredentialBlob, c.EncryptedSecret)
	if errors.Is(err, forge.ErrActivate) {
		secret, err = make([]byte, wire.SecretSize), nil // an attacker answers something
	}
	if err != nil {
		t.Fatal(err)
	}
	var key [32]byte
	if a.key != nil {
		key = *a.key
	}
	sel := a.pcrs
	if sel == nil {
		if sel, err = wire.SelectionsFromProto(c.Pcrs); err != nil {
			t.Fatal(err)
		}
	}
	extra := attest.NodeExtraData([32]byte(c.Nonce), a.tpm.AKName, trustDomain, key)
	att, sig, values := a.tpm.Quote(t, extra[:], sel, a.quote)
	p := &tpmv1.Proof{
		Secret: secret, Attest: att, Signature: sig, Pcrs: wire.BanksToProto(values), AgentKeySha256: key[:],
		EventLogSize: uint64(len(a.eventLog)), ImaLogSize: uint64(len(a.imaLog)),
	}
	if a.proof != nil {
		a.proof(p)
	}
	return p
}

// mustAttest fails the test unless a is attested.
func mustAttest(t *testing.T, h *host, a *agent) *result {
	t.Helper()
	r, err := a.do(t, h)
	if err != nil {
		t.Fatalf("attest: %v\n%s", err, h.logged())
	}
	return r
}

// mustRefuse fails the test unless a is refused with code for reason, without
// an AK certificate, and without a word to the caller that only the log may say.
func mustRefuse(t *testing.T, h *host, a *agent, code codes.Code, reason string) {
	t.Helper()
	before := len(h.logged())
	r, err := a.do(t, h)
	if err == nil {
		t.Fatalf("attested as %s with %v", r.attributes.SpiffeId, r.attributes.SelectorValues)
	}
	if status.Code(err) != code {
		t.Errorf("refused with %v, want code %v", err, code)
	}
	if r.akCert != nil {
		t.Error("got an AK certificate before it was refused")
	}
	if text := status.Convert(err).Message(); len(text) > 80 {
		t.Errorf("the caller is told %q", text)
	}
	if log := h.logged()[before:]; !strings.Contains(log, "reason="+reason+" ") {
		t.Errorf("the log does not say %s:\n%s", reason, log)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.attested) > 0 && h.attested[len(h.attested)-1].AKCert == nil {
		t.Error("the observer was told of a refused node")
	}
}
