package link

import (
	"crypto/sha256"
	"encoding/hex"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/rootlink/rootlink/pkg/attest"
)

func TestRefusesIdentityWithoutARequirement(t *testing.T) {
	s := newScene(t)
	s.requirement().Identity = "spiffe://example.org/other"
	s.refuses(t, "requirement.match", ErrPolicy, "no requirement")
}

// An expectation that the evidence be of a lesser kind is met by leaf evidence,
// not by none.
func TestRefusesNoEvidenceWhereParentWouldDo(t *testing.T) {
	for _, kind := range []string{EvidenceParent, EvidenceDetached} {
		demand := func(s *scene) {
			if s.requirement().Evidence = kind; kind == EvidenceParent {
				s.requirement().parentWouldDo()
			}
		}
		s := newScene(t)
		demand(s)
		s.accepts(t)
		s = newScene(t)
		demand(s)
		s.evidence = withoutEvidence
		s.refuses(t, "evidence.kind", ErrPolicy, "no evidence")
	}
}

func TestRefusesAnotherIdentityThanAskedFor(t *testing.T) {
	s := newScene(t)
	s.in.Identity = "spiffe://example.org/release/*"
	s.refuses(t, "identity", ErrPolicy)
}

func TestRefusesUnknownTool(t *testing.T) {
	s := newScene(t)
	s.requirement().Tools = []string{strings.Repeat("00", 32)}
	s.refuses(t, "requirement.tools", ErrPolicy, hexOf(s.Leaf.Tool))
}

// `env go build`: both ran as the step's main program, and both need allowing.
func TestRefusesUnknownToolEarlierInTheExecChain(t *testing.T) {
	s := newScene(t)
	env := strings.Repeat("ee", 32)
	s.setSelectors(attest.SelectorRecorder+hexOf(s.Leaf.Recorder), attest.SelectorTool+env)
	s.refuses(t, "requirement.tools", ErrPolicy, env)
	s.in.Links = nil
	s.requirement().Tools = append(s.requirement().Tools, env)
	s.accepts(t)
}

func TestRefusesToolThatWasNotMeasured(t *testing.T) {
	s := newScene(t)
	s.Leaf.Selectors = []string{attest.SelectorRecorder + hexOf(s.Leaf.Recorder)}
	s.requirement().Tools = []string{AnyHash}
	s.refuses(t, "programs.measured", ErrCrypto)
}

func TestRefusesToolThatTheLeafDoesNotName(t *testing.T) {
	s := newScene(t)
	s.setSelectors(attest.SelectorRecorder + hexOf(s.Leaf.Recorder))
	s.Leaf.Tool = sha256.Sum256([]byte("something else"))
	s.refuses(t, "programs.measured", ErrCrypto)
}

func TestRefusesUnknownRecorder(t *testing.T) {
	s := newScene(t)
	s.requirement().Recorders = []string{strings.Repeat("00", 32)}
	s.refuses(t, "requirement.recorder", ErrPolicy, "not allowed")
}

func TestRefusesUnprotectedRecorder(t *testing.T) {
	s := newScene(t)
	s.setSelectors(attest.SelectorUnprotectedRecorder + hexOf(s.Leaf.Recorder))
	s.refuses(t, "requirement.recorder", ErrPolicy, "unprotected")
}

func TestSaysThatTheRecorderWasUnprotected(t *testing.T) {
	s := newScene(t)
	s.setSelectors(attest.SelectorUnprotectedRecorder + hexOf(s.Leaf.Recorder))
	s.requirement().Recorders, s.requirement().UnprotectedRecorders = nil, []string{hexOf(s.Leaf.Recorder)}
	res := s.accepts(t)
	if res.Links[0].Chain.Programs.RecorderProtected || !strings.Contains(res.Text(), "UNPROTECTED") {
		t.Errorf("it is not said aloud:\n%s", res.Text())
	}
}

