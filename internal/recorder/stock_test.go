package recorder

import (
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	workloadpb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/internal/forge"
	"github.com/rootlink/rootlink/pkg/attest"
	"github.com/rootlink/rootlink/pkg/link"
)

func TestStepOnASPIREAgentsSocket(t *testing.T) {
	s := newSPIRE(t)
	st := newStep(t, "sh", "-c", "echo x >out")
	if code, err := st.Run(); code != 0 || err != nil {
		t.Fatal(code, err)
	}
	if !regexp.MustCompile(`^build\.[0-9a-f]{8}\.sigstore\.json out sha256-[0-9a-f]{64}\.evidence\.cbor$`).MatchString(left(t)) {
		t.Errorf("left %s", left(t))
	}
	b, d := stockBundle(t)
	leaf := b.UnverifiedCertificate()
	// It was renewed while the step ran: the newest is what signs.
	if len(s.given) != 2 || string(s.given[1]) != string(leaf.Raw) {
		t.Errorf("%d SVIDs were fetched, or the older one signs", len(s.given))
	}
	checkRecord(t, b, d)
	stmt, err := b.UnverifiedStatement()
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(stmt.Environment.Recorder, "SPIRE agent's key") {
		t.Errorf("recorder %q", stmt.Environment.Recorder)
	}
	if x := stmt.Byproducts.Executables[0]; x.Digest["sha256"] != s.tools[0] {
		t.Errorf("tool %+v", x)
	}
	w := st.words(t)
	if !strings.Contains(w, "whose key the agent made") || strings.Count(w, "SPIRE agent") != 1 || !strings.Contains(w, "nobody names a timestamp") {
		t.Errorf("it said %q", w)
	}
}

func TestStepWithoutEvidenceMustBeAskedFor(t *testing.T) {
	s := newSPIRE(t)
	t.Setenv(EnvQuoter, "")
	st := newStep(t, "sh", "-c", "echo x >out")
	if _, err := st.Run(); !errors.Is(err, ErrNoQuoter) || cli.ExitCode(err) != 125 || !strings.Contains(cli.HintOf(err), "--quoter-socket") || left(t) != "" {
		t.Errorf("%v, hint %q, left %q", err, cli.HintOf(err), left(t))
	}
	st.AllowUnsigned = true
	if code, err := st.Run(); code != 0 || err != nil || left(t) != "build.unsigned.json out" {
		t.Error(code, err, left(t))
	}
	os.Remove("build.unsigned.json")
	st.AllowUnsigned, st.Sources.NoEvidence = false, true
	if code, err := st.Run(); code != 0 || err != nil {
		t.Fatal(code, err)
	}
	if b, d := stockBundle(t); d != nil || b.UnverifiedCertificate().URIs[0].String() != buildID1 {
		t.Error("evidence, or another identity")
	}
	if !strings.Contains(st.words(t), "WITHOUT EVIDENCE") || len(s.tools) != 0 {
		t.Errorf("it said %q", st.words(t))
	}
	st.Sources.Quoter = s.quoterSocket
	if _, err := st.Run(); cli.ExitCode(err) != 125 {
		t.Errorf("two minds: %v", err)
	}
}

// A new entry takes its time from SPIRE's server to its agent.
func TestSPIREStepWaitsForANewEntry(t *testing.T) {
	s := newSPIRE(t)
	asked := 0
	s.fetch = func() error {
		if asked++; asked == 1 {
			return status.Error(codes.PermissionDenied, "no identity issued")
		}
		return nil
	}
	st := newStep(t, "sh", "-c", "echo x >out")
	st.Sources.Patience = time.Minute
	if code, err := st.Run(); code != 0 || err != nil || asked < 2 {
		t.Error(code, err, asked)
	}
}

