package recorder

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/rootlink/rootlink/internal/files"
	"github.com/rootlink/rootlink/internal/needs"
	"github.com/rootlink/rootlink/pkg/link"
)

// follow runs a tool with its whole tree, and returns its lines
// "role base-of-path × count" beside what Run and Result return.
func follow(t *testing.T, env []string, args ...string) (lines []string, execs []link.Executable, gaps []string, out string, st Status) {
	t.Helper()
	path, err := Lookup(args[0], os.Environ())
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(filepath.Join(t.TempDir(), "out"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	tree := NewTree()
	st, err = Run(Command{Path: path, Args: args, Env: append(os.Environ(), env...), Stdin: os.Stdin, Stdout: f, Stderr: os.Stderr, Tree: tree},
		func(*Exec) error { return nil })
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(f.Name())
	if err != nil {
		t.Fatal(err)
	}
	execs, gaps = tree.Result()
	for _, e := range execs {
		lines = append(lines, fmt.Sprintf("%s %s × %d", e.Role, filepath.Base(e.Path), e.Count))
		if len(e.Digest["sha256"]) != 64 {
			t.Errorf("%+v has no digest", e)
		}
	}
	return lines, execs, gaps, string(b), st
}

func complete(t *testing.T, gaps []string) {
	t.Helper()
	if len(gaps) != 0 {
		t.Errorf("gaps: %q", gaps)
	}
}

func sh(t *testing.T) string {
	t.Helper()
	p, err := filepath.EvalSymlinks("/bin/sh")
	if err != nil {
		t.Fatal(err)
	}
	return filepath.Base(p)
}

func TestTreeListsWhatEveryProcessExecutes(t *testing.T) {
	dir := t.TempDir()
	// A script whose interpreter is a script.
	inner, outer := filepath.Join(dir, "inner"), filepath.Join(dir, "outer")
	for name, body := range map[string]string{inner: "#!/bin/sh\n. \"$1\"\n", outer: "#!" + inner + "\n/bin/true; (env true)\n"} {
		if err := os.WriteFile(name, []byte(body), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	lines, execs, gaps, _, _ := follow(t, nil, "/bin/sh", "-c", outer+"; /bin/true & wait; exec env true")
	complete(t, gaps)
	for _, want := range []string{
		"tool " + sh(t) + " × 1", "interpreter " + sh(t) + " × 1", "script inner × 1", "script outer × 1",
		"child env × 1", "tool env × 1", "child true × 3", "tool true × 1",
	} {
		if !slices.Contains(lines, want) {
			t.Errorf("no %q in %q", want, lines)
		}
	}
	if len(lines) != 8 {
		t.Errorf("%q", lines)
	}
	for _, e := range execs {
		if sum, err := files.SHA256(e.Path); err != nil || e.Digest["sha256"] != fmt.Sprintf("%x", sum) {
			t.Errorf("%+v: %x, %v", e, sum, err)
		}
	}
}

func TestTreeSeesAThreadThatExecutes(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	lines, _, gaps, out, _ := follow(t, []string{"RECORDER_TEST_ROLE=thread-exec"}, "/bin/sh", "-c", self+"; exit 3")
	complete(t, gaps)
	if out != "from a thread\n" || !slices.Contains(lines, "child echo × 1") {
		t.Errorf("%q, %q", out, lines)
	}
}

// What is built and run within one tick of the clock may change under its name.
func TestRefusesToBelieveTheTimesOfAYoungProgram(t *testing.T) {
	dir := t.TempDir()
	prog := filepath.Join(dir, "prog")
	script := "for f in true echo true; do cp /bin/$f " + prog + "; " + prog + " x; done"
	lines, _, gaps, _, _ := follow(t, nil, "/bin/sh", "-c", script)
	complete(t, gaps)
	want := map[string]int{"child prog × 2": 1, "child prog × 1": 1, "child cp × 3": 1}
	for _, l := range lines {
		want[l]--
	}
	for l, n := range want {
		if strings.HasPrefix(l, "child") && n != 0 {
			t.Errorf("%s: %d too few in %q", l, n, lines)
		}
	}
}

func TestTreeOfThousands(t *testing.T) {
	lines, _, gaps, _, st := follow(t, nil, "/bin/sh", "-c", "i=0; while [ $i -lt 2000 ]; do i=$((i+1)); /bin/true & done; wait")
	complete(t, gaps)
	if st.Code != 0 || !slices.Contains(lines, "child true × 2000") {
		t.Errorf("%q, %+v", lines, st)
	}
}

// A stopped child stays stopped until it is told to go on, and a signal to a
// child is the child's.
func TestTreeIsTransparentToSignals(t *testing.T) {
	ready := filepath.Join(t.TempDir(), "ready")
	lines, _, gaps, out, st := follow(t, []string{"READY=" + ready}, "/bin/sh", "-c", `
		sh -c 'trap "echo got USR1; exit 5" USR1; >$READY; while :; do sleep 0.01; done' & p=$!
		while ! [ -e $READY ]; do sleep 0.01; done
		kill -STOP $p
		while ! grep -q '^State:.[Tt]' /proc/$p/status; do sleep 0.01; done; echo stopped
		kill -USR1 $p; kill -CONT $p; wait $p; echo $?; kill -TERM $$`)
	complete(t, gaps)
	if out != "stopped\ngot USR1\n5\n" || st.Code != 143 {
		t.Errorf("%q, %+v, %q", out, st, lines)
	}
}

// A daemon lives on as it would without us, and the list says that it did.
func TestRefusesToCallATreeCompleteThatOutlivesTheStep(t *testing.T) {
	dir := t.TempDir()
	fifo := filepath.Join(dir, "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	lines, _, gaps, _, _ := follow(t, nil, "/bin/sh", "-c", "setsid sh -c 'read x <"+fifo+"; echo $x >"+fifo+".out; echo done >"+fifo+"' >/dev/null 2>&1 &")
	if len(gaps) != 1 || !strings.Contains(gaps[0], "outlived") || !strings.Contains(gaps[0], sh(t)) {
		t.Errorf("gaps %q of %q after %s", gaps, lines, time.Since(start))
	}
	if err := os.WriteFile(fifo, []byte("alive\n"), 0); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(fifo); err != nil || string(b) != "done\n" {
		t.Fatalf("the daemon did not live on: %q, %v", b, err)
	}
	if b, err := os.ReadFile(fifo + ".out"); err != nil || string(b) != "alive\n" {
		t.Errorf("%q, %v", b, err)
	}
}

func TestTreeWaitsForStragglers(t *testing.T) {
	lines, _, gaps, _, _ := follow(t, nil, "/bin/sh", "-c", "(sleep 0.2; /bin/true) & exit 0")
	complete(t, gaps)
	if !slices.Contains(lines, "child true × 1") {
		t.Errorf("%q", lines)
	}
}

// Nobody can trace what we trace: a debugger in the step must hear why.
func TestRefusesADebuggerInTheStep(t *testing.T) {
	strace, err := exec.LookPath("strace")
	if err != nil {
		t.Fatal(err)
	}
	_, _, gaps, out, _ := follow(t, nil, "/bin/sh", "-c", strace+" -o /dev/null true 2>&1; echo $?")
	complete(t, gaps)
	if !strings.Contains(out, "ptrace") || strings.HasSuffix(out, "\n0\n") {
		t.Errorf("%q", out)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	_, _, gaps, out, _ = follow(t, []string{"RECORDER_TEST_ROLE=recorder"}, "/bin/sh", "-c", self+" true 2>&1; echo $?")
	complete(t, gaps)
	if !strings.Contains(out, "traces it already") || !strings.Contains(out, "--follow main") || !strings.HasSuffix(out, "\n125\n") {
		t.Errorf("%q", out)
	}
}

func TestRefusesToCallAnUnreadableProgramSeen(t *testing.T) {
	tree := NewTree()
	tree.saw(1<<30, false) // no such process: it was killed meanwhile
	if _, gaps := tree.Result(); len(gaps) != 0 {
		t.Errorf("%q", gaps)
	}
	tree = NewTree()
	for i := range maxGaps + 10 {
		tree.gap("gap %d", i)
	}
	if _, gaps := tree.Result(); len(gaps) != maxGaps {
		t.Errorf("%d gaps", len(gaps))
	}
	tree = NewTree()
	p := &program{hashed: make(chan struct{})}
	close(p.hashed)
	for i := range maxRan + 1 {
		tree.add(p, fmt.Sprint(i), link.RoleChild)
	}
	if x, gaps := tree.Result(); len(x) != maxRan || len(gaps) != 1 || !strings.Contains(gaps[0], "more different programs") {
		t.Errorf("%d, %q", len(x), gaps)
	}
}

func BenchmarkTrueInATree(b *testing.B) {
	for b.Loop() {
		if _, err := Run(Command{Path: "/bin/true", Args: []string{"true"}, Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr, Tree: NewTree()},
			func(*Exec) error { return nil }); err != nil {
			b.Fatal(err)
		}
	}
}

// As an ordinary user: a program that may be executed and not read has no
// digest, so the list has a gap, and one that is setuid gains nothing, which
// is said when the step fails.
func TestRefusesWhatAnOrdinaryUserCannotSee(t *testing.T) {
	needs.Root(t) // to become an ordinary user
	dir, err := os.MkdirTemp("", "tree")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	copyOf := func(from, name string, mode os.FileMode) string {
		t.Helper()
		b, err := os.ReadFile(from)
		if err != nil {
			t.Fatal(err)
		}
		p := filepath.Join(dir, name)
		if err := os.WriteFile(p, b, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(p, mode); err != nil {
			t.Fatal(err)
		}
		return p
	}
	self := copyOf("/proc/self/exe", "self", 0o755)
	secret, suid := copyOf("/bin/true", "secret", 0o711), copyOf("/usr/bin/id", "suid", 0o755|os.ModeSetuid)
	c := exec.Command(self, "/bin/sh", "-c", secret+"; "+suid+" -u; exit 4")
	c.Dir = dir
	c.Env = append(os.Environ(), "RECORDER_TEST_ROLE=tree")
	c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	out, err := c.CombinedOutput()
	text := string(out)
	for _, want := range []string{"65534\n", "gap: a program named " + filepath.Base(secret), "suid gains privileges when it starts", "code 4"} {
		if !strings.Contains(text, want) {
			t.Errorf("no %q in %q, %v", want, text, err)
		}
	}
}

// On tmpfs a shared mapping changes a file and not its times. Two different
// programs that ran under one name and one set of times are two programs.
func TestRefusesTheTimesOfTmpfs(t *testing.T) {
	const dir = "/dev/shm"
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil || fs.Type != unix.TMPFS_MAGIC {
		needs.Missing(t, "no tmpfs at %s: %v", dir, err)
	}
	f, err := os.CreateTemp(dir, "tree")
	if err != nil {
		t.Fatal(err)
	}
	defer os.Remove(f.Name())
	defer f.Close()
	if _, err := f.Write(make([]byte, 4096)); err != nil {
		t.Fatal(err)
	}
	tree := NewTree()
	tree.now = func() time.Time { return time.Now().Add(time.Hour) } // the file has settled
	before, err := tree.look(os.Getpid(), f.Name(), "before")
	if err != nil {
		t.Fatal(err)
	}
	m, err := unix.Mmap(int(f.Fd()), 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	m[0] = m[1] + 1
	if err := unix.Munmap(m); err != nil {
		t.Fatal(err)
	}
	after, err := tree.look(os.Getpid(), f.Name(), "after")
	if err != nil {
		t.Fatal(err)
	}
	if before.id != after.id {
		t.Log("this kernel shows the change in the file's times")
	}
	if before.sum == after.sum {
		t.Error("the changed program was taken for the first")
	}
}

// Followed as the main process alone, a step can debug its children.
func TestMainOnlyLeavesTheRestAlone(t *testing.T) {
	f, err := os.Create(filepath.Join(t.TempDir(), "out"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	st, err := Run(Command{Path: "/bin/sh", Args: []string{"sh", "-c", "strace -o /dev/null true; echo $?"}, Env: os.Environ(), Stdin: os.Stdin, Stdout: f, Stderr: os.Stderr},
		func(*Exec) error { return nil })
	b, rerr := os.ReadFile(f.Name())
	if err != nil || rerr != nil || st.Code != 0 || string(b) != "0\n" {
		t.Errorf("%q, %+v, %v, %v", b, st, err, rerr)
	}
}
