package nodeagent_test

import (
	"context"
	"crypto/elliptic"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/rootlink/rootlink/internal/recorder"
	workloadv1 "github.com/rootlink/rootlink/proto/rootlink/workload/v1"
)

// TestWaitsForTheAttestation: workloads start with their agent, and must not hear
// no because they were quicker.
func TestWaitsForTheAttestation(t *testing.T) {
	n := newStockNode(t)
	c := n.dial()
	c.record()
	done := make(chan error, 1)
	go func() { _, err := c.vouch(n.ca.workload()); done <- err }()
	select {
	case err := <-done:
		t.Fatalf("answered before the node was attested: %v", err)
	case <-time.After(300 * time.Millisecond):
	}
	n.attested()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// TestExpiredAgentSVIDIsWaitedFor and is Unavailable in the end, never no.
func TestExpiredAgentSVIDIsWaitedFor(t *testing.T) {
	n := newStockNode(t)
	n.attested()
	expired, _ := n.ca.svid(n.path, time.Hour, -time.Minute, elliptic.P256())
	n.save(expired)
	c := n.dial()
	c.record()
	ctx, cancel := context.WithTimeout(c.ctx, time.Second)
	defer cancel()
	if _, err := c.Vouch(ctx, &workloadv1.VouchRequest{X509Svid: [][]byte{n.ca.workload()}, PayloadSha256: payload[:]}); code(err) != codes.Unavailable || !strings.Contains(err.Error(), "hint:") {
		t.Errorf("expired: %v", err)
	}
	fresh, _ := n.ca.svid(n.path, time.Minute, time.Hour, elliptic.P256())
	n.save(fresh)
	if _, err := c.vouch(n.ca.workload()); err != nil {
		t.Errorf("the next one: %v", err)
	}
}

func code(err error) codes.Code { return status.Code(err) }

// TestMeasurementOutlivesConfiguration: SPIRE configures its plugins again when
// its files change, and a build may have begun an hour ago.
func TestMeasurementOutlivesConfiguration(t *testing.T) {
	n := newStockNode(t)
	n.attested()
	c := n.dial()
	c.record()
	if err := n.plugin.Configure(t.Context(), n.hcl+"hash_bytes_per_uid = 1000000000\n"); err != nil {
		t.Fatal(err)
	}
	if _, err := c.vouch(n.ca.workload()); err != nil {
		t.Errorf("after Configure: %v", err)
	}
	n.attested() // again, with another agent SVID
	if _, err := c.vouch(n.ca.workload()); err != nil {
		t.Errorf("after another attestation: %v", err)
	}
	// A configuration that cannot be: what there is goes on.
	if err := n.plugin.Configure(t.Context(), strings.Replace(n.hcl, "agent_data_dir", "agent_data_dirs", 1)); err == nil {
		t.Fatal("a misspelt key is accepted")
	}
	if _, err := c.vouch(n.ca.workload()); err != nil {
		t.Errorf("after a bad configuration: %v", err)
	}
	// Without the socket it goes.
	hcl := fmt.Sprintf("tpm_path = %q\ndata_dir = %q\n", n.sw.Device(), n.own)
	if err := n.plugin.Configure(t.Context(), hcl); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(n.socket); !os.IsNotExist(err) {
		t.Errorf("the socket is still there: %v", err)
	}
}

// TestSocketIsOneProcessOnly: one that is in use is refused, what a killed agent
// left is replaced, and a plugin that ends takes its own away.
func TestSocketIsOneProcessOnly(t *testing.T) {
	n := newStockNode(t)
	second := n.load()
	other := strings.Replace(n.hcl, n.own, t.TempDir(), 1)
	err := second.Configure(t.Context(), other)
	if err == nil || !strings.Contains(err.Error(), "serving the socket") {
		t.Errorf("a socket in use: %v", err)
	}
	if err := n.plugin.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(n.socket); !os.IsNotExist(err) {
		t.Errorf("left behind: %v", err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: n.socket})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	if err := second.Configure(t.Context(), other); err != nil {
		t.Errorf("a stale socket: %v", err)
	}
	if st, err := os.Stat(n.socket); err != nil || st.Mode().Perm() != 0o777 {
		t.Errorf("socket %v: %v", st, err)
	}
}

// TestRefusesQuoteOfAnotherBoot: after a reset of the TPM no verifier would take
// the evidence. It is there again when the node has attested.
func TestRefusesQuoteOfAnotherBoot(t *testing.T) {
	n := newStockNode(t)
	n.attested()
	c := n.dial()
	c.record()
	n.sw.Restart()
	done := make(chan error, 1)
	go func() { _, err := c.vouch(n.ca.workload()); done <- err }()
	select {
	case err := <-done:
		t.Fatalf("answered in another boot: %v", err)
	case <-time.After(500 * time.Millisecond):
	}
	n.attested()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// TestTPMAwayInTheMiddle: a TPM that dies is waited for, and nothing hangs.
func TestTPMAwayInTheMiddle(t *testing.T) {
	n := newStockNode(t)
	n.attested()
	c := n.dial()
	c.record()
	n.sw.Stop()
	ctx, cancel := context.WithTimeout(c.ctx, time.Second)
	defer cancel()
	if _, err := c.Vouch(ctx, &workloadv1.VouchRequest{X509Svid: [][]byte{n.ca.workload()}, PayloadSha256: payload[:]}); code(err) != codes.DeadlineExceeded && code(err) != codes.Unavailable {
		t.Errorf("no TPM: %v", err)
	}
	n.sw.Resume()
	n.attested()
	if _, err := c.vouch(n.ca.workload()); err != nil {
		t.Errorf("the TPM is back: %v", err)
	}
}

// role is what the test binary does as a process of its own.
func role(mode string) int {
	switch mode {
	case "connect-then-exec":
		fmt.Println(connectThenExec(os.Getenv("ROOTLINK_TEST_SOCKET"), os.Getenv("ROOTLINK_TEST_EXEC")))
	case "measure-on-fd":
		fmt.Println(measureOnFD())
	default:
		fmt.Println("no such role:", mode)
	}
	return 0
}

const preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

// begun is a connection whose preface was sent already.
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

// connectThenExec connects, waits until it was accepted (HTTP/2 settings arrive)
// and becomes another program that inherits the connection.
func connectThenExec(socket, program string) error {
	c, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: socket})
	if err != nil {
		return err
	}
	f, err := c.File() // blocking, so that the peek below waits
	if err != nil {
		return err
	}
	if _, err := f.Write(append([]byte(preface), 0, 0, 0, 4, 0, 0, 0, 0, 0)); err != nil {
		return err
	}
	if _, _, err := unix.Recvfrom(int(f.Fd()), make([]byte, 9), unix.MSG_PEEK); err != nil {
		return err
	}
	// A copy that survives exec, with a number that the runtime does not use.
	kept, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD, 100)
	if err != nil {
		return err
	}
	os.Setenv("ROOTLINK_TEST_ROLE", "measure-on-fd")
	os.Setenv("ROOTLINK_TEST_FD", strconv.Itoa(kept))
	return syscall.Exec(program, []string{program}, os.Environ())
}

