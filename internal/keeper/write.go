package keeper

import (
	"bytes"
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

	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/internal/files"
	"github.com/rootlink/rootlink/internal/trustdoc"
	"github.com/rootlink/rootlink/pkg/link"
)

// write brings trust.json up to date. The caller holds the lock; a is what is on
// disk.
func (k *Keeper) write(a *archive, force bool) error {
	stamp := k.c.stamp()
	now := k.now()
	if !force && stamp == k.stamps && now.Before(a.Renew) {
		return nil
	}
	in, err := k.c.read()
	if err == nil {
		err = k.c.readKeys(in, true)
	}
	if err != nil {
		return fmt.Errorf("trust.json: %w", err)
	}
	if err := checkKeys(a, in); err != nil {
		return err
	}
	changed := a.addCertificates(in.cas, in.tsas)
	more, err := a.addPolicies(in.policies, now)
	if err != nil {
		return fmt.Errorf("trust.json: %w", err)
	}
	if changed || more {
		if err := k.saveArchive(a); err != nil {
			return err
		}
	}
	ours, behind, err := k.existing(a, in, now)
	if err != nil {
		return err
	}
	f, root, err := k.compose(a, in, now)
	if err != nil {
		return fmt.Errorf("trust.json: %w", err)
	}
	content, err := contentOf(f, in.ids)
	if err != nil {
		return err
	}
	if ours == nil || behind || content != a.Content || !now.Before(a.Renew) {
		if ours, err = k.seal(a, in, f, content); err != nil {
			return err
		}
	}
	// Each server has its own copy.
	if err := put(k.c.TrustFile, ours); err != nil {
		return fmt.Errorf("trust_file: %w", err)
	}
	if k.c.SigstoreFile != "" {
		b, err := trustdoc.Sigstore(root)
		if err == nil {
			_, err = link.ParseTrustedRoot(b)
		}
		if err == nil {
			err = put(k.c.SigstoreFile, b)
		}
		if err != nil {
			return fmt.Errorf("sigstore_file: %w", err)
		}
	}
	k.stamps = k.c.stamp()
	return nil
}

// compose is the next trust.json, but for its serial and signature.
func (k *Keeper) compose(a *archive, in *inputs, now time.Time) (f link.TrustFile, root link.TrustedRoot, err error) {
	if f, err = trustdoc.New(k.c.TrustDomain, now, k.c.Lifetime); err != nil {
		return f, root, err
	}
	left := 0
	if root.Authorities, left = a.authorities(k.forget); left > 0 {
		k.c.Log.Error("trust.json is full: the oldest authorities are left out, and links signed under them verify no more with it",
			"left_out", left, "hint", "keep an older trust.json for those; a longer ca_ttl makes fewer authorities")
	}
	if len(root.Authorities) == 0 {
		return f, root, fmt.Errorf("%w: no X.509 authority", trustdoc.ErrNothing)
	}
	src := trustdoc.Sources{Operator: k.c.Operator, AuthoritiesNeeded: &k.c.AuthoritiesNeeded}
	for _, t := range a.TSAs {
		if !slices.ContainsFunc(t.Chain, k.forgotten) {
			src.Timestamps = append(src.Timestamps, t)
		}
	}
	if root.Timestamps, err = src.Authorities(); err != nil {
		return f, root, err
	}
	src.AddTo(&f)
	if f.TrustedRoot, err = root.Marshal(); err != nil {
		return f, root, err
	}
	for _, der := range a.CAs {
		if !k.forgotten(der) {
			c, err := x509.ParseCertificate(der)
			if err != nil {
				return f, root, err
			}
			trustdoc.AddAttestationCAs(&f, []*x509.Certificate{c})
		}
	}
	if err := trustdoc.AddEKs(&f, in.ek); err != nil {
		return f, root, err
	}
	f.EK.Inventory = in.inventory
	trustdoc.AddPolicies(&f, a.policies())
	f.Requirements = append(f.Requirements, in.requirements...)
	f.LayoutKeys = in.layoutKeys
	return f, root, trustdoc.AddRevocations(&f, in.revocations)
}

func (k *Keeper) forgotten(der []byte) bool { return k.forget[sha256.Sum256(der)] }

// seal makes f the next trust.json: it spends a serial, signs, has our own
// verifier open the result, and only then replaces the copy in data_dir.
func (k *Keeper) seal(a *archive, in *inputs, f link.TrustFile, content string) ([]byte, error) {
	lastSerial, lastDigest := a.Serial, a.Digest
	f.Serial, f.Previous = lastSerial+1, lastDigest
	doc, out, err := trustdoc.Seal(&f, in.keys, in.signers)
	if err != nil {
		return nil, fmt.Errorf("trust.json: %w", err)
	}
	var t *link.Trust
	if k.c.Unsigned {
		out = doc
		t, err = link.ParseUnsignedTrust(out)
	} else if t, err = link.OpenTrust(out, in.ids); err == nil && len(t.Signers()) != len(in.ids) {
		err = fmt.Errorf("%w: not every key signed", link.ErrForeignTrust)
	}
	if err == nil {
		err = errors.Join(t.CheckSerial(lastSerial+1), t.CheckHistory(lastSerial, lastDigest))
	}
	if err != nil {
		return nil, fmt.Errorf("trust.json as a verifier reads it: %w", err)
	}
	// The serial is spent before anything carries it: one lost to a failure
	// leaves a gap, one given twice would hide a rollback.
	next := *a
	next.Serial, next.Digest, next.Content, next.TrustKeys = f.Serial, t.Digest(), content, in.ids
	next.Expires, next.Renew = f.Expires, f.Issued.Add(k.c.Lifetime/2)
	if err := k.saveArchive(&next); err != nil {
		return nil, err
	}
	*a = next
	if err := files.Write(filepath.Join(k.c.DataDir, trustName), out, 0o644); err != nil {
		return nil, fmt.Errorf("trust.json: %w", err)
	}
	k.c.Log.Info("trust.json written", "serial", fmt.Sprint(f.Serial), "expires", f.Expires.Format(time.RFC3339), "authorities", fmt.Sprint(len(t.Authorities())))
	return out, nil
}

