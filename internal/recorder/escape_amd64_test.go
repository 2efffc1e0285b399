package recorder

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"os"
	"path/filepath"
	"testing"
)

// untracedExec is a program that makes a thread with CLONE_UNTRACED, which
// execs /bin/echo: the kernel tells a tracer neither of the thread nor of its
// exec. It is machine code because no Go program can make such a thread.
func untracedExec(t *testing.T) string {
	t.Helper()
	const base, path, argv, size = 0x400000, 0xc8, 0xd8, 0xe8
	code, err := hex.DecodeString(
		"b838000000" + // mov $56,%eax: clone
			"bf000f8500" + // mov $VM|FS|FILES|SIGHAND|THREAD|SYSVSEM|UNTRACED,%edi
			"31f631d24531d24531c0" + // no stack of its own, no ids
			"0f0585c07409" + // syscall; test %eax,%eax; jz child
			"b8220000000f05ebf7" + // parent: pause() for ever
			"b83b000000bfc8004000bed800400031d20f05" + // child: execve(path, argv, NULL)
			"b83c000000bf010000000f05") // exit(1)
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, size)
	le := binary.LittleEndian
	copy(b, "\x7fELF\x02\x01\x01")
	for _, f := range []struct {
		at int
		v  uint16
	}{{16, 2}, {18, 62}, {20, 1}, {52, 64}, {54, 56}, {56, 1}, {64, 1}, {68, 7}} { // EXEC, x86-64; one PT_LOAD, rwx
		le.PutUint16(b[f.at:], f.v)
	}
	for _, f := range []struct {
		at int
		v  uint64
	}{{24, base + 120}, {32, 64}, {80, base}, {88, base}, {96, size}, {104, size}, {112, 0x1000}, {argv, base + path}} {
		le.PutUint64(b[f.at:], f.v)
	}
	copy(b[120:], code)
	copy(b[path:], "/bin/echo\x00")
	name := filepath.Join(t.TempDir(), "escape")
	if err := os.WriteFile(name, b, 0o755); err != nil {
		t.Fatal(err)
	}
	return name
}

func TestRefusesToolThatEscapesItsTraceInATree(t *testing.T) {
	for range 20 {
		path := untracedExec(t)
		tree := NewTree()
		null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		_, err = Run(Command{Path: path, Args: []string{path}, Env: os.Environ(), Stdin: null, Stdout: null, Stderr: null, Tree: tree}, func(*Exec) error { return nil })
		null.Close()
		if !errors.Is(err, ErrEscaped) {
			t.Fatal(err)
		}
		tree.Result()
	}
}

func TestRefusesToolThatEscapesItsTrace(t *testing.T) {
	for range 20 {
		execs := 0
		out, st, err := output(t, nil, []string{untracedExec(t)}, func(*Exec) error { execs++; return nil })
		if !errors.Is(err, ErrEscaped) || out != "\n" || execs != 1 {
			t.Fatalf("%q after %d execs seen: %+v, %v", out, execs, st, err)
		}
	}
}
