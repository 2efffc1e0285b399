package storecmd

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/internal/forge"
	"github.com/rootlink/rootlink/internal/oci"
	"github.com/rootlink/rootlink/pkg/link"
)

const bundleName = "build" + link.BundleSuffix

// shelf is a directory with a bundle, the proof that it names, and an image.
func shelf(t *testing.T) (proof string) {
	t.Helper()
	t.Chdir(t.TempDir())
	w := forge.NewWorld(t)
	zero := 0
	p, err := link.Prepare(&link.Statement{Step: "build", Byproducts: link.Byproducts{ExitCode: &zero}, Subjects: []link.Resource{
		{Name: "hello", Digest: map[string]string{"sha256": strings.Repeat("0", 64)}},
	}})
	if err != nil {
		t.Fatal(err)
	}
	w.Leaf.Payload = p.Digest()
	e := w.Make(t)
	b, err := p.Sign(w.SVIDKey, w.Issue(t, e))
	if err != nil {
		t.Fatal(err)
	}
	raw, err := b.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	proof = fmt.Sprintf("sha256-%x.tlog.json", sha256.Sum256(e.AKCert))
	write(t, bundleName, raw)
	write(t, proof, []byte("{}"))
	manifest := []byte(`{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{"mediaType":"application/vnd.oci.empty.v1+json","digest":"sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a","size":2},"layers":[]}`)
	write(t, "image/oci-layout", []byte(`{"imageLayoutVersion":"1.0.0"}`))
	write(t, "image/index.json", fmt.Appendf(nil, `{"manifests":[{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"sha256:%x","size":%d}]}`, sha256.Sum256(manifest), len(manifest)))
	write(t, fmt.Sprintf("image/blobs/sha256/%x", sha256.Sum256(manifest)), manifest)
	write(t, fmt.Sprintf("image/blobs/sha256/%x", sha256.Sum256([]byte("{}"))), []byte("{}"))
	return proof
}

func write(t *testing.T, name string, data []byte) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, data, 0o644); err != nil {
		t.Fatal(err)
	}
}

func run(args ...string) (code int, stdout, stderr string) {
	root := cli.Root("rootlink", "", "test")
	root.AddCommand(AttachCommand(), FetchCommand())
	var out, errs bytes.Buffer
	code = cli.Main(context.Background(), root, args, &out, &errs)
	return code, out.String(), errs.String()
}

func TestAttachAndFetch(t *testing.T) {
	proof := shelf(t)
	code, out, errs := run("attach", bundleName, "--to", "oci-layout:image")
	if code != 0 || !strings.Contains(out, "stored  "+bundleName) || !strings.Contains(out, "stored  "+proof) {
		t.Fatalf("exit %d\n%s%s", code, out, errs)
	}
	code, out, errs = run("attach", bundleName, "--to", "oci-layout:image", "--output", "json")
	var attached []oci.Attached
	if err := json.Unmarshal([]byte(out), &attached); code != 0 || err != nil || len(attached) != 2 || !attached[0].Existed {
		t.Fatalf("exit %d\n%s%s", code, out, errs)
	}
	code, out, errs = run("fetch", "oci-layout:image", "--bundle-dir", "got")
	if code != 0 || !strings.Contains(out, "got/"+bundleName) {
		t.Fatalf("exit %d\n%s%s", code, out, errs)
	}
	for _, name := range []string{bundleName, proof} {
		want, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadFile(filepath.Join("got", name)); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// A record that a node made beside a link goes with it, and so does what the
// record names.
func TestAttachAndFetchDetachedEvidence(t *testing.T) {
	shelf(t)
	w := forge.NewWorld(t)
	zero := 0
	p, err := link.Prepare(&link.Statement{Step: "build", Byproducts: link.Byproducts{ExitCode: &zero}, Subjects: []link.Resource{
		{Name: "hello", Digest: map[string]string{"sha256": strings.Repeat("0", 64)}},
	}})
	if err != nil {
		t.Fatal(err)
	}
	w.Leaf.Payload = p.Digest()
	svid := w.Plain(t)
	d := w.Detach(t, svid)
	b, err := p.SignDetached(w.SVIDKey, svid, d)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := b.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	record, err := d.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	proof := link.LogProofName(d.Evidence.AKCert)
	write(t, bundleName, raw)
	write(t, b.DetachedName(), record)
	write(t, proof, []byte("{}"))
	for _, args := range [][]string{{"attach", bundleName, "--to", "oci-layout:image"}, {"fetch", "oci-layout:image", "--bundle-dir", "got"}} {
		if code, out, errs := run(args...); code != 0 {
			t.Fatalf("exit %d\n%s%s", code, out, errs)
		}
	}
	if got, err := os.ReadFile(filepath.Join("got", b.DetachedName())); err != nil || !bytes.Equal(got, record) {
		t.Errorf("the record: %v", err)
	}
	if _, err := os.Stat(filepath.Join("got", proof)); err != nil {
		t.Error(err)
	}
}

func TestExitCodes(t *testing.T) {
	shelf(t)
	write(t, "plain", []byte("{}"))
	for _, c := range []struct {
		args string
		code int
		hint string
	}{
		{"attach", cli.ExitUsage, "--to"},
		{"attach --to oci-layout:image", cli.ExitUsage, "rootlink run"},
		{"attach " + bundleName, cli.ExitUsage, "--to"},
		{"attach " + bundleName + " --to image", cli.ExitUsage, "oci-layout:DIR"},
		{"attach plain --to oci-layout:image", cli.ExitUsage, "rootlink sign"},
		{"attach nowhere --to oci-layout:image", cli.ExitInternal, "check the path"},
		{"fetch", cli.ExitUsage, "oci-layout:DIR"},
		{"fetch oci-layout:nowhere", cli.ExitInternal, "check the path"},
		{"fetch oci-layout:image:v1", cli.ExitInternal, "the image is there"},
		{"fetch oci-layout:image", cli.ExitInternal, "attach"},
	} {
		code, out, errs := run(strings.Fields(c.args)...)
		if code != c.code || out != "" || !strings.Contains(errs, "hint: ") || !strings.Contains(errs, c.hint) {
			t.Errorf("%s: exit %d\n%s%s", c.args, code, out, errs)
		}
	}
}

func TestRefusesSwappedManifest(t *testing.T) {
	shelf(t)
	blobs, err := filepath.Glob("image/blobs/sha256/*")
	if err != nil || len(blobs) == 0 {
		t.Fatal(blobs, err)
	}
	for _, b := range blobs {
		write(t, b, []byte("[]"))
	}
	if code, _, errs := run("fetch", "oci-layout:image"); code != cli.ExitCrypto || !strings.Contains(errs, "exchanged") {
		t.Errorf("exit %d: %s", code, errs)
	}
}
