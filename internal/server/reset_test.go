package server

import (
	"testing"

	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"google.golang.org/grpc/codes"

	"github.com/rootlink/rootlink/internal/forge"
)

// The TPM was reset and its agent was not: somebody may have replayed any boot
// into the PCRs. The node has to attest again, and then all is well.
func TestRefusesEvidenceAfterATPMReset(t *testing.T) {
	w, n, step, _ := issuer(t, nil)
	n.tpm.Reboot(true)
	n.refused("tpm_reset", step, n.csr(n.step("/build")))
	_, err := n.sign(step, newCSR(t, forge.P256(t), nil))
	if r := reasonOf(err); r.String() != "AGENT_NOT_ATTESTED" {
		t.Fatalf("the agent is not told to attest again: %v", err)
	}
	n = w.attest(n.tpm, attestOptions{})
	if _, err := n.sign(step, n.csr(n.step("/build"))); err != nil {
		t.Fatal(err)
	}
}

// A TPM that came back from a suspend has another restart count than its AK
// certificate: who verifies later would refuse, so the node attests again first.
func TestASuspendedNodeAttestsAgain(t *testing.T) {
	w, n, step, _ := issuer(t, nil)
	n.tpm.RestartCount++
	n.refused("tpm_reset", step, n.csr(n.step("/build")))
	n = w.attest(n.tpm, attestOptions{key: n.key})
	if _, err := n.sign(step, n.csr(n.step("/build"))); err != nil {
		t.Fatal(err)
	}
}

// A step whose TPM was reset while its tool ran must be signed once its agent has
// attested again: the recorder tries again after Aborted, and gives up after
// PermissionDenied, also of those that are refused together.
func TestATPMResetRefusesForNowOnly(t *testing.T) {
	_, n, step, _ := issuer(t, nil)
	n.tpm.Reboot(true)
	n.tpm.PCRs[0].Values[7] = make([]byte, 32) // whatever it measured since
	req := new(svidv1.BatchNewX509SVIDRequest)
	for range 3 {
		req.Params = append(req.Params, &svidv1.NewX509SVIDParams{EntryId: step, Csr: n.csr(n.step("/build"))})
	}
	resp, err := svidv1.NewSVIDClient(n.conn).BatchNewX509SVID(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	for i, r := range resp.Results {
		if codes.Code(r.Status.Code) != codes.Aborted {
			t.Errorf("item %d: %v", i, r.Status)
		}
	}
}

// TestRefusesEvidenceAfterAnUncleanReboot: a power cut, after which the clock is
// behind. Evidence from either side of it does not count on the other.
func TestRefusesEvidenceAfterAnUncleanReboot(t *testing.T) {
	w, n, step, _ := issuer(t, nil)
	before := *n.tpm
	n.tpm.Reboot(false)
	n.tpm.Clock /= 2
	n.refused("tpm_reset", step, n.csr(n.step("/build")))
	n = w.attest(n.tpm, attestOptions{key: n.key})
	if _, err := n.sign(step, n.csr(n.step("/build"))); err != nil {
		t.Fatalf("what attested again with safe=0: %v", err)
	}
	old := n.step("/build")
	old.tpm = &before
	n.refused("tpm_reset", step, n.csr(old))
}

// TestRefusesEvidenceAfterATPMClear: TPM2_Clear resets the counters and takes
// the AK away; a later one of the same TPM is alarmed, and the first is void.
func TestRefusesEvidenceAfterATPMClear(t *testing.T) {
	w := newWorld(t, nil)
	ek := forge.P256(t)
	n := w.attest(forge.NewTPM(t, w.maker, forge.TPMOptions{EKKey: ek}), attestOptions{})
	step := w.create(entry(n.id, "/build", stepSelectorsOf("go")...))
	cleared := forge.NewTPM(t, w.maker, forge.TPMOptions{EKKey: ek})
	cleared.ResetCount, cleared.RestartCount, cleared.Clock, cleared.Safe = 0, 0, 0, false

	// Its new AK has no certificate, and the one of the old does not fit.
	q := n.step("/build")
	q.tpm = cleared
	n.refused("evidence_quote_signature", step, n.csr(q))
	// An AK that outlived the fall of the counters is not a genuine TPM's.
	fallen := *n.tpm
	fallen.ResetCount = 0
	q = n.step("/build")
	q.tpm = &fallen
	n.refused("tpm_reset", step, n.csr(q))

	n = w.attest(cleared, attestOptions{})
	if w.srv.Counters()["alarm/ak_changed"] != 1 {
		t.Errorf("no alarm: %v", w.srv.Counters())
	}
	if _, err := n.sign(step, n.csr(n.step("/build"))); err != nil {
		t.Fatalf("what attested again: %v", err)
	}
}
