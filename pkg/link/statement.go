package link

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"
)

// Types of the in-toto attestation framework.
const (
	StatementType = "https://in-toto.io/Statement/v1"
	PredicateType = "https://in-toto.io/attestation/link/v0.3"
	PayloadType   = "application/vnd.in-toto+json"
)

// Statement is an in-toto Statement v1 with a link predicate v0.3: what a
// recorder says about one step. Marshal is deterministic, so that the TPM can
// commit to it before it is signed.
type Statement struct {
	Step        string
	Command     []string
	Subjects    []Resource // the products; at least one, at most MaxSubjects
	Materials   []Resource
	Byproducts  Byproducts
	Environment Environment
}

// Resource is an in-toto ResourceDescriptor: name and digests are required
// here (link v0.3), the rest is carried.
type Resource struct {
	Name             string            `json:"name"`
	Digest           map[string]string `json:"digest"` // algorithm → lower-case hex; DirHashAlg for trees
	URI              string            `json:"uri,omitempty"`
	MediaType        string            `json:"mediaType,omitempty"`
	DownloadLocation string            `json:"downloadLocation,omitempty"`
	Content          []byte            `json:"content,omitempty"`
	Annotations      map[string]any    `json:"annotations,omitempty"`
}

// Byproducts is what the step left besides its products. in-toto leaves the
// dictionary open: keys that are not listed here are ignored when read.
type Byproducts struct {
	// ExitCode is the step's own; nil means it was not recorded, which the
	// verifier does not take for success.
	ExitCode    *int         `json:"return-value,omitempty"`
	Signal      string       `json:"signal,omitempty"`
	Executables []Executable `json:"executables,omitempty"`
	// Tree says that Executables lists every program that any process of the
	// step executed, by exec events. Without it the list is what was seen.
	Tree     bool      `json:"tree,omitempty"`
	TreeGaps []string  `json:"tree_gaps,omitempty"` // why Tree is false
	Started  time.Time `json:"started,omitzero"`
	Finished time.Time `json:"finished,omitzero"`
	// Skipped names what was met among the files and has no content to record.
	Skipped []string `json:"skipped,omitempty"`
}

// Executable is a program that a process of the step executed, or a script:
// one entry for each digest, path and role.
type Executable struct {
	Path   string            `json:"path"`
	Digest map[string]string `json:"digest"`
	Role   string            `json:"role,omitempty"`
	Count  int               `json:"count,omitempty"` // how often it was executed
}

// Environment is where the step ran, open like Byproducts.
type Environment struct {
	Variables map[string]string `json:"variables,omitempty"`
	Git       *Git              `json:"git,omitempty"`
	OS        string            `json:"os,omitempty"`
	Arch      string            `json:"arch,omitempty"`
	Kernel    string            `json:"kernel,omitempty"`
	Hostname  string            `json:"hostname,omitempty"`
	WorkDir   string            `json:"workdir,omitempty"`
	CI        map[string]string `json:"ci,omitempty"` // CI token claims, said by the recorder
	Recorder  string            `json:"recorder,omitempty"`
	// BuildID names the run of the pipeline that the step belongs to, so that
	// links of different runs are not mixed.
	BuildID string  `json:"build_id,omitempty"`
	Caches  []Cache `json:"caches,omitempty"`
}

// Git is the working tree the step ran in.
type Git struct {
	Remote string `json:"remote,omitempty"`
	Commit string `json:"commit,omitempty"`
	Dirty  *bool  `json:"dirty,omitempty"`
}

type wireStatement struct {
	Type          string        `json:"_type"`
	Subject       []Resource    `json:"subject"`
	PredicateType string        `json:"predicateType"`
	Predicate     wirePredicate `json:"predicate"`
}

type wirePredicate struct {
	Name        string          `json:"name"`
	Command     []string        `json:"command"`
	Materials   []Resource      `json:"materials,omitempty"`
	Byproducts  json.RawMessage `json:"byproducts,omitempty"`
	Environment json.RawMessage `json:"environment,omitempty"`
}

// DirHashAlg names in-toto's directory digest in a digest set.
const DirHashAlg = "dirHash"

