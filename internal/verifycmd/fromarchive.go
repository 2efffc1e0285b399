package verifycmd

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/internal/files"
	"github.com/rootlink/rootlink/pkg/archive"
	"github.com/rootlink/rootlink/pkg/link"
	"github.com/rootlink/rootlink/pkg/timestamp"
)

// unpacked is an archive whose files lie in a directory of their own until they
// are judged, and what its manifest says was asked.
type unpacked struct {
	*fetched
	*archive.Archive
	at      time.Time // at which trust.json is judged, by the archive's token; zero: now
	stamped time.Time // by the archive's token; zero: it has none, or of somebody unknown
	// notes are what whoever verifies must know of a verdict that rests on what
	// the archive says of itself.
	notes []string
}

// unpack opens --archive and fills in the flags that its manifest answers. The
// archive brings its own trust.json, so whoever made it chose whom to believe:
// the key that signed it must be pinned, or have been seen before.
func (o *verifyOptions) unpack(clock time.Time, args []string) (*unpacked, []string, error) {
	switch {
	case o.pipeline.file != "":
		return nil, nil, cli.Usage("the archive says which layout it was made for; unpack it (it is a tar) to ask for another", "--archive with --layout")
	case o.trust != "" && len(o.revocations) == 0:
		// A newer trust.json beside the archive: it has what was revoked since.
	case o.trust != "":
		return nil, nil, cli.Usage("the archive holds what is to be verified, and for what", "--archive with --revocations of another trust.json")
	}
	file, err := os.Open(o.archive)
	if err != nil {
		return nil, nil, err
	}
	defer file.Close()
	a, err := archive.Open(file)
	if err != nil {
		code := cli.ExitInternal
		if errors.Is(err, archive.ErrChanged) {
			code = cli.ExitCrypto
		}
		return nil, nil, cli.Fail(code, fmt.Errorf("%s: %w", o.archive, err), "get it again from where it was kept")
	}
	u := &unpacked{fetched: &fetched{names: map[string]string{}, artifacts: a.Manifest.Artifacts}, Archive: a}
	if u.dir, err = os.MkdirTemp("", "rootlink-"); err != nil {
		return nil, nil, err
	}
	if args, err = u.lay(o, args); err == nil {
		err = u.date(o, clock)
	}
	if err != nil {
		u.remove()
		return nil, nil, err
	}
	return u, args, nil
}

// lay puts the files where the readers of files find them: logs and proofs
// beside the bundles, under the names that evidence names them by.
func (u *unpacked) lay(o *verifyOptions, args []string) ([]string, error) {
	var bundles []string
	for _, f := range u.Manifest.Files {
		path := filepath.Join(u.dir, f.Name())
		switch f.Role {
		case archive.RoleTrust, archive.RoleLayout, archive.RoleRevocations, archive.RoleCheckpoint:
			dir := filepath.Join(u.dir, f.Role)
			if err := os.MkdirAll(dir, 0o700); err != nil {
				return nil, err
			}
			path = filepath.Join(dir, f.Name())
		}
		if _, taken := u.names[path]; taken {
			return nil, cli.Fail(cli.ExitCrypto, fmt.Errorf("%s: two files called %q, of which one would hide the other", o.archive, f.Name()), "get it again from where it was kept")
		}
		if err := files.Write(path, f.Content(), 0o600); err != nil {
			return nil, err
		}
		u.names[path] = f.Name()
		switch f.Role {
		case archive.RoleTrust:
			if o.trust == "" {
				o.trust = path
			}
		case archive.RoleLayout:
			o.pipeline.file = path
		case archive.RoleSublayout:
			o.pipeline.sublayouts = append(o.pipeline.sublayouts, path)
		case archive.RoleRevocations:
			o.revocations = append(o.revocations, path)
		case archive.RoleBundle, archive.RoleClassic:
			bundles = append(bundles, path)
		}
	}
	// Nobody signed the question. Whoever has any genuine bundle can ask one that
	// it answers, so the answer says who asked; and what a layout's author wants
	// run is not left out on the archive's word.
	q := u.Manifest.Question
	switch {
	case o.identity != "" && q.Layout != "":
		return nil, cli.Usage("leave --identity away: the layout names who may sign each step", "the archive was made for a layout")
	case o.identity == "" && q.Layout == "":
		o.identity = q.Identity
		u.notes = append(u.notes, "the archive itself says that "+q.Identity+" was to sign; --identity says whom you expect")
	}
	o.predicate = cmp.Or(q.Type, "link")
	if q.Layout != "" {
		o.pipeline.buildID = q.BuildID
		o.pipeline.skip = o.pipeline.skip || o.checking && q.SkipInspections
	}
	if q.NotBefore != nil {
		o.notBefore = q.NotBefore.Format(time.RFC3339)
	}
	return append(bundles, args...), nil
}

// date finds the time at which trust.json is judged. One that has expired since
// must have been good when the archive was made, and only a token by an
// authority that it names shows when that was.
func (u *unpacked) date(o *verifyOptions, clock time.Time) error {
	pins, err := fingerprints(o.trustKeys)
	if err != nil {
		return err
	}
	trust, _, err := readTrust(o.trust, pins, o.revocations)
	if err != nil {
		return err
	}
	state, err := openState(o.state, trust)
	if err == nil {
		if trust.Serial() < state.least {
			u.notes = append(u.notes, fmt.Sprintf("trust.json in the archive has serial %d, and %d was seen: what was revoked since is not considered; --trust FILE lays the newer one beside it", trust.Serial(), state.least))
		}
		if len(pins) == 0 {
			o.trustKeys = state.file.Keys[trust.TrustDomain()]
		}
		state.close()
	}
	if len(pins) == 0 {
		if err != nil {
			return err
		}
		if len(o.trustKeys) == 0 {
			return cli.Usage("--trust-key FINGERPRINT: `rootlink-server trust key` prints it", "the archive brings its own trust.json, and nothing says that its key is the right one")
		}
	}
	// What was seen since is newer than any archive: its memory is not asked,
	// and learns nothing here.
	dir := filepath.Join(u.dir, "state")
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err // or a file of the archive is called so, and would be our memory
	}
	o.state, o.pipeline.state = filepath.Join(dir, "trust.json"), filepath.Join(dir, "layouts.json")
	expired := !clock.Before(trust.Expires())
	switch v, err := u.stampedAt(trust); {
	case err == nil:
		u.stamped = v
	case errors.Is(err, errNoToken) && expired:
		return cli.Fail(cli.ExitPolicy, fmt.Errorf("not verified: trust.json in %s expired at %s, and no token shows that the archive was made before", o.archive, trust.Expires().Format(time.RFC3339)),
			"lay a newer trust.json beside it: --trust FILE")
	case errors.Is(err, errNoToken):
	case errors.Is(err, timestamp.ErrUnknownAuthority) && !expired:
		u.notes = append(u.notes, "the archive's token is of an authority that trust.json does not name, and counts for nothing")
	default:
		return cli.Fail(cli.ExitCrypto, fmt.Errorf("not verified: the archive's token: %w", err), "get the archive again from where it was kept")
	}
	if expired {
		u.at = u.stamped
	}
	return nil
}

var errNoToken = errors.New("the archive has no token")

// token is the time that the archive's token attests.
func (u *unpacked) stampedAt(trust *link.Trust) (time.Time, error) {
	if u.Token() == nil {
		return time.Time{}, errNoToken
	}
	token, err := timestamp.Parse(u.Token())
	if err != nil {
		return time.Time{}, err
	}
	v, err := token.Verify(u.Stamped(), trust.TrustedRoot().Timestamps)
	return v.Time, err
}
