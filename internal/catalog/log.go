package catalog

import (
	"context"
	"fmt"
	"io"
	"log"
	"log/slog"
	"strings"

	"github.com/hashicorp/go-hclog"
)

// levelTrace is hclog's Trace on slog's scale.
const levelTrace = slog.LevelDebug - 4

// newHCLogger returns the hclog.Logger that plugins of the SDK expect, writing
// to l.
func newHCLogger(l *slog.Logger) hclog.Logger { return &hcLogger{base: l, log: l} }

// hcLogger forwards to slog. The level is slog's; SetLevel is ignored, since a
// plugin has no business changing what the host logs.
type hcLogger struct {
	base *slog.Logger // without name and implied arguments
	log  *slog.Logger
	name string
	args []any
}

func (h *hcLogger) Log(level hclog.Level, msg string, args ...any) {
	h.log.Log(context.Background(), slogLevel(level), msg, attrs(args)...)
}

func (h *hcLogger) Trace(msg string, args ...any) { h.Log(hclog.Trace, msg, args...) }
func (h *hcLogger) Debug(msg string, args ...any) { h.Log(hclog.Debug, msg, args...) }
func (h *hcLogger) Info(msg string, args ...any)  { h.Log(hclog.Info, msg, args...) }
func (h *hcLogger) Warn(msg string, args ...any)  { h.Log(hclog.Warn, msg, args...) }
func (h *hcLogger) Error(msg string, args ...any) { h.Log(hclog.Error, msg, args...) }

func (h *hcLogger) enabled(l hclog.Level) bool {
	return h.log.Enabled(context.Background(), slogLevel(l))
}

func (h *hcLogger) IsTrace() bool { return h.enabled(hclog.Trace) }
func (h *hcLogger) IsDebug() bool { return h.enabled(hclog.Debug) }
func (h *hcLogger) IsInfo() bool  { return h.enabled(hclog.Info) }
func (h *hcLogger) IsWarn() bool  { return h.enabled(hclog.Warn) }
func (h *hcLogger) IsError() bool { return h.enabled(hclog.Error) }

func (h *hcLogger) ImpliedArgs() []any { return h.args }
func (h *hcLogger) Name() string       { return h.name }

func (h *hcLogger) With(args ...any) hclog.Logger {
	n := *h
	n.args = append(append([]any{}, h.args...), args...)
	n.log = h.log.With(attrs(args)...)
	return &n
}

func (h *hcLogger) Named(name string) hclog.Logger {
	if h.name != "" {
		name = h.name + "." + name
	}
	return h.ResetNamed(name)
}

func (h *hcLogger) ResetNamed(name string) hclog.Logger {
	n := *h
	n.name = name
	n.log = h.base.With(attrs(h.args)...)
	if name != "" {
		n.log = n.log.With("subsystem", name)
	}
	return &n
}

func (h *hcLogger) SetLevel(hclog.Level) {}

func (h *hcLogger) GetLevel() hclog.Level {
	for _, l := range []hclog.Level{hclog.Trace, hclog.Debug, hclog.Info, hclog.Warn, hclog.Error} {
		if h.enabled(l) {
			return l
		}
	}
	return hclog.Off
}

func (h *hcLogger) StandardLogger(o *hclog.StandardLoggerOptions) *log.Logger {
	return log.New(h.StandardWriter(o), "", 0)
}

func (h *hcLogger) StandardWriter(o *hclog.StandardLoggerOptions) io.Writer {
	level := hclog.Info
	if o != nil && o.ForceLevel != hclog.NoLevel {
		level = o.ForceLevel
	}
	return lineWriter{h, level}
}

// lineWriter logs each write as one message, as the log package makes them.
type lineWriter struct {
	h     *hcLogger
	level hclog.Level
}

func (w lineWriter) Write(b []byte) (int, error) {
	w.h.Log(w.level, strings.TrimRight(string(b), "\n"))
	return len(b), nil
}

func slogLevel(l hclog.Level) slog.Level {
	switch l {
	case hclog.Trace:
		return levelTrace
	case hclog.Debug:
		return slog.LevelDebug
	case hclog.Warn:
		return slog.LevelWarn
	case hclog.Error:
		return slog.LevelError
	default:
		return slog.LevelInfo
	}
}

// attrs turns hclog's pairs, some of which are values that hclog would have
// formatted itself, into slog's.
func attrs(args []any) []any {
	out := make([]any, 0, len(args)+1)
	for i := 0; i < len(args); i += 2 {
		if i+1 == len(args) {
			return append(out, slog.Any(hclog.MissingKey, value(args[i])))
		}
		key, ok := args[i].(string)
		if !ok {
			key = fmt.Sprint(args[i])
		}
		out = append(out, slog.Any(key, value(args[i+1])))
	}
	return out
}

func value(v any) any {
	switch v := v.(type) {
	case hclog.Format:
		if len(v) > 0 {
			if f, ok := v[0].(string); ok {
				return fmt.Sprintf(f, v[1:]...)
			}
		}
		return fmt.Sprint(v...)
	case hclog.Hex:
		return fmt.Sprintf("%#x", int(v))
	case hclog.Octal:
		return fmt.Sprintf("%#o", int(v))
	case hclog.Binary:
		return fmt.Sprintf("%#b", int(v))
	case hclog.Quote:
		return string(v) // slog quotes
	case error:
		return v.Error()
	default:
		return v
	}
}
