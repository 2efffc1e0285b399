package nodeserver

import (
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/rootlink/rootlink/internal/policy"
)

// The page is what an operator has: a key, verdict or example that it lacks or
// invents is a defect of this package.
func page(t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("..", "..", "..", "docs", "plugin-tpmnode.md"))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestPageNamesEveryKey(t *testing.T) {
	_, rest, _ := strings.Cut(page(t), "## Server: `plugin_data`")
	table, _, _ := strings.Cut(rest, "\n## ")
	var have []string
	for _, line := range strings.Split(table, "\n") {
		if cell, _, ok := strings.Cut(strings.TrimPrefix(line, "| "), " |"); ok {
			for _, m := range regexp.MustCompile("`([a-z_]+)`").FindAllStringSubmatch(cell, -1) {
				have = append(have, m[1])
			}
		}
	}
	var want []string
	typ := reflect.TypeFor[config]()
	for i := range typ.NumField() {
		if tag := typ.Field(i).Tag.Get("hcl"); !strings.HasPrefix(tag, ",") {
			want = append(want, tag)
		}
	}
	slices.Sort(have)
	slices.Sort(want)
	if !slices.Equal(have, want) {
		t.Errorf("the page has %v, the code %v", have, want)
	}
}

func TestPageNamesEveryReason(t *testing.T) {
	text := page(t)
	call := regexp.MustCompile(`(?:denied|invalid|unavailable)\("([a-z_]+)"|&refusal\{[^"]*"([a-z_]+)"`)
	files, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range call.FindAllStringSubmatch(string(b), -1) {
			n++
			if reason := m[1] + m[2]; !strings.Contains(text, "`"+reason+"`") {
				t.Errorf("%s: the page does not explain %q", f, reason)
			}
		}
	}
	if n < 20 {
		t.Errorf("only %d reasons found: the pattern is out of date", n)
	}
}

func TestPagePolicyExampleReads(t *testing.T) {
	_, rest, _ := strings.Cut(page(t), "```json\n")
	example, _, _ := strings.Cut(rest, "```")
	if list, err := policy.Parse([]byte(example)); err != nil || len(list) != 1 {
		t.Errorf("%v, %v", list, err)
	}
}
