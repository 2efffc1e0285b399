// Package archive is the file that a verifier needs in ten years: bundles,
// layout, the signed trust.json and the logs, each by digest, in one tar. It
// holds no artifact, only what artifacts are compared with. The package is
// pure: bytes in, bytes out.
package archive

import (
	"archive/tar"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/rootlink/rootlink/pkg/link"
	"github.com/rootlink/rootlink/pkg/strictjson"
)

// Format and Version of an archive's manifest, and the names of the two
// entries that every other one hangs on.
const (
	Format       = "rootlink-archive"
	Version      = 1
	ManifestName = "archive.json"
	TokenName    = "archive.tsr" // RFC 3161 response over the manifest's bytes
)

// Limits on archives, checked before anything is allocated for them.
const (
	MaxSize     = 512 << 20 // bytes of the whole file
	MaxFiles    = 4096
	MaxManifest = 8 << 20
	MaxToken    = 64 << 10
)

// Roles of the files in an archive.
const (
	RoleBundle      = "bundle"
	RoleTrust       = "trust"
	RoleLayout      = "layout"
	RoleSublayout   = "sublayout"
	RoleClassic     = "classic_link"
	RoleRevocations = "revocations"
	RoleEventLog    = "event_log"
	RoleDetached    = "detached_evidence"
	RoleLogProof    = "log_proof"  // of an AK certificate, see docs/log.md
	RoleCheckpoint  = "checkpoint" // of a transparency log, when the archive was made
)

// dirs says where the files of a role lie in the tar.
var dirs = map[string]string{
	RoleBundle: "bundles", RoleTrust: "trust", RoleLayout: "layout", RoleSublayout: "sublayouts", RoleClassic: "bundles", RoleRevocations: "revocations",
	RoleDetached: "evidence", RoleEventLog: "logs", RoleLogProof: "logs", RoleCheckpoint: "checkpoints",
}

var (
	// ErrMalformed: a file that is not an archive of this format.
	ErrMalformed = errors.New("malformed archive")
	// ErrChanged: a file in it has another digest than the manifest says.
	ErrChanged = errors.New("changed since it was archived")
)

func malformed(format string, args ...any) error {
	return fmt.Errorf("%w: %w", ErrMalformed, fmt.Errorf(format, args...))
}

// Manifest lists what an archive holds and how it was verified when it was made.
type Manifest struct {
	Format      string    `json:"format"`
	Version     int       `json:"version"`
	Created     time.Time `json:"created"` // claimed; the token proves a time
	TrustDomain string    `json:"trust_domain"`
	// Question is what was asked of the verifier: a later one asks the same.
	Question  Question        `json:"question"`
	Artifacts []link.Artifact `json:"artifacts,omitempty"` // digests alone
	Files     []File          `json:"files"`
}

// Question is what the links were verified for.
type Question struct {
	Identity  string     `json:"identity,omitempty"` // pattern
	Layout    string     `json:"layout,omitempty"`   // or this file of the archive, by name
	Type      string     `json:"type,omitempty"`     // predicate type, empty: links
	BuildID   string     `json:"build_id,omitempty"`
	NotBefore *time.Time `json:"not_before,omitempty"`
	// SkipInspections: the layout's inspections were not run, as was accepted.
	SkipInspections bool `json:"skip_inspections,omitempty"`
}

// File is one file in the archive.
type File struct {
	Path   string `json:"path"` // in the tar
	Role   string `json:"role"`
	SHA256 string `json:"sha256"`
	Size   int64  `json:"size"`

	content []byte
}

// Content returns the file's bytes.
func (f File) Content() []byte { return f.content }

// Name is the name that the file had when it was archived.
func (f File) Name() string { return path.Base(f.Path) }

// Archive is an archive whose every file has the digest that its manifest
// says. Nothing in it has been verified beyond that.
type Archive struct {
	Manifest Manifest
	raw      []byte // the manifest's bytes, which the token is over
	token    []byte
}

// Builder collects the files of an archive.
type Builder struct {
	m     Manifest
	paths map[string]string // path → digest
}

// NewBuilder starts an archive made at created.
func NewBuilder(created time.Time, trustDomain string, q Question) *Builder {
	return &Builder{
		m:     Manifest{Format: Format, Version: Version, Created: created.UTC().Truncate(time.Second), TrustDomain: trustDomain, Question: q, Files: []File{}},
		paths: map[string]string{},
	}
}

