package recorder

import (
	"context"
	"errors"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/pkg/attest"
	"github.com/rootlink/rootlink/pkg/link"
)

func newStep(t *testing.T, command ...string) *Step {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "stderr"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return &Step{
		Name: "build", Command: command, Products: []string{"out"}, BundleDir: ".",
		IssueTimeout: 20 * time.Second, Version: "test", Stderr: f,
	}
}

func (s *Step) words(t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile(s.Stderr.Name())
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// left lists the working directory.
func left(t *testing.T) string {
	t.Helper()
	ents, err := os.ReadDir(".")
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range ents {
		names = append(names, e.Name())
	}
	return strings.Join(names, " ")
}

func TestStep(t *testing.T) {
	i := newIssuer(t)
	i.log = []byte("an event log")
	write(t, "in", "hello")
	t.Setenv("GOFLAGS", "-mod=readonly")
	t.Setenv("GOPROXY", "https://me:token@proxy.example")
	t.Setenv("SECRET", "x")
	s := newStep(t, "sh", "-c", "cat in >out")
	s.Materials, s.BuildID = []string{"in", "d"}, "https://ci.example/job/7"
	write(t, "d/f", "hello")
	if err := os.Symlink("nowhere", "d/dangling"); err != nil {
		t.Fatal(err)
	}
	if code, err := s.Run(); code != 0 || err != nil {
		t.Fatal(code, err)
	}
	if !regexp.MustCompile(`^build\.[0-9a-f]{8}\.sigstore\.json d in out sha256-[0-9a-f]{64}\.eventlog$`).MatchString(left(t)) {
		t.Errorf("left %s", left(t))
	}
	names, err := filepath.Glob("*.sigstore.json")
	if err != nil {
		t.Fatal(err)
	}
	raw, err := os.ReadFile(names[0])
	if err != nil {
		t.Fatal(err)
	}
	b, err := link.ParseBundle(raw)
	if err != nil {
		t.Fatal(err)
	}
	st, err := b.UnverifiedStatement()
	if err != nil {
		t.Fatal(err)
	}
	if st.Step != "build" || len(st.Subjects) != 1 || st.Subjects[0].Name != "out" || st.Subjects[0].Digest["sha256"] != hexSum("hello") ||
		len(st.Materials) != 2 || st.Materials[0].Digest["sha256"] != hexSum("hello") {
		t.Errorf("%+v", st)
	}
	if st.Byproducts.ExitCode == nil || *st.Byproducts.ExitCode != 0 || len(st.Byproducts.Executables) != 3 || !st.Byproducts.Tree {
		t.Errorf("%+v", st.Byproducts)
	}
	if x := st.Byproducts.Executables[0]; x.Role != "tool" || x.Digest["sha256"] != i.tools[0] {
		t.Errorf("tool %+v, measured %v", x, i.tools)
	}
	if k := st.Byproducts.Skipped; len(k) != 1 || k[0] != "d/dangling: dangling symlink" {
		t.Errorf("skipped %q", k)
	}
	if st.Environment.BuildID != s.BuildID {
		t.Errorf("build ID %q", st.Environment.BuildID)
	}
	v := st.Environment.Variables
	if v["GOFLAGS"] != "-mod=readonly" || v["GOPROXY"] != "https://REDACTED@proxy.example" || v["SECRET"] != "" {
		t.Errorf("%v", v)
	}
	ev, err := attest.FromCertificate(b.UnverifiedCertificate())
	if err != nil {
		t.Fatal(err)
	}
	if ev.Payload != link.PayloadDigest(b.UnverifiedPayload()) {
		t.Error("the evidence does not commit to the statement")
	}
}

func TestStepFailsBeforeTheToolStarts(t *testing.T) {
	for _, tc := range []struct {
		name string
		bend func(*testing.T, *issuer, *Step)
		code int
		hint string
	}{
		{"no socket known", func(t *testing.T, _ *issuer, s *Step) { t.Setenv(EnvSocket, "") }, 125, EnvSocket},
		{"no agent", func(t *testing.T, _ *issuer, s *Step) { s.Sources.Socket = "none.sock" }, 125, "rootlink-agent"},
		{"TCP", func(t *testing.T, _ *issuer, s *Step) { t.Setenv(EnvSocket, "tcp://127.0.0.1:1") }, 125, "unix://"},
		{"stock agent", func(_ *testing.T, i *issuer, _ *Step) {
			i.measure = func() error { return status.Error(codes.Unimplemented, "unknown service") }
		}, 125, "from one build"},
		{"no identity", func(_ *testing.T, i *issuer, _ *Step) {
			i.measure = func() error {
				return status.Error(codes.PermissionDenied, "no identity issued; hint: run: rootlink-server entry create …")
			}
		}, 125, "entry create"},
		{"not found", func(t *testing.T, _ *issuer, s *Step) {
			t.Setenv("PATH", "/usr/bin:/bin")
			s.Command = []string{"no-such-tool"}
		}, 127, "name"},
		{"not executable", func(t *testing.T, _ *issuer, s *Step) { write(t, "f", "x"); s.Command = []string{"./f"} }, 126, "chmod"},
		{"no products", func(_ *testing.T, _ *issuer, s *Step) { s.Products = nil }, 125, "--products"},
		{"nothing at all", func(_ *testing.T, _ *issuer, s *Step) { s.Name, s.Products, s.Command = "", nil, nil }, 125, "rootlink run --step"},
		{"product outside", func(_ *testing.T, _ *issuer, s *Step) { s.Products = []string{"../x"} }, 125, "directory"},
		{"no materials", func(_ *testing.T, _ *issuer, s *Step) { s.Materials = []string{"none"} }, 125, "path"},
		{"no bundle directory", func(_ *testing.T, _ *issuer, s *Step) { s.BundleDir = "none" }, 125, "directory"},
		// Even root may not write there, whatever its capabilities.
		{"a directory of somebody else", func(_ *testing.T, _ *issuer, s *Step) { s.BundleDir = "/proc/sys" }, 125, "--bundle-out"},
		{"bad step name", func(_ *testing.T, _ *issuer, s *Step) { s.Name = "../x" }, 125, "letters"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			i := newIssuer(t)
			s := newStep(t, "sh", "-c", "echo ran >out")
			tc.bend(t, i, s)
			_, err := s.Run()
			if cli.ExitCode(err) != tc.code || !strings.Contains(cli.HintOf(err), tc.hint) {
				t.Errorf("%v, code %d, hint %q", err, cli.ExitCode(err), cli.HintOf(err))
			}
			if l := left(t); l != "" && l != "f" {
				t.Errorf("left %q", l)
			}
		})
	}
}

