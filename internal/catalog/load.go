package catalog

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"regexp"

	configv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/service/common/config/v1"
)

// Config is one plugin of a configuration file.
type Config struct {
	Type string // the SDK's, "NodeAttestor" for example
	Name string

	// Cmd is the program of an external plugin, its path or a path from the
	// working directory: $PATH is never searched. Empty for a built-in one.
	Cmd  string
	Args []string
	Env  []string // "NAME=value", beside what the host's own has
	// Checksum is the SHA-256 of the program in hex. Without one any program at
	// that path is run, and a warning names the digest to pin.
	Checksum string

	Data     string   // HCL for Configure
	DataFile string   // where Data was read from, if not from the configuration file; for errors
	BuiltIn  *BuiltIn // used when Cmd is empty
}

// ErrConfig means that a plugin's block cannot be meant as it is.
var ErrConfig = errors.New("plugin configuration")

var (
	nameForm = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$`)
	// The type is also the name of an environment variable of the plugin.
	typeForm = regexp.MustCompile(`^[A-Za-z]{1,64}$`)
)

func (c *Config) check(o Options) (sum *[sha256.Size]byte, err error) {
	fail := func(format string, args ...any) (*[sha256.Size]byte, error) {
		return nil, fmt.Errorf("%w: %s", ErrConfig, fmt.Sprintf(format, args...))
	}
	switch {
	case !typeForm.MatchString(c.Type):
		return fail("%.80q is no plugin type", c.Type)
	case !nameForm.MatchString(c.Name):
		// The name becomes the type of the plugin's selectors, which a colon ends.
		return fail("%s %.80q: a name is 1 to 64 of A-Z a-z 0-9 . _ -", c.Type, c.Name)
	case o.TrustDomain == "":
		return fail("%s %q: no trust domain for its core configuration", c.Type, c.Name)
	case o.Log == nil:
		return fail("%s %q: no logger", c.Type, c.Name)
	case c.Cmd == "" && c.BuiltIn == nil:
		return fail("%s %q is not built in, and no plugin_cmd names a program", c.Type, c.Name)
	case c.Cmd == "" && (c.Checksum != "" || len(c.Args) != 0):
		return fail("%s %q: plugin_args and plugin_checksum are about a program, and no plugin_cmd names one", c.Type, c.Name)
	case c.Checksum == "":
		return nil, nil
	}
	sum = new([sha256.Size]byte)
	if b, err := hex.DecodeString(c.Checksum); err != nil || copy(sum[:], b) != len(sum) || len(b) != len(sum) {
		return fail("%s %q: plugin_checksum is not a SHA-256 in hex", c.Type, c.Name)
	}
	return sum, nil
}

// Hint says what to do about an error of Load, Start or Configure, or "".
func Hint(err error) string {
	if e, ok := errors.AsType[*ConfigureError](err); ok {
		return e.Hint
	}
	switch {
	case errors.Is(err, ErrChecksum):
		return "if the program was replaced on purpose, pin the new one: plugin_checksum is what sha256sum prints"
	case errors.Is(err, ErrOpenProgram):
		return "chmod o-w it and its directory and have root or the daemon's user own it, or pin it with plugin_checksum"
	}
	return ""
}

// Load starts a plugin and gives it its configuration. An external plugin that
// ends later is started again and given the last configuration that it took.
func Load(ctx context.Context, c Config, o Options) (*Plugin, error) {
	p, err := Start(ctx, c, o)
	if err != nil {
		return nil, err
	}
	if err := p.ConfigureFrom(ctx, c.Data, c.DataFile); err != nil {
		return nil, errors.Join(err, p.Close())
	}
	return p, nil
}

// Start is Load without the configuration, for whoever only wants to Validate.
func Start(ctx context.Context, c Config, o Options) (*Plugin, error) {
	sum, err := c.check(o)
	if err != nil {
		return nil, err
	}
	if c.Cmd == "" {
		b := *c.BuiltIn
		b.Name = c.Name
		if b.Plugin != nil && b.Plugin.Type() != c.Type {
			return nil, fmt.Errorf("%w: %q is a %s, not a %s", ErrConfig, c.Name, b.Plugin.Type(), c.Type)
		}
		return LoadBuiltIn(ctx, b, o)
	}
	p := &Plugin{
		name: c.Name,
		typ:  c.Type,
		core: &configv1.CoreConfiguration{TrustDomain: o.TrustDomain},

		timeout: o.configureTimeout(),
	}
	e, err := startExternal(ctx, c, sum, o, p.reconfigure)
	if err != nil {
		return nil, fmt.Errorf("plugin %q: %w", c.Name, err)
	}
	p.b = e
	return p, nil
}
