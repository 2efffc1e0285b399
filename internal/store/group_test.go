package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"sync"
	"testing"
)

// group has all writes go into one transaction: they join while another write
// holds the store.
func group(t *testing.T, s *Store, writes ...func() error) []error {
	t.Helper()
	s.writing.Lock()
	errs := make([]error, len(writes))
	var wg sync.WaitGroup
	for i, w := range writes {
		wg.Go(func() { errs[i] = w() })
		for waiting := 0; waiting <= i; { // in this order
			s.joining.Lock()
			waiting = len(s.joined)
			s.joining.Unlock()
		}
	}
	s.writing.Unlock()
	wg.Wait()
	return errs
}

func groupAgent(n int) Agent {
	return agent(fmt.Sprintf("spiffe://example.org/spire/agent/group/%d", n))
}

func countCommits(s *Store, n *int) {
	s.failCommit = func(commit func() error) error { *n++; return commit() }
}

// What is refused, or has hung up, takes nobody else of its group along, and
// leaves nothing behind.
func TestGroupMembersFailAlone(t *testing.T) {
	s := newStore(t)
	fill(t, s)
	const banned = "spiffe://example.org/spire/agent/a"
	if err := s.BanAgent(t.Context(), banned); err != nil {
		t.Fatal(err)
	}
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	own := errors.New("changed its mind")
	put := func(ctx context.Context, a Agent) func() error {
		return func() error { _, err := s.PutAttestedAgent(ctx, a, ""); return err }
	}
	var commits int
	countCommits(s, &commits)
	var pins [2][]byte
	errs := group(t, s,
		put(t.Context(), groupAgent(1)),
		put(t.Context(), agent(banned)),
		put(gone, groupAgent(2)),
		func() error {
			return s.join(t.Context(), func(ctx context.Context, tx *sql.Tx) (func(*memory), error) {
				if _, err := tx.ExecContext(ctx, `INSERT INTO ak_pins VALUES (?,?,0)`, make([]byte, 32), []byte{9}); err != nil {
					t.Error(err)
				}
				return func(*memory) { t.Error("its change reaches memory") }, own
			})
		},
		func() (err error) { pins[0], err = s.PinAK(t.Context(), [32]byte{}, []byte{1}, false); return err },
		func() (err error) { pins[1], err = s.PinAK(t.Context(), [32]byte{}, []byte{2}, false); return err },
		put(t.Context(), groupAgent(3)),
	)
	for i, want := range []error{nil, ErrBanned, context.Canceled, own, nil, nil, nil} {
		if !errors.Is(errs[i], want) {
			t.Errorf("write %d: %v, want %v", i, errs[i], want)
		}
	}
	if commits != 1 {
		t.Errorf("%d commits for a group", commits)
	}
	if string(pins[0]) != "\x01" || string(pins[1]) != "\x01" {
		t.Errorf("the first AK is pinned, and all hear of it: %x", pins)
	}
	for n, want := range map[int]error{1: nil, 2: ErrNotFound, 3: nil} {
		if _, err := s.Agent(groupAgent(n).ID); !errors.Is(err, want) {
			t.Errorf("agent %d: %v", n, err)
		}
	}
	if a, err := s.Agent(banned); err != nil || !a.Banned {
		t.Error("the ban is gone", err)
	}
	checkMemory(t, s)
}

// A commit that fails, before it persisted or after, is acknowledged to nobody.
func TestGroupCommitFails(t *testing.T) {
	disk := errors.New("disk full")
	for _, persisted := range []bool{false, true} {
		s := newStore(t)
		fill(t, s)
		s.failCommit = func(commit func() error) error {
			if persisted {
				if err := commit(); err != nil {
					t.Error(err)
				}
			}
			return disk
		}
		var writes []func() error
		for n := range 3 {
			writes = append(writes, func() error { _, err := s.PutAttestedAgent(t.Context(), groupAgent(n), ""); return err })
		}
		for _, err := range group(t, s, writes...) {
			if !errors.Is(err, disk) {
				t.Errorf("acknowledged: %v", err)
			}
		}
		s.failCommit = nil
		checkMemory(t, s)
	}
}

// A panic in one ends the transaction, and nobody waits for ever.
func TestGroupPanics(t *testing.T) {
	s := newStore(t)
	var caught any
	errs := group(t, s,
		func() error {
			defer func() { caught = recover() }()
			_, err := s.PutAttestedAgent(t.Context(), groupAgent(1), "")
			return err
		},
		func() error {
			return s.join(t.Context(), func(context.Context, *sql.Tx) (func(*memory), error) { panic("bug") })
		},
		func() error { _, err := s.PutAttestedAgent(t.Context(), groupAgent(2), ""); return err },
	)
	if caught == nil || errs[1] == nil || errs[2] == nil {
		t.Error(caught, errs)
	}
	checkMemory(t, s)
	if _, err := s.PutAttestedAgent(t.Context(), groupAgent(3), ""); err != nil {
		t.Fatal(err)
	}
	checkMemory(t, s)
}
