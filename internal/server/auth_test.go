package server

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"log/slog"
	"strings"
	"testing"
	"time"

	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/rootlink/rootlink/internal/forge"
	"github.com/rootlink/rootlink/internal/store"
	tpmv1 "github.com/rootlink/rootlink/proto/rootlink/tpm/v1"
)

// Every call of every service, by every kind of caller: what is not listed as
// open is closed.
func TestWhoMayCallWhat(t *testing.T) {
	w := newWorld(t, nil)
	n := w.attest(w.newTPM(), attestOptions{})
	e := entry(n.id, "/operator", "binary:uid:0")
	e.Admin = true
	w.create(e)
	w.create(entry(n.id, "/web", "binary:uid:33"))
	callers := map[string]*grpc.ClientConn{
		"local": w.admin, "nobody": w.dialTCP(nil), "agent": n.conn,
		"admin":    w.dialTCP(w.mint("/operator")),
		"workload": w.dialTCP(w.mint("/web")),
	}
	open := map[string]string{
		"/spire.api.server.agent.v1.Agent/AttestAgent":           "local nobody agent admin workload",
		"/spire.api.server.bundle.v1.Bundle/GetBundle":           "local nobody agent admin workload",
		"/rootlink.node.v1.Node/GetSignedBundle":                 "local nobody agent admin workload",
		"/spire.api.server.agent.v1.Agent/RenewAgent":            "agent",
		"/spire.api.server.agent.v1.Agent/PostStatus":            "agent",
		"/spire.api.server.entry.v1.Entry/GetAuthorizedEntries":  "agent",
		"/spire.api.server.entry.v1.Entry/SyncAuthorizedEntries": "agent",
		"/spire.api.server.svid.v1.SVID/BatchNewX509SVID":        "agent",
		"/spire.api.server.svid.v1.SVID/NewJWTSVID":              "agent",
		"/rootlink.node.v1.Node/GetNonce":                        "agent",
		"/rootlink.node.v1.Node/GetConfig":                       "agent",
		"/spire.api.server.bundle.v1.Bundle/GetFederatedBundle":  "local agent admin",
		"/spire.api.server.logger.v1.Logger/GetLogger":           "local",
		"/spire.api.server.logger.v1.Logger/SetLogLevel":         "local",
		"/spire.api.server.logger.v1.Logger/ResetLogLevel":       "local",
		"/spire.api.server.debug.v1.Debug/GetInfo":               "local",
	}
	methods := 0
	g := grpc.NewServer()
	w.srv.register(g)
	for service, info := range g.GetServiceInfo() {
		var names []string
		for _, m := range info.Methods {
			names = append(names, "/"+service+"/"+m.Name)
		}
		for _, method := range names {
			methods++
			allowed, ok := open[method]
			if !ok {
				allowed = "local admin"
			}
			for who, conn := range callers {
				err := callEmpty(t, conn, method)
				denied := status.Code(err) == codes.PermissionDenied && reasonOf(err) == types.PermissionDeniedDetails_UNKNOWN
				if want := !strings.Contains(allowed, who); denied != want {
					t.Errorf("%s by %s: denied %t, want %t (%v)", method, who, denied, want, err)
				}
				// What this server does not have says what to do instead.
				if m := status.Convert(err).Message(); status.Code(err) == codes.Unimplemented && (strings.HasSuffix(m, "not implemented") || len(m) < 40) {
					t.Errorf("%s is unimplemented without a sentence: %q", method, m)
				}
			}
		}
	}
	if methods < 55 {
		t.Fatalf("only %d methods tried", methods)
	}
}

// callEmpty makes a call with an empty message.
func callEmpty(t *testing.T, conn *grpc.ClientConn, method string) error {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	s, err := conn.NewStream(ctx, &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, method)
	if err != nil {
		return err
	}
	// io.EOF: the server has answered already, and RecvMsg says what.
	if err := s.SendMsg(new(bundlev1.GetBundleRequest)); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	if err := s.CloseSend(); err != nil {
		return err
	}
	return s.RecvMsg(new(bundlev1.CountBundlesRequest))
}

// mint has an administrator make an SVID.
func (w *world) mint(path string) *tls.Certificate {
	w.t.Helper()
	key := forge.P256(w.t)
	id, _ := spiffeURL("spiffe://" + td + path)
	resp, err := svidv1.NewSVIDClient(w.admin).MintX509SVID(w.t.Context(), &svidv1.MintX509SVIDRequest{Csr: newCSR(w.t, key, &x509.CertificateRequest{URIs: id})})
	if err != nil {
		w.t.Fatal(err)
	}
	return &tls.Certificate{Certificate: resp.Svid.CertChain, PrivateKey: key}
}

