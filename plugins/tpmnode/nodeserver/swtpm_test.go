package nodeserver

import (
	"context"
	"crypto/x509"
	"encoding/hex"
	"log/slog"
	"strings"
	"testing"
	"time"

	agentnodev1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/agent/nodeattestor/v1"
	nodeattestorv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/server/nodeattestor/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/rootlink/rootlink/internal/catalog"
	"github.com/rootlink/rootlink/internal/swtpmtest"
	"github.com/rootlink/rootlink/pkg/attest"
	"github.com/rootlink/rootlink/plugins/tpmnode/nodeagent"
	"github.com/rootlink/rootlink/plugins/tpmnode/wire"
	tpmv1 "github.com/rootlink/rootlink/proto/rootlink/tpm/v1"
)

// These tests run both sides of the plugin against each other on a real swtpm,
// carried between two in-memory pipes as agent and server carry them.

// realAgent is the agent side on a swtpm.
type realAgent struct {
	tpm    *swtpmtest.TPM
	client agentnodev1.NodeAttestorClient
	quoter wire.QuoterClient
}

func newRealAgent(t *testing.T, opts ...swtpmtest.Option) *realAgent {
	t.Helper()
	a := &realAgent{tpm: swtpmtest.Start(t, opts...)}
	plugin, services := nodeagent.New().Servers()
	loaded, err := catalog.LoadBuiltIn(t.Context(), catalog.BuiltIn{Name: wire.PluginName, Plugin: plugin, Services: services},
		catalog.Options{TrustDomain: trustDomain, Log: slog.New(slog.NewTextHandler(testWriter{t}, nil))})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := loaded.Close(); err != nil {
			t.Error(err)
		}
	})
	if err := loaded.Configure(t.Context(), "tpm_path = \""+a.tpm.Device()+"\"\ndata_dir = \""+t.TempDir()+"\"\n"); err != nil {
		t.Fatal(err)
	}
	if a.client, err = loaded.AgentNodeAttestor(); err != nil {
		t.Fatal(err)
	}
	if err := loaded.Bind(&a.quoter); err != nil {
		t.Fatal(err)
	}
	return a
}

type testWriter struct{ t *testing.T }

func (w testWriter) Write(b []byte) (int, error) {
	w.t.Log(strings.TrimSpace(string(b)))
	return len(b), nil
}

// relay carries one attestation between the two plugins.
func (a *realAgent) relay(t *testing.T, h *host, agentKey, serverKey *[32]byte) (*nodeattestorv1.AgentAttributes, error) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	with := func(k *[32]byte) context.Context {
		if k == nil {
			return ctx
		}
		return wire.WithAgentKey(ctx, *k)
	}
	up, err := a.client.AidAttestation(with(agentKey))
	if err != nil {
		t.Fatal(err)
	}
	down, err := h.client.Attest(with(serverKey))
	if err != nil {
		t.Fatal(err)
	}
	for {
		m, err := up.Recv()
		if err != nil {
			t.Fatalf("agent side: %v", err)
		}
		r := &nodeattestorv1.AttestRequest{Request: &nodeattestorv1.AttestRequest_ChallengeResponse{ChallengeResponse: m.GetChallengeResponse()}}
		if p := m.GetPayload(); p != nil {
			r.Request = &nodeattestorv1.AttestRequest_Payload{Payload: p}
		}
		if err := down.Send(r); err != nil {
			t.Fatal(err)
		}
		answer, err := down.Recv()
		if err != nil {
			return nil, err
		}
		if attrs := answer.GetAgentAttributes(); attrs != nil {
			return attrs, nil
		}
		if err := up.Send(&agentnodev1.Challenge{Challenge: answer.GetChallenge()}); err != nil {
			t.Fatal(err)
		}
	}
}

// trust makes h take the EK certificates of the swtpm's maker.
func (h *host) trust(t *testing.T, a *realAgent) {
	t.Helper()
	h.write(t, "roots.pem", string(a.tpm.RootPEM())+string(a.tpm.Maker.IntermediatePEM()))
	if err := h.loaded.Configure(t.Context(), h.hcl("")); err != nil {
		t.Fatal(err)
	}
}

func TestSWTPMAttestsAndItsLeafEvidenceVerifies(t *testing.T) {
	h := newHostAt(t, time.Now(), "", nil)
	a := newRealAgent(t)
	h.trust(t, a)
	key := &[32]byte{7}
	attrs, err := a.relay(t, h, key, key)
	if err != nil {
		t.Fatalf("%v\n%s", err, h.logged())
	}
	node := h.attested[0]
	if attrs.SpiffeId != wire.AgentID(trustDomain, node.EK.Hash) || !node.KeyBound {
		t.Errorf("attributes %v, key bound %t", attrs, node.KeyBound)
	}
	if !node.AK.Software || node.AK.Manufacturer != "IBM" {
		t.Errorf("a software TPM is labelled %+v", node.AK)
	}
	if h.alarmKinds() != "" {
		t.Errorf("alarms %s", h.alarmKinds())
	}

	// The AK certificate does its work: evidence for one leaf verifies with it.
	svidKey, nonces := [32]byte{3}, attest.NewNonceMaker([32]byte{1})
	nonce := nonces.Make(attrs.SpiffeId, time.Now())
	resp, err := a.quoter.Quote(t.Context(), &tpmv1.QuoteRequest{Leaf: &tpmv1.Leaf{
		Kind: 1, KeyOrigin: 1, TrustDomain: trustDomain, SpiffeId: "spiffe://example.org/build",
		SvidKeySha256: svidKey[:], AgentKeySha256: key[:], Executable: make([]byte, 32), Recorder: make([]byte, 32),
		Tool: make([]byte, 32), Payload: make([]byte, 32), Selectors: []string{"binary:sha256:" + hex.EncodeToString(svidKey[:])}, Nonce: nonce[:],
	}})
	if err != nil {
		t.Fatal(err)
	}
	e, err := attest.ParseRecord(resp.Evidence)
	if err != nil {
		t.Fatal(err)
	}
	roots, err := h.plugin.EKRoots()
	if err != nil {
		t.Fatal(err)
	}
	_, checks, err := attest.Verify(e, attest.Binding{
		TrustDomain: trustDomain, SPIFFEID: "spiffe://example.org/build", SVIDKey: svidKey, AgentKey: key, EKHash: &node.EK.Hash, At: time.Now(),
	}, attest.Options{
		AttestationCAs: []*x509.Certificate{h.plugin.AttestationCA().Certificate()}, EK: roots, RequiredPCRs: attest.DefaultPCRs(),
		CheckNonce: func(n [32]byte) error { return nonces.Check(n, attrs.SpiffeId, time.Now()) },
	})
	if err != nil {
		t.Errorf("%v\n%+v", err, checks)
	}
}

