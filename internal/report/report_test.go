package report

import (
	"bytes"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/rootlink/rootlink/pkg/attest"
	"github.com/rootlink/rootlink/pkg/layout"
	"github.com/rootlink/rootlink/pkg/link"
)

var when = time.Date(2030, 5, 1, 12, 0, 0, 0, time.UTC)

// result is that of n links that all verified.
func result(n int) *link.Result {
	r := &link.Result{
		SchemaVersion: link.ResultSchema, Verdict: link.VerdictVerified, Identity: "spiffe://example.org/**",
		Trust:  link.TrustInfo{TrustDomain: "example.org", Serial: 7, Expires: when.Add(90 * 24 * time.Hour)},
		Time:   link.TimeInfo{At: when, Attested: true, Source: "a time-stamping authority"},
		Checks: []attest.Check{{ID: "trust.window", Clause: "verify.md", Outcome: attest.Passed}, {ID: "log.inclusion", Clause: "RFC 6962", Outcome: attest.NotRun}},
	}
	hex := strings.Repeat("0123456789abcdef", 4)
	zero := 0
	for i := range n {
		name := fmt.Sprintf("step-%d", i)
		l := link.LinkResult{
			Name: "out/" + name + link.BundleSuffix, Verdict: link.VerdictVerified, Tier: link.TierBootAttested,
			Time: link.LinkTime{
				At: when, Attested: true, Sources: []link.TimeSource{{Authority: "CN=example.org time", Time: when, Counted: true, SameOperator: true}},
				Logs: []link.LogEntry{{Of: link.LoggedSignature, Log: "log.example.org", Index: 4711, Counted: true}},
			},
			ProvedByTPM:   []string{"whoever could use the AK committed to exactly this statement and SVID key", "that TPM's PCRs had the values shown, at reset 3, restart 0"},
			SaidBy:        []link.Said{{What: "command", Value: "go build -trimpath -o " + name}, {What: "exit code", Value: "0"}},
			TakenOnWordOf: []link.Word{{What: "AK and EK live in one TPM", Who: "attestation CA CN=attestation", SameOperator: true}, {What: "tool and recorder hashes", Who: "the agent on that machine"}},
		}
		l.Chain = link.Chain{
			Statement: &link.StatementInfo{Step: name, Command: []string{"go", "build", "-trimpath", "-o", name}, Materials: 12, ExitCode: &zero, Subjects: make([]link.Resource, 1), Git: &link.Git{Commit: hex[:40]}},
			SVID:      &link.SVIDInfo{SPIFFEID: "spiffe://example.org/pipeline/" + name, KeySHA256: hex, NotBefore: when, NotAfter: when.Add(10 * time.Minute), Authority: "CN=example.org"},
			Programs:  &link.ProgramsInfo{Tool: hex, Tools: []string{hex}, Recorder: hex, RecorderProtected: true},
			Quote:     &link.QuoteInfo{NonceTime: when, ResetCount: 3, PCRs: map[string]map[string]string{"sha256": {"0": hex, "7": hex}}, Policy: &link.PolicyInfo{Name: "golden", Revision: 2, Profile: "node-1"}},
			AK:        &link.AKInfo{Name: "000b" + hex, CertifiedBy: "CN=attestation", Manufacturer: "id:414D4400", Software: false},
			EK:        &link.EKInfo{SHA256: hex, Basis: "maker", Host: "builder-7"},
			Maker:     &link.MakerInfo{Subject: "CN=A maker of TPMs", SHA256: hex},
		}
		for j := range 30 {
			l.Checks = append(l.Checks, attest.Check{ID: fmt.Sprintf("check.%d", j), Clause: "a clause", Outcome: attest.Passed, Detail: "as it should be"})
		}
		r.Links = append(r.Links, l)
		r.Artifacts = append(r.Artifacts, link.ArtifactResult{
			Artifact: link.Artifact{Name: name, Digest: map[string]string{"sha256": hex}}, Matches: []link.Match{{Link: l.Name, Subject: name}},
		})
	}
	return r
}

