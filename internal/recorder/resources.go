package recorder

import (
	"encoding/hex"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/rootlink/rootlink/pkg/link"
)

// Resources lists the files for a statement, at most limit of them. When there
// are more, directories that were asked for are folded into one dirHash each,
// the largest first; a file that was asked for by name always stands for itself.
// A dirHash covers regular files only: symlinks in a folded directory are left
// out of it and added to Skipped.
func (r *Recording) Resources(limit int) ([]link.Resource, error) {
	folded := map[int]bool{}
	for {
		names := map[string]bool{}
		for i, root := range r.roots {
			if !folded[i] {
				for _, n := range root.files {
					names[n] = true
				}
			}
		}
		if len(names)+len(folded) <= limit {
			return r.list(names, folded)
		}
		largest := -1
		for i, root := range r.roots {
			if root.dir && !folded[i] && (largest < 0 || len(root.files) > len(r.roots[largest].files)) {
				largest = i
			}
		}
		if largest < 0 {
			return nil, fmt.Errorf("%d paths, at most %d can be named: name the directories that hold them: %w", len(names)+len(folded), limit, ErrPath)
		}
		folded[largest] = true
	}
}

func (r *Recording) list(names map[string]bool, folded map[int]bool) ([]link.Resource, error) {
	out := make([]link.Resource, 0, len(names)+len(folded))
	for _, n := range slices.Sorted(maps.Keys(names)) {
		sum := r.files[n].sum
		out = append(out, link.Resource{Name: n, Digest: map[string]string{"sha256": hex.EncodeToString(sum[:])}})
	}
	for i, root := range r.roots {
		if !folded[i] {
			continue
		}
		whole, symlinks, err := r.tree(root)
		if err != nil {
			return nil, err
		}
		out = append(out, whole)
		for _, n := range symlinks {
			r.Skipped = append(r.Skipped, n+": symlink, which a dirHash does not cover")
		}
	}
	slices.Sort(r.Skipped)
	r.Skipped = slices.Compact(r.Skipped)
	return out, nil
}

// tree is a directory that was asked for as one dirHash, and the symlinks in it
// that a dirHash does not cover.
func (r *Recording) tree(root root) (_ link.Resource, symlinks []string, err error) {
	tree := make(map[string][32]byte, len(root.files))
	for _, n := range root.files {
		if r.files[n].link {
			symlinks = append(symlinks, n)
			continue
		}
		rel := n
		if root.name != "." {
			rel = strings.TrimPrefix(n, root.name+"/")
		}
		tree[rel] = r.files[n].sum
	}
	sum, err := link.DirHash(tree)
	return link.Resource{Name: root.name, Digest: map[string]string{link.DirHashAlg: sum}}, symlinks, err
}

// Materials is Resources for what goes into a step: as many files as a statement
// takes, and a directory with more of them than a product may have also as the
// one dirHash that an earlier step recorded it by. Without that no rule could
// match it with where it came from.
func (r *Recording) Materials() ([]link.Resource, error) {
	out, err := r.Resources(link.MaxMaterials)
	if err != nil {
		return nil, err
	}
	for _, root := range r.roots {
		there := slices.ContainsFunc(out, func(l link.Resource) bool { return l.Name == root.name })
		if !root.dir || there || len(root.files) <= link.MaxSubjects || len(out) == link.MaxMaterials {
			continue
		}
		whole, _, err := r.tree(root) // its symlinks are listed one by one
		if err != nil {
			return nil, err
		}
		out = append(out, whole)
	}
	return out, nil
}
