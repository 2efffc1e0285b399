package oci

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/rootlink/rootlink/pkg/link"
)

// bundleOf has the outside of a bundle. What is stored is judged by others.
func bundleOf(predicate string, d digest.Digest) []byte {
	payload := fmt.Sprintf(`{"predicateType":%q,"subject":[{"name":"x","digest":{"sha256":%q}}]}`, predicate, d.Encoded())
	return []byte(fmt.Sprintf(`{"mediaType":%q,"dsseEnvelope":{"payload":%q}}`, link.BundleMediaType, base64.StdEncoding.EncodeToString([]byte(payload))))
}

var eventLog = Item{"sha256-" + strings.Repeat("ab", 32) + ".eventlog", []byte("log")}

func names(items []Item) (out []string) {
	for _, it := range items {
		out = append(out, it.Name)
	}
	slices.Sort(out)
	return out
}

// Each place gives back what was put there, once however often it was.
func TestAttachAndFetch(t *testing.T) {
	im := newImage(t, "hello")
	s, host := startRegistry(t)
	s.push(im, "v1")
	old, oldHost := startRegistry(t)
	old.push(im, "v1")
	old.noReferrers = true
	d := im.manifest.Digest
	items := []Item{{"build.sigstore.json", bundleOf("a", d)}, {"sbom.sigstore.json", bundleOf("b", d)}, eventLog}
	for _, ref := range []string{
		"oci-layout:" + layoutOf(t, im), "oci-layout:" + layoutOf(t, im) + "@" + d.String(),
		"oci+http:" + host + "/team/hello:v1", "oci+http:" + oldHost + "/team/hello:v1", "dir:" + filepath.Join(t.TempDir(), "new"),
	} {
		for _, again := range []bool{false, true} {
			out, err := Attach(t.Context(), ref, items)
			if err != nil || len(out) != len(items) {
				t.Fatalf("%s: %+v %v", ref, out, err)
			}
			for _, a := range out {
				if a.Existed != again || checkDigest(a.Digest) != nil {
					t.Errorf("%s: %+v, attached before: %v", ref, a, again)
				}
			}
		}
		f, err := Fetch(t.Context(), ref)
		if err != nil || !slices.Equal(names(f.Items), names(items)) || len(f.Bundles()) != 2 || len(f.Skipped) != 0 {
			t.Fatalf("%s: %q %q %v", ref, names(f.Items), f.Skipped, err)
		}
		for _, it := range f.Items {
			i := slices.IndexFunc(items, func(o Item) bool { return o.Name == it.Name })
			if !bytes.Equal(it.Data, items[i].Data) {
				t.Errorf("%s: %s changed on the way", ref, it.Name)
			}
		}
		// The image is what it was.
		if !strings.HasPrefix(ref, "dir:") {
			if _, got, err := resolve(t, ref); err != nil || got != d.Encoded() {
				t.Errorf("%s: %q %v", ref, got, err)
			}
		}
	}
}

// cosign finds a bundle by the artifact type and wants a single layer.
func TestReferrerIsInCosignsForm(t *testing.T) {
	im := newImage(t, "hello")
	raw, layer, kind, err := referrer(Item{"build.sigstore.json", bundleOf("https://in-toto.io/attestation/link/v0.3", im.manifest.Digest)}, im.manifest)
	if err != nil || kind != link.BundleMediaType {
		t.Fatal(kind, err)
	}
	m := parse(raw)
	if m.ArtifactType != link.BundleMediaType || m.Config.MediaType != ocispec.MediaTypeEmptyJSON || len(m.Layers) != 1 || m.Layers[0].MediaType != link.BundleMediaType ||
		m.Layers[0].Digest != layer.Digest || m.Subject.Digest != im.manifest.Digest || m.Subject.Size != im.manifest.Size ||
		m.Annotations["dev.sigstore.bundle.predicateType"] != "https://in-toto.io/attestation/link/v0.3" || m.Annotations["dev.sigstore.bundle.content"] != "dsse-envelope" {
		t.Errorf("%s", raw)
	}
}