func TestStepRefusesLaterProgram(t *testing.T) {
	i := newIssuer(t)
	n := 0
	i.measure = func() error {
		if n++; n > 1 {
			return status.Error(codes.PermissionDenied, "not allowed")
		}
		return nil
	}
	s := newStep(t, "sh", "-c", "exec cp /etc/hostname out")
	_, err := s.Run()
	if cli.ExitCode(err) != 125 || !strings.Contains(err.Error(), "went on to run") {
		t.Errorf("%v", err)
	}
	if left(t) != "" {
		t.Errorf("left %q", left(t))
	}
}

func TestStepOfFailedCommand(t *testing.T) {
	newIssuer(t)
	s := newStep(t, "sh", "-c", "echo x >out; exit 7")
	if code, err := s.Run(); code != 7 || err != nil || left(t) != "out" {
		t.Errorf("%d, %v, left %q", code, err, left(t))
	}
	s.RecordFailure, s.BundleOut = true, "b.json"
	if code, err := s.Run(); code != 7 || err != nil || left(t) != "b.json out" {
		t.Errorf("%d, %v, left %q", code, err, left(t))
	}
	if w := s.words(t); !strings.Contains(w, "the step FAILED with exit code 7; recorded in b.json and signed by spiffe://") {
		t.Errorf("a signed failure reads as a success: %s", w)
	}
	// Recording the failure fails too: the command's code still counts.
	s.Products, s.BundleOut = []string{"none"}, "c.json"
	if code, err := s.Run(); code != 7 || err != nil || !strings.Contains(s.words(t), "error:") || left(t) != "b.json out" {
		t.Errorf("%d, %v, left %q", code, err, left(t))
	}
}

func TestStepWithoutItsProduct(t *testing.T) {
	newIssuer(t)
	s := newStep(t, "true")
	_, err := s.Run()
	if cli.ExitCode(err) != 125 || left(t) != "" {
		t.Errorf("%v, left %q", err, left(t))
	}
}

func TestStepWaitsForTheServer(t *testing.T) {
	i := newIssuer(t)
	fails := []codes.Code{codes.Unavailable, codes.OK, codes.Aborted}
	i.prepare = func() error {
		if len(fails) > 0 && fails[0] != codes.OK {
			c := fails[0]
			fails = fails[1:]
			return status.Error(c, "server away")
		}
		return nil
	}
	i.issue = func() error {
		if len(fails) > 0 { // OK for Prepare, then evidence too old
			fails = nil
			return status.Error(codes.Aborted, "the evidence is out of date")
		}
		return nil
	}
	s := newStep(t, "sh", "-c", "echo x >out")
	if code, err := s.Run(); code != 0 || err != nil || len(i.tools) != 1 || len(i.peers) != 1 {
		t.Fatal(code, err, i.tools, i.peers) // the measurement is the connection's
	}
	if w := s.words(t); !strings.Contains(w, "waiting to sign") || !strings.Contains(w, "signed by") {
		t.Errorf("it said %q", w)
	}
}

func TestStepGivesUpWaiting(t *testing.T) {
	i := newIssuer(t)
	i.prepare = func() error { return status.Error(codes.Unavailable, "server away") }
	s := newStep(t, "sh", "-c", "echo x >out")
	s.IssueTimeout = 2 * time.Second // Measure has to be done in it too
	_, err := s.Run()
	if cli.ExitCode(err) != 125 || !strings.Contains(err.Error(), "server away") || cli.HintOf(err) == "" || left(t) != "out" {
		t.Errorf("%v, hint %q, left %q", err, cli.HintOf(err), left(t))
	}
}

