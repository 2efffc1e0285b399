package admin

import (
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	adminv1 "github.com/rootlink/rootlink/proto/rootlink/admin/v1"
)

func TestCapture(t *testing.T) {
	f := newFixture(t)
	id := f.node(t, 0xa0)
	ctx := t.Context()
	r, err := f.CapturePCRPolicy(ctx, &adminv1.CapturePCRPolicyRequest{AgentId: id, Name: "lab"})
	if err != nil {
		t.Fatal(err)
	}
	if got := string(r.Policy.PolicyJson); !strings.Contains(got, `{"sha256":{"7":"a7a7`) || strings.Contains(got, `"1":`) {
		t.Errorf("the default is not PCR 7 alone: %s", got)
	}
	if !strings.Contains(strings.Join(r.Notes, "\n"), "SOFTWARE TPM") {
		t.Errorf("notes do not tell of the software TPM: %q", r.Notes)
	}
	sel := func(bank string, i ...uint32) []*adminv1.PCRSelection {
		return []*adminv1.PCRSelection{{Bank: bank, Indices: i}}
	}
	for _, tt := range []struct {
		name string
		req  *adminv1.CapturePCRPolicyRequest
		code codes.Code
	}{
		{"exists", &adminv1.CapturePCRPolicyRequest{AgentId: id, Name: "lab"}, codes.AlreadyExists},
		{"same values again", &adminv1.CapturePCRPolicyRequest{AgentId: id, Name: "lab", AddProfile: true}, codes.AlreadyExists},
		{"name", &adminv1.CapturePCRPolicyRequest{AgentId: id, Name: "a b"}, codes.InvalidArgument},
		{"no agent", &adminv1.CapturePCRPolicyRequest{Name: "x"}, codes.InvalidArgument},
		{"unknown agent", &adminv1.CapturePCRPolicyRequest{AgentId: agentPrefix + hexOf(1), Name: "x"}, codes.NotFound},
		{"resettable PCR", &adminv1.CapturePCRPolicyRequest{AgentId: id, Name: "x", Pcrs: sel("sha256", 16)}, codes.InvalidArgument},
		{"PCR not quoted", &adminv1.CapturePCRPolicyRequest{AgentId: id, Name: "x", Pcrs: sel("sha256", 20)}, codes.FailedPrecondition},
		{"bank not quoted", &adminv1.CapturePCRPolicyRequest{AgentId: id, Name: "x", Pcrs: sel("sha384", 7)}, codes.FailedPrecondition},
		{"another profile", &adminv1.CapturePCRPolicyRequest{AgentId: f.node(t, 0xb0), Name: "lab", AddProfile: true}, codes.OK},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := f.CapturePCRPolicy(ctx, tt.req)
			wantCode(t, err, tt.code)
		})
	}
	l, err := f.ListPCRPolicies(ctx, &adminv1.ListPCRPoliciesRequest{})
	if err != nil || len(l.Policies) != 1 || !strings.Contains(string(l.Policies[0].PolicyJson), `"revision":2`) {
		t.Errorf("%v %v", l, err)
	}
}

func TestDiffSaysWhichPCR(t *testing.T) {
	f := newFixture(t)
	good, other := f.node(t, 0xa0), f.node(t, 0xb0)
	ctx := t.Context()
	if _, err := f.CapturePCRPolicy(ctx, &adminv1.CapturePCRPolicyRequest{
		AgentId: good, Name: "lab", Profile: "p",
		NotAfter: epoch.Add(time.Hour).Unix(),
	}); err != nil {
		t.Fatal(err)
	}
	d, err := f.DiffPCRPolicy(ctx, &adminv1.DiffPCRPolicyRequest{Name: "lab", AgentId: good})
	if err != nil || !d.Matches || d.MatchedProfile != "p" {
		t.Errorf("%v %v", d, err)
	}
	d, err = f.DiffPCRPolicy(ctx, &adminv1.DiffPCRPolicyRequest{Name: "lab", AgentId: other})
	if err != nil || d.Matches || len(d.Differences) != 1 || d.Differences[0].Pcr != 7 || d.Differences[0].Got[0] != 0xb7 {
		t.Errorf("%v %v", d, err)
	}
	f.clock = epoch.Add(2 * time.Hour)
	d, err = f.DiffPCRPolicy(ctx, &adminv1.DiffPCRPolicyRequest{Name: "lab", AgentId: good})
	if err != nil || d.Matches || len(d.Expired) != 1 {
		t.Errorf("a profile past its end: %v %v", d, err)
	}
	_, err = f.DiffPCRPolicy(ctx, &adminv1.DiffPCRPolicyRequest{Name: "none", AgentId: good})
	wantCode(t, err, codes.NotFound)
}

