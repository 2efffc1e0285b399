package verifycmd

import (
	"crypto/sha256"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/internal/oci"
	"github.com/rootlink/rootlink/pkg/link"
)

const imageBundle = "image" + link.BundleSuffix

// withImage adds an OCI layout and a bundle about it to the desk.
func withImage(t *testing.T) (d *desk, ref string) {
	t.Helper()
	d = newDesk(t)
	config := []byte("{}")
	manifest := fmt.Appendf(nil, `{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"sha256:%x","size":2},"layers":[]}`, sha256.Sum256(config))
	digest := fmt.Sprintf("%x", sha256.Sum256(manifest))
	d.write(t, "image/oci-layout", []byte(`{"imageLayoutVersion":"1.0.0"}`))
	d.write(t, "image/index.json", fmt.Appendf(nil, `{"manifests":[{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"sha256:%s","size":%d}]}`, digest, len(manifest)))
	d.write(t, "image/blobs/sha256/"+digest, manifest)
	d.write(t, fmt.Sprintf("image/blobs/sha256/%x", sha256.Sum256(config)), config)
	d.sign(t, imageBundle, link.Resource{Name: "image", Digest: map[string]string{"sha256": digest}})
	return d, "oci-layout:" + d.path("image")
}

// sign writes a bundle about one subject.
func (d *desk) sign(t *testing.T, name string, subject link.Resource) {
	t.Helper()
	zero := 0
	p, err := link.Prepare(&link.Statement{Step: "build", Command: []string{"go"}, Byproducts: link.Byproducts{ExitCode: &zero}, Subjects: []link.Resource{subject}})
	if err != nil {
		t.Fatal(err)
	}
	d.world.Leaf.Payload = p.Digest()
	b, err := p.Sign(d.world.SVIDKey, d.world.Issue(t, d.world.Make(t)))
	if err != nil {
		t.Fatal(err)
	}
	raw, err := b.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	d.write(t, name, raw)
}

func (d *desk) attach(t *testing.T, ref string, bundles ...string) {
	t.Helper()
	var items []oci.Item
	for _, name := range bundles {
		raw, err := os.ReadFile(d.path(name))
		if err != nil {
			t.Fatal(err)
		}
		items = append(items, oci.Item{Name: name, Data: raw})
	}
	if _, err := oci.Attach(t.Context(), ref, items); err != nil {
		t.Fatal(err)
	}
}

func TestVerifyImage(t *testing.T) {
	d, ref := withImage(t)
	if code, out, errOut := d.verify(t, imageBundle, ref); code != cli.ExitOK || !strings.Contains(out, "oci-layout:") {
		t.Fatalf("exit %d\n%s%s", code, out, errOut)
	}
	if code, out, errOut := d.verify(t, bundleName, ref); code != cli.ExitPolicy || !strings.Contains(errOut, "not a subject") {
		t.Errorf("a link about something else: exit %d\n%s%s", code, out, errOut)
	}
	d.attach(t, ref, imageBundle)
	t.Setenv("TMPDIR", t.TempDir())
	for _, args := range [][]string{{"--from", ref}, {"--from", ref, ref}, {"--from", "dir:" + d.path("bundles"), ref}} {
		d.attach(t, "dir:"+d.path("bundles"), imageBundle)
		code, out, errOut := d.verify(t, args...)
		if code != cli.ExitOK || !strings.Contains(out, "link "+imageBundle) || strings.Contains(out, "rootlink-") {
			t.Errorf("%q: exit %d\n%s%s", args, code, out, errOut)
		}
	}
	if left, err := os.ReadDir(os.TempDir()); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v %v", left, err)
	}
}

// Bundles that are good, attached to an image that they are not about.
func TestRefusesBundlesOfAnotherImage(t *testing.T) {
	d, ref := withImage(t)
	d.attach(t, ref, bundleName)
	if code, out, errOut := d.verify(t, "--from", ref); code != cli.ExitPolicy || !strings.Contains(errOut, "not a subject") {
		t.Errorf("exit %d\n%s%s", code, out, errOut)
	}
}

func TestRefusesSwappedBlobOfAnImage(t *testing.T) {
	d, ref := withImage(t)
	d.attach(t, ref, imageBundle)
	d.write(t, fmt.Sprintf("image/blobs/sha256/%x", sha256.Sum256([]byte("{}"))), []byte("[]"))
	for _, args := range [][]string{{imageBundle, ref}, {"--from", ref}} {
		if code, out, errOut := d.verify(t, args...); code != cli.ExitCrypto || !strings.Contains(errOut, "exchanged") {
			t.Errorf("%q: exit %d\n%s%s", args, code, out, errOut)
		}
	}
}

func TestRefusesImageWithoutBundles(t *testing.T) {
	d, ref := withImage(t)
	if code, _, errOut := d.verify(t, "--from", ref); code != cli.ExitPolicy || !strings.Contains(errOut, "attach") {
		t.Errorf("exit %d: %s", code, errOut)
	}
	if code, _, errOut := d.verify(t, "--from", "image"); code != cli.ExitUsage {
		t.Errorf("exit %d: %s", code, errOut)
	}
}

// An auditor asks what would be said at another time. The answer says so, and
// changes nothing.
func TestVerifyAsIf(t *testing.T) {
	d := newDesk(t)
	at := func(d2 time.Duration) string { return d.now.Add(d2).Format(time.RFC3339) }
	code, out, errOut := d.verify(t, "--at", at(time.Minute), bundleName, "hello")
	if code != cli.ExitOK || !strings.Contains(out, "AS IF IT WERE") || strings.Contains(out, "Judged at "+d.now.Format("2006")+" (the verifier's own clock") {
		t.Errorf("exit %d\n%s%s", code, out, errOut)
	}
	if _, err := os.Stat(d.path("state")); err == nil {
		t.Error("it was remembered")
	}
	if code, out, _ := d.verify(t, "--at", at(time.Minute), "--output", "json", bundleName, "hello"); code != cli.ExitOK || !strings.Contains(out, `"as_if"`) {
		t.Errorf("exit %d\n%s", code, out)
	}
	if code, _, errOut := d.verify(t, "--at", at(time.Hour), bundleName, "hello"); code != cli.ExitCrypto {
		t.Errorf("after the SVID expired: exit %d: %s", code, errOut)
	}
	if code, _, errOut := d.verify(t, "--at", "tomorrow", bundleName); code != cli.ExitUsage || !strings.Contains(errOut, "2030") {
		t.Errorf("exit %d: %s", code, errOut)
	}
	if code, _, _ := d.verify(t, "--at", at(-time.Minute), bundleName, "hello"); code == cli.ExitOK {
		t.Error("verified")
	}
}

// The key of an SVID that expired long ago signs something, and --at puts the
// verifier back into its lifetime. No authority says that the signature existed.
func TestRefusesPastTimeThatNobodyAttests(t *testing.T) {
	d := newDesk(t)
	good := d.now
	d.now = good.Add(24 * time.Hour)
	code, out, errOut := d.verify(t, "--at", good.Format(time.RFC3339), bundleName, "hello")
	if code == cli.ExitOK || !strings.Contains(errOut, "no time is attested") {
		t.Errorf("exit %d\n%s%s", code, out, errOut)
	}
}
