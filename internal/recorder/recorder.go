// Package recorder runs one step's tool under its eyes: it starts the tool
// stopped at exec so that it can be measured before its first instruction,
// sees every later exec of the main process, stays out of the terminal's way,
// and hashes what went in and what came out.
package recorder

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// What callers branch on.
var (
	// ErrNotFound: no such program (exit code 127, as env has it).
	ErrNotFound = errors.New("command not found")
	// ErrNotExecutable: it is there and cannot be run (126).
	ErrNotExecutable = errors.New("cannot be executed")
	// ErrElevated: the program is setuid, setgid or has file capabilities,
	// which the kernel does not grant to a traced process.
	ErrElevated = errors.New("the program gains privileges when it starts, which it would lose here")
	// ErrTrace: the tool cannot be held stopped, so it cannot be measured.
	ErrTrace = errors.New("the tool cannot be traced")
	// ErrEscaped: the tool ended untraced, so it may have become a program that
	// nobody measured. It has run; running it again is no answer.
	ErrEscaped = errors.New("the tool got away from its trace, and may have become a program that was not measured")
	// ErrChanged: a file changed while it was hashed.
	ErrChanged = errors.New("changed while it was hashed")
	// ErrPath: a path that cannot be recorded.
	ErrPath = errors.New("cannot be recorded")
)

// TraceError says why tracing failed.
type TraceError struct {
	Err    error
	Reason string
	hint   string
}

func (e *TraceError) Error() string {
	s := ErrTrace.Error()
	if e.Reason != "" {
		s += ": " + e.Reason
	}
	return s + ": " + e.Err.Error()
}

func (e *TraceError) Unwrap() []error { return []error{ErrTrace, e.Err} }

// Hint returns what a person can do about err, or "".
func Hint(err error) string {
	var te *TraceError
	switch {
	case errors.As(err, &te):
		return te.hint
	case errors.Is(err, ErrElevated):
		return "record a step that does not need it, or run the privileged part outside of the step"
	case errors.Is(err, ErrNotFound):
		return "check the name, or give a path with a slash in it"
	case errors.Is(err, syscall.ENOEXEC):
		return "a script needs a first line such as #!/bin/sh"
	case errors.Is(err, ErrNotExecutable) && errors.Is(err, syscall.EACCES):
		return "is it meant to be run? chmod +x makes it executable"
	case errors.Is(err, ErrNotExecutable):
		return "name a program or script, and check that its interpreter is there"
	case errors.Is(err, ErrPath):
		return "run from a directory that holds all the paths, or leave out what cannot be recorded with --exclude"
	case errors.Is(err, ErrChanged):
		return "something else writes there during the step; wait for it, or leave the file out with --exclude"
	}
	return ""
}

// explainTrace turns the errno of PTRACE_SEIZE into words.
func explainTrace(pid int, err error) error {
	e := &TraceError{Err: err, hint: "rootlink must be allowed to use ptrace on the tool it starts"}
	if !errors.Is(err, syscall.EPERM) {
		return e
	}
	if t := tracer(pid); t != 0 {
		e.Reason = fmt.Sprintf("process %d traces it already", t)
		e.hint = "do not run the recorder under strace -f or a debugger that follows children; a step inside of a step needs --follow main in the outer one"
		return e
	}
	switch b, _ := os.ReadFile("/proc/sys/kernel/yama/ptrace_scope"); strings.TrimSpace(string(b)) {
	case "2":
		e.Reason = "kernel.yama.ptrace_scope is 2"
		e.hint = "run as root, or set it to 1: sysctl kernel.yama.ptrace_scope=1"
	case "3":
		e.Reason = "kernel.yama.ptrace_scope is 3"
		e.hint = "this setting allows no ptrace at all until the next boot; start the machine with it at 1 or less"
	default:
		e.Reason = "the kernel or a sandbox forbids it"
		e.hint = "in a container, allow the ptrace system call (its seccomp profile), or give it CAP_SYS_PTRACE"
	}
	return e
}

func tracer(pid int) int {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, "TracerPid:"); ok {
			n, _ := strconv.Atoi(strings.TrimSpace(v))
			return n
		}
	}
	return 0
}

// DropGroup gives up the group that a setgid installation lends, in all
// threads and for good. The recorder does so once it has connected: the
// agent's socket was stamped with the group at connect, and nothing after that
// needs it. It reports whether there was one.
//
// The kernel made the process undumpable when it started it setgid: other
// processes of the user can neither trace it nor read its memory, where the
// step's key will be. Said again here, because fs.suid_dumpable can be 1.
func DropGroup() (bool, error) {
	rgid := syscall.Getgid()
	if syscall.Getegid() == rgid {
		return false, nil
	}
	if err := syscall.Setresgid(rgid, rgid, rgid); err != nil {
		return true, fmt.Errorf("giving up the recorder group: %w", err)
	}
	if syscall.Getegid() != rgid {
		return true, errors.New("giving up the recorder group: it is still there")
	}
	return true, unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0)
}