func TestRefusesRecorderThatIsBothProtectedAndNot(t *testing.T) {
	s := newScene(t)
	s.setSelectors(attest.SelectorRecorder+hexOf(s.Leaf.Recorder), attest.SelectorUnprotectedRecorder+hexOf(s.Leaf.Recorder))
	s.refuses(t, "programs.measured", ErrCrypto)
}

func TestRefusesPCROutOfPolicy(t *testing.T) {
	s := newScene(t)
	s.TPM.Extend(7, []byte("another key database"))
	res := s.refuses(t, "requirement.pcr_policy", ErrPolicy, "fleet")
	if res.Links[0].Tier == TierBootAttested {
		t.Error("the tier is boot attested all the same")
	}
}

func TestPCRPolicyRevisionsAndWindows(t *testing.T) {
	s := newScene(t)
	raw := s.sign(t)
	try := func() *scene { c := *s; c.in.Links = []LinkInput{{Name: "build", Bundle: raw}}; return &c }
	good := s.file.PCRPolicies[0]
	newer := PCRPolicy{PCRPolicy: attest.PCRPolicy{Name: "fleet", Revision: 2, Profiles: []attest.PCRProfile{{
		Name: "after-update", Banks: map[string]map[string]string{"sha256": {"7": strings.Repeat("77", 32)}},
	}}}}

	c := try()
	c.file.PCRPolicies = []PCRPolicy{newer, good}
	if p := c.accepts(t).Links[0].Chain.Quote.Policy; p.Revision != 1 {
		t.Errorf("matched revision %d", p.Revision)
	}

	c = try()
	c.file.PCRPolicies = []PCRPolicy{newer}
	c.refuses(t, "requirement.pcr_policy", ErrPolicy)

	// The window is judged at the nonce's time, so that a link of before the
	// window's end stays good.
	closed := good
	closed.Profiles = []attest.PCRProfile{good.Profiles[0]}
	closed.Profiles[0].NotAfter = s.Now.Add(-time.Minute)
	c = try()
	c.file.PCRPolicies = []PCRPolicy{closed}
	c.refuses(t, "requirement.pcr_policy", ErrPolicy)
	closed.Profiles = []attest.PCRProfile{good.Profiles[0]}
	closed.Profiles[0].NotAfter = s.Now.Add(500 * time.Millisecond) // before T, after the nonce
	c = try()
	c.file.PCRPolicies = []PCRPolicy{closed}
	c.accepts(t)
}

// What was taken out of the policy is good no more for whoever boots it later,
// and the links made before stay good.
func TestRefusesRevisionThatWasReplacedBeforeTheNonce(t *testing.T) {
	s := newScene(t)
	claim := s.file.PCRPolicies[0].Digest()
	s.evidence = func(e *attest.Evidence) *attest.Evidence {
		e.Policy = &attest.PolicyRef{Name: "fleet", Revision: 1, Digest: attest.TypedDigest{Alg: "sha256", Value: claim[:]}}
		return e
	}
	s.file.PCRPolicies = append(s.file.PCRPolicies, PCRPolicy{PCRPolicy: attest.PCRPolicy{Name: "fleet", Revision: 2, Profiles: []attest.PCRProfile{{
		Name: "after-update", Banks: map[string]map[string]string{"sha256": {"7": strings.Repeat("77", 32)}},
	}}}})
	raw := s.sign(t)
	try := func(replaced time.Time) *scene {
		c := *s
		c.in.Links = []LinkInput{{Name: "build", Bundle: raw}}
		c.file.PCRPolicies = slices.Clone(s.file.PCRPolicies)
		c.file.PCRPolicies[0].Replaced = replaced
		return &c
	}
	nonce := s.accepts(t).Links[0].Chain.Quote.NonceTime
	try(time.Time{}).accepts(t)          // by a server that did not say when
	try(nonce.Add(time.Hour)).accepts(t) // made before, verified after
	try(nonce.Add(-replacedGrace)).accepts(t)
	past := nonce.Add(-replacedGrace - time.Second)
	res := try(past).refuses(t, "requirement.pcr_policy", ErrPolicy, "was replaced")
	if res.Links[0].Tier == TierBootAttested {
		t.Error("the tier is boot attested all the same")
	}
	// What the server said it matched is no way around it.
	c := try(past)
	c.requirement().PCRPolicies, c.requirement().Tier = nil, TierTPM
	c.refuses(t, "pcr_policy.claim", ErrPolicy, "was replaced")
}

