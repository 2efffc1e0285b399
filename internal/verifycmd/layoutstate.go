package verifycmd

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/internal/files"
	"github.com/rootlink/rootlink/pkg/attest"
	"github.com/rootlink/rootlink/pkg/layout"
	"github.com/rootlink/rootlink/pkg/link"
)

const layoutStateFormat = "rootlink-layout-state"

// layoutState remembers the newest edition of each layout, by trust domain and
// name: in-toto's own layouts know an end and no order, so an older one with
// weaker demands would be as good.
type layoutState struct {
	path string
	keys []string // of the trust domain
	lock *os.File
	file layoutStateFile
}

type layoutStateFile struct {
	Format  string                            `json:"format"`
	Version int                               `json:"version"`
	Layouts map[string]map[string]layout.Seen `json:"layouts"` // trust state key → name → edition
}

func openLayoutState(path string, trust *link.Trust) (*layoutState, error) {
	const other = "choose a place for it with --layout-state FILE"
	if path == "" {
		dir := os.Getenv("XDG_STATE_HOME")
		if dir == "" {
			home, err := os.UserHomeDir()
			if err != nil {
				return nil, cli.Hint(fmt.Errorf("no place to remember layouts: %w", err), other)
			}
			dir = filepath.Join(home, ".local", "state")
		}
		path = filepath.Join(dir, "rootlink", "layout-state.json")
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			return nil, cli.Hint(err, other)
		}
	}
	lock, err := files.LockWait(path + ".lock")
	if err != nil {
		return nil, cli.Hint(err, other)
	}
	s := &layoutState{path: path, keys: trust.StateKeys(), lock: lock}
	if err := s.load(); err != nil {
		s.close()
		return nil, err
	}
	return s, nil
}

func (s *layoutState) load() error {
	raw, err := files.Read(s.path, maxState)
	if errors.Is(err, fs.ErrNotExist) {
		s.file = layoutStateFile{Format: layoutStateFormat, Version: 1}
	} else if err != nil {
		return err
	} else if err := json.Unmarshal(raw, &s.file); err != nil || s.file.Format != layoutStateFormat || s.file.Version != 1 {
		// As with the trust state: damaged must not count as none.
		return cli.Hint(fmt.Errorf("%s is not a layout state", s.path), "remove it only if you know why it is damaged: the next layout is then taken as the newest")
	}
	if s.file.Layouts == nil {
		s.file.Layouts = map[string]map[string]layout.Seen{}
	}
	return nil
}

// seen is the newest edition of each layout in any of the lines.
func (s *layoutState) seen() map[string]layout.Seen {
	out := map[string]layout.Seen{}
	for _, k := range s.keys {
		for name, edition := range s.file.Layouts[k] {
			if known, ok := out[name]; !ok || edition.Serial > known.Serial {
				out[name] = edition
			}
		}
	}
	return out
}

// remember writes the editions in res that passed the checks of a layout.
func (s *layoutState) remember(res *layout.Result) error {
	for _, c := range res.Checks {
		switch c.ID {
		case "trust.window", "trust.serial", "layout.form", "layout.signature", "layout.window", "layout.serial":
			if c.Outcome != attest.Passed {
				return nil // which of several it was does not matter
			}
		}
	}
	changed := false
	for _, l := range res.Layouts {
		for _, k := range s.keys {
			if known := s.file.Layouts[k][l.Name]; l.Serial > known.Serial {
				if s.file.Layouts[k] == nil {
					s.file.Layouts[k] = map[string]layout.Seen{}
				}
				s.file.Layouts[k][l.Name] = layout.Seen{Serial: l.Serial, Digest: l.Digest}
				changed = true
			}
		}
	}
	if !changed {
		return nil
	}
	raw, err := json.MarshalIndent(s.file, "", "  ")
	if err != nil {
		return err
	}
	if err := files.Write(s.path, append(raw, '\n'), 0o600); err != nil {
		return cli.Hint(fmt.Errorf("remembering the edition of the layout: %w", err), "choose a place for it with --layout-state FILE")
	}
	return nil
}

func (s *layoutState) close() { s.lock.Close() }