func TestSPIREStepFailsBeforeTheToolStarts(t *testing.T) {
	for _, tc := range []struct {
		name string
		bend func(*testing.T, *spire, *Step)
		hint string
	}{
		{"no identity", func(_ *testing.T, s *spire, _ *Step) {
			s.fetch = func() error { return status.Error(codes.PermissionDenied, "no identity issued") }
		}, "rootlink whoami"},
		{"an intermediate", func(t *testing.T, s *spire, _ *Step) {
			s.svids = func() []*workloadpb.X509SVID { return []*workloadpb.X509SVID{s.svid(buildID1, s.world.Authority)} }
		}, "UpstreamAuthority"},
		{"two identities", func(_ *testing.T, s *spire, _ *Step) {
			s.svids = func() []*workloadpb.X509SVID {
				return []*workloadpb.X509SVID{s.svid(buildID1), s.svid(buildID1 + "2")}
			}
		}, "--spiffe-id"},
		{"not the identity that was asked for", func(_ *testing.T, _ *spire, st *Step) { st.Sources.SPIFFEID = buildID1 + "2" }, "whoami"},
		{"an SVID of another name", func(_ *testing.T, s *spire, _ *Step) {
			s.svids = func() []*workloadpb.X509SVID {
				v := s.svid(buildID1)
				v.SpiffeId += "2"
				return []*workloadpb.X509SVID{v}
			}
		}, ""},
		{"another key", func(_ *testing.T, s *spire, _ *Step) {
			s.svids = func() []*workloadpb.X509SVID {
				v := s.svid(buildID1)
				v.X509SvidKey = s.svid(buildID1).X509SvidKey
				return []*workloadpb.X509SVID{v}
			}
		}, ""},
		{"an RSA key", func(t *testing.T, s *spire, _ *Step) {
			s.svids = func() []*workloadpb.X509SVID {
				key, err := rsa.GenerateKey(rand.Reader, 2048)
				if err != nil {
					t.Error(err)
				}
				der, err := x509.MarshalPKCS8PrivateKey(key)
				if err != nil {
					t.Error(err)
				}
				id, err := url.Parse(buildID1)
				if err != nil {
					t.Error(err)
				}
				leaf := forge.Sign(t, &x509.Certificate{Subject: pkix.Name{}, URIs: []*url.URL{id}, NotBefore: time.Now(), NotAfter: time.Now().Add(time.Hour)},
					s.world.Authority, key.Public(), s.world.AuthorityKey())
				return []*workloadpb.X509SVID{{SpiffeId: buildID1, X509Svid: leaf.Raw, X509SvidKey: der}}
			}
		}, "ec-p256"},
		{"no voucher", func(_ *testing.T, s *spire, st *Step) { st.Sources.Quoter = "none.sock" }, "--quoter-socket"},
		{"the Workload API as voucher", func(_ *testing.T, s *spire, st *Step) {
			st.Sources.Quoter = strings.TrimPrefix(os.Getenv(EnvSocket), "unix://")
		}, "not the Workload API's"},
		{"a voucher that refuses", func(_ *testing.T, s *spire, _ *Step) {
			s.measure = func() error { return status.Error(codes.PermissionDenied, "who are you") }
		}, "log of the SPIRE agent"},
		{"a voucher of another domain", func(_ *testing.T, s *spire, _ *Step) {
			s.svids = func() []*workloadpb.X509SVID { return []*workloadpb.X509SVID{s.svid("spiffe://other.example/build")} }
		}, "one SPIRE agent"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := newSPIRE(t)
			st := newStep(t, "sh", "-c", "echo ran >out")
			tc.bend(t, s, st)
			_, err := st.Run()
			if cli.ExitCode(err) != 125 || !strings.Contains(cli.HintOf(err), tc.hint) {
				t.Errorf("%v, code %d, hint %q", err, cli.ExitCode(err), cli.HintOf(err))
			}
			if l := left(t); l != "" {
				t.Errorf("left %q", l)
			}
		})
	}
}

