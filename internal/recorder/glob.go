package recorder

import (
	"fmt"
	"path"
	"strings"
)

// globs are --exclude patterns. One without a slash matches the last element
// of a name at any depth; one with a slash matches the whole name, where **
// stands for any number of elements. A directory that matches is left out with
// all that is in it.
type globs []string

func parseGlobs(patterns []string) (globs, error) {
	out := make(globs, 0, len(patterns))
	for _, p := range patterns {
		clean := strings.TrimSuffix(strings.TrimPrefix(p, "./"), "/")
		if clean == "" {
			return nil, fmt.Errorf("pattern %q is empty: %w", p, ErrPath)
		}
		for _, e := range strings.Split(clean, "/") {
			if _, err := path.Match(e, ""); err != nil {
				return nil, fmt.Errorf("pattern %q: %w: %w", p, err, ErrPath)
			}
		}
		out = append(out, clean)
	}
	return out, nil
}

func (g globs) match(name string) bool {
	for _, p := range g {
		if !strings.Contains(p, "/") {
			if ok, _ := path.Match(p, path.Base(name)); ok {
				return true
			}
		} else if matchElements(strings.Split(strings.TrimPrefix(p, "/"), "/"), strings.Split(name, "/")) {
			return true
		}
	}
	return false
}

// matchElements walks the name once for each **, keeping only the last one to
// return to: what an earlier one could take, the later one can too.
func matchElements(pat, name []string) bool {
	p, n := 0, 0
	starP, starN := -1, 0
	for n < len(name) {
		if p < len(pat) && pat[p] == "**" {
			starP, starN = p, n
			p++
			continue
		}
		if p < len(pat) {
			if ok, _ := path.Match(pat[p], name[n]); ok {
				p++
				n++
				continue
			}
		}
		if starP < 0 {
			return false
		}
		starN++
		p, n = starP+1, starN
	}
	for p < len(pat) && pat[p] == "**" {
		p++
	}
	return p == len(pat)
}
