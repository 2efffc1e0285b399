package server

import (
	"bytes"
	"crypto/x509"
	"crypto/x509/pkix"
	"testing"
	"time"

	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/rootlink/rootlink/internal/forge"
	"github.com/rootlink/rootlink/pkg/attest"
)

// issuer is a world with one node and an entry for a step and a workload.
func issuer(t testing.TB, bend func(*Config)) (w *world, n *node, step, workload string) {
	t.Helper()
	w = newWorld(t, bend)
	n = w.attest(w.newTPM(), attestOptions{})
	step = w.create(entry(n.id, "/build", stepSelectorsOf("go")...))
	workload = w.create(entry(n.id, "/web", sel("", "nginx"), "binary:uid:33"))
	return w, n, step, workload
}

// web is a leaf that fits the workload entry of issuer.
func (n *node) web() *quoted {
	q := n.workload("/web", sel("", "nginx"), "binary:uid:33")
	q.leaf.Executable = hashOf("nginx")
	return q
}

func TestSignsGoodEvidence(t *testing.T) {
	w, n, _, workload := issuer(t, nil)
	e := entry(n.id, "/named", stepSelectorsOf("go")...)
	e.DnsNames = []string{"build.example.org"}
	cert, err := n.sign(w.create(e), n.csr(n.step("/named")))
	if err != nil {
		t.Fatal(err)
	}
	if life := cert.NotAfter.Sub(cert.NotBefore); life > 10*time.Minute+10*time.Second {
		t.Errorf("an issuer SVID lives for %v", life)
	}
	if len(cert.DNSNames) != 0 || len(cert.URIs) != 1 {
		t.Errorf("an issuer SVID is for %v %v", cert.DNSNames, cert.URIs)
	}
	if len(cert.ExtKeyUsage) != 3 {
		t.Errorf("extended key usages %v", cert.ExtKeyUsage)
	}
	cert, err = n.sign(workload, n.csr(n.web()))
	if err != nil {
		t.Fatal(err)
	}
	if len(cert.ExtKeyUsage) != 2 {
		t.Errorf("extended key usages %v: codeSigning is for issuers", cert.ExtKeyUsage)
	}
	if _, err := attest.FromCertificate(cert); err != nil {
		t.Error(err)
	}
	// Where the configuration does not ask for it, none is needed.
	cert, err = n.sign(workload, newCSR(t, forge.P256(t), nil))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := attest.FromCertificate(cert); err == nil {
		t.Error("evidence out of nowhere")
	}
}

func TestRefusesReplayedLeaf(t *testing.T) {
	_, n, step, _ := issuer(t, nil)
	csr := n.csr(n.step("/build"))
	if _, err := n.sign(step, csr); err != nil {
		t.Fatal(err)
	}
	n.refused("leaf_replayed", step, csr)
}

func TestRefusesReplayedLeafInOneBatch(t *testing.T) {
	_, n, step, _ := issuer(t, nil)
	csr := n.csr(n.step("/build"))
	p := &svidv1.NewX509SVIDParams{EntryId: step, Csr: csr}
	resp, err := svidv1.NewSVIDClient(n.conn).BatchNewX509SVID(t.Context(), &svidv1.BatchNewX509SVIDRequest{Params: []*svidv1.NewX509SVIDParams{p, p, p}})
	if err != nil {
		t.Fatal(err)
	}
	signed := 0
	for _, r := range resp.Results {
		if r.Status.Code == int32(codes.OK) {
			signed++
		}
	}
	if signed != 1 {
		t.Fatalf("one leaf was signed for %d times", signed)
	}
}

func TestRefusesOldNonce(t *testing.T) {
	w, n, step, _ := issuer(t, nil)
	csr := n.csr(n.step("/build"))
	w.clock.add(attest.NonceLifetime + time.Second)
	n.refused("evidence_nonce_fresh", step, csr)
}

