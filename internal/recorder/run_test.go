package recorder

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/rootlink/rootlink/internal/needs"
)

// As main does: see IsStub.
func init() {
	if IsStub() {
		runtime.LockOSThread()
	}
}

func TestMain(m *testing.M) {
	if IsStub() {
		RunStub()
	}
	if role := os.Getenv("RECORDER_TEST_ROLE"); role != "" {
		os.Exit(runRole(role))
	}
	os.Exit(m.Run())
}

// runRole is this binary as another program.
func runRole(role string) int {
	switch role {
	case "recorder": // runs os.Args[1:] and exits as it did
		st, err := record(os.Stdout, os.Args[1:], func(*Exec) error { return nil })
		if err != nil {
			fmt.Fprintln(os.Stderr, err, "hint:", Hint(err))
			return 125
		}
		return st.Code
	case "tree": // follows the tree of os.Args[1:]
		r := &state{Step: &Step{Stderr: os.Stderr}}
		r.watch(os.Environ())
		st, err := Run(Command{Path: os.Args[1], Args: os.Args[1:], Env: os.Environ(), Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr, Tree: r.tree},
			func(*Exec) error { return nil })
		_, gaps := r.tree.Result()
		for _, g := range gaps {
			fmt.Println("gap:", g)
		}
		r.sayPowerless()
		fmt.Println("code", st.Code, err)
		return 0
	case "group": // as installed setgid: gives up the group, then runs os.Args[1:]
		fmt.Println("before:", syscall.Getegid())
		had, err := DropGroup()
		d, _ := unix.PrctlRetInt(unix.PR_GET_DUMPABLE, 0, 0, 0, 0)
		fmt.Println("after:", had, err, syscall.Getegid(), "dumpable:", d)
		os.Setenv("RECORDER_TEST_ROLE", "status")
		st, err := record(os.Stdout, os.Args[1:], func(*Exec) error { return nil })
		fmt.Println("end:", st.Code, err)
		return 0
	case "thread-exec": // execs from a thread that is not the main one
		os.Unsetenv("RECORDER_TEST_ROLE")
		done := make(chan error)
		for range 4 { // as many locked threads: at most one of them is the main one
			go func() {
				runtime.LockOSThread()
				if unix.Gettid() != unix.Getpid() {
					done <- syscall.Exec("/bin/echo", []string{"echo", "from a thread"}, os.Environ())
				}
				select {}
			}()
		}
		<-done
	case "status": // what the tool sees of itself
		b, _ := os.ReadFile("/proc/self/status")
		os.Stdout.Write(b)
		d, _ := unix.PrctlRetInt(unix.PR_GET_DUMPABLE, 0, 0, 0, 0)
		ents, _ := os.ReadDir("/proc/self/fd")
		fmt.Println("Dumpable:", d, "Fds:", len(ents))
	}
	return 1
}

func record(stdout *os.File, args []string, onExec func(*Exec) error) (Status, error) {
	return recordEnv(stdout, os.Environ(), args, onExec)
}

func recordEnv(stdout *os.File, env, args []string, onExec func(*Exec) error) (Status, error) {
	path, err := Lookup(args[0], env)
	if err != nil {
		return Status{}, err
	}
	return Run(Command{Path: path, Args: args, Env: env, Stdin: os.Stdin, Stdout: stdout, Stderr: os.Stderr, Tree: NewTree()}, onExec)
}

// output runs a tool and returns what it wrote.
func output(t *testing.T, env, args []string, onExec func(*Exec) error) (string, Status, error) {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "out"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	st, err := recordEnv(f, append(os.Environ(), env...), args, onExec)
	b, rerr := os.ReadFile(f.Name())
	if rerr != nil {
		t.Fatal(rerr)
	}
	return string(b), st, err
}

