package admin

import (
	"bytes"
	"crypto/ed25519"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"strings"
	"testing"
	"time"

	trustrootv1 "github.com/sigstore/protobuf-specs/gen/pb-go/trustroot/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/rootlink/rootlink/internal/forge"
	"github.com/rootlink/rootlink/internal/server"
	"github.com/rootlink/rootlink/internal/trustdoc"
	"github.com/rootlink/rootlink/internal/tsa"
	"github.com/rootlink/rootlink/pkg/attest"
	"github.com/rootlink/rootlink/pkg/envelope"
	"github.com/rootlink/rootlink/pkg/link"
	"github.com/rootlink/rootlink/pkg/svid"
	"github.com/rootlink/rootlink/pkg/timestamp"
	"github.com/rootlink/rootlink/pkg/tlog"
	adminv1 "github.com/rootlink/rootlink/proto/rootlink/admin/v1"
)

func (f *fixture) export(t *testing.T, req *adminv1.ExportTrustRequest) (*link.Trust, *adminv1.ExportTrustResponse) {
	t.Helper()
	r, err := f.ExportTrust(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	trust, err := link.OpenUnpinnedTrust(r.Document)
	if err != nil {
		t.Fatalf("the verifier does not read it: %v\n%s", err, r.Document)
	}
	return trust, r
}

// TestExportRevokesANodeBannedAfterItsEviction: and its other links stay good.
func TestExportRevokesANodeBannedAfterItsEviction(t *testing.T) {
	f := newFixture(t)
	gone := f.node(t, 0xa0)
	f.clock = epoch.Add(time.Hour)
	if err := f.st.DeleteAgent(t.Context(), gone); err != nil {
		t.Fatal(err)
	}
	if err := f.st.BanAgent(t.Context(), gone); err != nil {
		t.Fatal(err)
	}
	f.entry(t, "spiffe://example.org/b", gone, sels("binary", toolA, recorder)...)
	trust, _ := f.export(t, &adminv1.ExportTrustRequest{})
	r := trust.File().Revocations
	if len(r) != 1 || r[0].Kind != link.RevokedEK || r[0].ID != hexOf(0xa0) || r[0].From == nil || !r[0].From.Equal(f.clock) {
		t.Errorf("%+v", r)
	}
}

func TestExportTrust(t *testing.T) {
	f := newFixture(t)
	good, bad := f.node(t, 0xa0), f.node(t, 0xb0)
	ctx := t.Context()
	if _, err := f.CapturePCRPolicy(ctx, &adminv1.CapturePCRPolicyRequest{AgentId: good, Name: "lab"}); err != nil {
		t.Fatal(err)
	}
	f.entry(t, "spiffe://example.org/node/lab", "spiffe://example.org/spire/server", sels("tpmnode", "pcr_policy:lab")...)
	f.entry(t, "spiffe://example.org/b", "spiffe://example.org/node/lab", sels("binary", toolA, recorder)...)
	trust, r := f.export(t, &adminv1.ExportTrustRequest{})
	file := trust.File()
	if trust.Serial() != 1 || r.Serial != 1 || !trust.Issued().Equal(epoch) || !trust.Expires().Equal(epoch.Add(trustdoc.DefaultLifetime)) {
		t.Errorf("serial %d, %s to %s", trust.Serial(), trust.Issued(), trust.Expires())
	}
	if len(file.EK.Inventory) != 2 || file.EK.Inventory[hexOf(0xa0)] != good {
		t.Errorf("inventory %v", file.EK.Inventory)
	}
	if len(file.Requirements) != 1 || len(file.PCRPolicies) != 1 || len(file.Revocations) != 0 {
		t.Errorf("%+v", file)
	}

	// A banned node is revoked from the ban on, and stays in the inventory for
	// what it signed before.
	f.clock = epoch.Add(time.Hour)
	if err := f.st.BanAgent(ctx, bad); err != nil {
		t.Fatal(err)
	}
	f.clock = epoch.Add(2 * time.Hour)
	if _, err := f.DeletePCRPolicy(ctx, &adminv1.DeletePCRPolicyRequest{Name: "lab"}); err != nil {
		t.Fatal(err)
	}
	trust, _ = f.export(t, &adminv1.ExportTrustRequest{LifetimeSeconds: 60})
	file = trust.File()
	if len(file.Revocations) != 1 || file.Revocations[0].ID != hexOf(0xb0) || !file.Revocations[0].From.Equal(epoch.Add(time.Hour)) || file.Revocations[0].Always {
		t.Errorf("revocations %+v", file.Revocations)
	}
	if len(file.EK.Inventory) != 2 {
		t.Errorf("inventory %v", file.EK.Inventory)
	}
	// A deleted policy is gone for issuance, not for judging what it let through.
	if len(file.PCRPolicies) != 1 || len(file.Requirements) != 1 || file.Requirements[0].PCRPolicies[0] != "lab" {
		t.Errorf("policies %+v, requirements %+v", file.PCRPolicies, file.Requirements)
	}
	if at := file.PCRPolicies[0].Replaced; !at.Equal(epoch.Add(2 * time.Hour)) {
		t.Errorf("the deleted policy ended at %s", at)
	}
	if !trust.Expires().Equal(f.clock.Add(time.Minute)) {
		t.Errorf("expires %s", trust.Expires())
	}

	// An evicted node's earlier links are as good as they were.
	if err := f.st.DeleteAgent(ctx, good); err != nil {
		t.Fatal(err)
	}
	trust, _ = f.export(t, &adminv1.ExportTrustRequest{})
	if trust.File().EK.Inventory[hexOf(0xa0)] != good {
		t.Errorf("inventory %v after the eviction", trust.File().EK.Inventory)
	}

	trust, _ = f.export(t, &adminv1.ExportTrustRequest{AnyNode: true})
	if trust.File().EK.Inventory != nil {
		t.Error("an inventory although any node was asked for")
	}
}

// A revision ends when it is deleted or the next one takes its place; the
// current one has no end.
func TestExportSaysWhenARevisionEnded(t *testing.T) {
	f := newFixture(t)
	ctx := t.Context()
	one, two := f.node(t, 0xa0), f.node(t, 0xb0)
	capture := func(after time.Duration, req *adminv1.CapturePCRPolicyRequest) {
		t.Helper()
		f.clock = epoch.Add(after)
		if _, err := f.CapturePCRPolicy(ctx, req); err != nil {
			t.Fatal(err)
		}
	}
	capture(0, &adminv1.CapturePCRPolicyRequest{AgentId: one, Name: "lab"})
	capture(0, &adminv1.CapturePCRPolicyRequest{AgentId: one, Name: "other"})
	capture(time.Hour, &adminv1.CapturePCRPolicyRequest{AgentId: two, Name: "lab", AddProfile: true})
	f.clock = epoch.Add(2 * time.Hour)
	if _, err := f.DeletePCRPolicy(ctx, &adminv1.DeletePCRPolicyRequest{Name: "lab"}); err != nil {
		t.Fatal(err)
	}
	capture(3*time.Hour, &adminv1.CapturePCRPolicyRequest{AgentId: two, Name: "lab"})
	trust, _ := f.export(t, &adminv1.ExportTrustRequest{})
	got := map[string]time.Duration{}
	for _, p := range trust.File().PCRPolicies {
		if !p.Replaced.IsZero() {
			got[fmt.Sprintf("%s %d", p.Name, p.Revision)] = p.Replaced.Sub(epoch)
		}
	}
	if want := map[string]time.Duration{"lab 1": time.Hour, "lab 2": 2 * time.Hour}; !maps.Equal(got, want) {
		t.Errorf("ended %v, want %v", got, want)
	}
}

func TestExportIsAChain(t *testing.T) {
	f := newFixture(t)
	one, r := f.export(t, &adminv1.ExportTrustRequest{})
	id, err := envelope.Fingerprint(f.key.Public())
	if err != nil || r.SignedBy != id || one.CheckSigner([]string{id}) != nil {
		t.Errorf("signed by %q, %v", r.SignedBy, err)
	}
	if one.File().Previous != "" {
		t.Errorf("the first follows %q", one.File().Previous)
	}
	f.open(t)
	two, _ := f.export(t, &adminv1.ExportTrustRequest{})
	if two.File().Previous != one.Digest() || two.CheckHistory(1, one.Digest()) != nil {
		t.Errorf("the second follows %q, not %q", two.File().Previous, one.Digest())
	}
}

// The private half of the trust key may be kept where no network reaches.
func TestTrustKeyKeptElsewhere(t *testing.T) {
	f := newFixture(t)
	f.keyElsewhere = true
	if _, err := f.Service.JoinLine(t.Context(), nil); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("a join line that nobody could answer: %v", err)
	}
	if _, err := f.ExportTrust(t.Context(), &adminv1.ExportTrustRequest{}); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("signed without a key: %v", err)
	}
	r, err := f.ExportTrust(t.Context(), &adminv1.ExportTrustRequest{Unsigned: true})
	if err != nil || r.SignedBy != "" {
		t.Fatal(err)
	}
	if _, err := link.OpenUnpinnedTrust(r.Document); !errors.Is(err, link.ErrUnsigned) {
		t.Errorf("%v", err)
	}
	signed, err := link.SignTrust(r.Document, f.key)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := link.OpenUnpinnedTrust(signed); err != nil {
		t.Error(err)
	}
	k, err := f.Service.TrustKey(t.Context(), &adminv1.TrustKeyRequest{})
	if err != nil || k.Here || len(k.SpkiDer) == 0 {
		t.Errorf("%v %v", k, err)
	}
}

