// Package cli holds what the three programs share at their edge: exit codes,
// the "hint:" line, the --output flag and writing a file in one step.
package cli

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
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
	var e *Error
	if errors.As(err, &e) {
		return e.Code
	}
	return ExitInternal
}

// Report prints "prog: what happened" and "hint: what to do" to w and returns
// the exit code. It prints nothing for nil.
func Report(w io.Writer, prog string, err error) int {
	if err == nil {
		return ExitOK
	}
	fmt.Fprintf(w, "%s: %v\n", prog, err)
	for next := err; next != nil; {
		var e *Error
		if !errors.As(next, &e) {
			break
		}
		if e.Hint != "" {
			fmt.Fprintf(w, "hint: %s\n", e.Hint)
			break
		}
		next = e.Err
	}
	return ExitCode(err)
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