// measureOnFD records a step on the inherited connection.
func measureOnFD() string {
	conn, err := grpc.NewClient("passthrough:fd", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) {
			fd, err := strconv.Atoi(os.Getenv("ROOTLINK_TEST_FD"))
			if err != nil {
				return nil, err
			}
			c, err := net.FileConn(os.NewFile(uintptr(fd), "socket"))
			return &begun{Conn: c}, err
		}))
	if err != nil {
		return err.Error()
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	ctx = metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", "true")
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return err.Error()
	}
	path, err := exec.LookPath("true")
	if err != nil {
		return err.Error()
	}
	said := "nothing"
	recorder.Run(recorder.Command{Path: path, Args: []string{"true"}, Env: []string{}, Stdin: null, Stdout: null, Stderr: null}, func(*recorder.Exec) error {
		_, err := workloadv1.NewVoucherClient(conn).Measure(ctx, &workloadv1.MeasureRequest{})
		said = status.Code(err).String() + " " + status.Convert(err).Message()
		return err
	})
	return said
}

// TestRefusesCallerThatExecs: a process that connects and then execs the genuine
// recorder over itself must not be taken for it.
func TestRefusesCallerThatExecs(t *testing.T) {
	n := newStockNode(t)
	genuine := filepath.Join(t.TempDir(), "genuine")
	from, err := os.Open("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	defer from.Close()
	to, err := os.OpenFile(genuine, os.O_CREATE|os.O_WRONLY, 0o755)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(to, from); err != nil {
		t.Fatal(err)
	}
	if err := to.Close(); err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for program, want := range map[string]string{genuine: codes.PermissionDenied.String(), self: codes.OK.String()} {
		cmd := exec.CommandContext(t.Context(), self)
		cmd.Env = append(os.Environ(), "ROOTLINK_TEST_ROLE=connect-then-exec", "ROOTLINK_TEST_SOCKET="+n.socket, "ROOTLINK_TEST_EXEC="+program)
		out, err := cmd.Output()
		if err != nil || !strings.HasPrefix(string(out), want) {
			t.Errorf("became %s: %s %v, want %s", filepath.Base(program), out, err, want)
		}
	}
}
