package store

import (
	"cmp"
	"context"
	"database/sql"
	"slices"
	"time"

	"github.com/rootlink/rootlink/pkg/svid"
)

// JWTAuthority is a key that signs JWT-SVIDs. Its private half is in a file of
// its own.
type JWTAuthority struct {
	ID          string // the kid of its tokens
	PublicKey   []byte // PKIX DER
	KeyFile     string // base name in the data directory
	NotBefore   time.Time
	NotAfter    time.Time
	State       svid.State
	PreparedAt  time.Time
	ActivatedAt time.Time // zero until then
	RetiredAt   time.Time // zero until then
	TaintedAt   time.Time // zero unless an operator distrusts it
}

// JWTAuthorities returns the JWT authorities that the bundle holds, oldest first.
func (s *Store) JWTAuthorities() (list []JWTAuthority, err error) {
	err = s.read(func(m *memory) {
		for _, a := range m.jwtAuthorities {
			list = append(list, *a)
		}
	})
	return list, err
}

// AddJWTAuthority adds an authority in state svid.Prepared. Its key file must be
// durable by then.
func (s *Store) AddJWTAuthority(ctx context.Context, a JWTAuthority) error {
	a.State, a.ActivatedAt, a.RetiredAt = svid.Prepared, time.Time{}, time.Time{}
	a.TaintedAt = time.Time{}
	for _, t := range []*time.Time{&a.NotBefore, &a.NotAfter, &a.PreparedAt} {
		*t = fromMillis(toMillis(*t))
	}
	return s.write(ctx, func(tx *sql.Tx) (func(*memory), error) {
		if _, err := tx.ExecContext(ctx, `INSERT INTO jwt_authorities VALUES (?,?,?,?,?,?,?,0,0,0)`,
			a.ID, a.PublicKey, a.KeyFile, toMillis(a.NotBefore), toMillis(a.NotAfter), string(a.State), toMillis(a.PreparedAt)); err != nil {
			return nil, err
		}
		if err := growSequence(ctx, tx); err != nil {
			return nil, err
		}
		return func(m *memory) {
			m.jwtAuthorities = append(m.jwtAuthorities, &a)
			m.bundleSequence++
		}, nil
	})
}

// ActivateJWTAuthority makes a prepared authority the active one and retires the
// one that was.
func (s *Store) ActivateJWTAuthority(ctx context.Context, id string, at time.Time) error {
	return s.write(ctx, func(tx *sql.Tx) (func(*memory), error) {
		ms := toMillis(at)
		if _, err := tx.ExecContext(ctx, `UPDATE jwt_authorities SET state = 'retired', retired_at = ? WHERE state = 'active'`, ms); err != nil {
			return nil, err
		}
		r, err := tx.ExecContext(ctx, `UPDATE jwt_authorities SET state = 'active', activated_at = ? WHERE id = ? AND state = 'prepared'`, ms, id)
		if err != nil {
			return nil, err
		}
		if n, err := r.RowsAffected(); err != nil || n == 0 {
			return nil, cmp.Or(err, ErrNotFound)
		}
		return func(m *memory) {
			for i, old := range m.jwtAuthorities {
				a := *old
				switch {
				case a.ID == id:
					a.State, a.ActivatedAt = svid.Active, fromMillis(ms)
				case a.State == svid.Active:
					a.State, a.RetiredAt = svid.Retired, fromMillis(ms)
				}
				m.jwtAuthorities[i] = &a
			}
		}, nil
	})
}

// TaintJWTAuthority notes that an authority is distrusted; the first time counts.
func (s *Store) TaintJWTAuthority(ctx context.Context, id string, at time.Time) error {
	return s.write(ctx, func(tx *sql.Tx) (func(*memory), error) {
		i := slices.IndexFunc(s.mem.jwtAuthorities, func(a *JWTAuthority) bool { return a.ID == id })
		if i < 0 {
			return nil, ErrNotFound
		}
		a := *s.mem.jwtAuthorities[i]
		if !a.TaintedAt.IsZero() {
			return nil, nil
		}
		ms := toMillis(at)
		a.TaintedAt = fromMillis(ms)
		if _, err := tx.ExecContext(ctx, `UPDATE jwt_authorities SET tainted_at = ? WHERE id = ?`, ms, id); err != nil {
			return nil, err
		}
		if err := growSequence(ctx, tx); err != nil {
			return nil, err
		}
		return func(m *memory) {
			m.jwtAuthorities[i] = &a
			m.bundleSequence++
		}, nil
	})
}

// DropJWTAuthority forgets an authority that is not active: unlike a
// certificate's, its signatures are worth nothing once they have expired.
func (s *Store) DropJWTAuthority(ctx context.Context, id string) error {
	return s.write(ctx, func(tx *sql.Tx) (func(*memory), error) {
		r, err := tx.ExecContext(ctx, `DELETE FROM jwt_authorities WHERE id = ? AND state != 'active'`, id)
		if err != nil {
			return nil, err
		}
		if n, err := r.RowsAffected(); err != nil || n == 0 {
			return nil, cmp.Or(err, ErrNotFound)
		}
		if err := growSequence(ctx, tx); err != nil {
			return nil, err
		}
		return func(m *memory) {
			var keep []*JWTAuthority
			for _, a := range m.jwtAuthorities {
				if a.ID != id {
					keep = append(keep, a)
				}
			}
			m.jwtAuthorities = keep
			m.bundleSequence++
		}, nil
	})
}

func growSequence(ctx context.Context, tx *sql.Tx) error {
	_, err := tx.ExecContext(ctx, `UPDATE meta SET value = value + 1 WHERE key = 'bundle_sequence'`)
	return err
}

func loadJWTAuthorities(ctx context.Context, tx *sql.Tx, m *memory) error {
	return each(ctx, tx, `SELECT id, public_key, key_file, not_before, not_after, state, prepared_at, activated_at, retired_at, tainted_at FROM jwt_authorities ORDER BY rowid`,
		func(rows *sql.Rows) error {
			var a JWTAuthority
			var notBefore, notAfter, prepared, activated, retired, tainted int64
			if err := rows.Scan(&a.ID, &a.PublicKey, &a.KeyFile, &notBefore, &notAfter, &a.State, &prepared, &activated, &retired, &tainted); err != nil {
				return err
			}
			a.NotBefore, a.NotAfter = fromMillis(notBefore), fromMillis(notAfter)
			a.PreparedAt, a.ActivatedAt, a.RetiredAt = fromMillis(prepared), fromMillis(activated), fromMillis(retired)
			a.TaintedAt = fromMillis(tainted)
			m.jwtAuthorities = append(m.jwtAuthorities, &a)
			return nil
		})
}
