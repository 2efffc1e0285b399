package layout

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sort"
	"strings"

	"github.com/in-toto/in-toto-golang/in_toto"

	"github.com/rootlink/rootlink/pkg/link"
)

// inspections has the caller run the layout's inspections, and applies their
// rules to what each found and left.
func (v *verifier) inspections(l *Layout) {
	for _, in := range l.Inspections {
		var src *stepLink
		v.check("inspection.run", "in-toto specification 4.3.2, inspections; layouts.md, inspections", in.Name, link.ErrPolicy, func() (string, error) {
			switch {
			case v.in.Inspect == nil && v.in.SkipInspections:
				return "", errSkip
			case v.in.Inspect == nil:
				return "", fmt.Errorf("%w %q was not run: it runs a command of the layout's author here, and that was not asked for", ErrInspection, in.Name)
			case v.first.err != nil:
				return "", errSkip // nothing is run for what is refused already
			}
			got, err := v.in.Inspect(in)
			if err != nil {
				return "", fmt.Errorf("%w %q: %w", ErrInspection, in.Name, err)
			}
			if got.ExitCode != 0 {
				return "", fmt.Errorf("%w %q: %q ended with exit code %d", ErrInspection, in.Name, strings.Join(in.Run, " "), got.ExitCode)
			}
			one := &stepLink{step: in.Name, name: in.Name, command: in.Run, inTree: true}
			if one.materials, err = inspected(got.Materials); err != nil {
				return "", err
			}
			if one.products, err = inspected(got.Products); err != nil {
				return "", err
			}
			src = one
			return fmt.Sprintf("%s: %d files before, %d after", strings.Join(in.Run, " "), len(got.Materials), len(got.Products)), nil
		})
		sums := map[string]*stepLink{in.Name: src}
		links := map[string]in_toto.Metadata{}
		for _, p := range v.order {
			sums[p.step] = p.link
		}
		for name, sl := range sums {
			if sl != nil {
				links[name] = &in_toto.Metablock{Signed: sl.metadata()}
			}
		}
		v.rules("inspection.rules", in.Name, in.Materials, in.Products, src, links, sums, true)
	}
}

// inspected holds the names that an inspection met to what links are held to.
func inspected(files map[string]string) (map[string]in_toto.HashObj, error) {
	for n := range files {
		if !inTree(n) {
			return nil, &detail{file: n, err: fmt.Errorf("%q: %w", n, ErrEscape)}
		}
	}
	return hashes(files), nil
}

func hashes(files map[string]string) map[string]in_toto.HashObj {
	out := make(map[string]in_toto.HashObj, len(files))
	for n, h := range files {
		out[n] = in_toto.HashObj{"sha256": h}
	}
	return out
}

// artifacts looks for each artifact among the products. A later step may have
// made another file of the same name: what came before is then no product of
// the pipeline any more.
func (v *verifier) artifacts(l *Layout) {
	for _, a := range v.in.Artifacts {
		out := ArtifactResult{Artifact: a}
		v.check("artifact.product", "layouts.md, artifacts", "", link.ErrPolicy, func() (string, error) {
			if l == nil {
				return "", errSkip
			}
			step, subject, from, err := v.find(a)
			if err != nil {
				return "", &detail{file: a.Name, err: err}
			}
			out.Step, out.Subject, out.Link = step, subject, from
			return fmt.Sprintf("%s is product %q of step %q", a.Name, subject, step), nil
		})
		v.res.Artifacts = append(v.res.Artifacts, out)
	}
}

func (v *verifier) find(a link.Artifact) (step, subject, from string, err error) {
	near := ""
	for i := len(v.order) - 1; i >= 0; i-- {
		p := v.order[i]
		for _, n := range slices.Sorted(maps.Keys(p.link.products)) {
			d := p.link.products[n]
			if !sameDigest(a.Digest, d) {
				if near == "" && baseName(n) == baseName(a.Name) {
					near = fmt.Sprintf("; product %q of step %q has %s", n, p.step, digestText(d))
				}
				continue
			}
			if later := v.replaced(i, n, d); later != "" {
				near = fmt.Sprintf("; it is product %q of step %q, and step %q made another of it", n, p.step, later)
				continue
			}
			return p.step, n, p.link.name, nil
		}
		if prefix, ok := matchFiles(a.Files, p.link.products); ok {
			later, which := "", ""
			for n, d := range p.link.products {
				if _, below := a.Files[strings.TrimPrefix(n, prefix)]; below && strings.HasPrefix(n, prefix) && later == "" {
					later, which = v.replaced(i, n, d), n
				}
			}
			if later == "" {
				return p.step, cmp.Or(prefix, "."), p.link.name, nil
			}
			near = fmt.Sprintf("; it is what step %q made, and step %q made another %s", p.step, later, which)
		}
	}
	if len(a.Files) > 0 {
		return "", "", "", fmt.Errorf("%s is not, file by file, what any step made%s", a.Name, near)
	}
	return "", "", "", errors.New(a.Name + " (" + digestText(a.Digest) + ") is no product of any step" + near)
}

// replaced names the last later step that has a product n of other content.
func (v *verifier) replaced(i int, n string, d in_toto.HashObj) string {
	for j := len(v.order) - 1; j > i; j-- {
		if later, ok := v.order[j].link.products[n]; ok {
			if maps.Equal(later, d) {
				return ""
			}
			return v.order[j].step
		}
	}
	return ""
}

// sameDigest wants one strong algorithm in common, and no common one to differ.
func sameDigest(a, b map[string]string) bool {
	same := false
	for alg, h := range a {
		if w, ok := b[alg]; ok {
			if h != w {
				return false
			}
			same = same || alg == "sha256" || alg == "sha384" || alg == "sha512" || alg == link.DirHashAlg
		}
	}
	return same
}

// matchFiles compares a directory with the products below one name, file by file.
func matchFiles(files map[string]string, products map[string]in_toto.HashObj) (string, bool) {
	if len(files) == 0 {
		return "", false
	}
	first := slices.Min(slices.Collect(maps.Keys(files)))
	names := slices.Sorted(maps.Keys(products))
	for _, p := range names {
		prefix, ok := strings.CutSuffix(p, first)
		if !ok || prefix != "" && !strings.HasSuffix(prefix, "/") {
			continue
		}
		// What lies below a name is in one place of the list: going through all
		// of it for every name that ends like the file would take a link's maker
		// at his word about how long.
		n, at := 0, sort.SearchStrings(names, prefix)
		for _, name := range names[at:] {
			rel, ok := strings.CutPrefix(name, prefix)
			if !ok {
				break
			}
			if files[rel] == "" || files[rel] != products[name]["sha256"] {
				n = -1
				break
			}
			n++
		}
		if n == len(files) {
			return prefix, true
		}
	}
	return "", false
}

func baseName(s string) string { return s[strings.LastIndexByte(s, '/')+1:] }
