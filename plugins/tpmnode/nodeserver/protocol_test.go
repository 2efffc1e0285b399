package nodeserver

import (
	"context"
	"encoding/hex"
	"encoding/pem"
	"strings"
	"testing"
	"time"

	nodeattestorv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/server/nodeattestor/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/rootlink/rootlink/pkg/attest"
	"github.com/rootlink/rootlink/plugins/tpmnode/wire"
	tpmv1 "github.com/rootlink/rootlink/proto/rootlink/tpm/v1"
)

func TestRefusesOversizedMessages(t *testing.T) {
	h := newHost(t, "", nil)
	for name, tt := range map[string]struct {
		bend   func(*agent)
		reason string
	}{
		"request": {func(a *agent) {
			a.request = func(r *tpmv1.AttestRequest) { r.AkPublic = make([]byte, wire.MaxRequest) }
		}, "too_large"},
		"long chain":  {func(a *agent) { a.request = func(r *tpmv1.AttestRequest) { r.EkChain = make([][]byte, 1000) } }, "too_large"},
		"proof":       {func(a *agent) { a.proof = func(p *tpmv1.Proof) { p.Signature = make([]byte, wire.MaxProof) } }, "too_large"},
		"nonsense":    {func(a *agent) { a.request = func(r *tpmv1.AttestRequest) { r.AkPublic = nil } }, "malformed"},
		"new version": {func(a *agent) { a.request = func(r *tpmv1.AttestRequest) { r.Version = 99 } }, "version"},
	} {
		t.Run(name, func(t *testing.T) {
			a := newAgent(t, h)
			tt.bend(a)
			code := codes.InvalidArgument
			if tt.reason == "version" {
				code = codes.PermissionDenied
			}
			mustRefuse(t, h, a, code, tt.reason)
		})
	}
}

func TestRefusesOversizedLogs(t *testing.T) {
	h := newHost(t, "want_ima_log = true", nil)
	log := make([]byte, 2*attest.LogChunk)
	for name, bend := range map[string]func(*agent){
		"event log announced too large": func(a *agent) { a.proof = func(p *tpmv1.Proof) { p.EventLogSize = attest.MaxEventLog + 1 } },
		"IMA log announced too large":   func(a *agent) { a.proof = func(p *tpmv1.Proof) { p.ImaLogSize = attest.MaxIMALog + 1 } },
		"more than announced":           func(a *agent) { a.proof = func(p *tpmv1.Proof) { p.EventLogSize = attest.LogChunk / 2 } },
		"chunk too large":               func(a *agent) { a.chunk = attest.LogChunk + 1 },
	} {
		t.Run(name, func(t *testing.T) {
			a := newAgent(t, h)
			a.eventLog, a.imaLog = log, log
			bend(a)
			mustRefuse(t, h, a, codes.InvalidArgument, "too_large")
		})
	}
	for name, bend := range map[string]func(*agent){
		"byte by byte":   func(a *agent) { a.chunk = 1 },
		"another log":    func(a *agent) { a.log = func(c *tpmv1.LogChunk) { c.Kind = tpmv1.LogKind_LOG_KIND_IMA } },
		"another offset": func(a *agent) { a.log = func(c *tpmv1.LogChunk) { c.Offset++ } },
	} {
		t.Run(name, func(t *testing.T) {
			a := newAgent(t, h)
			a.eventLog, a.imaLog = log, log
			bend(a)
			mustRefuse(t, h, a, codes.InvalidArgument, "log")
		})
	}
	if n := h.plugin.logs.Load(); n != 0 {
		t.Errorf("%d bytes of logs are still counted", n)
	}
}

func TestLogsOfAllSessionsTogetherAreBounded(t *testing.T) {
	h := newHost(t, "", nil)
	h.plugin.logs.Add(maxLogBytes)
	a := newAgent(t, h)
	a.eventLog = []byte("log")
	mustRefuse(t, h, a, codes.Unavailable, "busy")
	h.plugin.logs.Add(-maxLogBytes)
	mustAttest(t, h, a)
}

func TestRefusesTooManySessions(t *testing.T) {
	h := newHost(t, "", nil)
	var held []*slot
	for i := range maxSessions { // each of a TPM that answered
		x := h.plugin.slots.take(func(error) { t.Error("a TPM that answered made room") })
		h.plugin.slots.prove(x, [32]byte{byte(i), byte(i >> 8), 1})
		held = append(held, x)
	}
	mustRefuse(t, h, newAgent(t, h), codes.Unavailable, "busy")
	for _, x := range held {
		h.plugin.slots.release(x)
	}
	mustAttest(t, h, newAgent(t, h))
}