func TestToolStoppedBeforeItsFirstInstruction(t *testing.T) {
	var sum [32]byte
	out, st, err := output(t, nil, []string{"echo", "hello"}, func(e *Exec) error {
		s, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", e.PID))
		if err != nil {
			return err
		}
		f := strings.Fields(string(s[bytes.LastIndexByte(s, ')')+1:]))
		if f[0] != "t" || f[1] != fmt.Sprint(os.Getpid()) {
			t.Errorf("state %s, parent %s", f[0], f[1])
		}
		if e.N != 1 || e.Script != nil || filepath.Base(e.Path) != "echo" {
			t.Errorf("%+v", e)
		}
		sum, err = e.HashExecutable()
		return err
	})
	if err != nil || st != (Status{}) || out != "hello\n" {
		t.Fatalf("%q, %+v, %v", out, st, err)
	}
	b, err := os.ReadFile("/bin/echo")
	if err != nil {
		t.Fatal(err)
	}
	if want := sha256.Sum256(b); sum != want {
		t.Error("what was stopped is not the tool")
	}
}

func TestRefusedToolNeverRuns(t *testing.T) {
	no := errors.New("no")
	out, _, err := output(t, nil, []string{"echo", "hello"}, func(*Exec) error { return no })
	if !errors.Is(err, no) || out != "" {
		t.Errorf("%q, %v", out, err)
	}
}

func TestExitCodes(t *testing.T) {
	for _, tc := range []struct {
		script string
		want   Status
	}{
		{"exit 0", Status{}},
		{"exit 7", Status{Code: 7}},
		{"kill -TERM $$", Status{Code: 143, Signal: "SIGTERM"}},
		{"kill -KILL $$", Status{Code: 137, Signal: "SIGKILL"}},
	} {
		_, st, err := output(t, nil, []string{"/bin/sh", "-c", tc.script}, func(*Exec) error { return nil })
		if err != nil || st != tc.want {
			t.Errorf("%s: %+v, %v", tc.script, st, err)
		}
	}
}

func TestEveryExecOfTheMainProcessIsSeen(t *testing.T) {
	var seen []string
	out, _, err := output(t, nil, []string{"/usr/bin/env", "sh", "-c", "(/bin/true); exec echo done"}, func(e *Exec) error {
		seen = append(seen, fmt.Sprint(e.N, " ", filepath.Base(e.Path)))
		return nil
	})
	if err != nil || out != "done\n" {
		t.Fatalf("%q, %v", out, err)
	}
	if len(seen) != 3 || seen[0] != "1 env" || seen[2] != "3 echo" {
		t.Errorf("saw %q", seen)
	}
}

func TestRefusesLaterExec(t *testing.T) {
	no := errors.New("no")
	out, _, err := output(t, nil, []string{"/usr/bin/env", "echo", "forbidden"}, func(e *Exec) error {
		if e.N > 1 {
			return no
		}
		return nil
	})
	if !errors.Is(err, no) || out != "" {
		t.Errorf("%q, %v", out, err)
	}
}

func TestExecByAnotherThreadIsSeen(t *testing.T) {
	var seen []string
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	out, st, err := output(t, []string{"RECORDER_TEST_ROLE=thread-exec"}, []string{self}, func(e *Exec) error {
		seen = append(seen, filepath.Base(e.Path))
		return nil
	})
	if err != nil || st.Code != 0 || out != "from a thread\n" {
		t.Fatalf("%q, %+v, %v", out, st, err)
	}
	if len(seen) != 2 || seen[1] != "echo" {
		t.Errorf("saw %q", seen)
	}
}

