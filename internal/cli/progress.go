package cli

import (
	"fmt"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const progressEvery = 100 * time.Millisecond // faster than anybody reads

// IsTerminal reports whether f is a terminal.
func IsTerminal(f *os.File) bool {
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}

// Progress is one line that is rewritten in place, on a terminal only: in a
// log it would be noise. The zero value and nil print nothing.
type Progress struct {
	mu    sync.Mutex // guards all below
	out   *os.File
	last  time.Time
	shown bool
}

// NewProgress writes to f, usually stderr, if it is a terminal.
func NewProgress(f *os.File) *Progress {
	if !IsTerminal(f) {
		return nil
	}
	return &Progress{out: f}
}

// Printf shows a new state, at most ten times a second.
func (p *Progress) Printf(format string, args ...any) {
	if p == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.out == nil || time.Since(p.last) < progressEvery {
		return
	}
	p.last, p.shown = time.Now(), true
	s := fmt.Sprintf(format, args...)
	if ws, err := unix.IoctlGetWinsize(int(p.out.Fd()), unix.TIOCGWINSZ); err == nil && ws.Col > 1 && len(s) >= int(ws.Col) {
		s = s[:ws.Col-1] // a wrapped line could not be rewritten in place
	}
	fmt.Fprintf(p.out, "\r\x1b[K%s", s)
}

// Done clears the line.
func (p *Progress) Done() {
	if p == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.shown {
		fmt.Fprint(p.out, "\r\x1b[K")
		p.shown = false
	}
}
