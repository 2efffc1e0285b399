package server

import (
	"encoding/hex"
	"strconv"
	"testing"

	"github.com/rootlink/rootlink/internal/forge"
	"github.com/rootlink/rootlink/pkg/attest"
)

// profile is the node's present values of the PCRs, as a policy would name them.
func profile(name string, tpm *forge.TPM, pcrs ...uint32) attest.PCRProfile {
	values := map[string]string{}
	for _, i := range pcrs {
		values[strconv.Itoa(int(i))] = hex.EncodeToString(tpm.PCRs[0].Values[i])
	}
	return attest.PCRProfile{Name: name, Banks: map[string]map[string]string{"sha256": values}}
}

func (w *world) putPolicy(name string, profiles ...attest.PCRProfile) {
	w.t.Helper()
	if _, err := w.srv.Store().PutPCRPolicy(w.t.Context(), name, func(*attest.PCRPolicy) ([]attest.PCRProfile, error) {
		return profiles, nil
	}); err != nil {
		w.t.Fatal(err)
	}
}

// policed is a node whose step entry hangs from an alias that demands a policy.
func policed(t *testing.T) (w *world, n *node, step string) {
	t.Helper()
	w = newWorld(t, nil)
	tpm := w.newTPM()
	n = w.attest(tpm, attestOptions{})
	// Captured after the attestation: it counts without another.
	w.putPolicy("good", profile("image-1", tpm, 4, 7))
	w.create(entry("spiffe://"+td+"/spire/server", "/builders", "tpmnode:pcr_policy:good"))
	step = w.create(entry("spiffe://"+td+"/builders", "/build", stepSelectorsOf("go")...))
	return w, n, step
}

func TestEvidenceNamesThePolicyThatLetItPass(t *testing.T) {
	w, n, step := policed(t)
	cert, err := n.sign(step, n.csr(n.step("/build")))
	if err != nil {
		t.Fatal(err)
	}
	rec, err := attest.FromCertificate(cert)
	if err != nil {
		t.Fatal(err)
	}
	p, err := w.srv.Store().PCRPolicy("good")
	if err != nil {
		t.Fatal(err)
	}
	if rec.Policy == nil || rec.Policy.Name != "good" || rec.Policy.Revision != 1 || string(rec.Policy.Digest.Value) != string(p.Digest[:]) {
		t.Fatalf("policy %+v", rec.Policy)
	}
	// An entry that needs no policy names none.
	plain := w.create(entry(n.id, "/plain", stepSelectorsOf("go")...))
	if cert, err = n.sign(plain, n.csr(n.step("/plain"))); err != nil {
		t.Fatal(err)
	}
	if rec, err = attest.FromCertificate(cert); err != nil || rec.Policy != nil {
		t.Fatalf("policy %+v, %v", rec.Policy, err)
	}
}

// Malware extends a PCR while the agent's SVID is still good: the very next
// quote shows it.
func TestRefusesPCRExtendedOutOfPolicy(t *testing.T) {
	_, n, step := policed(t)
	if _, err := n.sign(step, n.csr(n.step("/build"))); err != nil {
		t.Fatal(err)
	}
	n.tpm.Extend(4, []byte("another boot loader"))
	n.refused("pcr_policy", step, n.csr(n.step("/build")))
}

func TestRefusesMixedPCRProfiles(t *testing.T) {
	w, n, step := policed(t)
	other := w.newTPM()
	other.Extend(4, []byte("image 2"))
	other.Extend(7, []byte("image 2"))
	w.putPolicy("good", profile("image-1", n.tpm, 4, 7), profile("image-2", other, 4, 7))
	n.tpm.Extend(4, []byte("image 2")) // PCR 4 of the one, PCR 7 of the other
	n.refused("pcr_policy", step, n.csr(n.step("/build")))
}

func TestRefusesAfterThePolicyIsDeleted(t *testing.T) {
	w, n, step := policed(t)
	csr := n.csr(n.step("/build"))
	if err := w.srv.Store().DeletePCRPolicy(t.Context(), "good"); err != nil {
		t.Fatal(err)
	}
	n.refused("entry", step, csr)
}

// pcr: selectors are those of the last attestation; a quote that contradicts
// them wins.
func TestRefusesPCRSelectorThatTheQuoteContradicts(t *testing.T) {
	w := newWorld(t, nil)
	n := w.attest(w.newTPM(), attestOptions{})
	value := hex.EncodeToString(n.tpm.PCRs[0].Values[4])
	w.create(entry("spiffe://"+td+"/spire/server", "/builders", "tpmnode:pcr:sha256:4:"+value))
	step := w.create(entry("spiffe://"+td+"/builders", "/build", stepSelectorsOf("go")...))
	if _, err := n.sign(step, n.csr(n.step("/build"))); err != nil {
		t.Fatal(err)
	}
	n.tpm.Extend(4, []byte("another boot loader"))
	n.refused("pcr_policy", step, n.csr(n.step("/build")))
}

// An entry may name selectors of the node beside those of the workload; they
// come from the server's record and from this quote, never from the leaf.
func TestNodeSelectorsInAnEntryComeFromTheServer(t *testing.T) {
	w := newWorld(t, nil)
	n := w.attest(w.newTPM(), attestOptions{})
	w.putPolicy("good", profile("image-1", n.tpm, 4))
	step := w.create(entry(n.id, "/build", append(stepSelectorsOf("go"), "tpmnode:pcr_policy:good")...))
	if _, err := n.sign(step, n.csr(n.step("/build"))); err != nil {
		t.Fatal(err)
	}
	n.tpm.Extend(4, []byte("another boot loader"))
	q := n.step("/build")
	q.leaf.Selectors = sorted(append(q.leaf.Selectors, "tpmnode:pcr_policy:good")) // claimed
	n.refused("pcr_policy", step, n.csr(q))
}
