package layout

import (
	"bytes"
	"encoding/json"
	"maps"
	"testing"

	"github.com/secure-systems-lab/go-securesystemslib/cjson"
)

var linkBodies = []string{
	`{"_type":"link","name":"build","command":[],"materials":{},"products":{},"byproducts":{},"environment":{}}`,
	` { "products" : { "a\"b\\c" : { "sha512":"ab" , "sha256" : "cd" } , "é\u2028<&>" : { } } , "_type":"link","name":"x","command":["a","\u0000\n"],"materials":{"z":{"sha256":"00"},"a":{"sha256":"11"}},"byproducts":{"return-value":0,"stdout":"\"q\" \\ \u00e9"},"environment":{"n":[1,2],"o":{"b":null,"a":true}}}`,
	`{"_type":"link","name":"build","command":null,"materials":{},"products":{},"byproducts":{},"environment":{}}`,
	`{"_type":"link","name":"build","materials":{"a":null},"products":{},"byproducts":{},"environment":{}}`,
	`{"_type":"link","name":"build","materials":{"a":{"sha256":1}}}`,
	`{"_type":"link","name":"\ud800","command":[],"materials":{"\ud800":{"x":"\\"}},"products":{"a":{}},"byproducts":{},"environment":{}}`,
}

// The fast ways must read and write what encoding/json and cjson do, for every
// signature hangs on it.
func sameAsSlow(t *testing.T, body []byte) {
	var c classicLink
	if decodeStrict(body, MaxClassic, "materials products byproducts environment", &c) != nil {
		return
	}
	var plain struct {
		Materials, Products map[string]map[string]string
	}
	if err := json.Unmarshal(body, &plain); err != nil {
		t.Fatalf("encoding/json refuses %s: %v", body, err)
	}
	equal := func(a artifactSet, b map[string]map[string]string) bool {
		return maps.EqualFunc(a, b, func(x, y map[string]string) bool { return maps.Equal(x, y) })
	}
	if !equal(c.Materials, plain.Materials) || !equal(c.Products, plain.Products) {
		t.Fatalf("%s is read as %v, %v", body, c.Materials, c.Products)
	}
	fast, fastErr := canonicalLink(&c, body)
	var all any
	if err := json.Unmarshal(body, &all); err != nil {
		t.Fatal(err)
	}
	slow, slowErr := cjson.EncodeCanonical(all)
	if !bytes.Equal(fast, slow) || (fastErr == nil) != (slowErr == nil) {
		t.Fatalf("canonical form of %s:\n%s %v\n%s %v", body, fast, fastErr, slow, slowErr)
	}
}

func TestClassicLinksAreReadAsWritten(t *testing.T) {
	for _, body := range linkBodies {
		sameAsSlow(t, []byte(body))
	}
}

func FuzzClassicLink(f *testing.F) {
	for _, body := range linkBodies {
		f.Add([]byte(body))
	}
	f.Fuzz(func(t *testing.T, body []byte) { sameAsSlow(t, body) })
}

func TestRefusesClassicMembersInOtherSpelling(t *testing.T) {
	const body = `{"_type":"link","name":"build","command":[],"Materials":{},"products":{},"byproducts":{},"environment":{}}`
	if _, _, _, err := parseClassic([]byte(`{"signed":` + body + `,"signatures":[{"keyid":"00","sig":"00"}]}`)); err == nil {
		t.Error("accepted")
	}
}
