package recorder

import (
	"encoding/binary"
	"os"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"
)

// stubArg is the first argument of the recorder when it starts itself to
// become the tool.
const stubArg = "__exec"

// File descriptors that the stub is started with, beside the standard three.
const (
	stubStatus = 3 // write: the ready byte, then an errno if exec fails; closed by exec
	stubGo     = 4 // read: the go byte
)

// IsStub reports whether this process was started to become a tool. main asks
// in its init, where it can still lock the main goroutine to the main thread:
// the thread that is traced must be the one that execs.
func IsStub() bool { return len(os.Args) > 1 && os.Args[1] == stubArg }

// RunStub becomes the tool: `rootlink __exec PATH ARGV0 ARGS…`. It never returns.
//
// It is a program of its own rather than a fork of the recorder because the
// go byte must come after the recorder has attached, and nothing in a Go
// program may run between fork and exec.
func RunStub() {
	runtime.LockOSThread()
	if len(os.Args) < 4 {
		os.Stderr.WriteString("error: " + stubArg + " is how rootlink starts a tool; it is not for people\n")
		os.Exit(125)
	}
	unix.CloseOnExec(stubStatus)
	unix.CloseOnExec(stubGo)
	fail := func(err error) {
		errno, ok := err.(syscall.Errno)
		if !ok {
			errno = syscall.EIO
		}
		unix.Write(stubStatus, binary.NativeEndian.AppendUint32(nil, uint32(errno)))
		os.Exit(125)
	}
	if _, err := DropGroup(); err != nil {
		fail(err)
	}
	// Setgid made us undumpable, and so out of the recorder's reach too.
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 1, 0, 0, 0); err != nil {
		fail(err)
	}
	if n, err := unix.Write(stubStatus, []byte{'R'}); n != 1 {
		fail(err)
	}
	b := make([]byte, 1)
	for {
		n, err := unix.Read(stubGo, b)
		if err == unix.EINTR {
			continue
		}
		if n != 1 {
			os.Exit(125) // the recorder gave up or died
		}
		break
	}
	fail(syscall.Exec(os.Args[2], os.Args[3:], os.Environ()))
}
