package recorder

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/rootlink/rootlink/internal/cli"
)

// trace is the wait loop of one tool. All of it runs on one thread.
type trace struct {
	pid    int
	status *os.File // what the stub says
	onExec func(*Exec) error
	execs  int
	failed error // why the tool was killed
	seized bool  // it is traced

	tree  *Tree        // nil: the main process alone is followed
	tasks map[int]bool // threads and processes that are traced, as far as known
	going bool         // the tool has ended, and what is left is let go

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
		// WNOTHREAD: only what this thread started or traces. WNOWAIT: a dead
		// process says who traced it until it is reaped.
		tid, err := waitAny(unix.WNOWAIT)
		if err != nil {
			return Status{}, t.abandon(fmt.Errorf("waiting for the tool: %w", err))
		}
		ws, err := t.take(tid)
		if err != nil {
			return Status{}, t.abandon(fmt.Errorf("waiting for the tool: %w", err))
		}
		switch {
		case ws.Stopped():
			t.stopped(tid, ws)
		case ws.Exited() || ws.Signaled():
			delete(t.tasks, tid)
			if tid == t.pid {
				return t.over(ws)
			}
		}
	}
}

// waitAny waits for any task to have something to say, and returns it; 0 when
// WNOHANG is given and none has.
func waitAny(options int) (tid int, err error) {
	for {
		var info unix.Siginfo
		err := unix.Waitid(unix.P_ALL, 0, &info, unix.WEXITED|unix.WSTOPPED|unix.WALL|unix.WNOTHREAD|options, nil)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil || info.Signo == 0 {
			return 0, err
		}
		return int(childInfo(&info).pid), nil
	}
}

// child is the part of siginfo_t that waitid fills in, behind si_signo,
// si_errno and si_code and aligned as the union there is.
type child struct {
	pid    int32
	uid    uint32
	status int32
}

func childInfo(info *unix.Siginfo) *child {
	const at = (12 + unsafe.Sizeof(uintptr(0)) - 1) &^ (unsafe.Sizeof(uintptr(0)) - 1)
	return (*child)(unsafe.Add(unsafe.Pointer(info), at))
}

// take takes what waitAny said of tid. Of the main process an end is taken
// only once it was checked.
func (t *trace) take(tid int) (unix.WaitStatus, error) {
	if tid != t.pid || t.checkTraced() {
		return reapOne(tid)
	}
	for {
		var info unix.Siginfo
		err := unix.Waitid(unix.P_PID, tid, &info, unix.WSTOPPED|unix.WNOHANG|unix.WALL|unix.WNOTHREAD, nil)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.ECHILD) || err == nil && info.Signo == 0:
			return noStatus, nil
		}
		return unix.WaitStatus(childInfo(&info).status<<8 | 0x7f), err // as wait4 has it
	}
}

// reapOne takes what waitAny said of tid. Nothing: it was killed, or a thread
// that execs has taken its place, and more is to come.
func reapOne(tid int) (ws unix.WaitStatus, err error) {
	for {
		n, err := unix.Wait4(tid, &ws, unix.WALL|unix.WNOTHREAD|unix.WNOHANG, nil)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.ECHILD):
			return noStatus, nil
		case err != nil:
			return noStatus, err
		case n == 0:
			return noStatus, nil
		}
		return ws, nil
	}
}

const noStatus = unix.WaitStatus(0xffff) // neither stopped nor ended: continued

// checkTraced reports whether the tool has ended, and fails the step when it
// was not traced to its end: a thread that it made with CLONE_UNTRACED can exec
// unseen, and the process is then another program.
func (t *trace) checkTraced() (ended bool) {
	var dead unix.Siginfo
	if err := unix.Waitid(unix.P_PID, t.pid, &dead, unix.WEXITED|unix.WNOHANG|unix.WNOWAIT|unix.WALL, nil); err != nil || dead.Signo == 0 {
		return false
	}
	if !t.seized || t.execs == 0 || t.failed != nil {
		return true
	}
	if by := tracer(t.pid); by != unix.Gettid() {
		t.failed = fmt.Errorf("%w (it ended traced by process %d)", ErrEscaped, by)
	}
	return true
}