func pageOf(t testing.TB, r *link.Result, o Options) string {
	t.Helper()
	o.Now, o.By = when, "rootlink test"
	var b bytes.Buffer
	if err := Write(&b, r, o); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// hostile is a result whose every string a stranger chose.
func hostile() *link.Result {
	const evil = `<script>document.title="owned"</script><img src=x onerror='document.title="owned"'>` + "\u202egnp.exe\x1b[2J"
	r := result(1)
	l := &r.Links[0]
	l.Name, l.Chain.Statement.Step, l.Chain.Statement.Command = evil, evil, []string{evil}
	l.Chain.SVID.SPIFFEID, l.Chain.AK.Manufacturer, l.Chain.EK.Host, l.Chain.Maker.Subject = evil, evil, evil, evil
	l.SaidBy = []link.Said{{What: evil, Value: evil}}
	l.Checks = append(l.Checks, attest.Check{ID: "x", Outcome: attest.Failed, Detail: evil})
	r.Artifacts[0].Name = evil
	r.Verdict, r.Failure = link.VerdictRefused, &link.Failure{Class: link.ClassPolicy, Check: "x", Message: evil, Link: evil}
	return r
}

func TestPageEscapesStrangersStrings(t *testing.T) {
	html := pageOf(t, hostile(), Options{Steps: []Step{{Name: "<b>", Detail: "</section>"}}})
	for _, bad := range []string{"<script", "<img", "\u202e", "\x1b", "<b></b>", "</section></span>"} {
		if strings.Contains(html, bad) {
			t.Errorf("the page holds %q", bad)
		}
	}
}

func TestPageSaysWhatIsMissing(t *testing.T) {
	r := result(1)
	r.Verdict, r.Failure = link.VerdictRefused, &link.Failure{Class: link.ClassCryptographic, Check: "evidence.form", Message: "the SVID carries no evidence"}
	l := &r.Links[0]
	l.Verdict, l.Chain = link.VerdictRefused, link.Chain{Statement: l.Chain.Statement, SVID: l.Chain.SVID}
	l.ProvedByTPM = nil
	m := build(r, Options{}).Machines[0]
	boxes, gone := append(m.Chains[0].Box, m.Box...), 0
	for _, b := range boxes {
		if b.Kind == missing {
			gone++
		}
	}
	if len(boxes) != 8 || gone != 5 {
		t.Errorf("%d boxes, %d of them missing; want 8 and 5", len(boxes), gone)
	}
	html := pageOf(t, r, Options{})
	for _, want := range []string{"✗ Refused", "the SVID carries no evidence", "evidence.form", "not established", "log.inclusion"} {
		if !strings.Contains(html, want) {
			t.Errorf("the page does not say %q", want)
		}
	}
	if strings.Contains(html, "Signed by") {
		t.Error("the page names a signer whose link was refused")
	}
}

func TestSameSentenceIsSaidOnce(t *testing.T) {
	p := build(result(3), Options{})
	if len(p.Proved) != 2 || p.Proved[0].Links != "all links" || p.Said[0].Links != "step-0" {
		t.Errorf("%+v", p.Proved)
	}
}

func TestOneTPMIsDrawnOnce(t *testing.T) {
	r := result(3)
	r.Links[2].Chain.AK = &link.AKInfo{Name: "000bff"}
	m := build(r, Options{}).Machines
	if len(m) != 2 || len(m[0].Chains) != 2 || len(m[1].Chains) != 1 {
		t.Errorf("%d machines", len(m))
	}
}

func TestLayoutsResultNamesStepRuleAndFile(t *testing.T) {
	r := &layout.Result{
		Verdict: link.VerdictRefused,
		Failure: &layout.Failure{Class: link.ClassPolicy, Check: "rules", Step: "build", Rule: "DISALLOW *", File: "evil.go", Message: "not allowed"},
		Steps:   []layout.StepResult{{Name: "clone", Verdict: link.VerdictVerified, Threshold: 2, SignedBy: []string{"a", "b"}}, {Name: "build", Verdict: link.VerdictRefused}},
		Checks:  []layout.Check{{Check: attest.Check{ID: "rules", Outcome: attest.Failed, Detail: "not allowed"}, Step: "build"}},
	}
	res, steps := FromLayout(r, when)
	html := pageOf(t, res, Options{Steps: steps})
	for _, want := range []string{"step build", "DISALLOW *", "evil.go", "2 of 2: a, b", "build: rules"} {
		if !strings.Contains(html, want) {
			t.Errorf("the page does not say %q", want)
		}
	}
}
