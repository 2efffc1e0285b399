package keeper

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/internal/files"
	"github.com/rootlink/rootlink/internal/trustdoc"
	"github.com/rootlink/rootlink/pkg/attest"
	"github.com/rootlink/rootlink/pkg/link"
	"github.com/rootlink/rootlink/pkg/strictjson"
)

// archive is all that is remembered. It only grows: what a verifier needs for a
// link of ten years ago is in no other place.
type archive struct {
	Version     int    `json:"version"`
	TrustDomain string `json:"trust_domain"`

	Serial    uint64         `json:"serial"`            // of the last trust.json
	Digest    string         `json:"digest,omitempty"`  // of its document
	Content   string         `json:"content,omitempty"` // of what it says, dates and serial aside
	Expires   time.Time      `json:"expires,omitzero"`  // of it
	Renew     time.Time      `json:"renew,omitzero"`    // when another one must be out
	TrustKeys []string       `json:"trust_keys"`        // fingerprints of the keys it names
	Sequence  uint64         `json:"bundle_sequence"`   // highest of SPIRE's bundles seen
	CAs       [][]byte       `json:"attestation_cas"`   // DER, every one there ever was
	Policies  []pcrs         `json:"pcr_policies"`      // every revision there ever was
	TSAs      []trustdoc.TSA `json:"tsas"`              // every one there ever was
	SVIDs     []*svidCA      `json:"x509_authorities"`  // every one there ever was
}

// svidCA is an X.509 authority of SPIRE's bundle.
type svidCA struct {
	Certificate []byte    `json:"certificate"` // DER
	FirstSeen   time.Time `json:"first_seen"`
	LastSeen    time.Time `json:"last_seen"` // in good standing
	Tainted     time.Time `json:"tainted,omitzero"`
	Dropped     time.Time `json:"dropped,omitzero"`

	parsed *x509.Certificate
}

type pcrs struct {
	Policy    attest.PCRPolicy `json:"policy"`
	FirstSeen time.Time        `json:"first_seen"`
	Gone      time.Time        `json:"gone,omitzero"` // no longer in the file
}

// Limits of what is read and kept.
const (
	archiveVersion = 1
	maxArchive     = 64 << 20 // bytes
	maxBundle      = 1024     // authorities in one bundle
	maxCertificate = 64 << 10 // bytes
	// maxListed is how many authorities a trust.json holds, of the size that
	// SPIRE makes them: a rotation each 20 hours fills it in 15 years.
	maxListed = 6600
	// maxKept bounds the archive itself.
	maxKept = 32768
	// seenEvery is how often it is written down that nothing has changed.
	seenEvery = 5 * time.Minute
)

// Errors that callers branch on.
var (
	// ErrBundle: a bundle, or an authority in it, cannot be meant for this keeper.
	ErrBundle = errors.New("bundle")
	// ErrDamaged: the archive cannot be read, and is not written over.
	ErrDamaged = errors.New("the archive is damaged")
	// ErrKey: verifiers that know what was written before would refuse the next.
	ErrKey = errors.New("another key signed what was written before")
	// ErrForeign: the file to be written is somebody else's.
	ErrForeign = errors.New("it is none that this keeper wrote")
	// ErrPolicy: a revision of a PCR policy was changed or taken back.
	ErrPolicy = errors.New("PCR policies")
)

func (k *Keeper) archivePath() string { return filepath.Join(k.c.DataDir, "archive.json") }

func (k *Keeper) loadArchive() (*archive, error) {
	b, err := files.Read(k.archivePath(), maxArchive)
	if errors.Is(err, fs.ErrNotExist) {
		return &archive{Version: archiveVersion, TrustDomain: k.c.TrustDomain}, nil
	}
	if err != nil {
		return nil, fmt.Errorf("archive: %w", err)
	}
	var a archive
	if err := strictjson.Decode(b, maxArchive, "", &a); err != nil {
		return nil, damaged(k.archivePath(), err)
	}
	if a.Version != archiveVersion {
		return nil, damaged(k.archivePath(), fmt.Errorf("version %d", a.Version))
	}
	if a.TrustDomain != k.c.TrustDomain {
		return nil, cli.Hint(fmt.Errorf("archive %s: it is of trust domain %q, not of %q", k.archivePath(), a.TrustDomain, k.c.TrustDomain),
			"name a data_dir for each trust domain")
	}
	for _, c := range a.SVIDs {
		if c == nil {
			return nil, damaged(k.archivePath(), errors.New("an empty authority"))
		}
		if c.parsed, err = x509.ParseCertificate(c.Certificate); err != nil {
			return nil, damaged(k.archivePath(), err)
		}
		if at, ok := k.seen[sha256.Sum256(c.Certificate)]; ok && at.After(c.LastSeen) && c.Tainted.IsZero() && c.Dropped.IsZero() {
			c.LastSeen = at
		}
	}
	return &a, nil
}

