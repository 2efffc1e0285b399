package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/rootlink/rootlink/internal/oci"
)

// program builds examples/hello.
func program(t *testing.T) string {
	t.Helper()
	out := filepath.Join(t.TempDir(), "hello")
	cmd := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-o", out, ".")
	cmd.Dir = "../hello"
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOTOOLCHAIN=local", "GOFLAGS=", "GOWORK=off")
	if msg, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, msg)
	}
	return out
}

func TestSameProgramSameImage(t *testing.T) {
	bin, dir := program(t), t.TempDir()
	a, err := build(bin, filepath.Join(dir, "a"))
	if err != nil {
		t.Fatal(err)
	}
	b, err := build(bin, filepath.Join(dir, "b"))
	if err != nil || a != b {
		t.Errorf("%s and %s, %v", a, b, err)
	}
	if _, d, err := oci.Resolve(t.Context(), "oci-layout:"+filepath.Join(dir, "a")); err != nil || d != a.Encoded() {
		t.Errorf("another reader has %q, want %s (%v)", d, a, err)
	}
}

func TestRefusesWhatWouldNotStart(t *testing.T) {
	dir := t.TempDir()
	if _, err := build("main.go", filepath.Join(dir, "a")); err == nil {
		t.Error("a source file became an image")
	}
	if _, err := build("/bin/sh", filepath.Join(dir, "b")); err == nil {
		t.Error("a dynamically linked program became an image")
	}
	if _, err := build(program(t), dir); err == nil {
		t.Error("written into a directory that was there")
	}
}
