package oci

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"sync/atomic"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"oras.land/oras-go/v2/content"
	"oras.land/oras-go/v2/errdef"
	"oras.land/oras-go/v2/registry/remote"
	"oras.land/oras-go/v2/registry/remote/auth"
	"oras.land/oras-go/v2/registry/remote/credentials"

	"github.com/rootlink/rootlink/internal/version"
)

// repository is one repository of a registry.
type repository struct{ *remote.Repository }

// dial makes the client; nothing is sent yet. Credentials are those of docker's
// configuration file and its helpers.
func dial(r Ref) (*repository, error) {
	repo, err := remote.NewRepository(r.place)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrRef, err)
	}
	store, err := credentials.NewStoreFromDocker(credentials.StoreOptions{})
	if err != nil {
		return nil, fmt.Errorf("docker's configuration, for credentials: %w", err)
	}
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.ResponseHeaderTimeout = time.Minute
	repo.Client = &auth.Client{
		Client: &http.Client{
			Transport: &bounded{next: transport, plainHTTP: r.kind == kindPlain},
			CheckRedirect: func(_ *http.Request, via []*http.Request) error {
				if len(via) > maxRedirects {
					return fmt.Errorf("%w: %d redirects", ErrMalformed, len(via))
				}
				return nil
			},
		},
		Header:     http.Header{"User-Agent": {"rootlink/" + version.String()}},
		Cache:      auth.NewCache(),
		Credential: credentials.Credential(store),
	}
	repo.PlainHTTP = r.kind == kindPlain
	repo.MaxMetadataBytes = maxManifest
	repo.SkipReferrersGC = true // deleting is what a recorder of evidence should need no right to
	return &repository{repo}, nil
}

// bounded is a transport that one registry cannot keep busy for ever, and that
// no redirect and no token server's address leads out of TLS.
type bounded struct {
	next      http.RoundTripper
	plainHTTP bool
	requests  atomic.Int64
	received  atomic.Int64
}

func (b *bounded) RoundTrip(req *http.Request) (*http.Response, error) {
	if req.URL.Scheme != "https" && !b.plainHTTP {
		return nil, fmt.Errorf("%w: %s", ErrPlainHTTP, req.URL.Redacted())
	}
	if b.requests.Add(1) > maxRequests {
		return nil, fmt.Errorf("registry: %w of %d requests", ErrTooLarge, maxRequests)
	}
	resp, err := b.next.RoundTrip(req)
	if err == nil {
		resp.Body = &metered{resp.Body, &b.received}
	}
	return resp, err
}

type metered struct {
	io.ReadCloser
	total *atomic.Int64
}

func (m *metered) Read(p []byte) (int, error) {
	n, err := m.ReadCloser.Read(p)
	if m.total.Add(int64(n)) > maxReceived {
		return n, fmt.Errorf("registry: %w of %d bytes", ErrTooLarge, maxReceived)
	}
	return n, err
}

// resolve fetches the manifest of r and takes its digest from the bytes, not
// from the registry's word.
func (reg *repository) resolve(ctx context.Context, r Ref) (ocispec.Descriptor, error) {
	want := r.digest
	if want == "" {
		want = r.tag
	}
	if want == "" {
		return ocispec.Descriptor{}, fmt.Errorf("%w: name the image by :TAG or @sha256:…", ErrRef)
	}
	d, body, err := reg.Manifests().FetchReference(ctx, want)
	if err != nil {
		return ocispec.Descriptor{}, remoteError(err)
	}
	defer body.Close()
	if d.Size > maxManifest {
		return ocispec.Descriptor{}, fmt.Errorf("manifest of %d bytes: %w", d.Size, ErrTooLarge)
	}
	raw, err := content.ReadAll(body, d)
	if err != nil {
		return ocispec.Descriptor{}, remoteError(err)
	}
	got := digestOf(raw)
	if r.digest != "" && got != r.digest {
		return ocispec.Descriptor{}, fmt.Errorf("%w: the registry served %s", ErrDigest, got)
	}
	if got != string(d.Digest) {
		return ocispec.Descriptor{}, fmt.Errorf("%w: the registry says %s and served %s", ErrDigest, d.Digest, got)
	}
	m, err := parseDocument(raw, d.MediaType)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	return ocispec.Descriptor{MediaType: m.MediaType, Digest: d.Digest, Size: int64(len(raw))}, nil
}

