package recorder

import (
	"slices"

	"github.com/rootlink/rootlink/pkg/link"
)

// ran is what a step finds out about the programs that ran.
type ran struct {
	tree     *Tree // nil: the main process alone was followed
	untraced bool
	caches   caches
}

// watch prepares to follow the step's processes.
func (r *state) watch(env []string) {
	r.caches.named(env)
	if r.MainOnly {
		return
	}
	r.tree = NewTree()
	r.tree.Exec = func(pid int, goTool bool) {
		if goTool {
			r.caches.ofGo(pid)
		}
	}
}

// sayPowerless says what a step may have failed of.
func (r *state) sayPowerless() {
	if r.tree == nil {
		return
	}
	for _, path := range r.tree.powerless {
		r.say("%s gains privileges when it starts, and gained none here because it was traced; --follow main leaves it alone", path)
	}
}

// noteRan writes down what ran. The agent's digests of the main process come
// first: they are what it vouches for.
func (r *state) noteRan() {
	b := &r.stmt.Byproducts
	b.Executables, b.Tree, b.TreeGaps = r.execs, false, nil
	switch {
	case r.untraced:
		b.TreeGaps = []string{"the step ran without a trace"}
	case r.tree == nil:
		b.TreeGaps = []string{"the recorder was told to follow the main process alone"}
	default:
		seen, gaps := r.tree.Result()
		b.Tree, b.TreeGaps = len(gaps) == 0, gaps
		for _, e := range seen {
			same := func(x link.Executable) bool {
				return x.Path == e.Path && x.Role == e.Role && x.Digest["sha256"] == e.Digest["sha256"]
			}
			if i := slices.IndexFunc(b.Executables, same); i >= 0 {
				b.Executables[i].Count = e.Count
			} else {
				b.Executables = append(b.Executables, e)
			}
		}
	}
	if over := len(b.Executables) - link.MaxExecutables; over > 0 {
		b.Executables = b.Executables[:link.MaxExecutables]
		b.Tree, b.TreeGaps = false, append(b.TreeGaps, "more different programs ran than a statement lists")
	}
	for _, g := range b.TreeGaps {
		r.say("not all that ran is listed: %s", g)
	}
	r.stmt.Environment.Caches = r.caches.list()
}
