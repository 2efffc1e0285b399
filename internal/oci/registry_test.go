package oci

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"oras.land/oras-go/v2/registry/remote/auth"
)

// registryServer is as much of the distribution specification as pulling,
// pushing and listing referrers takes. The fields make it misbehave.
type registryServer struct {
	mu        sync.Mutex
	blobs     map[string][]byte // by digest
	manifests map[string][]byte // by digest and by tag
	types     map[string]string // of manifests
	requests  []string

	noReferrers bool                                                // an older registry
	intercept   func(w http.ResponseWriter, r *http.Request) bool   // true: it has answered
	list        func([]ocispec.Descriptor) []ocispec.Descriptor     // what the referrers API says
	serve       func(r *http.Request, d string, data []byte) []byte // what is served under a digest
}

func startRegistry(t *testing.T) (*registryServer, string) {
	t.Helper()
	// Credentials of whoever runs the tests are none of theirs.
	t.Setenv("DOCKER_CONFIG", t.TempDir())
	s := &registryServer{blobs: map[string][]byte{}, manifests: map[string][]byte{}, types: map[string]string{}}
	srv := httptest.NewServer(s)
	t.Cleanup(srv.Close)
	return s, strings.TrimPrefix(srv.URL, "http://")
}

func (s *registryServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.requests = append(s.requests, r.Method+" "+r.URL.Path)
	if s.intercept != nil && s.intercept(w, r) {
		return
	}
	rest, ok := strings.CutPrefix(r.URL.Path, "/v2/team/hello/")
	kind, ref, _ := strings.Cut(rest, "/")
	switch {
	case !ok:
		http.NotFound(w, r)
	case kind == "referrers" && !s.noReferrers:
		s.referrers(w, ref)
	case kind == "blobs" && strings.HasPrefix(ref, "uploads/"):
		body, _ := io.ReadAll(r.Body)
		switch r.Method {
		case http.MethodPost:
			w.Header().Set("Location", "/v2/team/hello/blobs/uploads/1")
			w.WriteHeader(http.StatusAccepted)
		case http.MethodPut:
			s.blobs[r.URL.Query().Get("digest")] = body
			w.WriteHeader(http.StatusCreated)
		}
	case kind == "blobs":
		s.get(w, r, s.blobs[ref], "application/octet-stream", ref)
	case kind == "manifests" && r.Method == http.MethodPut:
		body, _ := io.ReadAll(r.Body)
		d := digest.FromBytes(body).String()
		for _, name := range []string{d, ref} {
			s.manifests[name], s.types[name] = body, r.Header.Get("Content-Type")
		}
		if m := parse(body); m.Subject != nil && !s.noReferrers {
			w.Header().Set("OCI-Subject", m.Subject.Digest.String())
		}
		w.WriteHeader(http.StatusCreated)
	case kind == "manifests":
		s.get(w, r, s.manifests[ref], s.types[ref], ref)
	default:
		http.NotFound(w, r)
	}
}

func parse(raw []byte) (m ocispec.Manifest) {
	_ = json.Unmarshal(raw, &m)
	return m
}

func (s *registryServer) get(w http.ResponseWriter, r *http.Request, data []byte, mediaType, ref string) {
	if data == nil {
		http.NotFound(w, r)
		return
	}
	d := digest.FromBytes(data).String()
	if s.serve != nil {
		data = s.serve(r, ref, data)
	}
	w.Header().Set("Content-Type", mediaType)
	w.Header().Set("Docker-Content-Digest", d)
	w.Header().Set("Content-Length", fmt.Sprint(len(data)))
	if r.Method == http.MethodGet {
		_, _ = w.Write(data)
	}
}

func (s *registryServer) referrers(w http.ResponseWriter, subject string) {
	list := []ocispec.Descriptor{}
	for name, raw := range s.manifests {
		m := parse(raw)
		if strings.HasPrefix(name, "sha256:") && m.Subject != nil && m.Subject.Digest.String() == subject {
			list = append(list, ocispec.Descriptor{MediaType: m.MediaType, ArtifactType: m.ArtifactType, Digest: digest.Digest(name), Size: int64(len(raw))})
		}
	}
	if s.list != nil {
		list = s.list(list)
	}
	w.Header().Set("Content-Type", ocispec.MediaTypeImageIndex)
	_ = json.NewEncoder(w).Encode(ocispec.Index{MediaType: ocispec.MediaTypeImageIndex, Manifests: list})
}

// push puts an image into the registry under a tag.
func (s *registryServer) push(im *testImage, tag string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for d, b := range im.blobs {
		s.blobs[d.String()] = b
	}
	raw := im.blobs[im.manifest.Digest]
	for _, name := range []string{tag, im.manifest.Digest.String()} {
		s.manifests[name], s.types[name] = raw, im.manifest.MediaType
	}
}

