package recorder

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/rootlink/rootlink/internal/files"
)

// Exec is the tool at one exec, stopped before its first instruction.
type Exec struct {
	N      int    // 1 for the first
	PID    int    // in our pid namespace
	Path   string // of the executable, as the kernel knows it
	Script *Script
}

// Script is a file that starts with #!; the executable is its interpreter.
type Script struct {
	Path   string
	SHA256 [32]byte
	line   string // its first, behind the #!
}

// HashExecutable hashes what the process runs. The agent's own measurement is
// what counts; this is for a run without an agent.
func (e *Exec) HashExecutable() ([32]byte, error) {
	return files.SHA256(fmt.Sprintf("/proc/%d/exe", e.PID))
}

func lookAtExec(pid, n int) (*Exec, error) {
	exe := fmt.Sprintf("/proc/%d/exe", pid)
	path, err := os.Readlink(exe)
	if err != nil {
		return nil, fmt.Errorf("the tool's executable: %w", err)
	}
	e := &Exec{N: n, PID: pid, Path: strings.ToValidUTF8(path, "\uFFFD")}
	name, err := execName(pid)
	if err != nil {
		return nil, fmt.Errorf("what the tool was started as: %w", err)
	}
	if e.Script, err = script(pid, name); err != nil {
		return nil, fmt.Errorf("the tool's script: %w", err)
	}
	return e, nil
}

// auxv entries end with AT_NULL; AT_EXECFN points to the name given to execve,
// which for a script is the script's, not its interpreter's (getauxval(3)).
const (
	atNull   = 0
	atExecFn = 31
)

func execName(pid int) (string, error) {
	auxv, err := os.ReadFile(fmt.Sprintf("/proc/%d/auxv", pid))
	if err != nil {
		return "", err
	}
	// A 32-bit tool has pairs of 4 bytes: read as 8, tag and value together
	// make a number that no tag is.
	word := 8
	if len(auxv) >= 8 && binary.NativeEndian.Uint64(auxv) >= 1<<31 {
		word = 4
	}
	read := func(b []byte) uint64 {
		if word == 4 {
			return uint64(binary.NativeEndian.Uint32(b))
		}
		return binary.NativeEndian.Uint64(b)
	}
	for ; len(auxv) >= 2*word; auxv = auxv[2*word:] {
		switch read(auxv) {
		case atNull:
			return "", errors.New("no AT_EXECFN")
		case atExecFn:
			return readString(pid, int64(read(auxv[word:])))
		}
	}
	return "", errors.New("no AT_EXECFN")
}

// readString reads a string of the stopped process, page by page: the stack
// may end right behind it.
func readString(pid int, at int64) (string, error) {
	mem, err := os.Open(fmt.Sprintf("/proc/%d/mem", pid))
	if err != nil {
		return "", err
	}
	defer mem.Close()
	var out []byte
	page := int64(os.Getpagesize())
	for len(out) <= unix.PathMax {
		b := make([]byte, page-at%page)
		n, err := mem.ReadAt(b, at)
		if i := bytes.IndexByte(b[:n], 0); i >= 0 {
			return string(append(out, b[:i]...)), nil
		}
		if n == 0 {
			return "", fmt.Errorf("memory of the tool: %w", err)
		}
		out = append(out, b[:n]...)
		at += int64(n)
	}
	return "", errors.New("unending name")
}

// script returns the script that name is, or nil when name is the executable.
func script(pid int, name string) (*Script, error) {
	path := name
	switch {
	case strings.HasPrefix(name, "/dev/fd/"): // fexecve
		path = fmt.Sprintf("/proc/%d/fd/%s", pid, strings.TrimPrefix(name, "/dev/fd/"))
	case !filepath.IsAbs(name):
		path = filepath.Join(fmt.Sprintf("/proc/%d/cwd", pid), name)
	default:
		path = filepath.Join(fmt.Sprintf("/proc/%d/root", pid), name)
	}
	exe, err := os.Stat(fmt.Sprintf("/proc/%d/exe", pid))
	if err != nil {
		return nil, err
	}
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		// An executable need not be readable, nor be there any more. A script
		// must be both for its interpreter, and so is one to us.
		return nil, nil
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil || !st.Mode().IsRegular() || os.SameFile(exe, st) {
		return nil, err
	}
	head := make([]byte, maxShebang)
	n, err := f.ReadAt(head, 0)
	if head = head[:n]; err != nil && !errors.Is(err, io.EOF) || !bytes.HasPrefix(head, []byte("#!")) {
		return nil, nil // a foreign binary that binfmt_misc gave an interpreter
	}
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return nil, err
	}
	s := &Script{Path: strings.ToValidUTF8(name, "\uFFFD"), line: firstLine(head)}
	h.Sum(s.SHA256[:0])
	return s, nil
}
