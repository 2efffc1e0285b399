package recorder

import (
	"encoding/binary"
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
	t := &trace{pid: pid, status: status, onExec: onExec}
	sig, err := forwardSignals(pid)
	if err != nil {
		return Status{}, t.abandon(err)
	}
	defer sig.stop()
	t.signals = sig

	if c.Untraced {
		t.execs = 1 // nothing tells us of it
	} else if err := seize(pid); err != nil {
		return Status{}, t.abandon(err)
	} else {
		t.seized = true
	}
	if _, err := release.Write([]byte{'G'}); err != nil {
		return Status{}, t.abandon(err)
	}
	return t.wait()
}

func seize(pid int) error {
	// Seized rather than PTRACE_TRACEME or Go's own Ptrace: true: the tool can
	// be stopped by ^Z as ever, and a signal before exec freezes nothing.
	// TRACECLONE, because any thread of the tool may exec and then becomes its
	// main thread; EXITKILL, because a tool nobody watches must not run on.
	const options = unix.PTRACE_O_TRACEEXEC | unix.PTRACE_O_TRACECLONE | unix.PTRACE_O_EXITKILL
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

// trace is the wait loop of one tool. All of it runs on one thread.
type trace struct {
	pid    int
	status *os.File // what the stub says
	onExec func(*Exec) error
	execs  int
	failed error // why the tool was killed
	seized bool  // it is traced

	signals *signals
}

// abandon kills the tool, reaps it and returns err.
func (t *trace) abandon(err error) error {
	unix.Kill(t.pid, unix.SIGKILL)
	reap(t.pid)
	return err
}

func (t *trace) kill(err error) {
	if t.failed == nil {
		t.failed = err
	}
	unix.Kill(t.pid, unix.SIGKILL)
}

func (t *trace) wait() (Status, error) {
	for {
		if err := t.checkTraced(); err != nil && t.failed == nil {
			t.failed = err
		}
		var ws unix.WaitStatus
		// WNOTHREAD: only what this thread started or traces.
		tid, err := unix.Wait4(-1, &ws, unix.WALL|unix.WNOTHREAD, nil)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return Status{}, t.abandon(fmt.Errorf("waiting for the tool: %w", err))
		}
		switch {
		case ws.Stopped():
			t.stopped(tid, ws)
		case tid == t.pid && ws.Exited():
			return t.ended(Status{Code: ws.ExitStatus()})
		case tid == t.pid && ws.Signaled():
			return t.ended(Status{Code: 128 + int(ws.Signal()), Signal: unix.SignalName(ws.Signal())})
		}
	}
}

// checkTraced waits until there is something to wait for, and fails when the
// tool has ended and was not traced to its end: a thread that it made with
// CLONE_UNTRACED can exec unseen, and the process is then another program. A
// dead process says who traced it until it is reaped.
func (t *trace) checkTraced() error {
	var info unix.Siginfo
	for {
		err := unix.Waitid(unix.P_ALL, 0, &info, unix.WEXITED|unix.WSTOPPED|unix.WNOWAIT|unix.WALL|unix.WNOTHREAD, nil)
		if !errors.Is(err, unix.EINTR) {
			break // another error is Wait4's to report
		}
	}
	if !t.seized || t.execs == 0 {
		return nil
	}
	var dead unix.Siginfo
	if err := unix.Waitid(unix.P_PID, t.pid, &dead, unix.WEXITED|unix.WNOHANG|unix.WNOWAIT|unix.WALL, nil); err != nil || dead.Signo == 0 {
		return nil
	}
	if by := tracer(t.pid); by != unix.Gettid() {
		return fmt.Errorf("%w (it ended traced by process %d)", ErrEscaped, by)
	}
	return nil
}

func (t *trace) ended(st Status) (Status, error) {
	if t.failed != nil {
		return Status{}, t.failed
	}
	// When exec failed the stub said why; when it did not, exec closed the pipe.
	var b [4]byte
	if n, _ := t.status.Read(b[:]); n == len(b) {
		errno := syscall.Errno(binary.NativeEndian.Uint32(b[:]))
		if errno == syscall.ENOENT {
			// The file was there: it is its interpreter or loader that is not.
			return Status{}, fmt.Errorf("%w: its interpreter: %w", ErrNotExecutable, errno)
		}
		return Status{}, fmt.Errorf("%w: %w", ErrNotExecutable, errno)
	}
	if t.execs > 0 || st.Signal != "" {
		return st, nil // or a signal meant for the tool came before it was the tool
	}
	return Status{}, fmt.Errorf("the stub ended with code %d before it became the tool: %w", st.Code, ErrTrace)
}

// stopped lets a thread go on, once it was looked at where that matters.
// Errors of the requests mean that the thread was killed meanwhile: the next
// wait says so.
func (t *trace) stopped(tid int, ws unix.WaitStatus) {
	sig := ws.StopSignal()
	switch event := uint32(ws) >> 16; event {
	case unix.PTRACE_EVENT_EXEC:
		t.execs++
		if err := t.look(); err != nil {
			t.kill(err)
		}
		unix.PtraceCont(tid, 0)
	case unix.PTRACE_EVENT_STOP:
		switch {
		case sig == unix.SIGSTOP || sig == unix.SIGTSTP || sig == unix.SIGTTIN || sig == unix.SIGTTOU:
			// Stopped as a job: stays so until SIGCONT, and we are told then.
			unix.Syscall6(unix.SYS_PTRACE, unix.PTRACE_LISTEN, uintptr(tid), 0, 0, 0, 0)
			if tid == t.pid {
				t.signals.toolStopped(sig)
			}
		case tid != t.pid && !isThread(t.pid, tid):
			// A process that clone made without the usual exit signal: like
			// any other child of the tool it is its own affair.
			unix.PtraceDetach(tid)
		default:
			if tid == t.pid {
				t.signals.stopped.Store(false)
			}
			unix.PtraceCont(tid, 0)
		}
	case 0:
		unix.PtraceCont(tid, int(sig)) // a signal on its way to the tool
	default:
		unix.PtraceCont(tid, 0) // PTRACE_EVENT_CLONE
	}
}

func (t *trace) look() error {
	if t.failed != nil {
		return t.failed
	}
	e, err := lookAtExec(t.pid, t.execs)
	if err != nil {
		return err
	}
	return t.onExec(e)
}

func isThread(pid, tid int) bool {
	_, err := os.Stat(fmt.Sprintf("/proc/%d/task/%d", pid, tid))
	return err == nil
}
