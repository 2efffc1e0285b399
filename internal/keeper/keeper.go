// Package keeper keeps what a stock SPIRE server forgets: every X.509 authority
// that its bundle ever held, with the time in which its signatures count. From
// that and the operator's files it writes the signed trust.json by which links
// are verified years later.
package keeper

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/internal/files"
	"github.com/rootlink/rootlink/internal/trustdoc"
	"github.com/rootlink/rootlink/pkg/link"
)

// trustName is the copy of trust.json in data_dir, which servers share.
const trustName = "trust.json"

// checkEvery is how often the operator's files are looked at.
const checkEvery = 5 * time.Second

// minLifetime leaves time to fetch a file before it ends.
const minLifetime = time.Minute

// Config is what a Keeper is made from. TrustDomain, DataDir, TrustFile,
// AttestationCAs and Requirements are required, and one of EKRoots and EKAllow.
type Config struct {
	TrustDomain  string
	DataDir      string // of this keeper, or of several that share it
	TrustFile    string // written
	SigstoreFile string // written: the part that cosign reads

	TrustKeys       []string // private, PEM; default trust.key in DataDir, made there
	Unsigned        bool     // write the bare document, which is signed elsewhere
	TrustKeysPublic []string // with Unsigned: the keys that will sign it

	AttestationCAs []string // PEM
	EKRoots        []string
	EKAllow        string
	EKDeny         string
	EKInventory    []string
	PCRPolicies    string
	TSAChains      []string // FILE[,operator=NAME][,uri=URI]
	Requirements   string   // JSON, as in trust.json
	LayoutKeys     []string // [NAME=]FILE
	Revocations    string

	Operator          string
	AuthoritiesNeeded int
	Lifetime          time.Duration
	Forget            []string // SHA-256 of certificates that are left out

	Now func() time.Time // default time.Now
	Log *slog.Logger     // default: none
}

// Keeper writes the archive and trust.json.
type Keeper struct {
	c      Config
	forget map[[32]byte]bool

	mu     sync.Mutex             // held while anything is read or written
	seen   map[[32]byte]time.Time // authorities in good standing, newer than in the archive
	stamps string                 // of the files when trust.json was last found good
	said   string                 // the last thing that went wrong, said once
}

var errConfig = errors.New("configuration")

// New checks c and makes a Keeper. It writes nothing.
func New(c Config) (*Keeper, error) {
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.Lifetime == 0 {
		c.Lifetime = trustdoc.DefaultLifetime
	}
	fail := func(hint, format string, args ...any) (*Keeper, error) {
		return nil, cli.Hint(fmt.Errorf("%w: %w", errConfig, fmt.Errorf(format, args...)), hint)
	}
	if td, err := spiffeid.TrustDomainFromString(c.TrustDomain); err != nil || td.Name() != c.TrustDomain {
		return fail("", "trust domain %q", c.TrustDomain)
	}
	switch {
	case !filepath.IsAbs(c.DataDir):
		return fail("an absolute path that only the server's user can open", "data_dir %q", c.DataDir)
	case !filepath.IsAbs(c.TrustFile):
		return fail("the absolute path of the trust.json to write", "trust_file %q", c.TrustFile)
	case c.SigstoreFile != "" && (!filepath.IsAbs(c.SigstoreFile) || c.SigstoreFile == c.TrustFile):
		return fail("an absolute path of its own", "sigstore_file %q", c.SigstoreFile)
	case len(c.AttestationCAs) == 0:
		return fail("the server plugin keeps it as attestation-ca.crt in its data_dir", "no attestation_ca_certs")
	case len(c.EKRoots) == 0 && c.EKAllow == "":
		return fail("as in the server plugin's configuration", "neither ek_roots nor ek_allow: no TPM could be genuine")
	case c.Requirements == "":
		return fail("a JSON list that says who may sign what (docs/keeper.md)", "no requirements")
	case c.Unsigned && (len(c.TrustKeys) > 0 || len(c.TrustKeysPublic) == 0):
		return fail("name the public key that will sign in trust_key_public, and no trust_key", "unsigned")
	case !c.Unsigned && len(c.TrustKeysPublic) > 0:
		return fail("set unsigned = true, or leave it out", "trust_key_public without unsigned")
	case max(len(c.TrustKeys), len(c.TrustKeysPublic)) > link.MaxTrustKeys:
		return fail("", "more than %d trust keys", link.MaxTrustKeys)
	case c.Lifetime < minLifetime || c.Lifetime > trustdoc.MaxLifetime:
		return fail("", "a lifetime of %v is not between %v and %v", c.Lifetime, minLifetime, trustdoc.MaxLifetime)
	case c.AuthoritiesNeeded < 0 || c.AuthoritiesNeeded > link.MaxTokens:
		return fail("", "authorities_needed is %d, 0 to %d allowed", c.AuthoritiesNeeded, link.MaxTokens)
	}
	k := &Keeper{c: c, seen: map[[32]byte]time.Time{}, forget: map[[32]byte]bool{}}
	for _, s := range c.Forget {
		h, err := parseHash(s)
		if err != nil {
			return fail("the SHA-256 of a certificate in DER, in hex", "forget: %w", err)
		}
		k.forget[h] = true
	}
	// Read once, so that a mistake is seen at the start. Files that others have
	// still to write may come later; nothing is written without them.
	in, err := c.read()
	if err == nil {
		err = c.readKeys(in, false)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: %w", errConfig, err)
	}
	return k, nil
}

