package link

import (
	"fmt"
	"slices"
	"strings"
)

// ParseToolList reads a tool list: on each line the lower-case hex SHA-256 of a
// program, or AnyHash, and behind it whatever people want to know, such as its
// path. Empty lines and those that begin with # are skipped. An empty list is
// an error.
func ParseToolList(b []byte) ([]string, error) {
	if len(b) > MaxTrust {
		return nil, malformed("tool list of %d bytes, at most %d allowed", len(b), MaxTrust)
	}
	var out []string
	n := 0
	for line := range strings.Lines(string(b)) {
		n++
		fields := strings.Fields(line)
		if len(fields) == 0 || strings.HasPrefix(fields[0], "#") {
			continue
		}
		if _, err := parseHash(fields[0]); err != nil && fields[0] != AnyHash {
			return nil, fmt.Errorf("line %d: %w", n, err)
		}
		out = append(out, fields[0])
	}
	slices.Sort(out)
	out = slices.Compact(out)
	if len(out) == 0 || len(out) > MaxIDs {
		return nil, malformed("%d programs, 1 to %d allowed", len(out), MaxIDs)
	}
	return out, nil
}

// ToolList writes what ran in a step as a tool list, in the order of the
// statement. A list that is not complete says so: what it lacks may be needed.
func ToolList(s *Statement) string {
	var b strings.Builder
	// A comment is one line: paths and reasons are the recorded step's words.
	oneLine := strings.NewReplacer("\n", "\\n", "\r", "\\r")
	fmt.Fprintf(&b, "# what ran in step %s, says its recorder\n", oneLine.Replace(s.Step))
	if !s.Byproducts.Tree {
		fmt.Fprintf(&b, "# NOT COMPLETE: more may have run\n")
	}
	for _, g := range s.Byproducts.TreeGaps {
		fmt.Fprintf(&b, "# %s\n", oneLine.Replace(g))
	}
	seen := map[string]bool{}
	for _, e := range s.Byproducts.Executables {
		sum := e.Digest["sha256"]
		line := fmt.Sprintf("%s  %s\n", sum, oneLine.Replace(e.Path))
		if _, err := parseHash(sum); err != nil || e.Role == RoleRecorder || seen[line] {
			continue
		}
		seen[line] = true
		b.WriteString(line)
	}
	return b.String()
}
