package server

import (
	"context"
	"errors"

	"github.com/rootlink/rootlink/internal/catalog"
)

// Validate judges a configuration as New would, has every plugin judge its own,
// and returns their notes. It listens nowhere and writes nothing. External plugins
// are run for it, without services of this server.
func Validate(ctx context.Context, c Config) (notes []string, err error) {
	s := new(Server)
	if s.cfg, err = c.check(); err != nil {
		return nil, err
	}
	if err := checkExternal(s.cfg); err != nil {
		return nil, err
	}
	errs := []error{s.checkAttestor(ctx)}
	for _, p := range s.cfg.Plugins {
		more, err := catalog.Validate(ctx, p, catalog.Options{TrustDomain: s.cfg.TrustDomain, Log: s.cfg.Log}, p.Data)
		notes, errs = append(notes, more...), append(errs, err)
	}
	return notes, errors.Join(errs...)
}
