package link

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
)

// Predicate types that have a short name here.
const (
	TypeSLSAProvenance = "https://slsa.dev/provenance/v1"
	TypeVSA            = "https://slsa.dev/verification_summary/v1"
	TypeCycloneDX      = "https://cyclonedx.org/bom"
	TypeSPDX           = "https://spdx.dev/Document"
	TypeVulns          = "https://in-toto.io/attestation/vulns/v0.2"
	TypeCosignVuln     = "https://cosign.sigstore.dev/attestation/vuln/v1"
	TypeSARIF          = "https://docs.oasis-open.org/sarif/sarif/v2.1.0"
	TypeSCAI           = "https://in-toto.io/attestation/scai/v0.3"
	TypeTestResult     = "https://in-toto.io/attestation/test-result/v0.1"
)

// predicateAliases are cosign's names where it has them.
var predicateAliases = map[string]string{
	"link":            PredicateType,
	"slsaprovenance1": TypeSLSAProvenance,
	"vsa":             TypeVSA,
	"cyclonedx":       TypeCycloneDX,
	"spdx":            TypeSPDX,
	"vuln":            TypeCosignVuln,
	"vulns":           TypeVulns,
	"sarif":           TypeSARIF,
	"scai":            TypeSCAI,
	"test-result":     TypeTestResult,
}

// PredicateAliases lists the short names that ResolvePredicateType knows.
func PredicateAliases() []string { return slices.Sorted(maps.Keys(predicateAliases)) }

// ResolvePredicateType turns a short name into its predicate type and leaves a
// URI as it is.
func ResolvePredicateType(name string) (string, error) {
	if uri, ok := predicateAliases[name]; ok {
		return uri, nil
	}
	if err := ValidatePredicateType(name); err != nil {
		return "", fmt.Errorf("%q is neither a URI nor one of %s: %w", name, strings.Join(PredicateAliases(), ", "), ErrMalformed)
	}
	return name, nil
}

// PredicateAlias is the short name of a type, or the type.
func PredicateAlias(uri string) string {
	for name, u := range predicateAliases {
		if u == uri {
			return name
		}
	}
	return uri
}

// CheckPredicateForm looks at the few fields without which a predicate is
// certainly not of its type: the wrong file, or an empty one. It is no
// validation against the type's schema, and says nothing of types that have no
// name here.
func CheckPredicateForm(uri string, predicate []byte) error {
	var p map[string]any
	if err := scanJSON(predicate, MaxStatement); err != nil {
		return fmt.Errorf("predicate: %w", err)
	}
	if err := json.Unmarshal(predicate, &p); err != nil {
		return malformed("the predicate is not a JSON object: %w", err)
	}
	want := map[string][]field{
		TypeSLSAProvenance: {{"buildDefinition.buildType", isText}, {"buildDefinition.externalParameters", isObject}, {"runDetails.builder.id", isText}},
		TypeVSA: {
			{"verifier.id", isText},
			{"timeVerified", isText},
			{"resourceUri", isText},
			{"policy", isObject},
			{"verificationResult", oneOf("PASSED", "FAILED")},
			{"verifiedLevels", isList},
		},
		TypeCycloneDX:  {{"bomFormat", oneOf("CycloneDX")}, {"specVersion", isText}},
		TypeVulns:      {{"scanner.uri", isText}, {"scanner.result", isList}},
		TypeCosignVuln: {{"scanner.uri", isText}, {"scanner.result", isThere}, {"metadata", isObject}},
		TypeSARIF:      {{"version", oneOf("2.1.0")}, {"runs", isList}},
		TypeSCAI:       {{"attributes", isFilledList}},
		TypeTestResult: {{"result", oneOf("PASSED", "WARNED", "FAILED")}, {"configuration", isList}},
	}[uri]
	if uri == TypeSPDX {
		// SPDX 2 names its version at the top, SPDX 3 is a graph.
		want = []field{{"spdxVersion", isSPDX2}, {"SPDXID", isText}}
		if _, ok := p["@graph"]; ok {
			want = []field{{"@context", isThere}, {"@graph", isFilledList}}
		}
	}
	for _, f := range want {
		v, _ := lookup(p, f.path)
		if !f.ok(v) {
			return malformed("no good %q, which every %s has", f.path, PredicateAlias(uri))
		}
	}
	return nil
}

// field is one that a predicate must have, by its dotted path.
type field struct {
	path string
	ok   func(any) bool
}

func lookup(p map[string]any, path string) (any, bool) {
	first, rest, more := strings.Cut(path, ".")
	v, ok := p[first]
	if !more || !ok {
		return v, ok
	}
	m, _ := v.(map[string]any)
	return lookup(m, rest)
}

func isText(v any) bool       { s, ok := v.(string); return ok && s != "" }
func isObject(v any) bool     { _, ok := v.(map[string]any); return ok }
func isList(v any) bool       { _, ok := v.([]any); return ok }
func isFilledList(v any) bool { l, ok := v.([]any); return ok && len(l) > 0 }
func isThere(v any) bool      { return v != nil }
func isSPDX2(v any) bool      { s, _ := v.(string); return strings.HasPrefix(s, "SPDX-2.") }

func oneOf(values ...string) func(any) bool {
	return func(v any) bool { s, ok := v.(string); return ok && slices.Contains(values, s) }
}
