package layout

import (
	"fmt"
	"strings"

	"github.com/in-toto/in-toto-golang/in_toto"
)

// Lint fails on a well-formed layout that would let through what its author
// thinks it stops. in-toto has defaults that allow; here they must be written.
func (l *Layout) Lint() error {
	if len(l.Steps) == 0 {
		return fmt.Errorf("%w: it has no steps", ErrEmpty)
	}
	joined := map[string]bool{}
	for i := range l.Steps {
		s := &l.Steps[i]
		if len(s.Identities) == 0 && len(s.PubKeys) == 0 {
			return fmt.Errorf("%w: nobody may do step %q", ErrEmpty, s.Name)
		}
		for _, side := range []side{{"materials", s.Materials}, {"products", s.Products}} {
			if err := l.lintRules("step", s.Name, side, joined); err != nil {
				return err
			}
		}
	}
	for _, in := range l.Inspections {
		for _, side := range []side{{"materials", in.Materials}, {"products", in.Products}} {
			if err := l.lintRules("inspection", in.Name, side, map[string]bool{}); err != nil {
				return err
			}
		}
	}
	for _, s := range l.Steps {
		if len(l.Steps) > 1 && !joined[s.Name] && !s.Standalone {
			return fmt.Errorf("%w: no MATCH rule joins step %q to another, so its links could be of anything", ErrNoOverlap, s.Name)
		}
	}
	return nil
}

type side struct {
	name  string
	rules [][]string
}

func (l *Layout) lintRules(kind, name string, sd side, joined map[string]bool) error {
	fail := func(rule []string, format string, args ...any) error {
		return fmt.Errorf("%w: %s %q, %s, rule %q: %w", ErrRule, kind, name, sd.name, strings.Join(rule, " "), fmt.Errorf(format, args...))
	}
	closed := false
	for _, r := range sd.rules {
		d, err := in_toto.UnpackRule(r)
		if err != nil {
			return fail(r, "%w", err)
		}
		if closed {
			return fail(r, "nothing is left for it after a rule about everything")
		}
		switch d["type"] {
		case "match":
			if l.step(d["dstName"]) == nil {
				return fail(r, "there is no step %q", d["dstName"])
			}
			if d["dstName"] != name {
				joined[name], joined[d["dstName"]] = true, true
			}
		case "allow", "disallow":
			closed = d["pattern"] == "*"
		}
	}
	if !closed {
		return fmt.Errorf("%w: %s %q: the rules on its %s must end in DISALLOW * or ALLOW *: what no rule names would be allowed", ErrRule, kind, name, sd.name)
	}
	return nil
}
