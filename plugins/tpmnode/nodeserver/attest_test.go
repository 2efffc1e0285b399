package nodeserver

import (
	"context"
	"crypto"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-eventlog/register"
	"github.com/google/go-eventlog/tcg"
	eventlogs "github.com/google/go-eventlog/testdata"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	"github.com/rootlink/rootlink/internal/forge"
	"github.com/rootlink/rootlink/internal/policy"
	"github.com/rootlink/rootlink/pkg/attest"
	"github.com/rootlink/rootlink/plugins/tpmnode/wire"
	tpmv1 "github.com/rootlink/rootlink/proto/rootlink/tpm/v1"
)

func marshal(t *testing.T, m proto.Message) []byte {
	t.Helper()
	b, err := proto.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestAttestsANode(t *testing.T) {
	h := newHost(t, `pcr_selectors = "sha256:7"`, nil)
	a := newAgent(t, h)
	a.key = &[32]byte{42}
	r := mustAttest(t, h, a)

	if want := wire.AgentID(trustDomain, a.tpm.EKHash); r.attributes.SpiffeId != want || !r.attributes.CanReattest {
		t.Errorf("attributes %v, want ID %s", r.attributes, want)
	}
	root := sha256.Sum256(h.maker.Root.Raw)
	want := []string{
		"ek:" + hex.EncodeToString(a.tpm.EKHash[:]), "ek_basis:maker", "ek_root:" + hex.EncodeToString(root[:]),
		"pcr:sha256:7:" + hex.EncodeToString(a.tpm.PCRs[0].Values[7]),
	}
	if !cmp.Equal(r.attributes.SelectorValues, want) {
		t.Errorf("selectors:\n%s", cmp.Diff(want, r.attributes.SelectorValues))
	}

	s, err := attest.ParseAKCertificate(r.akCert)
	if err != nil {
		t.Fatal(err)
	}
	if s.EKHash != a.tpm.EKHash || string(s.AKName) != string(a.tpm.AKName) || s.EKBasis != attest.BasisMaker || s.Firmware != "1.2.3.4" {
		t.Errorf("AK certificate says %+v", s)
	}
	if s.Boot == nil || s.Boot.Reset != a.tpm.ResetCount || s.Boot.Restart != a.tpm.RestartCount {
		t.Errorf("AK certificate says boot %+v", s.Boot)
	}
	if err := r.akCert.CheckSignatureFrom(h.plugin.AttestationCA().Certificate()); err != nil {
		t.Error(err)
	}
	if len(r.caChain) != 1 {
		t.Errorf("chain of %d", len(r.caChain))
	}

	got := h.attested[0]
	if got.AgentKey != *a.key || !got.KeyBound || got.Quote.ResetCount != a.tpm.ResetCount || got.AKCert == nil ||
		got.AgentID != r.attributes.SpiffeId || len(got.PCRs) != 1 || len(got.PCRs[0].Values) != 16 {
		t.Errorf("observed %+v", got)
	}
	if h.alarmKinds() != "" {
		t.Errorf("alarms %s", h.alarmKinds())
	}
}

func TestAttestsAgainWithAnotherQuote(t *testing.T) {
	h := newHost(t, "", nil)
	a := newAgent(t, h)
	first := mustAttest(t, h, a)
	h.advance(30 * time.Minute)
	a.tpm.Reboot(false)
	second := mustAttest(t, h, a)
	if first.attributes.SpiffeId != second.attributes.SpiffeId {
		t.Error("a reboot changed the agent ID")
	}
	if first.akCert.SerialNumber.Cmp(second.akCert.SerialNumber) == 0 || !second.akCert.NotAfter.After(first.akCert.NotAfter) {
		t.Error("the AK certificate was not renewed")
	}
	if h.attested[0].Nonce == h.attested[1].Nonce {
		t.Error("a nonce was used twice")
	}
	if h.alarmKinds() != "" {
		t.Errorf("alarms %s", h.alarmKinds())
	}
}

func TestAttestsEveryKindOfKey(t *testing.T) {
	h := newHost(t, "", nil)
	for _, kind := range []string{forge.EKP256, forge.EKRSA2048, forge.EKP384, forge.EKRSA3072} {
		t.Run(kind, func(t *testing.T) {
			mustAttest(t, h, &agent{tpm: forge.NewTPM(t, h.maker, forge.TPMOptions{EK: kind})})
		})
	}
	t.Run("RSA AK", func(t *testing.T) {
		mustAttest(t, h, &agent{tpm: forge.NewTPM(t, h.maker, forge.TPMOptions{RSAAK: true})})
	})
}

func TestAttestsAnAllowListedEK(t *testing.T) {
	h := newHost(t, `pcr_selectors = "none"`, nil)
	a := newAgent(t, h)
	a.request = func(r *tpmv1.AttestRequest) { r.EkChain = nil }
	mustRefuse(t, h, a, codes.PermissionDenied, "ek_untrusted")
	// The list is read at each attestation: no restart.
	h.write(t, "allow", "# the node in the cellar\n"+strings.ToUpper(hex.EncodeToString(a.tpm.EKHash[:]))+"  # fine\n")
	r := mustAttest(t, h, a)
	if want := []string{"ek:" + hex.EncodeToString(a.tpm.EKHash[:]), "ek_basis:allow_list"}; !cmp.Equal(r.attributes.SelectorValues, want) {
		t.Errorf("selectors %v", r.attributes.SelectorValues)
	}
}

func policyFile(t *testing.T, list ...attest.PCRPolicy) string {
	t.Helper()
	b, err := json.Marshal(list)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func values(tpm *forge.TPM, pcrs ...uint32) map[string]map[string]string {
	m := map[string]string{}
	for _, n := range pcrs {
		m[fmt.Sprint(n)] = hex.EncodeToString(tpm.PCRs[0].Values[n])
	}
	return map[string]map[string]string{"sha256": m}
}

func TestPolicySelectorComesAndGoesWithTheBootState(t *testing.T) {
	h := newHost(t, "", nil)
	a := newAgent(t, h)
	// PCR 17 is not among the default PCRs: the policy makes it quoted.
	h.write(t, "policies.json", policyFile(t, attest.PCRPolicy{
		Name: "fleet", Revision: 1,
		Profiles: []attest.PCRProfile{{Name: "image-1", Banks: values(a.tpm, 7, 17)}},
	}))
	if err := h.loaded.Configure(t.Context(), h.hcl(fmt.Sprintf("pcr_policies = %q", h.path("policies.json")))); err != nil {
		t.Fatal(err)
	}
	if r := mustAttest(t, h, a); !slices.Contains(r.attributes.SelectorValues, "pcr_policy:fleet") {
		t.Errorf("selectors %v", r.attributes.SelectorValues)
	}
	if m := h.attested[0].Matches; len(m) != 1 || m[0].Profile != "image-1" {
		t.Errorf("observed %+v", m)
	}
	// Out of policy it is still this node, without the selector: a refusal
	// would leave the old selectors standing on a stock SPIRE.
	h.advance(time.Hour)
	a.tpm.Extend(7, []byte("evil"))
	r := mustAttest(t, h, a)
	if slices.Contains(r.attributes.SelectorValues, "pcr_policy:fleet") {
		t.Error("the selector outlived the boot state")
	}
	if !strings.Contains(h.logged(), "PCR policy not met") {
		t.Error("the log does not say why")
	}
}

func TestRefusesMixedProfiles(t *testing.T) {
	h := newHost(t, "", nil)
	a, b := newAgent(t, h), newAgent(t, h)
	b.tpm.Extend(4, []byte("other image"))
	b.tpm.Extend(7, []byte("other image"))
	h.write(t, "policies.json", policyFile(t, attest.PCRPolicy{Name: "fleet", Revision: 1, Profiles: []attest.PCRProfile{
		{Name: "a", Banks: values(a.tpm, 4, 7)}, {Name: "b", Banks: values(b.tpm, 4, 7)},
	}}))
	if err := h.loaded.Configure(t.Context(), h.hcl(fmt.Sprintf("pcr_policies = %q", h.path("policies.json")))); err != nil {
		t.Fatal(err)
	}
	for _, whole := range []*agent{a, b} {
		if r := mustAttest(t, h, whole); !slices.Contains(r.attributes.SelectorValues, "pcr_policy:fleet") {
			t.Fatalf("selectors %v", r.attributes.SelectorValues)
		}
	}
	a.tpm.PCRs[0].Values[4] = b.tpm.PCRs[0].Values[4]
	h.advance(time.Hour)
	if r := mustAttest(t, h, a); slices.Contains(r.attributes.SelectorValues, "pcr_policy:fleet") {
		t.Error("PCR 4 of one image and PCR 7 of another met the policy")
	}
}

// realLog puts a TPM into the boot state of a machine whose log is public.
func realLog(t *testing.T, tpm *forge.TPM) []byte {
	t.Helper()
	log := eventlogs.Ubuntu2404AmdSevSnpEventLog
	parsed, err := tcg.ParseEventLog(log, tcg.ParseOpts{})
	if err != nil {
		t.Fatal(err)
	}
	for i := range uint32(24) {
		tpm.PCRs[0].Values[i] = make([]byte, 32)
	}
	for _, e := range parsed.Events(register.HashSHA256) {
		sum := crypto.SHA256.New()
		sum.Write(tpm.PCRs[0].Values[uint32(e.MRIndex())])
		sum.Write(e.ReplayedDigest())
		tpm.PCRs[0].Values[uint32(e.MRIndex())] = sum.Sum(nil)
	}
	return log
}

func TestEventLogProvesSecureBoot(t *testing.T) {
	h := newHost(t, "want_ima_log = true", nil)
	a := newAgent(t, h)
	a.eventLog = realLog(t, a.tpm)
	a.imaLog = make([]byte, 3*attest.LogChunk+17)
	r := mustAttest(t, h, a)
	if got := h.attested[0]; !got.Replayed || string(got.EventLog) != string(a.eventLog) ||
		!cmp.Equal(got.EventLogDigest, attest.EventLogDigest(a.eventLog)) {
		t.Errorf("event log: replayed %t, %d bytes\n%s", got.Replayed, len(got.EventLog), h.logged())
	}
	if got, want := h.attested[0].IMALogDigest, sha256.Sum256(a.imaLog); got == nil || string(got.Value) != string(want[:]) {
		t.Errorf("IMA log digest %v", got)
	}
	if s := h.attested[0].SecureBoot; s == nil || !slices.Contains(r.attributes.SelectorValues, fmt.Sprintf("secure_boot:%t", *s)) {
		t.Errorf("Secure Boot %v, selectors %v", s, r.attributes.SelectorValues)
	}
	if n := h.plugin.logs.Load(); n != 0 {
		t.Errorf("%d bytes of logs are still counted", n)
	}
}

func TestEventLogThatDoesNotReplayProvesNothing(t *testing.T) {
	h := newHost(t, "", nil)
	a := newAgent(t, h)
	a.eventLog = realLog(t, a.tpm)
	a.tpm.Extend(7, []byte("after boot"))
	r := mustAttest(t, h, a)
	for _, s := range r.attributes.SelectorValues {
		if strings.HasPrefix(s, "secure_boot:") {
			t.Errorf("selector %s", s)
		}
	}
	if h.attested[0].Replayed {
		t.Error("counted as replayed")
	}

	strict := newHost(t, "require_event_log = true", nil)
	a.tpm = forge.NewTPM(t, strict.maker, forge.TPMOptions{})
	a.eventLog = realLog(t, a.tpm)
	mustAttest(t, strict, a)
	a.tpm.Extend(7, []byte("after boot"))
	mustRefuse(t, strict, a, codes.PermissionDenied, "event_log")
	a.eventLog = nil
	mustRefuse(t, strict, a, codes.PermissionDenied, "event_log")
}

func TestDependenciesThatFailRefuseForNow(t *testing.T) {
	boom := errors.New("disk on fire")
	for name, tt := range map[string]struct {
		edit   func(*Options)
		reason string
	}{
		"ban list": {func(o *Options) { o.Banned = func(context.Context, string) (bool, error) { return false, boom } }, "ban_check"},
		"policies": {func(o *Options) {
			o.Policies = func(context.Context) ([]policy.Revision, error) { return nil, boom }
		}, "policies"},
		"pins": {func(o *Options) { o.Pins = brokenPins{boom} }, "pins"},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t, "", tt.edit)
			mustRefuse(t, h, newAgent(t, h), codes.Unavailable, tt.reason)
		})
	}
	t.Run("observer", func(t *testing.T) {
		h := newHost(t, "", func(o *Options) { o.OnAttested = func(context.Context, *Attested) error { return boom } })
		r, err := newAgent(t, h).do(t, h)
		if err == nil || r.attributes != nil {
			t.Error("told the agent before it was recorded")
		}
	})
}

type brokenPins struct{ err error }

func (b brokenPins) PinAK(context.Context, [32]byte, []byte, bool) ([]byte, error) {
	return nil, b.err
}

func (b brokenPins) PinTPM(context.Context, []byte, [32]byte) ([32]byte, error) {
	return [32]byte{}, b.err
}
