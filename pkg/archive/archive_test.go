package archive

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"testing"
	"time"

	"github.com/rootlink/rootlink/pkg/link"
)

func built(t testing.TB) *Archive {
	t.Helper()
	b := NewBuilder(time.Unix(1700000000, 0), "example.org", Question{Identity: "spiffe://example.org/build"})
	b.Artifact(link.Artifact{Name: "hello", Digest: map[string]string{"sha256": digest([]byte("hello"))}})
	for _, f := range []struct{ role, name, content string }{
		{RoleTrust, "trust.json", "{}"}, {RoleBundle, "b/build.sigstore.json", "{1}"}, {RoleBundle, "a.sigstore.json", "{2}"}, {RoleEventLog, "sha256-00.eventlog", "log"},
	} {
		if err := b.Add(f.role, f.name, []byte(f.content)); err != nil {
			t.Fatal(err)
		}
	}
	a, err := b.Close()
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func written(t testing.TB, a *Archive) []byte {
	t.Helper()
	var out bytes.Buffer
	if _, err := a.WriteTo(&out); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func TestArchiveRoundTrip(t *testing.T) {
	a := built(t)
	if err := a.SetToken([]byte("token")); err != nil {
		t.Fatal(err)
	}
	raw := written(t, a)
	got, err := Open(bytes.NewReader(raw))
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got.Stamped(), a.Stamped()) || string(got.Token()) != "token" {
		t.Error("manifest or token differ")
	}
	if n := len(got.Files(RoleBundle)); n != 2 {
		t.Errorf("%d bundles, want 2", n)
	}
	f, ok := got.Find(RoleBundle, "build.sigstore.json")
	if !ok || string(f.Content()) != "{1}" {
		t.Errorf("bundle %q, %v", f.Content(), ok)
	}
	if again := written(t, got); !bytes.Equal(again, raw) {
		t.Error("writing what was read gives other bytes")
	}
}

// rewrite changes the tar's entries one by one.
func rewrite(t *testing.T, raw []byte, change func(h *tar.Header, content []byte) ([]byte, bool)) []byte {
	t.Helper()
	var out bytes.Buffer
	r, w := tar.NewReader(bytes.NewReader(raw)), tar.NewWriter(&out)
	for {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		content, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		content, keep := change(h, content)
		if !keep {
			continue
		}
		h.Size = int64(len(content))
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(content); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func TestRefusesChangedArchive(t *testing.T) {
	raw := written(t, built(t))
	const bundle = "bundles/a.sigstore.json"
	for name, c := range map[string]struct {
		change func(h *tar.Header, content []byte) ([]byte, bool)
		want   error
	}{
		"changed file": {func(h *tar.Header, b []byte) ([]byte, bool) {
			if h.Name == bundle {
				return []byte("{3}"), true
			}
			return b, true
		}, ErrChanged},
		"longer file": {func(h *tar.Header, b []byte) ([]byte, bool) {
			if h.Name == bundle {
				return append(b, ' '), true
			}
			return b, true
		}, ErrChanged},
		"file taken out": {func(h *tar.Header, b []byte) ([]byte, bool) { return b, h.Name != bundle }, ErrMalformed},
		"file beside the manifest": {func(h *tar.Header, b []byte) ([]byte, bool) {
			if h.Name == bundle {
				h.Name = "bundles/other.sigstore.json"
			}
			return b, true
		}, ErrMalformed},
		"symbolic link": {func(h *tar.Header, b []byte) ([]byte, bool) {
			if h.Name == bundle {
				h.Typeflag, h.Linkname = tar.TypeSymlink, "/etc/passwd"
				return nil, true
			}
			return b, true
		}, ErrMalformed},
		"no manifest":      {func(h *tar.Header, b []byte) ([]byte, bool) { return b, h.Name != ManifestName }, ErrMalformed},
		"unknown key":      {manifest(t, `"format"`, `"colour": "red", "format"`), ErrMalformed},
		"other version":    {manifest(t, `"version": 1`, `"version": 2`), ErrMalformed},
		"unknown role":     {manifest(t, `"role": "trust"`, `"role": "thrust"`), ErrMalformed},
		"path traversal":   {everywhere(t, bundle, "bundles/../../a"), ErrMalformed},
		"absolute path":    {everywhere(t, bundle, "/bundles/a.sigstore.json"), ErrMalformed},
		"path upwards":     {everywhere(t, bundle, "../a.sigstore.json"), ErrMalformed},
		"path below":       {everywhere(t, bundle, "bundles/b/a.sigstore.json"), ErrMalformed},
		"another's room":   {everywhere(t, bundle, "trust/a.sigstore.json"), ErrMalformed},
		"same file twice":  {manifest(t, bundle, "bundles/build.sigstore.json"), ErrMalformed},
		"negative size":    {manifest(t, `"size": 3`, `"size": -3`), ErrMalformed},
		"enormous size":    {manifest(t, `"size": 3`, `"size": 999999999999`), ErrMalformed},
		"digest not a hex": {manifest(t, `"sha256": "`, `"sha256": "Z`), ErrMalformed},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := Open(bytes.NewReader(rewrite(t, raw, c.change))); !errors.Is(err, c.want) {
				t.Errorf("got %v, want %v", err, c.want)
			}
		})
	}
}

func manifest(tb testing.TB, old, with string) func(h *tar.Header, content []byte) ([]byte, bool) {
	return func(h *tar.Header, b []byte) ([]byte, bool) {
		if h.Name != ManifestName {
			return b, true
		}
		if !bytes.Contains(b, []byte(old)) {
			tb.Errorf("nothing to change: %s", old)
		}
		return bytes.Replace(b, []byte(old), []byte(with), 1), true
	}
}

// everywhere also renames the tar's entry: else its absence is what is refused.
func everywhere(tb testing.TB, old, with string) func(h *tar.Header, content []byte) ([]byte, bool) {
	inManifest := manifest(tb, old, with)
	return func(h *tar.Header, b []byte) ([]byte, bool) {
		if h.Name == old {
			h.Name = with
		}
		return inManifest(h, b)
	}
}

func TestRefusesTwoTrusts(t *testing.T) {
	b := NewBuilder(time.Unix(1700000000, 0), "example.org", Question{})
	for _, name := range []string{"trust.json", "other.json"} {
		if err := b.Add(RoleTrust, name, []byte("{}")); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := b.Close(); !errors.Is(err, ErrMalformed) {
		t.Errorf("got %v", err)
	}
}

func TestRefusesTwoFilesOfOneName(t *testing.T) {
	b := NewBuilder(time.Unix(1700000000, 0), "example.org", Question{})
	if err := b.Add(RoleBundle, "x/a", []byte("1")); err != nil {
		t.Fatal(err)
	}
	if err := b.Add(RoleBundle, "y/a", []byte("1")); err != nil {
		t.Errorf("the same content again: %v", err)
	}
	if err := b.Add(RoleBundle, "y/a", []byte("2")); !errors.Is(err, ErrMalformed) {
		t.Errorf("got %v", err)
	}
}

func FuzzOpen(f *testing.F) {
	f.Add(written(f, built(f)))
	f.Add([]byte("not a tar"))
	f.Fuzz(func(t *testing.T, raw []byte) {
		a, err := Open(bytes.NewReader(raw))
		if err != nil {
			return
		}
		if _, err := Open(bytes.NewReader(written(t, a))); err != nil {
			t.Errorf("what was written cannot be read: %v", err)
		}
	})
}
