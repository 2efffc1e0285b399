package server

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/rootlink/rootlink/internal/store"
	"github.com/rootlink/rootlink/pkg/svid"
)

// publishLead is how long an authority must have been in GetBundle before the
// server's own SVID uses it. A stock agent fetches the bundle every 5 s and
// exits when it meets a server whose authority it does not know.
const publishLead = time.Minute

// keyRetention is how long the key of a retired authority is kept: until the
// server's own SVID has moved on.
const keyRetention = 10 * publishLead

// authorities keeps the X.509 authorities: their rotation, the signer in use
// and the server's own SVID.
type authorities struct {
	td       spiffeid.TrustDomain
	store    *store.Store
	dir      *dataDir
	lifetime time.Duration
	ttl      time.Duration // of the server's own SVID
	now      func() time.Time
	log      *slog.Logger

	// logged puts an authority's certificate into the transparency log; nil
	// without one.
	logged func(ctx context.Context, cert *x509.Certificate, key *ecdsa.PrivateKey) error

	// compose adds to the request for the server's own SVID; nil: nothing does.
	compose func(ctx context.Context, r *svid.Request) error

	changing sync.Mutex // held by whoever changes authorities
	set      atomic.Pointer[authoritySet]
	own      atomic.Pointer[tls.Certificate] // Leaf is set
}

// authoritySet is one state of the authorities; it never changes.
type authoritySet struct {
	all     []AuthorityInfo
	signer  *svid.Signer // of the active one
	retired []*svid.Signer
}

// valid returns the certificates that verify at now, prepared ones too.
func (a *authoritySet) valid(now time.Time) []*x509.Certificate {
	var list []*x509.Certificate
	for _, i := range a.all {
		if i.RevokedAt.IsZero() && now.Before(i.Certificate.NotAfter) {
			list = append(list, i.Certificate)
		}
	}
	return list
}

// tainted reports whether c is an authority that an operator distrusts.
func (a *authoritySet) tainted(c *x509.Certificate) bool {
	for _, i := range a.all {
		if i.Certificate == c {
			return !i.TaintedAt.IsZero()
		}
	}
	return false
}

// openAuthorities loads the authorities and makes the first when there is none.
func openAuthorities(ctx context.Context, a *authorities) error {
	if err := a.reload(); err != nil {
		return err
	}
	if err := a.logExisting(ctx); err != nil {
		return err
	}
	_, err := a.maintain(ctx)
	return err
}

// maintain does whatever rotation asks for at this time and returns when it
// wants to be asked again.
func (a *authorities) maintain(ctx context.Context) (time.Time, error) {
	a.changing.Lock()
	defer a.changing.Unlock()
	for {
		set := a.set.Load()
		stages := make([]svid.Stage, len(set.all))
		for i, s := range set.all {
			stages[i] = svid.Stage{State: s.State, NotBefore: s.Certificate.NotBefore, NotAfter: s.Certificate.NotAfter, PreparedAt: s.PreparedAt}
		}
		action, i, again := svid.Next(a.now(), stages)
		switch action {
		case svid.Prepare:
			if err := a.prepare(ctx); err != nil {
				return time.Time{}, fmt.Errorf("prepare X.509 authority: %w", err)
			}
		case svid.Activate:
			if err := a.activate(ctx, set.all[i].Certificate); err != nil {
				return time.Time{}, fmt.Errorf("activate X.509 authority: %w", err)
			}
		default:
			a.dropOldKeys()
			renew, err := a.renewOwn(ctx)
			if err != nil {
				return time.Time{}, fmt.Errorf("server SVID: %w", err)
			}
			if renew.Before(again) {
				again = renew
			}
			return again, nil
		}
	}
}

// rotate prepares an authority unless one is prepared, and activates it.
func (a *authorities) rotate(ctx context.Context) (*x509.Certificate, error) {
	a.changing.Lock()
	defer a.changing.Unlock()
	next, err := a.next(ctx)
	if err != nil {
		return nil, err
	}
	if err := a.activate(ctx, next); err != nil {
		return nil, fmt.Errorf("activate X.509 authority: %w", err)
	}
	return next, nil
}

// prepare makes an authority. Its key is durable before its row is, so that no
// row is ever without a key; a key without a row is litter that nobody trusts.
func (a *authorities) prepare(ctx context.Context) error {
	name := "authority-" + rand.Text() + ".key"
	key, err := a.dir.makeKey(name)
	if err != nil {
		return err
	}
	now := a.now()
	cert, err := svid.NewAuthority(a.td, key, now, a.lifetime)
	if err != nil {
		return err
	}
	// In public before anybody can trust it: an authority that a thief of this
	// directory makes shows, or verifies nowhere that the log is demanded.
	if a.logged != nil {
		if err := a.logged(ctx, cert, key); err != nil {
			return err
		}
	}
	if err := a.store.AddAuthority(ctx, store.Authority{
		ID: svid.AuthorityID(cert), Certificate: cert.Raw, KeyFile: name, PreparedAt: now,
	}); err != nil {
		return err
	}
	a.log.Info("X.509 authority prepared", "authority", svid.AuthorityID(cert), "not_after", cert.NotAfter)
	return a.reload()
}

// logExisting logs those authorities that were made before there was a log. One
// whose key is gone cannot be: only its own signature would make an entry of it.
func (a *authorities) logExisting(ctx context.Context) error {
	if a.logged == nil {
		return nil
	}
	rows, err := a.store.Authorities()
	if err != nil {
		return err
	}
	for _, row := range rows {
		cert, err := x509.ParseCertificate(row.Certificate)
		if err != nil {
			return fmt.Errorf("X.509 authority %s: %w", row.ID, err)
		}
		key, err := a.dir.readKey(row.KeyFile)
		if errors.Is(err, fs.ErrNotExist) {
			key = nil
		} else if err != nil {
			return fmt.Errorf("X.509 authority %s: %w", row.ID, err)
		}
		if err := a.logged(ctx, cert, key); err != nil {
			return fmt.Errorf("X.509 authority %s: %w", row.ID, err)
		}
	}
	return nil
}

