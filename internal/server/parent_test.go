package server

import (
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	"github.com/rootlink/rootlink/internal/forge"
	"github.com/rootlink/rootlink/pkg/attest"
)

func parents(c *Config) { c.ParentPatterns = []string{"spiffe://example.org/ci/**"} }

// stock is a world with the agent of a stock SPIRE.
func stock(t *testing.T, bend func(*Config)) (w *world, n *node) {
	t.Helper()
	w = newWorld(t, bend)
	return w, w.attest(w.newTPM(), attestOptions{unbound: true})
}

func plainCSR(t testing.TB) []byte { return newCSR(t, forge.P256(t), nil) }

// offline verifies the evidence in c as somebody without a server does.
func (w *world) offline(c *x509.Certificate) (*attest.VerifiedParent, error) {
	w.t.Helper()
	p, err := attest.ParentFromCertificate(c)
	if err != nil {
		return nil, err
	}
	v, _, err := attest.VerifyParent(p, attest.ParentBinding{TrustDomain: td, SVIDNotBefore: c.NotBefore, At: c.NotAfter}, attest.Options{
		AttestationCAs: w.srv.AttestationCAs(), EK: w.maker.EKRoots(), RequiredPCRs: attest.DefaultPCRs(),
	})
	return v, err
}

func TestParentEvidenceInSVIDsOfAStockAgent(t *testing.T) {
	w, n := stock(t, parents)
	ci := w.create(entry(n.id, "/ci/build", "unix:uid:1"))
	web := w.create(entry(n.id, "/web", "unix:uid:33"))
	w.clock.add(25 * time.Minute)
	c, err := n.sign(ci, plainCSR(t))
	if err != nil {
		t.Fatal(err)
	}
	v, err := w.offline(c)
	if err != nil {
		t.Fatal(err)
	}
	if v.EK().Hash != n.tpm.EKHash || !v.AttestedAt().Equal(forge.Epoch()) || v.AgentKey() != [32]byte{} || v.Policy() != nil {
		t.Errorf("verified %+v", v)
	}
	if slices.Contains(c.ExtKeyUsage, x509.ExtKeyUsageCodeSigning) {
		t.Error("codeSigning without evidence about the key")
	}
	t.Logf("%d bytes", len(c.Raw))
	// A permanent hardware ID is shown where it was asked for only.
	if c, err = n.sign(web, plainCSR(t)); err != nil {
		t.Fatal(err)
	}
	if _, err := attest.ParentFromCertificate(c); err != attest.ErrNoEvidence {
		t.Error(err)
	}
	// What is stored outlives the server.
	w.stop()
	w.start()
	again := w.attest(n.tpm, attestOptions{unbound: true})
	if c, err = again.sign(ci, plainCSR(t)); err != nil {
		t.Fatal(err)
	}
	if v, err := w.offline(c); err != nil || !v.AttestedAt().Equal(w.clock.Now()) {
		t.Error(err)
	}
}

func TestParentEvidenceNamesThePolicyThatWasMet(t *testing.T) {
	w, n := stock(t, parents)
	w.putPolicy("fleet", profile("a", n.tpm, 7))
	alias := entry("spiffe://example.org/spire/server", "/fleet", "tpmnode:pcr_policy:fleet")
	w.create(alias)
	ci := w.create(entry("spiffe://example.org/fleet", "/ci/build", "unix:uid:1"))
	c, err := n.sign(ci, plainCSR(t))
	if err != nil {
		t.Fatal(err)
	}
	v, err := w.offline(c)
	if err != nil {
		t.Fatal(err)
	}
	if p := v.Policy(); p == nil || p.Name != "fleet" {
		t.Errorf("policy %v", p)
	}
}

