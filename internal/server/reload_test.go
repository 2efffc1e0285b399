package server

import (
	"encoding/pem"
	"os"
	"path/filepath"
	"testing"

	"github.com/rootlink/rootlink/internal/forge"
)

// TestReloadsEKTrust: makers come and TPMs go without a restart; a file that is
// wrong changes nothing.
func TestReloadsEKTrust(t *testing.T) {
	w := newWorld(t, nil)
	file := func(name string, b []byte) string {
		path := filepath.Join(w.dir, name)
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	other := forge.NewMaker(t, "Another Maker")
	both := []string{w.cfg.EKRoots[0], file("other.pem", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: other.Root.Raw}))}
	known, lost, unknown := w.newTPM(), w.newTPM(), forge.NewTPM(t, other, forge.TPMOptions{})
	attests := func(what string, tpm *forge.TPM, want bool) {
		t.Helper()
		if _, err := w.tryAttest(tpm, attestOptions{}); (err == nil) != want {
			t.Errorf("%s: %v", what, err)
		}
	}
	attests("unknown maker", unknown, false)
	w.srv.ReloadEKTrust(t.Context(), EKTrust{Roots: both, Deny: file("deny", []byte(hexOf(lost.EKHash)+"\n"))})
	attests("new maker", unknown, true)
	attests("denied", lost, false)
	attests("as before", known, true)
	for name, bad := range map[string]EKTrust{
		"nothing": {}, "no such file": {Roots: []string{filepath.Join(w.dir, "absent")}}, "no hashes": {Roots: both, Allow: file("allow", []byte("nonsense"))},
	} {
		w.srv.ReloadEKTrust(t.Context(), bad)
		attests(name+": new maker", unknown, true)
		attests(name+": denied", lost, false)
	}
	if roots, err := w.srv.EKRoots(); err != nil || len(roots.Roots) != 2 {
		t.Errorf("for verifiers: %d roots, %v", len(roots.Roots), err)
	}
}
