package bundles

import (
	"context"
	"log/slog"

	"github.com/hashicorp/go-hclog"
)

// logger hands what the keeper says to SPIRE's log.
func logger(l hclog.Logger) *slog.Logger { return slog.New(handler{l}) }

type handler struct{ log hclog.Logger }

func (h handler) Enabled(context.Context, slog.Level) bool { return true }

func (h handler) Handle(_ context.Context, r slog.Record) error {
	var args []any
	r.Attrs(func(a slog.Attr) bool {
		args = append(args, a.Key, a.Value.String()) // as text: hclog turns integers into floats
		return true
	})
	switch {
	case r.Level >= slog.LevelError:
		h.log.Error(r.Message, args...)
	case r.Level >= slog.LevelWarn:
		h.log.Warn(r.Message, args...)
	default:
		h.log.Info(r.Message, args...)
	}
	return nil
}

func (h handler) WithAttrs(attrs []slog.Attr) slog.Handler {
	var args []any
	for _, a := range attrs {
		args = append(args, a.Key, a.Value.String())
	}
	return handler{h.log.With(args...)}
}

func (h handler) WithGroup(name string) slog.Handler { return handler{h.log.Named(name)} }