func (n *node) sync() error {
	_, err := entryv1.NewEntryClient(n.conn).GetAuthorizedEntries(n.w.t.Context(), &entryv1.GetAuthorizedEntriesRequest{})
	return err
}

func wantReason(t *testing.T, err error, want types.PermissionDeniedDetails_Reason) {
	t.Helper()
	if status.Code(err) != codes.PermissionDenied || reasonOf(err) != want {
		t.Fatalf("%v with reason %v, want %v", err, reasonOf(err), want)
	}
}

func TestEvictedAgentIsToldToAttestAgain(t *testing.T) {
	w := newWorld(t, nil)
	n := w.attest(w.newTPM(), attestOptions{})
	if _, err := w.agents().DeleteAgent(t.Context(), &agentv1.DeleteAgentRequest{Id: idToProto(n.id)}); err != nil {
		t.Fatal(err)
	}
	wantReason(t, n.sync(), types.PermissionDeniedDetails_AGENT_NOT_ATTESTED)
	if err := w.attest(n.tpm, attestOptions{}).sync(); err != nil {
		t.Fatal(err)
	}
	wantReason(t, n.sync(), types.PermissionDeniedDetails_AGENT_NOT_ACTIVE) // the SVID from before
}

func TestBannedAgentStaysOutUntilItIsDeleted(t *testing.T) {
	w := newWorld(t, nil)
	n := w.attest(w.newTPM(), attestOptions{})
	ban := func() {
		t.Helper()
		if _, err := w.agents().BanAgent(t.Context(), &agentv1.BanAgentRequest{Id: idToProto(n.id)}); err != nil {
			t.Fatal(err)
		}
	}
	ban()
	wantReason(t, n.sync(), types.PermissionDeniedDetails_AGENT_BANNED)
	_, err := w.tryAttest(n.tpm, attestOptions{})
	wantReason(t, err, types.PermissionDeniedDetails_AGENT_BANNED)
	if _, err := w.agents().DeleteAgent(t.Context(), &agentv1.DeleteAgentRequest{Id: idToProto(n.id)}); err != nil {
		t.Fatal(err)
	}
	// And a ban that is acknowledged while an attestation runs holds.
	n = w.attest(n.tpm, attestOptions{})
	_, err = w.tryAttest(n.tpm, attestOptions{pause: ban})
	wantReason(t, err, types.PermissionDeniedDetails_AGENT_BANNED)
	a, err := w.agents().GetAgent(t.Context(), &agentv1.GetAgentRequest{Id: idToProto(n.id)})
	if err != nil || !a.Banned {
		t.Fatalf("%v, %v", a, err)
	}
}

// TestRefusesEvictedNodeThatWasBannedSince: the ban of a node that is not there
// any more keeps it from coming back.
func TestRefusesEvictedNodeThatWasBannedSince(t *testing.T) {
	w := newWorld(t, nil)
	n := w.attest(w.newTPM(), attestOptions{})
	id := idToProto(n.id)
	if _, err := w.agents().DeleteAgent(t.Context(), &agentv1.DeleteAgentRequest{Id: id}); err != nil {
		t.Fatal(err)
	}
	if _, err := w.agents().BanAgent(t.Context(), &agentv1.BanAgentRequest{Id: id}); err != nil {
		t.Fatal(err)
	}
	wantReason(t, n.sync(), types.PermissionDeniedDetails_AGENT_BANNED)
	_, err := w.tryAttest(n.tpm, attestOptions{})
	wantReason(t, err, types.PermissionDeniedDetails_AGENT_BANNED)
	if list, err := w.agents().ListAgents(t.Context(), &agentv1.ListAgentsRequest{}); err != nil || len(list.Agents) != 1 || !list.Agents[0].Banned {
		t.Fatalf("%v, %v", list, err)
	}
}

func TestNewAttestationEndsTheSVIDBefore(t *testing.T) {
	w := newWorld(t, nil)
	n := w.attest(w.newTPM(), attestOptions{})
	again := w.attest(n.tpm, attestOptions{})
	wantReason(t, n.sync(), types.PermissionDeniedDetails_AGENT_NOT_ACTIVE)
	if err := again.sync(); err != nil {
		t.Fatal(err)
	}
}