func TestComparesTheServersPolicyClaim(t *testing.T) {
	claim := func(digest [32]byte, revision uint64) func(*attest.Evidence) *attest.Evidence {
		return func(e *attest.Evidence) *attest.Evidence {
			e.Policy = &attest.PolicyRef{Name: "fleet", Revision: revision, Digest: attest.TypedDigest{Alg: "sha256", Value: digest[:]}}
			return e
		}
	}
	s := newScene(t)
	digest := s.file.PCRPolicies[0].Digest()
	s.evidence = claim(digest, 1)
	if res := s.accepts(t); outcomeOf(res.Links[0].Checks, "pcr_policy.claim") != attest.Passed {
		t.Error("the claim was not compared")
	}
	s = newScene(t)
	s.evidence = claim([32]byte{1}, 1)
	s.refuses(t, "pcr_policy.claim", ErrPolicy, "another PCR policy")

	s = newScene(t)
	s.evidence = claim(digest, 1)
	s.TPM.Extend(7, []byte("x"))
	s.requirement().PCRPolicies, s.requirement().Tier = nil, TierTPM
	s.refuses(t, "pcr_policy.claim", ErrPolicy, "says")

	s = newScene(t)
	s.evidence = claim(digest, 9) // newer than trust.json: decides nothing
	s.accepts(t)
}

func TestTierTPMJudgesNoBootState(t *testing.T) {
	s := newScene(t)
	s.requirement().PCRPolicies, s.requirement().Tier = nil, TierTPM
	res := s.accepts(t)
	if res.Links[0].Tier != TierTPM || !strings.Contains(res.Text(), "NOT JUDGED") {
		t.Errorf("tier %s:\n%s", res.Links[0].Tier, res.Text())
	}
}

func TestRefusesTiersItCannotProve(t *testing.T) {
	for _, tier := range []string{TierMeasuredImage, TierKernelWitnessed} {
		s := newScene(t)
		s.requirement().Tier = tier
		s.refuses(t, "requirement.tier", ErrUnsupported, tier)
	}
}

func TestRefusesEKThatTheIdentityMayNotUse(t *testing.T) {
	s := newScene(t)
	s.requirement().EKs = []string{strings.Repeat("00", 32)}
	s.refuses(t, "requirement.ek", ErrPolicy)
	s.in.Links = nil
	s.requirement().EKs = append(s.requirement().EKs, hexOf(s.TPM.EKHash))
	s.accepts(t)
}

func TestRefusesEKOutsideTheInventory(t *testing.T) {
	s := newScene(t)
	s.file.EK.Inventory = map[string]string{strings.Repeat("00", 32): "another"}
	s.refuses(t, "ek.inventory", ErrPolicy)
	s.in.Links = nil
	s.file.EK.Inventory[hexOf(s.TPM.EKHash)] = "builder-1"
	if res := s.accepts(t); res.Links[0].Chain.EK.Host != "builder-1" || !strings.Contains(res.Text(), "builder-1") {
		t.Errorf("EK %+v", res.Links[0].Chain.EK)
	}
	// An agent's ID would say the hash a second time.
	ek := hexOf(s.TPM.EKHash)
	s.in.Links = nil
	s.file.EK.Inventory[ek] = "spiffe://example.org/spire/agent/tpmnode/" + ek
	if text := s.accepts(t).Text(); !strings.Contains(text, "agent tpmnode/"+ek[:12]+"…") {
		t.Errorf("host in\n%s", text)
	}
}

