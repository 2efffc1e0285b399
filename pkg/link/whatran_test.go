package link

import (
	"errors"
	"slices"
	"strings"
	"testing"
)

// ranScene records a build: go, and a compiler that it started.
func ranScene(t *testing.T) (*scene, string, string) {
	t.Helper()
	s := newScene(t)
	tool, compiler := hexOf(s.Leaf.Tool), strings.Repeat("cc", 32)
	s.stmt.Byproducts.Tree = true
	s.stmt.Byproducts.Executables = []Executable{
		{Path: "/usr/bin/go", Role: RoleTool, Count: 1, Digest: map[string]string{"sha256": tool}},
		{Path: "/usr/lib/go/compile", Role: RoleChild, Count: 212, Digest: map[string]string{"sha256": compiler}},
		{Path: "/usr/bin/rootlink", Role: RoleRecorder, Digest: map[string]string{"sha256": hexOf(s.Leaf.Recorder)}},
	}
	s.requirement().Executables = []string{tool, compiler}
	return s, tool, compiler
}

func TestAcceptsWhatIsInTheToolList(t *testing.T) {
	s, _, _ := ranScene(t)
	res := s.accepts(t)
	if i := slices.IndexFunc(res.Links[0].SaidBy, func(x Said) bool {
		return strings.Contains(x.Value, "2 programs, started 213 times, the whole process tree")
	}); i < 0 {
		t.Errorf("the result does not say what ran, on the recorder's word: %+v", res.Links[0].SaidBy)
	}
	s, _, _ = ranScene(t)
	s.requirement().Executables = []string{AnyHash}
	s.accepts(t)
}

func TestRefusesAProgramOutsideTheToolList(t *testing.T) {
	s, tool, _ := ranScene(t)
	s.requirement().Executables = []string{tool}
	s.refuses(t, "requirement.executables", ErrPolicy, "/usr/lib/go/compile", "child")
}

func TestRefusesAScriptOutsideTheToolList(t *testing.T) {
	s, _, _ := ranScene(t)
	s.stmt.Byproducts.Executables = append(s.stmt.Byproducts.Executables,
		Executable{Path: "./evil", Role: RoleScript, Digest: map[string]string{"sha256": strings.Repeat("ee", 32)}})
	s.refuses(t, "requirement.executables", ErrUnlistedExecutable, "./evil")
}

func TestRefusesASecondRecorderInTheList(t *testing.T) {
	s, _, _ := ranScene(t)
	s.stmt.Byproducts.Executables = append(s.stmt.Byproducts.Executables,
		Executable{Path: "./evil", Role: RoleRecorder, Digest: map[string]string{"sha256": strings.Repeat("ee", 32)}})
	s.refuses(t, "requirement.executables", ErrUnlistedExecutable, "./evil")
}

func TestRefusesATreeThatIsNotComplete(t *testing.T) {
	for name, spoil := range map[string]func(*Statement){
		"silent": func(s *Statement) { s.Byproducts.Tree = false },
		"gap": func(s *Statement) {
			s.Byproducts.Tree, s.Byproducts.TreeGaps = false, []string{"2 processes outlived the step"}
		},
		"empty":       func(s *Statement) { s.Byproducts.Executables = nil },
		"no digest":   func(s *Statement) { s.Byproducts.Executables[1].Digest = nil },
		"only itself": func(s *Statement) { s.Byproducts.Executables = s.Byproducts.Executables[2:] },
	} {
		for _, list := range [][]string{nil, {AnyHash}} {
			s, _, _ := ranScene(t)
			spoil(s.stmt)
			if list != nil {
				s.requirement().Executables = list
			}
			if res := s.refuses(t, "requirement.executables", ErrTreeIncomplete); name == "gap" && !strings.Contains(res.Failure.Message, "outlived") {
				t.Errorf("%s: %s", name, res.Failure.Message)
			}
		}
	}
}

func TestRefusesStatementsThatContradictThemselvesAboutTheTree(t *testing.T) {
	s, _, _ := ranScene(t)
	s.stmt.Byproducts.TreeGaps = []string{"something was missed"}
	if _, err := s.stmt.Marshal(); !errors.Is(err, ErrMalformed) {
		t.Error(err)
	}
	s.stmt.Byproducts.Tree, s.stmt.Byproducts.TreeGaps = false, make([]string, MaxTreeGaps+1)
	if _, err := s.stmt.Marshal(); !errors.Is(err, ErrMalformed) {
		t.Error(err)
	}
	s.stmt.Byproducts.TreeGaps, s.stmt.Byproducts.Executables = nil, make([]Executable, MaxExecutables+1)
	if _, err := s.stmt.Marshal(); !errors.Is(err, ErrMalformed) {
		t.Error(err)
	}
}

func TestRefusesEmptyToolList(t *testing.T) {
	for _, list := range [][]string{{}, {"go"}, {strings.Repeat("AA", 32)}} {
		s, _, _ := ranScene(t)
		s.requirement().Executables = list
		if _, err := NewTrust(s.file); !errors.Is(err, ErrMalformed) {
			t.Errorf("%q: %v", list, err)
		}
	}
	s, _, _ := ranScene(t)
	if err := CheckExecutables(s.stmt, nil); !errors.Is(err, ErrUnlistedExecutable) {
		t.Error(err)
	}
}

func TestRefusesSharedCache(t *testing.T) {
	for name, tc := range map[string]struct {
		caches []Cache
		ok     bool
	}{
		"not said": {nil, false},
		"fresh":    {[]Cache{{Name: "GOCACHE", Path: "/job/1", Fresh: true}}, true},
		"warm":     {[]Cache{{Name: "GOCACHE", Path: "/job/1", Fresh: true}, {Name: "GOMODCACHE", Path: "/home/builder/go/pkg/mod", Reason: "31 entries"}}, false},
	} {
		s, _, _ := ranScene(t)
		s.requirement().CachesPerJob = true
		s.stmt.Environment.Caches = tc.caches
		if tc.ok {
			s.accepts(t)
			continue
		}
		res := s.refuses(t, "requirement.caches", ErrSharedCache)
		if name == "warm" && !strings.Contains(res.Failure.Message, "GOMODCACHE /home/builder/go/pkg/mod: 31 entries") {
			t.Error(res.Failure.Message)
		}
	}
}
