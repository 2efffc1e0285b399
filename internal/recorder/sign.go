package recorder

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/internal/files"
	"github.com/rootlink/rootlink/internal/oci"
	"github.com/rootlink/rootlink/pkg/link"
)

// PredicateArg is the first argument of rootlink when it starts itself to be the
// tool that reads a predicate.
const PredicateArg = "__predicate"

// Sign is one run of `rootlink sign`.
type Sign struct {
	Type      string   // predicate type, a name or URI
	Predicate string   // file; "-" is the command's stdout, or ours stdin without a command
	Artifacts []string // what it is about: files and directories
	OCI       []string // and images, as NAME@sha256:HEX, or a reference of package oci to look it up
	Exclude   []string
	Command   []string // makes the predicate; empty: rootlink reads it

	Name      string // of the bundle; "" is that of the type
	BundleDir string
	BundleOut string
	Sources   Sources

	IssueTimeout time.Duration
	Stamping     Stamping
	Stdin        *os.File
	Stderr       *os.File
}

var ociSubject = sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile(`^([^@\s]{1,512})@sha256:([0-9a-f]{64})$`) })

// validate returns the predicate type, the images and the step that does what
// run does too.
func (s *Sign) validate() (uri string, images []link.Resource, step *Step, err error) {
	fail := func(hint, format string, args ...any) (string, []link.Resource, *Step, error) {
		return "", nil, nil, cli.Fail(cli.ExitRun, fmt.Errorf(format, args...), hint)
	}
	var missing []string
	if s.Type == "" {
		missing = append(missing, "--type TYPE")
	}
	if s.Predicate == "" {
		missing = append(missing, "--predicate FILE")
	}
	if len(s.Artifacts)+len(s.OCI) == 0 {
		missing = append(missing, "an artifact, or --subject-oci (what the statement is about)")
	}
	if len(missing) > 0 {
		return fail("such as: rootlink sign --type cyclonedx --predicate sbom.json hello", "missing: %s", strings.Join(missing, ", "))
	}
	if uri, err = link.ResolvePredicateType(s.Type); err != nil {
		return fail("a short name, or the predicate type's whole URI", "--type: %w", err)
	}
	// Verifiers take a link for what this recorder saw. One that is handed in says
	// whatever its author likes about a step that never was, with a tool that did
	// no more than to copy it.
	if uri == link.PredicateType {
		return fail("rootlink run records a step and signs what it saw", "--type %s: a link is recorded, and never signed as somebody wrote it", s.Type)
	}
	for _, ref := range s.OCI {
		if oci.IsRef(ref) {
			if _, err := oci.ParseRef(ref); err != nil {
				return fail("such as oci-layout:DIR or oci:HOST/REPOSITORY:TAG", "--subject-oci: %w", err)
			}
			continue // looked up once the group is given up
		}
		m := ociSubject().FindStringSubmatch(ref)
		if m == nil {
			return fail("such as registry.example/app@sha256:… with 64 digits: a tag can be moved, a digest cannot", "--subject-oci %q names no digest", ref)
		}
		images = append(images, link.Resource{Name: m[1], Digest: map[string]string{"sha256": m[2]}})
	}
	name := s.Name
	if name == "" {
		if name = link.PredicateAlias(uri); !stepName().MatchString(name) {
			name = "attestation"
		}
	}
	step = &Step{
		Name: name, Command: s.Command, Products: []string{"."}, Exclude: s.Exclude,
		BundleDir: s.BundleDir, BundleOut: s.BundleOut, Sources: s.Sources,
		IssueTimeout: s.IssueTimeout, Stamping: s.Stamping, Stderr: s.Stderr, MainOnly: true,
	}
	if len(s.Command) == 0 {
		step.Command = []string{"rootlink", PredicateArg, s.Predicate, uri}
	}
	return uri, images, step, step.validate()
}

// Run signs a predicate and returns the code to exit with: the command's own.
func (s *Sign) Run() (code int, err error) {
	uri, images, step, err := s.validate()
	if err != nil {
		return 0, err
	}
	// Rootlink reading a file is a tool like any other: its hash is what an entry
	// for it names.
	path := "/proc/self/exe"
	if len(s.Command) > 0 {
		if path, err = Lookup(s.Command[0], os.Environ()); err != nil {
			return 0, explain(err)
		}
	}
	r := &state{Step: step}
	if err := r.connect(); err != nil {
		return 0, explain(err)
	}
	defer r.source.Close()
	before, err := s.hash(r, nil)
	if err != nil {
		return 0, explain(err)
	}
	looked, err := s.lookImages()
	if err != nil {
		return 0, explain(err)
	}
	raw, st, err := s.make(r, path)
	if err != nil {
		return 0, explain(err)
	}
	if st.Code != 0 {
		if len(s.Command) > 0 {
			r.say("the command failed (%s): nothing was signed", describe(st))
		}
		return st.Code, nil
	}
	again, err := s.lookImages()
	if err != nil {
		return 0, explain(err)
	}
	if !sameResources(looked, again) {
		return 0, cli.Fail(cli.ExitRun, errors.New("an image changed while the predicate was made"), "name it by @sha256:…, or run it when nothing else pushes there")
	}
	return 0, explain(s.sign(r, uri, raw, append(images, looked...), before))
}

