package oci

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/rootlink/rootlink/internal/files"
	"github.com/rootlink/rootlink/pkg/link"
)

func digestDescriptor(data []byte) digest.Digest { return digest.Digest(digestOf(data)) }

// Resolve finds the image that ref names and returns what a statement says of
// it: its name, and its digest as lower-case hex of SHA-256 over the manifest.
// In a layout every blob of the image is compared with its digest too; what a
// registry serves is compared when it is pulled.
func Resolve(ctx context.Context, ref string) (name, digest string, err error) {
	r, p, err := open(ref)
	if err != nil {
		return "", "", err
	}
	defer p.close()
	ctx, cancel := context.WithTimeout(ctx, maxTime)
	defer cancel()
	d, err := p.resolve(ctx, r)
	if err == nil {
		err = p.checkContent(ctx, d)
	}
	if err != nil {
		return "", "", fmt.Errorf("%s: %w", r, err)
	}
	return r.name(), strings.TrimPrefix(string(d.Digest), "sha256:"), nil
}

// place is where images are, and bundles as their referrers.
type place interface {
	// resolve finds an image. The digest is that of the bytes that were read.
	resolve(ctx context.Context, r Ref) (ocispec.Descriptor, error)
	// checkContent compares with their digests the blobs that lie here.
	checkContent(ctx context.Context, d ocispec.Descriptor) error
	// push stores a referrer and its one layer. It says whether it was there.
	push(ctx context.Context, it Item, subject ocispec.Descriptor) (digest string, existed bool, err error)
	// referrers calls f with each referrer of a known type. Content that is not
	// what its digest says, and a referrer of another image, are errors.
	referrers(ctx context.Context, subject ocispec.Descriptor, f func(found) error) error
	close()
}

func open(ref string) (Ref, place, error) {
	r, err := ParseRef(ref)
	if err != nil {
		return r, nil, err
	}
	var p place
	switch r.kind {
	case kindLayout:
		p, err = openLayout(r.place)
	case kindRegistry, kindPlain:
		p, err = dial(r)
	default:
		err = fmt.Errorf("%w: %s holds bundles, no image", ErrRef, r)
	}
	return r, p, err
}

// found is a referrer that a place holds.
type found struct {
	digest  digest.Digest
	kind    string
	title   string // what the one who attached it calls it
	data    []byte
	problem error // instead of data: it is not in a form that holds anything
}

// Attached is what became of an item.
type Attached struct {
	Name    string `json:"name"`
	Digest  string `json:"digest"`  // of the referrer's manifest, or of a file
	Existed bool   `json:"existed"` // it was there already
}

// Attach stores items as referrers of an image, or in a directory. Items that
// are there already are left as they are, and nothing is ever overwritten.
func Attach(ctx context.Context, ref string, items []Item) ([]Attached, error) {
	for _, it := range items {
		if _, err := it.kind(); err != nil {
			return nil, err
		}
	}
	if r, err := ParseRef(ref); err != nil {
		return nil, err
	} else if r.kind == kindDir {
		return putFiles(r.place, items)
	}
	r, p, err := open(ref)
	if err != nil {
		return nil, err
	}
	defer p.close()
	ctx, cancel := context.WithTimeout(ctx, maxTime)
	defer cancel()
	subject, err := p.resolve(ctx, r)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", r, err)
	}
	var out []Attached
	for _, it := range items {
		a := Attached{Name: it.Name}
		if a.Digest, a.Existed, err = p.push(ctx, it, subject); err != nil {
			return out, fmt.Errorf("%s to %s: %w", it.Name, r, err)
		}
		out = append(out, a)
	}
	return out, nil
}

// Fetched is what a place held. None of it is verified.
type Fetched struct {
	Image  string // its name for statements; "" for a directory
	Digest string // hex of SHA-256; "" for a directory without a digest in its reference
	Items  []Item // names differ
	// Skipped says what a referrer was passed over for. They are a stranger's to
	// make: one that is broken must not hide the others.
	Skipped []string
}

// Bundles are the items that are no companions.
func (f *Fetched) Bundles() (out []Item) {
	for _, it := range f.Items {
		if strings.HasSuffix(it.Name, link.BundleSuffix) {
			out = append(out, it)
		}
	}
	return out
}

