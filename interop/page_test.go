package interop

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
)

const pageFile = "../docs/verifying.md"

// pageBlocks are the commands of docs/verifying.md by the name in the comment
// above them. The judges run them from the page, so that it cannot say what does
// not work.
func pageBlocks() (map[string]string, error) {
	text, err := os.ReadFile(pageFile)
	if err != nil {
		return nil, err
	}
	blocks := map[string]string{}
	for _, m := range regexp.MustCompile("(?s)<!-- judge: ([a-z-]+) -->\n```sh\n(.*?)```").FindAllStringSubmatch(string(text), -1) {
		blocks[m[1]] = m[2]
	}
	return blocks, nil
}

// page NAME: runs that block of the page as a person would paste it.
func cmdPage(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) != 1 {
		ts.Fatalf("usage: page NAME")
	}
	blocks, err := pageBlocks()
	ts.Check(err)
	block, ok := blocks[args[0]]
	if !ok {
		ts.Fatalf("%s has no block %q", pageFile, args[0])
	}
	err = ts.Exec("bash", "-euo", "pipefail", "-c", block)
	if neg == (err == nil) {
		ts.Fatalf("page %s: %v", args[0], err)
	}
}

// Every command of the page is run by a judge, and those that judge for bad too.
func TestThePageIsRun(t *testing.T) {
	blocks, err := pageBlocks()
	if err != nil {
		t.Fatal(err)
	}
	if len(blocks) == 0 {
		t.Fatal("the page has no blocks")
	}
	page, err := os.ReadFile(pageFile)
	if err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(string(page), "```sh\n"); n != len(blocks) {
		t.Errorf("the page has %d blocks of commands, %d of them with a name of their own", n, len(blocks))
	}
	scripts, err := filepath.Glob("testdata/*.txt")
	if err != nil {
		t.Fatal(err)
	}
	var all strings.Builder
	for _, name := range scripts {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		all.Write(text)
	}
	for name := range blocks {
		prefixes := []string{"\npage ", "\n! page "}
		if name == "witness-run" || name == "witness-policy" {
			prefixes = prefixes[:1] // they prepare
		}
		for _, prefix := range prefixes {
			if !strings.Contains(all.String(), prefix+name+"\n") {
				t.Errorf("no judge runs %q", strings.TrimSpace(prefix)+" "+name)
			}
		}
	}
}