func TestScript(t *testing.T) {
	dir := t.TempDir()
	name := filepath.Join(dir, "step.sh")
	body := "#!/bin/sh\necho $0\n"
	if err := os.WriteFile(name, []byte(body), 0o755); err != nil {
		t.Fatal(err)
	}
	var got *Exec
	out, _, err := output(t, nil, []string{name}, func(e *Exec) error { got = e; return nil })
	if err != nil || out != name+"\n" {
		t.Fatalf("%q, %v", out, err)
	}
	if got.Script == nil || got.Script.Path != name || got.Script.SHA256 != sha256.Sum256([]byte(body)) {
		t.Errorf("script %+v", got.Script)
	}
	if strings.HasSuffix(got.Path, ".sh") {
		t.Errorf("the tool is %s, not the interpreter", got.Path)
	}
	// One that a later exec starts, by a relative path.
	t.Chdir(dir)
	var last *Exec
	if _, _, err := output(t, nil, []string{"env", "./step.sh"}, func(e *Exec) error { last = e; return nil }); err != nil {
		t.Fatal(err)
	}
	if last.N != 2 || last.Script == nil || last.Script.Path != "./step.sh" {
		t.Errorf("%+v %+v", last, last.Script)
	}
}

func TestToolInheritsNothingOfOurs(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	out, _, _ := output(t, []string{"RECORDER_TEST_ROLE=status"}, []string{self}, func(*Exec) error { return nil })
	direct := exec.Command(self)
	direct.Env = append(os.Environ(), "RECORDER_TEST_ROLE=status")
	direct.Stdin = os.Stdin
	want, _ := direct.Output()
	pick := func(s string) (lines []string) {
		for line := range strings.Lines(s) {
			for _, k := range []string{"SigBlk", "SigIgn", "SigCgt", "Uid", "Gid", "Groups", "CapEff", "NoNewPrivs", "Dumpable"} {
				if strings.HasPrefix(line, k+":") {
					lines = append(lines, line)
				}
			}
		}
		return lines
	}
	if a, b := strings.Join(pick(out), ""), strings.Join(pick(string(want)), ""); a != b || a == "" {
		t.Errorf("recorded:\n%s\ndirect:\n%s", a, b)
	}
}

// A setgid recorder run by an ordinary user: the tool gets nothing of the group,
// can be traced, and the recorder itself cannot.
func TestSetgidRecorder(t *testing.T) {
	needs.Root(t)
	const group, user = 54321, 65534
	dir, err := os.MkdirTemp("", "sg")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	plain, setgid := filepath.Join(dir, "plain"), filepath.Join(dir, "setgid")
	for _, p := range []string{plain, setgid} {
		if err := os.WriteFile(p, self, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chown(setgid, 0, group); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(setgid, 0o755|os.ModeSetgid); err != nil {
		t.Fatal(err)
	}
	c := exec.Command(setgid, plain)
	c.Dir = dir
	c.Env = append(os.Environ(), "RECORDER_TEST_ROLE=group")
	c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: user, Gid: user}}
	b, err := c.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, b)
	}
	out := string(b)
	for _, want := range []string{
		"before: 54321\n", "after: true <nil> 65534 dumpable: 0\n", // undumpable for good
		"\nGid:\t65534\t65534\t65534\t65534\n", "Dumpable: 1", "end: 1 <nil>",
	} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in:\n%s", want, out)
		}
	}
}

// A directory of root's in PATH, such as sudo leaves there, says nothing of a
// program that is nowhere.
func TestLookupPassesOverClosedDirectories(t *testing.T) {
	closed := filepath.Join(t.TempDir(), "closed")
	if err := os.Mkdir(closed, 0); err != nil {
		t.Fatal(err)
	}
	if os.Geteuid() == 0 {
		// Root may search everywhere: this thread looks as nobody.
		runtime.LockOSThread()
		if err := unix.Setfsuid(65534); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := unix.Setfsuid(0); err != nil {
				t.Error(err)
			}
			runtime.UnlockOSThread()
		})
	}
	if _, err := Lookup("none", []string{"PATH=" + closed}); !errors.Is(err, ErrNotFound) {
		t.Error(err)
	}
	if got, err := Lookup("true", []string{"PATH=" + closed + ":/bin"}); err != nil || got != "/bin/true" {
		t.Errorf("%s, %v", got, err)
	}
}