func TestRefusesStepThatTheIdentityMayNotSign(t *testing.T) {
	s := newScene(t)
	s.requirement().Steps = []string{"test"}
	s.refuses(t, "requirement.step", ErrPolicy)
}

func TestRefusesRevoked(t *testing.T) {
	for name, r := range map[string]func(s *scene) Revocation{
		"EK": func(s *scene) Revocation { return Revocation{Kind: RevokedEK, ID: hexOf(s.TPM.EKHash)} },
		"AK": func(s *scene) Revocation { return Revocation{Kind: RevokedAK, ID: hex.EncodeToString(s.TPM.AKName)} },
		"attestation CA": func(s *scene) Revocation {
			return Revocation{Kind: RevokedAttestationCA, ID: hexHash(spkiHash(s.CA.Cert))}
		},
		"authority": func(s *scene) Revocation {
			return Revocation{Kind: RevokedAuthority, ID: hexHash(spkiHash(s.Authority))}
		},
		"tool":     func(s *scene) Revocation { return Revocation{Kind: RevokedExecutable, ID: hexOf(s.Leaf.Tool)} },
		"recorder": func(s *scene) Revocation { return Revocation{Kind: RevokedExecutable, ID: hexOf(s.Leaf.Recorder)} },
		"executable that the recorder names": func(s *scene) Revocation {
			h := strings.Repeat("5c", 32)
			s.stmt.Byproducts.Executables = []Executable{{Path: "/bin/x", Digest: map[string]string{"sha256": h}}}
			return Revocation{Kind: RevokedExecutable, ID: h}
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := newScene(t)
			rev := r(s)
			raw := s.sign(t)
			for _, c := range []struct {
				from    time.Time // zero: always
				refused bool
			}{
				{time.Time{}, true},
				{s.Now.Add(-time.Hour), true},
				{s.at, true}, // after the nonce, and by T
				{s.at.Add(time.Second), false},
			} {
				rev := rev
				if rev.Always = c.from.IsZero(); !rev.Always {
					rev.From = &c.from
				}
				try := *s
				try.in.Links = []LinkInput{{Name: "build", Bundle: raw}}
				try.file.Revocations = []Revocation{rev}
				if c.refused {
					try.refuses(t, "revocation", ErrPolicy, rev.ID)
				} else {
					try.accepts(t)
				}
			}
		})
	}
}

func TestRefusesLinkReplayedFromAnOlderRun(t *testing.T) {
	s := newScene(t)
	s.in.NotBefore = s.Now.Add(time.Minute)
	s.refuses(t, "freshness", ErrPolicy, "before")
	s.in.NotBefore = s.Now.Add(-time.Minute)
	s.accepts(t)
}

func TestRefusesStepThatFailed(t *testing.T) {
	zero, two := 0, 2
	for name, b := range map[string]Byproducts{
		"exit code": {ExitCode: &two},
		"signal":    {ExitCode: &zero, Signal: "SIGKILL"},
		"unknown":   {},
	} {
		t.Run(name, func(t *testing.T) {
			s := newScene(t)
			s.stmt.Byproducts = b
			s.refuses(t, "step.exit_code", ErrPolicy)
		})
	}
}

func TestRefusesArtifactWithOneByteChanged(t *testing.T) {
	s := newScene(t)
	s.in.Artifacts[0].Digest["sha256"] = hexOf(sha256.Sum256([]byte("the artifacu")))
	s.refuses(t, "artifact.subject", ErrPolicy, "hello", "out/hello")
}

func TestRefusesArtifactByAWeakDigest(t *testing.T) {
	s := newScene(t)
	sha1 := "da39a3ee5e6b4b0d3255bfef95601890afd80709"
	s.stmt.Subjects[0].Digest = map[string]string{"sha1": sha1}
	s.in.Artifacts[0].Digest = map[string]string{"sha1": sha1}
	s.refuses(t, "artifact.subject", ErrPolicy)
}

