package policy

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/rootlink/rootlink/pkg/attest"
)

var now = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

// fill is a PCR value of one repeated byte.
func fill(b byte) []byte { return bytes.Repeat([]byte{b}, 32) }

func banks(values map[uint32]byte) []attest.PCRBank {
	out := attest.PCRBank{Bank: "sha256", Values: map[uint32][]byte{}}
	for i, b := range values {
		out.Values[i] = fill(b)
	}
	return []attest.PCRBank{out}
}

func profile(name string, values map[int]byte) attest.PCRProfile {
	p := attest.PCRProfile{Name: name, Banks: map[string]map[string]string{"sha256": {}}}
	for i, b := range values {
		p.Banks["sha256"][fmt.Sprint(i)] = hex.EncodeToString(fill(b))
	}
	return p
}

func revision(name string, n uint64, profiles ...attest.PCRProfile) Revision {
	p := &attest.PCRPolicy{Name: name, Revision: n, Profiles: profiles}
	return Revision{Policy: p, Digest: p.Digest()}
}

func quote(pcrs []attest.PCRBank) *attest.Quote {
	q := &attest.Quote{DigestAlg: "sha256", ResetCount: 1}
	var digest []byte
	for _, b := range pcrs {
		s := attest.PCRSelection{Bank: b.Bank}
		for i := range uint32(24) {
			if v, ok := b.Values[i]; ok {
				s.Indices = append(s.Indices, i)
				digest = append(digest, v...)
			}
		}
		q.Selection = append(q.Selection, s)
	}
	q.Digest = digest // stands for the hash of it
	return q
}

func judge(j *Judge, pcrs []attest.PCRBank, at time.Time, in ...Revision) *Verdict {
	return j.Node([]byte("ak"), quote(pcrs), pcrs, in, at)
}

func TestMeetsPolicyByOneWholeProfile(t *testing.T) {
	r := revision("fleet", 3, profile("old", map[int]byte{4: 1, 7: 1}), profile("new", map[int]byte{4: 2, 7: 2}))
	v := judge(NewJudge(), banks(map[uint32]byte{4: 2, 7: 2, 8: 9}), now, r)
	m, ok := v.Match("fleet")
	if !ok || m.Profile != "new" || m.Revision != 3 || m.Digest != r.Policy.Digest() {
		t.Errorf("got %+v, %v", m, ok)
	}
	if got := v.Selectors(); !cmp.Equal(got, []string{"pcr_policy:fleet"}) {
		t.Errorf("selectors %v", got)
	}
	if ref := m.Ref(); !cmp.Equal(ref, r.Policy.Ref()) {
		t.Errorf("reference %+v", ref)
	}
}

func TestRefusesMixedProfiles(t *testing.T) {
	r := revision("fleet", 1, profile("a", map[int]byte{4: 1, 7: 1}), profile("b", map[int]byte{4: 2, 7: 2}))
	if v := judge(NewJudge(), banks(map[uint32]byte{4: 1, 7: 2}), now, r); len(v.Matches()) != 0 || len(v.Misses()) != 1 {
		t.Errorf("PCR 4 of one image and PCR 7 of another: %+v", v)
	}
}

func TestRefusesValuesThatWereNotQuoted(t *testing.T) {
	pcrs := banks(map[uint32]byte{4: 1, 7: 1})
	q := quote(banks(map[uint32]byte{4: 1}))
	if v := NewJudge().Node([]byte("ak"), q, pcrs, []Revision{revision("p", 1, profile("a", map[int]byte{7: 1}))}, now); len(v.Matches()) != 0 {
		t.Error("a value beside the quote met a policy")
	}
}

func TestRefusesResettablePCRs(t *testing.T) {
	for _, pcr := range []int{16, 23} {
		r := revision("p", 1, profile("a", map[int]byte{pcr: 1}))
		if v := judge(NewJudge(), banks(map[uint32]byte{uint32(pcr): 1}), now, r); len(v.Matches()) != 0 {
			t.Errorf("PCR %d met a policy", pcr)
		}
		_, _, err := Capture("a", banks(map[uint32]byte{uint32(pcr): 1}), []attest.PCRSelection{{Bank: "sha256", Indices: []uint32{uint32(pcr)}}}, time.Time{}, time.Time{})
		if !errors.Is(err, ErrResettable) {
			t.Errorf("capture of PCR %d: %v", pcr, err)
		}
	}
}

