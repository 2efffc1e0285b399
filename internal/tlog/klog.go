package tlog

import (
	"context"
	"log/slog"
	"sync"

	"k8s.io/klog/v2"
)

var klogOnce sync.Once

// redirectKlog has the log library's own messages go where ours go. What it
// calls information is detail to an operator. The library's logger is one for
// the whole process, so the first log that is opened decides.
func redirectKlog(to *slog.Logger) {
	klogOnce.Do(func() { klog.SetSlogLogger(slog.New(quieter{to.Handler()})) })
}

// quieter makes information of the handler's messages into debugging.
type quieter struct{ slog.Handler }

func level(l slog.Level) slog.Level {
	if l < slog.LevelWarn {
		return slog.LevelDebug
	}
	return l
}

func (q quieter) Enabled(ctx context.Context, l slog.Level) bool {
	return q.Handler.Enabled(ctx, level(l))
}

func (q quieter) Handle(ctx context.Context, r slog.Record) error {
	r.Level = level(r.Level)
	r.Message = "transparency log: " + r.Message
	return q.Handler.Handle(ctx, r)
}

func (q quieter) WithAttrs(a []slog.Attr) slog.Handler { return quieter{q.Handler.WithAttrs(a)} }
func (q quieter) WithGroup(n string) slog.Handler      { return quieter{q.Handler.WithGroup(n)} }
