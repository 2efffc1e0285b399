package verifycmd

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/internal/forge"
	"github.com/rootlink/rootlink/pkg/attest"
	"github.com/rootlink/rootlink/pkg/link"
)

// desk is a directory with trust.json, a bundle and its artifact, and a clock.
type desk struct {
	dir   string
	now   time.Time
	world *forge.World
	trust link.TrustFile
	key   *ecdsa.PrivateKey // signs it
}

func newDesk(t *testing.T) *desk {
	t.Helper()
	w := forge.NewWorld(t)
	d := &desk{dir: t.TempDir(), now: w.Now.Add(time.Second), world: w, key: forge.P256(t)}
	artifact := sha256.Sum256([]byte("hello"))
	d.write(t, "hello", []byte("hello"))
	zero := 0
	files := map[string][32]byte{"a": sha256.Sum256([]byte("A")), "b/c": sha256.Sum256([]byte("C"))}
	d.write(t, "tree/a", []byte("A"))
	d.write(t, "tree/b/c", []byte("C"))
	tree, err := link.DirHash(files)
	if err != nil {
		t.Fatal(err)
	}
	p, err := link.Prepare(&link.Statement{
		Step: "build", Command: []string{"go", "build"}, Byproducts: link.Byproducts{ExitCode: &zero},
		Subjects: []link.Resource{
			{Name: "hello", Digest: map[string]string{"sha256": hex.EncodeToString(artifact[:])}},
			{Name: "tree", Digest: map[string]string{link.DirHashAlg: tree}},
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	tool, recorder := hex.EncodeToString(w.Leaf.Tool[:]), hex.EncodeToString(w.Leaf.Recorder[:])
	w.Leaf.Selectors = []string{"binary:recorder:sha256:" + recorder, "binary:tool:sha256:" + tool}
	w.Leaf.Payload = p.Digest()
	svid := w.Issue(t, w.Make(t))
	b, err := p.Sign(w.SVIDKey, svid)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := b.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	d.write(t, "build"+link.BundleSuffix, raw)
	d.write(t, "svid.pem", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: svid.Raw}))
	d.write(t, "svid.der", svid.Raw)
	root, err := link.MarshalTrustedRoot([]link.Authority{{Certificate: w.Authority, Start: w.Authority.NotBefore}})
	if err != nil {
		t.Fatal(err)
	}
	d.trust = link.TrustFile{
		Serial: 5, Issued: w.Now.Add(-time.Hour), Expires: w.Now.AddDate(0, 1, 0), TrustDomain: "example.org", TrustedRoot: root,
		AttestationCAs: []link.AttestationCA{{Certificate: w.CA.Cert.Raw}},
		EK:             link.EKTrust{Roots: [][]byte{w.Maker.Root.Raw}},
		Requirements:   []link.Requirement{{Identity: "spiffe://example.org/**", Tier: link.TierTPM, Tools: []string{tool}, Recorders: []string{recorder}}},
	}
	d.writeTrust(t)
	return d
}

func (d *desk) path(name string) string { return filepath.Join(d.dir, name) }

func (d *desk) write(t *testing.T, name string, data []byte) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(d.path(name)), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(d.path(name), data, 0o644); err != nil {
		t.Fatal(err)
	}
}

func (d *desk) writeTrust(t *testing.T) {
	t.Helper()
	d.write(t, "trust.json", d.signTrust(t))
}