func TestSWTPMUnderAStockHost(t *testing.T) {
	h := newHostAt(t, time.Now(), "", nil)
	a := newRealAgent(t)
	h.trust(t, a)
	if _, err := a.relay(t, h, nil, nil); err != nil {
		t.Fatalf("%v\n%s", err, h.logged())
	}
	if h.attested[0].KeyBound {
		t.Error("a key that nobody named is said to be bound")
	}
	// Only one side knows the key: whoever stands between must not get away with it.
	key := &[32]byte{7}
	for _, pair := range [][2]*[32]byte{{key, nil}, {nil, key}, {key, {8}}} {
		if _, err := a.relay(t, h, pair[0], pair[1]); status.Code(err) != codes.PermissionDenied {
			t.Errorf("keys %v: %v", pair, err)
		}
	}
}

func TestSWTPMOnTheAllowListIsLabelledSoftware(t *testing.T) {
	h := newHostAt(t, time.Now(), "", nil)
	a := newRealAgent(t)
	info, err := a.quoter.Info(t.Context(), &tpmv1.InfoRequest{})
	if err != nil {
		t.Fatal(err)
	}
	h.write(t, "allow", hex.EncodeToString(info.EkSha256))
	if _, err := a.relay(t, h, nil, nil); err != nil {
		t.Fatalf("%v\n%s", err, h.logged())
	}
	if node := h.attested[0]; node.EK.Basis != attest.BasisAllowList || !node.AK.Software {
		t.Errorf("basis %s, labelled %+v", node.EK.Basis, node.AK)
	}
}

func TestSWTPMThatWasClearedIsTheSameNodeWithAnAlarm(t *testing.T) {
	h := newHostAt(t, time.Now(), "", nil)
	a := newRealAgent(t)
	h.trust(t, a)
	first, err := a.relay(t, h, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	a.tpm.Clear()
	h.advance(time.Minute)
	second, err := a.relay(t, h, nil, nil)
	if err != nil {
		t.Fatalf("%v\n%s", err, h.logged())
	}
	if first.SpiffeId != second.SpiffeId {
		t.Errorf("%s became %s", first.SpiffeId, second.SpiffeId)
	}
	if h.alarmKinds() != "ak_changed:false" {
		t.Errorf("alarms %q", h.alarmKinds())
	}
}

// TestSWTPMAfterAPowerCutIsTheSameNode: a reset that nobody announced (safe=0,
// the clock may have gone back) is no alarm at the next attestation, and the
// counter that evidence is judged by has moved.
func TestSWTPMAfterAPowerCutIsTheSameNode(t *testing.T) {
	h := newHostAt(t, time.Now(), "refuse_ak_change = true", nil)
	a := newRealAgent(t)
	h.trust(t, a)
	first, err := a.relay(t, h, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	a.tpm.RestartUnclean()
	h.advance(time.Minute)
	second, err := a.relay(t, h, nil, nil)
	if err != nil {
		t.Fatalf("%v\n%s", err, h.logged())
	}
	if first.SpiffeId != second.SpiffeId || h.alarmKinds() != "" {
		t.Errorf("%s became %s, alarms %q", first.SpiffeId, second.SpiffeId, h.alarmKinds())
	}
	before, after := h.attested[0].Quote, h.attested[1].Quote
	if after.ResetCount <= before.ResetCount || after.Safe {
		t.Errorf("reset count %d after %d, safe %t", after.ResetCount, before.ResetCount, after.Safe)
	}
}

// TestRefusesSWTPMThatWasClearedWhereConfigured: whoever wants to hear of each
// new AK from a person first.
func TestRefusesSWTPMThatWasClearedWhereConfigured(t *testing.T) {
	h := newHostAt(t, time.Now(), "", nil)
	a := newRealAgent(t)
	h.trust(t, a)
	if err := h.loaded.Configure(t.Context(), h.hcl("refuse_ak_change = true")); err != nil {
		t.Fatal(err)
	}
	if _, err := a.relay(t, h, nil, nil); err != nil {
		t.Fatal(err)
	}
	a.tpm.Clear()
	h.advance(time.Minute)
	if _, err := a.relay(t, h, nil, nil); status.Code(err) != codes.PermissionDenied {
		t.Errorf("got %v", err)
	}
	if h.alarmKinds() != "ak_changed:true" {
		t.Errorf("alarms %q", h.alarmKinds())
	}
}