func TestTrustSerialSurvivesARestart(t *testing.T) {
	f := newFixture(t)
	for want := uint64(1); want <= 3; want++ {
		if trust, _ := f.export(t, &adminv1.ExportTrustRequest{}); trust.Serial() != want {
			t.Errorf("serial %d, want %d", trust.Serial(), want)
		}
		f.open(t)
	}
	// The Sigstore part has no serial and spends none.
	if _, err := f.ExportTrust(t.Context(), &adminv1.ExportTrustRequest{Format: "sigstore"}); err != nil {
		t.Fatal(err)
	}
	if trust, _ := f.export(t, &adminv1.ExportTrustRequest{}); trust.Serial() != 4 {
		t.Errorf("serial %d", trust.Serial())
	}
}

func TestAuthorityWindows(t *testing.T) {
	f := newFixture(t)
	retired := server.AuthorityInfo{
		Certificate: testCA(t, "old"), State: svid.Retired,
		PreparedAt: epoch.Add(-3 * time.Hour), ActivatedAt: epoch.Add(-2 * time.Hour), RetiredAt: epoch.Add(-time.Minute),
	}
	next := server.AuthorityInfo{Certificate: testCA(t, "next"), State: svid.Prepared, PreparedAt: epoch}
	f.authorities = append([]server.AuthorityInfo{retired}, append(f.authorities, next)...)
	trust, _ := f.export(t, &adminv1.ExportTrustRequest{})
	as := trust.Authorities()
	if len(as) != 3 {
		t.Fatalf("%d authorities", len(as))
	}
	// The first SVID that it signed begins a little before it did.
	if !as[0].Start.Equal(retired.ActivatedAt.Add(-svid.Backdate)) {
		t.Errorf("a retired authority counts from %s", as[0].Start)
	}
	// The last step SVID that it signed must still be able to sign its step.
	if end := as[0].End; end.Before(retired.RetiredAt.Add(server.MaxIssuerTTL)) || end.After(retired.RetiredAt.Add(server.MaxIssuerTTL+2*time.Second)) {
		t.Errorf("a retired authority counts until %s", end)
	}
	if !as[1].End.IsZero() {
		t.Errorf("the active authority ends at %s", as[1].End)
	}
	if !as[2].Start.Equal(epoch.Add(-svid.Backdate)) || !as[2].End.IsZero() {
		t.Errorf("the next authority counts from %s to %s", as[2].Start, as[2].End)
	}
}