// An unreadable archive is not an empty one: nothing is written over it.
func damaged(path string, err error) error {
	return cli.Hint(fmt.Errorf("%w: %s: %w", ErrDamaged, path, err),
		"restore it from a backup; or move it away: it begins anew with what trust_file holds")
}

func (k *Keeper) saveArchive(a *archive) error {
	b, err := json.MarshalIndent(a, "", " ")
	if err != nil {
		return err
	}
	if len(b) > maxArchive {
		return fmt.Errorf("archive: %d bytes: %w", len(b), files.ErrTooLarge)
	}
	if err := files.Write(k.archivePath(), append(b, '\n'), 0o600); err != nil {
		return fmt.Errorf("archive: %w", err)
	}
	return nil
}

// Bundle is what SPIRE publishes, as far as it is kept.
type Bundle struct {
	TrustDomain string
	Sequence    uint64
	Authorities []Authority
}

// Authority is one X.509 authority of a Bundle.
type Authority struct {
	Certificate []byte // DER
	Tainted     bool
}

// check refuses a bundle that cannot be meant for this keeper.
func (b Bundle) check(td string) error {
	got, err := spiffeid.TrustDomainFromString(b.TrustDomain)
	switch {
	case err != nil:
		return fmt.Errorf("%w: trust domain: %w", ErrBundle, err)
	case got.Name() != td:
		return fmt.Errorf("%w: it is of trust domain %q, not of %q", ErrBundle, got.Name(), td)
	case len(b.Authorities) == 0:
		// Nothing would hold any more.
		return fmt.Errorf("%w: it holds no X.509 authority", ErrBundle)
	case len(b.Authorities) > maxBundle:
		return fmt.Errorf("%w: %d X.509 authorities, at most %d are kept", ErrBundle, len(b.Authorities), maxBundle)
	}
	return nil
}

