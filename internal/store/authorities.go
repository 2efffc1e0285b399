package store

import (
	"cmp"
	"context"
	"database/sql"
	"errors"
	"slices"
	"time"

	"github.com/rootlink/rootlink/pkg/svid"
)

// Authorities returns every X.509 authority there ever was, oldest first.
func (s *Store) Authorities() (list []Authority, err error) {
	err = s.read(func(m *memory) {
		for _, a := range m.authorities {
			list = append(list, *a)
		}
	})
	return list, err
}

// BundleSequence grows whenever the set of authorities does.
func (s *Store) BundleSequence() (n uint64, err error) {
	err = s.read(func(m *memory) { n = m.bundleSequence })
	return n, err
}

// AddAuthority adds an authority in state svid.Prepared, prepared at a.PreparedAt.
// Its key file must be durable by then.
func (s *Store) AddAuthority(ctx context.Context, a Authority) error {
	a.State, a.ActivatedAt, a.RetiredAt = svid.Prepared, time.Time{}, time.Time{}
	a.TaintedAt, a.RevokedAt = time.Time{}, time.Time{}
	a.PreparedAt = fromMillis(toMillis(a.PreparedAt))
	return s.write(ctx, func(tx *sql.Tx) (func(*memory), error) {
		if _, err := tx.ExecContext(ctx, `INSERT INTO authorities VALUES (?,?,?,?,?,0,0,0,0)`,
			a.ID, a.Certificate, a.KeyFile, string(a.State), toMillis(a.PreparedAt)); err != nil {
			return nil, err
		}
		if err := growSequence(ctx, tx); err != nil {
			return nil, err
		}
		return func(m *memory) {
			m.authorities = append(m.authorities, &a)
			m.bundleSequence++
		}, nil
	})
}

// ActivateAuthority makes a prepared authority the active one and retires the
// one that was.
func (s *Store) ActivateAuthority(ctx context.Context, id string, at time.Time) error {
	return s.write(ctx, func(tx *sql.Tx) (func(*memory), error) {
		ms := toMillis(at)
		if _, err := tx.ExecContext(ctx, `UPDATE authorities SET state = 'retired', retired_at = ? WHERE state = 'active'`, ms); err != nil {
			return nil, err
		}
		r, err := tx.ExecContext(ctx, `UPDATE authorities SET state = 'active', activated_at = ? WHERE id = ? AND state = 'prepared'`, ms, id)
		if err != nil {
			return nil, err
		}
		if n, err := r.RowsAffected(); err != nil || n == 0 {
			return nil, cmp.Or(err, ErrNotFound)
		}
		return func(m *memory) {
			for i, old := range m.authorities {
				a := *old
				switch {
				case a.ID == id:
					a.State, a.ActivatedAt = svid.Active, fromMillis(ms)
				case a.State == svid.Active:
					a.State, a.RetiredAt = svid.Retired, fromMillis(ms)
				}
				m.authorities[i] = &a
			}
		}, nil
	})
}

// TaintAuthority notes that a retired authority is distrusted. ErrConflict
// means that it is not retired.
func (s *Store) TaintAuthority(ctx context.Context, id string, at time.Time) error {
	return s.distrust(ctx, id, `UPDATE authorities SET tainted_at = ? WHERE id = ?`, at, func(a *Authority) *time.Time { return &a.TaintedAt })
}

// RevokeAuthority takes a retired authority out of the bundle for good.
func (s *Store) RevokeAuthority(ctx context.Context, id string, at time.Time) error {
	return s.distrust(ctx, id, `UPDATE authorities SET revoked_at = ? WHERE id = ?`, at, func(a *Authority) *time.Time { return &a.RevokedAt })
}

// distrust sets a time that is not set. The bundle is another one then.
func (s *Store) distrust(ctx context.Context, id, update string, at time.Time, field func(*Authority) *time.Time) error {
	return s.write(ctx, func(tx *sql.Tx) (func(*memory), error) {
		i := slices.IndexFunc(s.mem.authorities, func(a *Authority) bool { return a.ID == id })
		if i < 0 {
			return nil, ErrNotFound
		}
		a := *s.mem.authorities[i]
		if a.State != svid.Retired {
			return nil, ErrConflict
		}
		if !field(&a).IsZero() {
			return nil, nil // the first time counts
		}
		ms := toMillis(at)
		*field(&a) = fromMillis(ms)
		if _, err := tx.ExecContext(ctx, update, ms, id); err != nil {
			return nil, err
		}
		if err := growSequence(ctx, tx); err != nil {
			return nil, err
		}
		return func(m *memory) {
			m.authorities[i] = &a
			m.bundleSequence++
		}, nil
	})
}

func loadAuthorities(ctx context.Context, tx *sql.Tx, m *memory) error {
	return each(ctx, tx, `SELECT id, certificate, key_file, state, prepared_at, activated_at, retired_at,
		tainted_at, revoked_at FROM authorities ORDER BY rowid`,
		func(rows *sql.Rows) error {
			var a Authority
			var prepared, activated, retired, tainted, revoked int64
			if err := rows.Scan(&a.ID, &a.Certificate, &a.KeyFile, &a.State, &prepared, &activated, &retired, &tainted, &revoked); err != nil {
				return err
			}
			a.PreparedAt, a.ActivatedAt, a.RetiredAt = fromMillis(prepared), fromMillis(activated), fromMillis(retired)
			a.TaintedAt, a.RevokedAt = fromMillis(tainted), fromMillis(revoked)
			m.authorities = append(m.authorities, &a)
			return nil
		})
}

// NextTrustSerial returns the serial of the next trust.json, which is never
// given out twice.
func (s *Store) NextTrustSerial(ctx context.Context) (n uint64, err error) {
	err = s.write(ctx, func(tx *sql.Tx) (func(*memory), error) {
		return nil, tx.QueryRowContext(ctx,
			`UPDATE meta SET value = value + 1 WHERE key = 'trust_serial' RETURNING value`).Scan(&n)
	})
	if err != nil {
		return 0, err
	}
	return n, nil
}

// Keys of what is remembered for the next trust.json.
const (
	TrustDigest  = "digest"  // of the last exported document
	TrustSources = "sources" // further time sources, as JSON
)

// TrustValue returns what is remembered under key, empty for nothing.
func (s *Store) TrustValue(ctx context.Context, key string) (value string, err error) {
	err = s.write(ctx, func(tx *sql.Tx) (func(*memory), error) {
		err := tx.QueryRowContext(ctx, `SELECT value FROM trust WHERE key = ?`, key).Scan(&value)
		if errors.Is(err, sql.ErrNoRows) {
			err = nil
		}
		return nil, err
	})
	return value, err
}

// SetTrustValue remembers value for the next trust.json.
func (s *Store) SetTrustValue(ctx context.Context, key, value string) error {
	return s.write(ctx, func(tx *sql.Tx) (func(*memory), error) {
		_, err := tx.ExecContext(ctx, `INSERT INTO trust VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value`, key, value)
		return nil, err
	})
}
