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
	"github.com/rootlink/rootlink/pkg/link"
)

const (
	stateFormat = "rootlink-trust-state"
	maxState    = 1 << 20 // bytes
)

// state remembers the highest serial seen of each trust domain's trust.json, so
// that an older one, with fewer revocations, is noticed.
type state struct {
	path  string
	key   string
	least uint64
	lock  *os.File
	file  stateFile
}

type stateFile struct {
	Format  string            `json:"format"`
	Version int               `json:"version"`
	Serials map[string]uint64 `json:"serials"`
}

// openState reads path (default: in the user's state directory) under a lock,
// which holds until close.
func openState(path string, trust *link.Trust) (*state, error) {
	const other = "choose a place for it with --trust-state FILE"
	if path == "" {
		dir := os.Getenv("XDG_STATE_HOME")
		if dir == "" {
			home, err := os.UserHomeDir()
			if err != nil {
				return nil, cli.Hint(fmt.Errorf("no place to remember the serial of trust.json: %w", err), other)
			}
			dir = filepath.Join(home, ".local", "state")
		}
		path = filepath.Join(dir, "rootlink", "trust-state.json")
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			return nil, cli.Hint(err, other)
		}
	}
	lock, err := files.LockWait(path + ".lock")
	if err != nil {
		return nil, cli.Hint(err, other)
	}
	s := &state{path: path, key: trust.StateKey(), lock: lock}
	if err := s.load(); err != nil {
		s.close()
		return nil, err
	}
	return s, nil
}

func (s *state) load() error {
	raw, err := files.Read(s.path, maxState)
	if errors.Is(err, fs.ErrNotExist) {
		s.file = stateFile{Format: stateFormat, Version: 1, Serials: map[string]uint64{}}
		return nil
	}
	if err != nil {
		return err
	}
	// A state that cannot be read must not count as none: whoever can damage
	// it could roll trust.json back.
	if err := json.Unmarshal(raw, &s.file); err != nil || s.file.Format != stateFormat || s.file.Version != 1 {
		return cli.Hint(fmt.Errorf("%s is not a trust state", s.path), "remove it only if you know why it is damaged: the next trust.json is then taken as the newest")
	}
	if s.file.Serials == nil {
		s.file.Serials = map[string]uint64{}
	}
	s.least = s.file.Serials[s.key]
	return nil
}

// remember writes serial if it is higher than what was known.
func (s *state) remember(serial uint64) error {
	if known, ok := s.file.Serials[s.key]; ok && serial <= known {
		return nil
	}
	s.file.Serials[s.key] = serial
	raw, err := json.MarshalIndent(s.file, "", "  ")
	if err != nil {
		return err
	}
	if err := files.Write(s.path, append(raw, '\n'), 0o600); err != nil {
		return cli.Hint(fmt.Errorf("remembering the serial of trust.json: %w", err), "choose a place for it with --trust-state FILE")
	}
	return nil
}

func (s *state) close() { s.lock.Close() }
