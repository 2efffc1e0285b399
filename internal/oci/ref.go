// Package oci finds images by digest in OCI image layouts and registries, and
// stores bundles beside them as referrers, in the form that cosign reads.
//
// A registry or layout is a place, never an authority: all that is taken from it
// is compared with the digest under which it was asked for, and what it says
// about bundles is for pkg/link to judge.
package oci

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"path/filepath"
	"strings"

	"oras.land/oras-go/v2/registry"
)

// What a caller can tell apart.
var (
	ErrRef       = errors.New("not a reference to an image")
	ErrNotFound  = errors.New("not found")
	ErrAmbiguous = errors.New("more than one image")
	// ErrDigest: content is not what its digest says. Somebody exchanged it.
	ErrDigest = errors.New("content does not match its digest")
	// ErrMalformed: the layout or registry holds something that is not OCI.
	ErrMalformed = errors.New("malformed")
	ErrTooLarge  = errors.New("over the size limit")
	// ErrForeignReferrer: offered as a referrer of one image, it names another.
	ErrForeignReferrer = errors.New("refers to another image")
	// ErrPlainHTTP: the registry leads to an unencrypted address.
	ErrPlainHTTP = errors.New("refused to go on without TLS")
)

// The kinds of places.
const (
	kindLayout   = "oci-layout"
	kindRegistry = "oci"
	kindPlain    = "oci+http" // a registry without TLS, on the word of who typed it
	kindDir      = "dir"
)

// Ref names an image, or a directory of bundles.
type Ref struct {
	kind   string
	place  string // directory, or HOST/REPOSITORY
	tag    string
	digest string // "sha256:" and hex, or ""
}

// IsRef reports whether s begins as the reference to an image does.
func IsRef(s string) bool {
	return strings.HasPrefix(s, kindLayout+":") || strings.HasPrefix(s, kindRegistry+":") || strings.HasPrefix(s, kindPlain+":")
}

// Plain turns the reference to an image in a registry into one that is reached
// without TLS, and leaves others alone.
func Plain(s string) string {
	if rest, ok := strings.CutPrefix(s, kindRegistry+":"); ok {
		return kindPlain + ":" + rest
	}
	return s
}

// ParseRef reads
//
//	oci-layout:DIR[:TAG][@sha256:…]
//	oci:HOST[:PORT]/REPOSITORY[:TAG][@sha256:…]    (oci+http: without TLS)
//	dir:DIR[@sha256:…]
//
// The prefix keeps a file's name from being taken for an address.
func ParseRef(s string) (Ref, error) {
	bad := func(format string, args ...any) (Ref, error) {
		return Ref{}, fmt.Errorf("%w: %q: %w", ErrRef, s, fmt.Errorf(format, args...))
	}
	if len(s) > maxRefLength {
		return Ref{}, fmt.Errorf("%w: %d bytes long", ErrRef, len(s))
	}
	kind, rest, ok := strings.Cut(s, ":")
	if !ok {
		return bad("it begins with none of oci-layout:, oci:, dir:")
	}
	r := Ref{kind: kind, place: rest}
	if i := strings.LastIndex(r.place, "@"); i >= 0 && strings.Contains(r.place[i:], ":") {
		r.place, r.digest = r.place[:i], r.place[i+1:]
		if err := checkDigest(r.digest); err != nil {
			return bad("%w", err)
		}
	}
	switch kind {
	case kindLayout:
		r.place, r.tag = cutTag(r.place)
	case kindRegistry, kindPlain:
		r.place, r.tag = cutTag(r.place)
		if _, err := registry.ParseReference(r.place); err != nil {
			return bad("%w", err)
		}
	case kindDir:
	default:
		return bad("it begins with none of oci-layout:, oci:, dir:")
	}
	if r.place == "" {
		return bad("it names no place")
	}
	if r.tag != "" {
		if err := (registry.Reference{Reference: r.tag}).ValidateReferenceAsTag(); err != nil {
			return bad("%w", err)
		}
	}
	return r, nil
}

// cutTag takes off a tag: what follows a colon in the last element.
func cutTag(place string) (string, string) {
	i := strings.LastIndex(place, ":")
	if i <= strings.LastIndex(place, "/") {
		return place, ""
	}
	return place[:i], place[i+1:]
}

// checkDigest takes SHA-256 only: that is what statements name images by.
func checkDigest(d string) error {
	h, ok := strings.CutPrefix(d, "sha256:")
	if raw, err := hex.DecodeString(h); !ok || err != nil || len(raw) != sha256.Size || h != strings.ToLower(h) {
		return fmt.Errorf("digest %q is not sha256: and 64 lower-case hexadecimal digits", d)
	}
	return nil
}

func digestOf(data []byte) string {
	sum := sha256.Sum256(data)
	return "sha256:" + hex.EncodeToString(sum[:])
}

// String is the reference as it would be typed.
func (r Ref) String() string {
	s := r.kind + ":" + r.place
	if r.tag != "" {
		s += ":" + r.tag
	}
	if r.digest != "" {
		s += "@" + r.digest
	}
	return s
}

// Pinned is ref with the digest that it was resolved to.
func Pinned(ref, hexDigest string) string {
	r, err := ParseRef(ref)
	if err != nil {
		return ref
	}
	r.tag, r.digest = "", "sha256:"+hexDigest
	return r.String()
}

// name is what a statement calls the image: the repository, as cosign has it,
// or the last element of the layout's directory.
func (r Ref) name() string {
	if r.kind == kindRegistry || r.kind == kindPlain {
		return r.place
	}
	abs, err := filepath.Abs(r.place)
	if err != nil {
		abs = r.place
	}
	return filepath.Base(abs)
}
