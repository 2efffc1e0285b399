package oci

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// testImage is an image in memory: its blobs by digest.
type testImage struct {
	blobs    map[digest.Digest][]byte
	manifest ocispec.Descriptor
	layer    ocispec.Descriptor
}

func (im *testImage) add(mediaType string, data []byte) ocispec.Descriptor {
	d := digest.FromBytes(data)
	im.blobs[d] = data
	return ocispec.Descriptor{MediaType: mediaType, Digest: d, Size: int64(len(data))}
}

func (im *testImage) addJSON(t *testing.T, mediaType string, v any) ocispec.Descriptor {
	t.Helper()
	raw, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return im.add(mediaType, raw)
}

func newImage(t *testing.T, binary string) *testImage {
	t.Helper()
	im := &testImage{blobs: map[digest.Digest][]byte{}}
	im.layer = im.add(ocispec.MediaTypeImageLayer, []byte(binary))
	config := im.add(ocispec.MediaTypeImageConfig, []byte(`{"os":"linux"}`))
	im.manifest = im.addJSON(t, ocispec.MediaTypeImageManifest, ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, Config: config, Layers: []ocispec.Descriptor{im.layer},
	})
	return im
}

func blobFile(dir string, d digest.Digest) string {
	return filepath.Join(dir, "blobs", "sha256", d.Encoded())
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

// layoutOf writes the images into a layout, each with an entry in its index.
func layoutOf(t *testing.T, images ...*testImage) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "hello")
	write(t, filepath.Join(dir, "oci-layout"), []byte(`{"imageLayoutVersion":"1.0.0"}`))
	var idx ocispec.Index
	idx.SchemaVersion = 2
	for _, im := range images {
		for d, b := range im.blobs {
			write(t, blobFile(dir, d), b)
		}
		idx.Manifests = append(idx.Manifests, im.manifest)
	}
	writeIndex(t, dir, idx)
	return dir
}

func writeIndex(t *testing.T, dir string, idx ocispec.Index) {
	t.Helper()
	raw, err := json.Marshal(idx)
	if err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(dir, "index.json"), raw)
}

func resolve(t *testing.T, ref string) (string, string, error) {
	t.Helper()
	return Resolve(t.Context(), ref)
}

func TestResolveLayout(t *testing.T) {
	a, b := newImage(t, "one"), newImage(t, "two")
	dir := layoutOf(t, a)
	for _, ref := range []string{"oci-layout:" + dir, "oci-layout:" + dir + "/", "oci-layout:" + dir + "@" + string(a.manifest.Digest)} {
		name, d, err := resolve(t, ref)
		if err != nil || name != "hello" || d != a.manifest.Digest.Encoded() {
			t.Errorf("%s: %q %q %v", ref, name, d, err)
		}
	}
	dir = layoutOf(t, a, b)
	if _, _, err := resolve(t, "oci-layout:"+dir); !errors.Is(err, ErrAmbiguous) {
		t.Errorf("two images: %v", err)
	}
	if _, d, err := resolve(t, "oci-layout:"+dir+"@"+string(b.manifest.Digest)); err != nil || d != b.manifest.Digest.Encoded() {
		t.Errorf("%q %v", d, err)
	}
	tagged := a.manifest
	tagged.Annotations = map[string]string{ocispec.AnnotationRefName: "v1"}
	writeIndex(t, dir, ocispec.Index{Manifests: []ocispec.Descriptor{tagged, b.manifest}})
	if _, d, err := resolve(t, "oci-layout:"+dir+":v1"); err != nil || d != a.manifest.Digest.Encoded() {
		t.Errorf("%q %v", d, err)
	}
	if _, _, err := resolve(t, "oci-layout:"+dir+":v2"); !errors.Is(err, ErrNotFound) {
		t.Errorf("unknown tag: %v", err)
	}
}

