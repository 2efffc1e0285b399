package link

import (
	"strings"
	"testing"
)

func TestMatchPattern(t *testing.T) {
	for _, c := range []struct {
		pattern, id string
		want        bool
	}{
		{"spiffe://td/build", "spiffe://td/build", true},
		{"spiffe://td/build", "spiffe://td/Build", false},
		{"spiffe://td/build", "spiffe://td/build/x", false},
		{"spiffe://td/build", "spiffe://other/build", false},
		{"spiffe://td/build/*", "spiffe://td/build/a", true},
		{"spiffe://td/build/*", "spiffe://td/build", false},
		{"spiffe://td/build/*", "spiffe://td/build/a/b", false},
		{"spiffe://td/*/x", "spiffe://td/a/x", true},
		{"spiffe://td/b-*-1", "spiffe://td/b-a-b-1", true},
		{"spiffe://td/b-*-1", "spiffe://td/b--1", true},
		{"spiffe://td/b-*-1", "spiffe://td/b-1", false},
		{"spiffe://td/*a*a", "spiffe://td/aa", true},
		{"spiffe://td/*a*a", "spiffe://td/a", false},
		{"spiffe://td/a*b*c", "spiffe://td/axbybzc", true},
		{"spiffe://td/**", "spiffe://td/a", true},
		{"spiffe://td/**", "spiffe://td/a/b/c", true},
		{"spiffe://td/**", "spiffe://td", false},
		{"spiffe://td/a/**", "spiffe://td/a", false},
		{"spiffe://td/a/**", "spiffe://td/a/b", true},
		{"spiffe://td/a/**", "spiffe://td/ab/b", false},
		// No expression language: these are not patterns at all.
		{"spiffe://td/a.+", "spiffe://td/aaa", false},
		{"spiffe://td/[ab]", "spiffe://td/a", false},
		{"spiffe://td/?", "spiffe://td/a", false},
		{"spiffe://*/a", "spiffe://td/a", false},
		{"spiffe://td/**/a", "spiffe://td/b/a", false},
		{"spiffe://td/a**", "spiffe://td/ab", false},
		{"spiffe://td/a/", "spiffe://td/a", false},
		{"spiffe://td//a", "spiffe://td/a", false},
		{"spiffe://td", "spiffe://td/a", false},
		{"spiffe://td/../a", "spiffe://td/a", false},
		{"", "spiffe://td/a", false},
		{"*", "spiffe://td/a", false},
		{"**", "spiffe://td/a", false},
		{"spiffe://td/*", "not an ID", false},
	} {
		if got := MatchPattern(c.pattern, c.id); got != c.want {
			t.Errorf("MatchPattern(%q, %q) = %t", c.pattern, c.id, got)
		}
	}
}

// A pattern that backtracked would take longer than anybody waits.
func TestMatchPatternIsLinear(t *testing.T) {
	pattern := "spiffe://td/" + strings.Repeat("*a", 900)
	id := "spiffe://td/" + strings.Repeat("a", 800) + "b"
	if MatchPattern(pattern, id) {
		t.Error("matched")
	}
}
