package layout

import (
	"bytes"
	"crypto"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"testing"

	"github.com/in-toto/in-toto-golang/in_toto"

	"github.com/rootlink/rootlink/internal/forge"
	"github.com/rootlink/rootlink/pkg/envelope"
	"github.com/rootlink/rootlink/pkg/link"
)

func TestLayoutsReadBackAsTheyWereWritten(t *testing.T) {
	s := newScene(t)
	s.layout.Readme = "Who makes hello.\nAnd how \"so\"."
	for _, form := range []string{"", FormDSSE, FormMetablock} {
		raw, err := s.layout.Marshal()
		if form != "" {
			raw, err = Sign(s.layout, form, s.keys...)
		}
		if err != nil {
			t.Fatal(err)
		}
		f, err := ParseFile(raw)
		if err != nil {
			t.Fatalf("%q: %v", form, err)
		}
		want := *s.layout
		want.Keys = map[string]in_toto.Key{}
		want.Steps = append([]Step(nil), want.Steps...)
		got := f.UnverifiedLayout()
		for i := range want.Steps {
			want.Steps[i].Demands.Step = want.Steps[i].Name
			want.Steps[i].PubKeys = []string{}
			want.Steps[i].Command = orEmpty(want.Steps[i].Command)
		}
		if !reflect.DeepEqual(got, &want) {
			t.Errorf("%q:\n%+v\nwant\n%+v", form, got, &want)
		}
		if f.Form() != form || !IsFile(raw) {
			t.Errorf("form %q", f.Form())
		}
	}
}

// document is the bare layout as a map, for a test to spoil.
func document(t *testing.T) (map[string]any, func() error) {
	t.Helper()
	raw, err := newScene(t).layout.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	var doc map[string]any
	if err := json.Unmarshal(raw, &doc); err != nil {
		t.Fatal(err)
	}
	return doc, func() error {
		raw, err := json.Marshal(doc)
		if err != nil {
			t.Fatal(err)
		}
		_, err = ParseFile(raw)
		return err
	}
}

func TestRefusesMalformedLayouts(t *testing.T) {
	step := func(doc map[string]any) map[string]any { return doc["steps"].([]any)[1].(map[string]any) }
	ext := func(doc map[string]any, old, new string) {
		r := doc["readme"].(string)
		if !strings.Contains(r, old) {
			t.Fatalf("no %q in %s", old, r)
		}
		doc["readme"] = strings.Replace(r, old, new, 1)
	}
	for name, spoil := range map[string]func(map[string]any){
		"unknown key":           func(d map[string]any) { d["more"] = 1 },
		"unknown key of a step": func(d map[string]any) { step(d)["more"] = 1 },
		"no steps field":        func(d map[string]any) { delete(d, "steps") },
		"null steps":            func(d map[string]any) { d["steps"] = nil },
		"no threshold":          func(d map[string]any) { delete(step(d), "threshold") },
		"threshold 0":           func(d map[string]any) { step(d)["threshold"] = 0 },
		"threshold -1":          func(d map[string]any) { step(d)["threshold"] = -1 },
		"threshold too high":    func(d map[string]any) { step(d)["threshold"] = 1000 },
		"no materials":          func(d map[string]any) { delete(step(d), "expected_materials") },
		"another type":          func(d map[string]any) { d["_type"] = "link" },
		"another type of step":  func(d map[string]any) { step(d)["_type"] = "inspection" },
		"bad date":              func(d map[string]any) { d["expires"] = "soon" },
		"no extension":          func(d map[string]any) { d["readme"] = "hello" },
		"two extensions":        func(d map[string]any) { d["readme"] = d["readme"].(string) + "\n" + d["readme"].(string) },
		"text behind it":        func(d map[string]any) { d["readme"] = d["readme"].(string) + "\nmore" },
		"text before it":        func(d map[string]any) { d["readme"] = "x " + d["readme"].(string) },
		"unknown demand":        func(d map[string]any) { ext(d, `"distinct_hosts":true`, `"distinct_host":true`) },
		"demand twice": func(d map[string]any) {
			ext(d, `"distinct_hosts":true`, `"distinct_hosts":true,"distinct_hosts":false`)
		},
		"demand in another case":  func(d map[string]any) { ext(d, `"distinct_hosts":true`, `"Distinct_Hosts":true`) },
		"demands of another step": func(d map[string]any) { ext(d, `"step":"build"`, `"step":"fetch"`) },
		"demands on fewer steps":  func(d map[string]any) { d["steps"] = d["steps"].([]any)[:1] },
		"serial 0":                func(d map[string]any) { ext(d, `"serial":7`, `"serial":0`) },
		"bad name":                func(d map[string]any) { ext(d, `"name":"hello"`, `"name":"../x"`) },
		"unknown tier":            func(d map[string]any) { ext(d, `"tier":"boot_attested"`, `"tier":"golden"`) },
		"bad pattern":             func(d map[string]any) { ext(d, "build/*", "../build") },
		"constraint that differs": func(d map[string]any) {
			c := d["steps"].([]any)[0].(map[string]any)["cert_constraints"].([]any)[0].(map[string]any)
			c["uris"] = []any{"spiffe://example.org/anybody"}
		},
		"constraint for a pattern": func(d map[string]any) {
			step(d)["cert_constraints"] = d["steps"].([]any)[0].(map[string]any)["cert_constraints"]
		},
		"two steps of a name": func(d map[string]any) {
			step(d)["name"] = "fetch"
			ext(d, `"step":"build"`, `"step":"fetch"`)
		},
		"unknown public key": func(d map[string]any) { step(d)["pubkeys"] = []any{"00"} },
		"issued after its end": func(d map[string]any) {
			d["expires"] = "2020-01-01T00:00:00Z"
		},
		"lives for ever": func(d map[string]any) { d["expires"] = "2999-01-01T00:00:00Z" },
	} {
		t.Run(name, func(t *testing.T) {
			doc, parse := document(t)
			if err := parse(); err != nil {
				t.Fatal(err)
			}
			spoil(doc)
			if err := parse(); !errors.Is(err, link.ErrMalformed) {
				t.Errorf("%v", err)
			}
		})
	}
}

