package attest

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func hex32(b byte) string {
	return strings.Repeat(string("0123456789abcdef"[b>>4])+string("0123456789abcdef"[b&15]), 32)
}

func testPolicy() *PCRPolicy {
	return &PCRPolicy{Name: "golden", Revision: 2, Profiles: []PCRProfile{
		{Name: "image-1", Banks: map[string]map[string]string{"sha256": {"4": hex32(0x11), "7": hex32(0x12)}}},
		{Name: "image-2", Banks: map[string]map[string]string{"sha256": {"4": hex32(0x21), "7": hex32(0x22)}}},
	}}
}

func bankOf(values map[uint32]byte) []PCRBank {
	b := PCRBank{Bank: "sha256", Values: map[uint32][]byte{}}
	for i, v := range values {
		b.Values[i] = bytes.Repeat([]byte{v}, 32)
	}
	return []PCRBank{b}
}

func TestPCRPolicyMatch(t *testing.T) {
	at := time.Date(2027, 3, 1, 0, 0, 0, 0, time.UTC)
	p := testPolicy()
	for profile, pcrs := range map[string][]PCRBank{
		"image-1": bankOf(map[uint32]byte{4: 0x11, 7: 0x12}),
		"image-2": bankOf(map[uint32]byte{4: 0x21, 7: 0x22, 0: 0xff}),
	} {
		if got, err := p.Match(pcrs, at); err != nil || got != profile {
			t.Errorf("%s: %q, %v", profile, got, err)
		}
	}
}

func TestRefusesMixedPCRProfiles(t *testing.T) {
	at := time.Date(2027, 3, 1, 0, 0, 0, 0, time.UTC)
	p := testPolicy()
	var miss *PolicyMismatch
	if _, err := p.Match(bankOf(map[uint32]byte{4: 0x11, 7: 0x22}), at); !errors.As(err, &miss) {
		t.Fatalf("PCR 4 of one image with PCR 7 of another: %v", err)
	}
	want := []PCRDiff{{Bank: "sha256", Index: 7, Want: bytes.Repeat([]byte{0x12}, 32), Got: bytes.Repeat([]byte{0x22}, 32)}}
	if d := cmp.Diff(want, miss.Diffs); d != "" || miss.Profile != "image-1" {
		t.Errorf("nearest is %s: %s", miss.Profile, d)
	}
	if _, err := p.Match(bankOf(map[uint32]byte{4: 0x21}), at); !errors.As(err, &miss) || miss.Profile != "image-2" || miss.Diffs[0].Got != nil {
		t.Errorf("PCR that was not quoted: %v", err)
	}
	if _, err := p.Match(nil, at); !errors.As(err, &miss) || len(miss.Diffs) != 2 {
		t.Errorf("no PCRs: %v", err)
	}
	wrongBank := bankOf(map[uint32]byte{4: 0x11, 7: 0x12})
	wrongBank[0].Bank = "sha384"
	if _, err := p.Match(wrongBank, at); !errors.As(err, &miss) {
		t.Errorf("values of another bank: %v", err)
	}
}

func TestPCRProfileTimes(t *testing.T) {
	p := testPolicy()
	from, to := time.Date(2027, 1, 1, 0, 0, 0, 0, time.UTC), time.Date(2027, 2, 1, 0, 0, 0, 0, time.UTC)
	p.Profiles[0].NotBefore, p.Profiles[0].NotAfter = from, to
	pcrs := bankOf(map[uint32]byte{4: 0x11, 7: 0x12})
	if _, err := p.Match(pcrs, from); err != nil {
		t.Error(err)
	}
	var miss *PolicyMismatch
	if _, err := p.Match(pcrs, from.Add(-time.Second)); !errors.As(err, &miss) || miss.From != from || len(miss.Diffs) != 0 {
		t.Errorf("too early: %v", err)
	}
	if _, err := p.Match(pcrs, to.Add(time.Second)); !errors.As(err, &miss) || miss.To != to {
		t.Errorf("too late: %v", err)
	}
}