// Other people's entries and fields in a layout stay.
func TestAttachKeepsTheIndex(t *testing.T) {
	im := newImage(t, "hello")
	dir := layoutOf(t, im)
	entry, err := json.Marshal(im.manifest)
	if err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(dir, "index.json"), []byte(`{"schemaVersion":2,"x-other":{"a":1},"manifests":[`+strings.Replace(string(entry), "{", `{"x-more":2,`, 1)+`]}`))
	if _, err := Attach(t.Context(), "oci-layout:"+dir, []Item{{"a.sigstore.json", bundleOf("a", im.manifest.Digest)}}); err != nil {
		t.Fatal(err)
	}
	raw, err := os.ReadFile(filepath.Join(dir, "index.json"))
	if err != nil || !strings.Contains(string(raw), `"x-other":{"a":1}`) || !strings.Contains(string(raw), `"x-more":2`) || !strings.Contains(string(raw), `"schemaVersion":2`) {
		t.Errorf("%s %v", raw, err)
	}
}

func TestDirectoryKeepsBothBundlesOfAName(t *testing.T) {
	a, b := newImage(t, "a").manifest.Digest, newImage(t, "b").manifest.Digest
	dir := "dir:" + t.TempDir()
	for _, d := range []digest.Digest{a, b, a, b} {
		if _, err := Attach(t.Context(), dir, []Item{{"build.sigstore.json", bundleOf("x", d)}}); err != nil {
			t.Fatal(err)
		}
	}
	f, err := Fetch(t.Context(), dir)
	if err != nil || len(f.Items) != 2 {
		t.Fatal(names(f.Items), err)
	}
	f, err = Fetch(t.Context(), dir+"@"+b.String())
	if err != nil || len(f.Items) != 1 || !bytes.Equal(f.Items[0].Data, bundleOf("x", b)) {
		t.Errorf("by digest: %q %v", names(f.Items), err)
	}
}

func TestRefusesToAttachWhatIsNoBundle(t *testing.T) {
	im := newImage(t, "hello")
	for _, it := range []Item{{"a.sigstore.json", []byte("{}")}, {"key.pem", []byte("secret")}, {"sha256-00.eventlog", nil}, {eventLog.Name, make([]byte, maxCompanion+1)}} {
		if _, err := Attach(t.Context(), "oci-layout:"+layoutOf(t, im), []Item{it}); !errors.Is(err, ErrItem) && !errors.Is(err, ErrTooLarge) {
			t.Errorf("%s: %v", it.Name, err)
		}
	}
}

// attachRaw puts a referrer as a stranger would write it into a layout.
func attachRaw(t *testing.T, dir string, im *testImage, edit func(*ocispec.Manifest), data []byte) {
	t.Helper()
	raw, layer, _, err := referrer(Item{"a.sigstore.json", bundleOf("a", im.manifest.Digest)}, im.manifest)
	if err != nil {
		t.Fatal(err)
	}
	if data == nil {
		data = bundleOf("a", im.manifest.Digest)
	}
	m := parse(raw)
	layer.Digest, layer.Size = digest.FromBytes(data), int64(len(data))
	m.Layers[0] = layer
	edit(&m)
	other := &testImage{blobs: map[digest.Digest][]byte{}}
	d := other.addJSON(t, ocispec.MediaTypeImageManifest, m)
	write(t, blobFile(dir, d.Digest), other.blobs[d.Digest])
	write(t, blobFile(dir, layer.Digest), data)
	var idx ocispec.Index
	old, err := os.ReadFile(filepath.Join(dir, "index.json"))
	if err == nil {
		err = json.Unmarshal(old, &idx)
	}
	if err != nil {
		t.Fatal(err)
	}
	idx.Manifests = append(idx.Manifests, d)
	writeIndex(t, dir, idx)
}

// Anybody who may push can attach. What they call it names no path of ours.
func TestRefusesTraversalInTitles(t *testing.T) {
	im := newImage(t, "hello")
	for i, title := range []string{"../../etc/cron.d/x.sigstore.json", "/etc/x.sigstore.json", "a/b.sigstore.json", "..", "-rf.sigstore.json", "\x1b[2Jx.sigstore.json", ".sigstore.json", "x.sigstore.json\n", "authorized_keys", ""} {
		dir := layoutOf(t, im)
		attachRaw(t, dir, im, func(m *ocispec.Manifest) {
			m.Layers[0].Annotations = map[string]string{ocispec.AnnotationTitle: title}
		}, nil)
		f, err := Fetch(t.Context(), "oci-layout:"+dir)
		if err != nil || len(f.Items) != 1 {
			t.Fatalf("%d %q: %v", i, title, err)
		}
		if got := f.Items[0].Name; got != fmt.Sprintf("sha256-%s.sigstore.json", digest.FromBytes(f.Items[0].Data).Encoded()) {
			t.Errorf("%q became %q", title, got)
		}
	}
	dir := layoutOf(t, im)
	attachRaw(t, dir, im, func(m *ocispec.Manifest) {
		m.ArtifactType, m.Layers[0].MediaType = companionType, companionType
		m.Layers[0].Annotations = map[string]string{ocispec.AnnotationTitle: "../" + eventLog.Name}
	}, nil)
	if f, err := Fetch(t.Context(), "oci-layout:"+dir); err != nil || len(f.Items) != 0 || len(f.Skipped) != 1 {
		t.Errorf("%+v %v", f, err)
	}
}

