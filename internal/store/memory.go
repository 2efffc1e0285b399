package store

import (
	"context"
	"database/sql"
	"encoding/json"
	"fmt"
	"time"
)

// memory is a copy of what the database holds, less history, old policy
// revisions and pins. What its pointers lead to is never modified.
type memory struct {
	entries        map[string]*Entry
	byParent       map[string]map[string]*Entry // parent ID → entry ID → entry
	agents         map[string]*Agent
	authorities    []*Authority // oldest first
	jwtAuthorities []*JWTAuthority
	policies       map[string]*PolicyRevision
	federated      map[string]*FederatedBundle // by trust domain
	bundleSequence uint64
	generation     uint64 // grows with every change of entries
}

func newMemory() *memory {
	return &memory{
		entries:    make(map[string]*Entry),
		byParent:   make(map[string]map[string]*Entry),
		agents:     make(map[string]*Agent),
		policies:   make(map[string]*PolicyRevision),
		federated:  make(map[string]*FederatedBundle),
		generation: 1,
	}
}

func (m *memory) putEntry(e *Entry) {
	m.dropEntry(e.ID)
	m.entries[e.ID] = e
	if m.byParent[e.ParentID] == nil {
		m.byParent[e.ParentID] = make(map[string]*Entry)
	}
	m.byParent[e.ParentID][e.ID] = e
	m.generation++
}

func (m *memory) dropEntry(id string) {
	old := m.entries[id]
	if old == nil {
		return
	}
	delete(m.entries, id)
	delete(m.byParent[old.ParentID], id)
	if len(m.byParent[old.ParentID]) == 0 {
		delete(m.byParent, old.ParentID)
	}
	m.generation++
}

// load reads the whole database in one transaction.
func (s *Store) load(ctx context.Context) (*memory, error) {
	tx, err := s.db.BeginTx(ctx, nil)
	if err != nil {
		return nil, fmt.Errorf("store: read: %w", err)
	}
	defer tx.Rollback()
	m := newMemory()
	for _, f := range []func(context.Context, *sql.Tx, *memory) error{
		loadEntries, loadAgents, loadAuthorities, loadJWTAuthorities, loadPolicies, loadFederated, loadMeta,
	} {
		if err := f(ctx, tx, m); err != nil {
			return nil, fmt.Errorf("store: read: %w", err)
		}
	}
	return m, nil
}

func loadMeta(ctx context.Context, tx *sql.Tx, m *memory) error {
	return tx.QueryRowContext(ctx, `SELECT value FROM meta WHERE key = 'bundle_sequence'`).Scan(&m.bundleSequence)
}

// each runs query and calls f on every row.
func each(ctx context.Context, tx *sql.Tx, query string, f func(*sql.Rows) error, args ...any) error {
	rows, err := tx.QueryContext(ctx, query, args...)
	if err != nil {
		return err
	}
	defer rows.Close()
	for rows.Next() {
		if err := f(rows); err != nil {
			return err
		}
	}
	return rows.Err()
}

// Times are stored as Unix milliseconds, 0 for the zero time.

func toMillis(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixMilli()
}

func fromMillis(ms int64) time.Time {
	if ms == 0 {
		return time.Time{}
	}
	return time.UnixMilli(ms).UTC()
}

func toJSON(v any) (string, error) {
	b, err := json.Marshal(v)
	return string(b), err
}

func fromJSON(s string, v any) error { return json.Unmarshal([]byte(s), v) }