// What a revoked authority signed after it was distrusted counts with nobody,
// and what it signed before does.
func TestRevokedAuthority(t *testing.T) {
	f := newFixture(t)
	old := server.AuthorityInfo{
		Certificate: testCA(t, "old"), State: svid.Retired,
		PreparedAt: epoch.Add(-3 * time.Hour), ActivatedAt: epoch.Add(-2 * time.Hour), RetiredAt: epoch.Add(-time.Minute),
		TaintedAt: epoch.Add(-30 * time.Second),
	}
	active := f.authorities[0]
	f.authorities = []server.AuthorityInfo{old, active}
	if trust, _ := f.export(t, &adminv1.ExportTrustRequest{}); len(trust.File().Revocations) != 0 || !trust.Authorities()[0].End.After(epoch) {
		t.Fatal("tainted is not revoked: there may still be links on their way")
	}
	old.RevokedAt = epoch
	f.authorities = []server.AuthorityInfo{old, active}
	trust, _ := f.export(t, &adminv1.ExportTrustRequest{})
	revoked := trust.File().Revocations
	h := sha256.Sum256(old.Certificate.RawSubjectPublicKeyInfo)
	if len(revoked) != 1 || revoked[0].Kind != link.RevokedAuthority || revoked[0].ID != hex.EncodeToString(h[:]) ||
		!revoked[0].From.Equal(old.TaintedAt) || revoked[0].Always {
		t.Fatalf("%+v", revoked)
	}
	if as := trust.Authorities(); len(as) != 2 || !as[0].End.Equal(old.TaintedAt) {
		t.Fatalf("it counts until %s", as[0].End)
	}
}