// TestStepHearsWhyTheAgentLeft: what was measured went with the agent, so there
// is nothing to wait for, and its last words say what to do.
func TestStepHearsWhyTheAgentLeft(t *testing.T) {
	for what, last := range map[string]error{
		"is banned":                        status.Error(codes.PermissionDenied, "this node is banned; hint: ask an operator"),
		"connection to the agent was lost": status.Error(codes.Unavailable, "transport is closing"),
	} {
		t.Run(what, func(t *testing.T) {
			i := newIssuer(t)
			i.prepare = func() error {
				select {
				case i.leave <- last:
				default:
				}
				return status.Error(codes.Unavailable, "transport is closing")
			}
			s := newStep(t, "sh", "-c", "echo x >out")
			s.IssueTimeout = time.Hour
			_, err := s.Run()
			if cli.ExitCode(err) != 125 || !strings.Contains(err.Error(), what) || cli.HintOf(err) == "" || left(t) != "out" {
				t.Errorf("%v, hint %q, left %q", err, cli.HintOf(err), left(t))
			}
		})
	}
}

// TestNohupHolds: once caught and let go again, a signal that the caller ignores
// would reach the tool.
func TestNohupHolds(t *testing.T) {
	signal.Ignore(unix.SIGHUP)
	defer signal.Reset(unix.SIGHUP)
	ctx, stop := interruptible()
	defer stop()
	unix.Kill(os.Getpid(), unix.SIGHUP)
	stop()
	if !signal.Ignored(unix.SIGHUP) {
		t.Errorf("SIGHUP is no longer ignored (%v)", context.Cause(ctx))
	}
}

func TestInterruptLeavesNothing(t *testing.T) {
	i := newIssuer(t)
	i.prepare = func() error {
		unix.Kill(os.Getpid(), unix.SIGTERM) // tests in the background may ignore SIGINT
		return status.Error(codes.Unavailable, "server away")
	}
	s := newStep(t, "sh", "-c", "echo x >out")
	_, err := s.Run()
	if cli.ExitCode(err) != 130 || left(t) != "out" {
		t.Errorf("%v, left %q", err, left(t))
	}
}

func TestInterruptBeforeTheToolRuns(t *testing.T) {
	i := newIssuer(t)
	i.measure = func() error {
		unix.Kill(os.Getpid(), unix.SIGTERM)
		<-t.Context().Done() // an agent that takes its time
		return status.Error(codes.Unavailable, "server away")
	}
	s := newStep(t, "sh", "-c", "echo ran >out")
	s.AllowUnsigned = true // not a reason to go on
	if _, err := s.Run(); cli.ExitCode(err) != 130 || left(t) != "" {
		t.Errorf("%v, left %q", err, left(t))
	}
}

func TestRefusesEvidenceForAnotherStatement(t *testing.T) {
	i := newIssuer(t)
	i.issue = func() error {
		i.evidence.Payload[0] ^= 1
		return nil
	}
	s := newStep(t, "sh", "-c", "echo x >out")
	if _, err := s.Run(); !errors.Is(err, link.ErrSignerMismatch) || left(t) != "out" {
		t.Errorf("%v, left %q", err, left(t))
	}
}

func TestRefusesAnotherEventLog(t *testing.T) {
	i := newIssuer(t)
	i.log, i.sendLog = []byte("named"), []byte("sent")
	s := newStep(t, "sh", "-c", "echo x >out")
	if _, err := s.Run(); err == nil || left(t) != "out" {
		t.Errorf("%v, left %q", err, left(t))
	}
}

func TestUnsignedMustBeAskedFor(t *testing.T) {
	i := newIssuer(t)
	i.measure = func() error { return status.Error(codes.Unimplemented, "unknown service") }
	s := newStep(t, "sh", "-c", "echo x >out")
	s.AllowUnsigned = true
	if code, err := s.Run(); code != 0 || err != nil || left(t) != "build.unsigned.json out" {
		t.Fatal(code, err, left(t))
	}
	if !strings.Contains(s.words(t), "UNSIGNED") {
		t.Errorf("it said %q", s.words(t))
	}
	b, err := os.ReadFile("build.unsigned.json")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := link.ParseBundle(b); err == nil {
		t.Error("an unsigned record passes for a bundle")
	}
	// What is wrong rather than missing is not a reason to go on unsigned.
	i.measure = func() error { return status.Error(codes.Internal, "broken") }
	if _, err := s.Run(); cli.ExitCode(err) != 125 {
		t.Errorf("%v", err)
	}
}

func TestWhoamiNeverRunsTheCommand(t *testing.T) {
	newIssuer(t)
	resp, err := Whoami(Sources{}, []string{"sh", "-c", "echo ran >out"}, false)
	if err != nil || len(resp.GetMeasurement().GetTool()) != 32 {
		t.Fatal(resp, err)
	}
	if left(t) != "" {
		t.Errorf("it ran: %q", left(t))
	}
}
