package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"testing"
	"time"

	vulnsv02 "github.com/in-toto/attestation/go/predicates/vulns/v02"
	"google.golang.org/protobuf/encoding/protojson"
)

func clock() time.Time { return time.Date(2030, 1, 2, 3, 4, 5, 0, time.UTC) }

func sbom(t *testing.T, version string) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "sbom.json")
	text := `{"bomFormat":"CycloneDX","components":[{"name":"example.org/greet","version":"` + version + `","purl":"pkg:golang/example.org/greet@` + version + `"}]}`
	if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	return name
}

func TestScan(t *testing.T) {
	for version, want := range map[string]int{"v1.2.0": 0, "v1.1.9": 1, "v1.0.0": 1, "v0.9.0": 0, "v1.2.0-rc.1": 1, "v2.0.0": 0, "": 1} {
		out := filepath.Join(t.TempDir(), "scan.json")
		found, err := scan(sbom(t, version), "../advisories", out, clock)
		if err != nil || len(found) != want {
			t.Errorf("%s: %d findings, want %d (%v)", version, len(found), want, err)
		}
		raw, err := os.ReadFile(out)
		if err != nil {
			t.Fatal(err)
		}
		// The peer that defines the predicate reads it.
		var p vulnsv02.Vulns
		if err := protojson.Unmarshal(raw, &p); err != nil || len(p.GetScanner().GetResult()) != want || p.GetScanner().GetDb().GetLastUpdate().AsTime().Year() != 2026 {
			t.Errorf("%v\n%s", err, raw)
		}
	}
}

// A scan that could not be done must not look like one that found nothing.
func TestRefusesScanOfNothing(t *testing.T) {
	empty := t.TempDir()
	broken := t.TempDir()
	for name, text := range map[string]string{"empty.json": `{}`, "range.json": `{"id":"A","affected":[{"package":{"ecosystem":"Go","name":"x"},"ranges":[{"type":"GIT"}]}]}`} {
		dir := filepath.Join(broken, name)
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		if _, err := scan(sbom(t, "v1.2.0"), dir, filepath.Join(empty, "out"), clock); err == nil {
			t.Errorf("%s: scanned", text)
		}
	}
	if _, err := scan(sbom(t, "v1.2.0"), empty, filepath.Join(empty, "out"), clock); err == nil {
		t.Error("scanned against no advisories")
	}
	none := filepath.Join(empty, "sbom.json")
	if err := os.WriteFile(none, []byte(`{"bomFormat":"CycloneDX","components":[]}`), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := scan(none, "../advisories", filepath.Join(empty, "out"), clock); err == nil {
		t.Error("scanned an empty bill of materials")
	}
	if _, err := os.Stat(filepath.Join(empty, "out")); err == nil {
		t.Error("a predicate was written")
	}
}

func TestRanges(t *testing.T) {
	var events []event
	if err := json.Unmarshal([]byte(`[{"introduced":"0"},{"fixed":"1.0.0"},{"introduced":"2.0.0"},{"last_affected":"2.1.0"}]`), &events); err != nil {
		t.Fatal(err)
	}
	for v, want := range map[string]bool{"v0.0.1": true, "v1.0.0": false, "v1.9.0": false, "v2.0.0": true, "v2.1.0": true, "v2.1.1": false, "v0.0.0-20200101000000-abcdefabcdef": true} {
		if inRange(events, v) != want {
			t.Errorf("%s: %v", v, !want)
		}
	}
}