// An image for several platforms is an index, and every one of its images counts.
func TestResolveIndexOfImages(t *testing.T) {
	a, b := newImage(t, "amd64"), newImage(t, "arm64")
	dir := layoutOf(t, a, b)
	im := &testImage{blobs: map[digest.Digest][]byte{}}
	top := im.addJSON(t, ocispec.MediaTypeImageIndex, ocispec.Index{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{a.manifest, b.manifest},
	})
	write(t, blobFile(dir, top.Digest), im.blobs[top.Digest])
	writeIndex(t, dir, ocispec.Index{Manifests: []ocispec.Descriptor{top}})
	if _, d, err := resolve(t, "oci-layout:"+dir); err != nil || d != top.Digest.Encoded() {
		t.Fatalf("%q %v", d, err)
	}
	write(t, blobFile(dir, b.layer.Digest), []byte("arm65"))
	if _, _, err := resolve(t, "oci-layout:"+dir); !errors.Is(err, ErrDigest) {
		t.Errorf("a layer of the second image was exchanged: %v", err)
	}
}

// The manifest keeps its digest while what it points to is exchanged.
func TestRefusesSwappedLayer(t *testing.T) {
	im := newImage(t, "the binary")
	for name, evil := range map[string]string{"same size": "THE BINARY", "longer": "the binary, and more", "shorter": "the"} {
		dir := layoutOf(t, im)
		write(t, blobFile(dir, im.layer.Digest), []byte(evil))
		if _, _, err := resolve(t, "oci-layout:"+dir); !errors.Is(err, ErrDigest) {
			t.Errorf("%s: %v", name, err)
		}
	}
	dir := layoutOf(t, im)
	if err := os.Remove(blobFile(dir, im.layer.Digest)); err != nil {
		t.Fatal(err)
	}
	if _, _, err := resolve(t, "oci-layout:"+dir); !errors.Is(err, ErrNotFound) {
		t.Errorf("layer removed: %v", err)
	}
}

func TestRefusesSwappedManifest(t *testing.T) {
	im, evil := newImage(t, "good"), newImage(t, "evil")
	dir := layoutOf(t, im, evil)
	writeIndex(t, dir, ocispec.Index{Manifests: []ocispec.Descriptor{im.manifest}})
	write(t, blobFile(dir, im.manifest.Digest), evil.blobs[evil.manifest.Digest])
	if _, _, err := resolve(t, "oci-layout:"+dir); !errors.Is(err, ErrDigest) {
		t.Error(err)
	}
}

