package oci

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/rootlink/rootlink/internal/files"
)

// The types of manifests and indexes; docker's older ones have the same shape.
const (
	dockerManifest = "application/vnd.docker.distribution.manifest.v2+json"
	dockerList     = "application/vnd.docker.distribution.manifest.list.v2+json"
)

func isIndex(mediaType string) bool {
	return mediaType == ocispec.MediaTypeImageIndex || mediaType == dockerList
}

func isManifest(mediaType string) bool {
	return mediaType == ocispec.MediaTypeImageManifest || mediaType == dockerManifest
}

// layout is an OCI image layout in a directory. It is opened as a root that no
// name and no symbolic link inside leads out of: it may come from anybody.
type layout struct{ root *os.Root }

// openLayout opens what follows image-layout.md: the marker file with its version.
func openLayout(dir string) (*layout, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	l := &layout{root}
	raw, err := l.read(ocispec.ImageLayoutFile, maxManifest)
	if err != nil {
		l.close()
		return nil, fmt.Errorf("%s is no OCI image layout: %w", dir, err)
	}
	var marker ocispec.ImageLayout
	if err := json.Unmarshal(raw, &marker); err != nil || marker.Version != ocispec.ImageLayoutVersion {
		l.close()
		return nil, fmt.Errorf("%s: %w: oci-layout of version %q, want %q", dir, ErrMalformed, marker.Version, ocispec.ImageLayoutVersion)
	}
	return l, nil
}

func (l *layout) close() { l.root.Close() }

func (l *layout) read(name string, limit int64) ([]byte, error) {
	f, err := l.open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	raw, err := files.ReadAll(f, name, limit)
	if errors.Is(err, files.ErrTooLarge) {
		return nil, fmt.Errorf("%s: %w of %d bytes", name, ErrTooLarge, limit)
	}
	return raw, err
}

// open takes regular files only: a FIFO would hold us for ever.
func (l *layout) open(name string) (*os.File, error) {
	st, err := l.root.Stat(name)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("%s: %w", name, ErrNotFound)
		}
		return nil, err
	}
	if !st.Mode().IsRegular() {
		return nil, fmt.Errorf("%w: %s is not a file", ErrMalformed, name)
	}
	return l.root.Open(name)
}

