// Package hostside is what the roles of the plugin share towards the SPIRE server
// or agent that loaded them: its log and the shape of its configuration.
package hostside

import (
	"context"
	"fmt"
	"log/slog"

	"github.com/hashicorp/go-hclog"
)

// Logger hands to the host's log what packages that know nothing of it say.
func Logger(l hclog.Logger) *slog.Logger { return slog.New(handler{l}) }

type handler struct{ log hclog.Logger }

func (h handler) Enabled(_ context.Context, l slog.Level) bool {
	return l >= slog.LevelInfo || h.log.IsDebug()
}

func (h handler) Handle(_ context.Context, r slog.Record) error {
	args := make([]any, 0, 2*r.NumAttrs())
	r.Attrs(func(a slog.Attr) bool {
		args = append(args, a.Key, a.Value.String()) // as text: hclog turns integers into floats
		return true
	})
	switch {
	case r.Level >= slog.LevelError:
		h.log.Error(r.Message, args...)
	case r.Level >= slog.LevelWarn:
		h.log.Warn(r.Message, args...)
	case r.Level >= slog.LevelInfo:
		h.log.Info(r.Message, args...)
	default:
		h.log.Debug(r.Message, args...)
	}
	return nil
}

func (h handler) WithAttrs(attrs []slog.Attr) slog.Handler {
	args := make([]any, 0, 2*len(attrs))
	for _, a := range attrs {
		args = append(args, a.Key, a.Value.String())
	}
	return handler{h.log.With(args...)}
}

func (h handler) WithGroup(name string) slog.Handler { return handler{h.log.Named(name)} }

// StringList reads a key that may be one string or a list of them. An empty
// string is no list; one inside a list is a mistake.
func StringList(key string, v any) ([]string, error) {
	switch v := v.(type) {
	case nil:
		return nil, nil
	case string:
		if v == "" {
			return nil, nil
		}
		return []string{v}, nil
	case []any:
		var out []string
		for _, e := range v {
			s, ok := e.(string)
			if !ok || s == "" {
				return nil, fmt.Errorf("%s: want paths", key)
			}
			out = append(out, s)
		}
		return out, nil
	}
	return nil, fmt.Errorf("%s: want a path or a list of paths", key)
}