// An allow-listed EK without certificate: its key is in the record.
func TestParentEvidenceOfAnEKWithoutCertificate(t *testing.T) {
	var allow string
	w := newWorld(t, func(c *Config) {
		parents(c)
		allow = filepath.Join(filepath.Dir(c.DataDir), "allow")
		c.EKAllow = allow
		if err := os.WriteFile(allow, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	})
	tpm := w.newTPM()
	if err := os.WriteFile(allow, []byte(hexOf(tpm.EKHash)), 0o600); err != nil {
		t.Fatal(err)
	}
	tpm.EKChain = nil
	n := w.attest(tpm, attestOptions{unbound: true})
	c, err := n.sign(w.create(entry(n.id, "/ci/build", "unix:uid:1")), plainCSR(t))
	if err != nil {
		t.Fatal(err)
	}
	p, err := attest.ParentFromCertificate(c)
	if err != nil || len(p.EKChain) != 0 || len(p.EKPublic) == 0 {
		t.Fatalf("%+v, %v", p, err)
	}
	if _, _, err := attest.VerifyParent(p, attest.ParentBinding{TrustDomain: td, SVIDNotBefore: c.NotBefore, At: w.clock.Now()}, attest.Options{
		AttestationCAs: w.srv.AttestationCAs(), RequiredPCRs: attest.DefaultPCRs(),
		EK: attest.EKRoots{Allow: map[[32]byte]bool{tpm.EKHash: true}},
	}); err != nil {
		t.Error(err)
	}
}

// Whoever strips the evidence off a CSR must not be given other evidence for it.
func TestRefusesParentEvidenceToABoundAgent(t *testing.T) {
	w := newWorld(t, parents)
	n := w.attest(w.newTPM(), attestOptions{})
	ci := w.create(entry(n.id, "/ci/build", "unix:uid:1"))
	c, err := n.sign(ci, plainCSR(t))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := attest.ParentFromCertificate(c); err != attest.ErrNoEvidence {
		t.Errorf("a bound agent's SVID: %v", err)
	}
	// A renewed key is covered by no quote either, and the node is the same.
	a, err := w.srv.Store().Agent(n.id)
	if err != nil {
		t.Fatal(err)
	}
	once := *a
	once.CanReattest = false
	if _, err := w.srv.Store().PutAttestedAgent(t.Context(), once, ""); err != nil {
		t.Fatal(err)
	}
	key := forge.P256(t)
	resp, err := agentv1.NewAgentClient(n.conn).RenewAgent(t.Context(), &agentv1.RenewAgentRequest{
		Params: &agentv1.AgentX509SVIDParams{Csr: newCSR(t, key, nil)},
	})
	if err != nil {
		t.Fatal(err)
	}
	renewed := &node{w: w, tpm: n.tpm, id: n.id, key: key, conn: w.dialTCP(&tls.Certificate{Certificate: resp.Svid.CertChain, PrivateKey: key})}
	if c, err = renewed.sign(ci, plainCSR(t)); err != nil {
		t.Fatal(err)
	}
	if _, err := attest.ParentFromCertificate(c); err != attest.ErrNoEvidence {
		t.Errorf("after it renewed its key: %v", err)
	}
}

func TestRefusesEvidenceOfOtherKindsInACSR(t *testing.T) {
	w, n := stock(t, parents)
	ci := w.create(entry(n.id, "/ci/build", "unix:uid:1"))
	fw := forge.NewWorld(t)
	parent, err := fw.MakeParent(t).Extension()
	if err != nil {
		t.Fatal(err)
	}
	ak, err := x509.ParseCertificate(n.akCert)
	if err != nil {
		t.Fatal(err)
	}
	var statement pkix.Extension
	for _, x := range ak.Extensions {
		if x.Id.Equal(attest.ExtensionID()) {
			statement = x
		}
	}
	key := forge.P256(t)
	for name, x := range map[string]pkix.Extension{"parent": parent, "AK statement": statement} {
		t.Log(name)
		n.refused("evidence_malformed", ci, newCSR(t, key, &x509.CertificateRequest{ExtraExtensions: []pkix.Extension{x}}))
	}
	// Leaf evidence needs a key that a quote has covered.
	n.refused("agent_unbound", ci, n.csr(n.workload("/ci/build", "unix:uid:1")))
	// Detached evidence goes beside a link.
	bound := w.attest(n.tpm, attestOptions{})
	q := bound.workload("/ci/build", "unix:uid:1")
	q.leaf.Kind = attest.KindDetached
	bound.refused("evidence_evidence_kind", ci, bound.csr(q))
}

// Two agents on one TPM: the older is cut off, and asks in vain.
func TestRefusesTheOlderOfTwoStockAgentsOnOneTPM(t *testing.T) {
	var log lockedBuffer
	w, n := stock(t, func(c *Config) {
		parents(c)
		c.Log = slog.New(slog.NewTextHandler(&log, nil))
	})
	ci := w.create(entry(n.id, "/ci/build", "unix:uid:1"))
	newer := w.attest(n.tpm, attestOptions{unbound: true})
	if _, err := newer.sign(ci, plainCSR(t)); err != nil {
		t.Fatal(err)
	}
	w.clock.add(unusedGrace + rivalGrace + time.Second)
	for range 3 {
		_, err := n.sign(ci, plainCSR(t))
		wantReason(t, err, types.PermissionDeniedDetails_AGENT_NOT_ACTIVE)
	}
	if !strings.Contains(log.String(), "ALARM: a newer attestation replaced") {
		t.Errorf("no alarm in\n%s", log.String())
	}
}

func TestRefusesEntriesOfOtherNodes(t *testing.T) {
	w, n := stock(t, parents)
	other := w.attest(w.newTPM(), attestOptions{unbound: true})
	theirs := w.create(entry(other.id, "/ci/theirs", "unix:uid:1"))
	n.refused("entry", theirs, plainCSR(t))
	n.refused("entry", "no-such-entry", plainCSR(t))
}

func TestRefusesATPMOnTheDenyList(t *testing.T) {
	var deny string
	w := newWorld(t, func(c *Config) {
		deny = filepath.Join(filepath.Dir(c.DataDir), "deny")
		c.EKDeny = deny
		if err := os.WriteFile(deny, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	})
	tpm := w.newTPM()
	w.attest(tpm, attestOptions{unbound: true})
	if err := os.WriteFile(deny, []byte(hexOf(tpm.EKHash)), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := w.tryAttest(tpm, attestOptions{unbound: true}); err == nil {
		t.Fatal("attested")
	}
}

// A record too large for what a stock agent can be sent: its entries are left
// out of the sync, and asking all the same is refused.
func TestRefusesParentEvidenceThatIsTooLarge(t *testing.T) {
	w := newWorld(t, parents)
	tpm := w.newTPM()
	// An EK certificate as long as some maker's, with nothing in it that counts.
	long := make([]byte, 6<<10)
	tpm.EKChain = w.maker.IssueEK(t, tpm.EKKey(), func(c *x509.Certificate) {
		c.ExtraExtensions = append(c.ExtraExtensions, pkix.Extension{Id: []int{1, 2, 3, 4}, Value: long})
	})
	n := w.attest(tpm, attestOptions{unbound: true})
	ci := w.create(entry(n.id, "/ci/build", "unix:uid:1"))
	w.create(entry(n.id, "/web", "unix:uid:33"))
	n.refused("parent_evidence", ci, plainCSR(t))
	list, err := n.entries()
	if err != nil {
		t.Fatal(err)
	}
	if len(list) != 1 || list[0].SpiffeId.Path != "/web" {
		t.Errorf("synced %v", list)
	}
}

func (n *node) entries() ([]*types.Entry, error) {
	resp, err := entryv1.NewEntryClient(n.conn).GetAuthorizedEntries(n.w.t.Context(), &entryv1.GetAuthorizedEntriesRequest{})
	return resp.GetEntries(), err
}

// As many as a stock agent asks for at once: whatever share comes back fits into
// one message, in the order asked for, and the rest is had by asking again.
func TestParentEvidenceComesInSharesThatFit(t *testing.T) {
	w, n := stock(t, parents)
	var params []*svidv1.NewX509SVIDParams
	for i := range maxCSRs {
		e := entry(n.id, fmt.Sprintf("/ci/%d", i), "unix:uid:1")
		for d := range 40 {
			e.DnsNames = append(e.DnsNames, fmt.Sprintf("%s.%d.%d.example.org", strings.Repeat("a", 60), d, i))
		}
		params = append(params, &svidv1.NewX509SVIDParams{EntryId: w.create(e), Csr: plainCSR(t)})
	}
	got, rounds := 0, 0
	for got < len(params) {
		resp, err := svidv1.NewSVIDClient(n.conn).BatchNewX509SVID(t.Context(), &svidv1.BatchNewX509SVIDRequest{Params: params[got:]})
		if err != nil {
			t.Fatal(err)
		}
		if size := proto.Size(resp); len(resp.Results) == 0 || size > 4<<20 {
			t.Fatalf("%d results of %d bytes", len(resp.Results), size)
		}
		for i, r := range resp.Results {
			if r.GetStatus().GetCode() != int32(codes.OK) || r.Svid.Id.Path != fmt.Sprintf("/ci/%d", got+i) {
				t.Fatalf("result %d: %v", got+i, r.GetStatus())
			}
		}
		got += len(resp.Results)
		rounds++
	}
	t.Logf("%d SVIDs in %d shares", got, rounds)
}

func TestParentEvidenceNeedsNodesThatAttestDaily(t *testing.T) {
	_, err := Config{
		TrustDomain: td, DataDir: t.TempDir(), AgentTTL: 25 * time.Hour, ParentPatterns: []string{"spiffe://example.org/**"},
	}.check()
	if err == nil || !strings.Contains(err.Error(), "parent evidence") {
		t.Error(err)
	}
	_, err = Config{TrustDomain: td, DataDir: t.TempDir(), ParentPatterns: []string{"ci"}}.check()
	if err == nil {
		t.Error("a pattern that is none")
	}
}
