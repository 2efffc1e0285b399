package recorder

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"
)

// Command is a tool to run. Path comes from Lookup.
type Command struct {
	Path   string
	Args   []string // with the name it was called by first
	Env    []string
	Stdin  *os.File
	Stdout *os.File
	Stderr *os.File
	// Untraced runs the tool without looking at it: onExec is never called.
	Untraced bool
	// Tree, if not nil, collects what all processes of the step execute. Nil
	// follows the main process alone.
	Tree *Tree
}

// Status is how a tool ended.
type Status struct {
	Code   int    // its exit code, 128 + n when signal n ended it
	Signal string // the name of that signal, "" otherwise
}

// Run runs a tool. onExec is called while it is stopped at its first exec,
// before its first instruction, and again at every later exec of the main
// process. An error from it kills the tool and is returned.
//
// Standard streams, process group and terminal are the caller's own: the tool
// cannot tell that it was started so, except by asking who traces it.
func Run(c Command, onExec func(*Exec) error) (Status, error) {
	type outcome struct {
		st  Status
		err error
	}
	done := make(chan outcome, 1)
	go func() {
		// ptrace and wait belong to a thread. It ends with the goroutine, which
		// does not unlock it.
		runtime.LockOSThread()
		st, err := run(c, onExec)
		done <- outcome{st, err}
	}()
	o := <-done
	return o.st, o.err
}

func run(c Command, onExec func(*Exec) error) (_ Status, err error) {
	pid, status, release, err := startStub(c)
	if err != nil {
		return Status{}, err
	}
	defer status.Close()
	defer release.Close()
	t := &trace{pid: pid, status: status, onExec: onExec, tree: c.Tree, tasks: map[int]bool{pid: true}}
	sig, err := forwardSignals(pid)
	if err != nil {
		return Status{}, t.abandon(err)
	}
	defer sig.stop()
	t.signals = sig

	if c.Untraced {
		t.execs = 1 // nothing tells us of it
	} else if err := seize(pid, c.Tree != nil); err != nil {
		return Status{}, t.abandon(err)
	} else {
		t.seized = true
	}
	if _, err := release.Write([]byte{'G'}); err != nil {
		return Status{}, t.abandon(err)
	}
	return t.wait()
}

func seize(pid int, tree bool) error {
	// Seized rather than PTRACE_TRACEME or Go's own Ptrace: true: the tool can
	// be stopped by ^Z as ever, and a signal before exec freezes nothing.
	// TRACECLONE, because any thread of the tool may exec and then becomes its
	// main thread; EXITKILL, because a tool nobody watches must not run on.
	var options uintptr = unix.PTRACE_O_TRACEEXEC | unix.PTRACE_O_TRACECLONE | unix.PTRACE_O_EXITKILL
	if tree {
		options |= unix.PTRACE_O_TRACEFORK | unix.PTRACE_O_TRACEVFORK
	}
	if _, _, e := unix.Syscall6(unix.SYS_PTRACE, unix.PTRACE_SEIZE, uintptr(pid), 0, options, 0, 0); e != 0 {
		return explainTrace(pid, e)
	}
	return nil
}

// startStub starts ourselves as a stub and waits until it is ready.
func startStub(c Command) (pid int, status, release *os.File, err error) {
	// Not os.Pipe: its ends do not block, and the stub's reads must.
	statusR, statusW, err := pipe()
	if err != nil {
		return 0, nil, nil, err
	}
	defer statusW.Close()
	goR, goW, err := pipe()
	if err != nil {
		statusR.Close()
		return 0, nil, nil, err
	}
	defer goR.Close()
	args := append([]string{"rootlink", stubArg, c.Path}, c.Args...)
	pid, err = syscall.ForkExec("/proc/self/exe", args, &syscall.ProcAttr{
		Env: c.Env,
		Files: []uintptr{
			c.Stdin.Fd(), c.Stdout.Fd(), c.Stderr.Fd(),
			stubStatus: statusW.Fd(), stubGo: goR.Fd(),
		},
	})
	if err != nil {
		statusR.Close()
		goW.Close()
		return 0, nil, nil, fmt.Errorf("starting the tool: %w", err)
	}
	statusW.Close()
	b := make([]byte, 1)
	if n, err := statusR.Read(b); n != 1 || b[0] != 'R' {
		// The status pipe holds an errno instead of the byte, or nothing.
		statusR.Close()
		goW.Close()
		unix.Kill(pid, unix.SIGKILL)
		reap(pid)
		return 0, nil, nil, fmt.Errorf("starting the tool: the stub did not get ready: %w", errors.Join(err, ErrTrace))
	}
	return pid, statusR, goW, nil
}

func pipe() (r, w *os.File, err error) {
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
		return nil, nil, os.NewSyscallError("pipe2", err)
	}
	return os.NewFile(uintptr(p[0]), "pipe"), os.NewFile(uintptr(p[1]), "pipe"), nil
}

func reap(pid int) {
	var ws unix.WaitStatus
	for {
		if _, err := unix.Wait4(pid, &ws, unix.WALL, nil); err == nil && (ws.Exited() || ws.Signaled()) || err != nil && err != unix.EINTR {
			return
		}
	}
}
