package rootlink_test

import (
	"encoding/json"
	"errors"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// The import rules keep the chain sound: what verifies must not depend on what
// collects, and the pure packages must stay usable by an offline verifier.

const module = "github.com/rootlink/rootlink"

type goPackage struct {
	ImportPath string
	Imports    []string
	Deps       []string
	GoFiles    []string
}

func listPackages(t *testing.T) []goPackage {
	t.Helper()
	out, err := exec.Command("go", "list", "-json=ImportPath,Imports,Deps,GoFiles", "./...").Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	var all []goPackage
	for dec := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p goPackage
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		all = append(all, p)
	}
	return all
}

func TestImportRules(t *testing.T) {
	packages := listPackages(t)
	seen := map[string]bool{}
	for _, p := range packages {
		path := strings.TrimPrefix(p.ImportPath, module+"/")
		seen[path] = true
		direct := func(banned ...string) {
			for _, imp := range p.Imports {
				if slices.Contains(banned, imp) {
					t.Errorf("%s imports %s", path, imp)
				}
			}
		}
		transitive := func(prefix, why string) {
			for _, dep := range p.Deps {
				if dep == prefix || strings.HasPrefix(dep, prefix+"/") {
					t.Errorf("%s reaches %s: %s", path, dep, why)
				}
			}
		}
		switch {
		case strings.HasPrefix(path, "pkg/"):
			direct("os", "os/exec", "net", "net/http", "log", "log/slog", "syscall")
			transitive(module+"/internal", "pkg is pure and public")
			transitive(module+"/plugins", "pkg is pure and public")
			transitive("google.golang.org/grpc", "pkg is pure and public")
		case path == "internal/server" || strings.HasPrefix(path, "internal/server/") || path == "cmd/server":
			transitive(module+"/internal/tpm", "the server trusts evidence, not a device")
		case path == "internal/agent" || strings.HasPrefix(path, "internal/agent/") || path == "cmd/agent":
			transitive(module+"/internal/store", "the agent keeps no server state")
			transitive(module+"/internal/policy", "the agent judges nobody")
		case strings.HasPrefix(path, "conformance/"):
			for _, ours := range []string{"internal", "pkg", "plugins", "cmd", "proto"} {
				transitive(module+"/"+ours, "conformance judges any implementation, and shares nothing with ours")
			}
			for _, imp := range p.Imports {
				if !mayConformanceImport(imp) {
					t.Errorf("%s imports %s", path, imp)
				}
			}
		}
		for _, testOnly := range []string{"internal/forge", "internal/needs", "internal/swtpmtest"} {
			if path != testOnly && !strings.HasPrefix(path, testOnly+"/") && len(p.GoFiles) > 0 {
				transitive(module+"/"+testOnly, "it is for tests alone")
			}
		}
	}
	// A rule about a package that was renamed away would hold for ever.
	for _, must := range []string{"pkg/attest", "pkg/svid", "pkg/link", "internal/server", "internal/agent", "internal/tpm", "internal/store", "internal/policy", "internal/forge", "internal/needs", "internal/swtpmtest", "conformance/suite"} {
		if !seen[must] {
			t.Errorf("%s does not exist, and the import rules name it", must)
		}
	}
}

// mayConformanceImport: the standard library, itself, and what speaks the
// protocol and reads its tokens.
func mayConformanceImport(path string) bool {
	if first, _, _ := strings.Cut(path, "/"); !strings.Contains(first, ".") {
		return true
	}
	for _, prefix := range []string{module + "/conformance/", "github.com/spiffe/go-spiffe/v2/proto/", "google.golang.org/grpc/", "google.golang.org/protobuf/", "github.com/go-jose/go-jose/v4/"} {
		if strings.HasPrefix(path+"/", prefix) {
			return true
		}
	}
	return false
}

// pkg/* is what others build on: nothing there is left to be guessed.
func TestPublicNamesAreExplained(t *testing.T) {
	files, err := filepath.Glob("pkg/*/*.go")
	if err != nil || len(files) == 0 {
		t.Fatal(files, err)
	}
	for _, name := range files {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		f, err := parser.ParseFile(token.NewFileSet(), name, nil, parser.ParseComments)
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range f.Decls {
			switch d := d.(type) {
			case *ast.FuncDecl:
				if d.Name.IsExported() && d.Doc == nil && exportedReceiver(d) {
					t.Errorf("%s: %s has no comment", name, d.Name.Name)
				}
			case *ast.GenDecl:
				for _, s := range d.Specs {
					if ts, ok := s.(*ast.TypeSpec); ok && ts.Name.IsExported() && d.Doc == nil && ts.Doc == nil {
						t.Errorf("%s: %s has no comment", name, ts.Name.Name)
					}
				}
			}
		}
	}
}

func exportedReceiver(d *ast.FuncDecl) bool {
	if d.Recv == nil {
		return true
	}
	typ := d.Recv.List[0].Type
	if star, ok := typ.(*ast.StarExpr); ok {
		typ = star.X
	}
	id, ok := typ.(*ast.Ident)
	return ok && id.IsExported()
}

// Programs and plugins put parts together; what they do is in packages that can
// be tested without a process.
func TestProgramsStayThin(t *testing.T) {
	const maxMain, maxPlugin = 150, 250 // lines
	mains := 0
	for _, pattern := range []string{"cmd/*", "plugins/*"} {
		dirs, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		for _, dir := range dirs {
			main := lines(t, filepath.Join(dir, "main.go"))
			if mains++; main > maxMain {
				t.Errorf("%s/main.go has %d lines, at most %d are thin", dir, main, maxMain)
			}
			if pattern == "cmd/*" {
				continue
			}
			all := 0
			sources, err := filepath.Glob(filepath.Join(dir, "*.go"))
			if err != nil {
				t.Fatal(err)
			}
			for _, f := range sources {
				if !strings.HasSuffix(f, "_test.go") {
					all += lines(t, f)
				}
			}
			if all > maxPlugin {
				t.Errorf("%s has %d lines, at most %d are thin", dir, all, maxPlugin)
			}
		}
	}
	if mains != 5 {
		t.Errorf("%d programs and plugins, want 5", mains)
	}
}

func lines(t *testing.T, file string) int {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return strings.Count(string(b), "\n")
}

// Every dependency is code that the chain's keys run beside. The table in the
// design page gives each direct one its reason, and lists nothing else.
func TestEveryDependencyHasItsReason(t *testing.T) {
	read := func(name string) string {
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	required := map[string]bool{}
	for line := range strings.Lines(read("go.mod")) {
		if f := strings.Fields(line); len(f) == 2 && line[0] == '\t' {
			required[f[0]] = true
		}
	}
	_, table, found := strings.Cut(read("docs/design.md"), "| module | for |\n|---|---|\n")
	if !found || len(required) == 0 {
		t.Fatalf("the table was found: %v, %d requirements", found, len(required))
	}
	explained := map[string]bool{}
	for line := range strings.Lines(table) {
		cells := strings.Split(line, "|")
		if len(cells) != 4 {
			break
		}
		explained[strings.TrimSpace(cells[1])] = strings.TrimSpace(cells[2]) != ""
	}
	if !maps.Equal(required, explained) {
		t.Errorf("go.mod requires %v\ndocs/design.md explains %v", slices.Sorted(maps.Keys(required)), slices.Sorted(maps.Keys(explained)))
	}
}