// checkAuthority refuses what a verifier would refuse: one such certificate in
// trust.json makes the whole file worthless.
func checkAuthority(td string, der []byte) (*x509.Certificate, error) {
	if len(der) > maxCertificate {
		return nil, fmt.Errorf("a certificate of %d bytes", len(der))
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	for _, u := range c.URIs {
		if u.String() != "spiffe://"+td {
			return nil, fmt.Errorf("%q is of %s", c.Subject, u)
		}
	}
	_, err = link.MarshalTrustedRoot([]link.Authority{{Certificate: c, Start: c.NotBefore, End: c.NotAfter}})
	return c, err
}

// merge takes a bundle in. It reports whether the archive must be written, and
// in err what of the bundle was left out, the rest being in.
func (a *archive) merge(b Bundle, now time.Time) (changed bool, err error) {
	known := map[[32]byte]*svidCA{}
	for _, c := range a.SVIDs {
		known[sha256.Sum256(c.Certificate)] = c
	}
	var errs []error
	here := map[[32]byte]bool{}
	for _, n := range b.Authorities {
		id := sha256.Sum256(n.Certificate)
		here[id] = true
		c := known[id]
		if c == nil {
			parsed, err := checkAuthority(a.TrustDomain, n.Certificate)
			if err == nil && len(a.SVIDs) >= maxKept {
				err = fmt.Errorf("the archive holds %d authorities and takes no more", maxKept)
			}
			if err != nil {
				errs = append(errs, fmt.Errorf("%w: X.509 authority %x: %w", ErrBundle, id[:8], err))
				continue
			}
			c = &svidCA{Certificate: bytes.Clone(n.Certificate), FirstSeen: now, parsed: parsed}
			if !n.Tainted {
				c.LastSeen = now
			}
			known[id], a.SVIDs, changed = c, append(a.SVIDs, c), true
		}
		switch {
		case !c.Tainted.IsZero(): // for good
		case n.Tainted:
			c.Tainted, changed = now, true
		default:
			if !c.Dropped.IsZero() {
				c.Dropped, changed = time.Time{}, true
			}
			changed = changed || now.Sub(c.LastSeen) >= seenEvery
			c.LastSeen = now
		}
	}
	// Of two servers one may publish late what it read before the other
	// changed it: only what is as new as anything seen can say who is missing.
	if b.Sequence >= a.Sequence {
		for id, c := range known {
			if !here[id] && c.Dropped.IsZero() && c.Tainted.IsZero() && now.Before(c.parsed.NotAfter) {
				c.Dropped, changed = now, true
			}
		}
		changed = changed || b.Sequence > a.Sequence
		a.Sequence = b.Sequence
	}
	return changed, errors.Join(errs...)
}

// window is when signatures by SVIDs of c count: while its certificate holds and
// it was seen in good standing. When it is tainted or dropped before its time,
// its key may have been stolen since it was last seen.
func (c *svidCA) window() link.Authority {
	w := link.Authority{Certificate: c.parsed, Start: c.parsed.NotBefore, End: c.parsed.NotAfter}
	if (!c.Tainted.IsZero() || !c.Dropped.IsZero()) && c.LastSeen.Before(w.End) {
		w.End = c.LastSeen.UTC().Truncate(time.Second)
	}
	if w.End.Before(w.Start) {
		w.End = w.Start
	}
	return w
}

// narrow takes over an earlier end that a newer trust.json said. Of an authority
// that was tainted and has run out since, SPIRE says nothing any more. One that
// is in good standing comes back with the next bundle.
func (c *svidCA) narrow(end, now time.Time) {
	inBundle := c.Tainted.IsZero() && c.Dropped.IsZero() && c.LastSeen.Equal(now) // which is newer still
	if end.IsZero() || !end.Before(c.window().End) || inBundle {
		return
	}
	if c.Dropped.IsZero() {
		c.Dropped = now
	}
	if end.Before(c.LastSeen) {
		c.LastSeen = end
	}
}

// authorities are those for trust.json, and how many of the oldest did not fit.
func (a *archive) authorities(forget map[[32]byte]bool) (out []link.Authority, left int) {
	for _, c := range a.SVIDs {
		if !forget[sha256.Sum256(c.Certificate)] {
			out = append(out, c.window())
		}
	}
	slices.SortStableFunc(out, func(x, y link.Authority) int {
		return cmp.Or(x.Start.Compare(y.Start), bytes.Compare(x.Certificate.Raw, y.Certificate.Raw))
	})
	if len(out) > maxListed {
		left = len(out) - maxListed
		out = out[left:]
	}
	return out, left
}

// addPolicies takes the file's revisions in, and says which are current no more.
func (a *archive) addPolicies(list []attest.PCRPolicy, now time.Time) (changed bool, err error) {
	current := map[string]uint64{}
	for _, p := range list {
		current[p.Name] = max(current[p.Name], p.Revision)
	}
	newest := map[string]uint64{}
	for _, p := range a.Policies {
		newest[p.Policy.Name] = max(newest[p.Policy.Name], p.Policy.Revision)
	}
	for name, r := range current {
		if r < newest[name] {
			return false, cli.Hint(fmt.Errorf("%w: %q went back from revision %d to %d", ErrPolicy, name, newest[name], r),
				"give what it says now a new revision: evidence names the one that was current")
		}
	}
	for _, p := range list {
		i := slices.IndexFunc(a.Policies, func(o pcrs) bool { return o.Policy.Name == p.Name && o.Policy.Revision == p.Revision })
		switch {
		case i < 0:
			a.Policies, changed = append(a.Policies, pcrs{Policy: p, FirstSeen: now}), true
		case a.Policies[i].Policy.Digest() != p.Digest():
			return changed, cli.Hint(fmt.Errorf("%w: %q revision %d was changed", ErrPolicy, p.Name, p.Revision),
				"restore it, and put the change into the next revision: evidence names the one that was current")
		}
	}
	for i := range a.Policies {
		p := &a.Policies[i]
		_, here := current[p.Policy.Name]
		last := p.Policy.Revision == max(current[p.Policy.Name], newest[p.Policy.Name])
		switch {
		case here && !p.Gone.IsZero() && last:
			p.Gone, changed = time.Time{}, true
		case !here && p.Gone.IsZero() && last:
			p.Gone, changed = now, true
		}
	}
	return changed, nil
}

// policies are all revisions by name, oldest first.
func (a *archive) policies() (out []trustdoc.PolicyRevision) {
	slices.SortStableFunc(a.Policies, func(x, y pcrs) int {
		return cmp.Or(cmp.Compare(x.Policy.Name, y.Policy.Name), cmp.Compare(x.Policy.Revision, y.Policy.Revision))
	})
	for _, p := range a.Policies {
		out = append(out, trustdoc.PolicyRevision{Policy: p.Policy, Created: p.FirstSeen.UTC().Truncate(time.Second), Deleted: p.Gone.UTC().Truncate(time.Second)})
	}
	return out
}

// addCertificates remembers attestation CAs and timestamp authorities: a file
// from which one was taken must not take the links that it vouches for.
func (a *archive) addCertificates(cas []*x509.Certificate, tsas []trustdoc.TSA) (changed bool) {
	for _, c := range cas {
		if !slices.ContainsFunc(a.CAs, func(der []byte) bool { return bytes.Equal(der, c.Raw) }) {
			a.CAs, changed = append(a.CAs, c.Raw), true
		}
	}
	for _, t := range tsas {
		i := slices.IndexFunc(a.TSAs, t.Same)
		switch {
		case i < 0:
			a.TSAs, changed = append(a.TSAs, t), true
		case a.TSAs[i].Operator != t.Operator || a.TSAs[i].URI != t.URI:
			a.TSAs[i], changed = t, true
		}
	}
	return changed
}

// recover takes in what a trust.json holds that this archive does not know, as
// when it was restored from an old backup.
func (a *archive) recover(t *link.Trust, now time.Time) {
	for _, w := range t.Authorities() {
		if i := slices.IndexFunc(a.SVIDs, func(c *svidCA) bool { return bytes.Equal(c.Certificate, w.Certificate.Raw) }); i >= 0 {
			a.SVIDs[i].narrow(w.End, now)
			continue
		}
		c := &svidCA{Certificate: w.Certificate.Raw, FirstSeen: w.Start, LastSeen: now, parsed: w.Certificate}
		if !w.End.IsZero() && w.End.Before(w.Certificate.NotAfter) {
			c.LastSeen, c.Tainted = w.End, w.End
		} else if now.After(w.Certificate.NotAfter) {
			c.LastSeen = w.Certificate.NotAfter
		}
		a.SVIDs = append(a.SVIDs, c)
	}
	for _, ca := range t.File().AttestationCAs {
		if !slices.ContainsFunc(a.CAs, func(der []byte) bool { return bytes.Equal(der, ca.Certificate) }) {
			a.CAs = append(a.CAs, ca.Certificate)
		}
	}
	for _, s := range t.TrustedRoot().Timestamps {
		n := trustdoc.TSA{Operator: s.Operator, URI: s.URI, From: s.Start}
		for _, c := range s.Chain {
			n.Chain = append(n.Chain, c.Raw)
		}
		if !slices.ContainsFunc(a.TSAs, n.Same) {
			a.TSAs = append(a.TSAs, n)
		}
	}
	for _, p := range t.File().PCRPolicies {
		i := slices.IndexFunc(a.Policies, func(o pcrs) bool { return o.Policy.Name == p.Name && o.Policy.Revision == p.Revision })
		switch {
		case i < 0:
			a.Policies = append(a.Policies, pcrs{Policy: p.PCRPolicy, FirstSeen: t.Issued(), Gone: p.Replaced})
		case !p.Replaced.IsZero() && (a.Policies[i].Gone.IsZero() || p.Replaced.Before(a.Policies[i].Gone)):
			a.Policies[i].Gone = p.Replaced // a boot state that was given up stays so
		}
	}
	if t.Serial() >= a.Serial {
		a.Serial, a.Digest = t.Serial(), t.Digest()
	}
}

func fingerprintOf(parts ...[]byte) string {
	h := sha256.New()
	for _, p := range parts {
		fmt.Fprintf(h, "%d:", len(p))
		h.Write(p)
	}
	return hex.EncodeToString(h.Sum(nil))
}
