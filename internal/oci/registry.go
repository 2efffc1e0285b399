package oci

import (
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
func dial(r Ref, o options) (*repository, error) {
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
			Transport: &bounded{next: transport, plainHTTP: o.plainHTTP},
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
	repo.PlainHTTP = o.plainHTTP
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