func blobPath(d digest.Digest) (string, error) {
	if err := checkDigest(string(d)); err != nil {
		return "", fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	return path.Join(ocispec.ImageBlobsDir, "sha256", strings.TrimPrefix(string(d), "sha256:")), nil
}

// blob reads a small blob and compares it with its digest.
func (l *layout) blob(d digest.Digest, limit int64) ([]byte, error) {
	name, err := blobPath(d)
	if err != nil {
		return nil, err
	}
	raw, err := l.read(name, limit)
	if err != nil {
		return nil, err
	}
	if got := digestOf(raw); got != string(d) {
		return nil, fmt.Errorf("%w: %s holds %s", ErrDigest, name, got)
	}
	return raw, nil
}

// index reads index.json.
func (l *layout) index() (ocispec.Index, error) {
	var idx ocispec.Index
	raw, err := l.read(ocispec.ImageIndexFile, maxManifest)
	if err != nil {
		return idx, err
	}
	if err := json.Unmarshal(raw, &idx); err != nil {
		return idx, fmt.Errorf("%w: index.json: %w", ErrMalformed, err)
	}
	if len(idx.Manifests) > maxEntries {
		return idx, fmt.Errorf("index.json: %w of %d entries", ErrTooLarge, maxEntries)
	}
	return idx, nil
}

// document is what manifests and indexes have that matters here.
type document struct {
	MediaType    string               `json:"mediaType"`
	ArtifactType string               `json:"artifactType"`
	Config       *ocispec.Descriptor  `json:"config"`
	Layers       []ocispec.Descriptor `json:"layers"`
	Manifests    []ocispec.Descriptor `json:"manifests"`
	Subject      *ocispec.Descriptor  `json:"subject"`
}

// parseDocument decodes a manifest or index. said is its type as the one who
// pointed to it has it; the document's own, which the digest covers, wins.
func parseDocument(raw []byte, said string) (*document, error) {
	var m document
	if err := json.Unmarshal(raw, &m); err != nil {
		return nil, fmt.Errorf("%w: manifest: %w", ErrMalformed, err)
	}
	if m.MediaType == "" {
		m.MediaType = said
	}
	switch {
	case isManifest(m.MediaType):
		// A document with both could be read as either.
		if m.Config == nil || m.Manifests != nil {
			return nil, fmt.Errorf("%w: a manifest with no config, or with manifests", ErrMalformed)
		}
	case isIndex(m.MediaType):
		if m.Config != nil || m.Layers != nil {
			return nil, fmt.Errorf("%w: an index with config or layers", ErrMalformed)
		}
	default:
		return nil, fmt.Errorf("%w: %q is neither manifest nor index", ErrMalformed, m.MediaType)
	}
	if len(m.Layers) > maxEntries || len(m.Manifests) > maxEntries {
		return nil, fmt.Errorf("manifest: %w of %d entries", ErrTooLarge, maxEntries)
	}
	return &m, nil
}

// document reads the manifest or index with a digest.
func (l *layout) document(d digest.Digest, said string) (*document, ocispec.Descriptor, error) {
	raw, err := l.blob(d, maxManifest)
	if err != nil {
		return nil, ocispec.Descriptor{}, err
	}
	m, err := parseDocument(raw, said)
	if err != nil {
		return nil, ocispec.Descriptor{}, fmt.Errorf("%s: %w", d, err)
	}
	return m, ocispec.Descriptor{MediaType: m.MediaType, Digest: d, Size: int64(len(raw))}, nil
}

// resolve finds the image of r: by digest, by tag, or the only one there is.
// What refers to an image is not counted as one.
func (l *layout) resolve(_ context.Context, r Ref) (ocispec.Descriptor, error) {
	idx, err := l.index()
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	if r.digest != "" {
		said := ocispec.MediaTypeImageManifest
		for _, d := range idx.Manifests {
			if string(d.Digest) == r.digest && d.MediaType != "" {
				said = d.MediaType
			}
		}
		_, d, err := l.document(digest.Digest(r.digest), said)
		return d, err
	}
	var found []ocispec.Descriptor
	seen := map[digest.Digest]bool{}
	for _, e := range idx.Manifests {
		if seen[e.Digest] || r.tag != "" && e.Annotations[ocispec.AnnotationRefName] != r.tag {
			continue
		}
		m, d, err := l.document(e.Digest, e.MediaType)
		if err != nil {
			return ocispec.Descriptor{}, err
		}
		if seen[e.Digest] = true; m.Subject == nil {
			found = append(found, d)
		}
	}
	switch {
	case len(found) == 1:
		return found[0], nil
	case len(found) == 0 && r.tag != "":
		return ocispec.Descriptor{}, fmt.Errorf("tag %q: %w", r.tag, ErrNotFound)
	case len(found) == 0:
		return ocispec.Descriptor{}, fmt.Errorf("an image: %w", ErrNotFound)
	}
	return ocispec.Descriptor{}, fmt.Errorf("%w: name one by @%s or @%s", ErrAmbiguous, found[0].Digest, found[1].Digest)
}

// checkContent compares every blob that belongs to the image with its digest.
// Whoever exchanges the binary in a layer and leaves the manifest alone is found
// here, and nowhere else: the manifest's own digest stays what it was.
func (l *layout) checkContent(ctx context.Context, root ocispec.Descriptor) error {
	seen := map[digest.Digest]bool{}
	var walk func(d ocispec.Descriptor, depth int) error
	walk = func(d ocispec.Descriptor, depth int) error {
		if seen[d.Digest] {
			return nil
		}
		seen[d.Digest] = true
		if depth > maxDepth || len(seen) > maxBlobs {
			return fmt.Errorf("image: %w", ErrTooLarge)
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		if !isManifest(d.MediaType) && !isIndex(d.MediaType) {
			return l.checkBlob(d)
		}
		m, got, err := l.document(d.Digest, d.MediaType)
		if err != nil {
			return err
		}
		if got.Size != d.Size || got.MediaType != d.MediaType {
			return fmt.Errorf("%w: %s is not of the size and type that its index says", ErrDigest, d.Digest)
		}
		parts := append(m.Manifests, m.Layers...)
		if m.Config != nil {
			parts = append(parts, *m.Config)
		}
		for _, p := range parts {
			if err := walk(p, depth+1); err != nil {
				return err
			}
		}
		return nil
	}
	return walk(root, 0)
}

func (l *layout) checkBlob(d ocispec.Descriptor) error {
	name, err := blobPath(d.Digest)
	if err != nil {
		return err
	}
	f, err := l.open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	h := sha256.New()
	// One byte more than it should have is enough to know.
	n, err := io.Copy(h, io.LimitReader(f, d.Size+1))
	if err != nil {
		return err
	}
	if got := "sha256:" + hex.EncodeToString(h.Sum(nil)); got != string(d.Digest) || n != d.Size {
		return fmt.Errorf("%w: %s was changed", ErrDigest, name)
	}
	return nil
}
