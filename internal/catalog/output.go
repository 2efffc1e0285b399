package catalog

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/hashicorp/go-hclog"
	"golang.org/x/time/rate"
)

// Bounds on what an external plugin can put into the host's log: it must not
// fill the disk with what some caller makes it say.
const (
	maxLogLine   = 4 << 10 // bytes of a message or a value
	maxLogValues = 32      // pairs beside a message
	logRate      = 50      // lines a second
	logBurst     = 500
)

// output takes what an external plugin writes: log lines, and whatever else
// comes out of it. It outlives the plugin's processes.
type output struct {
	log     *slog.Logger // carries the plugin's name
	limit   *rate.Limiter
	dropped atomic.Uint64
}

func newOutput(log *slog.Logger) *output {
	return &output{log: log, limit: rate.NewLimiter(logRate, logBurst)}
}

func (o *output) say(level slog.Level, msg string, args ...any) {
	ctx := context.Background()
	if !o.log.Enabled(ctx, level) {
		return
	}
	if !o.limit.Allow() {
		o.dropped.Add(1)
		return
	}
	if n := o.dropped.Swap(0); n > 0 {
		o.log.Warn("the plugin wrote more than is logged", "lines_left_out", n)
	}
	o.log.Log(ctx, level, short(msg), args...)
}

func short(s string) string {
	if len(s) > maxLogLine {
		s = s[:maxLogLine] + "…"
	}
	return strings.ToValidUTF8(s, "�")
}

// hclog is the logger that go-plugin is given. What it says for itself repeats
// what we say, so it is for debugging; under the program's name it passes on
// what the plugin writes.
func (o *output) hclog() hclog.Logger {
	return &pluginLog{Logger: newHCLogger(o.log), o: o, own: true}
}

type pluginLog struct {
	hclog.Logger
	o   *output
	own bool // go-plugin's, not the plugin's
}

func (l *pluginLog) Log(level hclog.Level, msg string, args ...any) {
	at := slogLevel(level)
	if l.own {
		at = min(at, slog.LevelDebug)
	}
	l.o.say(at, msg, pairs(args)...)
}

func (l *pluginLog) Trace(msg string, args ...any) { l.Log(hclog.Trace, msg, args...) }
func (l *pluginLog) Debug(msg string, args ...any) { l.Log(hclog.Debug, msg, args...) }
func (l *pluginLog) Info(msg string, args ...any)  { l.Log(hclog.Info, msg, args...) }
func (l *pluginLog) Warn(msg string, args ...any)  { l.Log(hclog.Warn, msg, args...) }
func (l *pluginLog) Error(msg string, args ...any) { l.Log(hclog.Error, msg, args...) }

// Named is called with "stdio" for go-plugin's own, and with the file name of
// the program for what that writes to stderr.
func (l *pluginLog) Named(name string) hclog.Logger {
	return &pluginLog{Logger: l.Logger, o: l.o, own: name == "stdio"}
}

// pairs bounds hclog's pairs and keeps them from passing for the host's own.
func pairs(args []any) []any {
	args = attrs(args)
	out := make([]any, 0, min(len(args), 2*maxLogValues))
	for _, a := range args {
		attr, ok := a.(slog.Attr)
		if !ok || attr.Key == "timestamp" { // the host has its own clock
			continue
		}
		if len(out) == maxLogValues {
			break
		}
		switch attr.Key = short(attr.Key); attr.Key {
		case slog.TimeKey, slog.LevelKey, slog.MessageKey, slog.SourceKey, "plugin":
			attr.Key = "plugin_" + attr.Key
		}
		out = append(out, slog.String(attr.Key, short(fmt.Sprint(attr.Value.Any()))))
	}
	return out
}

// lines logs what is written to it line by line, for debugging: a Go plugin's
// os.Stdout and os.Stderr end here.
func (o *output) lines() io.Writer { return &lines{o: o} }

type lines struct {
	o   *output
	mu  sync.Mutex
	buf []byte // at most maxLogLine
}

func (l *lines) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	n := len(b)
	for len(b) > 0 {
		line, rest, whole := bytes.Cut(b, []byte("\n"))
		l.buf = append(l.buf, line[:min(len(line), maxLogLine-len(l.buf))]...)
		b = rest
		if whole {
			l.o.say(slog.LevelDebug, string(l.buf))
			l.buf = l.buf[:0]
		}
	}
	return n, nil
}
