package report

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/rootlink/rootlink/internal/needs"
)

// browse runs a headless Chromium on a page, with a profile of its own.
func browse(t *testing.T, html string, args ...string) string {
	t.Helper()
	program := ""
	for _, name := range []string{"chromium-headless-shell", "chromium"} {
		if path, err := exec.LookPath(name); err == nil {
			program = path
			break
		}
	}
	if program == "" {
		needs.Missing(t, "chromium-headless-shell: scripts/setup installs it")
	}
	dir := t.TempDir()
	file := filepath.Join(dir, "page.html")
	if err := os.WriteFile(file, []byte(html), 0o644); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, program, append([]string{
		"--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
		"--disable-component-update", "--disable-sync", "--user-data-dir=" + filepath.Join(dir, "profile"),
	}, append(args, "file://"+file)...)...)
	var errs bytes.Buffer
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v\n%s", err, errs.String())
	}
	return string(out)
}

func TestBrowserShowsThePage(t *testing.T) {
	dom := browse(t, pageOf(t, result(2), Options{Steps: []Step{{Name: "build", OK: true}}}), "--dump-dom")
	for _, want := range []string{`id="verdict">✓ Verified`, "spiffe://example.org/pipeline/step-0", "proved by the TPM", "log.inclusion", "A maker of TPMs"} {
		if !strings.Contains(dom, want) {
			t.Errorf("the browser does not show %q", want)
		}
	}
}

// A report is mailed around and opened with a double click: nothing that a
// stranger wrote into a link may run there.
func TestRefusesScriptsOfStrangers(t *testing.T) {
	dom := browse(t, pageOf(t, hostile(), Options{}), "--dump-dom")
	if !strings.Contains(dom, "✗ Refused") {
		t.Error("the page was not shown")
	}
	if regexp.MustCompile(`<title>owned</title>`).MatchString(dom) || strings.Contains(dom, "<script") || strings.Contains(dom, "<img") {
		t.Error("a stranger's markup was taken for the page's")
	}
}

func TestPrintsOnOnePage(t *testing.T) {
	pages := regexp.MustCompile(`/Type\s*/Page[^s]`)
	for name, html := range map[string]string{
		"one link":            pageOf(t, result(1), Options{}),
		"a pipeline of seven": pageOf(t, result(7), Options{Steps: []Step{{Name: "clone", Detail: "spiffe://example.org/clone", OK: true}, {Name: "test"}, {Name: "build"}, {Name: "image"}, {Name: "sbom"}, {Name: "scan"}, {Name: "release"}}}),
	} {
		t.Run(name, func(t *testing.T) {
			pdf := filepath.Join(t.TempDir(), "page.pdf")
			browse(t, html, "--no-pdf-header-footer", "--print-to-pdf="+pdf)
			raw, err := os.ReadFile(pdf)
			if err != nil {
				t.Fatal(err)
			}
			if n := len(pages.FindAll(raw, -1)); n != 1 {
				t.Errorf("%d pages, want one", n)
			}
		})
	}
}