func TestRefusesMalformedPCRPolicy(t *testing.T) {
	set := func(bank, index, value string) func(*PCRPolicy) {
		return func(p *PCRPolicy) { p.Profiles[0].Banks = map[string]map[string]string{bank: {index: value}} }
	}
	for name, bend := range map[string]func(*PCRPolicy){
		"no name":              func(p *PCRPolicy) { p.Name = "" },
		"name with a colon":    func(p *PCRPolicy) { p.Name = "a:b" },
		"name with a newline":  func(p *PCRPolicy) { p.Name = "a\nb" },
		"revision 0":           func(p *PCRPolicy) { p.Revision = 0 },
		"revision over 2^53":   func(p *PCRPolicy) { p.Revision = 1 << 53 },
		"no profiles":          func(p *PCRPolicy) { p.Profiles = nil },
		"two of one name":      func(p *PCRPolicy) { p.Profiles[1].Name = "image-1" },
		"profile sans name":    func(p *PCRPolicy) { p.Profiles[0].Name = "" },
		"empty profile":        func(p *PCRPolicy) { p.Profiles[0].Banks = nil },
		"empty bank":           func(p *PCRPolicy) { p.Profiles[0].Banks["sha256"] = nil },
		"unknown bank":         set("md5", "7", hex32(1)),
		"unknown bank as well": func(p *PCRPolicy) { p.Profiles[0].Banks["md5"] = map[string]string{"7": "00"} },
		"SHA-1 only":           set("sha1", "7", strings.Repeat("00", 20)),
		"resettable PCR 16":    set("sha256", "16", hex32(1)),
		"resettable PCR 23":    set("sha256", "23", hex32(1)),
		"PCR 24":               set("sha256", "24", hex32(1)),
		"PCR 07":               set("sha256", "07", hex32(1)),
		"PCR -1":               set("sha256", "-1", hex32(1)),
		"capitals":             set("sha256", "7", strings.ToUpper(hex32(0xab))),
		"short value":          set("sha256", "7", "00"),
		"not hex":              set("sha256", "7", strings.Repeat("zz", 32)),
		"times exchanged": func(p *PCRPolicy) {
			p.Profiles[0].NotBefore, p.Profiles[0].NotAfter = time.Unix(2, 0), time.Unix(1, 0)
		},
	} {
		p := testPolicy()
		bend(p)
		if err := p.Validate(); !errors.Is(err, ErrPCRPolicy) {
			t.Errorf("%s: Validate says %v", name, err)
		}
		if _, err := p.Match(bankOf(map[uint32]byte{4: 0x11, 7: 0x12}), time.Unix(1, 0)); !errors.Is(err, ErrPCRPolicy) {
			t.Errorf("%s: Match says %v", name, err)
		}
	}
	if err := testPolicy().Validate(); err != nil {
		t.Error(err)
	}
}

func TestPCRPolicyDigest(t *testing.T) {
	p := testPolicy()
	p.Profiles[0].NotAfter = time.Date(2027, 2, 1, 1, 0, 0, 0, time.FixedZone("", 3600))
	canonical := `{"name":"golden","profiles":[` +
		`{"name":"image-1","not_after":"2027-02-01T00:00:00Z","pcrs":{"sha256":{"4":"` + hex32(0x11) + `","7":"` + hex32(0x12) + `"}}},` +
		`{"name":"image-2","pcrs":{"sha256":{"4":"` + hex32(0x21) + `","7":"` + hex32(0x22) + `"}}}],"revision":2}`
	if p.Digest() != sha256.Sum256([]byte(canonical)) {
		t.Error("the digest is not that of the canonical JSON")
	}
	b, err := json.Marshal(p)
	if err != nil {
		t.Fatal(err)
	}
	var back PCRPolicy
	if err := json.Unmarshal(b, &back); err != nil || back.Digest() != p.Digest() {
		t.Errorf("the digest does not survive JSON: %v", err)
	}
	back.Profiles[0].Banks["sha256"]["7"] = hex32(0x13)
	if back.Digest() == p.Digest() {
		t.Error("the digest does not cover the values")
	}
	if ref := p.Ref(); ref.Name != "golden" || ref.Revision != 2 || ref.Digest.check() != nil {
		t.Errorf("Ref %+v", ref)
	}
}

func TestCaptureProfile(t *testing.T) {
	pcrs := bankOf(map[uint32]byte{0: 1, 7: 0x12})
	f, err := NewProfile("host", pcrs, []PCRSelection{{Bank: "sha256", Indices: []uint32{7}}})
	if err != nil {
		t.Fatal(err)
	}
	p := &PCRPolicy{Name: "p", Revision: 1, Profiles: []PCRProfile{*f}}
	if got, err := p.Match(pcrs, time.Unix(1, 0)); err != nil || got != "host" {
		t.Errorf("%q, %v", got, err)
	}
	if d := cmp.Diff([]PCRSelection{{Bank: "sha256", Indices: []uint32{7}}}, p.Required()); d != "" {
		t.Error(d)
	}
	for name, s := range map[string][]PCRSelection{
		"not quoted": {{Bank: "sha256", Indices: []uint32{4}}},
		"other bank": {{Bank: "sha384", Indices: []uint32{7}}},
		"nothing":    nil,
	} {
		if _, err := NewProfile("host", pcrs, s); err == nil {
			t.Errorf("%s: captured", name)
		}
	}
	pcrs = bankOf(map[uint32]byte{16: 1})
	if _, err := NewProfile("host", pcrs, []PCRSelection{{Bank: "sha256", Indices: []uint32{16}}}); !errors.Is(err, ErrPCRPolicy) {
		t.Errorf("captured a resettable PCR: %v", err)
	}
}

func TestParsePCRs(t *testing.T) {
	got, err := ParsePCRs("sha256:0-3,7,7+sha384:11")
	want := []PCRSelection{{"sha256", []uint32{0, 1, 2, 3, 7}}, {"sha384", []uint32{11}}}
	if d := cmp.Diff(want, got); err != nil || d != "" {
		t.Errorf("%v %s", err, d)
	}
	for _, bad := range []string{"", "7", "md5:7", "sha256:", "sha256:24", "sha256:7-3", "sha256:1-", "sha256:-1", "sha256:1+sha256:2", "sha256:1+"} {
		if _, err := ParsePCRs(bad); !errors.Is(err, ErrPCRSelection) {
			t.Errorf("%q: %v", bad, err)
		}
	}
}