func TestStalledAgentHitsTheRoundDeadline(t *testing.T) {
	for _, step := range []string{"request", "proof", "ack"} {
		t.Run(step, func(t *testing.T) {
			h := newHost(t, `round_timeout = "30ms"`, nil)
			a := newAgent(t, h)
			a.stall = step
			if _, err := a.do(t, h); status.Code(err) != codes.DeadlineExceeded {
				t.Errorf("got %v", err)
			}
			if h.plugin.slots.len() != 0 {
				t.Error("the session's slot is lost")
			}
		})
	}
}

func TestRefusesMessagesOutOfTurn(t *testing.T) {
	h := newHost(t, "", nil)
	stream, err := h.client.Attest(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(&nodeattestorv1.AttestRequest{Request: &nodeattestorv1.AttestRequest_ChallengeResponse{ChallengeResponse: []byte{1}}}); err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); status.Code(err) != codes.InvalidArgument {
		t.Errorf("got %v", err)
	}
	a := newAgent(t, h)
	a.ack = func(k *tpmv1.Ack) { k.AkCertificateSha256[0] ^= 1 }
	if _, err := a.do(t, h); status.Code(err) != codes.InvalidArgument {
		t.Errorf("a wrong acknowledgement: %v", err)
	}
	if len(h.attested) != 0 {
		t.Error("observed a node that never acknowledged")
	}
}

func TestNewerOfTwoAgentsOnOneTPMWins(t *testing.T) {
	h := newHost(t, "", nil)
	older, newer := newAgent(t, h), new(agent)
	newer.tpm = older.tpm
	older.key, newer.key = &[32]byte{1}, &[32]byte{2}
	older.pause = func(step string) {
		if step == "proof" { // its challenge is out, the newer one's is not
			older.pause = nil
			mustAttest(t, h, newer)
		}
	}
	_, err := older.do(t, h)
	if status.Code(err) != codes.Aborted {
		t.Errorf("the older agent: %v", err)
	}
	if h.alarmKinds() != "two_agents:true" {
		t.Errorf("alarms %q", h.alarmKinds())
	}
	if len(h.attested) != 1 || h.attested[0].AgentKey != *newer.key {
		t.Errorf("observed %d nodes", len(h.attested))
	}
}

func TestAlarmsWhenTwoAgentsTakeTurns(t *testing.T) {
	h := newHost(t, "", nil)
	a := newAgent(t, h)
	for i, key := range []byte{1, 2, 1} {
		a.key = &[32]byte{key}
		mustAttest(t, h, a)
		h.advance(10 * time.Minute)
		if got := h.alarmKinds() != ""; got != (i == 2) {
			t.Errorf("attestation %d: alarms %q", i, h.alarmKinds())
		}
	}
}

func TestAttestBeforeConfigureIsRefused(t *testing.T) {
	h := newHost(t, "", nil)
	h.plugin.state.Store(nil)
	if _, err := newAgent(t, h).do(t, h); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("got %v", err)
	}
}

// A plugin outside of our server has no interceptor around it.
func TestPanicEndsTheSessionOnly(t *testing.T) {
	h := newHost(t, "", func(o *Options) {
		o.Banned = func(context.Context, string) (bool, error) { panic("a bug") }
	})
	_, err := newAgent(t, h).do(t, h)
	if status.Code(err) != codes.Internal || strings.Contains(err.Error(), "bug") {
		t.Errorf("got %v", err)
	}
	if h.plugin.slots.len() != 0 {
		t.Error("the session's slot is lost")
	}
}

func TestRefusesWithAnExpiredCA(t *testing.T) {
	h := newHost(t, "", nil)
	a := newAgent(t, h)
	h.advance(9 * 365 * 24 * time.Hour)
	mustAttest(t, h, a)
	ca := h.plugin.AttestationCA().Certificate()
	h.mu.Lock()
	h.now = ca.NotAfter.Add(time.Hour)
	h.mu.Unlock()
	h.write(t, "allow", hex.EncodeToString(a.tpm.EKHash[:])) // the EK certificate has ended too
	mustRefuse(t, h, a, codes.Unavailable, "ca_expired")
}

func TestNeverTrustsAnIntermediateByItself(t *testing.T) {
	h := newHost(t, "", nil)
	h.write(t, "roots.pem", string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: h.maker.Intermediate.Raw})))
	if err := h.loaded.Configure(t.Context(), h.hcl("")); err == nil {
		t.Error("an intermediate passes for a root")
	}
}