func (a *authorities) activate(ctx context.Context, cert *x509.Certificate) error {
	if err := a.store.ActivateAuthority(ctx, svid.AuthorityID(cert), a.now()); err != nil {
		return err
	}
	a.log.Info("X.509 authority activated", "authority", svid.AuthorityID(cert))
	return a.reload()
}

// reload reads the authorities from the store and their keys from files.
func (a *authorities) reload() error {
	rows, err := a.store.Authorities()
	if err != nil {
		return err
	}
	set := new(authoritySet)
	for _, row := range rows {
		cert, err := x509.ParseCertificate(row.Certificate)
		if err != nil {
			return fmt.Errorf("X.509 authority %s: %w", row.ID, err)
		}
		set.all = append(set.all, AuthorityInfo{cert, row.State, row.PreparedAt, row.ActivatedAt, row.RetiredAt, row.TaintedAt, row.RevokedAt})
		if row.State == svid.Prepared || !row.TaintedAt.IsZero() || !row.RevokedAt.IsZero() {
			continue
		}
		key, err := a.dir.readKey(row.KeyFile)
		if row.State == svid.Retired && errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return fmt.Errorf("X.509 authority %s: %w", row.ID, err)
		}
		signer, err := svid.NewSigner(a.td, cert, key)
		if err != nil {
			return fmt.Errorf("X.509 authority %s: %w", row.ID, err)
		}
		if row.State == svid.Active {
			set.signer = signer
		} else {
			set.retired = append(set.retired, signer)
		}
	}
	a.set.Store(set)
	return nil
}

// signer returns the signer of the active authority.
func (a *authorities) signer() (*svid.Signer, error) {
	if s := a.set.Load().signer; s != nil {
		return s, nil
	}
	return nil, fmt.Errorf("%w: none is active", svid.ErrAuthority)
}

// renewOwn renews the server's SVID when half its life has passed and returns
// when it is to be asked again.
func (a *authorities) renewOwn(ctx context.Context) (time.Time, error) {
	now := a.now()
	set := a.set.Load()
	signer := set.signer
	// After a forced rotation peers may not know the new authority yet; the
	// one before it can sign our own SVID a little longer.
	for _, i := range set.all {
		if i.Certificate == signer.Authority() && now.Before(i.PreparedAt.Add(publishLead)) {
			for _, r := range set.retired {
				if now.Before(r.Authority().NotAfter.Add(-publishLead)) {
					signer = r
				}
			}
		}
	}
	if c := a.own.Load(); c != nil {
		half := c.Leaf.NotBefore.Add(c.Leaf.NotAfter.Sub(c.Leaf.NotBefore) / 2)
		// notBefore after now: the clock was put back.
		if now.Before(half) && !now.Before(c.Leaf.NotBefore) {
			return half, nil
		}
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return time.Time{}, err
	}
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return time.Time{}, err
	}
	id, err := spiffeid.FromPath(a.td, "/spire/server")
	if err != nil {
		return time.Time{}, err
	}
	r := svid.Request{Profile: svid.Server, ID: id, PublicKey: key.Public(), SPKI: spki, TTL: a.ttl, Now: now}
	if a.compose != nil {
		if err := a.compose(ctx, &r); err != nil {
			return time.Time{}, err
		}
	}
	token, err := signer.Prepare(r)
	if err != nil {
		return time.Time{}, err
	}
	s, err := signer.Issue(token)
	if err != nil {
		return time.Time{}, err
	}
	leaf, err := x509.ParseCertificate(s.DER)
	if err != nil {
		return time.Time{}, err
	}
	a.own.Store(&tls.Certificate{Certificate: [][]byte{s.DER}, PrivateKey: key, Leaf: leaf})
	return leaf.NotBefore.Add(leaf.NotAfter.Sub(leaf.NotBefore) / 2), nil
}

// dropOldKeys deletes keys that sign no more: a stolen backup should not hold
// them.
func (a *authorities) dropOldKeys() {
	rows, err := a.store.Authorities()
	if err != nil {
		return // the next round tries again
	}
	for _, row := range rows {
		distrusted := !row.TaintedAt.IsZero() || !row.RevokedAt.IsZero()
		if row.State != svid.Retired || !distrusted && a.now().Before(row.RetiredAt.Add(keyRetention)) {
			continue
		}
		if err := os.Remove(a.dir.file(row.KeyFile)); err == nil {
			a.log.Info("key of retired X.509 authority deleted", "authority", row.ID)
		} else if !errors.Is(err, fs.ErrNotExist) {
			a.log.Error("key of retired X.509 authority cannot be deleted", "authority", row.ID, "error", err)
		}
	}
}

// run maintains the authorities until ctx ends.
func (a *authorities) run(ctx context.Context) {
	keepMaintaining(ctx, a.now, a.maintain, a.log.With("kind", "X.509"))
}

// keepMaintaining calls maintain whenever it asks for that, at least once a
// minute, since clocks are set and machines sleep.
func keepMaintaining(ctx context.Context, now func() time.Time, maintain func(context.Context) (time.Time, error), log *slog.Logger) {
	const most, retry = time.Minute, 5 * time.Second
	for {
		wait := most
		again, err := maintain(ctx)
		if err != nil {
			log.Error("authority rotation failed", "error", err)
			wait = retry
		} else if d := again.Sub(now()); d < most {
			wait = max(d, 100*time.Millisecond)
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		}
	}
}