// over is called when the main process has ended and was reaped.
func (t *trace) over(ws unix.WaitStatus) (Status, error) {
	if t.tree != nil && t.failed == nil && t.seized {
		t.letGo()
	}
	if ws.Signaled() {
		return t.ended(Status{Code: 128 + int(ws.Signal()), Signal: unix.SignalName(ws.Signal())})
	}
	return t.ended(Status{Code: ws.ExitStatus()})
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
	t.tasks[tid] = true
	sig := ws.StopSignal()
	resume := unix.PtraceCont
	if t.going {
		// With the signal that it was about to get, or none.
		resume = func(tid, sig int) error {
			delete(t.tasks, tid)
			_, _, e := unix.Syscall6(unix.SYS_PTRACE, unix.PTRACE_DETACH, uintptr(tid), 0, uintptr(sig), 0, 0)
			if e != 0 {
				return e
			}
			return nil
		}
	}
	switch event := uint32(ws) >> 16; event {
	case unix.PTRACE_EVENT_EXEC:
		t.executed(tid)
		resume(tid, 0)
	case unix.PTRACE_EVENT_CLONE, unix.PTRACE_EVENT_FORK, unix.PTRACE_EVENT_VFORK:
		if n, err := unix.PtraceGetEventMsg(tid); err == nil && t.tree != nil && n > 0 {
			t.tasks[int(n)] = true
		}
		resume(tid, 0)
	case unix.PTRACE_EVENT_STOP:
		switch {
		case t.going:
			resume(tid, 0) // one that is stopped as a job stays so
		case sig == unix.SIGSTOP || sig == unix.SIGTSTP || sig == unix.SIGTTIN || sig == unix.SIGTTOU:
			// Stopped as a job: stays so until SIGCONT, and we are told then.
			unix.Syscall6(unix.SYS_PTRACE, unix.PTRACE_LISTEN, uintptr(tid), 0, 0, 0, 0)
			if tid == t.pid {
				t.signals.toolStopped(sig)
			}
		case t.tree == nil && tid != t.pid && !isThread(t.pid, tid):
			// A process that clone made without the usual exit signal: like
			// any other child of the tool it is its own affair.
			delete(t.tasks, tid)
			unix.PtraceDetach(tid)
		default:
			if tid == t.pid {
				t.signals.stopped.Store(false)
			}
			unix.PtraceCont(tid, 0)
		}
	case 0:
		resume(tid, int(sig)) // a signal on its way to the process
	default:
		resume(tid, 0)
	}
}

// executed looks at the process tid, stopped before its first instruction.
func (t *trace) executed(tid int) {
	// A thread that is not its process's first becomes it by executing.
	if old, err := unix.PtraceGetEventMsg(tid); err == nil && int(old) != tid {
		delete(t.tasks, int(old))
	}
	main := tid == t.pid
	if main {
		t.execs++
		if err := t.look(); err != nil {
			t.kill(err)
			return
		}
	}
	if t.tree != nil {
		t.tree.saw(tid, main)
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

const (
	// patience is how long processes that the tool has left behind may take to
	// end, as many are about to.
	patience = 2 * time.Second
	glance   = 2 * time.Millisecond // between two looks at them
)

// letGo waits a little for what the tool left behind, and then stops following
// it: a daemon lives on as it would without us. Whatever it executes after
// that nobody sees, so it is a gap.
func (t *trace) letGo() {
	deadline := time.Now().Add(patience)
	for !t.going || len(t.tasks) > 0 {
		tid, err := waitAny(unix.WNOWAIT | unix.WNOHANG)
		if err != nil {
			return // ECHILD: none is left
		}
		if tid == 0 {
			if !t.going && time.Now().After(deadline) {
				if !t.interruptAll() {
					return
				}
			}
			time.Sleep(glance)
			continue
		}
		ws, err := reapOne(tid)
		switch {
		case err != nil:
			return
		case ws.Stopped():
			t.stopped(tid, ws)
		case ws.Exited() || ws.Signaled():
			delete(t.tasks, tid)
		}
	}
}

// interruptAll stops all that is left, to be detached, and reports whether
// there is anything. Detaching needs a stopped process.
func (t *trace) interruptAll() bool {
	t.going = true
	var names []string
	processes := 0
	for tid := range t.tasks {
		if _, _, e := unix.Syscall6(unix.SYS_PTRACE, unix.PTRACE_INTERRUPT, uintptr(tid), 0, 0, 0, 0); e != 0 {
			delete(t.tasks, tid)
			continue
		}
		if path, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", tid)); err == nil && isProcess(tid) {
			processes++
			names = append(names, cli.Clean(path))
		}
	}
	if len(t.tasks) == 0 {
		return false
	}
	slices.Sort(names)
	names = slices.Compact(names)
	if len(names) > 3 {
		names = append(names[:3], "…")
	}
	t.tree.gap("%d processes outlived the step, and what they ran after it was not seen: %s", max(1, processes), strings.Join(names, ", "))
	return true
}

// isProcess reports whether tid is the first thread of its process.
func isProcess(tid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", tid))
	return err == nil && strings.Contains(string(b), fmt.Sprintf("\nTgid:\t%d\n", tid))
}
