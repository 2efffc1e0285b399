package agent

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/hex"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/rootlink/rootlink/internal/recorder"
	"github.com/rootlink/rootlink/pkg/attest"
	workloadv1 "github.com/rootlink/rootlink/proto/rootlink/workload/v1"
)

func init() {
	if recorder.IsStub() {
		// As rootlink itself does: only here is this the main thread for
		// certain, which is the one that is traced.
		runtime.LockOSThread()
	}
}

func TestMain(m *testing.M) {
	if recorder.IsStub() {
		recorder.RunStub()
	}
	if mode := os.Getenv("ROOTLINK_TEST_ROLE"); mode != "" {
		os.Exit(role(mode))
	}
	os.Exit(m.Run())
}

// program returns the path of a system program without links in it.
func program(t *testing.T, name string) string {
	t.Helper()
	p, err := exec.LookPath(name)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func hashFile(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	h := sha256.Sum256(b)
	return hex.EncodeToString(h[:])
}

// unprotected is the recorder selector of the test binary, which is not setgid.
func unprotected(t *testing.T) string {
	return strings.Replace(selfHash(t), "binary:sha256:", "binary:recorder_unprotected:sha256:", 1)
}

// record runs argv as a step and calls Measure at each exec of it.
func record(t *testing.T, ctx context.Context, c workloadv1.IssuerClient, id string, argv ...string) (last *workloadv1.MeasureResponse, err error) {
	t.Helper()
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	_, err = recorder.Run(recorder.Command{Path: program(t, argv[0]), Args: argv, Env: os.Environ(), Stdin: null, Stdout: null, Stderr: null},
		func(*recorder.Exec) error {
			var err error
			last, err = c.Measure(ctx, &workloadv1.MeasureRequest{SpiffeId: id})
			return err
		})
	return last, err
}

// statement is what a step signs with: a key and the digest of a statement.
type statement struct {
	key     *ecdsa.PrivateKey
	spki    []byte
	payload [32]byte
}

func newStatement(t *testing.T, text string) *statement {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	return &statement{key, spki, sha256.Sum256([]byte(text))}
}

func (s *statement) prepare(ctx context.Context, c workloadv1.IssuerClient) ([]byte, error) {
	r, err := c.Prepare(ctx, &workloadv1.PrepareRequest{Spki: s.spki, PayloadSha256: s.payload[:]})
	return r.GetEvidence(), err
}

func (s *statement) csr(t *testing.T, evidence ...[]byte) []byte {
	t.Helper()
	tmpl := &x509.CertificateRequest{}
	for _, e := range evidence {
		tmpl.ExtraExtensions = append(tmpl.ExtraExtensions, pkix.Extension{Id: asn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 7, 1, 35}, Value: e})
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, tmpl, s.key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// stepAgent starts an agent and a server with an entry for /bin/true.
func stepAgent(t *testing.T) (*fakeServer, *running, workloadv1.IssuerClient, context.Context) {
	t.Helper()
	s := newFakeServer(t)
	s.start()
	s.addEntry("/step", "binary:tool:sha256:"+hashFile(t, program(t, "true")), unprotected(t))
	r := startAgent(t, s)
	r.waitReady()
	return s, r, workloadv1.NewIssuerClient(r.dial()), testContext(t)
}

func wantCode(t *testing.T, what string, err error, want codes.Code) {
	t.Helper()
	if status.Code(err) != want {
		t.Errorf("%s: %v, want %s", what, err, want)
	}
}

// TestStep is the whole of a recorded step: measured at exec, prepared after
// the exit, issued with the evidence inside.
func TestStep(t *testing.T) {
	_, r, c, ctx := stepAgent(t)
	m, err := record(t, ctx, c, "", "true")
	if err != nil {
		t.Fatal(err)
	}
	if m.SpiffeId != "spiffe://"+testTD+"/step" || m.TrustDomain != testTD || m.Measurement.RecorderProtected || m.Measurement.UnprotectedReason == "" {
		t.Errorf("measured %v", m)
	}
	st := newStatement(t, "statement")
	ext, err := st.prepare(ctx, c)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := c.Issue(ctx, &workloadv1.IssueRequest{Csr: st.csr(t, ext)})
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(resp.X509Svid[0])
	if err != nil {
		t.Fatal(err)
	}
	ev, err := attest.FromCertificate(cert)
	if err != nil {
		t.Fatal(err)
	}
	self, _ := hex.DecodeString(strings.TrimPrefix(selfHash(t), "binary:sha256:"))
	tool, _ := hex.DecodeString(hashFile(t, program(t, "true")))
	if ev.Payload != st.payload || !bytes.Equal(ev.Tool[:], tool) || !bytes.Equal(ev.Recorder[:], self) || ev.KeyOrigin != attest.OriginCaller {
		t.Errorf("evidence %+v", ev)
	}
	if len(resp.Authorities) != 1 {
		t.Errorf("%d authorities", len(resp.Authorities))
	}
	if r.quoter.quotes != 1 {
		t.Errorf("%d quotes, want one", r.quoter.quotes)
	}
	// A second statement under the same measurement is refused.
	_, err = newStatement(t, "another").prepare(ctx, c)
	wantCode(t, "a second statement", err, codes.FailedPrecondition)
}

func TestPrepareBeforeTheToolExited(t *testing.T) {
	_, _, c, ctx := stepAgent(t)
	null, _ := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	defer null.Close()
	_, err := recorder.Run(recorder.Command{Path: program(t, "true"), Args: []string{"true"}, Env: os.Environ(), Stdin: null, Stdout: null, Stderr: null},
		func(*recorder.Exec) error {
			if _, err := c.Measure(ctx, &workloadv1.MeasureRequest{}); err != nil {
				return err
			}
			_, err := newStatement(t, "early").prepare(ctx, c)
			wantCode(t, "the tool has not even begun", err, codes.FailedPrecondition)
			return nil
		})
	if err != nil {
		t.Fatal(err)
	}
}

// TestRefusesCSROtherThanPrepared: whoever holds the connection cannot swap the
// key, the evidence, or leave it out.
func TestRefusesCSROtherThanPrepared(t *testing.T) {
	_, _, c, ctx := stepAgent(t)
	if _, err := record(t, ctx, c, "", "true"); err != nil {
		t.Fatal(err)
	}
	_, err := c.Issue(ctx, &workloadv1.IssueRequest{Csr: newStatement(t, "x").csr(t)})
	wantCode(t, "nothing prepared", err, codes.FailedPrecondition)
	st := newStatement(t, "statement")
	ext, err := st.prepare(ctx, c)
	if err != nil {
		t.Fatal(err)
	}
	changed := bytes.Clone(ext)
	changed[len(changed)-1] ^= 1
	for what, csr := range map[string][]byte{
		"another key":       newStatement(t, "statement").csr(t, ext),
		"no evidence":       st.csr(t),
		"changed evidence":  st.csr(t, changed),
		"evidence twice":    st.csr(t, ext, ext),
		"not a CSR":         []byte("x"),
		"trailing evidence": st.csr(t, append(bytes.Clone(ext), 0)),
	} {
		_, err := c.Issue(ctx, &workloadv1.IssueRequest{Csr: csr})
		wantCode(t, what, err, codes.InvalidArgument)
	}
	if _, err := c.Issue(ctx, &workloadv1.IssueRequest{Csr: st.csr(t, ext)}); err != nil {
		t.Errorf("the prepared one: %v", err)
	}
}

func TestRefusesBadPrepare(t *testing.T) {
	_, _, c, ctx := stepAgent(t)
	if _, err := record(t, ctx, c, "", "true"); err != nil {
		t.Fatal(err)
	}
	st := newStatement(t, "s")
	p384, _ := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	wrong, _ := x509.MarshalPKIXPublicKey(p384.Public())
	for what, req := range map[string]*workloadv1.PrepareRequest{
		"no statement":   {Spki: st.spki, PayloadSha256: make([]byte, 32)},
		"short digest":   {Spki: st.spki, PayloadSha256: st.payload[:31]},
		"P-384 key":      {Spki: wrong, PayloadSha256: st.payload[:]},
		"bytes after it": {Spki: append(bytes.Clone(st.spki), 0), PayloadSha256: st.payload[:]},
		"nothing":        {},
	} {
		_, err := c.Prepare(ctx, req)
		wantCode(t, what, err, codes.InvalidArgument)
	}
}

func TestMeasureWithoutAStoppedChild(t *testing.T) {
	_, _, c, ctx := stepAgent(t)
	_, err := c.Measure(ctx, &workloadv1.MeasureRequest{})
	wantCode(t, "no child", err, codes.FailedPrecondition)
	_, err = newStatement(t, "x").prepare(ctx, c)
	wantCode(t, "prepare without a measurement", err, codes.FailedPrecondition)
}

// TestRefusesStepEntryLackingToolOrRecorder: without a tool selector any
// program would do; without a recorder selector, anybody could claim to record.
func TestRefusesStepEntryLackingToolOrRecorder(t *testing.T) {
	s := newFakeServer(t)
	s.start()
	tool := "binary:tool:sha256:" + hashFile(t, program(t, "true"))
	s.addEntry("/no-recorder", tool, selfHash(t))
	s.addEntry("/no-tool", unprotected(t))
	s.addEntry("/plain", selfHash(t))
	s.addEntry("/protected-only", tool, strings.Replace(selfHash(t), "sha256", "recorder:sha256", 1))
	r := startAgent(t, s)
	r.waitReady()
	_, err := record(t, testContext(t), workloadv1.NewIssuerClient(r.dial()), "", "true")
	wantCode(t, "measure", err, codes.PermissionDenied)
	if err == nil || !strings.Contains(err.Error(), "rootlink-server entry create") || !strings.Contains(err.Error(), unprotected(t)) {
		t.Errorf("no way out in %v", err)
	}
}

// TestToolHashNeverNamesAWorkload: starting the victim's binary stopped must
// not give its identity to the one who started it.
func TestToolHashNeverNamesAWorkload(t *testing.T) {
	s := newFakeServer(t)
	s.start()
	s.addEntry("/victim", "binary:sha256:"+hashFile(t, program(t, "true")))
	r := startAgent(t, s)
	r.waitReady()
	_, err := record(t, testContext(t), workloadv1.NewIssuerClient(r.dial()), "spiffe://"+testTD+"/victim", "true")
	wantCode(t, "measure", err, codes.PermissionDenied)
}

// TestToolThatRunsAnother: env execs the real tool; both must be in the entry,
// and both must have been seen.
func TestToolThatRunsAnother(t *testing.T) {
	s := newFakeServer(t)
	s.start()
	env, tru := "binary:tool:sha256:"+hashFile(t, program(t, "env")), "binary:tool:sha256:"+hashFile(t, program(t, "true"))
	s.addEntry("/both", env, tru, unprotected(t))
	r := startAgent(t, s)
	r.waitReady()
	ctx := testContext(t)
	c := workloadv1.NewIssuerClient(r.dial())
	m, err := record(t, ctx, c, "", "env", "true")
	if err != nil {
		t.Fatal(err)
	}
	if hex.EncodeToString(m.Measurement.Tool) != hashFile(t, program(t, "true")) {
		t.Error("the last tool is not the one that ran last")
	}
	ext, err := newStatement(t, "x").prepare(ctx, c)
	if err != nil {
		t.Fatal(err)
	}
	ev, err := attest.ParseExtensionValue(ext)
	if err != nil {
		t.Fatal(err)
	}
	if all := strings.Join(ev.Selectors, " "); !strings.Contains(all, env) || !strings.Contains(all, tru) {
		t.Errorf("committed selectors %q", ev.Selectors)
	}

	// env alone is not enough in the end.
	c2 := workloadv1.NewIssuerClient(r.dial())
	if _, err := record(t, ctx, c2, "", "env"); err != nil {
		t.Fatalf("env may still run the tool: %v", err)
	}
	_, err = newStatement(t, "x").prepare(ctx, c2)
	wantCode(t, "the tool never ran", err, codes.PermissionDenied)

	// A tool that the entry does not name means no signature.
	c3 := workloadv1.NewIssuerClient(r.dial())
	_, err = record(t, ctx, c3, "", "env", "false")
	wantCode(t, "an exec that the entry does not allow", err, codes.PermissionDenied)
	_, err = newStatement(t, "x").prepare(ctx, c3)
	wantCode(t, "prepare after it", err, codes.PermissionDenied)
}

func TestAmbiguousStep(t *testing.T) {
	s, r, _, ctx := stepAgent(t)
	s.addEntry("/also", "binary:tool:sha256:"+hashFile(t, program(t, "true")), unprotected(t))
	eventually(t, "both entries are known", func() bool {
		_, err := record(t, ctx, workloadv1.NewIssuerClient(r.dial()), "", "true")
		return err != nil && strings.Contains(err.Error(), "/also") && strings.Contains(err.Error(), "/step")
	})
}

func TestAmbiguousStepChosen(t *testing.T) {
	s, r, _, ctx := stepAgent(t)
	s.addEntry("/also", "binary:tool:sha256:"+hashFile(t, program(t, "true")), unprotected(t))
	// At once, although an older entry matches as well.
	m, err := record(t, ctx, workloadv1.NewIssuerClient(r.dial()), "spiffe://"+testTD+"/also", "true")
	if err != nil || m.SpiffeId != "spiffe://"+testTD+"/also" {
		t.Fatalf("%v, %v", m, err)
	}
}

// TestServerAwayAtTheEnd: a build of hours is not lost to a server that is away
// for a minute; the measurement stands.
func TestServerAwayAtTheEnd(t *testing.T) {
	s, _, c, ctx := stepAgent(t)
	if _, err := record(t, ctx, c, "", "true"); err != nil {
		t.Fatal(err)
	}
	st := newStatement(t, "statement")
	ext, err := st.prepare(ctx, c)
	if err != nil {
		t.Fatal(err)
	}
	s.stop()
	_, err = c.Issue(ctx, &workloadv1.IssueRequest{Csr: st.csr(t, ext)})
	wantCode(t, "server away", err, codes.Unavailable)
	s.start()
	eventually(t, "issued under the same measurement", func() bool {
		_, err := c.Issue(ctx, &workloadv1.IssueRequest{Csr: st.csr(t, ext)})
		if status.Code(err) == codes.Aborted { // its evidence became old meanwhile
			ext, err = st.prepare(ctx, c)
		}
		return err == nil
	})
}

// TestEvidenceOfAnOldAgentSVID: after the agent attested again, evidence that
// names its old key would be refused; the caller is told to prepare again.
func TestEvidenceOfAnOldAgentSVID(t *testing.T) {
	s, _, c, ctx := stepAgent(t)
	if _, err := record(t, ctx, c, "", "true"); err != nil {
		t.Fatal(err)
	}
	st := newStatement(t, "statement")
	ext, err := st.prepare(ctx, c)
	if err != nil {
		t.Fatal(err)
	}
	s.with(func() { s.active = nil })
	eventually(t, "attested again", func() bool { s.mu.Lock(); defer s.mu.Unlock(); return s.attests == 2 && s.active != nil })
	eventually(t, "prepare again", func() bool {
		_, err := c.Issue(ctx, &workloadv1.IssueRequest{Csr: st.csr(t, ext)})
		return status.Code(err) == codes.Aborted
	})
	if ext, err = st.prepare(ctx, c); err != nil {
		t.Fatal(err)
	}
	if _, err = c.Issue(ctx, &workloadv1.IssueRequest{Csr: st.csr(t, ext)}); err != nil {
		t.Error(err)
	}
}

func TestSecondToolOnOneConnection(t *testing.T) {
	_, _, c, ctx := stepAgent(t)
	if _, err := record(t, ctx, c, "", "true"); err != nil {
		t.Fatal(err)
	}
	_, err := record(t, ctx, c, "", "true")
	wantCode(t, "another step on the same connection", err, codes.FailedPrecondition)
}

func TestWhoami(t *testing.T) {
	s, r, c, ctx := stepAgent(t)
	w, err := c.Whoami(ctx, &workloadv1.WhoamiRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if len(w.Matches) != 0 || !strings.Contains(w.EntryCreate, "--selector "+selfHash(t)) || !strings.Contains(w.EntryCreate, "--parent-id spiffe://"+testTD+testAgent) {
		t.Errorf("whoami without an entry: %v", w)
	}
	s.addEntry("/me", selfHash(t), selfUID())
	s.addEntry("/far", selfHash(t), "binary:uid:4294967294", "binary:gid:4294967294")
	if w, err = c.Whoami(ctx, &workloadv1.WhoamiRequest{}); err != nil {
		t.Fatal(err)
	}
	if len(w.Matches) != 1 || w.Matches[0].SpiffeId != "spiffe://"+testTD+"/me" || w.EntryCreate != "" {
		t.Errorf("whoami with an entry: %v", w)
	}
	s.with(func() { s.entries = s.entries[2:] })
	if w, err = c.Whoami(ctx, &workloadv1.WhoamiRequest{}); err != nil {
		t.Fatal(err)
	}
	if w.Nearest.GetSpiffeId() != "spiffe://"+testTD+"/far" || len(w.Nearest.GetMissing()) != 2 {
		t.Errorf("nearest miss: %v", w.Nearest)
	}
	null, _ := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	defer null.Close()
	_, err = recorder.Run(recorder.Command{Path: program(t, "true"), Args: []string{"true"}, Env: os.Environ(), Stdin: null, Stdout: null, Stderr: null},
		func(*recorder.Exec) error {
			w, err := workloadv1.NewIssuerClient(r.dial()).Whoami(ctx, &workloadv1.WhoamiRequest{Step: true})
			if err != nil {
				return err
			}
			if !strings.Contains(w.EntryCreate, "/step/true ") || !strings.Contains(w.EntryCreate, "binary:tool:sha256:"+hashFile(t, program(t, "true"))) ||
				!strings.Contains(w.EntryCreate, unprotected(t)) || len(w.Notes) == 0 {
				t.Errorf("whoami of a step: %v", w)
			}
			return nil
		})
	if err != nil {
		t.Fatal(err)
	}
}