// existing reads the copy in data_dir and trust_file. It returns the copy when
// it is the last that was written, and whether somebody may have seen a newer one:
// then the archive was restored from a backup, and what it lacks is taken in.
func (k *Keeper) existing(a *archive, in *inputs, now time.Time) (ours []byte, behind bool, err error) {
	var newest *link.Trust
	for _, path := range []string{filepath.Join(k.c.DataDir, trustName), k.c.TrustFile} {
		raw, t, err := k.open(path, a, in.ids)
		if err != nil {
			return nil, false, err
		}
		if t == nil {
			continue
		}
		if ours == nil && t.Digest() == a.Digest && t.Serial() == a.Serial {
			ours = raw
		}
		if t.Serial() > a.Serial || t.Serial() == a.Serial && t.Digest() != a.Digest {
			newest, behind = t, true
			a.recover(t, now)
		}
	}
	if newest != nil {
		k.c.Log.Warn("the archive is older than a trust.json that it wrote, and took in what it lacked", "serial", fmt.Sprint(newest.Serial()))
		return ours, true, k.saveArchive(a)
	}
	return ours, false, nil
}

// takeUp begins an archive with what trust_file holds, when the archive was lost.
func (k *Keeper) takeUp(a *archive) error {
	in := new(inputs)
	if err := k.c.readKeys(in, true); err != nil {
		return err
	}
	_, _, err := k.existing(a, in, k.now())
	return err
}

// open reads a trust.json of our own. What others wrote is never overwritten, and
// a file that is no trust.json at all is somebody's other file.
func (k *Keeper) open(path string, a *archive, ids []string) ([]byte, *link.Trust, error) {
	raw, err := files.Read(path, link.MaxTrustFile)
	if errors.Is(err, fs.ErrNotExist) || err == nil && len(raw) == 0 {
		return nil, nil, nil
	}
	if err != nil {
		return nil, nil, err
	}
	foreign := func(err error) error {
		return cli.Hint(fmt.Errorf("%s is not overwritten: %w: %w", path, ErrForeign, err), "move it away, or name another trust_file")
	}
	kind, doc, claimed, err := link.Document(raw)
	if err != nil || kind != link.KindTrust {
		return nil, nil, foreign(errors.New("not a trust.json"))
	}
	var t *link.Trust
	if len(claimed) == 0 {
		if t, err = link.ParseUnsignedTrust(doc); err == nil && t.Serial() > a.Serial && !k.c.Unsigned {
			err = link.ErrUnsigned // nobody vouches for what it would add
		}
	} else if t, err = link.OpenUnpinnedTrust(raw); err == nil {
		// The last keys count too: they have just been replaced.
		err = t.CheckSigner(append(slices.Clone(a.TrustKeys), ids...))
	}
	if err == nil && t.TrustDomain() != k.c.TrustDomain {
		err = fmt.Errorf("it is of trust domain %s", t.TrustDomain())
	}
	if err != nil {
		return nil, nil, foreign(err)
	}
	return raw, t, nil
}

// checkKeys refuses a key that nobody who pinned the last one would believe, such
// as that of a second server that shares the directory.
func checkKeys(a *archive, in *inputs) error {
	if len(a.TrustKeys) == 0 || slices.ContainsFunc(in.ids, func(id string) bool { return slices.Contains(a.TrustKeys, id) }) {
		return nil
	}
	return cli.Hint(fmt.Errorf("trust key: %w: %v, not %v", ErrKey, a.TrustKeys, in.ids),
		"give every server the same trust_key; to hand over to a new one, list both for a time: trust_key = [\"OLD.pem\", \"NEW.pem\"]")
}

// put writes a file unless it is the same already. Everybody may read it: it
// holds nothing secret and verifiers need it.
func put(path string, b []byte) error {
	if have, err := files.Read(path, link.MaxTrustFile); err == nil && bytes.Equal(have, b) {
		return nil
	}
	return files.Write(path, b, 0o644)
}

// contentOf is a digest of what f says, without what each one has anew.
func contentOf(f link.TrustFile, ids []string) (string, error) {
	f.Serial, f.Previous, f.Issued, f.Expires, f.TrustKeys = 0, "", time.Time{}, time.Time{}, nil
	b, err := json.Marshal(f)
	if err != nil {
		return "", err
	}
	return fingerprintOf(b, []byte(fmt.Sprint(ids))), nil
}

func parseHash(s string) (h [32]byte, err error) {
	b, err := hex.DecodeString(s)
	if err != nil || len(b) != len(h) {
		return h, fmt.Errorf("%q is not a SHA-256 in hex", s)
	}
	return [32]byte(b), nil
}
