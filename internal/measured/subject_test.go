package measured

import (
	"slices"
	"strings"
	"testing"
)

func TestNewSubject(t *testing.T) {
	hash := "sha256:" + strings.Repeat("ab", 32)
	s, err := NewSubject([]string{"uid:0", hash, "gid:0", "parent:sha256:" + strings.Repeat("cd", 32)})
	if err != nil || s.Executable[0] != 0xab || !slices.IsSorted(s.Selectors) || len(s.Selectors) != 4 {
		t.Errorf("%+v %v", s, err)
	}
	for what, bad := range map[string][]string{
		"no hash":             {"uid:0"},
		"nothing":             nil,
		"two hashes":          {hash, "sha256:" + strings.Repeat("cd", 32)},
		"short hash":          {hash[:20]},
		"upper-case hash":     {"sha256:" + strings.Repeat("AB", 32)},
		"a tool":              {hash, "tool:" + hash},
		"a recorder":          {hash, "recorder:" + hash},
		"unprotected one":     {hash, "recorder_unprotected:" + hash},
		"a line break inside": {hash, "path:/a\nb"},
		"too long":            {hash, "path:/" + strings.Repeat("x", 2000)},
	} {
		if _, err := NewSubject(bad); err == nil {
			t.Errorf("%s: accepted", what)
		}
	}
}
