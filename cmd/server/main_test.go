package main

import (
	"bufio"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){program: main})
}

// startLimit bounds the wait for a server that hangs; it is not waited out.
const startLimit = 30 * time.Second

func TestScripts(t *testing.T) {
	scripts, err := filepath.Glob("testdata/*.txtar")
	if err != nil || len(scripts) == 0 {
		t.Fatal("no scripts found", err)
	}
	testscript.Run(t, testscript.Params{
		Dir: "testdata",
		Setup: func(e *testscript.Env) error {
			// A socket path must fit into sockaddr_un, which the work directory
			// of a script may not leave room for.
			dir, err := os.MkdirTemp("", "rls")
			if err != nil {
				return err
			}
			e.Defer(func() { os.RemoveAll(dir) })
			e.Setenv("D", dir)
			// Under -race every process would wait a second before it ends.
			e.Setenv("GORACE", "atexit_sleep_ms=10")
			e.Setenv("ROOTLINK_ADMIN_SOCKET", filepath.Join(dir, "admin.sock"))
			e.Values[serversKey{}] = map[string]*exec.Cmd{}
			return nil
		},
		Condition: func(cond string) (bool, error) {
			if cond == "root" {
				return os.Geteuid() == 0, nil
			}
			return false, errors.New("unknown condition")
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"start-server":   cmdStart,
			"stop-server":    cmdStop,
			"exits":          cmdExits,
			"foreign-socket": cmdForeignSocket,
			"stale-socket":   cmdStaleSocket,
			"seed":           cmdSeed,
		},
	})
}

type serversKey struct{}

func servers(ts *testscript.TestScript) map[string]*exec.Cmd {
	return ts.Value(serversKey{}).(map[string]*exec.Cmd)
}

// cmdStart starts `rootlink-server run --data-dir $D ARGS…` and returns when
// it says that it is ready: start-server NAME ARGS…
func cmdStart(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 1 {
		ts.Fatalf("usage: start-server NAME ARGS…")
	}
	path, err := exec.LookPath(program)
	ts.Check(err)
	c := exec.Command(path, append([]string{"run", "--data-dir", ts.Getenv("D"), "--listen", "127.0.0.1:0", "--http-listen", "127.0.0.1:0"}, args[1:]...)...)
	c.Dir = ts.Getenv("WORK")
	c.Env = append(os.Environ(), "GORACE="+ts.Getenv("GORACE"))
	stderr, err := c.StderrPipe()
	ts.Check(err)
	ts.Check(c.Start())
	ready := make(chan bool, 1)
	var log strings.Builder
	done := make(chan struct{})
	go func() {
		defer close(done)
		for r := bufio.NewReader(stderr); ; {
			line, err := r.ReadString('\n')
			log.WriteString(line)
			if strings.HasPrefix(line, program+": ready: ") {
				ready <- true
			}
			if err != nil {
				close(ready)
				return
			}
		}
	}()
	kill := time.AfterFunc(startLimit, func() { _ = c.Process.Kill() })
	ok := <-ready
	kill.Stop()
	if !ok {
		<-done
		_ = c.Wait()
		ts.Fatalf("the server did not become ready:\n%s", log.String())
	}
	servers(ts)[args[0]] = c
	ts.Defer(func() {
		if c.ProcessState == nil {
			_ = c.Process.Kill()
			_, _ = io.Copy(io.Discard, stderr)
			_ = c.Wait()
		}
		<-done
		ts.Logf("server log:\n%s", log.String())
	})
}

// cmdStop sends SIGTERM and expects exit code 0: stop-server NAME
func cmdStop(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: stop-server NAME")
	}
	c := servers(ts)[args[0]]
	if c == nil {
		ts.Fatalf("no server %s", args[0])
	}
	ts.Check(c.Process.Signal(syscall.SIGTERM))
	kill := time.AfterFunc(startLimit, func() { _ = c.Process.Kill() })
	defer kill.Stop()
	if err := c.Wait(); err != nil {
		ts.Fatalf("the server ended with %v", err)
	}
}

// cmdExits runs rootlink-server and expects an exit code: exits CODE ARGS…
// What it printed is in the files out and err.
func cmdExits(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 1 {
		ts.Fatalf("usage: exits CODE ARGS…")
	}
	want := args[0]
	err := ts.Exec(program, args[1:]...)
	got := "0"
	if x, ok := errors.AsType[*exec.ExitError](err); ok {
		got = strings.TrimPrefix(x.String(), "exit status ")
	} else if err != nil {
		ts.Fatalf("%v", err)
	}
	ts.Check(os.WriteFile(ts.MkAbs("out"), []byte(ts.ReadFile("stdout")), 0o600))
	ts.Check(os.WriteFile(ts.MkAbs("err"), []byte(ts.ReadFile("stderr")), 0o600))
	if got != want {
		ts.Fatalf("exit code %s, want %s", got, want)
	}
}

// cmdForeignSocket listens as uid 65534, which needs root. The kernel takes a
// listener's credentials from the thread that calls listen.
func cmdForeignSocket(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: foreign-socket PATH")
	}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	ts.Check(err)
	ts.Defer(func() { unix.Close(fd) })
	ts.Check(unix.Bind(fd, &unix.SockaddrUnix{Name: args[0]}))
	const keep, nobody = ^uintptr(0), uintptr(65534)
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if _, _, e := unix.RawSyscall(unix.SYS_SETRESUID, keep, nobody, keep); e != 0 {
		ts.Check(e)
	}
	err = unix.Listen(fd, 1)
	if _, _, e := unix.RawSyscall(unix.SYS_SETRESUID, keep, 0, keep); e != 0 {
		panic(e) // the thread would go on as nobody
	}
	ts.Check(err)
}

// cmdStaleSocket leaves a socket file behind as a killed server would.
func cmdStaleSocket(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: stale-socket PATH")
	}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	ts.Check(err)
	defer unix.Close(fd)
	ts.Check(unix.Bind(fd, &unix.SockaddrUnix{Name: args[0]}))
}
