// Vulnscan compares a CycloneDX bill of materials with advisories in OSV's form,
// and writes what it finds as the predicate that in-toto has for such scans. It
// fails when there is a finding.
//
//	vulnscan SBOM ADVISORIES OUT        ADVISORIES is a directory of *.json
package main

import (
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/mod/semver"
)

func main() {
	if len(os.Args) != 4 {
		fmt.Fprintln(os.Stderr, "usage: vulnscan SBOM ADVISORIES OUT")
		os.Exit(2)
	}
	found, err := scan(os.Args[1], os.Args[2], os.Args[3], time.Now)
	if err != nil {
		fmt.Fprintln(os.Stderr, "vulnscan:", err)
		os.Exit(1)
	}
	for _, f := range found {
		fmt.Fprintf(os.Stderr, "vulnscan: %s: %s\n", f.ID, f.Annotations[0]["component"])
	}
	if len(found) > 0 {
		os.Exit(3)
	}
}

type bom struct {
	Format     string `json:"bomFormat"`
	Components []struct {
		Name    string `json:"name"`
		Version string `json:"version"`
		PURL    string `json:"purl"`
	} `json:"components"`
}

// advisory is what matters here of https://ossf.github.io/osv-schema/.
type advisory struct {
	ID       string    `json:"id"`
	Modified time.Time `json:"modified"`
	Affected []struct {
		Package struct {
			Ecosystem string `json:"ecosystem"`
			Name      string `json:"name"`
		} `json:"package"`
		Ranges []struct {
			Type   string  `json:"type"`
			Events []event `json:"events"`
		} `json:"ranges"`
		Versions []string `json:"versions"`
	} `json:"affected"`
	Severity []struct {
		Type  string `json:"type"`
		Score string `json:"score"`
	} `json:"severity"`
}

type event struct {
	Introduced   string `json:"introduced"`
	Fixed        string `json:"fixed"`
	LastAffected string `json:"last_affected"`
}

// predicate is https://in-toto.io/attestation/vulns/v0.2.
type predicate struct {
	Scanner struct {
		URI     string `json:"uri"`
		Version string `json:"version"`
		DB      struct {
			URI        string    `json:"uri"`
			Version    string    `json:"version"`
			LastUpdate time.Time `json:"lastUpdate"`
		} `json:"db"`
		Result []finding `json:"result"`
	} `json:"scanner"`
	Metadata struct {
		Started  time.Time `json:"scanStartedOn"`
		Finished time.Time `json:"scanFinishedOn"`
	} `json:"metadata"`
}

type finding struct {
	ID          string              `json:"id"`
	Severity    []severity          `json:"severity"`
	Annotations []map[string]string `json:"annotations"`
}

type severity struct {
	Method string `json:"method"`
	Score  string `json:"score"`
}

func scan(sbomFile, dir, out string, now func() time.Time) ([]finding, error) {
	var p predicate
	p.Metadata.Started = now().UTC()
	p.Scanner.URI, p.Scanner.Version = "https://github.com/rootlink/rootlink/examples/vulnscan", "1"
	p.Scanner.DB.URI = "file:" + filepath.ToSlash(dir)
	p.Scanner.Result = []finding{}

	raw, err := os.ReadFile(sbomFile)
	if err != nil {
		return nil, err
	}
	var b bom
	if err := json.Unmarshal(raw, &b); err != nil {
		return nil, fmt.Errorf("%s: %w", sbomFile, err)
	}
	if b.Format != "CycloneDX" || len(b.Components) == 0 {
		return nil, fmt.Errorf("%s: not a CycloneDX document with components", sbomFile)
	}
	advisories, digest, err := read(dir)
	if err != nil {
		return nil, err
	}
	p.Scanner.DB.Version = digest
	for _, a := range advisories {
		if a.Modified.After(p.Scanner.DB.LastUpdate) {
			p.Scanner.DB.LastUpdate = a.Modified
		}
		for _, c := range b.Components {
			if strings.HasPrefix(c.PURL, "pkg:golang/") && a.affects(c.Name, c.Version) {
				f := finding{ID: a.ID, Severity: []severity{}, Annotations: []map[string]string{{"component": c.PURL}}}
				for _, s := range a.Severity {
					f.Severity = append(f.Severity, severity{s.Type, s.Score})
				}
				p.Scanner.Result = append(p.Scanner.Result, f)
			}
		}
	}
	p.Metadata.Finished = now().UTC()
	if raw, err = json.MarshalIndent(p, "", "  "); err != nil {
		return nil, err
	}
	if err := os.WriteFile(out, append(raw, '\n'), 0o644); err != nil {
		return nil, err
	}
	fmt.Printf("%d components, %d advisories, %d findings\n", len(b.Components), len(advisories), len(p.Scanner.Result))
	return p.Scanner.Result, nil
}

