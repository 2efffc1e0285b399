package link

import (
	"crypto"
	"fmt"
	"time"
)

// What judging a whole pipeline needs of single links.

// Statement returns the link's statement once its signature was checked, and
// nil before. Whether the link as a whole is to be believed is Verdict's.
func (l *LinkResult) Statement() *Statement { return l.stmt }

// LayoutKeys returns the keys that may sign layouts, with their names.
func (t *Trust) LayoutKeys() (keys []crypto.PublicKey, names []string) {
	for i, k := range t.layoutKeys {
		keys = append(keys, k)
		name := t.file.LayoutKeys[i].Name
		if name == "" {
			name = fmt.Sprintf("layout key %d", i+1)
		}
		names = append(names, name)
	}
	return keys, names
}

// CheckWindow fails when trust.json is not valid yet at now, or no longer.
func (t *Trust) CheckWindow(now time.Time) error {
	_, err := checkTrustWindow(t, now)
	return err
}
