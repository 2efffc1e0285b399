// Package cli holds what the three programs share at their edge: exit codes,
// the "hint:" line, the --output flag and the way to a daemon's socket.
package cli

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"
	"syscall"
	"unicode"

	"github.com/rootlink/rootlink/internal/files"
)

// Exit codes that scripts may rely on.
const (
	ExitOK       = 0
	ExitInternal = 1 // I/O, or our own fault
	ExitUsage    = 2 // a flag, argument or config file is wrong
	ExitCrypto   = 3 // a cryptographic check failed
	ExitPolicy   = 4 // a policy was not met

	// "run" passes its child's code on and uses these for its own failures,
	// as env does.
	ExitRun         = 125
	ExitNotRunnable = 126
	ExitNotFound    = 127
)

// Error gives an error an exit code and, where somebody can act on it, a hint.
type Error struct {
	Code int
	Err  error
	Hint string
}

func (e *Error) Error() string { return e.Err.Error() }
func (e *Error) Unwrap() error { return e.Err }

// Status ends a command with a code and no words: for `run`, whose child has
// said everything there is to say.
type Status int

func (s Status) Error() string { return fmt.Sprintf("exit status %d", int(s)) }

// Usage is an error of the person who typed the command.
func Usage(hint, format string, args ...any) error {
	return &Error{Code: ExitUsage, Err: fmt.Errorf(format, args...), Hint: hint}
}

// Fail gives err an exit code and a hint, which may be empty. A nil err stays nil.
func Fail(code int, err error, hint string) error {
	if err == nil {
		return nil
	}
	return &Error{Code: code, Err: err, Hint: hint}
}

// Hint adds a hint to err and keeps the exit code that it had.
func Hint(err error, hint string) error {
	if err == nil {
		return nil
	}
	return &Error{Code: ExitCode(err), Err: err, Hint: hint}
}

// ExitCode returns the code of the outermost Error in err's tree, ExitInternal
// when there is none, and ExitOK for nil.
func ExitCode(err error) int {
	if err == nil {
		return ExitOK
	}
	if s, ok := errors.AsType[Status](err); ok {
		return int(s)
	}
	if e, ok := errors.AsType[*Error](err); ok {
		return e.Code
	}
	return ExitInternal
}

// HintOf returns the outermost hint in err's tree, else the general advice for
// the few system errors whose remedy is always the same, else "".
func HintOf(err error) string {
	for next := err; next != nil; {
		e, ok := errors.AsType[*Error](next)
		if !ok {
			break
		}
		if e.Hint != "" {
			return e.Hint
		}
		next = e.Err
	}
	switch {
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		return "the disk is full: free some space and run the command again; no partial file was left"
	case errors.Is(err, syscall.EROFS):
		return "that file system is read-only: choose another place"
	case errors.Is(err, syscall.EMFILE), errors.Is(err, syscall.ENFILE):
		return "too many open files: raise the limit (ulimit -n)"
	case errors.Is(err, fs.ErrPermission):
		return "run it as the owner of that file, or as root"
	case errors.Is(err, fs.ErrNotExist):
		return "check the path for a typing error"
	}
	return ""
}

// hintMark stands between a message and its hint where only text can travel:
// gRPC statuses and SPIRE's plugin interface carry nothing else.
const hintMark = "; hint: "

// JoinHint puts a hint, if there is one, behind a message. CutHint takes it off
// again.
func JoinHint(msg, hint string) string {
	if hint == "" {
		return msg
	}
	return msg + hintMark + hint
}

// CutHint is the reverse of JoinHint.
func CutHint(text string) (msg, hint string) {
	msg, hint, _ = strings.Cut(text, hintMark)
	return msg, hint
}

// Report prints "error: what happened" and "hint: what to do" to w and returns
// the exit code. It prints nothing for nil or a Status. Further lines are
// indented so that both words are found at line starts only. Errors quote files
// and messages of strangers, so what a terminal might obey is made visible.
func Report(w io.Writer, err error) int {
	if _, quiet := errors.AsType[Status](err); err != nil && !quiet {
		fmt.Fprintf(w, "error: %s\n", indent(err.Error()))
		if h := HintOf(err); h != "" {
			fmt.Fprintf(w, "hint: %s\n", indent(h))
		}
	}
	return ExitCode(err)
}

func indent(s string) string {
	lines := strings.Split(strings.TrimRight(s, "\n"), "\n")
	for i := range lines {
		lines[i] = Clean(lines[i])
	}
	return strings.Join(lines, "\n  ")
}

// Clean makes characters that a terminal might obey, or that hide others,
// visible in one line of text.
func Clean(s string) string {
	if !strings.ContainsFunc(s, func(r rune) bool { return !unicode.IsPrint(r) }) {
		return s
	}
	var b strings.Builder
	for _, r := range s {
		if unicode.IsPrint(r) {
			b.WriteRune(r)
		} else {
			fmt.Fprintf(&b, "\\u%04x", r)
		}
	}
	return b.String()
}

// Output is the value of --output; it implements pflag.Value.
type Output string

const (
	Text Output = "text"
	JSON Output = "json"
)

func (o *Output) String() string { return string(*o) }
func (o *Output) Type() string   { return "json|text" }

// Set accepts "json" and "text".
func (o *Output) Set(s string) error {
	switch Output(s) {
	case Text, JSON:
		*o = Output(s)
		return nil
	}
	return fmt.Errorf("%q is neither json nor text", s)
}

// PrintJSON writes v as indented JSON with a final newline.
func PrintJSON(w io.Writer, v any) error {
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	enc.SetEscapeHTML(false)
	return enc.Encode(v)
}

// ReadInput reads a file that a person named, at most limit bytes of it. "-" is
// standard input.
func ReadInput(path string, limit int64) ([]byte, error) {
	if path == "-" {
		return files.ReadAll(os.Stdin, "standard input", limit)
	}
	return files.Read(path, limit)
}