// Fetch reads the bundles that are attached to an image, and what lies beside them.
func Fetch(ctx context.Context, ref string) (*Fetched, error) {
	r, err := ParseRef(ref)
	if err != nil {
		return nil, err
	}
	f := &Fetched{}
	if r.kind == kindDir {
		f.Digest = strings.TrimPrefix(r.digest, "sha256:")
		return f, f.readDir(r)
	}
	r, p, err := open(ref)
	if err != nil {
		return nil, err
	}
	defer p.close()
	ctx, cancel := context.WithTimeout(ctx, maxTime)
	defer cancel()
	d, err := p.resolve(ctx, r)
	if err == nil {
		err = p.checkContent(ctx, d)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", r, err)
	}
	f.Image, f.Digest = r.name(), strings.TrimPrefix(string(d.Digest), "sha256:")
	total := 0
	err = p.referrers(ctx, d, func(r found) error {
		if total += len(r.data); total > maxFetched {
			return fmt.Errorf("bundles: %w of %d bytes", ErrTooLarge, maxFetched)
		}
		if r.problem == nil {
			r.problem = f.add(r.kind, r.title, r.data)
		}
		if r.problem != nil {
			f.Skipped = append(f.Skipped, fmt.Sprintf("%s: %v", r.digest, r.problem))
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("%s: %w", r, err)
	}
	return f, nil
}

// add takes in what a stranger calls title.
func (f *Fetched) add(kind, title string, data []byte) error {
	if kind == artifactType && !link.IsBundle(data) {
		return ErrItem
	}
	name, err := safeName(title, kind, data)
	if err != nil {
		return err
	}
	for i := 0; i < len(f.Items); i++ {
		if f.Items[i].Name != name {
			continue
		}
		if bytes.Equal(f.Items[i].Data, data) {
			return nil
		}
		other := otherName(name, data)
		if kind == companionType || other == name {
			return fmt.Errorf("%w: a second file called %q", ErrItem, title)
		}
		name, i = other, -1
	}
	f.Items = append(f.Items, Item{name, data})
	return nil
}

// readDir reads the bundles of a directory; with a digest, only those about that
// image. It is the caller's own, so what is wrong in it is an error.
func (f *Fetched) readDir(r Ref) error {
	entries, err := os.ReadDir(r.place)
	if err != nil {
		return err
	}
	total := 0
	for _, e := range entries {
		name := e.Name()
		companion := companionName().MatchString(name)
		if !e.Type().IsRegular() || !companion && !strings.HasSuffix(name, link.BundleSuffix) {
			continue
		}
		raw, err := files.Read(filepath.Join(r.place, name), maxBundle)
		if err != nil {
			return err
		}
		if !companion && r.digest != "" && !about(raw, r.digest) {
			continue
		}
		if total += len(raw); total > maxFetched {
			return fmt.Errorf("%s: %w of %d bytes", r, ErrTooLarge, maxFetched)
		}
		f.Items = append(f.Items, Item{name, raw})
	}
	return nil
}

// putFiles writes items into a directory. A bundle whose name is taken by another
// one gets a name of its own: both are evidence.
func putFiles(dir string, items []Item) (out []Attached, err error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	for _, it := range items {
		names := []string{filepath.Base(it.Name)}
		if strings.HasSuffix(it.Name, link.BundleSuffix) {
			names = append(names, otherName(names[0], it.Data))
		}
		a := Attached{Name: names[0], Digest: digestOf(it.Data)}
		for _, n := range names {
			a.Name = n
			if a.Existed, err = putFile(filepath.Join(dir, n), it.Data); !errors.Is(err, fs.ErrExist) {
				break
			}
		}
		if err != nil {
			return out, err
		}
		out = append(out, a)
	}
	return out, nil
}

func putFile(path string, data []byte) (existed bool, err error) {
	err = files.WriteNew(path, data, 0o644)
	if !errors.Is(err, fs.ErrExist) {
		return false, err
	}
	old, readErr := files.Read(path, maxBundle)
	if readErr == nil && bytes.Equal(old, data) {
		return true, nil
	}
	return false, err
}
