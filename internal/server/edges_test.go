package server

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"
	"time"

	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/rootlink/rootlink/internal/forge"
	"github.com/rootlink/rootlink/internal/needs"
	"github.com/rootlink/rootlink/internal/store"
	"github.com/rootlink/rootlink/pkg/attest"
	"github.com/rootlink/rootlink/plugins/tpmnode/wire"
)

func TestRefusesWorkloadKeyThatTheAgentDidNotMake(t *testing.T) {
	_, n, _, workload := issuer(t, nil)
	q := n.web()
	q.leaf.KeyOrigin = attest.OriginCaller
	n.refused("key_origin", workload, n.csr(q))
}

func TestRefusesWorkloadLeafWithToolOrRecorder(t *testing.T) {
	_, n, _, workload := issuer(t, nil)
	for _, bend := range []func(*attest.Leaf){
		func(l *attest.Leaf) { l.Tool = hashOf("nginx") },
		func(l *attest.Leaf) { l.Recorder = hashOf("rootlink") },
	} {
		q := n.web()
		bend(&q.leaf)
		n.refused("role", workload, n.csr(q))
	}
}

// An agent that names one key and sends the CSR of another would be recorded
// as bound to a key that it does not use.
func TestRefusesAgentKeyOtherThanTheCSRs(t *testing.T) {
	w := newWorld(t, nil)
	stream, err := agentv1.NewAgentClient(w.dialTCP(nil)).AttestAgent(wire.WithAgentKey(t.Context(), hashOf("another key")))
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(&agentv1.AttestAgentRequest{Step: &agentv1.AttestAgentRequest_Params_{Params: &agentv1.AttestAgentRequest_Params{
		Data: &types.AttestationData{Type: wire.PluginName, Payload: []byte("x")}, Params: &agentv1.AgentX509SVIDParams{Csr: newCSR(t, forge.P256(t), nil)},
	}}}); err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); status.Code(err) != codes.InvalidArgument || status.Convert(err).Message() != "the agent key named is not that of the CSR" {
		t.Fatal(err)
	}
}

func TestExpiredAliasOpensNothing(t *testing.T) {
	w := newWorld(t, nil)
	n := w.attest(w.newTPM(), attestOptions{})
	alias := entry("spiffe://"+td+"/spire/server", "/all", "tpmnode:ek_basis:maker")
	alias.ExpiresAt = w.clock.Now().Add(time.Minute).Unix()
	w.create(alias)
	id := w.create(entry("spiffe://"+td+"/all", "/web", "binary:uid:33"))
	count := func() int {
		t.Helper()
		resp, err := entryv1.NewEntryClient(n.conn).GetAuthorizedEntries(t.Context(), &entryv1.GetAuthorizedEntriesRequest{})
		if err != nil {
			t.Fatal(err)
		}
		return len(resp.Entries)
	}
	if count() != 1 {
		t.Fatal("the alias does not work")
	}
	w.clock.add(2 * time.Minute)
	if count() != 0 {
		t.Error("an expired alias still opens its entries")
	}
	n.refused("entry", id, newCSR(t, forge.P256(t), nil))
}

func TestQuotedSelectors(t *testing.T) {
	bank := func(v byte) []attest.PCRBank {
		return []attest.PCRBank{{Bank: "sha256", Values: map[uint32][]byte{4: {4}, 7: {v}}}}
	}
	a := &store.Agent{
		AttestationType: "tpmnode", Attestation: &store.Attestation{PCRs: bank(7)},
		Selectors: []store.Selector{
			{Type: "other", Value: "secure_boot:true"},
			{Type: "tpmnode", Value: "ek:0"},
			{Type: "tpmnode", Value: "pcr:sha256:4:04"},
			{Type: "tpmnode", Value: "pcr:sha256:7:07"},
			{Type: "tpmnode", Value: "pcr:sha256:9:09"},
			{Type: "tpmnode", Value: "secure_boot:true"},
		},
	}
	for name, c := range map[string]struct {
		v    byte
		want []string
	}{
		"unchanged": {7, []string{"other:secure_boot:true", "tpmnode:ek:0", "tpmnode:pcr:sha256:4:04", "tpmnode:pcr:sha256:7:07", "tpmnode:secure_boot:true"}},
		"changed":   {8, []string{"other:secure_boot:true", "tpmnode:ek:0", "tpmnode:pcr:sha256:4:04"}},
	} {
		var got []string
		for _, s := range quotedSelectors(a, bank(c.v)) {
			got = append(got, s.String())
		}
		if len(got) != len(c.want) {
			t.Fatalf("%s: %v, want %v", name, got, c.want)
		}
		for i := range got {
			if got[i] != c.want[i] {
				t.Errorf("%s: %v, want %v", name, got, c.want)
			}
		}
	}
}

// A reply that would not fit a client's 4 MiB is cut short, in request order,
// and what is cut has not been decided on.
func TestBatchIsCutToFit(t *testing.T) {
	_, n, _, workload := issuer(t, nil)
	big := bytes.Repeat([]byte{0}, maxCSR)
	req := new(svidv1.BatchNewX509SVIDRequest)
	req.Params = append(req.Params, &svidv1.NewX509SVIDParams{EntryId: workload, Csr: newCSR(t, forge.P256(t), nil)})
	for range 50 {
		req.Params = append(req.Params, &svidv1.NewX509SVIDParams{EntryId: workload, Csr: big})
	}
	before := n.w.srv.Counters()["issue_refused/csr"]
	resp, err := svidv1.NewSVIDClient(n.conn).BatchNewX509SVID(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	if len(resp.Results) == 0 || len(resp.Results) >= 50 || resp.Results[0].Status.Code != 0 {
		t.Fatalf("%d results, first %v", len(resp.Results), resp.Results[0].Status)
	}
	for _, r := range resp.Results {
		if r.Status == nil {
			t.Fatal("a result without a status")
		}
	}
	if decided := n.w.srv.Counters()["issue_refused/csr"] - before; int(decided) != len(resp.Results)-1 {
		t.Errorf("%d were decided on, %d answered", decided, len(resp.Results)-1)
	}
	req.Params = make([]*svidv1.NewX509SVIDParams, maxCSRs+1)
	for i := range req.Params {
		req.Params[i] = &svidv1.NewX509SVIDParams{}
	}
	if _, err := svidv1.NewSVIDClient(n.conn).BatchNewX509SVID(t.Context(), req); status.Code(err) != codes.ResourceExhausted {
		t.Fatal(err)
	}
}

func TestRefusesKeyFileOfSomebodyElse(t *testing.T) {
	needs.Root(t)
	w := newWorld(t, nil)
	w.stop()
	if err := os.Chown(filepath.Join(w.cfg.DataDir, "trust.key"), 65534, 65534); err != nil {
		t.Fatal(err)
	}
	if err := w.tryNew(nil); err == nil {
		t.Fatal("started on a key of somebody else's")
	}
}