// DirHash is in-toto's dirHash (Go's dirhash.Hash1 in hex) of a tree: relative
// slash-separated names to SHA-256 digests of the files.
func DirHash(files map[string][32]byte) (string, error) {
	names := make([]string, 0, len(files))
	for n := range files {
		// A newline in a name could make one tree's listing that of another.
		if strings.ContainsRune(n, '\n') {
			return "", malformed("file name %q holds a newline", n)
		}
		names = append(names, n)
	}
	slices.Sort(names)
	h := sha256.New()
	for _, n := range names {
		d := files[n]
		fmt.Fprintf(h, "%x  %s\n", d[:], n)
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// Validate fails on what Marshal would refuse to write and parse to read.
func (s *Statement) Validate() error {
	switch {
	case s.Step == "" || len(s.Step) > MaxStepName:
		return malformed("step name of %d bytes, 1 to %d allowed", len(s.Step), MaxStepName)
	case len(s.Subjects) == 0:
		return malformed("no subject: a statement about nothing")
	case len(s.Subjects) > MaxSubjects:
		return malformed("%d subjects, at most %d allowed: record a tree as one %s", len(s.Subjects), MaxSubjects, DirHashAlg)
	case len(s.Materials) > MaxMaterials:
		return malformed("%d materials, at most %d allowed: record a tree as one %s", len(s.Materials), MaxMaterials, DirHashAlg)
	case len(s.Command) > MaxCommand:
		return malformed("%d arguments, at most %d allowed", len(s.Command), MaxCommand)
	}
	if err := s.validateRan(); err != nil {
		return err
	}
	if err := validateResources("subject", s.Subjects); err != nil {
		return err
	}
	return validateResources("material", s.Materials)
}

func validateResources(what string, rs []Resource) error {
	// Marshal sorts them; only where somebody else did not must all be kept.
	sorted := slices.IsSortedFunc(rs, func(a, b Resource) int { return strings.Compare(a.Name, b.Name) })
	seen := map[string]bool{}
	for i, r := range rs {
		if r.Name == "" || len(r.Name) > MaxName {
			return malformed("%s name of %d bytes, 1 to %d allowed", what, len(r.Name), MaxName)
		}
		// link v0.3: names are unique, so that a name means one digest.
		if seen[r.Name] || sorted && i > 0 && r.Name == rs[i-1].Name {
			return malformed("duplicate %s %q", what, r.Name)
		}
		if !sorted {
			seen[r.Name] = true
		}
		if err := validateDigests(r.Digest); err != nil {
			return fmt.Errorf("%s %q: %w", what, r.Name, err)
		}
	}
	return nil
}

func validateDigests(set map[string]string) error {
	if len(set) == 0 || len(set) > MaxDigests {
		return malformed("%d digests, 1 to %d allowed", len(set), MaxDigests)
	}
	for alg, v := range set {
		if alg == "" || len(v) < 32 || len(v) > 128 || len(v)%2 != 0 || !isLowerHex(v) {
			return malformed("digest %s:%q is not lower-case hex", alg, v)
		}
		if (alg == "sha256" || alg == DirHashAlg) && len(v) != 64 {
			return malformed("digest %s:%q is not 32 bytes", alg, v)
		}
	}
	return nil
}

var lowerHex = func() (t [256]bool) {
	for _, c := range []byte("0123456789abcdef") {
		t[c] = true
	}
	return t
}()

func isLowerHex(s string) bool {
	for i := range len(s) {
		if !lowerHex[s[i]] {
			return false
		}
	}
	return s != ""
}

// Marshal encodes s. Subjects and materials are sorted by name.
func (s *Statement) Marshal() ([]byte, error) {
	if err := s.Validate(); err != nil {
		return nil, err
	}
	by, err := encode(s.Byproducts)
	if err != nil {
		return nil, malformed("byproducts: %w", err)
	}
	env, err := encode(s.Environment)
	if err != nil {
		return nil, malformed("environment: %w", err)
	}
	command := s.Command
	if command == nil {
		command = []string{}
	}
	b, err := encode(wireStatement{
		Type: StatementType, Subject: sortedByName(s.Subjects), PredicateType: PredicateType,
		Predicate: wirePredicate{
			Name: s.Step, Command: command, Materials: sortedByName(s.Materials),
			Byproducts: by, Environment: env,
		},
	})
	if err != nil {
		return nil, malformed("%w", err)
	}
	if len(b) > MaxStatement {
		return nil, malformed("statement of %d bytes, at most %d allowed", len(b), MaxStatement)
	}
	return b, nil
}

func sortedByName(rs []Resource) []Resource {
	out := slices.Clone(rs)
	slices.SortFunc(out, func(a, b Resource) int { return strings.Compare(a.Name, b.Name) })
	return out
}

// ParseStatement decodes a statement. Unknown and duplicate keys are errors,
// except inside byproducts and environment, which in-toto leaves open.
func ParseStatement(b []byte) (*Statement, error) {
	var w wireStatement
	if err := decodeStatement(b, &w); err != nil {
		return nil, fmt.Errorf("statement: %w", err)
	}
	if w.Type != StatementType {
		return nil, malformed("statement type %q, want %q", w.Type, StatementType)
	}
	if w.PredicateType != PredicateType {
		return nil, malformed("predicate type %q, want %q", w.PredicateType, PredicateType)
	}
	s := &Statement{Step: w.Predicate.Name, Command: w.Predicate.Command, Subjects: w.Subject, Materials: w.Predicate.Materials}
	if err := decodeOpen(w.Predicate.Byproducts, &s.Byproducts); err != nil {
		return nil, malformed("byproducts: %w", err)
	}
	if err := decodeOpen(w.Predicate.Environment, &s.Environment); err != nil {
		return nil, malformed("environment: %w", err)
	}
	if err := s.Validate(); err != nil {
		return nil, err
	}
	return s, nil
}

func decodeOpen(raw json.RawMessage, v any) error {
	if len(raw) == 0 {
		return nil
	}
	return json.Unmarshal(raw, v)
}

// Prepared is a statement in the very bytes that will be signed. Its Digest
// goes to the TPM first; Sign redeems it.
type Prepared struct {
	payload []byte
	digest  [32]byte
}

// Prepare encodes s for signing.
func Prepare(s *Statement) (*Prepared, error) {
	b, err := s.Marshal()
	if err != nil {
		return nil, err
	}
	return &Prepared{payload: b, digest: PayloadDigest(b)}, nil
}

// Digest is SHA-256 of the DSSE pre-authentication encoding: the payload that
// evidence commits to.
func (p *Prepared) Digest() [32]byte { return p.digest }

// Payload returns the encoded statement.
func (p *Prepared) Payload() []byte { return slices.Clone(p.payload) }

// PayloadDigest is SHA-256 of the DSSE pre-authentication encoding of an
// encoded statement.
func PayloadDigest(statement []byte) [32]byte {
	h := sha256.New()
	fmt.Fprintf(h, "DSSEv1 %d %s %d ", len(PayloadType), PayloadType, len(statement))
	h.Write(statement)
	return [32]byte(h.Sum(nil))
}