// Artifact notes the digests of an artifact. Its name is for people.
func (b *Builder) Artifact(a link.Artifact) {
	b.m.Artifacts = append(b.m.Artifacts, a)
}

// Add puts a file in. The same name with the same content is put in once; with
// another content it is an error, since names tell files apart later.
func (b *Builder) Add(role, name string, content []byte) error {
	dir, ok := dirs[role]
	if !ok {
		return malformed("unknown role %q", role)
	}
	f := File{Path: dir + "/" + path.Base(name), Role: role, SHA256: digest(content), Size: int64(len(content)), content: content}
	if err := f.validate(); err != nil {
		return err
	}
	switch was, ok := b.paths[f.Path]; {
	case !ok:
	case was == f.SHA256:
		return nil
	default:
		return malformed("two different files named %s", f.Path)
	}
	b.paths[f.Path] = f.SHA256
	b.m.Files = append(b.m.Files, f)
	return nil
}

// Close finishes the manifest. The archive is the same for the same content.
func (b *Builder) Close() (*Archive, error) {
	slices.SortFunc(b.m.Files, func(x, y File) int { return strings.Compare(x.Path, y.Path) })
	slices.SortFunc(b.m.Artifacts, func(x, y link.Artifact) int { return strings.Compare(x.Name, y.Name) })
	if err := b.m.validate(); err != nil {
		return nil, err
	}
	raw, err := json.MarshalIndent(b.m, "", "  ")
	if err != nil {
		return nil, err
	}
	raw = append(raw, '\n')
	if len(raw) > MaxManifest {
		return nil, malformed("manifest of %d bytes, at most %d allowed", len(raw), MaxManifest)
	}
	return &Archive{Manifest: b.m, raw: raw}, nil
}

// Stamped is what a time stamp of the archive is over: the manifest, which
// names every other file by digest.
func (a *Archive) Stamped() []byte { return a.raw }

// Token returns the time stamp, nil when there is none.
func (a *Archive) Token() []byte { return a.token }

// SetToken adds an RFC 3161 response over Stamped.
func (a *Archive) SetToken(token []byte) error {
	if len(token) == 0 || len(token) > MaxToken {
		return malformed("time stamp of %d bytes, 1 to %d allowed", len(token), MaxToken)
	}
	a.token = token
	return nil
}

// Files returns the files of a role.
func (a *Archive) Files(role string) (out []File) {
	for _, f := range a.Manifest.Files {
		if f.Role == role {
			out = append(out, f)
		}
	}
	return out
}

// Find returns the file of a role with a name.
func (a *Archive) Find(role, name string) (File, bool) {
	for _, f := range a.Manifest.Files {
		if f.Role == role && f.Name() == name {
			return f, true
		}
	}
	return File{}, false
}

// WriteTo writes the tar.
func (a *Archive) WriteTo(w io.Writer) (int64, error) {
	counter := &counting{w: w}
	t := tar.NewWriter(counter)
	put := func(name string, content []byte) error {
		// A fixed owner, mode and time: the same content gives the same bytes.
		h := &tar.Header{Typeflag: tar.TypeReg, Name: name, Size: int64(len(content)), Mode: 0o644, ModTime: time.Unix(0, 0), Format: tar.FormatPAX}
		if err := t.WriteHeader(h); err != nil {
			return err
		}
		_, err := t.Write(content)
		return err
	}
	if err := put(ManifestName, a.raw); err != nil {
		return counter.n, err
	}
	if a.token != nil {
		if err := put(TokenName, a.token); err != nil {
			return counter.n, err
		}
	}
	for _, f := range a.Manifest.Files {
		if err := put(f.Path, f.content); err != nil {
			return counter.n, err
		}
	}
	err := t.Close()
	return counter.n, err
}

type counting struct {
	w io.Writer
	n int64
}

func (c *counting) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += int64(n)
	return n, err
}

