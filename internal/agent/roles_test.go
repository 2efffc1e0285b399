package agent

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	workloadpb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/rootlink/rootlink/internal/needs"
	"github.com/rootlink/rootlink/internal/recorder"
	workloadv1 "github.com/rootlink/rootlink/proto/rootlink/workload/v1"
)

// copySelf makes another executable of the test binary: one byte longer, so
// another hash and another inode.
func copySelf(t *testing.T, dir string) (path, selector string) {
	t.Helper()
	b, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	path = filepath.Join(dir, "copy")
	if err := os.WriteFile(path, append(b, '\n'), 0o755); err != nil {
		t.Fatal(err)
	}
	return path, "binary:sha256:" + hashFile(t, path)
}

// run runs an executable in a role and returns what it says.
func (r *running) run(exe, mode string, env ...string) string {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, exe)
	cmd.Env = append(os.Environ(), append(env, "ROOTLINK_TEST_ROLE="+mode, "ROOTLINK_TEST_SOCKET="+r.socket)...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		r.t.Fatalf("%s as %s: %v\n%s", exe, mode, err, out)
	}
	return strings.TrimSpace(string(out))
}

// role is what the test binary does as another process.
func role(mode string) int {
	ctx, cancel := context.WithTimeout(header(context.Background()), patience)
	defer cancel()
	socket := os.Getenv("ROOTLINK_TEST_SOCKET")
	switch mode {
	case "fetch": // a plain workload
		conn, err := grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithAuthority("localhost"))
		return say(fetchOn(ctx, conn, err))
	case "connect-then-exec":
		return connectThenExec(socket, os.Getenv("ROOTLINK_TEST_EXEC"))
	case "fetch-on-fd":
		return say(fetchOn(ctx, nil, nil))
	case "warm":
		return say(warm(ctx, socket))
	case "step":
		return say(stepAs(ctx, socket))
	}
	fmt.Println("no such role:", mode)
	return 1
}

func say(s string) int { fmt.Println(s); return 0 }

// fetchOn says which identities the caller gets. Without a connection it uses
// the inherited one.
func fetchOn(ctx context.Context, conn *grpc.ClientConn, err error) string {
	if conn == nil && err == nil {
		conn, err = grpc.NewClient("passthrough:fd", grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) {
				fd, err := strconv.Atoi(os.Getenv("ROOTLINK_TEST_FD"))
				if err != nil {
					return nil, err
				}
				c, err := net.FileConn(os.NewFile(uintptr(fd), "socket"))
				return &begun{Conn: c}, err
			}))
	}
	if err != nil {
		return err.Error()
	}
	defer conn.Close()
	stream, err := workloadpb.NewSpiffeWorkloadAPIClient(conn).FetchX509SVID(ctx, &workloadpb.X509SVIDRequest{})
	if err != nil {
		return err.Error()
	}
	resp, err := stream.Recv()
	if err != nil {
		return status.Code(err).String() + " " + status.Convert(err).Message()
	}
	return "OK " + resp.Svids[0].SpiffeId
}

// warm fetches many times, each on a connection of its own, and says the median
// and the 99th percentile in milliseconds.
func warm(ctx context.Context, socket string) string {
	n, err := strconv.Atoi(os.Getenv("ROOTLINK_TEST_N"))
	if err != nil {
		return err.Error()
	}
	var took []time.Duration
	for i := range n + 5 {
		start := time.Now()
		conn, err := grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithAuthority("localhost"))
		if got := fetchOn(ctx, conn, err); !strings.HasPrefix(got, "OK") {
			return got
		}
		if i >= 5 {
			took = append(took, time.Since(start))
		}
		if i == 1 { // a fresh file is not cached before its times are 2 s old
			time.Sleep(3 * time.Second)
		}
	}
	slices.Sort(took)
	ms := func(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
	return fmt.Sprint(ms(took[len(took)/2]), " ", ms(took[len(took)*99/100]))
}

const preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

// begun is a connection on which the preface was sent already.
type begun struct {
	net.Conn
	skipped int
}

func (b *begun) Write(p []byte) (int, error) {
	n := min(len(preface)-b.skipped, len(p))
	b.skipped += n
	m, err := b.Conn.Write(p[n:])
	return n + m, err
}