// lookImages finds the images that were named by where they are.
func (s *Sign) lookImages() (images []link.Resource, err error) {
	ctx, stop := interruptible()
	defer stop()
	for _, ref := range s.OCI {
		if !oci.IsRef(ref) {
			continue
		}
		name, digest, err := oci.Resolve(ctx, ref)
		if err != nil {
			return nil, cli.Hint(fmt.Errorf("--subject-oci: %w", err), "`rootlink sign --help` and docs/oci.md say how images are named")
		}
		images = append(images, link.Resource{Name: name, Digest: map[string]string{"sha256": digest}})
	}
	return images, nil
}

// make runs the tool and returns the predicate that it made or read.
func (s *Sign) make(r *state, path string) (raw []byte, st Status, err error) {
	stdout, out := os.Stdout, (*os.File)(nil)
	if len(s.Command) == 0 || s.Predicate == "-" {
		fd, err := unix.MemfdCreate("predicate", unix.MFD_CLOEXEC)
		if err != nil {
			return nil, st, fmt.Errorf("memory for the predicate: %w", err)
		}
		out = os.NewFile(uintptr(fd), "predicate")
		defer out.Close()
		stdout = out
	}
	old, _ := identify(s.Predicate)
	st, err = Run(Command{Path: path, Args: r.Command, Env: os.Environ(), Stdin: s.Stdin, Stdout: stdout, Stderr: s.Stderr}, r.onExec)
	if err != nil || st.Code != 0 {
		return nil, st, err
	}
	if out != nil {
		raw, err = files.ReadAll(io.NewSectionReader(out, 0, link.MaxStatement+1), "the predicate", link.MaxStatement)
		return raw, st, err
	}
	// One that lay there before is not what this tool made.
	now, err := identify(s.Predicate)
	if err != nil {
		return nil, st, cli.Hint(err, "the command did not write the predicate there: check --predicate, or give - to take its stdout")
	}
	if now == old {
		return nil, st, cli.Fail(cli.ExitRun, fmt.Errorf("%s is older than the command, which did not write it", s.Predicate),
			"check --predicate; - takes the command's stdout; without a command rootlink signs the file as it is")
	}
	raw, err = files.Read(s.Predicate, link.MaxStatement)
	return raw, st, err
}

// identify is what changes when a file is written.
func identify(name string) (fileID, error) {
	var st unix.Stat_t
	if err := unix.Stat(name, &st); err != nil {
		return fileID{}, &os.PathError{Op: "stat", Path: name, Err: err}
	}
	return idOf(&st), nil
}

func (s *Sign) hash(r *state, before *Recording) (*Recording, error) {
	ctx, stop := interruptible()
	defer stop()
	return r.hash(ctx, "artifacts", s.Artifacts, before)
}

func (s *Sign) sign(r *state, uri string, raw []byte, images []link.Resource, before *Recording) error {
	ctx, stop := interruptible()
	defer stop()
	if err := link.CheckPredicateForm(uri, raw); err != nil {
		return cli.Fail(cli.ExitRun, err, "is this the right file, and the right --type?")
	}
	// What was scanned must be what is signed for.
	after, err := s.hash(r, before)
	if err != nil {
		return err
	}
	subjects, err := after.Resources(link.MaxSubjects)
	if err != nil {
		return fmt.Errorf("artifacts: %w", err)
	}
	was, err := before.Resources(link.MaxSubjects)
	if err != nil {
		return fmt.Errorf("artifacts: %w", err)
	}
	if !sameResources(was, subjects) {
		return cli.Fail(cli.ExitRun, errors.New("an artifact changed while the predicate was made, so it may be about another one"), "make the artifact first, then sign what is said about it")
	}
	if len(s.Artifacts) > 0 && len(subjects) == 0 {
		return cli.Fail(cli.ExitRun, errors.New("the artifacts are empty directories: nothing to sign about"), "")
	}
	p, err := link.PrepareAttestation(&link.Attestation{Type: uri, Subjects: append(subjects, images...), Predicate: json.RawMessage(raw)})
	if err != nil {
		return err
	}
	return s.issue(ctx, r, p)
}

func (s *Sign) issue(ctx context.Context, r *state, p *link.Prepared) error {
	signed, err := r.sign(ctx, p)
	if err != nil {
		return err
	}
	if id := r.Sources.SPIFFEID; id != "" && signed.SPIFFEID != id {
		return fmt.Errorf("the agent issued %s, not the identity that --spiffe-id asks for", signed.SPIFFEID)
	}
	return r.finish(ctx, signed)
}

func sameResources(a, b []link.Resource) bool {
	x, err1 := json.Marshal(a)
	y, err2 := json.Marshal(b)
	return err1 == nil && err2 == nil && bytes.Equal(x, y)
}

// ReadPredicate is what rootlink does as the tool of a signature: it reads a
// predicate, checks its form, and prints it. file "-" is in.
func ReadPredicate(file, uri string, in io.Reader, out io.Writer) error {
	var raw []byte
	var err error
	if file == "-" {
		raw, err = files.ReadAll(in, "standard input", link.MaxStatement)
	} else {
		raw, err = files.Read(filepath.Clean(file), link.MaxStatement)
	}
	if err != nil {
		return cli.Fail(cli.ExitRun, err, cli.HintOf(err))
	}
	if err := link.CheckPredicateForm(uri, raw); err != nil {
		return cli.Fail(cli.ExitRun, fmt.Errorf("%s: %w", file, err), "is this the right file, and the right --type?")
	}
	_, err = out.Write(raw)
	return err
}