// Open makes the data directory and reads the archive, so that a damaged one
// stops the server's start and not its first bundle.
func (k *Keeper) Open() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	unlock, err := k.lock()
	if err != nil {
		return err
	}
	defer unlock()
	a, err := k.loadArchive()
	if err != nil {
		return err
	}
	in := new(inputs)
	if err := k.c.readKeys(in, true); err != nil {
		return err
	}
	return checkKeys(a, in)
}

// lock makes the directory and holds it against other processes, which wait.
// It is held for moments only.
func (k *Keeper) lock() (unlock func(), err error) {
	if err := os.MkdirAll(k.c.DataDir, 0o700); err != nil {
		return nil, fmt.Errorf("data_dir: %w", err)
	}
	st, err := os.Stat(k.c.DataDir)
	if err != nil {
		return nil, fmt.Errorf("data_dir: %w", err)
	}
	if st.Mode().Perm()&0o022 != 0 {
		return nil, cli.Hint(fmt.Errorf("data_dir %s has mode %04o: others could replace what is kept there", k.c.DataDir, st.Mode().Perm()), "chmod go-w "+k.c.DataDir)
	}
	f, err := files.LockWait(filepath.Join(k.c.DataDir, "lock"))
	if err != nil {
		return nil, err
	}
	return func() { f.Close() }, nil
}

// Publish takes a bundle in. When it returns, every authority is on disk, also
// when it returns an error about something else, such as a trust.json that
// cannot be written.
func (k *Keeper) Publish(b Bundle) error {
	if err := b.check(k.c.TrustDomain); err != nil {
		return err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	unlock, err := k.lock()
	if err != nil {
		return err
	}
	defer unlock()
	a, err := k.loadArchive()
	if err != nil {
		return err
	}
	if a.Serial == 0 && len(a.SVIDs) == 0 {
		if err := k.takeUp(a); err != nil {
			return err
		}
	}
	changed, left := a.merge(b, k.now())
	if changed {
		if err := k.saveArchive(a); err != nil {
			return err
		}
	}
	for _, c := range a.SVIDs {
		if c.Tainted.IsZero() && c.Dropped.IsZero() {
			k.seen[sha256.Sum256(c.Certificate)] = c.LastSeen
		}
	}
	return errors.Join(left, k.write(a, changed))
}

// Check writes trust.json anew if a file has changed or the last one is old.
// Before the first bundle there is nothing to write.
func (k *Keeper) Check() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	unlock, err := k.lock()
	if err != nil {
		return err
	}
	defer unlock()
	a, err := k.loadArchive()
	if err != nil || len(a.SVIDs) == 0 {
		return err
	}
	return k.write(a, false)
}

// Run looks at the files until ctx ends.
func (k *Keeper) Run(ctx context.Context) {
	tick := time.NewTicker(checkEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		k.say(k.Check())
	}
}

// say logs what went wrong, once until it is another thing.
func (k *Keeper) say(err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	text := ""
	if err != nil {
		text = cli.JoinHint(err.Error(), cli.HintOf(err))
	}
	if text != k.said && text != "" {
		k.c.Log.Error("trust.json is not up to date", "error", text)
	}
	k.said = text
}

func (k *Keeper) now() time.Time { return k.c.Now().UTC().Truncate(time.Second) }

func inode(st os.FileInfo) uint64 {
	if s, ok := st.Sys().(*syscall.Stat_t); ok {
		return s.Ino
	}
	return 0
}
