package verifycmd

import (
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/internal/forge"
	"github.com/rootlink/rootlink/pkg/attest"
	"github.com/rootlink/rootlink/pkg/envelope"
	"github.com/rootlink/rootlink/pkg/link"
)

// detach signs the desk's link anew, with an SVID of a stock SPIRE server, and
// lays the node's record beside it.
func (d *desk) detach(t *testing.T) (record string) {
	t.Helper()
	raw, err := os.ReadFile(d.path(bundleName))
	if err != nil {
		t.Fatal(err)
	}
	old, err := link.ParseBundle(raw)
	if err != nil {
		t.Fatal(err)
	}
	stmt, err := old.UnverifiedStatement()
	if err != nil {
		t.Fatal(err)
	}
	p, err := link.Prepare(stmt)
	if err != nil {
		t.Fatal(err)
	}
	w, tsa := d.world, forge.NewTSA(t, nil)
	log := []byte("no boot event log") // and yet carried along, if it is named
	w.Evidence = func(e *attest.Evidence) { e.EventLog = attest.EventLogDigest(log) }
	w.Leaf.Payload, w.Leaf.KeyOrigin = p.Digest(), attest.OriginAgent
	svid := w.Plain(t)
	r := w.Detach(t, svid)
	b, err := p.SignDetached(w.SVIDKey, svid, r)
	if err != nil {
		t.Fatal(err)
	}
	r.Token = tsa.Token(t, r.Signature, d.now, nil)
	if b, err = b.WithTimestamps(tsa.Token(t, b.Signature(), d.now, nil)); err != nil {
		t.Fatal(err)
	}
	if raw, err = b.Marshal(); err != nil {
		t.Fatal(err)
	}
	d.write(t, bundleName, raw)
	if raw, err = r.Marshal(); err != nil {
		t.Fatal(err)
	}
	d.write(t, b.DetachedName(), raw)
	root := link.TrustedRoot{Authorities: []link.Authority{{Certificate: w.Authority, Start: w.Authority.NotBefore}}}
	root.Timestamps = append(root.Timestamps, tsa.Authority())
	if d.trust.TrustedRoot, err = root.Marshal(); err != nil {
		t.Fatal(err)
	}
	req := &d.trust.Requirements[0]
	req.Evidence, req.EKs = link.EvidenceDetached, []string{hex.EncodeToString(w.TPM.EKHash[:])}
	d.writeTrust(t)
	d.now = d.now.AddDate(0, 0, 2) // the SVID is long gone
	return b.DetachedName()
}

