package server

import (
	"context"
	"crypto/rand"
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
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/rootlink/rootlink/internal/store"
	"github.com/rootlink/rootlink/pkg/svid"
)

// maxJWTAuthorityTTL is the longest life of a JWT authority. Nothing that it
// signs is looked at later, so it need not live as long as an X.509 one.
const maxJWTAuthorityTTL = 30 * 24 * time.Hour

// jwtBackdate lets a new authority sign also when the clock is set back a little.
const jwtBackdate = time.Minute

// jwtAuthorities keeps the keys that sign JWT-SVIDs.
type jwtAuthorities struct {
	td       spiffeid.TrustDomain
	store    *store.Store
	dir      *dataDir
	lifetime time.Duration
	now      func() time.Time
	log      *slog.Logger

	changing sync.Mutex // held by whoever changes authorities
	set      atomic.Pointer[jwtSet]
}

// jwtSet is one state of the authorities; it never changes.
type jwtSet struct {
	all    []store.JWTAuthority
	signer *svid.JWTSigner // of the active one
}

func stageOf(a *store.JWTAuthority) svid.JWTStage {
	return svid.JWTStage{
		Stage:     svid.Stage{State: a.State, NotBefore: a.NotBefore, NotAfter: a.NotAfter, PreparedAt: a.PreparedAt},
		RetiredAt: a.RetiredAt,
	}
}

// keys returns what verifies tokens at now, prepared ones too.
func (s *jwtSet) keys(now time.Time) []*types.JWTKey {
	var list []*types.JWTKey
	for i := range s.all {
		if a := &s.all[i]; svid.JWTNeeded(stageOf(a), now) {
			list = append(list, &types.JWTKey{PublicKey: a.PublicKey, KeyId: a.ID, ExpiresAt: a.NotAfter.Unix(), Tainted: !a.TaintedAt.IsZero()})
		}
	}
	return list
}

// openJWTAuthorities loads the authorities and makes the first when there is none.
func openJWTAuthorities(ctx context.Context, a *jwtAuthorities) error {
	if err := a.reload(); err != nil {
		return err
	}
	_, err := a.maintain(ctx)
	return err
}

// maintain does whatever rotation asks for at this time and returns when it
// wants to be asked again.
func (a *jwtAuthorities) maintain(ctx context.Context) (time.Time, error) {
	a.changing.Lock()
	defer a.changing.Unlock()
	for {
		set := a.set.Load()
		stages := make([]svid.Stage, len(set.all))
		for i := range set.all {
			stages[i] = stageOf(&set.all[i]).Stage
		}
		action, i, again := svid.Next(a.now(), stages)
		switch action {
		case svid.Prepare:
			if err := a.prepare(ctx); err != nil {
				return time.Time{}, fmt.Errorf("prepare JWT authority: %w", err)
			}
		case svid.Activate:
			if err := a.activate(ctx, set.all[i].ID); err != nil {
				return time.Time{}, fmt.Errorf("activate JWT authority: %w", err)
			}
		default:
			if err := a.dropOld(ctx); err != nil {
				return time.Time{}, fmt.Errorf("drop JWT authority: %w", err)
			}
			return again, nil
		}
	}
}

// prepare makes an authority. Its key is durable before its row is, so that no
// row is ever without a key; a key without a row is litter that nobody trusts.
func (a *jwtAuthorities) prepare(ctx context.Context) error {
	name := "jwt-" + rand.Text() + ".key"
	key, err := a.dir.makeKey(name)
	if err != nil {
		return err
	}
	id, err := svid.JWTKeyID(&key.PublicKey)
	if err != nil {
		return err
	}
	spki, err := x509.MarshalPKIXPublicKey(&key.PublicKey)
	if err != nil {
		return err
	}
	now := a.now()
	if err := a.store.AddJWTAuthority(ctx, store.JWTAuthority{
		ID: id, PublicKey: spki, KeyFile: name, NotBefore: now.Add(-jwtBackdate), NotAfter: now.Add(a.lifetime), PreparedAt: now,
	}); err != nil {
		return err
	}
	a.log.Info("JWT authority prepared", "authority", id, "not_after", now.Add(a.lifetime))
	return a.reload()
}

func (a *jwtAuthorities) activate(ctx context.Context, id string) error {
	if err := a.store.ActivateJWTAuthority(ctx, id, a.now()); err != nil {
		return err
	}
	a.log.Info("JWT authority activated", "authority", id)
	return a.reload()
}

// reload reads the authorities from the store, and the active one's key.
func (a *jwtAuthorities) reload() error {
	rows, err := a.store.JWTAuthorities()
	if err != nil {
		return err
	}
	set := &jwtSet{all: rows}
	for _, row := range rows {
		if row.State != svid.Active {
			continue
		}
		key, err := a.dir.readKey(row.KeyFile)
		if err != nil {
			return fmt.Errorf("JWT authority %s: %w", row.ID, err)
		}
		if set.signer, err = svid.NewJWTSigner(a.td, key, row.NotBefore, row.NotAfter); err != nil {
			return fmt.Errorf("JWT authority %s: %w", row.ID, err)
		}
		if set.signer.KeyID() != row.ID {
			return fmt.Errorf("JWT authority %s: %w: %s holds the key of another", row.ID, svid.ErrAuthority, row.KeyFile)
		}
	}
	a.set.Store(set)
	return nil
}

// dropOld deletes keys as soon as they sign no more, and takes authorities out
// of the bundle when the last token of theirs has ended.
func (a *jwtAuthorities) dropOld(ctx context.Context) error {
	dropped := false
	for _, row := range a.set.Load().all {
		expired := !a.now().Before(row.NotAfter)
		if row.State == svid.Retired || expired && row.State == svid.Prepared {
			if err := os.Remove(a.dir.file(row.KeyFile)); err == nil {
				a.log.Info("key of retired JWT authority deleted", "authority", row.ID)
			} else if !errors.Is(err, fs.ErrNotExist) {
				return err
			}
		}
		if row.State == svid.Active || svid.JWTNeeded(stageOf(&row), a.now()) {
			continue
		}
		if err := a.store.DropJWTAuthority(ctx, row.ID); err != nil {
			return err
		}
		a.log.Info("JWT authority dropped", "authority", row.ID)
		dropped = true
	}
	if dropped {
		return a.reload()
	}
	return nil
}

// signer returns the signer of the active authority.
func (a *jwtAuthorities) signer() (*svid.JWTSigner, error) {
	if s := a.set.Load().signer; s != nil {
		return s, nil
	}
	return nil, fmt.Errorf("%w: no JWT authority is active", svid.ErrAuthority)
}

// healthy says whether tokens can be signed now.
func (a *jwtAuthorities) healthy() error {
	if signer := a.set.Load().signer; signer == nil || !a.now().Before(signer.NotAfter()) {
		return fmt.Errorf("%w: no JWT authority is active", svid.ErrAuthority)
	}
	return nil
}

// run maintains the authorities until ctx ends.
func (a *jwtAuthorities) run(ctx context.Context) {
	keepMaintaining(ctx, a.now, a.maintain, a.log.With("kind", "JWT"))
}