func TestRefusesRulesThatTheEngineWouldMisread(t *testing.T) {
	for name, r := range map[string][]string{
		"empty":              {},
		"one word":           {"DISALLOW"},
		"unknown verb":       {"FORBID", "*"},
		"empty pattern":      {"DISALLOW", ""},
		"open class":         {"DISALLOW", "[a"},
		"empty class":        {"DISALLOW", "[]"},
		"empty negation":     {"DISALLOW", "[!]"},
		"half a range":       {"DISALLOW", "[a-]"},
		"ends in backslash":  {"DISALLOW", `a\`},
		"class cleaned away": {"DISALLOW", "a/[/../]"},
		"unclean":            {"DISALLOW", "./x"},
		"of nothing":         rule("MATCH * WITH RESULTS FROM build"),
		"prefix goes up":     rule("MATCH * IN ../x WITH PRODUCTS FROM build"),
		"prefix is absolute": rule("MATCH * WITH PRODUCTS IN /etc FROM build"),
		"long pattern":       {"DISALLOW", strings.Repeat("x", MaxPattern+1)},
	} {
		if err := checkRule(r); !errors.Is(err, link.ErrMalformed) && !errors.Is(err, ErrEscape) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, r := range []string{"ALLOW *", "CREATE src/[a-z]*", `DISALLOW a\*b`, "ALLOW [!a]?", "REQUIRE x", "MATCH * IN a WITH MATERIALS IN b FROM c", `ALLOW [\]]`} {
		if err := checkRule(rule(r)); err != nil {
			t.Errorf("%s: %v", r, err)
		}
	}
}

func TestRefusesContradictingDemands(t *testing.T) {
	key, err := NewKey(forge.P256(t).Public())
	if err != nil {
		t.Fatal(err)
	}
	for name, spoil := range map[string]func(*Step){
		"pinned keys for nothing":     func(s *Step) { s.PubKeys = []string{key.KeyID} },
		"pinned keys and a TPM":       func(s *Step) { s.PubKeys, s.KeyPinned = []string{key.KeyID}, true },
		"sublayout and a tier":        func(s *Step) { s.Sublayout, s.Identities = "x", nil },
		"sublayout and identities":    func(s *Step) { s.Demands = Demands{Sublayout: "x", Identities: s.Identities} },
		"sublayout with threshold 2":  func(s *Step) { s.Demands = Demands{Sublayout: "x"} },
		"empty list of tools":         func(s *Step) { s.Tools = []string{} },
		"upper-case hash":             func(s *Step) { s.Tools = []string{strings.ToUpper(sum("x"))} },
		"key twice":                   func(s *Step) { s.Demands = Demands{KeyPinned: true}; s.PubKeys = []string{key.KeyID, key.KeyID} },
		"evidence that is not judged": func(s *Step) { s.Evidence = "hearsay" },
	} {
		s := newScene(t)
		s.layout.Keys = map[string]in_toto.Key{key.KeyID: key}
		spoil(s.build())
		if err := s.layout.Validate(); !errors.Is(err, link.ErrMalformed) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestRefusesKeysThatAreNotWhatTheirIDSays(t *testing.T) {
	key, err := NewKey(forge.P256(t).Public())
	if err != nil {
		t.Fatal(err)
	}
	other, err := NewKey(forge.P256(t).Public())
	if err != nil {
		t.Fatal(err)
	}
	for name, k := range map[string]in_toto.Key{
		"another ID":      {KeyID: other.KeyID, KeyIDHashAlgorithms: key.KeyIDHashAlgorithms, KeyType: key.KeyType, Scheme: key.Scheme, KeyVal: key.KeyVal},
		"another scheme":  {KeyID: key.KeyID, KeyIDHashAlgorithms: key.KeyIDHashAlgorithms, KeyType: key.KeyType, Scheme: "ed25519", KeyVal: key.KeyVal},
		"RSA":             {KeyID: key.KeyID, KeyType: "rsa", Scheme: "rsassa-pss-sha256", KeyVal: key.KeyVal},
		"a private half":  {KeyID: key.KeyID, KeyIDHashAlgorithms: key.KeyIDHashAlgorithms, KeyType: key.KeyType, Scheme: key.Scheme, KeyVal: in_toto.KeyVal{Public: key.KeyVal.Public, Private: "x"}},
		"the same, twice": {KeyID: key.KeyID, KeyIDHashAlgorithms: key.KeyIDHashAlgorithms, KeyType: key.KeyType, Scheme: key.Scheme, KeyVal: in_toto.KeyVal{Public: key.KeyVal.Public + "\n"}},
	} {
		if err := checkKey(k.KeyID, k); !errors.Is(err, link.ErrMalformed) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := checkKey(key.KeyID, key); err != nil {
		t.Error(err)
	}
}

func TestRefusesEnvelopesThatTwoReadersReadDifferently(t *testing.T) {
	s := newScene(t)
	raw := mustSign(t, s)
	many := `"signatures": [` + strings.Repeat(`{"keyid":"","sig":"AA=="},`, 10_000) + `{"keyid":"","sig":"AA=="}]`
	for name, spoilt := range map[string][]byte{
		"two payload types": bytes.Replace(raw, []byte(`"payloadType"`), []byte(`"payloadType": "text/plain", "payloadType"`), 1),
		"another type":      bytes.Replace(raw, []byte(in_toto.PayloadType), []byte("text/plain"), 1),
		"10,000 signatures": bytes.Replace(raw, []byte(`"signatures": [`), []byte(many+`, "other": [`), 1),
		"unknown key":       bytes.Replace(raw, []byte(`"payloadType"`), []byte(`"more": 1, "payloadType"`), 1),
		"trailing data":     append(bytes.Clone(raw), "{}"...),
		"empty":             nil,
		"too large":         bytes.Repeat([]byte(" "), 2*MaxFile),
	} {
		if _, err := ParseFile(spoilt); !errors.Is(err, link.ErrMalformed) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// A signature of another payload type over the same bytes.
	var e wireEnvelope
	if err := json.Unmarshal(raw, &e); err != nil {
		t.Fatal(err)
	}
	payload, err := base64.StdEncoding.DecodeString(e.Payload)
	if err != nil {
		t.Fatal(err)
	}
	sig, err := envelope.SignMessage(s.keys[0], payload) // without DSSE's encoding
	if err != nil {
		t.Fatal(err)
	}
	e.Signatures[0].Sig = base64.StdEncoding.EncodeToString(sig)
	if s.in.Layout.Raw, err = json.Marshal(e); err != nil {
		t.Fatal(err)
	}
	s.refuses(t, "layout.signature", ErrForeign, link.ErrCrypto)
}

// sublayouts: step build is done by a layout of its own.
func subScene(t *testing.T) (*scene, crypto.Signer) {
	s := newScene(t)
	owner := forge.P256(t)
	key, err := NewKey(owner.Public())
	if err != nil {
		t.Fatal(err)
	}
	s.layout.Keys = map[string]in_toto.Key{key.KeyID: key}
	sub := &Layout{Name: "sub", Serial: 1, Issued: s.layout.Issued, Expires: s.layout.Expires}
	build := *s.build()
	build.Name, build.Standalone = "compile", true
	build.Materials = rules("ALLOW src/*", "DISALLOW *")
	sub.Steps = []Step{build}
	for _, m := range s.links[1:] {
		m.stmt.Step = "compile"
	}
	*s.build() = Step{
		Name: "build", Threshold: 1, PubKeys: []string{key.KeyID}, Demands: Demands{Sublayout: "sub"},
		Materials: build.Materials, Products: build.Products,
	}
	s.build().Materials = rules("MATCH src/* WITH PRODUCTS FROM fetch", "DISALLOW *")
	raw, err := Sign(sub, FormDSSE, owner)
	if err != nil {
		t.Fatal(err)
	}
	s.in.Sublayouts = []NamedFile{{"sub.layout", raw}}
	return s, owner
}

func TestSublayoutsStandForSteps(t *testing.T) {
	s, _ := subScene(t)
	res := s.accepts(t)
	if len(res.Layouts) != 2 || len(res.Steps) != 3 || res.Artifacts[0].Step != "compile" {
		t.Errorf("%+v %+v", res.Layouts, res.Steps)
	}
	for _, st := range res.Steps {
		if st.Verdict != link.VerdictVerified {
			t.Errorf("%+v", st)
		}
	}
}

func TestRefusesSublayouts(t *testing.T) {
	for name, c := range map[string]struct {
		spoil func(*testing.T, *scene, crypto.Signer)
		check string
		want  error
		class error
	}{
		"missing":  {func(t *testing.T, s *scene, _ crypto.Signer) { s.in.Sublayouts = nil }, "layout.sublayout", link.ErrPolicy, link.ErrPolicy},
		"unsigned": {func(t *testing.T, s *scene, _ crypto.Signer) { bend(t, s, nil, func(*Layout) {}) }, "layout.signature", ErrUnsigned, link.ErrCrypto},
		"foreign":  {func(t *testing.T, s *scene, _ crypto.Signer) { bend(t, s, forge.P256(t), func(*Layout) {}) }, "layout.signature", ErrForeign, link.ErrCrypto},
		"by ours":  {func(t *testing.T, s *scene, _ crypto.Signer) { bend(t, s, s.keys[0], func(*Layout) {}) }, "layout.signature", ErrForeign, link.ErrCrypto},
		"another":  {func(t *testing.T, s *scene, k crypto.Signer) { bend(t, s, k, func(l *Layout) { l.Name = "other" }) }, "layout.sublayout", link.ErrPolicy, link.ErrPolicy},
		"expired":  {func(t *testing.T, s *scene, k crypto.Signer) { bend(t, s, k, func(l *Layout) { l.Expires = s.at }) }, "layout.window", ErrExpired, link.ErrPolicy},
		"no steps": {func(t *testing.T, s *scene, k crypto.Signer) { bend(t, s, k, func(l *Layout) { l.Steps = nil }) }, "layout.demands", ErrEmpty, link.ErrPolicy},
		"threshold": {func(t *testing.T, s *scene, k crypto.Signer) {
			bend(t, s, k, func(l *Layout) { l.Steps[0].Threshold = 3 })
		}, "step.threshold", ErrThreshold, link.ErrPolicy},
		"same step": {func(t *testing.T, s *scene, k crypto.Signer) {
			bend(t, s, k, func(l *Layout) { l.Steps[0].Name = "fetch" })
		}, "layout.sublayout", link.ErrPolicy, link.ErrPolicy},
		"rolled back": {func(t *testing.T, s *scene, k crypto.Signer) { s.in.Seen = map[string]Seen{"sub": {Serial: 2}} }, "layout.serial", ErrRolledBack, link.ErrPolicy},
		"unasked": {func(t *testing.T, s *scene, k crypto.Signer) {
			raw := mustSign(t, s)
			s.in.Sublayouts = append(s.in.Sublayouts, NamedFile{"more", raw})
		}, "layout.steps", link.ErrPolicy, link.ErrPolicy},
		"for two steps": {func(t *testing.T, s *scene, _ crypto.Signer) {
			again := *s.build()
			again.Name = "again"
			s.layout.Steps = append(s.layout.Steps, again)
		}, "layout.sublayout", link.ErrPolicy, link.ErrPolicy},
		"inspections": {func(t *testing.T, s *scene, k crypto.Signer) {
			bend(t, s, k, func(l *Layout) { l.Inspections = []Inspection{{Name: "i", Run: []string{"true"}}} })
		}, "layout.sublayout", link.ErrPolicy, link.ErrPolicy},
		"changed source": {func(t *testing.T, s *scene, k crypto.Signer) {
			for _, m := range s.links[1:] {
				m.stmt.Materials = resources(map[string]string{"src/main.go": "trojan"})
			}
		}, "step.rules", ErrRule, link.ErrPolicy},
	} {
		t.Run(name, func(t *testing.T) {
			s, owner := subScene(t)
			c.spoil(t, s, owner)
			s.refuses(t, c.check, c.want, c.class)
		})
	}
}

func TestRefusesSublayoutsWithoutEnd(t *testing.T) {
	s := newScene(t)
	owner := forge.P256(t)
	key, err := NewKey(owner.Public())
	if err != nil {
		t.Fatal(err)
	}
	step := func(i int) Step {
		return Step{
			Name: fmt.Sprintf("s%d", i), Threshold: 1, PubKeys: []string{key.KeyID}, Demands: Demands{Sublayout: fmt.Sprintf("l%d", i)},
			Materials: rules("ALLOW *"), Products: rules("ALLOW *"),
		}
	}
	keys := map[string]in_toto.Key{key.KeyID: key}
	for i := range MaxDepth + 2 {
		sub := &Layout{Name: fmt.Sprintf("l%d", i), Serial: 1, Issued: s.layout.Issued, Expires: s.layout.Expires, Keys: keys, Steps: []Step{step(i + 1)}}
		raw, err := Sign(sub, FormDSSE, owner)
		if err != nil {
			t.Fatal(err)
		}
		s.in.Sublayouts = append(s.in.Sublayouts, NamedFile{sub.Name, raw})
	}
	s.layout.Keys, s.layout.Steps = keys, []Step{step(0)}
	if f := s.refuses(t, "layout.sublayout", link.ErrPolicy, link.ErrPolicy, "deeper than"); f.Step != fmt.Sprintf("s%d", MaxDepth) {
		t.Errorf("%+v", f)
	}
}

// bend changes the sublayout and signs it with key, or not.
func bend(t *testing.T, s *scene, key crypto.Signer, change func(*Layout)) {
	t.Helper()
	f, err := ParseFile(s.in.Sublayouts[0].Raw)
	if err != nil {
		t.Fatal(err)
	}
	l := f.UnverifiedLayout()
	change(l)
	if key == nil {
		s.in.Sublayouts[0].Raw, err = l.Marshal()
	} else {
		s.in.Sublayouts[0].Raw, err = Sign(l, FormDSSE, key)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func FuzzParseFile(f *testing.F) {
	s := newScene(f)
	for _, form := range []string{FormDSSE, FormMetablock} {
		raw, err := Sign(s.layout, form, s.keys...)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(raw)
	}
	bare, err := s.layout.Marshal()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(bare)
	f.Fuzz(func(t *testing.T, raw []byte) {
		file, err := ParseFile(raw)
		if err != nil {
			if !errors.Is(err, link.ErrMalformed) && !errors.Is(err, ErrEscape) {
				t.Fatalf("%v is of no class", err)
			}
			return
		}
		l := file.UnverifiedLayout()
		out, err := l.Marshal()
		if err != nil {
			t.Fatalf("read and not written: %v", err)
		}
		again, err := ParseFile(out)
		if err != nil || !reflect.DeepEqual(again.UnverifiedLayout(), l) {
			t.Fatalf("another after a round: %v", err)
		}
		_ = l.Lint()
		_ = l.Text()
	})
}

func FuzzParseClassic(f *testing.F) {
	f.Add([]byte(`{"signed":{"_type":"link","name":"a","materials":{},"products":{"x":{"sha256":"` + sum("x") + `"}},"byproducts":{"return-value":0},"command":[],"environment":{}},"signatures":[{"keyid":"","sig":"00"}]}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		c, message, sigs, err := parseClassic(raw)
		if err != nil {
			if !errors.Is(err, link.ErrMalformed) {
				t.Fatalf("%v is of no class", err)
			}
			return
		}
		if len(message) == 0 || len(sigs) == 0 {
			t.Fatal("nothing signed")
		}
		_, _ = classicArtifacts(c.Products)
	})
}

// Whatever the rule, what checkRule accepts the engine must apply without a
// panic, and its matcher must be able to read.
func FuzzRules(f *testing.F) {
	for _, r := range []string{"ALLOW *", "MATCH a[b-c]* IN x WITH PRODUCTS IN y FROM s", `DISALLOW [!\]]`} {
		f.Add(r)
	}
	l := &stepLink{step: "s", materials: hashes(map[string]string{"a/b": sum("1"), "]": sum("2")}), products: hashes(map[string]string{"a/b": sum("3")})}
	f.Fuzz(func(t *testing.T, text string) {
		r := strings.Fields(text)
		if checkRule(r) != nil {
			return
		}
		links := map[string]in_toto.Metadata{"s": &in_toto.Metablock{Signed: l.metadata()}}
		_ = engine("s", links, side{"materials", [][]string{r, {"ALLOW", "*"}}})
		_ = overlap("s", side{"products", [][]string{r}}, l, map[string]*stepLink{"s": l})
	})
}

func TestRefusesClassicLinksOfFailedOrEscapingSteps(t *testing.T) {
	for _, c := range map[string]struct {
		exit    int
		product string
		want    error
	}{
		"all is well": {0, "hello", nil},
		"failed":      {1, "hello", link.ErrCrypto},
		"escapes":     {0, "../hello", ErrEscape},
	} {
		s := newScene(t)
		k := forge.P256(t)
		key, err := NewKey(k.Public())
		if err != nil {
			t.Fatal(err)
		}
		b := s.build()
		*b = Step{Name: "build", Threshold: 1, PubKeys: []string{key.KeyID}, Demands: Demands{KeyPinned: true}, Materials: b.Materials, Products: rules("ALLOW *")}
		s.layout.Keys = map[string]in_toto.Key{key.KeyID: key}
		sl := &stepLink{step: "build", products: hashes(map[string]string{c.product: sum("the program")})}
		if sl.materials, err = artifactsOf(s.links[1].stmt.Materials); err != nil {
			t.Fatal(err)
		}
		mb, err := signMetablock(sl.classicForm(c.exit), []crypto.Signer{k})
		if err != nil {
			t.Fatal(err)
		}
		raw, err := json.Marshal(mb)
		if err != nil {
			t.Fatal(err)
		}
		s.links, s.in.Classic = s.links[:1], []NamedFile{{"build.link", raw}}
		if c.want == nil {
			s.accepts(t)
			continue
		}
		s.refuses(t, "link.classic", c.want, link.ErrCrypto, "build.link")
	}
}

// Two artifacts with one MD5 are made in seconds: a MATCH of them proves nothing.
func TestRefusesClassicArtifactsWithWeakDigestsOnly(t *testing.T) {
	md5, sha1, sha256 := strings.Repeat("0a", 16), strings.Repeat("0a", 20), strings.Repeat("0a", 32)
	for _, weak := range []map[string]string{{"md5": md5}, {"sha1": sha1}, {"md5": md5, "sha1": sha1}, {"unheard-of": sha256}} {
		if _, err := classicArtifacts(map[string]map[string]string{"hello": weak}); err == nil {
			t.Errorf("%v is taken", weak)
		}
		weak["sha256"] = sha256
		if _, err := classicArtifacts(map[string]map[string]string{"hello": weak}); err != nil {
			t.Errorf("%v: %v", weak, err)
		}
	}
}
