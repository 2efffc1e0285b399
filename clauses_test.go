package rootlink_test

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// A clause whose test was renamed away would go on looking covered, and a test
// that the page does not know would not be found by who reads it.
func TestClausesOfSPIFFEHaveTheirTests(t *testing.T) {
	const page = "docs/workload-api.md"
	b, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	named := map[string]bool{}
	for _, m := range regexp.MustCompile("`(Test\\w+)`").FindAllStringSubmatch(string(b), -1) {
		named[m[1]] = true
	}
	if len(named) == 0 {
		t.Fatalf("%s names no test", page)
	}
	def := regexp.MustCompile(`(?m)^func (Test\w+)\(t \*testing\.T\)`)
	clause := regexp.MustCompile(`^Test(WorkloadEndpoint|WorkloadAPI|SPIFFEID|X509SVID|JWTSVID)Section\d`)
	defined := map[string]bool{}
	err = filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, "_test.go") {
			return err
		}
		src, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		for _, m := range def.FindAllStringSubmatch(string(src), -1) {
			defined[m[1]] = true
			if clause.MatchString(m[1]) && !named[m[1]] {
				t.Errorf("%s does not name %s of %s", page, m[1], path)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for name := range named {
		if !defined[name] {
			t.Errorf("%s names %s, which is no test", page, name)
		}
	}
}
