package verifycmd

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/internal/files"
	"github.com/rootlink/rootlink/pkg/archive"
	"github.com/rootlink/rootlink/pkg/timestamp"
)

// unpacked is an archive whose files lie in a directory of their own until they
// are judged, and what its manifest says was asked.
type unpacked struct {
	*fetched
	*archive.Archive
	at time.Time // by the archive's token; zero: it has none, or a newer trust.json decides
}

// unpack opens --archive and fills in the flags that its manifest answers. The
// archive brings its own trust.json, so whoever made it chose whom to believe:
// the key that signed it must be pinned, or have been seen before.
func (o *verifyOptions) unpack(clock time.Time, args []string) (*unpacked, []string, error) {
	switch {
	case o.trust != "" && len(o.revocations) == 0 && o.identity == "" && o.pipeline.file == "":
		// A newer trust.json beside the archive: it has what was revoked since.
	case o.trust != "":
		return nil, nil, cli.Usage("the archive holds what is to be verified, and for what", "--archive with --identity, --layout or --revocations of another trust.json")
	case o.identity != "" || o.pipeline.file != "":
		return nil, nil, cli.Usage("the archive says what was asked when it was made; unpack it (it is a tar) to ask something else", "--archive with --identity or --layout")
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
	q := u.Manifest.Question
	o.identity, o.predicate = q.Identity, q.Type
	if q.Layout != "" {
		o.pipeline.buildID, o.pipeline.skip = q.BuildID, q.SkipInspections
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
	if len(pins) == 0 {
		state, err := openState(o.state, trust)
		if err != nil {
			return err
		}
		o.trustKeys = state.file.Keys[trust.TrustDomain()]
		state.close()
		if len(o.trustKeys) == 0 {
			return cli.Usage("--trust-key FINGERPRINT: `rootlink-server trust key` prints it", "the archive brings its own trust.json, and nothing says that its key is the right one")
		}
	}
	// What was seen since is newer than any archive: its memory is not asked,
	// and learns nothing here.
	o.state = filepath.Join(u.dir, "trust-state.json")
	o.pipeline.state = filepath.Join(u.dir, "layout-state.json")
	if clock.Before(trust.Expires()) {
		return nil
	}
	if u.Token() == nil {
		return cli.Fail(cli.ExitPolicy, fmt.Errorf("not verified: trust.json in %s expired at %s, and no token shows that the archive was made before", o.archive, trust.Expires().Format(time.RFC3339)),
			"lay a newer trust.json beside it: --trust FILE")
	}
	token, err := timestamp.Parse(u.Token())
	if err != nil {
		return cli.Fail(cli.ExitCrypto, fmt.Errorf("not verified: the archive's token: %w", err), "get the archive again from where it was kept")
	}
	v, err := token.Verify(u.Stamped(), trust.TrustedRoot().Timestamps)
	if err != nil {
		return cli.Fail(cli.ExitCrypto, fmt.Errorf("not verified: the archive's token: %w", err), "get the archive again from where it was kept")
	}
	u.at = v.Time
	return nil
}
