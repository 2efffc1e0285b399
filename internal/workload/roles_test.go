package workload

import (
	"bufio"
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"
)

// runRole is what this binary does as another program in a test.
func runRole(role string, args []string) int {
	in := bufio.NewScanner(os.Stdin)
	say := func(s string) { fmt.Println(s) }
	fail := func(err error) int {
		fmt.Println("failed", err)
		return 1
	}
	dial := func() (net.Conn, error) { return net.Dial("unix", args[0]) }
	switch role {
	case "wait": // until stdin ends
		say("ready")
		for in.Scan() {
		}
		return 0
	case "chroot": // args: directory; its executable then lies above its root
		if err := unix.Chroot(args[0]); err != nil {
			return fail(err)
		}
		say("ready")
		for in.Scan() {
		}
		return 0
	case "connect": // args: socket
		c, err := dial()
		if err != nil {
			return fail(err)
		}
		defer c.Close()
		say("connected")
		for in.Scan() {
		}
		return 0
	case "connect-exec": // args: socket, program
		c, err := dial()
		if err != nil {
			return fail(err)
		}
		defer c.Close()
		say("connected")
		in.Scan()
		os.Setenv("WORKLOAD_TEST_ROLE", "wait")
		return fail(syscall.Exec(args[1], args[1:], os.Environ()))
	case "children": // args: socket, then one letter per child
		return holdChildren(args, in)
	case "fuse": // args: directory, program
		if err := serveFuse(args[0], args[1], in); err != nil {
			return fail(err)
		}
		return 0
	case "new-measurer":
		_, err := NewMeasurer(Options{})
		say(fmt.Sprint("measurer ", err))
		return 0
	case "overlay-exec": // args: base, merged; in a user and mount namespace of its own
		opts := fmt.Sprintf("lowerdir=%[1]s/lower,upperdir=%[1]s/upper,workdir=%[1]s/work,userxattr", args[0])
		if err := unix.Mount("overlay", args[1], "overlay", 0, opts); err != nil {
			return fail(err)
		}
		os.Setenv("WORKLOAD_TEST_ROLE", "wait")
		return fail(syscall.Exec(args[1]+"/prog", []string{"prog"}, os.Environ()))
	case "server": // args: socket to listen on; says whether the first peer has a pid
		return server(args[0])
	}
	return fail(fmt.Errorf("no role %s", role))
}

// holdChildren connects, starts a child for each letter (t: traced and stopped,
// u: stopped but not traced, r: running) and holds them.
func holdChildren(args []string, in *bufio.Scanner) int {
	ready := make(chan error, 1)
	go func() {
		// The tracer is a thread that is not the group leader.
		runtime.LockOSThread()
		ready <- func() error {
			for _, kind := range args[1] {
				c := exec.Command("/bin/sleep", "60")
				c.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
				if len(args) > 2 && args[2] == "newpid" {
					c.SysProcAttr.Cloneflags = syscall.CLONE_NEWPID
				}
				if err := c.Start(); err != nil {
					return err
				}
				pid := c.Process.Pid
				switch kind {
				case 't':
					if _, _, e := unix.Syscall6(unix.SYS_PTRACE, unix.PTRACE_SEIZE, uintptr(pid), 0, unix.PTRACE_O_EXITKILL, 0, 0); e != 0 {
						return e
					}
					if err := unix.PtraceInterrupt(pid); err != nil {
						return err
					}
					var ws unix.WaitStatus
					if _, err := unix.Wait4(pid, &ws, unix.WALL, nil); err != nil {
						return err
					}
				case 'u':
					if err := unix.Kill(pid, unix.SIGSTOP); err != nil {
						return err
					}
					var ws unix.WaitStatus
					if _, err := unix.Wait4(pid, &ws, unix.WUNTRACED, nil); err != nil {
						return err
					}
				}
			}
			return nil
		}()
		select {} // keeps the thread, and with it the trace
	}()
	if err := <-ready; err != nil {
		fmt.Println("failed", err)
		return 1
	}
	c, err := net.Dial("unix", args[0])
	if err != nil {
		fmt.Println("failed", err)
		return 1
	}
	defer c.Close()
	fmt.Println("connected")
	for in.Scan() {
	}
	return 0
}

// server accepts one connection and says what PeerOf makes of it.
func server(path string) int {
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path})
	if err != nil {
		fmt.Println("failed", err)
		return 1
	}
	defer l.Close()
	fmt.Println("ready")
	c, err := l.AcceptUnix()
	if err != nil {
		fmt.Println("failed", err)
		return 1
	}
	defer c.Close()
	_, err = PeerOf(c)
	fmt.Println("peer", err, "hint", Hint(err))
	return 0
}

// onTracer runs f on a thread that holds pid stopped under its trace.
func onTracer(pid int, f func()) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if _, _, e := unix.Syscall6(unix.SYS_PTRACE, unix.PTRACE_SEIZE, uintptr(pid), 0, 0, 0, 0); e != 0 {
		return e
	}
	if err := unix.PtraceInterrupt(pid); err != nil {
		return err
	}
	var ws unix.WaitStatus
	if _, err := unix.Wait4(pid, &ws, unix.WALL, nil); err != nil {
		return err
	}
	f()
	return unix.PtraceDetach(pid)
}
