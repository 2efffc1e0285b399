package verifycmd

import (
	"bytes"
	"os"
	"strings"
	"testing"

	"github.com/rootlink/rootlink/pkg/archive"
	"github.com/rootlink/rootlink/pkg/envelope"
	"github.com/rootlink/rootlink/pkg/link"
)

// forged writes an archive as anybody can who has genuine files: it asks what he
// likes.
func (d *desk) forged(t *testing.T, q archive.Question, more ...archive.File) {
	t.Helper()
	b := archive.NewBuilder(d.now, "example.org", q)
	read := func(name string) []byte {
		raw, err := os.ReadFile(d.path(name))
		if err != nil {
			t.Fatal(err)
		}
		return raw
	}
	bundle := read("build" + link.BundleSuffix)
	for _, f := range []struct {
		role, name string
		content    []byte
	}{{archive.RoleTrust, "trust.json", read("trust.json")}, {archive.RoleBundle, "build" + link.BundleSuffix, bundle}} {
		if err := b.Add(f.role, f.name, f.content); err != nil {
			t.Fatal(err)
		}
	}
	for _, f := range more {
		if err := b.Add(f.Role, f.Path, []byte("{}")); err != nil {
			t.Fatal(err)
		}
	}
	a, err := b.Close()
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if _, err := a.WriteTo(&out); err != nil {
		t.Fatal(err)
	}
	d.write(t, "a.archive", out.Bytes())
}

// Nobody signs what an archive asks. A developer's tool that signs a binary, put
// into an archive that asks for anybody, must not pass for the release's build.
func TestRefusesArchiveThatAsksForAnotherSigner(t *testing.T) {
	d := newDesk(t)
	pin, err := envelope.Fingerprint(d.key.Public())
	if err != nil {
		t.Fatal(err)
	}
	d.forged(t, archive.Question{Identity: "spiffe://example.org/**"})
	code, out, stderr := d.run(t, "verify", "--trust-state", d.path("state"), "--archive", "a.archive", "--trust-key", pin, "hello")
	if code != 0 || !strings.Contains(stderr, "the archive itself says that spiffe://example.org/** was to sign") {
		t.Errorf("exit %d: whoever reads the verdict is not told who asked: %s%s", code, out, stderr)
	}
	code, _, stderr = d.run(t, "verify", "--trust-state", d.path("state"), "--archive", "a.archive", "--trust-key", pin, "--identity", "spiffe://example.org/release", "hello")
	if code != 4 || !strings.Contains(stderr, "does not match") {
		t.Errorf("exit %d: %s", code, stderr)
	}
	code, out, stderr = d.run(t, "verify", "--trust-state", d.path("state"), "--archive", "a.archive", "--trust-key", pin, "--identity", "spiffe://example.org/build", "hello")
	if code != 0 || strings.Contains(stderr, "NOTE") {
		t.Errorf("exit %d: %s%s", code, out, stderr)
	}
}

// The old trust.json, which knows nothing of a revocation, comes back in an
// archive: that is what archives are for, and must not happen in silence.
func TestRefusesToRollTrustBackInSilence(t *testing.T) {
	d := newDesk(t)
	d.forged(t, archive.Question{Identity: "spiffe://example.org/build"})
	d.trust.Serial++
	d.writeTrust(t)
	if code, _, stderr := d.run(t, "verify", "--trust-state", d.path("state"), "--trust", "trust.json", "--identity", "spiffe://example.org/build", "build"+link.BundleSuffix, "hello"); code != 0 {
		t.Fatal(stderr)
	}
	code, _, stderr := d.run(t, "verify", "--trust-state", d.path("state"), "--archive", "a.archive", "hello")
	if code != 0 || !strings.Contains(stderr, "has serial 5, and 6 was seen") {
		t.Errorf("exit %d: %s", code, stderr)
	}
}

// Files of an archive take the places of each other, or of what we remember.
func TestRefusesArchiveWhoseFilesHideOthers(t *testing.T) {
	d := newDesk(t)
	pin, err := envelope.Fingerprint(d.key.Public())
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range []archive.File{
		{Role: archive.RoleSublayout, Path: "build" + link.BundleSuffix},
		{Role: archive.RoleEventLog, Path: "state"},
	} {
		d.forged(t, archive.Question{Identity: "spiffe://example.org/build"}, f)
		if code, out, stderr := d.run(t, "verify", "--trust-state", d.path("state"), "--archive", "a.archive", "--trust-key", pin, "hello"); code == 0 {
			t.Errorf("%s: %s%s", f.Path, out, stderr)
		}
	}
}