func TestRefusesNonceOfAnotherAgent(t *testing.T) {
	w, n, step, _ := issuer(t, nil)
	other := w.attest(w.newTPM(), attestOptions{})
	q := other.step("/build")
	other.csr(q) // takes a nonce
	mine := n.step("/build")
	mine.nonce = q.nonce
	n.refused("evidence_nonce_fresh", step, n.csr(mine))
}

func TestRefusesWrongAgentKey(t *testing.T) {
	_, n, step, _ := issuer(t, nil)
	q := n.step("/build")
	q.leaf.AgentKey = hashOf("another agent's key")
	n.refused("evidence_leaf_agent_key", step, n.csr(q))
}

// The agent attests again and gets another key: what the TPM committed to under
// the old one is not the new agent's.
func TestRefusesEvidenceOfAnEarlierAgentKey(t *testing.T) {
	w, n, step, _ := issuer(t, nil)
	csr := n.csr(n.step("/build"))
	again := w.attest(n.tpm, attestOptions{})
	again.refused("evidence_leaf_agent_key", step, csr)
	if _, err := n.sign(step, csr); status.Code(err) != codes.PermissionDenied {
		t.Fatalf("the agent's earlier SVID still works: %v", err)
	}
}

func TestRefusesCSRKeyOtherThanLeafKey(t *testing.T) {
	_, n, step, _ := issuer(t, nil)
	q := n.step("/build")
	q.key = forge.P256(t) // a thief's
	n.refused("evidence_leaf_commitment", step, n.csr(q))
}

func TestRefusesEvidenceOfAnotherAgent(t *testing.T) {
	w, n, step, _ := issuer(t, nil)
	other := w.attest(w.newTPM(), attestOptions{})
	q := n.step("/build")
	q.tpm = other.tpm // its quote, its EK
	stolen := *n
	stolen.akCert = other.akCert
	stolen.refused("evidence_ek_identity", step, stolen.csr(q))
}

func TestRefusesEvidenceOfAnotherTrustDomain(t *testing.T) {
	_, n, step, _ := issuer(t, nil)
	q := n.step("/build")
	q.leaf.TrustDomain, q.leaf.SPIFFEID = "example.com", "spiffe://example.com/build"
	n.refused("evidence_leaf_commitment", step, n.csr(q))
}

func TestRefusesEvidenceOfAnotherIdentity(t *testing.T) {
	_, n, step, _ := issuer(t, nil)
	q := n.step("/build")
	q.leaf.SPIFFEID = "spiffe://" + td + "/deploy"
	n.refused("evidence_leaf_commitment", step, n.csr(q))
}

func TestRefusesEvidenceForAnotherStatement(t *testing.T) {
	_, n, step, _ := issuer(t, nil)
	q := n.step("/build")
	q.record = func(e *attest.Evidence) { e.Payload = hashOf("another statement") }
	n.refused("evidence_leaf_commitment", step, n.csr(q))
}

func TestRefusesStepEntryWithPlainCSR(t *testing.T) {
	_, n, step, _ := issuer(t, nil)
	n.refused("step_without_evidence", step, newCSR(t, forge.P256(t), nil))
}

func TestRefusesStepEntryWithoutPayload(t *testing.T) {
	_, n, step, _ := issuer(t, nil)
	q := n.workload("/build", stepSelectorsOf("go")...)
	n.refused("step_without_payload", step, n.csr(q))
}

// A statement signed under an entry that demands neither tool nor recorder
// would say that something was recorded when nothing was.
func TestRefusesStatementForAnEntryThatIsNoStep(t *testing.T) {
	_, n, _, workload := issuer(t, nil)
	q := n.web()
	q.leaf.KeyOrigin, q.leaf.Payload = attest.OriginCaller, hashOf("the statement")
	q.leaf.Tool, q.leaf.Recorder = hashOf("go"), hashOf("rootlink")
	n.refused("not_a_step", workload, n.csr(q))
}