func digest(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

// isDigest: SHA-256 of a file, or a dirHash, which is one too.
func isDigest(s string) bool {
	h, err := hex.DecodeString(s)
	return err == nil && len(h) == sha256.Size && s == strings.ToLower(s)
}

func (f File) validate() error {
	dir, known := dirs[f.Role]
	switch {
	case !known:
		return malformed("file %q of unknown role %q", f.Path, f.Role)
	// A path out of its room could be written elsewhere by whoever unpacks the
	// tar, or name one file by two names.
	case f.Path != path.Clean(f.Path) || path.Dir(f.Path) != dir || path.Base(f.Path) == "." || strings.ContainsAny(f.Path, "\\\x00\n"):
		return malformed("file %q of role %s does not lie in %s/", f.Path, f.Role, dir)
	case len(f.Path) > link.MaxName:
		return malformed("file name of %d bytes", len(f.Path))
	case f.Size < 0 || f.Size > MaxSize:
		return malformed("file %q of %d bytes", f.Path, f.Size)
	}
	if !isDigest(f.SHA256) {
		return malformed("file %q: %q is not a SHA-256 digest", f.Path, f.SHA256)
	}
	return nil
}

func (m Manifest) validate() error {
	switch {
	case m.Format != Format || m.Version != Version:
		return malformed("format %q version %d, want %q version %d", m.Format, m.Version, Format, Version)
	case m.Created.IsZero():
		return malformed("no time of creation")
	case len(m.Files) > MaxFiles:
		return malformed("%d files, at most %d allowed", len(m.Files), MaxFiles)
	}
	if len(m.Artifacts) > link.MaxLinks {
		return malformed("%d artifacts, at most %d allowed", len(m.Artifacts), link.MaxLinks)
	}
	for _, a := range m.Artifacts {
		if a.Name == "" || len(a.Name) > link.MaxName || len(a.Digest) > link.MaxDigests {
			return malformed("artifact %q with %d digests", a.Name, len(a.Digest))
		}
		for alg, v := range a.Digest {
			if !isDigest(v) {
				return malformed("artifact %q: %s:%q is not a digest", a.Name, alg, v)
			}
		}
	}
	seen := map[string]bool{}
	var total int64
	for _, f := range m.Files {
		if err := f.validate(); err != nil {
			return err
		}
		if seen[f.Path] {
			return malformed("file %q is listed twice", f.Path)
		}
		seen[f.Path] = true
		if total += f.Size; total > MaxSize {
			return malformed("more than %d bytes", int64(MaxSize))
		}
	}
	for _, role := range []string{RoleTrust, RoleLayout} {
		n := 0
		for _, f := range m.Files {
			if f.Role == role {
				n++
			}
		}
		if n > 1 {
			return malformed("%d files of role %s: which one counts?", n, role)
		}
	}
	return nil
}

// Open reads an archive and compares every file with the manifest.
func Open(r io.Reader) (*Archive, error) {
	t := tar.NewReader(io.LimitReader(r, MaxSize+1))
	raw, name, err := next(t, MaxManifest)
	if err != nil || name != ManifestName {
		return nil, malformed("it does not begin with %s", ManifestName)
	}
	a := &Archive{raw: raw}
	if err := strictjson.Decode(raw, MaxManifest, "", &a.Manifest); err != nil {
		return nil, malformed("%s: %w", ManifestName, err)
	}
	if err := a.Manifest.validate(); err != nil {
		return nil, err
	}
	want := map[string]*File{}
	for i := range a.Manifest.Files {
		want[a.Manifest.Files[i].Path] = &a.Manifest.Files[i]
	}
	got := map[string]bool{}
	for {
		h, err := t.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, malformed("%w", err)
		}
		if h.Typeflag != tar.TypeReg || got[h.Name] {
			return nil, malformed("%q is no plain file, or there twice", h.Name)
		}
		got[h.Name] = true
		if h.Name == TokenName {
			if h.Size <= 0 || h.Size > MaxToken {
				return nil, malformed("time stamp of %d bytes", h.Size)
			}
			if a.token, err = io.ReadAll(t); err != nil {
				return nil, malformed("%w", err)
			}
			continue
		}
		f := want[h.Name]
		if f == nil {
			return nil, malformed("%q is not in the manifest", h.Name)
		}
		if h.Size != f.Size {
			return nil, fmt.Errorf("%s: %w", f.Path, ErrChanged)
		}
		if f.content, err = io.ReadAll(t); err != nil {
			return nil, malformed("%w", err)
		}
		if digest(f.content) != f.SHA256 {
			return nil, fmt.Errorf("%s: %w", f.Path, ErrChanged)
		}
	}
	for p := range want {
		if !got[p] {
			return nil, malformed("%q is in the manifest and not in the archive", p)
		}
	}
	return a, nil
}

func next(t *tar.Reader, limit int64) ([]byte, string, error) {
	h, err := t.Next()
	if err != nil {
		return nil, "", err
	}
	if h.Typeflag != tar.TypeReg || h.Size < 0 || h.Size > limit {
		return nil, "", malformed("first entry %q", h.Name)
	}
	b, err := io.ReadAll(t)
	return b, h.Name, err
}
