package store

import (
	"cmp"
	"context"
	"database/sql"
	"fmt"
	"slices"
	"time"

	"github.com/rootlink/rootlink/pkg/attest"
)

// PCRPolicies returns the current revision of every PCR policy, by name.
func (s *Store) PCRPolicies() (list []PolicyRevision, err error) {
	err = s.read(func(m *memory) {
		for _, p := range m.policies {
			list = append(list, *p)
		}
	})
	slices.SortFunc(list, func(a, b PolicyRevision) int { return cmp.Compare(a.Policy.Name, b.Policy.Name) })
	return list, err
}

// PCRPolicy returns the current revision of one policy, or ErrNotFound.
func (s *Store) PCRPolicy(name string) (*PolicyRevision, error) {
	var p *PolicyRevision
	err := s.read(func(m *memory) { p = m.policies[name] })
	if err == nil && p == nil {
		err = ErrNotFound
	}
	return p, err
}

// PCRPolicyRevisions returns every revision of every policy that ever was,
// by name, oldest first.
func (s *Store) PCRPolicyRevisions(ctx context.Context) (list []PolicyRevision, err error) {
	err = s.write(ctx, func(tx *sql.Tx) (func(*memory), error) {
		return nil, eachPolicy(ctx, tx, func(p *PolicyRevision) { list = append(list, *p) })
	})
	return list, err
}

// PutPCRPolicy makes the next revision of policy name by f, which gets the
// current one (nil when there is none, also after a deletion) and returns the
// new profiles; f's error is returned unchanged. Revisions never repeat, also
// over a deletion.
func (s *Store) PutPCRPolicy(ctx context.Context, name string, f func(current *attest.PCRPolicy) ([]attest.PCRProfile, error)) (*PolicyRevision, error) {
	var made *PolicyRevision
	err := s.write(ctx, func(tx *sql.Tx) (func(*memory), error) {
		var current *attest.PCRPolicy
		if old := s.mem.policies[name]; old != nil {
			current = &old.Policy
		}
		profiles, err := f(current)
		if err != nil {
			return nil, err
		}
		p := attest.PCRPolicy{Name: name, Profiles: profiles}
		if err := tx.QueryRowContext(ctx, `SELECT COALESCE(MAX(revision), 0) + 1 FROM pcr_policies WHERE name = ?`,
			name).Scan(&p.Revision); err != nil {
			return nil, err
		}
		if err := p.Validate(); err != nil {
			return nil, err
		}
		made = &PolicyRevision{Policy: p, Digest: p.Digest(), CreatedAt: s.now().UTC().Truncate(time.Millisecond)}
		text, err := toJSON(p)
		if err != nil {
			return nil, err
		}
		if _, err := tx.ExecContext(ctx, `INSERT INTO pcr_policies VALUES (?,?,?,?,?,0)`,
			name, p.Revision, text, made.Digest[:], toMillis(made.CreatedAt)); err != nil {
			return nil, err
		}
		return func(m *memory) { m.policies[name] = made }, nil
	})
	if err != nil {
		return nil, err
	}
	return made, nil
}

// DeletePCRPolicy ends policy name; its revisions stay on record.
func (s *Store) DeletePCRPolicy(ctx context.Context, name string) error {
	return s.write(ctx, func(tx *sql.Tx) (func(*memory), error) {
		p := s.mem.policies[name]
		if p == nil {
			return nil, ErrNotFound
		}
		if _, err := tx.ExecContext(ctx, `UPDATE pcr_policies SET deleted_at = ? WHERE name = ? AND revision = ?`,
			toMillis(s.now()), name, p.Policy.Revision); err != nil {
			return nil, err
		}
		return func(m *memory) { delete(m.policies, name) }, nil
	})
}

func loadPolicies(ctx context.Context, tx *sql.Tx, m *memory) error {
	return eachPolicy(ctx, tx, func(p *PolicyRevision) {
		// Revisions come oldest first, so the newest decides.
		if p.DeletedAt.IsZero() {
			m.policies[p.Policy.Name] = p
		} else {
			delete(m.policies, p.Policy.Name)
		}
	})
}

func eachPolicy(ctx context.Context, tx *sql.Tx, f func(*PolicyRevision)) error {
	return each(ctx, tx, `SELECT name, policy, digest, created_at, deleted_at FROM pcr_policies ORDER BY name, revision`,
		func(rows *sql.Rows) error {
			var p PolicyRevision
			var name, text string
			var digest []byte
			var created, deleted int64
			if err := rows.Scan(&name, &text, &digest, &created, &deleted); err != nil {
				return err
			}
			if err := fromJSON(text, &p.Policy); err != nil {
				return fmt.Errorf("PCR policy %q: %w", name, err)
			}
			p.CreatedAt, p.DeletedAt = fromMillis(created), fromMillis(deleted)
			// The digest that was put into evidence, not one of today's encoding.
			if copy(p.Digest[:], digest) != len(p.Digest) {
				return fmt.Errorf("PCR policy %q: digest of %d bytes", name, len(digest))
			}
			f(&p)
			return nil
		})
}
