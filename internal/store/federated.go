package store

import (
	"cmp"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"slices"
)

// FederatedBundle is what another trust domain is verified with. Those handed
// out are shared and must not be modified.
type FederatedBundle struct {
	TrustDomain     string            `json:"-"`
	X509Authorities [][]byte          `json:"x509,omitempty"` // DER
	JWTAuthorities  []FederatedJWTKey `json:"jwt,omitempty"`
	RefreshHint     int64             `json:"refresh_hint,omitempty"` // seconds
	Sequence        uint64            `json:"sequence,omitempty"`
}

// FederatedJWTKey verifies JWT-SVIDs of another trust domain.
type FederatedJWTKey struct {
	ID        string `json:"kid"`
	PublicKey []byte `json:"key"`           // PKIX DER
	ExpiresAt int64  `json:"exp,omitempty"` // Unix seconds, 0 for never
}

// NoBundleError means that an entry federates with a trust domain whose bundle
// the store does not have.
type NoBundleError struct{ TrustDomain string }

func (e *NoBundleError) Error() string {
	return fmt.Sprintf("unable to find federated bundle %q", "spiffe://"+e.TrustDomain)
}

// BundleInUseError means that entries federate with a bundle that was to be
// deleted.
type BundleInUseError struct{ Entries int }

func (e *BundleInUseError) Error() string {
	return fmt.Sprintf("cannot delete bundle; federated with %d registration entries", e.Entries)
}

// DeleteMode says what becomes of the entries that federate with a bundle that
// is deleted.
type DeleteMode uint8

const (
	DeleteRestrict   DeleteMode = iota // they keep the bundle from being deleted
	DeleteEntries                      // they are deleted with it
	DeleteDissociate                   // they federate with it no more
)

// FederatedBundle returns one bundle, or ErrNotFound.
func (s *Store) FederatedBundle(td string) (b *FederatedBundle, err error) {
	err = s.read(func(m *memory) { b = m.federated[td] })
	if err == nil && b == nil {
		err = ErrNotFound
	}
	return b, err
}

// FederatedBundles returns every bundle, sorted by trust domain.
func (s *Store) FederatedBundles() (list []*FederatedBundle, err error) {
	err = s.read(func(m *memory) {
		for _, b := range m.federated {
			list = append(list, b)
		}
	})
	slices.SortFunc(list, func(a, b *FederatedBundle) int { return cmp.Compare(a.TrustDomain, b.TrustDomain) })
	return list, err
}

// PutFederatedBundle replaces the bundle of td by what f makes of the present
// one, nil when there is none. f's error is returned unchanged.
func (s *Store) PutFederatedBundle(ctx context.Context, td string, f func(old *FederatedBundle) (*FederatedBundle, error)) (*FederatedBundle, error) {
	var b *FederatedBundle
	err := s.write(ctx, func(tx *sql.Tx) (func(*memory), error) {
		made, err := f(s.mem.federated[td]) // only writers change memory, and we are the writer
		if err != nil {
			return nil, err
		}
		c := *made
		c.TrustDomain = td
		text, err := toJSON(c)
		if err != nil {
			return nil, err
		}
		if _, err := tx.ExecContext(ctx, `INSERT OR REPLACE INTO federated_bundles VALUES (?,?)`, td, text); err != nil {
			return nil, err
		}
		b = &c
		return func(m *memory) { m.federated[td] = b }, nil
	})
	if err != nil {
		return nil, err
	}
	return b, nil
}

// DeleteFederatedBundle deletes a bundle, and in the same transaction does with
// the entries that federate with it what mode says.
func (s *Store) DeleteFederatedBundle(ctx context.Context, td string, mode DeleteMode) error {
	return s.write(ctx, func(tx *sql.Tx) (func(*memory), error) {
		if s.mem.federated[td] == nil {
			return nil, ErrNotFound
		}
		var using, changed []*Entry
		for _, e := range s.mem.entries {
			if slices.Contains(e.FederatesWith, td) {
				using = append(using, e)
			}
		}
		if len(using) > 0 && mode != DeleteEntries && mode != DeleteDissociate {
			return nil, &BundleInUseError{len(using)}
		}
		for _, e := range using {
			if _, err := tx.ExecContext(ctx, `DELETE FROM entries WHERE id = ?`, e.ID); err != nil {
				return nil, err
			}
			if mode == DeleteEntries {
				continue
			}
			c := *e
			c.FederatesWith = slices.DeleteFunc(slices.Clone(e.FederatesWith), func(s string) bool { return s == td })
			c.Revision++ // agents learn of a change by it
			if err := insertEntry(ctx, tx, &c); err != nil {
				return nil, err
			}
			changed = append(changed, &c)
		}
		if _, err := tx.ExecContext(ctx, `DELETE FROM federated_bundles WHERE trust_domain = ?`, td); err != nil {
			return nil, err
		}
		return func(m *memory) {
			delete(m.federated, td)
			for _, e := range using {
				m.dropEntry(e.ID)
			}
			for _, e := range changed {
				m.putEntry(e)
			}
		}, nil
	})
}

// checkFederates fails unless there is a bundle of every trust domain that e
// federates with. The caller is a writer, so none can go meanwhile.
func (s *Store) checkFederates(e *Entry) error {
	for _, td := range e.FederatesWith {
		if s.mem.federated[td] == nil {
			return &NoBundleError{td}
		}
	}
	return nil
}

func loadFederated(ctx context.Context, tx *sql.Tx, m *memory) error {
	return each(ctx, tx, `SELECT trust_domain, bundle FROM federated_bundles`, func(rows *sql.Rows) error {
		var b FederatedBundle
		var text string
		if err := rows.Scan(&b.TrustDomain, &text); err != nil {
			return err
		}
		if err := fromJSON(text, &b); err != nil {
			return errors.Join(fmt.Errorf("federated bundle %q", b.TrustDomain), err)
		}
		m.federated[b.TrustDomain] = &b
		return nil
	})
}