// What a stranger vouches for must not get our signature.
func TestRefusesDetachedEvidenceOfAnotherStep(t *testing.T) {
	for name, bend := range map[string]func(*attest.Detached){
		"statement":    func(d *attest.Detached) { d.Evidence.Payload[0] ^= 1 },
		"SVID":         func(d *attest.Detached) { d.Evidence.Nonce[0] ^= 1 },
		"tool":         func(d *attest.Detached) { d.Evidence.Tool[0] ^= 1 },
		"recorder":     func(d *attest.Detached) { d.Evidence.Recorder[0] ^= 1 },
		"executable":   func(d *attest.Detached) { d.Evidence.Executable[0] ^= 1 },
		"agent key":    func(d *attest.Detached) { d.Evidence.AgentKey[0] ^= 1 },
		"key origin":   func(d *attest.Detached) { d.Evidence.KeyOrigin = attest.OriginCaller },
		"signed":       func(d *attest.Detached) { d.Signature = []byte{1} },
		"no agent":     func(d *attest.Detached) { d.AgentSVID = [][]byte{{1}} },
		"other's word": func(d *attest.Detached) { d.Signature, d.Token = []byte{1}, []byte{1} },
	} {
		t.Run(name, func(t *testing.T) {
			s := newSPIRE(t)
			s.vouch = func(d *attest.Detached) error { bend(d); return nil }
			if _, err := newStep(t, "sh", "-c", "echo x >out").Run(); cli.ExitCode(err) != 125 || left(t) != "out" {
				t.Errorf("%v, left %q", err, left(t))
			}
		})
	}
}

func TestVoucherDiesInTheMiddle(t *testing.T) {
	s := newSPIRE(t)
	s.vouch = func(*attest.Detached) error {
		go s.quoter.Stop()
		return status.Error(codes.Unavailable, "transport is closing")
	}
	st := newStep(t, "sh", "-c", "echo x >out")
	st.IssueTimeout = time.Hour
	if _, err := st.Run(); cli.ExitCode(err) != 125 || !strings.Contains(err.Error(), "quoter socket") || cli.HintOf(err) == "" || left(t) != "out" {
		t.Errorf("%v, hint %q, left %q", err, cli.HintOf(err), left(t))
	}
}

// An agent that comes back has what is needed: nothing was measured on its socket.
func TestSPIREAgentAwayAtTheEnd(t *testing.T) {
	s := newSPIRE(t)
	n := 0
	s.fetch = func() error {
		if n++; n == 2 {
			return status.Error(codes.Unavailable, "restarting")
		}
		return nil
	}
	st := newStep(t, "sh", "-c", "echo x >out")
	if code, err := st.Run(); code != 0 || err != nil || n != 3 {
		t.Fatal(code, err, n)
	}
	// One that stays away is waited for as long as was said.
	n = -1000
	s.fetch = func() error {
		if n++; n == -999 {
			return nil
		}
		return status.Error(codes.Unavailable, "gone")
	}
	clean(t)
	st.IssueTimeout = 2 * time.Second
	if _, err := st.Run(); cli.ExitCode(err) != 125 || !strings.Contains(err.Error(), "gone") || !strings.Contains(cli.HintOf(err), "SPIRE agent") {
		t.Errorf("%v, hint %q", err, cli.HintOf(err))
	}
}

func TestInterruptedVouchLeavesNothing(t *testing.T) {
	s := newSPIRE(t)
	s.vouch = func(*attest.Detached) error {
		unix.Kill(os.Getpid(), unix.SIGTERM)
		return status.Error(codes.Unavailable, "busy")
	}
	if _, err := newStep(t, "sh", "-c", "echo x >out").Run(); cli.ExitCode(err) != 130 || left(t) != "out" {
		t.Errorf("%v, left %q", err, left(t))
	}
}