func TestResolveRegistry(t *testing.T) {
	s, host := startRegistry(t)
	im := newImage(t, "hello")
	s.push(im, "v1")
	for _, ref := range []string{":v1", "@" + im.manifest.Digest.String(), ":v1@" + im.manifest.Digest.String()} {
		name, d, err := resolve(t, "oci+http:"+host+"/team/hello"+ref)
		if err != nil || name != host+"/team/hello" || d != im.manifest.Digest.Encoded() {
			t.Errorf("%s: %q %q %v", ref, name, d, err)
		}
	}
	if _, _, err := resolve(t, "oci+http:"+host+"/team/hello:v2"); !errors.Is(err, ErrNotFound) {
		t.Error(err)
	}
	if _, _, err := resolve(t, "oci+http:"+host+"/team/hello"); !errors.Is(err, ErrRef) {
		t.Errorf("neither tag nor digest: %v", err)
	}
}

// The registry, or whoever sits between, serves another manifest for a digest.
func TestRefusesAnotherManifestForADigest(t *testing.T) {
	s, host := startRegistry(t)
	good, evil := newImage(t, "good"), newImage(t, "evil")
	s.push(good, "v1")
	s.push(evil, "v2")
	raw := evil.blobs[evil.manifest.Digest]
	for name, header := range map[string]string{"which it admits": evil.manifest.Digest.String(), "which it denies": good.manifest.Digest.String(), "of which it says nothing": ""} {
		s.intercept = func(w http.ResponseWriter, r *http.Request) bool {
			w.Header().Set("Content-Type", ocispec.MediaTypeImageManifest)
			if header != "" {
				w.Header().Set("Docker-Content-Digest", header)
			}
			w.Header().Set("Content-Length", fmt.Sprint(len(raw)))
			if r.Method == http.MethodGet {
				_, _ = w.Write(raw)
			}
			return true
		}
		if _, d, err := resolve(t, "oci+http:"+host+"/team/hello@"+good.manifest.Digest.String()); err == nil {
			t.Errorf("%s: resolved to %s", name, d)
		}
	}
	// By tag there is no digest to ask for; what comes back is that of the bytes.
	if _, d, err := resolve(t, "oci+http:"+host+"/team/hello:v1"); err == nil && d != evil.manifest.Digest.Encoded() {
		t.Errorf("digest %s is not that of what was served", d)
	}
}

func TestRefusesHugeManifest(t *testing.T) {
	s, host := startRegistry(t)
	s.intercept = func(w http.ResponseWriter, r *http.Request) bool {
		w.Header().Set("Content-Type", ocispec.MediaTypeImageManifest)
		w.Header().Set("Docker-Content-Digest", "sha256:"+strings.Repeat("0", 64))
		w.Header().Set("Content-Length", fmt.Sprint(int64(1)<<40))
		if r.Method == http.MethodGet {
			_, _ = w.Write(make([]byte, 1<<20))
		}
		return true
	}
	if _, _, err := resolve(t, "oci+http:"+host+"/team/hello:v1"); !errors.Is(err, ErrTooLarge) {
		t.Error(err)
	}
}

// Nothing travels unencrypted that was not asked to: neither the first request
// nor one to which the registry or its token server leads.
func TestRefusesToLeaveTLS(t *testing.T) {
	plain, host := startRegistry(t)
	plain.push(newImage(t, "hello"), "v1")
	if _, _, err := resolve(t, "oci:"+host+"/team/hello:v1"); err == nil {
		t.Error("resolved without TLS")
	}
	if len(plain.requests) != 0 {
		t.Errorf("it was asked: %q", plain.requests)
	}
	for name, answer := range map[string]http.HandlerFunc{
		"redirect": func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "http://"+host+r.URL.Path, http.StatusTemporaryRedirect)
		},
		"token server": func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("WWW-Authenticate", `Bearer realm="http://`+host+`/token",service="x"`)
			w.WriteHeader(http.StatusUnauthorized)
		},
	} {
		srv := httptest.NewTLSServer(answer)
		defer srv.Close()
		r, err := ParseRef("oci:" + strings.TrimPrefix(srv.URL, "https://") + "/team/hello:v1")
		if err != nil {
			t.Fatal(err)
		}
		reg, err := dial(r)
		if err != nil {
			t.Fatal(err)
		}
		reg.trust(srv.Client().Transport)
		if _, err := reg.resolve(t.Context(), r); !errors.Is(err, ErrPlainHTTP) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if len(plain.requests) != 0 {
		t.Errorf("it was asked: %q", plain.requests)
	}
}

func TestRefusesEndlessRedirects(t *testing.T) {
	s, host := startRegistry(t)
	n := 0
	s.intercept = func(w http.ResponseWriter, r *http.Request) bool {
		n++
		http.Redirect(w, r, fmt.Sprintf("/v2/team/hello/manifests/v%d", n), http.StatusTemporaryRedirect)
		return true
	}
	if _, _, err := resolve(t, "oci+http:"+host+"/team/hello:v1"); err == nil || n > 2*maxRedirects {
		t.Errorf("%d redirects, %v", n, err)
	}
}

// trust lets the client of a test reach a server with a test's certificate.
func (reg *repository) trust(t http.RoundTripper) {
	reg.Client.(*auth.Client).Client.Transport.(*bounded).next = t
}
