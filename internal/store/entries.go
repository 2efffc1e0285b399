package store

import (
	"cmp"
	"context"
	"crypto/rand"
	"database/sql"
	"fmt"
	"slices"
	"time"
)

// SortSelectors returns the selectors sorted and without duplicates.
func SortSelectors(in []Selector) []Selector {
	out := slices.Clone(in)
	slices.SortFunc(out, compareSelectors)
	return slices.Compact(out)
}

func compareSelectors(a, b Selector) int {
	if c := cmp.Compare(a.Type, b.Type); c != 0 {
		return c
	}
	return cmp.Compare(a.Value, b.Value)
}

// CreateResult is the outcome for one entry of CreateEntries.
type CreateResult struct {
	Entry *Entry // the entry that was created or, with ErrExists, the one in its way
	Err   error
}

// CreateEntries creates entries in one transaction. Entries without an ID get
// one. Either every result without an Err is durable, or an error is returned
// and none is.
func (s *Store) CreateEntries(ctx context.Context, entries []Entry) ([]CreateResult, error) {
	results := make([]CreateResult, len(entries))
	err := s.write(ctx, func(tx *sql.Tx) (func(*memory), error) {
		var made []*Entry
		for i := range entries {
			e := entries[i]
			e.Selectors = SortSelectors(e.Selectors)
			e.CreatedAt = s.now().UTC().Truncate(time.Second)
			e.Revision = 0
			if e.ID == "" {
				e.ID = newUUID()
			}
			other, err := inTheWay(ctx, tx, &e)
			if err != nil {
				return nil, err
			}
			if other != nil {
				results[i] = CreateResult{other, ErrExists}
				continue
			}
			if err := s.checkFederates(&e); err != nil {
				results[i].Err = err
				continue
			}
			if err := insertEntry(ctx, tx, &e); err != nil {
				return nil, err
			}
			results[i].Entry = &e
			made = append(made, &e)
		}
		return func(m *memory) {
			for _, e := range made {
				m.putEntry(e)
			}
		}, nil
	})
	if err != nil {
		return nil, err
	}
	return results, nil
}

// UpdateEntry changes one entry by f, which gets a copy. The revision grows.
// f's error is returned unchanged.
func (s *Store) UpdateEntry(ctx context.Context, id string, f func(*Entry) error) (*Entry, error) {
	var e *Entry
	err := s.write(ctx, func(tx *sql.Tx) (func(*memory), error) {
		old := s.mem.entries[id] // only writers change memory, and we are the writer
		if old == nil {
			return nil, ErrNotFound
		}
		c := *old
		c.Selectors = slices.Clone(old.Selectors)
		c.DNSNames = slices.Clone(old.DNSNames)
		c.FederatesWith = slices.Clone(old.FederatesWith)
		if err := f(&c); err != nil {
			return nil, err
		}
		c.ID, c.CreatedAt, c.Revision = old.ID, old.CreatedAt, old.Revision+1
		c.Selectors = SortSelectors(c.Selectors)
		if err := s.checkFederates(&c); err != nil {
			return nil, err
		}
		if _, err := tx.ExecContext(ctx, `DELETE FROM entries WHERE id = ?`, id); err != nil {
			return nil, err
		}
		other, err := inTheWay(ctx, tx, &c)
		if err != nil {
			return nil, err
		}
		if other != nil {
			return nil, fmt.Errorf("%w: entry %s has the same SPIFFE ID, parent and selectors", ErrExists, other.ID)
		}
		if err := insertEntry(ctx, tx, &c); err != nil {
			return nil, err
		}
		e = &c
		return func(m *memory) { m.putEntry(e) }, nil
	})
	if err != nil {
		return nil, err
	}
	return e, nil
}

// DeleteEntry deletes one entry.
func (s *Store) DeleteEntry(ctx context.Context, id string) error {
	return s.write(ctx, func(tx *sql.Tx) (func(*memory), error) {
		r, err := tx.ExecContext(ctx, `DELETE FROM entries WHERE id = ?`, id)
		if err != nil {
			return nil, err
		}
		if n, err := r.RowsAffected(); err != nil || n == 0 {
			return nil, cmp.Or(err, ErrNotFound)
		}
		return func(m *memory) { m.dropEntry(id) }, nil
	})
}

// Entry returns one entry, or ErrNotFound.
func (s *Store) Entry(id string) (e *Entry, err error) {
	err = s.read(func(m *memory) { e = m.entries[id] })
	if err == nil && e == nil {
		err = ErrNotFound
	}
	return e, err
}