// A connection that was made in time does not outlive the certificate.
func TestExpiredAgentOnALivingConnection(t *testing.T) {
	w := newWorld(t, nil)
	n := w.attest(w.newTPM(), attestOptions{})
	if err := n.sync(); err != nil {
		t.Fatal(err)
	}
	w.clock.add(DefaultAgentTTL + time.Second)
	wantReason(t, n.sync(), types.PermissionDeniedDetails_AGENT_EXPIRED)
	n.conn = w.dialTCP(&tls.Certificate{Certificate: [][]byte{n.cert.Raw}, PrivateKey: n.key})
	if err := n.sync(); err == nil {
		t.Fatal("an expired certificate makes a connection")
	}
}

// Renewal keeps both SVIDs alive until the new one is used. Nodes that can
// attest again must: a renewed key would rest on a quote that never saw it.
func TestRenewAgent(t *testing.T) {
	w := newWorld(t, nil)
	n := w.attest(w.newTPM(), attestOptions{})
	key := forge.P256(t)
	renew := func(conn *grpc.ClientConn) (*agentv1.RenewAgentResponse, error) {
		return agentv1.NewAgentClient(conn).RenewAgent(t.Context(), &agentv1.RenewAgentRequest{Params: &agentv1.AgentX509SVIDParams{Csr: newCSR(t, key, nil)}})
	}
	_, err := renew(n.conn)
	wantReason(t, err, types.PermissionDeniedDetails_AGENT_MUST_REATTEST)

	a, err := w.srv.Store().Agent(n.id)
	if err != nil {
		t.Fatal(err)
	}
	once := *a
	once.CanReattest = false
	if _, err := w.srv.Store().PutAttestedAgent(t.Context(), once, ""); err != nil {
		t.Fatal(err)
	}
	resp, err := renew(n.conn)
	if err != nil {
		t.Fatal(err)
	}
	if err := n.sync(); err != nil {
		t.Fatalf("the SVID in use ended before the new one was used: %v", err)
	}
	renewed := *n
	renewed.conn = w.dialTCP(&tls.Certificate{Certificate: resp.Svid.CertChain, PrivateKey: key})
	if err := renewed.sync(); err != nil {
		t.Fatal(err)
	}
	wantReason(t, n.sync(), types.PermissionDeniedDetails_AGENT_NOT_ACTIVE)
}

func TestRefusesClientCertificateOfAnotherAuthority(t *testing.T) {
	w := newWorld(t, nil)
	n := w.attest(w.newTPM(), attestOptions{})
	key := forge.P256(t)
	fake := forge.Sign(t, &x509.Certificate{
		URIs: n.cert.URIs, KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
		NotBefore: w.clock.Now().Add(-time.Minute), NotAfter: w.clock.Now().Add(time.Hour), BasicConstraintsValid: true,
	}, nil, key.Public(), key)
	conn := w.dialTCP(&tls.Certificate{Certificate: [][]byte{fake.Raw}, PrivateKey: key})
	_, err := bundlev1.NewBundleClient(conn).GetBundle(t.Context(), &bundlev1.GetBundleRequest{})
	if status.Code(err) != codes.Unavailable {
		t.Fatalf("a made-up certificate got through the handshake: %v", err)
	}
}

func TestRefusesProofOverAnotherAgentKey(t *testing.T) {
	w := newWorld(t, nil)
	other := hashOf("a thief's key")
	_, err := w.tryAttest(w.newTPM(), attestOptions{proof: func(p *tpmv1.Proof) { p.AgentKeySha256 = other[:] }})
	if status.Code(err) != codes.PermissionDenied {
		t.Fatal(err)
	}
	// Saying one key and binding none.
	_, err = w.tryAttest(w.newTPM(), attestOptions{proof: func(p *tpmv1.Proof) { p.AgentKeySha256 = make([]byte, 32) }})
	if status.Code(err) != codes.PermissionDenied {
		t.Fatal(err)
	}
	agents, err := w.srv.Store().Agents()
	if err != nil || len(agents) != 0 {
		t.Fatalf("%d agents are recorded, %v", len(agents), err)
	}
}

