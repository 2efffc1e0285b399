package oci

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"regexp"
	"strings"
	"sync"

	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/rootlink/rootlink/pkg/link"
)

// artifactType is that of the referrers which hold a bundle; cosign and others
// that know Sigstore's bundles look for it. companionType is ours, for the files
// that lie beside a bundle and that the bundle names by digest.
const (
	artifactType  = link.BundleMediaType
	companionType = "application/vnd.rootlink.companion.v1"
)

// The annotations that cosign writes and reads.
const (
	annotationContent   = "dev.sigstore.bundle.content"
	annotationPredicate = "dev.sigstore.bundle.predicateType"
)

// Item is a bundle, or a file that lies beside one.
type Item struct {
	Name string // without a directory
	Data []byte
}

// ErrItem: not a file that is stored beside images.
var ErrItem = errors.New("neither a bundle nor a file that lies beside one")

// companionName is what such files are called: the digest says what they are, so
// that a bundle finds them wherever both lie.
var companionName = sync.OnceValue(func() *regexp.Regexp {
	return regexp.MustCompile(`^[a-z0-9]{1,16}-[0-9a-f]{40,128}\.(eventlog|tlog\.json|evidence\.cbor)$`)
})

// plainName is a name that no shell, terminal or file system takes for more.
var plainName = sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9._-]{0,200}$`) })

// kind returns the artifact type of an item.
func (it Item) kind() (string, error) {
	switch {
	case companionName().MatchString(it.Name):
		if len(it.Data) > maxCompanion {
			return "", fmt.Errorf("%s: %w of %d bytes", it.Name, ErrTooLarge, maxCompanion)
		}
		return companionType, nil
	case len(it.Data) > maxBundle:
		return "", fmt.Errorf("%s: %w of %d bytes", it.Name, ErrTooLarge, maxBundle)
	case !link.IsBundle(it.Data):
		return "", fmt.Errorf("%s: %w", it.Name, ErrItem)
	}
	return artifactType, nil
}

// name returns the name under which data from a stranger is kept. What he calls
// it counts only when that is harmless: a title of "../../.bashrc" is an old trick.
func safeName(title, kind string, data []byte) (string, error) {
	if kind == companionType {
		if !companionName().MatchString(title) {
			return "", fmt.Errorf("%w: it is called %q", ErrItem, title)
		}
		return title, nil
	}
	if plainName().MatchString(title) && strings.HasSuffix(title, link.BundleSuffix) {
		return title, nil
	}
	return fmt.Sprintf("sha256-%x%s", sha256.Sum256(data), link.BundleSuffix), nil
}

// otherName makes room for a second bundle of one name. The digest is whole, so
// that nobody can take that name too.
func otherName(name string, data []byte) string {
	suffix := fmt.Sprintf(".%x%s", sha256.Sum256(data), link.BundleSuffix)
	if strings.HasSuffix(name, suffix) {
		return name
	}
	return strings.TrimSuffix(name, link.BundleSuffix) + suffix
}

// referrer is the manifest that attaches an item to an image. It holds no time,
// so that attaching the same twice is attaching it once.
func referrer(it Item, subject ocispec.Descriptor) (manifest []byte, layer ocispec.Descriptor, kind string, err error) {
	if kind, err = it.kind(); err != nil {
		return nil, layer, "", err
	}
	subject.Annotations, subject.URLs, subject.Platform, subject.Data, subject.ArtifactType = nil, nil, nil, nil, ""
	layer = ocispec.Descriptor{
		MediaType: kind, Digest: digestDescriptor(it.Data), Size: int64(len(it.Data)),
		Annotations: map[string]string{ocispec.AnnotationTitle: filepath.Base(it.Name)},
	}
	m := ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, ArtifactType: kind,
		Config: ocispec.DescriptorEmptyJSON, Layers: []ocispec.Descriptor{layer}, Subject: &subject,
	}
	if kind == artifactType {
		m.Annotations = map[string]string{annotationContent: "dsse-envelope"}
		if p := PredicateType(it.Data); p != "" {
			m.Annotations[annotationPredicate] = p
		}
	}
	manifest, err = json.Marshal(m)
	return manifest, layer, kind, err
}

// content returns what a referrer's manifest holds: one layer of its own type,
// of a size that is worth asking for.
func (m *document) content() (ocispec.Descriptor, error) {
	kind := m.kind()
	if len(m.Layers) != 1 || m.Layers[0].MediaType != kind {
		return ocispec.Descriptor{}, fmt.Errorf("%w: a referrer of %s with %d layers, or another type of layer", ErrMalformed, kind, len(m.Layers))
	}
	l := m.Layers[0]
	if limit := limitOf(kind); l.Size < 0 || l.Size > limit {
		return l, fmt.Errorf("%d bytes: %w of %d", l.Size, ErrTooLarge, limit)
	}
	if err := checkDigest(string(l.Digest)); err != nil {
		return l, fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	return l, nil
}

// kind is the artifact type, which older registries keep as that of the config.
func (m *document) kind() string {
	if m.ArtifactType == "" && m.Config != nil {
		return m.Config.MediaType
	}
	return m.ArtifactType
}

func known(kind string) bool { return kind == artifactType || kind == companionType }

func limitOf(kind string) int64 {
	if kind == companionType {
		return maxCompanion
	}
	return maxBundle
}

// envelope is as much of a bundle as it takes to sort it. Nothing is verified.
type envelope struct {
	Envelope struct {
		Payload string `json:"payload"`
	} `json:"dsseEnvelope"`
}

type claim struct {
	PredicateType string `json:"predicateType"`
	Subject       []struct {
		Digest map[string]string `json:"digest"`
	} `json:"subject"`
}

func readClaim(bundle []byte) (c claim, err error) {
	var e envelope
	if err := json.Unmarshal(bundle, &e); err != nil {
		return c, err
	}
	payload, err := base64.StdEncoding.DecodeString(e.Envelope.Payload)
	if err != nil {
		return c, err
	}
	return c, json.Unmarshal(payload, &c)
}

// PredicateType returns what a bundle claims to hold, "" when it cannot be told.
func PredicateType(bundle []byte) string {
	c, err := readClaim(bundle)
	if err != nil || len(c.PredicateType) > 1024 {
		return ""
	}
	return c.PredicateType
}

// about reports whether a bundle claims to be about an image.
func about(bundle []byte, digest string) bool {
	c, err := readClaim(bundle)
	if err != nil {
		return false
	}
	for _, s := range c.Subject {
		if "sha256:"+s.Digest["sha256"] == digest {
			return true
		}
	}
	return false
}