func TestRefusesStepWithoutMeasuredToolOrRecorder(t *testing.T) {
	_, n, step, _ := issuer(t, nil)
	for _, bend := range []func(*attest.Leaf){
		func(l *attest.Leaf) { l.Tool = [32]byte{} },
		func(l *attest.Leaf) { l.Recorder = [32]byte{} },
	} {
		q := n.step("/build")
		bend(&q.leaf)
		n.refused("step_unmeasured", step, n.csr(q))
	}
}

func TestRefusesStatementKeyMadeByTheAgent(t *testing.T) {
	_, n, step, _ := issuer(t, nil)
	q := n.step("/build")
	q.leaf.KeyOrigin = attest.OriginAgent
	n.refused("key_origin", step, n.csr(q))
}

func TestRefusesSelectorThatWasNotMeasured(t *testing.T) {
	_, n, _, workload := issuer(t, nil)
	q := n.web()
	q.leaf.Selectors = []string{sel("", "nginx")} // not the uid
	n.refused("selector", workload, n.csr(q))
}

// The selectors travel in full beside a hash of them; a longer list than the
// TPM committed to is no use.
func TestRefusesSelectorsAddedAfterTheQuote(t *testing.T) {
	_, n, _, workload := issuer(t, nil)
	q := n.web()
	q.leaf.Selectors = []string{sel("", "nginx")}
	q.record = func(e *attest.Evidence) { e.Selectors = []string{sel("", "nginx"), "binary:uid:33"} }
	n.refused("evidence_leaf_commitment", workload, n.csr(q))
}

// A tool's hash never stands for the process that holds the key: anyone can
// start a victim's binary stopped and ask in its name.
func TestRefusesToolHashAsExecutable(t *testing.T) {
	_, n, _, workload := issuer(t, nil)
	q := n.web()
	q.leaf.Selectors = []string{sel("tool:", "nginx"), "binary:uid:33"}
	n.refused("selector", workload, n.csr(q))
}

func TestRefusesExecutableOtherThanItsSelector(t *testing.T) {
	_, n, _, workload := issuer(t, nil)
	q := n.web()
	q.leaf.Executable = hashOf("something else")
	n.refused("executable", workload, n.csr(q))
}

func TestRefusesToolThatTheEntryDoesNotName(t *testing.T) {
	_, n, step, _ := issuer(t, nil)
	q := n.step("/build")
	q.leaf.Tool = hashOf("cc")
	n.refused("tool", step, n.csr(q))
}

// In a chain of execs (env, then go, then a shell) every tool counts.
func TestRefusesExecChainWithAToolTooMany(t *testing.T) {
	_, n, step, _ := issuer(t, nil)
	q := n.step("/build")
	q.leaf.Selectors = sorted(append(stepSelectorsOf("go"), sel("tool:", "sh")))
	n.refused("tool", step, n.csr(q))
}

func TestRefusesRecorderThatTheEntryDoesNotName(t *testing.T) {
	_, n, step, _ := issuer(t, nil)
	q := n.step("/build")
	q.leaf.Recorder = hashOf("a recorder that lies")
	n.refused("recorder", step, n.csr(q))
}

// An unprotected recorder, which other processes of its user can forge, does
// not pass for a protected one.
func TestRefusesUnprotectedRecorderForAProtectedOne(t *testing.T) {
	_, n, step, _ := issuer(t, nil)
	q := n.step("/build")
	q.leaf.Selectors = []string{sel("recorder_unprotected:", "rootlink"), sel("tool:", "go")}
	n.refused("selector", step, n.csr(q))
}

func TestRefusesStrippedEvidence(t *testing.T) {
	w, n, _, _ := issuer(t, func(c *Config) { c.EvidencePatterns = []string{"spiffe://" + td + "/db/**"} })
	id := w.create(entry(n.id, "/db/main", sel("", "postgres")))
	n.refused("evidence_missing", id, newCSR(t, forge.P256(t), nil))
	q := n.workload("/db/main", sel("", "postgres"))
	q.leaf.Executable = hashOf("postgres")
	if _, err := n.sign(id, n.csr(q)); err != nil {
		t.Fatal(err)
	}
}