func TestRefusesTPMOfAnotherMaker(t *testing.T) {
	w := newWorld(t, nil)
	stranger := forge.NewMaker(t, "Forge Semiconductor") // of the same name
	_, err := w.tryAttest(forge.NewTPM(t, stranger, forge.TPMOptions{}), attestOptions{})
	if status.Code(err) != codes.PermissionDenied {
		t.Fatal(err)
	}
}

func TestAttestationsOfOneAddressAreLimited(t *testing.T) {
	var log bytes.Buffer
	w := newWorld(t, func(c *Config) {
		c.AttestationRate, c.AttestationBurst, c.RoundTimeout = 0.001, 2, 200*time.Millisecond
		c.Log = slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelWarn}))
	})
	for range 2 {
		w.attest(w.newTPM(), attestOptions{})
	}
	_, err := w.tryAttest(w.newTPM(), attestOptions{})
	if status.Code(err) != codes.ResourceExhausted {
		t.Fatal(err)
	}
	// It keeps nobody else's calls waiting.
	bundleOf(t, w.dialTCP(nil))
	if n := w.srv.Counters()["attest_refused/resource_exhausted"]; n != 1 || strings.Contains(log.String(), "node attestation failed") {
		t.Errorf("%d counted; a flood fills the log:\n%s", n, log.String())
	}
}

func TestStalledAttestationEnds(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.RoundTimeout = 50 * time.Millisecond })
	stream, err := agentv1.NewAgentClient(w.dialTCP(nil)).AttestAgent(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); status.Code(err) != codes.DeadlineExceeded {
		t.Fatal(err)
	}
}

func TestAttestAgentOfAnotherType(t *testing.T) {
	w := newWorld(t, nil)
	stream, err := agentv1.NewAgentClient(w.dialTCP(nil)).AttestAgent(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(&agentv1.AttestAgentRequest{Step: &agentv1.AttestAgentRequest_Params_{Params: &agentv1.AttestAgentRequest_Params{
		Data: &types.AttestationData{Type: "join_token" + strings.Repeat("x", 1<<20), Payload: []byte("x")}, Params: &agentv1.AgentX509SVIDParams{Csr: []byte("x")},
	}}}); err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); status.Code(err) != codes.FailedPrecondition || len(err.Error()) > 500 {
		t.Fatal(err)
	}
}

func TestListAgents(t *testing.T) {
	w := newWorld(t, nil)
	for range 5 {
		w.attest(w.newTPM(), attestOptions{})
	}
	var ids []string
	token := ""
	for {
		resp, err := w.agents().ListAgents(t.Context(), &agentv1.ListAgentsRequest{PageSize: 2, PageToken: token})
		if err != nil {
			t.Fatal(err)
		}
		for _, a := range resp.Agents {
			ids = append(ids, a.Id.Path)
			// With 0 here, SPIRE's purge command deletes live agents.
			if a.X509SvidExpiresAt == 0 || a.X509SvidSerialNumber == "" || !a.CanReattest {
				t.Errorf("%v", a)
			}
		}
		if token = resp.NextPageToken; token == "" {
			break
		}
	}
	if len(ids) != 5 {
		t.Fatalf("listed %v", ids)
	}
	resp, err := w.agents().ListAgents(t.Context(), &agentv1.ListAgentsRequest{Filter: &agentv1.ListAgentsRequest_Filter{
		BySelectorMatch: &types.SelectorMatch{Match: types.SelectorMatch_MATCH_SUPERSET, Selectors: []*types.Selector{{Type: "tpmnode", Value: "ek:" + ids[0][len(ids[0])-64:]}}},
	}, OutputMask: &types.AgentMask{AttestationType: true}})
	if err != nil || len(resp.Agents) != 1 || resp.Agents[0].Id.Path != ids[0] || resp.Agents[0].X509SvidSerialNumber != "" {
		t.Fatalf("%v, %v", resp, err)
	}
	count, err := w.agents().CountAgents(t.Context(), &agentv1.CountAgentsRequest{Filter: &agentv1.CountAgentsRequest_Filter{
		ByExpiresBefore: w.clock.Now().Add(2 * time.Hour).Format(expiresBefore),
	}})
	if err != nil || count.Count != 5 {
		t.Fatalf("%v, %v", count, err)
	}
	var a store.Agent
	if p, err := w.srv.Store().Agents(); err != nil || len(p) != 5 {
		t.Fatal(err)
	} else {
		a = *p[0]
	}
	if a.Attestation == nil || len(a.Attestation.PCRs) == 0 || !a.KeyBound {
		t.Fatalf("%+v", a)
	}
}