func TestWhoamiOnASPIREAgentsSocket(t *testing.T) {
	s := newSPIRE(t)
	for _, command := range [][]string{nil, {"sh", "-c", "echo ran >out"}} {
		for _, quoter := range []string{s.quoterSocket, ""} {
			t.Setenv(EnvQuoter, quoter)
			resp, err := Whoami(Sources{}, command, false)
			if err != nil || len(resp.GetMatches()) != 1 || resp.GetMatches()[0].GetSpiffeId() != buildID1 || left(t) != "" {
				t.Fatal(resp, err, left(t))
			}
			own := strings.Contains(strings.Join(resp.GetNotes(), " "), "by rootlink itself")
			if own != (quoter == "" || command == nil) || (len(resp.GetMeasurement().GetTool()) == 32) != (command != nil) {
				t.Errorf("%v at %q: %v", command, quoter, resp)
			}
			if !strings.HasPrefix(resp.GetEntryCreate(), "spire-server entry create -spiffeID spiffe://example.org/workload/") {
				t.Errorf("entry %q", resp.GetEntryCreate())
			}
		}
	}
	s.fetch = func() error { return status.Error(codes.PermissionDenied, "no identity issued") }
	if resp, err := Whoami(Sources{}, nil, false); err != nil || len(resp.GetMatches()) != 0 || resp.GetEntryCreate() == "" {
		t.Error(resp, err)
	}
}

// rootlink-agent on a server that signs no evidence answers with a record.
func TestStepWithDetachedEvidenceOfOurAgent(t *testing.T) {
	i := newIssuer(t)
	i.world.Now, i.detach = time.Now(), true
	st := newStep(t, "sh", "-c", "echo x >out")
	if code, err := st.Run(); code != 0 || err != nil {
		t.Fatal(code, err)
	}
	b, d := stockBundle(t)
	if d == nil || d.Evidence.KeyOrigin != attest.OriginCaller {
		t.Fatalf("%+v", d)
	}
	checkRecord(t, b, d)
	clean(t)
	st.BundleDir, st.LinkOut = "", "step.link"
	if code, err := st.Run(); code != 0 || err != nil || !strings.Contains(left(t), ".evidence.cbor step.link") {
		t.Error(code, err, left(t))
	}
	// It promised evidence beside, and sends none.
	i.keepDetached = true
	if _, err := st.Run(); !errors.Is(err, ErrEvidence) {
		t.Error(err)
	}
}

func TestRecordGetsItsOwnToken(t *testing.T) {
	newSPIRE(t)
	st := newStep(t, "sh", "-c", "echo x >out")
	st.Stamping.TimestampURLs = []string{tsa(t, nil)}
	if code, err := st.Run(); code != 0 || err != nil {
		t.Fatal(code, err)
	}
	if b, d := stockBundle(t); len(b.Timestamps()) != 1 || len(d.Token) == 0 {
		t.Errorf("%d tokens, the record %d bytes of one", len(b.Timestamps()), len(d.Token))
	}
}

func TestStampAddsTheRecordsToken(t *testing.T) {
	newSPIRE(t)
	st := newStep(t, "sh", "-c", "echo x >out")
	// Two answers are wanted, the second never comes.
	url := tsa(t, func(n int) bool { return n == 2 })
	st.Stamping.TimestampURLs = []string{url}
	_, err := st.Run()
	if cli.ExitCode(err) != 125 || !strings.Contains(cli.HintOf(err), "rootlink stamp --timestamp-url "+url) {
		t.Fatalf("%v, hint %q", err, cli.HintOf(err))
	}
	names, _ := filepath.Glob("*" + link.BundleSuffix)
	s := StampFiles{Files: names, Stamping: Stamping{TimestampURLs: []string{url}}, Timeout: time.Minute, Stdout: &strings.Builder{}, Stderr: st.Stderr}
	if err := s.Run(); err != nil {
		t.Fatal(err)
	}
	b, d := stockBundle(t)
	if len(b.Timestamps()) != 1 || len(d.Token) == 0 {
		t.Errorf("%d tokens, the record %d bytes of one", len(b.Timestamps()), len(d.Token))
	}
	v, err := stampedView(names[0])
	if err != nil || v.Record == nil || v.Record.Timestamp == nil {
		t.Errorf("%+v, %v", v, err)
	}
}