func TestVerdictFollowsEverythingItDependsOn(t *testing.T) {
	good, bad := banks(map[uint32]byte{7: 1}), banks(map[uint32]byte{7: 2})
	r := revision("p", 1, profile("a", map[int]byte{7: 1}))
	j := NewJudge()
	ask := func(ak string, edit func(*attest.Quote), pcrs []attest.PCRBank, r Revision) bool {
		q := quote(good)
		edit(q)
		return len(j.Node([]byte(ak), q, pcrs, []Revision{r}, now).Matches()) == 1
	}
	none := func(*attest.Quote) {}
	if !ask("ak", none, good, r) || !ask("ak", none, bad, r) {
		t.Fatal("the verdict on one digest is not remembered") // the values are those of the digest
	}
	other := revision("p", 2, profile("a", map[int]byte{7: 1}))
	renamed := revision("q", 1, profile("a", map[int]byte{7: 1}))
	for name, fresh := range map[string]bool{
		"another AK":                  ask("other", none, bad, r),
		"after a reset":               ask("ak", func(q *attest.Quote) { q.ResetCount++ }, bad, r),
		"after a restart":             ask("ak", func(q *attest.Quote) { q.RestartCount++ }, bad, r),
		"another digest":              ask("ak", func(q *attest.Quote) { q.Digest = []byte("x") }, bad, r),
		"another digest algorithm":    ask("ak", func(q *attest.Quote) { q.DigestAlg = "sha384" }, bad, r),
		"same digest, more selected":  ask("ak", func(q *attest.Quote) { q.Selection[0].Indices = []uint32{7, 8} }, bad, r),
		"same digest, further bank":   ask("ak", func(q *attest.Quote) { q.Selection = append(q.Selection, attest.PCRSelection{Bank: "sha384"}) }, bad, r),
		"another revision":            ask("ak", none, bad, other),
		"another name":                ask("ak", none, bad, renamed),
		"same revision, other digest": ask("ak", none, bad, Revision{Policy: r.Policy, Digest: [32]byte{1}}),
	} {
		if fresh {
			t.Errorf("%s: answered from before", name)
		}
	}
}

func TestVerdictFollowsTheDatesOfProfiles(t *testing.T) {
	p := profile("a", map[int]byte{7: 1})
	p.NotBefore, p.NotAfter = now, now.Add(time.Hour)
	r := revision("p", 1, p)
	pcrs := banks(map[uint32]byte{7: 1})
	j := NewJudge()
	for range 2 { // the second time around from memory
		for at, want := range map[time.Duration]bool{
			-time.Nanosecond: false, 0: true, time.Minute: true, time.Hour: true, time.Hour + time.Nanosecond: false,
		} {
			if got := len(judge(j, pcrs, now.Add(at), r).Matches()) == 1; got != want {
				t.Errorf("at %v: met %v, want %v", at, got, want)
			}
		}
	}
}

func TestVerdictsDoNotGrowWithoutBound(t *testing.T) {
	j := NewJudge()
	pcrs := banks(map[uint32]byte{7: 1})
	r := []Revision{revision("p", 1, profile("a", map[int]byte{7: 1}))}
	q := quote(pcrs)
	for i := range maxVerdicts + 10 {
		q.Digest = fmt.Append(nil, i)
		j.Node([]byte("ak"), q, pcrs, r, now)
	}
	if n := len(j.verdicts); n > maxVerdicts {
		t.Errorf("%d verdicts", n)
	}
}

func TestRefusesAGrantWithoutEvidence(t *testing.T) {
	for _, v := range []*attest.Verified{nil, {}} {
		if g, err := NewJudge().Grant(v, nil, now); !errors.Is(err, ErrNotVerified) || g != nil {
			t.Errorf("got %v, %v", g, err)
		}
	}
}