// What the server's timestamp authority and log say must count with every
// verifier that the export reaches, Sigstore's among them, which read no v0.2.
func TestExportNamesTimestampAuthorityAndLog(t *testing.T) {
	f := newFixture(t)
	a, err := tsa.Open(tsa.Config{Dir: t.TempDir(), Name: "example.org", Now: func() time.Time { return f.clock }})
	if err != nil {
		t.Fatal(err)
	}
	f.timestamps = a.Authorities()
	for i := range f.timestamps {
		f.timestamps[i].Operator = "example.org"
	}
	pub, _, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	f.logs = []tlog.Log{{Origin: "log.example.org", Key: pub, ID: tlog.LogID("log.example.org", pub), Operator: "example.org"}}
	trust, _ := f.export(t, &adminv1.ExportTrustRequest{})
	root, err := link.ParseTrustedRoot(trust.File().TrustedRoot)
	if err != nil {
		t.Fatal(err)
	}
	if len(root.Timestamps) != len(f.timestamps) || !root.Timestamps[0].Chain[0].Equal(f.timestamps[0].Chain[0]) {
		t.Errorf("%d timestamp authorities", len(root.Timestamps))
	}
	if len(root.Logs) != 1 || root.Logs[0].Origin != "log.example.org" {
		t.Errorf("%d logs", len(root.Logs))
	}
	r, err := f.ExportTrust(t.Context(), &adminv1.ExportTrustRequest{Format: "sigstore"})
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(r.Document), "trustedroot+json;version=0.1") {
		t.Errorf("%.200s", r.Document)
	}
}

