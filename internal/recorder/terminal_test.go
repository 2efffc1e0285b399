package recorder

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// terminal is an interactive shell on a pseudo terminal, in which rec runs a
// command under the recorder.
type terminal struct {
	t    *testing.T
	ptmx *os.File
	sh   *exec.Cmd

	mu   sync.Mutex
	cond sync.Cond
	out  bytes.Buffer // all it has shown
	seen int          // how much of that expect has consumed
	eof  bool
}

func newTerminal(t *testing.T) *terminal {
	t.Helper()
	bash, err := exec.LookPath("bash")
	if err != nil {
		t.Fatal(err)
	}
	ptmx, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatalf("no pseudo terminal: %v", err)
	}
	if err := unix.IoctlSetPointerInt(int(ptmx.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(int(ptmx.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	tty, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer tty.Close()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	c := exec.Command(bash, "--norc", "--noprofile", "-i")
	c.Env = append(os.Environ(), "PS1=", "PS2=", "HISTFILE=/dev/null", "TERM=dumb", "SELF="+self)
	c.Dir = t.TempDir()
	c.Stdin, c.Stdout, c.Stderr = tty, tty, tty
	c.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	// Tests that run in the background (nohup, a script's &) were started with
	// some of these ignored, and a shell hands on what it was given. What is
	// caught is not ignored in the shell. signal.Ignored cannot be asked: it
	// forgets once a test has caught the signal.
	caught := make(chan os.Signal, 1)
	signal.Notify(caught, unix.SIGHUP, unix.SIGINT, unix.SIGQUIT)
	defer signal.Stop(caught)
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	term := &terminal{t: t, ptmx: ptmx, sh: c}
	term.cond.L = &term.mu
	go term.read()
	t.Cleanup(func() {
		c.Process.Signal(unix.SIGHUP) // the shell passes it on to its jobs and ends
		kill := time.AfterFunc(5*time.Second, func() { c.Process.Kill() })
		defer kill.Stop()
		c.Wait()
		ptmx.Close()
		if t.Failed() {
			term.mu.Lock()
			defer term.mu.Unlock()
			t.Logf("the terminal showed:\n%s", term.out.String())
		}
	})
	// What is typed must not be taken for what is answered.
	term.typ("stty -echo; alias rec='RECORDER_TEST_ROLE=recorder \"$SELF\"'; echo rea''dy\n")
	term.expect("ready")
	return term
}

func (x *terminal) read() {
	b := make([]byte, 4096)
	for {
		n, err := x.ptmx.Read(b)
		x.mu.Lock()
		x.out.Write(b[:n])
		x.eof = err != nil
		x.cond.Broadcast()
		x.mu.Unlock()
		if err != nil {
			return
		}
	}
}

func (x *terminal) typ(s string) {
	x.t.Helper()
	if _, err := x.ptmx.WriteString(s); err != nil {
		x.t.Fatal(err)
	}
}

// expect waits until the terminal has shown want, after what earlier calls saw.
func (x *terminal) expect(want string) {
	x.t.Helper()
	late := false
	timer := time.AfterFunc(20*time.Second, func() {
		x.mu.Lock()
		late = true
		x.cond.Broadcast()
		x.mu.Unlock()
	})
	defer timer.Stop()
	x.mu.Lock()
	defer x.mu.Unlock()
	for {
		if i := strings.Index(x.out.String()[x.seen:], want); i >= 0 {
			x.seen += i + len(want)
			return
		}
		if late || x.eof {
			rest := x.out.String()[x.seen:]
			x.mu.Unlock()
			defer x.mu.Lock()
			x.t.Fatalf("no %q in the terminal, only %q", want, rest)
		}
		x.cond.Wait()
	}
}

const (
	ctrlC = "\x03"
	ctrlZ = "\x1a"
	ctrlB = "\x1c" // quit
)

func TestTerminalInterrupt(t *testing.T) {
	x := newTerminal(t)
	x.typ("rec sh -c 'echo started; exec sleep 100'\n")
	x.expect("started")
	x.typ(ctrlC)
	x.typ("echo rc=$?\n")
	x.expect("rc=130")
	x.typ("rec sh -c 'echo started; exec sleep 100'\n")
	x.expect("started")
	x.typ(ctrlB)
	x.typ("echo rc=$?\n")
	x.expect("rc=131")
}

func TestTerminalInterruptIsTheToolsToHandle(t *testing.T) {
	x := newTerminal(t)
	// Twice: the tool sees each ^C exactly once and outlives the first.
	x.typ("rec sh -c 'n=0; trap \"n=\\$((n+1)); echo caught \\$n\" INT; echo started; while [ $n -lt 2 ]; do read l; done; exit 5'\n")
	x.expect("started")
	x.typ(ctrlC)
	x.expect("caught 1")
	x.typ(ctrlC)
	x.expect("caught 2")
	x.typ("\n") // ends the read; an empty line more for the shell does no harm
	x.typ("echo rc=$?\n")
	x.expect("rc=5")
}

func TestTerminalStopAndForeground(t *testing.T) {
	x := newTerminal(t)
	x.typ("rec sh -c 'echo started; while read x; do echo got $x; done; exit 4'\n")
	x.expect("started")
	for i := range 3 {
		x.typ(ctrlZ)
		x.expect("Stopped")
		x.typ("echo shell''is back\n")
		x.expect("shellis back")
		x.typ("fg\n")
		x.typ(fmt.Sprintf("hello %d\n", i))
		x.expect(fmt.Sprintf("got hello %d", i))
	}
	x.typ("\x04") // end of file
	x.typ("echo rc=$?\n")
	x.expect("rc=4")
}

func TestTerminalBackgroundRead(t *testing.T) {
	x := newTerminal(t)
	x.typ("rec sh -c 'read x; echo got $x' &\n")
	x.typ("while ! jobs | grep -q Stopped; do read -t 0.05 < /dev/zero; done; echo it''stopped\n")
	x.expect("itstopped")
	x.typ("fg\n")
	x.typ("hello\n")
	x.expect("got hello")
}

func TestTerminalBackgroundRunsOn(t *testing.T) {
	x := newTerminal(t)
	x.typ("rec sh -c 'echo started; read x < /dev/tty; echo got $x' \n")
	x.expect("started")
	x.typ(ctrlZ)
	x.expect("Stopped")
	x.typ("kill %1; kill -CONT %1; wait %1; echo rc=$?\n")
	x.expect("rc=143")
}

func TestTermIsForwarded(t *testing.T) {
	x := newTerminal(t)
	x.typ("rec sh -c 'trap \"echo got term; exit 6\" TERM; trap \"echo got usr\" USR1; echo started; while :; do sleep 0.01; done' &\n")
	x.expect("started")
	x.typ("kill -USR1 $!\n")
	x.expect("got usr")
	x.typ("kill -TERM $!; wait $!; echo rc=$?\n")
	x.expect("got term")
	x.expect("rc=6")
	// INT sent by somebody, not by the terminal: the tool has not had it.
	x.typ("rec bash -c 'trap \"echo got int; exit 7\" INT; echo started; while :; do sleep 0.01; done' &\n")
	x.expect("started")
	x.typ("kill -INT $!; wait $!; echo rc=$?\n")
	x.expect("got int")
	x.expect("rc=7")
}

func TestIgnoredSignalsStayIgnored(t *testing.T) {
	x := newTerminal(t)
	x.typ("(trap '' HUP; rec sh -c 'kill -HUP $$; echo still'' here')\n")
	x.expect("still here")
}

func TestToolDiesWithTheRecorder(t *testing.T) {
	x := newTerminal(t)
	x.typ("rec sh -c 'echo $$ >pid; echo started; exec sleep 100' &\n")
	x.expect("started")
	x.typ("tool=$(cat pid)\n")
	x.typ("kill -KILL $!; wait $!; while kill -0 $tool; do :; done 2>/dev/null; echo all''gone\n")
	x.expect("allgone")
}

func TestStandardStreamsAreTheTerminal(t *testing.T) {
	x := newTerminal(t)
	x.typ("rec sh -c 'test -t 0 && test -t 1 && test -t 2 && echo all''tty; tty'; tty\n")
	x.expect("alltty")
	x.expect("/dev/pts/")
	x.expect("/dev/pts/")
}
