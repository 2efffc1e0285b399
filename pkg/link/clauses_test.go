package link

import (
	"os"
	"regexp"
	"strings"
	"testing"
)

// A check that cites a section of verify.md which is not there cites nothing.
func TestChecksCiteSectionsThatExist(t *testing.T) {
	page, err := os.ReadFile("../../docs/verify.md")
	if err != nil {
		t.Fatal(err)
	}
	headings := map[string]bool{}
	for _, m := range regexp.MustCompile(`(?m)^##+ (.*)$`).FindAllStringSubmatch(string(page), -1) {
		headings[strings.ToLower(m[1])] = true
	}
	for _, c := range (&linkVerifier{}).checks() {
		if section, ok := strings.CutPrefix(c.clause, "verify.md, "); ok && !headings[strings.ToLower(section)] {
			t.Errorf("check %s cites %q", c.id, c.clause)
		}
		// The table names groups as "requirement.ek, .tools".
		name := c.id
		if group, rest, ok := strings.Cut(c.id, "."); ok && group == "requirement" && rest != "match" && rest != "ek" {
			name = "." + rest
		}
		if !strings.Contains(string(page), name) {
			t.Errorf("verify.md does not list %s", c.id)
		}
	}
}