func TestExportExtras(t *testing.T) {
	f := newFixture(t)
	spki := testCA(t, "layout").RawSubjectPublicKeyInfo
	revocations := func(td string) []byte {
		b, err := link.RevocationsFile{TrustDomain: td, Issued: epoch, Revocations: []link.Revocation{
			{Kind: link.RevokedExecutable, ID: hexOf(9), Always: true},
		}}.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	trust, _ := f.export(t, &adminv1.ExportTrustRequest{
		LayoutKeys:      []*adminv1.LayoutKey{{Name: "alice", SpkiDer: spki}},
		RevocationsJson: revocations("example.org"),
	})
	file := trust.File()
	if len(file.LayoutKeys) != 1 || file.LayoutKeys[0].Name != "alice" {
		t.Errorf("layout keys %+v", file.LayoutKeys)
	}
	if len(file.Revocations) != 1 || file.Revocations[0].Kind != link.RevokedExecutable {
		t.Errorf("revocations %+v", file.Revocations)
	}
	for name, req := range map[string]*adminv1.ExportTrustRequest{
		"format":                   {Format: "yaml"},
		"negative lifetime":        {LifetimeSeconds: -1},
		"lifetime of a century":    {LifetimeSeconds: 100 * 365 * 24 * 3600},
		"lifetime that overflows":  {LifetimeSeconds: 1 << 62},
		"layout key":               {LayoutKeys: []*adminv1.LayoutKey{{Name: "x", SpkiDer: []byte("x")}}},
		"foreign revocations":      {RevocationsJson: revocations("other.org")},
		"revocations, unknown key": {RevocationsJson: []byte(strings.Replace(string(revocations("example.org")), `"always"`, `"allways"`, 1))},
		"revocations, no format":   {RevocationsJson: []byte(`{}`)},
	} {
		_, err := f.ExportTrust(t.Context(), req)
		if err == nil {
			t.Errorf("%s: exported", name)
			continue
		}
		wantCode(t, err, codes.InvalidArgument)
	}
}

func TestExportWithoutEKTrustIsRefused(t *testing.T) {
	f := newFixture(t)
	f.roots = attest.EKRoots{}
	_, err := f.ExportTrust(t.Context(), &adminv1.ExportTrustRequest{})
	wantCode(t, err, codes.FailedPrecondition)
}

func TestSigstorePart(t *testing.T) {
	f := newFixture(t)
	r, err := f.ExportTrust(t.Context(), &adminv1.ExportTrustRequest{Format: "sigstore"})
	if err != nil {
		t.Fatal(err)
	}
	var root struct {
		MediaType              string `json:"mediaType"`
		CertificateAuthorities []struct {
			CertChain struct {
				Certificates []struct {
					RawBytes []byte `json:"rawBytes"`
				} `json:"certificates"`
			} `json:"certChain"`
		} `json:"certificateAuthorities"`
	}
	if err := json.Unmarshal(r.Document, &root); err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(root.MediaType, "application/vnd.dev.sigstore.trustedroot") || len(root.CertificateAuthorities) != 1 {
		t.Fatalf("%+v", root)
	}
	c, err := x509.ParseCertificate(root.CertificateAuthorities[0].CertChain.Certificates[0].RawBytes)
	if err != nil || !c.Equal(f.authorities[0].Certificate) {
		t.Error(c, err)
	}
}

// Verifiers have the time from whom the server says, and Sigstore's from the
// same.
func TestExportNamesTimestampAuthorities(t *testing.T) {
	f := newFixture(t)
	a := forge.NewTSA(t, nil).Authority()
	a.Operator, a.URI = "example.org", "http://127.0.0.1:1/tsa"
	f.timestamps = []timestamp.Authority{a}
	trust, _ := f.export(t, &adminv1.ExportTrustRequest{})
	got := trust.TrustedRoot().Timestamps
	if len(got) != 1 || !got[0].Chain[0].Equal(a.Chain[0]) || !got[0].Chain[1].Equal(a.Chain[1]) ||
		!got[0].Start.Equal(a.Start) || !got[0].End.Equal(a.End) || got[0].URI != a.URI || got[0].Operator != a.Operator {
		t.Errorf("%+v", got)
	}
	r, err := f.ExportTrust(t.Context(), &adminv1.ExportTrustRequest{Format: "sigstore"})
	if err != nil {
		t.Fatal(err)
	}
	var root trustrootv1.TrustedRoot
	if err := protojson.Unmarshal(r.Document, &root); err != nil {
		t.Fatal(err)
	}
	tsas := root.GetTimestampAuthorities()
	if len(tsas) != 1 || len(tsas[0].GetCertChain().GetCertificates()) != 2 ||
		!bytes.Equal(tsas[0].GetCertChain().GetCertificates()[0].GetRawBytes(), a.Chain[0].Raw) {
		t.Errorf("Sigstore's tools are told %v", tsas)
	}
}