// One broken referrer, which any stranger can attach, hides no good one.
func TestBrokenReferrerHidesNone(t *testing.T) {
	im := newImage(t, "hello")
	dir := layoutOf(t, im)
	good := Item{"good.sigstore.json", bundleOf("good", im.manifest.Digest)}
	for _, edit := range []func(*ocispec.Manifest){
		func(m *ocispec.Manifest) { m.Layers = nil },
		func(m *ocispec.Manifest) { m.Layers = append(m.Layers, m.Layers[0]) },
		func(m *ocispec.Manifest) { m.Layers[0].MediaType = "text/plain" },
		func(m *ocispec.Manifest) { m.Layers[0].Size = maxBundle + 1 },
		func(m *ocispec.Manifest) { m.Layers[0].Size = -1 },
		func(m *ocispec.Manifest) { m.Layers[0].Digest = "sha256:../../../etc/passwd" },
	} {
		attachRaw(t, dir, im, edit, nil)
	}
	attachRaw(t, dir, im, func(*ocispec.Manifest) {}, []byte("no bundle"))
	if _, err := Attach(t.Context(), "oci-layout:"+dir, []Item{good}); err != nil {
		t.Fatal(err)
	}
	f, err := Fetch(t.Context(), "oci-layout:"+dir)
	if err != nil || !slices.Equal(names(f.Items), []string{good.Name}) || len(f.Skipped) != 7 {
		t.Errorf("%q %q %v", names(f.Items), f.Skipped, err)
	}
}

// Two bundles of one title are both kept, and no third one takes the place of either.
func TestTitlesDoNotCollide(t *testing.T) {
	im := newImage(t, "hello")
	dir := layoutOf(t, im)
	for _, p := range []string{"a", "b", "c"} {
		attachRaw(t, dir, im, func(*ocispec.Manifest) {}, bundleOf(p, im.manifest.Digest))
	}
	f, err := Fetch(t.Context(), "oci-layout:"+dir)
	if err != nil || len(f.Items) != 3 || len(slices.Compact(names(f.Items))) != 3 {
		t.Errorf("%q %v", names(f.Items), err)
	}
}

func TestRefusesSwappedBundleInLayout(t *testing.T) {
	im := newImage(t, "hello")
	dir := layoutOf(t, im)
	b := bundleOf("a", im.manifest.Digest)
	if _, err := Attach(t.Context(), "oci-layout:"+dir, []Item{{"a.sigstore.json", b}}); err != nil {
		t.Fatal(err)
	}
	write(t, blobFile(dir, digest.FromBytes(b)), bundleOf("b", im.manifest.Digest))
	if _, err := Fetch(t.Context(), "oci-layout:"+dir); !errors.Is(err, ErrDigest) && !errors.Is(err, ErrTooLarge) {
		t.Error(err)
	}
}