func file(t *testing.T, list ...attest.PCRPolicy) []byte {
	t.Helper()
	b, err := json.Marshal(list)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestFileHoldsAllRevisionsAndTheNewestCounts(t *testing.T) {
	a := profile("a", map[int]byte{7: 1})
	list, err := Parse(file(t,
		attest.PCRPolicy{Name: "z", Revision: 1, Profiles: []attest.PCRProfile{a}},
		attest.PCRPolicy{Name: "p", Revision: 2, Profiles: []attest.PCRProfile{a}},
		attest.PCRPolicy{Name: "p", Revision: 1, Profiles: []attest.PCRProfile{a}},
	))
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, r := range Current(list) {
		got = append(got, fmt.Sprintf("%s %d %t", r.Policy.Name, r.Policy.Revision, r.Digest == r.Policy.Digest()))
	}
	if want := []string{"p 2 true", "z 1 true"}; !cmp.Equal(got, want) {
		t.Errorf("in force: %v", got)
	}
}

func TestRefusesBrokenFiles(t *testing.T) {
	a := profile("a", map[int]byte{7: 1})
	good := attest.PCRPolicy{Name: "p", Revision: 1, Profiles: []attest.PCRProfile{a}}
	text := string(file(t, good))
	for name, tt := range map[string]struct {
		text string
		want error
	}{
		"empty":               {"", ErrFile},
		"cut off":             {text[:len(text)-1], ErrFile},
		"data after the list": {text + "[]", ErrFile},
		"unknown key":         {strings.Replace(text, `"name"`, `"nmae"`, 1), ErrFile},
		"key twice":           {strings.Replace(text, `"revision":1`, `"revision":1,"revision":2`, 1), ErrFile},
		"key in two cases":    {strings.Replace(text, `"revision":1`, `"revision":1,"Revision":2`, 1), ErrFile},
		"nested too deep":     {strings.Repeat("[", 1000) + strings.Repeat("]", 1000), ErrFile},
		"too large":           {"[" + strings.Repeat(" ", maxFile) + "]", ErrFile},
		"revision twice":      {string(file(t, good, good)), ErrDuplicate},
		"bad name":            {strings.Replace(text, `"p"`, `"a b"`, 1), attest.ErrPCRPolicy},
		"no profile":          {`[{"name":"p","revision":1,"profiles":[]}]`, attest.ErrPCRPolicy},
		"SHA-1 only":          {`[{"name":"p","revision":1,"profiles":[{"name":"a","pcrs":{"sha1":{"7":"` + strings.Repeat("00", 20) + `"}}}]}]`, attest.ErrPCRPolicy},
	} {
		t.Run(name, func(t *testing.T) {
			if list, err := Parse([]byte(tt.text)); !errors.Is(err, tt.want) {
				t.Errorf("got %v, %v", list, err)
			}
		})
	}
}

func FuzzParse(f *testing.F) {
	b, err := json.Marshal([]attest.PCRPolicy{{Name: "p", Revision: 1, Profiles: []attest.PCRProfile{profile("a", map[int]byte{7: 1})}}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		list, err := Parse(b)
		if err != nil {
			return
		}
		again, err := json.Marshal(list)
		if err != nil {
			t.Fatal(err)
		}
		back, err := Parse(again)
		if err != nil {
			t.Fatalf("wrote what it does not read: %v", err)
		}
		for i := range list {
			if list[i].Digest() != back[i].Digest() {
				t.Error("a policy changed on its way through the file")
			}
		}
	})
}

func TestCaptureTakesPCR7AndWarnsOfOthers(t *testing.T) {
	values := banks(map[uint32]byte{1: 1, 5: 5, 6: 6, 7: 7, 9: 0})
	p, notes, err := Capture("node-1", values, nil, time.Time{}, time.Time{})
	if err != nil {
		t.Fatal(err)
	}
	if !cmp.Equal(p, profile("node-1", map[int]byte{7: 7})) || len(notes) != 0 {
		t.Errorf("default capture: %+v, %q", p, notes)
	}
	p, notes, err = Capture("node-1", values, []attest.PCRSelection{{Bank: "sha256", Indices: []uint32{1, 5, 6, 9}}}, now, now.Add(time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	if !p.NotBefore.Equal(now) || !p.NotAfter.Equal(now.Add(time.Hour)) {
		t.Errorf("dates %v, %v", p.NotBefore, p.NotAfter)
	}
	for _, want := range []string{"PCR 1 ", "PCR 5 ", "PCR 6 ", "differs on every machine", "PCR sha256:9 holds its reset value"} {
		if !strings.Contains(strings.Join(notes, "\n"), want) {
			t.Errorf("no note on %q: %q", want, notes)
		}
	}
	if _, _, err := Capture("n", values, []attest.PCRSelection{{Bank: "sha256", Indices: []uint32{8}}}, time.Time{}, time.Time{}); !errors.Is(err, ErrNotQuoted) {
		t.Errorf("captured a PCR that was not quoted: %v", err)
	}
}

func TestAddsProfilesButNotTwice(t *testing.T) {
	a, b := profile("a", map[int]byte{7: 1}), profile("b", map[int]byte{7: 2})
	one, err := AddProfile(nil, a)
	if err != nil || len(one) != 1 {
		t.Fatalf("got %v, %v", one, err)
	}
	current := &attest.PCRPolicy{Name: "p", Revision: 1, Profiles: one}
	if two, err := AddProfile(current, b); err != nil || len(two) != 2 || len(current.Profiles) != 1 {
		t.Errorf("got %v, %v", two, err)
	}
	sameValues := profile("c", map[int]byte{7: 1})
	for _, p := range []attest.PCRProfile{a, sameValues} {
		if _, err := AddProfile(current, p); !errors.Is(err, ErrSameProfile) {
			t.Errorf("profile %q: %v", p.Name, err)
		}
	}
}

func TestDiffShowsEveryProfile(t *testing.T) {
	p := revision("p", 1, profile("a", map[int]byte{4: 1, 7: 1}), profile("b", map[int]byte{7: 2})).Policy
	name, matches, _, err := Diff(p, banks(map[uint32]byte{4: 1, 7: 2}), now)
	if err != nil || !matches || name != "b" {
		t.Errorf("got %q, %v, %v", name, matches, err)
	}
	_, matches, diff, err := Diff(p, banks(map[uint32]byte{7: 3}), now)
	want := []Difference{
		{"a", "sha256", 4, fill(1), nil}, {"a", "sha256", 7, fill(1), fill(3)}, {"b", "sha256", 7, fill(2), fill(3)},
	}
	if err != nil || matches || !cmp.Equal(diff, want) {
		t.Errorf("got %v, %v, %v", matches, diff, err)
	}
}
