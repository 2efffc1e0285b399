package link

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/rootlink/rootlink/internal/forge"
	"github.com/rootlink/rootlink/pkg/attest"
)

// scene is a signed step in which all is well, for a test to spoil in one place.
type scene struct {
	*forge.World
	stmt *Statement
	file TrustFile
	in   Input
	at   time.Time // of the verifier's clock

	// Hooks to spoil what comes between; nil leaves it as it is.
	evidence func(*attest.Evidence) *attest.Evidence // what the SVID carries
	bundle   func([]byte) []byte
}

func hexOf(b [32]byte) string { return hex.EncodeToString(b[:]) }

func newScene(t testing.TB) *scene {
	t.Helper()
	return sceneAround(t, forge.NewWorld(t))
}

func sceneAround(t testing.TB, w *forge.World) *scene {
	t.Helper()
	s := &scene{World: w, stmt: testStatement(), at: w.Now.Add(time.Second)}
	artifact := sha256.Sum256([]byte("the artifact"))
	s.stmt.Subjects = []Resource{{Name: "out/hello", Digest: map[string]string{"sha256": hexOf(artifact)}}}
	s.setSelectors(attest.SelectorRecorder + hexOf(w.Leaf.Recorder))
	root, err := MarshalTrustedRoot([]Authority{{Certificate: w.Authority, Start: w.Authority.NotBefore, End: w.Authority.NotAfter}})
	if err != nil {
		t.Fatal(err)
	}
	pcr7 := hex.EncodeToString(w.TPM.PCRs[0].Values[7])
	s.file = TrustFile{
		Format: TrustFormat, Version: FormatVersion, Serial: 3, Issued: w.Now.Add(-time.Hour), Expires: w.Now.AddDate(0, 3, 0),
		TrustDomain: "example.org", TrustedRoot: root,
		AttestationCAs: []AttestationCA{{Certificate: w.CA.Cert.Raw}},
		EK:             EKTrust{Roots: [][]byte{w.Maker.Root.Raw}},
		PCRPolicies: []PCRPolicy{{PCRPolicy: attest.PCRPolicy{Name: "fleet", Revision: 1, Profiles: []attest.PCRProfile{{
			Name: "good", Banks: map[string]map[string]string{"sha256": {"7": pcr7}},
		}}}}},
		Requirements: []Requirement{{
			Identity: "spiffe://example.org/build", Tools: []string{hexOf(w.Leaf.Tool)},
			Recorders: []string{hexOf(w.Leaf.Recorder)}, PCRPolicies: []string{"fleet"},
		}},
	}
	s.in = Input{
		Identity:    "spiffe://example.org/build",
		Artifacts:   []Artifact{{Name: "hello", Digest: map[string]string{"sha256": hexOf(artifact)}}},
		LeastSerial: 3,
	}
	return s
}

// setSelectors commits to the tool and to these.
func (s *scene) setSelectors(more ...string) {
	s.Leaf.Selectors = append([]string{attest.SelectorTool + hexOf(s.Leaf.Tool)}, more...)
	slices.Sort(s.Leaf.Selectors)
}

func (s *scene) requirement() *Requirement { return &s.file.Requirements[0] }

// sign runs the flow: statement, evidence over it, SVID, bundle.
func (s *scene) sign(t testing.TB) []byte {
	t.Helper()
	p, err := Prepare(s.stmt)
	if err != nil {
		t.Fatal(err)
	}
	if s.Leaf.Payload == sha256.Sum256([]byte("the statement")) { // a test may have set another
		s.Leaf.Payload = p.Digest()
	}
	e := s.Make(t)
	if s.evidence != nil {
		e = s.evidence(e)
	}
	b, err := p.sign(s.SVIDKey, s.Issue(t, e))
	if err != nil {
		t.Fatal(err)
	}
	raw, err := b.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	if s.bundle != nil {
		raw = s.bundle(raw)
	}
	return raw
}

func (s *scene) trust(t testing.TB) *Trust {
	t.Helper()
	trust, err := NewTrust(s.file)
	if err != nil {
		t.Fatal(err)
	}
	return trust
}

func (s *scene) verify(t testing.TB) (*Result, error) {
	t.Helper()
	if s.in.Links == nil {
		s.in.Links = []LinkInput{{Name: "build", Bundle: s.sign(t)}}
	}
	res, err := Verify(s.in, s.trust(t), s.at)
	consistent(t, res, err)
	return res, err
}

// accepts fails the test unless the scene verifies.
func (s *scene) accepts(t testing.TB) *Result {
	t.Helper()
	res, err := s.verify(t)
	if err != nil {
		t.Fatalf("refused: %v\n%s", err, res.Text())
	}
	return res
}

// refuses fails the test unless check is the first to fail, in class, and its
// detail holds the words.
func (s *scene) refuses(t testing.TB, check string, class error, words ...string) *Result {
	t.Helper()
	res, err := s.verify(t)
	if err == nil {
		t.Fatalf("accepted:\n%s", res.Text())
	}
	if res.Failure.Check != check || !errors.Is(err, class) {
		t.Fatalf("refused by %s (%s): %v, want %s (%v)", res.Failure.Check, res.Failure.Class, err, check, class)
	}
	for _, w := range words {
		if !strings.Contains(res.Failure.Message, w) {
			t.Errorf("the reason %q lacks %q", res.Failure.Message, w)
		}
	}
	return res
}

// consistent holds after every verification: the verdict, the error and the
// checks tell one story, and no check goes missing.
func consistent(t testing.TB, res *Result, err error) {
	t.Helper()
	if (err == nil) != (res.Verdict == VerdictVerified) || (err == nil) != (res.Failure == nil) {
		t.Fatalf("verdict %q with error %v and failure %+v", res.Verdict, err, res.Failure)
	}
	if err != nil && errors.Is(err, ErrCrypto) == errors.Is(err, ErrPolicy) {
		t.Fatalf("%v is of no class, or of two", err)
	}
	failed := 0
	for _, l := range res.Links {
		want := (&linkVerifier{}).checks()
		have := map[string]bool{}
		for _, c := range l.Checks {
			have[c.ID] = true
			if c.Outcome == attest.Failed {
				failed++
				if l.Verdict == VerdictVerified {
					t.Fatalf("link %s is verified although %s failed", l.Name, c.ID)
				}
			}
			if c.Clause == "" || c.Outcome == "" {
				t.Errorf("check %+v cites nothing", c)
			}
		}
		for _, c := range want {
			if !have[c.id] {
				t.Errorf("link %s does not report %s", l.Name, c.id)
			}
		}
	}
	for _, c := range res.Checks {
		if c.Outcome == attest.Failed {
			failed++
		}
	}
	if (failed == 0) != (err == nil) {
		t.Fatalf("%d checks failed, error %v", failed, err)
	}
}

func outcomeOf(checks []attest.Check, id string) attest.Outcome {
	for _, c := range checks {
		if c.ID == id {
			return c.Outcome
		}
	}
	return "absent"
}

func mustParse(t testing.TB, raw []byte) *Bundle {
	t.Helper()
	b, err := ParseBundle(raw)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// withoutEvidence has an administrator mint an SVID of the same name.
func withoutEvidence(*attest.Evidence) *attest.Evidence { return nil }

func noCodeSigning(c *x509.Certificate) {
	c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
}
