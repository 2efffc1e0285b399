package link

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/rootlink/rootlink/pkg/attest"
)

// What a demand on the programs of a step fails with. All of it is the
// recorder's word: the TPM commits to the statement, not to what it says.
var (
	// ErrTreeIncomplete: the recorder does not say that its list is complete,
	// so nothing follows from what is missing in it.
	ErrTreeIncomplete = errors.New("the list of what ran is not complete")
	// ErrUnlistedExecutable: a program ran that the tool list does not name.
	ErrUnlistedExecutable = errors.New("ran and is not in the tool list")
	// ErrSharedCache: a cache held something before the step began, and what a
	// cache holds goes into a build without any program running.
	ErrSharedCache = errors.New("the cache was not the step's own")
)

// Names that the result and its text share.
const (
	saidRan          = "what ran"
	checkExecutables = "requirement.executables"
	checkCaches      = "requirement.caches"
)

// Roles of an executable. One that the recorder does not know is a child's.
const (
	RoleTool        = "tool"        // the main process, measured by the agent
	RoleInterpreter = "interpreter" // of a #! script
	RoleScript      = "script"      // the #! script itself
	RoleChild       = "child"       // any other process of the step
	RoleRecorder    = "recorder"    // rootlink itself, which is not of the step
)

// Cache is a directory that a tool takes finished work from.
type Cache struct {
	Name   string `json:"name"` // the variable that names it, such as GOCACHE
	Path   string `json:"path"`
	Fresh  bool   `json:"fresh"`            // it was absent or empty when the step first had it
	Reason string `json:"reason,omitempty"` // why it is not fresh
}

// CheckExecutables fails unless the recorder says that it lists all that the
// step's processes executed, and allowed, lower-case hex SHA-256 or AnyHash,
// names each of them. Scripts with a #! line count: they are programs.
func CheckExecutables(s *Statement, allowed []string) error {
	b := &s.Byproducts
	if len(allowed) == 0 {
		return fmt.Errorf("an empty tool list (%q allows any program): %w", AnyHash, ErrUnlistedExecutable)
	}
	if !b.Tree {
		why := "its recorder does not say that it is"
		if len(b.TreeGaps) > 0 {
			why = strings.Join(b.TreeGaps, "; ")
		}
		return fmt.Errorf("%w: %s", ErrTreeIncomplete, why)
	}
	set := make(map[string]bool, len(allowed))
	for _, h := range allowed {
		set[h] = true
	}
	seen, self, unlisted := 0, false, []string(nil)
	for _, e := range b.Executables {
		if e.Role == RoleRecorder && !self {
			self = true // it is one program; a second one is not it
			continue
		}
		seen++
		sum := e.Digest["sha256"]
		if sum == "" {
			return fmt.Errorf("%w: %s has no SHA-256", ErrTreeIncomplete, e.Path)
		}
		if !set[AnyHash] && !set[sum] {
			unlisted = append(unlisted, fmt.Sprintf("%s (%s, sha256:%s)", e.Path, e.role(), sum))
		}
	}
	switch {
	case seen == 0:
		return fmt.Errorf("%w: it is empty, and something must have run", ErrTreeIncomplete)
	case len(unlisted) == 1:
		return fmt.Errorf("%s %w", unlisted[0], ErrUnlistedExecutable)
	case len(unlisted) > 1:
		return fmt.Errorf("%s and %d more: each %w", unlisted[0], len(unlisted)-1, ErrUnlistedExecutable)
	}
	return nil
}

// CheckCaches fails unless the recorder says which caches the step had, and
// that each was fresh.
func CheckCaches(s *Statement) error {
	caches := s.Environment.Caches
	if len(caches) == 0 {
		return fmt.Errorf("%w: the recorder names no cache", ErrSharedCache)
	}
	for _, c := range caches {
		if !c.Fresh {
			why := c.Reason
			if why == "" {
				why = "it was not empty"
			}
			return fmt.Errorf("%w: %s %s: %s", ErrSharedCache, c.Name, c.Path, why)
		}
	}
	return nil
}

