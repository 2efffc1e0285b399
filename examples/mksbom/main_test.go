package main

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// image makes the image of examples/hello with the tool that the demo uses.
func image(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	for _, c := range []struct {
		in   string
		args []string
	}{
		{"../hello", []string{"go", "build", "-trimpath", "-buildvcs=false", "-o", filepath.Join(dir, "hello"), "."}},
		{".", []string{"go", "run", "../mkimage", filepath.Join(dir, "hello"), filepath.Join(dir, "image")}},
	} {
		cmd := exec.Command(c.args[0], c.args[1:]...)
		cmd.Dir = c.in
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOTOOLCHAIN=local", "GOFLAGS=", "GOWORK=off")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%q: %v\n%s", c.args, err, out)
		}
	}
	return filepath.Join(dir, "image")
}

func TestBillOfMaterials(t *testing.T) {
	dir, out := image(t), filepath.Join(t.TempDir(), "sbom.json")
	if err := run(dir, out); err != nil {
		t.Fatal(err)
	}
	first, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	var b bom
	if err := json.Unmarshal(first, &b); err != nil {
		t.Fatal(err)
	}
	found := map[string]bool{}
	for _, c := range b.Components {
		found[c.Name+" "+c.Version] = true
	}
	if b.Format != "CycloneDX" || b.SpecVersion != "1.6" || !found["example.org/greet v1.2.0"] || !found["/hello "] || !found["example.org/hello "] || len(found) != 4 {
		t.Errorf("%s", first)
	}
	refs := map[string]bool{b.Metadata.Component.Ref: true}
	for _, c := range b.Components {
		if refs[c.Ref] {
			t.Errorf("two components are %s", c.Ref)
		}
		refs[c.Ref] = true
	}
	for _, d := range b.Dependencies {
		for _, r := range append(d.DependsOn, d.Ref) {
			if !refs[r] {
				t.Errorf("no component is %s", r)
			}
		}
	}
	if err := run(dir, out); err != nil {
		t.Fatal(err)
	}
	if again, err := os.ReadFile(out); err != nil || !bytes.Equal(first, again) {
		t.Errorf("another document for the same image (%v)", err)
	}
}

func TestRefusesSwappedProgram(t *testing.T) {
	dir := image(t)
	blobs, err := filepath.Glob(filepath.Join(dir, "blobs/sha256/*"))
	if err != nil || len(blobs) != 3 {
		t.Fatal(blobs, err)
	}
	for _, name := range blobs {
		raw, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		raw[len(raw)/2] ^= 1
		if err := os.WriteFile(name, raw, 0o644); err != nil {
			t.Fatal(err)
		}
		if _, err := describe(dir); err == nil {
			t.Errorf("%s was changed, and nobody saw it", name)
		}
		raw[len(raw)/2] ^= 1
		if err := os.WriteFile(name, raw, 0o644); err != nil {
			t.Fatal(err)
		}
	}
}
