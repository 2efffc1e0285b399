package policy

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/rootlink/rootlink/internal/files"
	"github.com/rootlink/rootlink/pkg/attest"
)

// Limits on a policy file.
const (
	maxFile     = 4 << 20 // bytes
	maxPolicies = 4096    // revisions, all policies together
	maxDepth    = 8       // nesting; the format needs 6
)

// Errors that callers branch on.
var (
	ErrFile      = errors.New("malformed PCR policy file")
	ErrName      = errors.New("PCR policy name must be 1 to 64 characters of a-z A-Z 0-9 . _ -")
	ErrDuplicate = errors.New("PCR policy revision is given twice")
)

// CheckName fails unless name can be part of a selector and of a file name.
func CheckName(name string) error {
	if name == "" || len(name) > attest.MaxPolicyName {
		return ErrName
	}
	for _, c := range []byte(name) {
		switch {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', c == '.', c == '_', c == '-':
		default:
			return ErrName
		}
	}
	return nil
}

// Parse reads a list of policies with all their revisions, as in the
// pcr_policies of trust.json.
func Parse(b []byte) ([]attest.PCRPolicy, error) {
	if err := scan(b); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrFile, err)
	}
	var list []attest.PCRPolicy
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(&list); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrFile, err)
	}
	if len(list) > maxPolicies {
		return nil, fmt.Errorf("%w: %d revisions, limit %d", ErrFile, len(list), maxPolicies)
	}
	return list, Check(list)
}

// ReadFile is Parse of a file.
func ReadFile(path string) ([]attest.PCRPolicy, error) {
	b, err := files.Read(path, maxFile)
	if err != nil {
		return nil, fmt.Errorf("PCR policies: %w", err)
	}
	list, err := Parse(b)
	if err != nil {
		return nil, fmt.Errorf("PCR policies %s: %w", path, err)
	}
	return list, nil
}

// Check validates every policy, and that no revision is there twice: of two
// that differ, either could be meant.
func Check(list []attest.PCRPolicy) error {
	type id struct {
		name     string
		revision uint64
	}
	seen := map[id]bool{}
	for i := range list {
		p := &list[i]
		if err := p.Validate(); err != nil {
			return fmt.Errorf("PCR policy %q revision %d: %w", p.Name, p.Revision, err)
		}
		k := id{p.Name, p.Revision}
		if seen[k] {
			return fmt.Errorf("%w: %q revision %d", ErrDuplicate, p.Name, p.Revision)
		}
		seen[k] = true
	}
	return nil
}

// Current returns the policies in force, by name: of each the highest revision.
func Current(list []attest.PCRPolicy) []Revision {
	newest := map[string]*attest.PCRPolicy{}
	for i := range list {
		p := &list[i]
		if old := newest[p.Name]; old == nil || old.Revision < p.Revision {
			newest[p.Name] = p
		}
	}
	out := make([]Revision, 0, len(newest))
	for _, p := range newest {
		out = append(out, Revision{Policy: p, Digest: p.Digest()})
	}
	slices.SortFunc(out, func(a, b Revision) int { return cmp.Compare(a.Policy.Name, b.Policy.Name) })
	return out
}

// scan refuses what encoding/json reads in silence: keys given twice, also in
// another letter case, and anything after the list.
func scan(b []byte) error {
	if len(b) > maxFile {
		return fmt.Errorf("%d bytes, limit %d", len(b), maxFile)
	}
	d := json.NewDecoder(bytes.NewReader(b))
	if err := scanValue(d, 0); err != nil {
		return err
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return errors.New("data after the list")
	}
	return nil
}

func scanValue(d *json.Decoder, depth int) error {
	tok, err := d.Token()
	if err != nil {
		return noEOF(err)
	}
	open, ok := tok.(json.Delim)
	if !ok {
		return nil
	}
	if depth == maxDepth {
		return fmt.Errorf("nested deeper than %d", maxDepth)
	}
	keys := map[string]bool{}
	for d.More() {
		if open == '{' {
			k, err := d.Token()
			if err != nil {
				return noEOF(err)
			}
			folded := strings.ToLower(strings.ToUpper(fmt.Sprint(k))) // as encoding/json matches names
			if keys[folded] {
				return fmt.Errorf("key %q is given twice", k)
			}
			keys[folded] = true
		}
		if err := scanValue(d, depth+1); err != nil {
			return err
		}
	}
	_, err = d.Token() // the closing bracket
	return noEOF(err)
}

func noEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}