func TestRefusesPolicyFieldFromTheAgent(t *testing.T) {
	_, n, step, _ := issuer(t, nil)
	q := n.step("/build")
	q.record = func(e *attest.Evidence) {
		e.Policy = &attest.PolicyRef{Name: "good", Revision: 1, Digest: attest.TypedDigest{Alg: "sha256", Value: make([]byte, 32)}}
	}
	n.refused("policy_claimed", step, n.csr(q))
}

func TestRefusesQuoteOverFewerPCRs(t *testing.T) {
	_, n, step, _ := issuer(t, nil)
	q := n.step("/build")
	q.selection = []attest.PCRSelection{{Bank: "sha256", Indices: []uint32{0, 1, 2, 3, 4}}}
	n.refused("evidence_quote_selection", step, n.csr(q))
}

func TestRefusesPCRValuesOtherThanQuoted(t *testing.T) {
	_, n, step, _ := issuer(t, nil)
	q := n.step("/build")
	q.record = func(e *attest.Evidence) { e.PCRs[0].Values[7] = bytes.Repeat([]byte{7}, 32) }
	n.refused("evidence_quote_pcr_digest", step, n.csr(q))
}

func TestRefusesMerklePathWithWrongIndexOrSize(t *testing.T) {
	_, n, step, _ := issuer(t, nil)
	for _, bend := range []func(*attest.Evidence){
		func(e *attest.Evidence) { e.Index = 0 },
		func(e *attest.Evidence) { e.Size = 4 },
	} {
		q := n.step("/build")
		q.record = bend
		n.refused("evidence_leaf_commitment", step, n.csr(q))
	}
}

// A second AK of a TPM is alarmed; from then on the first counts no more.
func TestRefusesEvidenceByAnEarlierAK(t *testing.T) {
	w := newWorld(t, nil)
	ek := forge.P256(t)
	n := w.attest(forge.NewTPM(t, w.maker, forge.TPMOptions{EKKey: ek}), attestOptions{})
	step := w.create(entry(n.id, "/build", stepSelectorsOf("go")...))
	again := w.attest(forge.NewTPM(t, w.maker, forge.TPMOptions{EKKey: ek}), attestOptions{key: n.key})
	if w.srv.Counters()["alarm/ak_changed"] != 1 {
		t.Errorf("no alarm: %v", w.srv.Counters())
	}
	first := *again
	first.akCert = n.akCert
	q := first.step("/build")
	q.tpm = n.tpm
	first.refused("ak_changed", step, first.csr(q))
	if _, err := again.sign(step, again.csr(again.step("/build"))); err != nil {
		t.Fatal(err)
	}
}

func TestRefusesEvidenceOfAnUnboundNode(t *testing.T) {
	w := newWorld(t, nil)
	n := w.attest(w.newTPM(), attestOptions{unbound: true}) // as a stock agent attests
	id := w.create(entry(n.id, "/web", sel("", "nginx")))
	q := n.workload("/web", sel("", "nginx"))
	q.leaf.Executable = hashOf("nginx")
	n.refused("agent_unbound", id, n.csr(q))
	if _, err := n.sign(id, newCSR(t, forge.P256(t), nil)); err != nil {
		t.Fatal(err)
	}
	step := w.create(entry(n.id, "/build", stepSelectorsOf("go")...))
	n.refused("not_issuable", step, n.csr(n.step("/build")))
}

func TestRefusesEntryOfAnotherNode(t *testing.T) {
	w, _, step, workload := issuer(t, nil)
	other := w.attest(w.newTPM(), attestOptions{})
	other.refused("entry", step, other.csr(other.step("/build")))
	other.refused("entry", workload, newCSR(t, forge.P256(t), nil))
	other.refused("entry", "no-such-entry", newCSR(t, forge.P256(t), nil))
}

