// Mksbom writes the software bill of materials of an image with Go programs, as
// CycloneDX 1.6: what the Go command recorded in each of them when it built
// them. The same image gives the same document.
//
//	mksbom DIR OUT        DIR is an OCI image layout with one image
package main

import (
	"archive/tar"
	"bytes"
	_ "crypto/sha256" // for go-digest
	"debug/buildinfo"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const maxProgram = 1 << 30 // bytes of one file in the image

func main() {
	if len(os.Args) != 3 {
		fmt.Fprintln(os.Stderr, "usage: mksbom DIR OUT")
		os.Exit(2)
	}
	if err := run(os.Args[1], os.Args[2]); err != nil {
		fmt.Fprintln(os.Stderr, "mksbom:", err)
		os.Exit(1)
	}
}

func run(dir, out string) error {
	b, err := describe(dir)
	if err != nil {
		return fmt.Errorf("%s: %w", dir, err)
	}
	raw, err := json.MarshalIndent(b, "", "  ")
	if err != nil {
		return err
	}
	if err := os.WriteFile(out, append(raw, '\n'), 0o644); err != nil {
		return err
	}
	fmt.Printf("%d components\n", len(b.Components))
	return nil
}

// The part of CycloneDX 1.6 that is used.
type bom struct {
	Format       string       `json:"bomFormat"`
	SpecVersion  string       `json:"specVersion"`
	Serial       string       `json:"serialNumber"`
	Version      int          `json:"version"`
	Metadata     metadata     `json:"metadata"`
	Components   []component  `json:"components"`
	Dependencies []dependency `json:"dependencies"`
}

type metadata struct {
	Component component `json:"component"`
}

type component struct {
	Ref     string `json:"bom-ref"`
	Type    string `json:"type"`
	Name    string `json:"name"`
	Version string `json:"version,omitempty"`
	Hashes  []hash `json:"hashes,omitempty"`
	PURL    string `json:"purl,omitempty"`
}

type hash struct {
	Alg     string `json:"alg"`
	Content string `json:"content"`
}

type dependency struct {
	Ref       string   `json:"ref"`
	DependsOn []string `json:"dependsOn,omitempty"`
}

func describe(dir string) (*bom, error) {
	var idx ocispec.Index
	raw, err := os.ReadFile(filepath.Join(dir, ocispec.ImageIndexFile))
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(raw, &idx); err != nil {
		return nil, err
	}
	if len(idx.Manifests) != 1 {
		return nil, fmt.Errorf("%d images, want one", len(idx.Manifests))
	}
	image := idx.Manifests[0]
	var m ocispec.Manifest
	if raw, err = blob(dir, image.Digest); err != nil {
		return nil, err
	}
	if err := json.Unmarshal(raw, &m); err != nil {
		return nil, err
	}
	// Not listed, but what the bill is about is the whole image.
	if _, err := blob(dir, m.Config.Digest); err != nil {
		return nil, err
	}
	b := &bom{
		Format: "CycloneDX", SpecVersion: "1.6", Version: 1, Serial: serial(image.Digest),
		Metadata: metadata{component{Ref: string(image.Digest), Type: "container", Name: filepath.Base(dir), Version: string(image.Digest), Hashes: hashes(image.Digest)}},
	}
	top := dependency{Ref: string(image.Digest)}
	for _, l := range m.Layers {
		if l.MediaType != ocispec.MediaTypeImageLayer {
			return nil, fmt.Errorf("layer of type %s", l.MediaType)
		}
		layer, err := blob(dir, l.Digest)
		if err != nil {
			return nil, err
		}
		programs, err := b.addLayer(layer)
		if err != nil {
			return nil, err
		}
		top.DependsOn = append(top.DependsOn, programs...)
	}
	if len(top.DependsOn) == 0 {
		return nil, errors.New("no Go program: a bill that lists nothing would look like a clean one")
	}
	b.Dependencies = append([]dependency{top}, b.Dependencies...)
	return b, nil
}

// blob reads a blob and believes it only when it is what its digest says.
func blob(dir string, d digest.Digest) ([]byte, error) {
	if err := d.Validate(); err != nil {
		return nil, err
	}
	raw, err := os.ReadFile(filepath.Join(dir, ocispec.ImageBlobsDir, string(d.Algorithm()), d.Encoded()))
	if err == nil && d.Algorithm().FromBytes(raw) != d {
		err = fmt.Errorf("blob %s was changed", d)
	}
	return raw, err
}

// addLayer adds the Go programs of a layer. A file that is none is listed too:
// it is in the image, and nothing is known of what it is made of.
func (b *bom) addLayer(layer []byte) (refs []string, err error) {
	for r := tar.NewReader(bytes.NewReader(layer)); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return refs, nil
		}
		if err != nil {
			return nil, err
		}
		if h.Typeflag != tar.TypeReg {
			continue
		}
		if h.Size > maxProgram {
			return nil, fmt.Errorf("%s: %d bytes", h.Name, h.Size)
		}
		data, err := io.ReadAll(r)
		if err != nil {
			return nil, err
		}
		name := path.Join("/", h.Name)
		file := component{Ref: "file:" + name, Type: "file", Name: name, Hashes: hashes(digest.FromBytes(data))}
		b.Components = append(b.Components, file)
		dep := dependency{Ref: file.Ref}
		if info, err := buildinfo.Read(bytes.NewReader(data)); err == nil {
			dep.DependsOn = b.addProgram(info)
		}
		b.Dependencies = append(b.Dependencies, dep)
		refs = append(refs, file.Ref)
	}
}

// addProgram adds the modules that a program was built from.
func (b *bom) addProgram(info *buildinfo.BuildInfo) []string {
	refs := []string{
		b.addModule("application", info.Main.Path, info.Main.Version),
		b.addModule("library", "stdlib", "v"+strings.TrimPrefix(info.GoVersion, "go")),
	}
	for _, m := range info.Deps {
		if m.Replace != nil { // what was built is the replacement
			m = m.Replace
		}
		refs = append(refs, b.addModule("library", m.Path, m.Version))
	}
	return refs
}

func (b *bom) addModule(kind, path, version string) string {
	c := component{Type: kind, Name: path, Version: version, PURL: "pkg:golang/" + path}
	if version == "(devel)" { // built from a directory
		c.Version = ""
	} else if version != "" {
		c.PURL += "@" + version
	}
	c.Ref = c.PURL
	for _, o := range b.Components {
		if o.Ref == c.Ref {
			return c.Ref
		}
	}
	b.Components = append(b.Components, c)
	return c.Ref
}

func hashes(d digest.Digest) []hash { return []hash{{"SHA-256", d.Encoded()}} }

// serial is a version 8 UUID (RFC 9562: made as its maker likes) out of the
// image's digest, where others would take a random one.
func serial(d digest.Digest) string {
	h := []byte(d.Encoded()[:32])
	h[12], h[16] = '8', "89ab"[h[16]%4]
	return fmt.Sprintf("urn:uuid:%s-%s-%s-%s-%s", h[:8], h[8:12], h[12:16], h[16:20], h[20:])
}