func (d *desk) signTrust(t *testing.T) []byte {
	t.Helper()
	spki, err := x509.MarshalPKIXPublicKey(d.key.Public())
	if err != nil {
		t.Fatal(err)
	}
	d.trust.TrustKeys = []link.TrustKey{{Key: spki}}
	doc, err := d.trust.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	d.write(t, "unsigned.json", doc)
	raw, err := link.SignTrust(doc, d.key)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

// run runs the command line; words that name a file of the desk become its path.
func (d *desk) run(t *testing.T, words ...string) (code int, stdout, stderr string) {
	t.Helper()
	for i, w := range words {
		if _, err := os.Lstat(d.path(w)); w != "" && err == nil {
			words[i] = d.path(w)
		}
	}
	root := cli.Root("rootlink", "", "test")
	root.AddCommand(verifyCommand(func() time.Time { return d.now }), archiveCommand(func() time.Time { return d.now }), InspectCommand())
	var out, errOut bytes.Buffer
	code = cli.Main(context.Background(), root, words, &out, &errOut)
	return code, out.String(), errOut.String()
}

// verify runs `verify` with what every call needs, and more.
func (d *desk) verify(t *testing.T, more ...string) (int, string, string) {
	t.Helper()
	words := []string{"verify", "--trust", "trust.json", "--trust-state", d.path("state"), "--identity", "spiffe://example.org/build"}
	return d.run(t, append(words, more...)...)
}

const bundleName = "build" + link.BundleSuffix

func TestVerifyCommand(t *testing.T) {
	d := newDesk(t)
	code, out, errOut := d.verify(t, bundleName, "hello", "tree")
	if code != cli.ExitOK || errOut != "" {
		t.Fatalf("exit %d\n%s%s", code, out, errOut)
	}
	for _, want := range []string{"✓ VERIFIED", "SOFTWARE TPM", "hello  sha256:", "tree  dirHash:"} {
		if !strings.Contains(out, want) {
			t.Errorf("stdout lacks %q:\n%s", want, out)
		}
	}
	code, out, _ = d.verify(t, "--output", "json", bundleName, "hello")
	var res link.Result
	if err := json.Unmarshal([]byte(out), &res); err != nil || code != cli.ExitOK || res.Verdict != link.VerdictVerified || res.SchemaVersion != link.ResultSchema {
		t.Errorf("exit %d, %v\n%s", code, err, out)
	}
}

func TestBundleIsKnownByItsMediaType(t *testing.T) {
	d := newDesk(t)
	if err := os.Rename(d.path(bundleName), d.path("renamed")); err != nil {
		t.Fatal(err)
	}
	if code, out, errOut := d.verify(t, "hello", "renamed"); code != cli.ExitOK {
		t.Errorf("exit %d\n%s%s", code, out, errOut)
	}
}

// The attacker replaces the artifact by a copy of the bundle, or by any other
// bundle that verifies: nothing would be left to compare.
func TestRefusesBundleInPlaceOfTheArtifact(t *testing.T) {
	d := newDesk(t)
	raw, err := os.ReadFile(d.path(bundleName))
	if err != nil {
		t.Fatal(err)
	}
	d.write(t, "hello", raw)
	for _, args := range [][]string{{bundleName, "hello"}, {"hello", bundleName}} {
		if code, out, errOut := d.verify(t, args...); code != cli.ExitPolicy || !strings.Contains(errOut, "is not a subject of any link that verified") {
			t.Errorf("%q: exit %d\n%s%s", args, code, out, errOut)
		}
	}
	d.write(t, "renamed", raw)
	if code, out, errOut := d.verify(t, "renamed", "hello"); code != cli.ExitUsage || !strings.Contains(errOut, "suffix") {
		t.Errorf("exit %d\n%s%s", code, out, errOut)
	}
}

// What a refused bundle says reaches stderr, where a person reads the verdict.
func TestRefusalHidesNoControlCharacters(t *testing.T) {
	d := newDesk(t)
	zero := 0
	p, err := link.Prepare(&link.Statement{
		Step: "build", Byproducts: link.Byproducts{ExitCode: &zero, Signal: "\x1b[2J✓ VERIFIED"},
		Subjects: []link.Resource{{Name: "hello", Digest: map[string]string{"sha256": strings.Repeat("0", 64), "\x1b[1A": strings.Repeat("0", 64)}}},
	})
	if err != nil {
		t.Fatal(err)
	}
	d.world.Leaf.Payload = p.Digest()
	b, err := p.Sign(d.world.SVIDKey, d.world.Issue(t, d.world.Make(t)))
	if err != nil {
		t.Fatal(err)
	}
	raw, err := b.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	d.write(t, bundleName, raw)
	code, out, errOut := d.verify(t, bundleName, "hello")
	if code != cli.ExitPolicy || strings.Contains(out+errOut, "\x1b") {
		t.Fatalf("exit %d\n%q\n%q", code, out, errOut)
	}
}

func TestVerifyExitCodes(t *testing.T) {
	for name, c := range map[string]struct {
		spoil  func(t *testing.T, d *desk)
		args   []string
		code   int
		stderr string
	}{
		"no arguments":     {nil, []string{}, cli.ExitUsage, "no bundle"},
		"only an artifact": {nil, []string{"hello"}, cli.ExitUsage, "no bundle among"},
		"bundle twice":     {nil, []string{bundleName, bundleName}, cli.ExitUsage, "twice"},
		"layout":           {nil, []string{"--layout", "x", bundleName}, cli.ExitUsage, "both --layout and --identity"},
		"bad pattern":      {nil, []string{"--identity", "build", bundleName}, cli.ExitUsage, "spiffe://"},
		"bad time":         {nil, []string{"--not-before", "today", bundleName}, cli.ExitUsage, "hint: such as"},
		"missing file":     {nil, []string{bundleName, "nowhere"}, cli.ExitInternal, "hint:"},
		"missing trust":    {nil, []string{"--trust", "nowhere", bundleName}, cli.ExitInternal, "hint:"},
		"broken trust": {
			func(t *testing.T, d *desk) { d.write(t, "trust.json", []byte("{}")) },
			[]string{bundleName},
			cli.ExitInternal, "trust export",
		},
		"one byte changed": {
			func(t *testing.T, d *desk) { d.write(t, "hello", []byte("hellp")) },
			[]string{bundleName, "hello"},
			cli.ExitPolicy, "not a subject",
		},
		"file added to a directory": {
			func(t *testing.T, d *desk) { d.write(t, "tree/more", nil) },
			[]string{bundleName, "tree"},
			cli.ExitPolicy, "not a subject",
		},
		"symbolic link in a directory": {func(t *testing.T, d *desk) {
			if err := os.Symlink("/etc/passwd", d.path("tree/link")); err != nil {
				t.Fatal(err)
			}
		}, []string{bundleName, "tree"}, cli.ExitPolicy, "not a subject"},
		"dangling link in a directory": {func(t *testing.T, d *desk) {
			if err := os.Symlink("nowhere", d.path("tree/link")); err != nil {
				t.Fatal(err)
			}
		}, []string{bundleName, "tree"}, cli.ExitInternal, "neither a file nor a link to one"},
		"repository in a directory": {
			func(t *testing.T, d *desk) { d.write(t, "tree/.git/config", nil) },
			[]string{bundleName, "tree"},
			cli.ExitInternal, "is not recorded",
		},
		"broken bundle": {
			func(t *testing.T, d *desk) { d.write(t, bundleName, []byte("not JSON")) },
			[]string{bundleName},
			cli.ExitCrypto, "hint: this is not, or not all of",
		},
		"forged signature": {func(t *testing.T, d *desk) {
			raw, err := os.ReadFile(d.path(bundleName))
			if err != nil {
				t.Fatal(err)
			}
			other, err := os.ReadFile(newDesk(t).path(bundleName))
			if err != nil {
				t.Fatal(err)
			}
			sig := func(b []byte) string { s := string(b); return s[strings.Index(s, `"sig":`):] }
			d.write(t, bundleName, []byte(strings.Replace(string(raw), sig(raw), sig(other), 1)))
		}, []string{bundleName}, cli.ExitCrypto, "not signed by the SVID's key"},
		"a TPM on the deny-list": {func(t *testing.T, d *desk) {
			d.trust.EK.Deny = []string{hex.EncodeToString(d.world.TPM.EKHash[:])}
			d.writeTrust(t)
		}, []string{bundleName}, cli.ExitCrypto, "has shut this TPM out"},
		"another identity":  {nil, []string{"--identity", "spiffe://example.org/other", bundleName}, cli.ExitPolicy, "hint: someone else signed"},
		"an hour later":     {func(t *testing.T, d *desk) { d.now = d.now.Add(time.Hour) }, []string{bundleName}, cli.ExitCrypto, "rootlink stamp"},
		"an hour earlier":   {func(t *testing.T, d *desk) { d.now = d.now.Add(-90 * time.Minute) }, []string{bundleName}, cli.ExitPolicy, "hint: check this machine's clock"},
		"trust.json is old": {func(t *testing.T, d *desk) { d.now = d.now.AddDate(0, 2, 0) }, []string{bundleName}, cli.ExitPolicy, "export a new trust.json"},
		"older run":         {nil, []string{"--not-before", "2027-03-01T12:00:01Z", bundleName}, cli.ExitPolicy, "older run"},
	} {
		t.Run(name, func(t *testing.T) {
			d := newDesk(t)
			if c.spoil != nil {
				c.spoil(t, d)
			}
			code, out, errOut := d.verify(t, slices.Clone(c.args)...)
			if code != c.code || !strings.Contains(errOut, c.stderr) || strings.Contains(out, "✓ VERIFIED") {
				t.Errorf("exit %d, want %d with %q\n%s%s", code, c.code, c.stderr, out, errOut)
			}
		})
	}
}

func TestVerifyNeedsAnIdentityAndTrust(t *testing.T) {
	d := newDesk(t)
	if code, _, errOut := d.run(t, "verify", "--trust", "trust.json", bundleName); code != cli.ExitUsage || !strings.Contains(errOut, "--identity") {
		t.Errorf("exit %d: %s", code, errOut)
	}
	if code, _, errOut := d.run(t, "verify", "--identity", "spiffe://example.org/build", bundleName); code != cli.ExitUsage || !strings.Contains(errOut, "trust export") {
		t.Errorf("exit %d: %s", code, errOut)
	}
}

func TestRevocationsFile(t *testing.T) {
	d := newDesk(t)
	r := link.RevocationsFile{TrustDomain: "example.org", Issued: d.now, Revocations: []link.Revocation{
		{Kind: link.RevokedExecutable, ID: hex.EncodeToString(d.world.Leaf.Tool[:]), Always: true, Reason: "backdoor"},
	}}
	raw, err := r.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	if raw, err = link.SignRevocations(raw, d.key); err != nil {
		t.Fatal(err)
	}
	d.write(t, "revoked.json", raw)
	code, _, errOut := d.verify(t, "--revocations", "revoked.json", bundleName)
	if code != cli.ExitPolicy || !strings.Contains(errOut, "backdoor") {
		t.Errorf("exit %d: %s", code, errOut)
	}
}

func TestInspect(t *testing.T) {
	d := newDesk(t)
	for _, name := range []string{bundleName, "svid.pem", "svid.der", "trust.json"} {
		code, out, errOut := d.run(t, "inspect", name)
		if code != cli.ExitOK || !strings.HasPrefix(out, "UNVERIFIED ") || !strings.Contains(out, "example.org") {
			t.Errorf("%s: exit %d\n%s%s", name, code, out, errOut)
		}
		code, out, _ = d.run(t, "inspect", "--output", "json", name)
		var v map[string]any
		if err := json.Unmarshal([]byte(out), &v); err != nil || code != cli.ExitOK || v["unverified"] != true {
			t.Errorf("%s: exit %d, %v\n%s", name, code, err, out)
		}
	}
	d.write(t, "key.pem", []byte("-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"))
	for _, name := range []string{"hello", "key.pem"} {
		if code, _, errOut := d.run(t, "inspect", name); code != cli.ExitInternal || !strings.Contains(errOut, "hint:") {
			t.Errorf("%s: exit %d: %s", name, code, errOut)
		}
	}
	if code, _, _ := d.run(t, "inspect"); code != cli.ExitUsage {
		t.Errorf("exit %d", code)
	}
	if code, _, _ := d.run(t, "inspect", "trust.json", "--extract", d.path("x")); code != cli.ExitUsage {
		t.Errorf("exit %d", code)
	}
}

// A refusal is read by somebody in a hurry: what failed comes first, what
// passed on request, and a broken chain is not said to prove anything.
func TestRefusalIsShort(t *testing.T) {
	d := newDesk(t)
	d.write(t, "other", []byte("another"))
	for _, tc := range []struct {
		name    string
		content []byte // of the bundle, nil: as it is
		code    int
	}{
		{"empty bundle", []byte{}, cli.ExitCrypto},
		{"no bundle", []byte("{}"), cli.ExitCrypto},
		{"other artifact", nil, cli.ExitPolicy},
	} {
		if tc.content != nil {
			d.write(t, "bad"+link.BundleSuffix, tc.content)
		}
		name := map[bool]string{true: "bad" + link.BundleSuffix, false: bundleName}[tc.content != nil]
		code, out, errOut := d.verify(t, name, "other")
		if code != tc.code || !strings.HasPrefix(out, "✗ REFUSED") || !strings.Contains(errOut, "hint:") {
			t.Errorf("%s: exit %d\n%s%s", tc.name, code, out, errOut)
		}
		if n := strings.Count(out, "\n"); n > 30 || strings.Contains(out, "✓") || strings.Contains(out, "Proved by the TPM") {
			t.Errorf("%s: %d lines\n%s", tc.name, n, out)
		}
		if tc.code == cli.ExitCrypto && (!strings.Contains(out, "not established: who signed") || strings.Contains(out, "AK ")) {
			t.Errorf("%s: a broken chain\n%s", tc.name, out)
		}
		_, out, _ = d.verify(t, "--verbose", name, "other")
		if !strings.Contains(out, "✓ trust.window") || !strings.Contains(out, "✗ artifact.subject") || tc.code == cli.ExitCrypto && strings.Contains(out, "Proved by") {
			t.Errorf("%s: verbose\n%s", tc.name, out)
		}
	}
}

// What run writes with --if-unavailable unsigned must not pass for signed.
func TestInspectSaysUnsigned(t *testing.T) {
	d := newDesk(t)
	raw, err := os.ReadFile(d.path(bundleName))
	if err != nil {
		t.Fatal(err)
	}
	b, err := link.ParseBundle(raw)
	if err != nil {
		t.Fatal(err)
	}
	d.write(t, "build.unsigned.json", append(b.UnverifiedPayload(), '\n'))
	code, out, errOut := d.run(t, "inspect", "build.unsigned.json")
	if code != cli.ExitOK || !strings.HasPrefix(out, "UNSIGNED statement") || !strings.Contains(out, "hello") {
		t.Errorf("exit %d\n%s%s", code, out, errOut)
	}
	code, out, _ = d.run(t, "inspect", "--output", "json", "build.unsigned.json")
	var v map[string]any
	if err := json.Unmarshal([]byte(out), &v); err != nil || code != cli.ExitOK || v["signed"] != false || v["unverified"] != true {
		t.Errorf("exit %d, %v\n%s", code, err, out)
	}
	if code, _, _ := d.run(t, "inspect", "build.unsigned.json", "--extract", d.path("x")); code != cli.ExitUsage {
		t.Errorf("extract: exit %d", code)
	}
}

// A peer judges what we extract: tpm2-tools, which share no code with us.
func TestCheckquoteAcceptsExtractedQuote(t *testing.T) {
	for _, banks := range [][]attest.PCRSelection{
		{{Bank: "sha256", Indices: []uint32{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}}},
		{{Bank: "sha256", Indices: []uint32{0, 1, 2, 3, 4, 5, 6, 7, 14, 23}}, {Bank: "sha384", Indices: []uint32{7}}},
	} {
		d := newDesk(t)
		d.world.Selection = banks
		d.write(t, "svid.der", d.world.Issue(t, d.world.Make(t)).Raw)
		code, _, errOut := d.run(t, "inspect", "svid.der", "--extract", d.path("parts"))
		if code != cli.ExitOK {
			t.Fatalf("exit %d: %s", code, errOut)
		}
		extra, err := os.ReadFile(d.path("parts/extradata.hex"))
		if err != nil {
			t.Fatal(err)
		}
		args := []string{"-u", d.path("parts/ak.pem"), "-m", d.path("parts/quote.msg"), "-s", d.path("parts/quote.sig"), "-f", d.path("parts/pcrs.out"), "-q", strings.TrimSpace(string(extra))}
		if out, err := exec.CommandContext(t.Context(), "tpm2_checkquote", args...).CombinedOutput(); err != nil {
			t.Fatalf("tpm2_checkquote: %v\n%s", err, out)
		}
		// Its approval must mean something: with one PCR changed it refuses.
		pcrs, err := os.ReadFile(d.path("parts/pcrs.out"))
		if err != nil {
			t.Fatal(err)
		}
		pcrs[132+4+4+2] ^= 1 // first byte of the first value
		d.write(t, "parts/pcrs.out", pcrs)
		if out, err := exec.CommandContext(t.Context(), "tpm2_checkquote", args...).CombinedOutput(); err == nil {
			t.Fatalf("tpm2_checkquote accepts a changed PCR:\n%s", out)
		}
	}
}

func TestExtractWritesEveryPart(t *testing.T) {
	d := newDesk(t)
	if code, _, errOut := d.run(t, "inspect", bundleName, "--extract", d.path("parts")); code != cli.ExitOK {
		t.Fatal(errOut)
	}
	for _, name := range []string{"svid.pem", "statement.json", "evidence.cbor", "quote.msg", "quote.sig", "pcrs.out", "extradata.hex", "nonce.hex", "ak.pem", "ak-cert.pem", "ek.pem", "ek-cert.pem"} {
		if st, err := os.Stat(d.path("parts/" + name)); err != nil || st.Size() == 0 {
			t.Errorf("%s: %v", name, err)
		}
	}
	raw, err := os.ReadFile(d.path("parts/evidence.cbor"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := attest.ParseRecord(raw); err != nil {
		t.Error(err)
	}
}