func TestHandWrittenPolicy(t *testing.T) {
	f := newFixture(t)
	ctx := t.Context()
	good := `{"name":"hand","profiles":[{"name":"p","pcrs":{"sha256":{"7":"` + hexOf(7) + `"}}}]}`
	for _, tt := range []struct {
		name, json string
		replace    bool
		code       codes.Code
	}{
		{"not JSON", "{", false, codes.InvalidArgument},
		{"unknown key", strings.Replace(good, `"name":"p"`, `"nmae":"p"`, 1), false, codes.InvalidArgument},
		{"two objects", good + good, false, codes.InvalidArgument},
		{"resettable PCR", strings.Replace(good, `"7":`, `"23":`, 1), false, codes.InvalidArgument},
		{"SHA-1 only", `{"name":"hand","profiles":[{"name":"p","pcrs":{"sha1":{"7":"` + hexOf(7)[:40] + `"}}}]}`, false, codes.InvalidArgument},
		{"no profile", `{"name":"hand","profiles":[]}`, false, codes.InvalidArgument},
		{"huge", strings.Repeat(" ", maxPolicyJSON+1), false, codes.InvalidArgument},
		{"good", good, false, codes.OK},
		{"exists", good, false, codes.AlreadyExists},
		{"replaced", good, true, codes.OK},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := f.PutPCRPolicy(ctx, &adminv1.PutPCRPolicyRequest{PolicyJson: []byte(tt.json), Replace: tt.replace})
			wantCode(t, err, tt.code)
		})
	}
}

func TestDeletedPolicyStaysOnRecord(t *testing.T) {
	f := newFixture(t)
	id := f.node(t, 0xa0)
	ctx := t.Context()
	capture := &adminv1.CapturePCRPolicyRequest{AgentId: id, Name: "lab"}
	if _, err := f.CapturePCRPolicy(ctx, capture); err != nil {
		t.Fatal(err)
	}
	if _, err := f.DeletePCRPolicy(ctx, &adminv1.DeletePCRPolicyRequest{Name: "lab"}); err != nil {
		t.Fatal(err)
	}
	_, err := f.DeletePCRPolicy(ctx, &adminv1.DeletePCRPolicyRequest{Name: "lab"})
	wantCode(t, err, codes.NotFound)
	if l, err := f.ListPCRPolicies(ctx, &adminv1.ListPCRPoliciesRequest{}); err != nil || len(l.Policies) != 0 {
		t.Errorf("still in force: %v %v", l, err)
	}
	l, err := f.ListPCRPolicies(ctx, &adminv1.ListPCRPoliciesRequest{AllRevisions: true})
	if err != nil || len(l.Policies) != 1 || l.Policies[0].DeletedUnix == 0 {
		t.Errorf("not on record: %v %v", l, err)
	}
	// A policy of the same name later is a new revision, never revision 1 again.
	r, err := f.CapturePCRPolicy(ctx, capture)
	if err != nil || !strings.Contains(string(r.Policy.PolicyJson), `"revision":2`) {
		t.Errorf("%v %v", r, err)
	}
}

func TestGetNode(t *testing.T) {
	f := newFixture(t)
	id := f.node(t, 0xa0)
	n, err := f.GetNode(t.Context(), &adminv1.GetNodeRequest{AgentId: id})
	if err != nil || !n.Software || n.EkHash[0] != 0xa0 || len(n.Pcrs) != 16 || n.Pcrs[7].Index != 7 || len(n.History) != 1 {
		t.Errorf("%v %v", n, err)
	}
	_, err = f.GetNode(t.Context(), &adminv1.GetNodeRequest{AgentId: "spiffe://example.org/none"})
	wantCode(t, err, codes.NotFound)
}