// A layout comes from anybody: nothing in it makes us read outside of it, wait
// for ever or take up the memory.
func TestRefusesHostileLayout(t *testing.T) {
	im := newImage(t, "good")
	for name, c := range map[string]struct {
		spoil func(t *testing.T, dir string)
		want  error // nil: any
	}{
		"symlink out of it": {func(t *testing.T, dir string) {
			outside := filepath.Join(t.TempDir(), "secret")
			write(t, outside, im.blobs[im.layer.Digest])
			name := blobFile(dir, im.layer.Digest)
			if err := errors.Join(os.Remove(name), os.Symlink(outside, name)); err != nil {
				t.Fatal(err)
			}
		}, nil},
		"digest that is a path": {func(t *testing.T, dir string) {
			write(t, filepath.Join(dir, "index.json"), []byte(`{"manifests":[{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"sha256:../../../etc/passwd","size":1}]}`))
		}, ErrMalformed},
		"another algorithm": {func(t *testing.T, dir string) {
			write(t, filepath.Join(dir, "index.json"), []byte(`{"manifests":[{"digest":"sha512:00","size":1}]}`))
		}, ErrMalformed},
		"no JSON": {func(t *testing.T, dir string) { write(t, filepath.Join(dir, "index.json"), []byte("{")) }, ErrMalformed},
		"huge index": {func(t *testing.T, dir string) {
			write(t, filepath.Join(dir, "index.json"), bytes.Repeat([]byte(" "), maxManifest+1))
		}, ErrTooLarge},
		"many entries": {func(t *testing.T, dir string) {
			write(t, filepath.Join(dir, "index.json"), []byte(`{"manifests":[`+strings.Repeat("{},", maxEntries)+`{}]}`))
		}, ErrTooLarge},
		"directory as blob": {func(t *testing.T, dir string) {
			name := blobFile(dir, im.layer.Digest)
			if err := errors.Join(os.Remove(name), os.Mkdir(name, 0o755)); err != nil {
				t.Fatal(err)
			}
		}, ErrMalformed},
		"version of the future": {func(t *testing.T, dir string) {
			write(t, filepath.Join(dir, "oci-layout"), []byte(`{"imageLayoutVersion":"2.0.0"}`))
		}, ErrMalformed},
		"empty": {func(t *testing.T, dir string) { writeIndex(t, dir, ocispec.Index{}) }, ErrNotFound},
	} {
		dir := layoutOf(t, im)
		c.spoil(t, dir)
		if _, _, err := resolve(t, "oci-layout:"+dir); err == nil || c.want != nil && !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
}

// An index that holds itself cannot exist, but one can be as deep as one likes.
func TestRefusesDeepIndex(t *testing.T) {
	im := newImage(t, "x")
	for range maxDepth + 1 {
		im.manifest = im.addJSON(t, ocispec.MediaTypeImageIndex, ocispec.Index{MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{im.manifest}})
	}
	if _, _, err := resolve(t, "oci-layout:"+layoutOf(t, im)); !errors.Is(err, ErrTooLarge) {
		t.Error(err)
	}
}

// A document that can be read as a manifest and as an index names two images.
func TestRefusesDocumentWithTwoReadings(t *testing.T) {
	im := newImage(t, "x")
	for _, doc := range []string{
		`{"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{},"manifests":[{}]}`,
		`{"mediaType":"application/vnd.oci.image.index.v1+json","config":{},"manifests":[]}`,
		`{"mediaType":"application/vnd.oci.image.manifest.v1+json"}`,
		`{"mediaType":"text/plain"}`,
	} {
		im.manifest = im.add(ocispec.MediaTypeImageManifest, []byte(doc))
		if _, _, err := resolve(t, "oci-layout:"+layoutOf(t, im)); !errors.Is(err, ErrMalformed) {
			t.Errorf("%s: %v", doc, err)
		}
	}
}

func TestParseRef(t *testing.T) {
	d := "sha256:" + strings.Repeat("0a", 32)
	for in, want := range map[string]Ref{
		"oci-layout:a/b":                  {kindLayout, "a/b", "", ""},
		"oci-layout:a/b:v1":               {kindLayout, "a/b", "v1", ""},
		"oci-layout:a:b/c@" + d:           {kindLayout, "a:b/c", "", d},
		"oci-layout:a@b/c":                {kindLayout, "a@b/c", "", ""},
		"oci:h.example:5000/r/s:v1":       {kindRegistry, "h.example:5000/r/s", "v1", ""},
		"oci:h.example/r:v1@" + d:         {kindRegistry, "h.example/r", "v1", d},
		"oci+http:h:5000/r:v1":            {kindPlain, "h:5000/r", "v1", ""},
		"dir:x":                           {kindDir, "x", "", ""},
		"dir:" + "x@" + d:                 {kindDir, "x", "", d},
		"oci-layout:/abs/with space@" + d: {kindLayout, "/abs/with space", "", d},
	} {
		got, err := ParseRef(in)
		if err != nil || got != want {
			t.Errorf("%s: %+v %v", in, got, err)
		}
		if again, err := ParseRef(got.String()); err != nil || again != got {
			t.Errorf("%s does not come back: %+v %v", got, again, err)
		}
	}
	for _, bad := range []string{
		"", "hello", "docker:x/y", "oci:", "oci:host", "oci:host/", "oci:HOST/Repo", "oci:host/r@sha256:00", "oci-layout:", "oci-layout:x@sha512:00",
		"oci:h/r@" + strings.ToUpper(d), "oci:h/../r", "oci-layout:x:-", "oci:" + strings.Repeat("a", maxRefLength),
	} {
		if r, err := ParseRef(bad); !errors.Is(err, ErrRef) {
			t.Errorf("%q: %+v %v", bad, r, err)
		}
	}
}
