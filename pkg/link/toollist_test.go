package link

import (
	"errors"
	"slices"
	"strings"
	"testing"
)

func TestToolListOfAStepAllowsIt(t *testing.T) {
	s, tool, compiler := ranScene(t)
	s.stmt.Byproducts.Executables[1].Path = "/odd\n" + strings.Repeat("ee", 32) + "  name"
	list, err := ParseToolList([]byte(ToolList(s.stmt)))
	if err != nil || !slices.Equal(list, slices.Sorted(slices.Values([]string{tool, compiler}))) {
		t.Fatalf("%q, %v", list, err)
	}
	if err := CheckExecutables(s.stmt, list); err != nil {
		t.Error(err)
	}
	s.stmt.Byproducts.Tree, s.stmt.Byproducts.TreeGaps = false, []string{"lost\n*"}
	if text := ToolList(s.stmt); !strings.Contains(text, "# NOT COMPLETE") || strings.Contains(text, "\n*") {
		t.Error(text)
	}
}

func TestRefusesToolListsThatAreNone(t *testing.T) {
	for _, text := range []string{"", "# nothing\n\n", "/usr/bin/go\n", strings.Repeat("A0", 32) + "\n", strings.Repeat("a0", 31) + "\n"} {
		if list, err := ParseToolList([]byte(text)); !errors.Is(err, ErrMalformed) {
			t.Errorf("%q: %q, %v", text, list, err)
		}
	}
}
