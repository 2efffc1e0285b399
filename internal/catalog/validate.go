package catalog

import (
	"context"
	"errors"
	"fmt"
)

// Validate starts a plugin only to have it judge a configuration, and returns its
// notes. A refusal is a *ConfigureError, as Configure's would be; a plugin
// that cannot validate says so in a note.
func Validate(ctx context.Context, c Config, o Options, hcl string) (notes []string, err error) {
	p, err := Start(ctx, c, o)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, p.Close()) }()
	notes, err = p.Validate(ctx, hcl)
	if invalid, ok := errors.AsType[*InvalidConfigError](err); ok {
		refused := invalid.Refusal()
		refused.File = c.DataFile
		return nil, refused
	}
	for i, n := range notes {
		notes[i] = fmt.Sprintf("plugin %q: %s", c.Name, n)
	}
	if errors.Is(err, ErrNoService) {
		return append(notes, fmt.Sprintf("plugin %q cannot validate: its configuration was not judged", c.Name)), nil
	}
	return notes, err
}