// Entries returns every entry, sorted by ID. The slice is shared: do not modify it.
func (s *Store) Entries() (list []*Entry, err error) {
	err = s.read(func(m *memory) {
		if c := s.sorted.Load(); c != nil && c.generation == m.generation {
			list = c.list
			return
		}
		list = make([]*Entry, 0, len(m.entries))
		for _, e := range m.entries {
			list = append(list, e)
		}
		slices.SortFunc(list, func(a, b *Entry) int { return cmp.Compare(a.ID, b.ID) })
		s.sorted.Store(&sortedEntries{m.generation, list})
	})
	return list, err
}

type sortedEntries struct {
	generation uint64
	list       []*Entry
}

// Children returns each entry whose parent is parentID, in no order.
func (s *Store) Children(parentID string) (list []*Entry, err error) {
	err = s.read(func(m *memory) {
		for _, e := range m.byParent[parentID] {
			list = append(list, e)
		}
	})
	return list, err
}

// Generation grows with every change of any entry; what was computed from
// entries at one generation holds while it stays the same.
func (s *Store) Generation() (g uint64, err error) {
	err = s.read(func(m *memory) { g = m.generation })
	return g, err
}

// inTheWay returns the entry that e must not be created beside, or nil.
func inTheWay(ctx context.Context, tx *sql.Tx, e *Entry) (*Entry, error) {
	sel, err := toJSON(e.Selectors)
	if err != nil {
		return nil, err
	}
	var found *Entry
	err = queryEntries(ctx, tx, func(o *Entry) { found = o },
		`WHERE id = ? OR (spiffe_id = ? AND parent_id = ? AND selectors = ?) LIMIT 1`,
		e.ID, e.SPIFFEID, e.ParentID, sel)
	return found, err
}

func insertEntry(ctx context.Context, tx *sql.Tx, e *Entry) error {
	sel, err := toJSON(e.Selectors)
	if err != nil {
		return err
	}
	dns, err := toJSON(e.DNSNames)
	if err != nil {
		return err
	}
	fed, err := toJSON(e.FederatesWith)
	if err != nil {
		return err
	}
	_, err = tx.ExecContext(ctx, `INSERT INTO entries VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)`,
		e.ID, e.SPIFFEID, e.ParentID, sel, int64(e.X509TTL), int64(e.JWTTTL), fed, e.Admin, e.Downstream,
		e.StoreSVID, toMillis(e.ExpiresAt), dns, e.Hint, e.Revision, toMillis(e.CreatedAt))
	return err
}

func loadEntries(ctx context.Context, tx *sql.Tx, m *memory) error {
	return queryEntries(ctx, tx, m.putEntry, ``)
}

// queryEntries calls f with every entry that where selects.
func queryEntries(ctx context.Context, tx *sql.Tx, f func(*Entry), where string, args ...any) error {
	return each(ctx, tx, `SELECT id, spiffe_id, parent_id, selectors, x509_ttl, jwt_ttl, federates_with, admin,
		downstream, store_svid, expires_at, dns_names, hint, revision, created_at FROM entries `+where,
		func(rows *sql.Rows) error {
			var e Entry
			var sel, fed, dns string
			var x509TTL, jwtTTL, expires, created int64
			if err := rows.Scan(&e.ID, &e.SPIFFEID, &e.ParentID, &sel, &x509TTL, &jwtTTL, &fed, &e.Admin,
				&e.Downstream, &e.StoreSVID, &expires, &dns, &e.Hint, &e.Revision, &created); err != nil {
				return err
			}
			if err := fromJSON(fed, &e.FederatesWith); err != nil {
				return err
			}
			if err := fromJSON(dns, &e.DNSNames); err != nil {
				return err
			}
			e.X509TTL, e.JWTTTL = time.Duration(x509TTL), time.Duration(jwtTTL)
			e.ExpiresAt, e.CreatedAt = fromMillis(expires), fromMillis(created)
			if err := fromJSON(sel, &e.Selectors); err != nil {
				return err
			}
			f(&e)
			return nil
		}, args...)
}

// newUUID returns a random UUID (RFC 9562, version 4).
func newUUID() string {
	var b [16]byte
	rand.Read(b[:]) // never fails
	b[6] = b[6]&0x0f | 0x40
	b[8] = b[8]&0x3f | 0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}