func TestVerifyDetachedEvidence(t *testing.T) {
	d := newDesk(t)
	record := d.detach(t)
	code, out, errOut := d.verify(t, bundleName, "hello")
	if code != cli.ExitOK {
		t.Fatalf("exit %d\n%s%s", code, out, errOut)
	}
	for _, want := range []string{"tier: tpm (detached evidence)", "DETACHED: the node vouches, the server checked nothing", "vouched for by spiffe://example.org/spire/agent/tpmnode/", "that this node may speak for"} {
		if !strings.Contains(out, want) {
			t.Errorf("stdout lacks %q:\n%s", want, out)
		}
	}
	code, out, _ = d.verify(t, "--output", "json", bundleName, "hello")
	var res link.Result
	if err := json.Unmarshal([]byte(out), &res); err != nil || code != 0 || res.Links[0].Evidence != link.EvidenceDetached || strings.Contains(out, "nonce_time") {
		t.Errorf("exit %d, %v\n%s", code, err, out)
	}
	// The record alone, and the bundle with it.
	for _, name := range []string{record, bundleName} {
		code, out, errOut = d.run(t, "inspect", name)
		if code != 0 || !strings.Contains(out, "UNVERIFIED") || !strings.Contains(out, "detached") || !strings.Contains(out, "agent svid") {
			t.Errorf("inspect %s: exit %d\n%s%s", name, code, out, errOut)
		}
	}
	if code, _, errOut = d.run(t, "inspect", bundleName, "--extract", d.path("parts")); code != 0 {
		t.Error(errOut)
	}
	for _, name := range []string{"agent-svid.pem", "svid.pem", "quote.msg", "evidence.cbor"} {
		if st, err := os.Stat(d.path("parts/" + name)); err != nil || st.Size() == 0 {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestRefusesDetachedEvidenceByItsFile(t *testing.T) {
	for name, c := range map[string]struct {
		spoil func(*testing.T, *desk, string)
		code  int
		words string
	}{
		"lost":     {func(t *testing.T, d *desk, r string) { d.move(t, r, "elsewhere") }, cli.ExitPolicy, "no record lies beside"},
		"cut off":  {func(t *testing.T, d *desk, r string) { d.write(t, r, []byte{0xa5}) }, cli.ExitCrypto, "malformed detached evidence"},
		"oversize": {func(t *testing.T, d *desk, r string) { d.write(t, r, make([]byte, 1<<20)) }, cli.ExitCrypto, "at most 65536"},
	} {
		t.Run(name, func(t *testing.T) {
			d := newDesk(t)
			c.spoil(t, d, d.detach(t))
			if code, out, errOut := d.verify(t, bundleName, "hello"); code != c.code || !strings.Contains(out+errOut, c.words) {
				t.Errorf("exit %d\n%s%s", code, out, errOut)
			}
		})
	}
}

func (d *desk) move(t *testing.T, from, to string) {
	t.Helper()
	if err := os.Rename(d.path(from), d.path(to)); err != nil {
		t.Fatal(err)
	}
}

// An archive holds the record, and verifies where nothing else lies beside it.
func TestArchiveHoldsDetachedEvidence(t *testing.T) {
	d := newDesk(t)
	record := d.detach(t)
	pin, err := envelope.Fingerprint(d.key.Public())
	if err != nil {
		t.Fatal(err)
	}
	code, out, errOut := d.run(t, "archive", "--trust", "trust.json", "--trust-state", d.path("state"), "--identity", "spiffe://example.org/build",
		"--timestamp-url", "none", "--out", filepath.Join(d.dir, "a.archive"), bundleName, "hello")
	if code != 0 {
		t.Fatalf("exit %d\n%s%s", code, out, errOut)
	}
	d.move(t, record, "gone")
	d.move(t, bundleName, "gone-too")
	args := []string{"verify", "--trust-state", d.path("state2"), "--archive", "a.archive", "--trust-key", pin, "--identity", "spiffe://example.org/build", "hello"}
	if code, out, errOut = d.run(t, args...); code != 0 || !strings.Contains(out, "DETACHED") {
		t.Errorf("exit %d\n%s%s", code, out, errOut)
	}
}

// A summary names everything that the verdict rests on.
func TestSummaryNamesTheDetachedRecord(t *testing.T) {
	d := newDesk(t)
	record := d.detach(t)
	der, err := x509.MarshalPKCS8PrivateKey(forge.P256(t))
	if err != nil {
		t.Fatal(err)
	}
	d.write(t, "vsa.pem", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
	if err := os.Chmod(d.path("vsa.pem"), 0o600); err != nil {
		t.Fatal(err)
	}
	code, out, errOut := d.verify(t, "--vsa", d.path("s.json"), "--vsa-key", d.path("vsa.pem"), "--vsa-verifier", "https://example.org/verifier", "--vsa-resource", "pkg:generic/hello", bundleName, "hello")
	if code != cli.ExitOK {
		t.Fatalf("exit %d\n%s%s", code, out, errOut)
	}
	raw, err := os.ReadFile(d.path("s.json"))
	if err != nil {
		t.Fatal(err)
	}
	var envelope struct{ Payload []byte }
	if err := json.Unmarshal(raw, &envelope); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{record, bundleName, "ROOTLINK_SOFTWARE_TPM"} {
		if !strings.Contains(string(envelope.Payload), want) {
			t.Errorf("the summary lacks %s: %s", want, envelope.Payload)
		}
	}
}