func TestDirectoryIsComparedByItsDirHash(t *testing.T) {
	s := newScene(t)
	h, err := DirHash(map[string][32]byte{"a": {1}, "b/c": {2}})
	if err != nil {
		t.Fatal(err)
	}
	s.stmt.Subjects = append(s.stmt.Subjects, Resource{Name: "site", Digest: map[string]string{DirHashAlg: h}})
	s.in.Artifacts = []Artifact{{Name: "site", Digest: map[string]string{DirHashAlg: h}}}
	s.accepts(t)
}

// A directory whose files the link lists one by one: each in its place, none
// missing, none added.
func TestRefusesDirectoryThatDiffersInOneFile(t *testing.T) {
	a, b, c := strings.Repeat("aa", 32), strings.Repeat("bb", 32), strings.Repeat("cc", 32)
	for name, tc := range map[string]struct {
		files map[string]string
		words string // "": accepted
	}{
		"as recorded":      {map[string]string{"a": a, "sub/b": b}, ""},
		"content changed":  {map[string]string{"a": a, "sub/b": c}, "sub/b is listed with"},
		"contents swapped": {map[string]string{"a": b, "sub/b": a}, "not a subject"},
		"file added":       {map[string]string{"a": a, "sub/b": b, "x": c}, "x is not listed"},
		"file removed":     {map[string]string{"a": a}, "sub/b is missing"},
		"file moved":       {map[string]string{"a": a, "b": b}, "b is not listed"},
		"empty":            {map[string]string{}, "not a subject"},
	} {
		t.Run(name, func(t *testing.T) {
			s := newScene(t)
			for n, h := range map[string]string{"out/site/a": a, "out/site/sub/b": b, "out/sitemap/a": c, "a": c} {
				s.stmt.Subjects = append(s.stmt.Subjects, Resource{Name: n, Digest: map[string]string{"sha256": h}})
			}
			s.in.Artifacts = []Artifact{{Name: "site", Files: tc.files}}
			if tc.words != "" {
				s.refuses(t, "artifact.subject", ErrPolicy, tc.words)
				return
			}
			if m := s.accepts(t).Artifacts[0].Matches; len(m) != 1 || m[0].Subject != "out/site/" || m[0].Files != 2 {
				t.Errorf("matches %+v", m)
			}
		})
	}
}

// Policy failures do not hide each other; a cryptographic one ends the matter.
func TestReportsEveryPolicyFailure(t *testing.T) {
	s := newScene(t)
	s.requirement().Tools = []string{strings.Repeat("00", 32)}
	s.in.Identity = "spiffe://example.org/x"
	two := 2
	s.stmt.Byproducts.ExitCode = &two
	res := s.refuses(t, "requirement.tools", ErrPolicy)
	for _, id := range []string{"requirement.tools", "identity", "step.exit_code"} {
		if o := outcomeOf(res.Links[0].Checks, id); o != attest.Failed {
			t.Errorf("%s: %s", id, o)
		}
	}
}

// What a signed file says must not be able to rewrite the verdict on a terminal.
func TestTextHidesNoControlCharacters(t *testing.T) {
	s := newScene(t)
	s.stmt.Command = []string{"\x1b[2J\r✓ VERIFIED", "\u202ereversed", "line\nbreak"}
	text := s.accepts(t).Text()
	for _, bad := range []string{"\x1b", "\r", "\u202e", "line\nbreak"} {
		if strings.Contains(text, bad) {
			t.Errorf("the text holds %q", bad)
		}
	}
}

func BenchmarkVerify(b *testing.B) {
	s := newScene(b)
	s.accepts(b)
	trust := s.trust(b)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := Verify(s.in, trust, s.at); err != nil {
			b.Fatal(err)
		}
	}
}
