package verifycmd

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"

	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/internal/files"
	"github.com/rootlink/rootlink/pkg/link"
)

const (
	stateFormat = "rootlink-trust-state"
	maxState    = 1 << 20 // bytes
)

// state remembers what was seen of each trust domain: the key that signs its
// trust.json, the highest serial, so that an older one with fewer revocations is
// noticed, and the trees of its logs.
type state struct {
	path  string
	keys  []string // of the serial: every line that the file at hand belongs to
	td    string
	least uint64 // the highest serial of these lines
	seen  string // its digest
	lock  *os.File
	file  stateFile
}

type stateFile struct {
	Format  string            `json:"format"`
	Version int               `json:"version"`
	Serials map[string]uint64 `json:"serials"`
	// Digests are those of the documents with these serials.
	Digests map[string]string `json:"digests,omitempty"`
	// Keys are the fingerprints of who signed the last trust.json of a trust domain.
	Keys map[string][]string `json:"keys,omitempty"`
	// Logs are the largest trees seen, by log ID.
	Logs map[string]link.SeenCheckpoint `json:"logs,omitempty"`
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
	s := &state{path: path, keys: trust.StateKeys(), td: trust.TrustDomain(), lock: lock}
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
	for _, k := range s.keys {
		if n := s.file.Serials[k]; n > s.least {
			s.least, s.seen = n, s.file.Digests[k]
		}
	}
	return nil
}

// known fills in what was seen before. Keys that the user pinned replace those
// remembered: that is how a trust domain that was set up anew is accepted.
func (s *state) known(in *link.Input, pins []string) {
	in.LeastSerial, in.LeastDigest = s.least, s.seen
	in.TrustKeys = pins
	if len(pins) == 0 {
		in.TrustKeys = s.file.Keys[s.td]
	}
	for _, id := range slices.Sorted(maps.Keys(s.file.Logs)) {
		in.Seen = append(in.Seen, s.file.Logs[id])
	}
}

// remember writes down what a good trust.json, and logs it names, have shown.
func (s *state) remember(trust *link.Trust, seen []link.SeenCheckpoint) error {
	before, err := json.Marshal(s.file)
	if err != nil {
		return err
	}
	if s.file.Digests == nil {
		s.file.Digests = map[string]string{}
	}
	if s.file.Keys == nil {
		s.file.Keys = map[string][]string{}
	}
	if s.file.Logs == nil {
		s.file.Logs = map[string]link.SeenCheckpoint{}
	}
	for _, k := range s.keys {
		if known, ok := s.file.Serials[k]; !ok || trust.Serial() >= known {
			s.file.Serials[k], s.file.Digests[k] = trust.Serial(), trust.Digest()
		}
	}
	s.file.Keys[s.td] = trust.Signers()
	for _, c := range seen {
		if c.Size >= s.file.Logs[c.LogID].Size {
			s.file.Logs[c.LogID] = c
		}
	}
	after, err := json.Marshal(s.file)
	if err != nil || bytes.Equal(before, after) {
		return err
	}
	raw, err := json.MarshalIndent(s.file, "", "  ")
	if err != nil {
		return err
	}
	if err := files.Write(s.path, append(raw, '\n'), 0o600); err != nil {
		return cli.Hint(fmt.Errorf("remembering what trust.json said: %w", err), "choose a place for it with --trust-state FILE")
	}
	return nil
}

func (s *state) close() { s.lock.Close() }
