package server

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"

	"github.com/rootlink/rootlink/internal/store"
	"github.com/rootlink/rootlink/pkg/svid"
)

// byID returns an authority, or store.ErrNotFound.
func (a *authoritySet) byID(id string) (AuthorityInfo, error) {
	for _, i := range a.all {
		if svid.AuthorityID(i.Certificate) == id {
			return i, nil
		}
	}
	return AuthorityInfo{}, store.ErrNotFound
}

// prepared returns the authority that is published and does not sign, or nil.
func (a *authorities) prepared() *x509.Certificate {
	for _, i := range a.set.Load().all {
		if i.State == svid.Prepared && a.now().Before(i.Certificate.NotAfter) {
			return i.Certificate
		}
	}
	return nil
}

// prepareNext returns the prepared authority, made now when there is none.
func (a *authorities) prepareNext(ctx context.Context) (*x509.Certificate, error) {
	a.changing.Lock()
	defer a.changing.Unlock()
	return a.next(ctx)
}

// next is prepareNext for who holds a.changing.
func (a *authorities) next(ctx context.Context) (*x509.Certificate, error) {
	if c := a.prepared(); c != nil {
		return c, nil
	}
	if err := a.prepare(ctx); err != nil {
		return nil, fmt.Errorf("prepare X.509 authority: %w", err)
	}
	return a.prepared(), nil
}

// activateID activates a prepared authority.
func (a *authorities) activateID(ctx context.Context, id string) error {
	a.changing.Lock()
	defer a.changing.Unlock()
	i, err := a.set.Load().byID(id)
	if err != nil {
		return err
	}
	if i.State != svid.Prepared || !a.now().Before(i.Certificate.NotAfter) {
		return errNotPrepared
	}
	return a.activate(ctx, i.Certificate)
}

// distrust taints a retired authority, or revokes it. Its key is of no more use
// to anybody but a thief. The server's own SVID leaves it at once.
func (a *authorities) distrust(ctx context.Context, id string, revoke bool) error {
	a.changing.Lock()
	defer a.changing.Unlock()
	i, err := a.set.Load().byID(id)
	if err != nil {
		return err
	}
	change, what := a.store.TaintAuthority, "tainted"
	if revoke {
		// Whoever holds an SVID under it would be cut off, agents too.
		if i.TaintedAt.IsZero() {
			return errNotTainted
		}
		change, what = a.store.RevokeAuthority, "revoked"
	}
	switch err := change(ctx, id, a.now()); {
	case errors.Is(err, store.ErrConflict):
		return errNotOld
	case err != nil:
		return err
	}
	a.log.Warn("X.509 authority "+what+" by an administrator", "authority", id)
	if err := a.reload(); err != nil {
		return err
	}
	a.dropOldKeys()
	if c := a.own.Load(); c != nil && fmt.Sprintf("%x", c.Leaf.AuthorityKeyId) == id {
		a.own.Store(nil)
	}
	_, err = a.renewOwn(ctx)
	return err
}