func TestRefusesExpiredEntry(t *testing.T) {
	w := newWorld(t, nil)
	n := w.attest(w.newTPM(), attestOptions{})
	e := entry(n.id, "/web", sel("", "nginx"))
	e.ExpiresAt = w.clock.Now().Add(time.Minute).Unix()
	id := w.create(e)
	cert, err := n.sign(id, newCSR(t, forge.P256(t), nil))
	if err != nil {
		t.Fatal(err)
	}
	if cert.NotAfter.After(time.Unix(e.ExpiresAt, 0)) {
		t.Errorf("the SVID outlives its entry: %v", cert.NotAfter)
	}
	w.clock.add(2 * time.Minute)
	n.refused("entry", id, newCSR(t, forge.P256(t), nil))
}

func TestRefusesMalformedCSRs(t *testing.T) {
	_, n, _, workload := issuer(t, nil)
	good := newCSR(t, forge.P256(t), nil)
	broken := bytes.Clone(good)
	broken[len(broken)-1] ^= 1 // the signature: possession of the key is not proved
	for name, csr := range map[string][]byte{
		"empty": nil, "not DER": []byte("csr"), "signature": broken, "too large": make([]byte, maxCSR+1),
	} {
		t.Run(name, func(t *testing.T) { n.refused("csr", workload, csr) })
	}
	garbage := pkix.Extension{Id: []int{1, 3, 6, 1, 5, 5, 7, 1, 35}, Value: []byte{0x04, 0x01, 0x00}}
	n.refused("evidence_malformed", workload, newCSR(t, forge.P256(t), &x509.CertificateRequest{ExtraExtensions: []pkix.Extension{garbage}}))
}

// What an administrator mints carries no evidence and cannot pass for a signed
// step: no codeSigning, whatever the CSR asks for.
func TestRefusesToMintWhatOnlyEvidenceEarns(t *testing.T) {
	w, n, _, _ := issuer(t, nil)
	q := n.step("/build")
	csr, err := x509.ParseCertificateRequest(n.csr(q))
	if err != nil {
		t.Fatal(err)
	}
	id, _ := spiffeURL("spiffe://" + td + "/build")
	resp, err := svidv1.NewSVIDClient(w.admin).MintX509SVID(t.Context(), &svidv1.MintX509SVIDRequest{
		Csr: newCSR(t, q.key, &x509.CertificateRequest{URIs: id, ExtraExtensions: csr.Extensions}),
	})
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(resp.Svid.CertChain[0])
	if err != nil {
		t.Fatal(err)
	}
	if _, err := attest.FromCertificate(cert); err == nil {
		t.Error("a minted SVID carries evidence")
	}
	for _, u := range cert.ExtKeyUsage {
		if u == x509.ExtKeyUsageCodeSigning {
			t.Error("a minted SVID may sign code")
		}
	}
	for _, bad := range []string{"spiffe://" + td, "spiffe://" + td + "/spire/server", n.id, "spiffe://example.com/x"} {
		id, _ := spiffeURL(bad)
		if _, err := svidv1.NewSVIDClient(w.admin).MintX509SVID(t.Context(), &svidv1.MintX509SVIDRequest{
			Csr: newCSR(t, q.key, &x509.CertificateRequest{URIs: id}),
		}); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%s: %v", bad, err)
		}
	}
	// Over TCP it is nobody's, not even an agent's.
	if _, err := svidv1.NewSVIDClient(n.conn).MintX509SVID(t.Context(), &svidv1.MintX509SVIDRequest{}); status.Code(err) != codes.PermissionDenied {
		t.Error(err)
	}
}

func TestRefusesBannedNode(t *testing.T) {
	w, n, step, _ := issuer(t, nil)
	csr := n.csr(n.step("/build"))
	if _, err := w.agents().BanAgent(t.Context(), &agentv1.BanAgentRequest{Id: idToProto(n.id)}); err != nil {
		t.Fatal(err)
	}
	_, err := n.sign(step, csr)
	if r := reasonOf(err); r.String() != "AGENT_BANNED" {
		t.Fatalf("banned: %v", err)
	}
}