// connectThenExec connects, waits until the agent has accepted (its HTTP/2
// settings arrive) and becomes another program that inherits the connection.
func connectThenExec(socket, program string) int {
	c, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: socket})
	if err != nil {
		fmt.Println(err)
		return 1
	}
	f, err := c.File() // blocking, so that the peek below waits
	if err != nil {
		fmt.Println(err)
		return 1
	}
	fd := int(f.Fd())
	// HTTP/2's preface and empty settings; the answer shows that we were accepted.
	if _, err := unix.Write(fd, append([]byte(preface), 0, 0, 0, 4, 0, 0, 0, 0, 0)); err != nil {
		fmt.Println(err)
		return 1
	}
	if n, _, err := unix.Recvfrom(fd, make([]byte, 9), unix.MSG_PEEK); err != nil || n == 0 {
		fmt.Println("the agent did not answer:", n, err)
		return 1
	}
	// A copy that survives exec, with a number that the runtime does not use.
	kept, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD, 100)
	if err != nil {
		fmt.Println(err)
		return 1
	}
	os.Setenv("ROOTLINK_TEST_ROLE", "fetch-on-fd")
	os.Setenv("ROOTLINK_TEST_FD", strconv.Itoa(kept))
	fmt.Println(syscall.Exec(program, []string{program}, os.Environ()))
	return 1
}

// stepAs records true as this process and says how it was measured.
func stepAs(ctx context.Context, socket string) string {
	conn, err := grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithAuthority("localhost"))
	if err != nil {
		return err.Error()
	}
	defer conn.Close()
	c := workloadv1.NewIssuerClient(conn)
	// Connects, so that the socket is stamped with the group before it is given up.
	c.Whoami(ctx, &workloadv1.WhoamiRequest{})
	if _, err := recorder.DropGroup(); err != nil {
		return err.Error()
	}
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return err.Error()
	}
	path, err := exec.LookPath("true")
	if err != nil {
		return err.Error()
	}
	var m *workloadv1.MeasureResponse
	_, err = recorder.Run(recorder.Command{Path: path, Args: []string{"true"}, Env: os.Environ(), Stdin: null, Stdout: null, Stderr: null},
		func(*recorder.Exec) (err error) { m, err = c.Measure(ctx, &workloadv1.MeasureRequest{}); return err })
	if err != nil {
		return err.Error()
	}
	return fmt.Sprintf("%s protected=%v gid=%d", m.SpiffeId, m.Measurement.RecorderProtected, os.Getegid())
}

// TestRefusesExecAfterConnect: a process that connects and then execs the
// trusted program over itself must not get the trusted program's identity.
func TestRefusesExecAfterConnect(t *testing.T) {
	s := newFakeServer(t)
	s.start()
	r := startAgent(t, s)
	r.waitReady()
	trusted, selector := copySelf(t, t.TempDir())
	s.addEntry("/trusted", selector)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if got := r.run(trusted, "fetch"); got != "OK spiffe://"+testTD+"/trusted" {
		t.Fatalf("the trusted program itself: %s", got)
	}
	got := r.run(self, "connect-then-exec", "ROOTLINK_TEST_EXEC="+trusted)
	if !strings.HasPrefix(got, codes.PermissionDenied.String()) || !strings.Contains(got, "another executable") {
		t.Errorf("connected as one program, asked as another: %s", got)
	}
	// Over itself is no change.
	s.addEntry("/self", selfHash(t))
	if got := r.run(self, "connect-then-exec", "ROOTLINK_TEST_EXEC="+self); got != "OK spiffe://"+testTD+"/self" {
		t.Errorf("the same program again: %s", got)
	}
}

// TestProtectedRecorder: installed setgid to the recorder group it is
// protected, although it gave the group up before it started the tool.
func TestProtectedRecorder(t *testing.T) {
	needs.Root(t)
	const gid = 62817
	s := newFakeServer(t)
	s.start()
	r := startAgent(t, s, func(c *Config) { c.RecorderGID = gid })
	r.waitReady()
	path, selector := copySelf(t, t.TempDir())
	hash := strings.TrimPrefix(selector, "binary:sha256:")
	tool := "binary:tool:sha256:" + hashFile(t, program(t, "true"))
	s.addEntry("/protected", tool, "binary:recorder:sha256:"+hash)
	s.addEntry("/unprotected", tool, "binary:recorder_unprotected:sha256:"+hash)
	if got := r.run(path, "step"); got != fmt.Sprintf("spiffe://%s/unprotected protected=false gid=%d", testTD, os.Getegid()) {
		t.Errorf("plain install: %s", got)
	}
	if err := os.Chown(path, 0, gid); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, 0o755|os.ModeSetgid); err != nil {
		t.Fatal(err)
	}
	if got := r.run(path, "step"); got != fmt.Sprintf("spiffe://%s/protected protected=true gid=%d", testTD, os.Getegid()) {
		t.Errorf("setgid install: %s", got)
	}
}
