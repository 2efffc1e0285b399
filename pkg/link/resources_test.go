package link

import (
	"crypto/sha256"
	"errors"
	"reflect"
	"strings"
	"testing"

	"github.com/secure-systems-lab/go-securesystemslib/dsse"
)

// decodeStatement must make of a statement what encoding/json makes of it.
func FuzzDecodeStatementIsEncodingJSONs(f *testing.F) {
	raw, err := testStatement().Marshal()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(raw)
	for _, s := range []string{
		`{}`, `null`, `[]`, `1`, `{"subject":null,"predicate":null}`, `{"subject":[]}`, `{"subject":[null]}`, `{"subject":[{}]}`, `{"subject":{}}`,
		`{"subject":[{"name":"a","digest":{}},{"name":null,"digest":null}]}`, `{"subject":[{"name":"a\u0041\"\\","digest":{"sha256":"\u0061"}}]}`,
		`{"subject":[{"name":"a","digest":{"sha\u0032":"x","b":"y"}}]}`, `{"Subject":[{"name":"a"}],"Predicate":{"MATERIALS":[{"name":"b"}]}}`,
		`{"\u0073ubject":[{"name":"a"}]}`, "{\"\u017fubject\":[{\"name\":\"a\"}]}", `{"subject":[{"Name":"a","name":"b"}]}`, `{"subject":[{"name":1}]}`, `{"subject":[{"digest":{"a":1}}]}`,
		`{"subject":[{"name":"a","uri":"u","annotations":{"k":[1,{"a":"b"}]}}],"predicate":{"name":"n","materials":[{"name":"m","digest":{"a":"b"}}]}}`,
		`{"predicate":{"materials":[{"name":"m"},{"name":"\ud800"}],"name":"n","byproducts":{"subject":[{"name":"x"}],"x":"]}\\\""},"command":["a","]"]},"subject":[ { "digest" : { "a" : "b" } , "name" : "s" } ] }`,
		`{"subject":[1,2],"predicate":[{"materials":[]}],"x":-1.5e3}`, `{"predicate":{"predicate":{"materials":[]}}}`, `{"subject":[[{"name":"a"}]]}`, `{"subject":"[]","predicate":"{"}`,
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var want, got wireStatement
		werr, gerr := decodeStrict(b, MaxStatement, "", &want), decodeStatement(b, &got)
		if (werr == nil) != (gerr == nil) {
			t.Fatalf("%q: encoding/json says %v, we %v", b, werr, gerr)
		}
		if werr == nil && !reflect.DeepEqual(want, got) {
			t.Fatalf("%q:\n%#v\n%#v", b, want, got)
		}
	})
}

// Without a bound a statement of 20 MiB would become a gigabyte of artifacts
// before they are counted.
func TestRefusesMoreArtifactsThanAllowedBeforeDecoding(t *testing.T) {
	for _, list := range []string{`"subject":[%]`, `"Subject":[%]`, `"subjec\u0074":[%]`, `"predicate":{"materials":[%]}`, `"predicate":{"name":"x","Materials":[%]}`} {
		for _, entry := range []string{`{}`, `{"uri":""}`, `null`} {
			doc := "{" + strings.Replace(list, "%", strings.Repeat(entry+",", MaxMaterials)+entry, 1) + "}"
			var w wireStatement
			if err := decodeStatement([]byte(doc), &w); !errors.Is(err, ErrMalformed) || !strings.Contains(err.Error(), "at most") {
				t.Errorf("%s of %s: %v", list, entry, err)
			}
			if w.Subject != nil || w.Predicate.Materials != nil {
				t.Errorf("%s of %s: decoded", list, entry)
			}
		}
	}
}

func TestDuplicateArtifactsAreRefusedInAnyOrder(t *testing.T) {
	d := map[string]string{"sha256": strings.Repeat("ab", 32)}
	for _, names := range []string{"a a b", "a b b", "b a b", "c a b a", "a a"} {
		var rs []Resource
		for _, n := range strings.Fields(names) {
			rs = append(rs, Resource{Name: n, Digest: d})
		}
		if err := validateResources("material", rs); !errors.Is(err, ErrMalformed) || !strings.Contains(err.Error(), "duplicate") {
			t.Errorf("%s: %v", names, err)
		}
	}
	if err := validateResources("material", []Resource{{Name: "b", Digest: d}, {Name: "a", Digest: d}, {Name: "c", Digest: d}}); err != nil {
		t.Error(err)
	}
}

func TestPayloadDigestIsOfTheDSSEEncoding(t *testing.T) {
	for _, p := range []string{"", "{}", strings.Repeat("x", 100_000)} {
		if PayloadDigest([]byte(p)) != sha256.Sum256(dsse.PAE(PayloadType, []byte(p))) {
			t.Errorf("%d bytes", len(p))
		}
	}
}
