package oci

import (
	"context"
	"fmt"
	"strings"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Resolve finds the image that ref names and returns what a statement says of
// it: its name, and its digest as lower-case hex of SHA-256 over the manifest.
// In a layout every blob of the image is compared with its digest too; what a
// registry serves is compared when it is pulled.
func Resolve(ctx context.Context, ref string, opts ...Option) (name, digest string, err error) {
	r, err := ParseRef(ref)
	if err != nil {
		return "", "", err
	}
	var d ocispec.Descriptor
	switch r.kind {
	case kindLayout:
		l, err := openLayout(r.place)
		if err != nil {
			return "", "", err
		}
		defer l.close()
		if d, err = l.resolve(r); err != nil {
			return "", "", fmt.Errorf("%s: %w", r, err)
		}
		if err := l.checkContent(ctx, d); err != nil {
			return "", "", fmt.Errorf("%s: %w", r, err)
		}
	case kindRegistry:
		reg, err := dial(r, apply(opts))
		if err != nil {
			return "", "", err
		}
		ctx, cancel := context.WithTimeout(ctx, maxTime)
		defer cancel()
		if d, err = reg.resolve(ctx, r); err != nil {
			return "", "", fmt.Errorf("%s: %w", r, err)
		}
	default:
		return "", "", fmt.Errorf("%w: %s holds bundles, no image", ErrRef, r)
	}
	return r.name(), strings.TrimPrefix(string(d.Digest), "sha256:"), nil
}