func (e Executable) role() string {
	if e.Role == "" {
		return "role unknown"
	}
	return e.Role
}

// validateRan bounds what a statement may list.
func (s *Statement) validateRan() error {
	switch b := &s.Byproducts; {
	case len(b.Executables) > MaxExecutables:
		return malformed("%d executables, at most %d allowed", len(b.Executables), MaxExecutables)
	case len(b.TreeGaps) > MaxTreeGaps:
		return malformed("%d reasons for gaps, at most %d allowed", len(b.TreeGaps), MaxTreeGaps)
	case b.Tree && len(b.TreeGaps) > 0:
		return malformed("a complete list of executables with gaps")
	case len(s.Environment.Caches) > MaxCaches:
		return malformed("%d caches, at most %d allowed", len(s.Environment.Caches), MaxCaches)
	}
	return nil
}

// validateRan fails on demands that would be none.
func (r *Requirement) validateRan() error {
	if r.Executables != nil && len(r.Executables) == 0 {
		return malformed("executables is empty (%q allows any program)", AnyHash)
	}
	if len(r.Executables) > MaxIDs {
		return malformed("%d executables, at most %d allowed", len(r.Executables), MaxIDs)
	}
	for _, h := range r.Executables {
		if _, err := parseHash(h); err != nil && h != AnyHash {
			return fmt.Errorf("executables: %w", err)
		}
	}
	return nil
}

// errSaysNothing: what was demanded of a step's tree cannot be met by a
// statement that lists none.
var errSaysNothing = errors.New("the statement is no link, and so does not say what ran")

func (v *linkVerifier) requiredExecutables() (string, error) {
	if v.req == nil || len(v.req.Executables) == 0 {
		return "", errSkip
	}
	if v.stmt == nil {
		return "", errSaysNothing
	}
	if err := CheckExecutables(v.stmt, v.req.Executables); err != nil {
		return "", err
	}
	n := 0
	for _, e := range v.stmt.Byproducts.Executables {
		if e.Role != RoleRecorder {
			n++
		}
	}
	what := "all in the tool list"
	if slices.Contains(v.req.Executables, AnyHash) {
		what = "any program allowed"
	}
	return fmt.Sprintf("%s, %s, says the recorder", count(n, "program"), what), nil
}

func (v *linkVerifier) requiredCaches() (string, error) {
	if v.req == nil || !v.req.CachesPerJob {
		return "", errSkip
	}
	if v.stmt == nil {
		return "", errSaysNothing
	}
	if err := CheckCaches(v.stmt); err != nil {
		return "", err
	}
	return fmt.Sprintf("%s, empty before the step, says the recorder", count(len(v.stmt.Environment.Caches), "cache")), nil
}

// saidRan is what the recorder says of the programs, for the result.
func (s *Statement) said() []Said {
	if len(s.Byproducts.Executables) == 0 {
		return nil
	}
	n, started := 0, 0
	for _, e := range s.Byproducts.Executables {
		if e.Role != RoleRecorder {
			n, started = n+1, started+e.Count
		}
	}
	what := count(n, "program")
	if started > 0 {
		what += fmt.Sprintf(", started %d times", started)
	}
	if s.Byproducts.Tree {
		return []Said{{saidRan, what + ", the whole process tree"}}
	}
	what += ", NOT all that ran"
	if len(s.Byproducts.TreeGaps) > 0 {
		what += ": " + s.Byproducts.TreeGaps[0]
	}
	return []Said{{saidRan, what}}
}

// ranNotes is that for people, beside the step.
func (l *LinkResult) ranNotes() (notes []string) {
	for _, s := range l.SaidBy {
		if s.What == saidRan {
			notes = append(notes, "ran "+Clean(s.Value)+", says the recorder")
		}
	}
	for _, c := range l.Checks {
		if c.Outcome == attest.Passed && (c.ID == checkExecutables || c.ID == checkCaches) {
			notes = append(notes, Clean(c.Detail))
		}
	}
	return notes
}
