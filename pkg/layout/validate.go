package layout

import (
	"encoding/hex"
	"fmt"
	"path"
	"regexp"
	"slices"
	"strings"
	"sync"

	"github.com/in-toto/in-toto-golang/in_toto"

	"github.com/rootlink/rootlink/pkg/link"
)

// namePattern is what can also be part of a file name, as for steps of a recorder.
var namePattern = sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9._-]{0,127}$`) })

// Validate fails on what is no layout in form. A layout that is one and still
// demands too little is refused by Lint.
func (l *Layout) Validate() error {
	switch {
	case !namePattern().MatchString(l.Name):
		return malformed("layout name %q", l.Name)
	case l.Serial == 0:
		return malformed("serial 0: editions are numbered from 1")
	case l.Issued.IsZero() || !l.Expires.After(l.Issued):
		return malformed("it must expire after it was issued (%s, %s)", l.Issued, l.Expires)
	case l.Expires.After(l.Issued.AddDate(MaxLife, 0, 0)):
		return malformed("it lives for more than %d years", MaxLife)
	case len(l.Readme) > MaxReadme || strings.Contains(l.Readme, extensionMark):
		return malformed("readme")
	case len(l.Steps) > MaxSteps || len(l.Inspections) > MaxInspections || len(l.Keys) > MaxKeys:
		return malformed("%d steps, %d inspections, %d keys", len(l.Steps), len(l.Inspections), len(l.Keys))
	}
	for id, k := range l.Keys {
		if err := checkKey(id, k); err != nil {
			return fmt.Errorf("key %s: %w", id, err)
		}
	}
	seen := map[string]bool{}
	for i := range l.Steps {
		s := &l.Steps[i]
		if seen[s.Name] {
			return malformed("two steps or inspections %q", s.Name)
		}
		seen[s.Name] = true
		if err := l.validateStep(s); err != nil {
			return fmt.Errorf("step %q: %w", s.Name, err)
		}
	}
	for _, in := range l.Inspections {
		if seen[in.Name] || !namePattern().MatchString(in.Name) {
			return malformed("inspection name %q", in.Name)
		}
		seen[in.Name] = true
		if len(in.Run) == 0 {
			return malformed("inspection %q runs nothing", in.Name)
		}
		if err := checkWords(in.Run); err != nil {
			return fmt.Errorf("inspection %q: %w", in.Name, err)
		}
		if err := checkRules(in.Materials, in.Products); err != nil {
			return fmt.Errorf("inspection %q: %w", in.Name, err)
		}
	}
	return nil
}

func (l *Layout) validateStep(s *Step) error {
	switch {
	case !namePattern().MatchString(s.Name):
		return malformed("its name")
	case s.Threshold < 1 || s.Threshold > MaxThreshold:
		return malformed("threshold %d, 1 to %d allowed", s.Threshold, MaxThreshold)
	case len(s.PubKeys) > MaxKeys:
		return malformed("%d keys", len(s.PubKeys))
	case s.ExitCode < 0 || s.ExitCode > 255:
		return malformed("exit code %d", s.ExitCode)
	case s.Evidence != "" && !slices.Contains(link.EvidenceKinds(), s.Evidence):
		return malformed("evidence %q: %w", s.Evidence, link.ErrUnsupported)
	case s.Tier != "" && s.Tier != link.TierTPM && s.Tier != link.TierBootAttested:
		return malformed("tier %q: %w", s.Tier, link.ErrUnsupported)
	}
	for i, id := range s.PubKeys {
		if _, ok := l.Keys[id]; !ok || slices.Contains(s.PubKeys[:i], id) {
			return malformed("key %s is not among the layout's, or twice", id)
		}
	}
	if err := checkWords(s.Command); err != nil {
		return err
	}
	if err := s.validateDemands(); err != nil {
		return err
	}
	return checkRules(s.Materials, s.Products)
}

func (s *Step) validateDemands() error {
	if len(s.Identities) > MaxDemands || len(s.PCRPolicies) > MaxDemands {
		return malformed("too many identities or PCR policies")
	}
	for _, p := range s.Identities {
		if err := link.ValidatePattern(p); err != nil {
			return err
		}
	}
	for name, list := range map[string][]string{
		"authorities": s.Authorities, "eks": s.EKs, "tools": s.Tools, "recorders": s.Recorders, "executables": s.Executables,
	} {
		if len(list) > MaxDemands {
			return malformed("%s: %d, at most %d allowed", name, len(list), MaxDemands)
		}
		// Present and empty would be a demand that nothing meets, or none.
		if list != nil && len(list) == 0 {
			return malformed("%s is empty", name)
		}
		for _, h := range list {
			if b, err := hex.DecodeString(h); err != nil || len(b) != 32 || h != strings.ToLower(h) {
				return malformed("%s: %q is not a SHA-256 in lower-case hex", name, h)
			}
		}
	}
	hardware := s.DistinctHosts || s.ProtectedRecorder || s.CachesPerJob || s.Evidence != "" || s.Tier != "" ||
		len(s.Authorities)+len(s.EKs)+len(s.PCRPolicies)+len(s.Tools)+len(s.Recorders)+len(s.Executables) > 0
	switch {
	case (s.KeyPinned || s.Sublayout != "") && hardware:
		return malformed("a pinned key or a sublayout shows nothing of the hardware and programs that are demanded")
	case s.Sublayout != "" && (s.KeyPinned || len(s.Identities) > 0 || s.Threshold != 1):
		return malformed("a sublayout stands for the step alone, with threshold 1")
	case s.Sublayout != "" && !namePattern().MatchString(s.Sublayout):
		return malformed("sublayout name %q", s.Sublayout)
	case len(s.PubKeys) > 0 && !s.KeyPinned && s.Sublayout == "":
		return malformed("pinned keys, and neither key_pinned nor sublayout says what for")
	}
	return nil
}

func checkWords(words []string) error {
	if len(words) > MaxCommand {
		return malformed("command of %d words", len(words))
	}
	for _, w := range words {
		if len(w) > MaxWord {
			return malformed("command with a word of %d bytes", len(w))
		}
	}
	return nil
}

func checkRules(materials, products [][]string) error {
	for side, rules := range map[string][][]string{"materials": materials, "products": products} {
		if len(rules) > MaxRules {
			return malformed("%d rules on its %s", len(rules), side)
		}
		for _, r := range rules {
			if err := checkRule(r); err != nil {
				return fmt.Errorf("rule %q on its %s: %w", strings.Join(r, " "), side, err)
			}
		}
	}
	return nil
}

// checkRule makes sure that the engine reads what people read. It panics on an
// empty rule, takes a pattern that it cannot parse for one that matches nothing
// (a DISALLOW would then allow), and takes an unknown kind of artifact for none.
func checkRule(r []string) error {
	if len(r) < 2 || len(r) > MaxRuleWords {
		return malformed("%d words", len(r))
	}
	for _, w := range r {
		if w == "" || len(w) > MaxPattern {
			return malformed("a word of %d bytes", len(w))
		}
	}
	d, err := in_toto.UnpackRule(r)
	if err != nil {
		return malformed("none of in-toto's rules")
	}
	if d["type"] == "match" && d["dstType"] != "materials" && d["dstType"] != "products" {
		return malformed("WITH %s: only MATERIALS or PRODUCTS", d["dstType"])
	}
	for _, key := range []string{"srcPrefix", "dstPrefix"} {
		if p := d[key]; p != "" && !inTree(path.Clean(p)) {
			return fmt.Errorf("%q: %w", p, ErrEscape)
		}
	}
	// The engine cleans patterns as if they were paths, which may take a
	// character class apart.
	if path.Clean(d["pattern"]) != d["pattern"] {
		return malformed("write the pattern as %q", path.Clean(d["pattern"]))
	}
	return checkPattern(d["pattern"])
}

// checkPattern accepts the patterns that the engine's matcher can parse to
// their end, whatever the name: it finds a broken one only when it gets there.
func checkPattern(p string) error {
	for i := 0; i < len(p); i++ {
		switch p[i] {
		case '\\':
			if i++; i == len(p) {
				return malformed("pattern %q ends in \\", p)
			}
		case '[':
			n, err := class(p[i+1:])
			if err != nil {
				return malformed("pattern %q: %w", p, err)
			}
			i += n
		}
	}
	return nil
}

// class returns how many bytes after '[' a character class takes.
func class(s string) (int, error) {
	i, items := 0, 0
	if strings.HasPrefix(s, "!") {
		i++
	}
	one := func() error {
		if i < len(s) && s[i] == '\\' {
			i++
		} else if i < len(s) && (s[i] == '-' || s[i] == ']') {
			return malformed("character class")
		}
		if i >= len(s) || s[i] >= 0x80 {
			return malformed("character class that is open, or not of ASCII")
		}
		i++
		return nil
	}
	for {
		if i < len(s) && s[i] == ']' && items > 0 {
			return i + 1, nil
		}
		if err := one(); err != nil {
			return 0, err
		}
		if i < len(s) && s[i] == '-' {
			i++
			if err := one(); err != nil {
				return 0, err
			}
		}
		items++
	}
}

// inTree: a clean, relative name that stays below where it starts.
func inTree(name string) bool {
	return name != "" && path.Clean(name) == name && name[0] != '/' && name != ".." && !strings.HasPrefix(name, "../") &&
		!strings.Contains(name, "\x00")
}