func TestLookup(t *testing.T) {
	dir := t.TempDir()
	write := func(name string, mode os.FileMode) string {
		t.Helper()
		p := filepath.Join(dir, name)
		if err := os.WriteFile(p, []byte("#!/bin/sh\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(p, mode); err != nil {
			t.Fatal(err)
		}
		return p
	}
	write("plain", 0o644)
	write("run", 0o755)
	suid := write("suid", 0o755|os.ModeSetuid)
	sgid := write("sgid", 0o755|os.ModeSetgid)
	env := []string{"PATH=/nonexistent:" + dir}
	for _, tc := range []struct {
		name string
		want error
	}{
		{"run", nil},
		{"plain", ErrNotExecutable},
		{"none", ErrNotFound},
		{"", ErrNotFound},
		{dir, ErrNotExecutable},
		{dir + "/none", ErrNotFound},
		{suid, ErrElevated},
		{sgid, ErrElevated},
		{"suid", ErrElevated},
	} {
		if _, err := Lookup(tc.name, env); !errors.Is(err, tc.want) {
			t.Errorf("%q: %v, want %v", tc.name, err, tc.want)
		}
	}
	t.Chdir(dir)
	if p, err := Lookup("run", []string{"PATH=/nonexistent:"}); err != nil || p != "./run" {
		t.Errorf("empty PATH element: %q, %v", p, err)
	}
}

func TestRefusesFileCapabilities(t *testing.T) {
	p := filepath.Join(t.TempDir(), "capable")
	if err := os.WriteFile(p, []byte("#!/bin/sh\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	// vfs_cap_data, revision 2, CAP_NET_RAW permitted and effective.
	v := []byte{1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}
	if err := unix.Setxattr(p, "security.capability", v, 0); err != nil {
		needs.Missing(t, "setting file capabilities: %v", err)
	}
	if _, err := Lookup(p, nil); !errors.Is(err, ErrElevated) || Hint(err) == "" {
		t.Errorf("%v", err)
	}
}

func TestNotExecutable(t *testing.T) {
	dir := t.TempDir()
	for name, body := range map[string]string{"text": "hello\n", "nointerp": "#!/nonexistent/sh\n"} {
		p := filepath.Join(dir, name)
		if err := os.WriteFile(p, []byte(body), 0o755); err != nil {
			t.Fatal(err)
		}
		_, _, err := output(t, nil, []string{p}, func(*Exec) error { t.Error("it ran"); return nil })
		if !errors.Is(err, ErrNotExecutable) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestUnderStrace(t *testing.T) {
	strace, err := exec.LookPath("strace")
	if err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	c := exec.Command(strace, "-f", "-o", "/dev/null", self, "true")
	c.Env = append(os.Environ(), "RECORDER_TEST_ROLE=recorder")
	out, err := c.CombinedOutput()
	if err == nil || !strings.Contains(string(out), "strace -f") || !strings.Contains(string(out), "traces it already") {
		t.Errorf("%v: %s", err, out)
	}
}

func TestManyAtOnceUnderSignals(t *testing.T) {
	stop := make(chan struct{})
	var storm sync.WaitGroup
	storm.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				unix.Kill(os.Getpid(), unix.SIGWINCH)
				time.Sleep(20 * time.Microsecond) // a storm, not a lock-up of two cores
			}
		}
	})
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 25 {
				n := 0
				st, err := record(os.Stdout, []string{"true"}, func(*Exec) error { n++; return nil })
				if err != nil || st.Code != 0 || n != 1 {
					t.Errorf("%+v, %v, %d execs", st, err, n)
				}
			}
		})
	}
	wg.Wait()
	close(stop)
	storm.Wait()
}

func BenchmarkRunTrue(b *testing.B) {
	for b.Loop() {
		if _, err := record(os.Stdout, []string{"true"}, func(*Exec) error { return nil }); err != nil {
			b.Fatal(err)
		}
	}
}