// fetch reads content whose descriptor a stranger may have written.
func (reg *repository) fetch(ctx context.Context, d ocispec.Descriptor, limit int64) ([]byte, error) {
	if err := checkDigest(string(d.Digest)); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	if d.Size < 0 || d.Size > limit {
		return nil, fmt.Errorf("%s of %d bytes: %w of %d", d.Digest, d.Size, ErrTooLarge, limit)
	}
	raw, err := content.FetchAll(ctx, reg, d)
	return raw, remoteError(err)
}

func (reg *repository) close() {}

// checkContent has nothing to compare: blobs are compared when they are pulled.
func (reg *repository) checkContent(context.Context, ocispec.Descriptor) error { return nil }

// push stores the layer, the empty config and the manifest that refers to the
// subject. A registry without the referrers API gets the index under a tag that
// the distribution specification has for those.
func (reg *repository) push(ctx context.Context, it Item, subject ocispec.Descriptor) (string, bool, error) {
	manifest, layer, kind, err := referrer(it, subject)
	if err != nil {
		return "", false, err
	}
	d := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, ArtifactType: kind, Digest: digestDescriptor(manifest), Size: int64(len(manifest))}
	if there, err := reg.Manifests().Exists(ctx, d); err != nil {
		return "", false, remoteError(err)
	} else if there {
		return string(d.Digest), true, nil
	}
	for _, b := range []struct {
		d    ocispec.Descriptor
		data []byte
	}{{ocispec.DescriptorEmptyJSON, ocispec.DescriptorEmptyJSON.Data}, {layer, it.Data}} {
		there, err := reg.Blobs().Exists(ctx, b.d)
		if err == nil && !there {
			err = reg.Blobs().Push(ctx, b.d, bytes.NewReader(b.data))
		}
		if err != nil {
			return "", false, remoteError(err)
		}
	}
	return string(d.Digest), false, remoteError(reg.Manifests().Push(ctx, d, bytes.NewReader(manifest)))
}

// errEnough ends a listing.
var errEnough = fmt.Errorf("referrers: %w of %d", ErrTooLarge, maxReferrers)

// referrers asks for all types, because registries differ in how they filter.
func (reg *repository) referrers(ctx context.Context, subject ocispec.Descriptor, f func(found) error) error {
	var list []ocispec.Descriptor
	n := 0
	err := reg.Referrers(ctx, subject, "", func(page []ocispec.Descriptor) error {
		if n += len(page); n > maxReferrers {
			return errEnough
		}
		for _, d := range page {
			if known(d.ArtifactType) {
				list = append(list, d)
			}
		}
		return nil
	})
	if err != nil {
		return remoteError(err)
	}
	for _, d := range list {
		r, err := reg.referrer(ctx, d, subject)
		if err == nil {
			err = f(r)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (reg *repository) referrer(ctx context.Context, d, subject ocispec.Descriptor) (found, error) {
	r := found{digest: d.Digest, kind: d.ArtifactType}
	raw, err := reg.fetch(ctx, d, maxManifest)
	if err != nil {
		return r, err
	}
	m, err := parseDocument(raw, d.MediaType)
	if err != nil {
		r.problem = err
		return r, nil
	}
	// The registry made the list. One that lists what is another image's would
	// have us judge that image by its bundles.
	if m.Subject == nil || m.Subject.Digest != subject.Digest {
		return r, fmt.Errorf("%s: %w", d.Digest, ErrForeignReferrer)
	}
	if m.kind() != d.ArtifactType {
		return r, fmt.Errorf("%w: %s is listed as %q and is %q", ErrMalformed, d.Digest, d.ArtifactType, m.kind())
	}
	layer, err := m.content()
	if err != nil {
		r.problem = err
		return r, nil
	}
	r.title = layer.Annotations[ocispec.AnnotationTitle]
	r.data, err = reg.fetch(ctx, layer, limitOf(r.kind))
	return r, err
}

// remoteError gives oras-go's errors our names.
func remoteError(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, errdef.ErrNotFound):
		return fmt.Errorf("%w: %w", ErrNotFound, err)
	case errors.Is(err, content.ErrMismatchedDigest), errors.Is(err, content.ErrTrailingData), errors.Is(err, content.ErrInvalidDescriptorSize):
		return fmt.Errorf("%w: %w", ErrDigest, err)
	case errors.Is(err, errdef.ErrSizeExceedsLimit):
		return fmt.Errorf("%w: %w", ErrTooLarge, err)
	}
	return err
}