// A layout of a stranger does not make attach write elsewhere.
func TestRefusesToWriteThroughSymlink(t *testing.T) {
	im := newImage(t, "hello")
	dir := layoutOf(t, im)
	outside := t.TempDir()
	if err := errors.Join(os.Rename(filepath.Join(dir, "blobs"), filepath.Join(outside, "blobs")), os.Symlink(filepath.Join(outside, "blobs"), filepath.Join(dir, "blobs"))); err != nil {
		t.Fatal(err)
	}
	before, err := os.ReadDir(filepath.Join(outside, "blobs", "sha256"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Attach(t.Context(), "oci-layout:"+dir+"@"+im.manifest.Digest.String(), []Item{eventLog}); err == nil {
		t.Error("attached")
	}
	if after, err := os.ReadDir(filepath.Join(outside, "blobs", "sha256")); err != nil || len(after) != len(before) {
		t.Errorf("%d files outside became %d (%v)", len(before), len(after), err)
	}
}

func TestRefusesHostileRegistry(t *testing.T) {
	for name, c := range map[string]struct {
		spoil func(s *registryServer, im, other *testImage)
		want  error // nil: any
	}{
		"referrers of another image": {func(s *registryServer, _, other *testImage) {
			s.list = func([]ocispec.Descriptor) []ocispec.Descriptor {
				raw, _, kind, _ := referrer(Item{"o.sigstore.json", bundleOf("o", other.manifest.Digest)}, other.manifest)
				d := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, ArtifactType: kind, Digest: digest.FromBytes(raw), Size: int64(len(raw))}
				s.manifests[d.Digest.String()], s.types[d.Digest.String()] = raw, d.MediaType
				return []ocispec.Descriptor{d}
			}
		}, ErrForeignReferrer},
		"bundle exchanged": {func(s *registryServer, im, _ *testImage) {
			s.serve = func(r *http.Request, _ string, data []byte) []byte {
				if strings.Contains(r.URL.Path, "/blobs/") {
					return bytes.Repeat([]byte("x"), len(data))
				}
				return data
			}
		}, ErrDigest},
		"manifest of the referrer exchanged": {func(s *registryServer, im, _ *testImage) {
			s.serve = func(_ *http.Request, ref string, data []byte) []byte {
				if strings.HasPrefix(ref, "sha256:") && ref != im.manifest.Digest.String() {
					return bytes.Repeat([]byte(" "), len(data))
				}
				return data
			}
		}, ErrDigest},
		"listed as a bundle": {func(s *registryServer, im, _ *testImage) {
			s.list = func(l []ocispec.Descriptor) []ocispec.Descriptor {
				for i := range l {
					l[i].ArtifactType = companionType
				}
				return l
			}
		}, ErrMalformed},
		"huge size": {func(s *registryServer, im, _ *testImage) {
			s.list = func(l []ocispec.Descriptor) []ocispec.Descriptor { l[0].Size = 1 << 50; return l }
		}, ErrTooLarge},
		"negative size": {func(s *registryServer, im, _ *testImage) {
			s.list = func(l []ocispec.Descriptor) []ocispec.Descriptor { l[0].Size = -1; return l }
		}, ErrTooLarge},
		"digest that is a path": {func(s *registryServer, im, _ *testImage) {
			s.list = func(l []ocispec.Descriptor) []ocispec.Descriptor { l[0].Digest = "../../x"; return l }
		}, ErrMalformed},
		"very many": {func(s *registryServer, im, _ *testImage) {
			s.list = func(l []ocispec.Descriptor) []ocispec.Descriptor { return slices.Repeat(l, maxReferrers+1) }
		}, ErrTooLarge},
		"endless pages": {func(s *registryServer, im, _ *testImage) {
			s.intercept = func(w http.ResponseWriter, r *http.Request) bool {
				if !strings.Contains(r.URL.Path, "/referrers/") {
					return false
				}
				w.Header().Set("Link", `<`+r.URL.Path+`?again>; rel="next"`)
				w.Header().Set("Content-Type", ocispec.MediaTypeImageIndex)
				_, _ = w.Write([]byte(`{"manifests":[]}`))
				return true
			}
		}, ErrTooLarge},
		"endless list": {func(s *registryServer, im, _ *testImage) {
			s.intercept = func(w http.ResponseWriter, r *http.Request) bool {
				if !strings.Contains(r.URL.Path, "/referrers/") {
					return false
				}
				w.Header().Set("Content-Type", ocispec.MediaTypeImageIndex)
				_, _ = w.Write([]byte(`{"manifests":[`))
				for range 2 * maxManifest / 1024 {
					if _, err := w.Write([]byte(strings.Repeat(" ", 1024))); err != nil {
						break
					}
				}
				return true
			}
		}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			s, host := startRegistry(t)
			im, other := newImage(t, "hello"), newImage(t, "other")
			s.push(im, "v1")
			ref := "oci+http:" + host + "/team/hello:v1"
			if _, err := Attach(t.Context(), ref, []Item{{"a.sigstore.json", bundleOf("a", im.manifest.Digest)}}); err != nil {
				t.Fatal(err)
			}
			c.spoil(s, im, other)
			f, err := Fetch(t.Context(), ref)
			if err == nil || c.want != nil && !errors.Is(err, c.want) {
				t.Errorf("%+v %v, want %v", f, err, c.want)
			}
		})
	}
}
