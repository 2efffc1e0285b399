// Mkimage puts one static program into an OCI image layout. The same program
// gives the same image, to the last byte: no times, no owners, no compression.
//
//	mkimage BINARY DIR
package main

import (
	"archive/tar"
	"bytes"
	_ "crypto/sha256" // for go-digest
	"debug/elf"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

func main() {
	if len(os.Args) != 3 {
		fmt.Fprintln(os.Stderr, "usage: mkimage BINARY DIR")
		os.Exit(2)
	}
	d, err := build(os.Args[1], os.Args[2])
	if err != nil {
		fmt.Fprintln(os.Stderr, "mkimage:", err)
		os.Exit(1)
	}
	fmt.Println(d)
}

var architectures = map[elf.Machine]string{elf.EM_X86_64: "amd64", elf.EM_AARCH64: "arm64", elf.EM_RISCV: "riscv64", elf.EM_S390: "s390x", elf.EM_PPC64: "ppc64le"}

func build(binary, dir string) (digest.Digest, error) {
	program, err := os.ReadFile(binary)
	if err != nil {
		return "", err
	}
	arch, err := architecture(program)
	if err != nil {
		return "", fmt.Errorf("%s: %w", binary, err)
	}
	// What lies in DIR already would end up among the products.
	if err := os.Mkdir(dir, 0o755); err != nil {
		return "", err
	}
	name := filepath.Base(binary)
	layer, err := archive(name, program)
	if err != nil {
		return "", err
	}
	image := ocispec.Image{
		Platform: ocispec.Platform{Architecture: arch, OS: "linux"},
		Config:   ocispec.ImageConfig{User: "65532:65532", Entrypoint: []string{"/" + name}, WorkingDir: "/"},
		RootFS:   ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{digest.FromBytes(layer)}},
	}
	l, err := writeBlob(dir, ocispec.MediaTypeImageLayer, layer)
	if err != nil {
		return "", err
	}
	c, err := writeJSON(dir, ocispec.MediaTypeImageConfig, image)
	if err != nil {
		return "", err
	}
	m, err := writeJSON(dir, ocispec.MediaTypeImageManifest, ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, Config: c, Layers: []ocispec.Descriptor{l},
	})
	if err != nil {
		return "", err
	}
	index, err := json.Marshal(ocispec.Index{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{m},
	})
	if err != nil {
		return "", err
	}
	marker, err := json.Marshal(ocispec.ImageLayout{Version: ocispec.ImageLayoutVersion})
	if err != nil {
		return "", err
	}
	return m.Digest, errors.Join(
		os.WriteFile(filepath.Join(dir, ocispec.ImageIndexFile), index, 0o644),
		os.WriteFile(filepath.Join(dir, ocispec.ImageLayoutFile), marker, 0o644),
	)
}

// architecture also refuses what would not start: an image without a C library
// runs static programs only.
func architecture(program []byte) (string, error) {
	f, err := elf.NewFile(bytes.NewReader(program))
	if err != nil {
		return "", err
	}
	defer f.Close()
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			return "", errors.New("dynamically linked: build it with CGO_ENABLED=0")
		}
	}
	arch, ok := architectures[f.Machine]
	if !ok {
		return "", fmt.Errorf("unknown architecture %v", f.Machine)
	}
	return arch, nil
}

func archive(name string, program []byte) ([]byte, error) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o755, Size: int64(len(program)), Format: tar.FormatUSTAR}); err != nil {
		return nil, err
	}
	if _, err := w.Write(program); err != nil {
		return nil, err
	}
	err := w.Close()
	return b.Bytes(), err
}

func writeJSON(dir, mediaType string, v any) (ocispec.Descriptor, error) {
	raw, err := json.Marshal(v)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	return writeBlob(dir, mediaType, raw)
}

func writeBlob(dir, mediaType string, data []byte) (ocispec.Descriptor, error) {
	sum := digest.FromBytes(data)
	blobs := filepath.Join(dir, ocispec.ImageBlobsDir, string(digest.SHA256))
	if err := os.MkdirAll(blobs, 0o755); err != nil {
		return ocispec.Descriptor{}, err
	}
	d := ocispec.Descriptor{MediaType: mediaType, Digest: sum, Size: int64(len(data))}
	return d, os.WriteFile(filepath.Join(blobs, sum.Encoded()), data, 0o644)
}