// read reads all advisories. None is an error: a scan against nothing is clean.
func read(dir string) (all []advisory, digest string, err error) {
	names, err := filepath.Glob(filepath.Join(dir, "*.json"))
	if err != nil {
		return nil, "", err
	}
	if len(names) == 0 {
		return nil, "", fmt.Errorf("%s: no advisories", dir)
	}
	slices.Sort(names)
	h := sha256.New()
	for _, name := range names {
		raw, err := os.ReadFile(name)
		if err != nil {
			return nil, "", err
		}
		var a advisory
		if err := json.Unmarshal(raw, &a); err != nil {
			return nil, "", fmt.Errorf("%s: %w", name, err)
		}
		if err := a.check(); err != nil {
			return nil, "", fmt.Errorf("%s: %w", name, err)
		}
		one := sha256.Sum256(raw)
		h.Write(one[:])
		all = append(all, a)
	}
	return all, fmt.Sprintf("sha256:%x", h.Sum(nil)), nil
}

// check refuses what affects could not judge: passing over it would look clean.
func (a *advisory) check() error {
	if a.ID == "" || len(a.Affected) == 0 {
		return errors.New("not an OSV advisory with an id and what is affected")
	}
	for _, f := range a.Affected {
		for _, r := range f.Ranges {
			if f.Package.Ecosystem == "Go" && r.Type != "SEMVER" {
				return fmt.Errorf("a range of type %q for Go, where SEMVER is all there is", r.Type)
			}
			for _, e := range r.Events {
				for _, v := range []string{e.Introduced, e.Fixed, e.LastAffected} {
					if v != "" && v != "0" && !semver.IsValid("v"+v) {
						return fmt.Errorf("%q is not a semantic version", v)
					}
				}
			}
		}
	}
	return nil
}

// affects is the evaluation algorithm of the OSV schema for Go modules. A
// component of no known version is affected by whatever affects any version.
func (a *advisory) affects(module, version string) bool {
	v := strings.TrimPrefix(version, "v")
	for _, f := range a.Affected {
		if f.Package.Ecosystem != "Go" || f.Package.Name != module {
			continue
		}
		if v == "" || slices.Contains(f.Versions, v) {
			return true
		}
		for _, r := range f.Ranges {
			if inRange(r.Events, "v"+v) {
				return true
			}
		}
	}
	return false
}

func inRange(events []event, v string) bool {
	at := func(e event) string { // where an event stands in the order of versions
		for _, x := range []string{e.Introduced, e.Fixed, e.LastAffected} {
			if x != "" && x != "0" {
				return "v" + x
			}
		}
		return "v0.0.0-0" // the least version there is
	}
	events = slices.Clone(events)
	slices.SortStableFunc(events, func(a, b event) int { return semver.Compare(at(a), at(b)) })
	affected := false
	for _, e := range events {
		c := semver.Compare(v, at(e))
		switch {
		case e.Introduced != "" && c >= 0:
			affected = true
		case e.Fixed != "" && c >= 0, e.LastAffected != "" && c > 0:
			affected = false
		}
	}
	return affected
}
