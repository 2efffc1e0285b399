package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"syscall"
	"time"

	workloadpb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
)

const (
	trustDomain  = "bench.example"
	startTimeout = 60 * time.Second
	stopTimeout  = 15 * time.Second
)

// world is a TPM, a server and an agent, as processes, in one directory.
type world struct {
	dir     string
	self    string // this program
	bin     string // directory of the programs under test
	server  *daemon
	agent   *daemon
	tpm     *daemon
	daemons []*daemon

	address string // of the server
	web     string // base URL of its HTTP port
	join    string
	agentID string
	admin   *grpc.ClientConn
	entries entryv1.EntryClient
}

func (w *world) path(name string) string { return filepath.Join(w.dir, name) }
func (w *world) program(n string) string { return filepath.Join(w.bin, n) }
func (w *world) socket() string          { return w.path("agent.sock") }

func newWorld(ctx context.Context, in string) (_ *world, err error) {
	w := &world{bin: os.Getenv("ROOTLINK_BIN")}
	if w.bin == "" {
		return nil, errors.New("ROOTLINK_BIN does not name the directory of the programs; start this with `make bench`")
	}
	if w.self, err = os.Executable(); err != nil {
		return nil, err
	}
	if w.dir, err = os.MkdirTemp(in, "rlbench"); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, w.close(true))
		}
	}()
	if err := w.startTPM(ctx); err != nil {
		return nil, err
	}
	if err := w.startServer(); err != nil {
		return nil, err
	}
	return w, w.startAgent()
}

// startTPM makes a TPM with an EK certificate from a maker of its own, as
// swtpm's own tools do, and runs it.
func (w *world) startTPM(ctx context.Context) error {
	for _, d := range []string{"tpm", "maker"} {
		if err := os.Mkdir(w.path(d), 0o700); err != nil {
			return err
		}
	}
	localca, err := exec.LookPath("swtpm_localca")
	if err != nil {
		return fmt.Errorf("%w (scripts/setup installs it)", err)
	}
	maker := w.path("maker")
	for name, text := range map[string]string{
		"setup.conf":      fmt.Sprintf("create_certs_tool=%s\ncreate_certs_tool_config=%[2]s/localca.conf\ncreate_certs_tool_options=%[2]s/localca.options\n", localca, maker),
		"localca.conf":    fmt.Sprintf("statedir = %[1]s\nsigningkey = %[1]s/signkey.pem\nissuercert = %[1]s/issuercert.pem\ncertserial = %[1]s/certserial\n", maker),
		"localca.options": "--platform-manufacturer Bench\n--platform-version 1\n--platform-model Bench\n",
	} {
		if err := os.WriteFile(filepath.Join(maker, name), []byte(text), 0o600); err != nil {
			return err
		}
	}
	setup := exec.CommandContext(ctx, "swtpm_setup", "--tpm2", "--tpmstate", w.path("tpm"), "--create-ek-cert", "--ecc",
		"--lock-nvram", "--not-overwrite", "--config", filepath.Join(maker, "setup.conf"))
	if out, err := setup.CombinedOutput(); err != nil {
		return fmt.Errorf("swtpm_setup: %w\n%s", err, out)
	}
	var roots []byte
	for _, name := range []string{"swtpm-localca-rootca-cert.pem", "issuercert.pem"} {
		b, err := os.ReadFile(filepath.Join(maker, name))
		if err != nil {
			return err
		}
		roots = append(roots, b...)
	}
	if err := os.WriteFile(w.path("maker.pem"), roots, 0o600); err != nil {
		return err
	}
	w.tpm, err = w.launch("tpm", "swtpm", "socket", "--tpm2", "--tpmstate", "dir="+w.path("tpm"),
		"--server", "type=unixio,path="+w.path("tpm.sock"), "--ctrl", "type=unixio,path="+w.path("tpm.sock.ctrl"),
		"--flags", "not-need-init,startup-clear")
	if err != nil {
		return err
	}
	return w.tpm.until(func() bool {
		c, err := net.Dial("unix", w.path("tpm.sock"))
		if err == nil {
			c.Close()
		}
		return err == nil && os.Chmod(w.path("tpm.sock"), 0o600) == nil
	})
}

func (w *world) startServer() (err error) {
	w.server, err = w.launch("server", w.program("rootlink-server"), "run", "--trust-domain", trustDomain, "--data-dir", w.path("server"),
		"--listen", "127.0.0.1:0", "--http-listen", "127.0.0.1:0", "--ek-roots", w.path("maker.pem"), "--admin-socket", w.path("admin.sock"))
	if err != nil {
		return err
	}
	line, err := w.server.ready()
	if err != nil {
		return err
	}
	if w.address = regexp.MustCompile(`127\.0\.0\.1:[0-9]+`).FindString(line); w.address == "" {
		return fmt.Errorf("no address in the server's ready line: %s", line)
	}
	if m := regexp.MustCompile(`HTTP port (127\.0\.0\.1:[0-9]+)`).FindStringSubmatch(line); m != nil {
		w.web = "http://" + m[1]
	} else {
		return fmt.Errorf("no HTTP port in the server's ready line: %s", line)
	}
	out, err := exec.Command(w.program("rootlink-server"), "join-line", "--admin-socket", w.path("admin.sock")).Output()
	if err != nil {
		return fmt.Errorf("join-line: %w", err)
	}
	w.join = strings.TrimSpace(string(out))
	w.admin, err = grpc.NewClient("unix:"+w.path("admin.sock"), grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithAuthority("localhost"))
	if err != nil {
		return err
	}
	w.entries = entryv1.NewEntryClient(w.admin)
	return nil
}

// startAgent starts the agent as people run it. What it knows is in its data
// directory, so it can be stopped and another take its place.
func (w *world) startAgent() (err error) {
	w.agent, err = w.launch("agent", w.program("rootlink-agent"), append([]string{"run"}, w.agentFlags()...)...)
	if err != nil {
		return err
	}
	line, err := w.agent.ready()
	if err != nil {
		return err
	}
	if w.agentID = regexp.MustCompile(`spiffe://[^ ,]*/spire/agent/tpmnode/[0-9a-f]{64}`).FindString(line); w.agentID == "" {
		return fmt.Errorf("no agent ID in the agent's ready line: %s", line)
	}
	return nil
}

func (w *world) agentFlags() []string {
	return []string{
		"--trust-domain", trustDomain, "--server", w.address, "--join", w.join, "--data-dir", w.path("agent"),
		"--socket", w.socket(), "--tpm", "unix:" + w.path("tpm.sock"), "--recorder-group", "none",
	}
}

// close ends what was started and removes the directory.
func (w *world) close(logs bool) error {
	if w.admin != nil {
		w.admin.Close()
	}
	for i := len(w.daemons) - 1; i >= 0; i-- {
		d := w.daemons[i]
		d.stop()
		if text := bytes.TrimSpace(d.text()); logs && len(text) > 0 {
			fmt.Fprintf(os.Stderr, "--- log of %s\n%s\n", d.name, text[max(0, len(text)-4000):])
		}
	}
	return os.RemoveAll(w.dir)
}

// daemon is a process that runs until stop.
type daemon struct {
	name string
	cmd  *exec.Cmd
	log  string
	done chan struct{}
}

func (w *world) launch(name, program string, args ...string) (*daemon, error) {
	d := &daemon{name: name, cmd: exec.Command(program, args...), log: w.path(fmt.Sprintf("%s.%d.log", name, len(w.daemons))), done: make(chan struct{})}
	f, err := os.Create(d.log)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	d.cmd.Stdout, d.cmd.Stderr = f, f
	// A group of its own: ^C on the terminal is ours to act on, in order.
	// If we are killed it dies with the thread that started it, which stays
	// with it for that.
	d.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	started := make(chan error)
	go func() {
		runtime.LockOSThread()
		defer close(d.done)
		err := d.cmd.Start()
		started <- err
		if err == nil {
			_ = d.cmd.Wait()
		}
	}()
	if err := <-started; err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	w.daemons = append(w.daemons, d)
	return d, nil
}

func (d *daemon) text() []byte {
	b, _ := os.ReadFile(d.log)
	return b
}

// ready returns the line that says that the daemon is.
func (d *daemon) ready() (line string, err error) {
	err = d.until(func() bool {
		for l := range bytes.Lines(d.text()) {
			if bytes.Contains(l, []byte(": ready: ")) {
				line = string(l)
			}
		}
		return line != ""
	})
	return line, err
}

// until polls for what a daemon has no other way to say.
func (d *daemon) until(ok func() bool) error {
	deadline := time.After(startTimeout)
	for !ok() {
		select {
		case <-d.done:
			return fmt.Errorf("%s ended: %s", d.name, d.text())
		case <-deadline:
			return fmt.Errorf("%s is not ready: %s", d.name, d.text())
		case <-time.After(2 * time.Millisecond):
		}
	}
	return nil
}

func (d *daemon) stop() {
	_ = d.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-d.done:
	case <-time.After(stopTimeout):
		_ = d.cmd.Process.Kill()
		<-d.done
	}
}

// create makes an entry below the agent and returns its ID.
func (w *world) create(ctx context.Context, path string, selectors ...string) (string, error) {
	e := &types.Entry{SpiffeId: &types.SPIFFEID{TrustDomain: trustDomain, Path: path}}
	td, agent, _ := strings.Cut(strings.TrimPrefix(w.agentID, "spiffe://"), "/")
	e.ParentId = &types.SPIFFEID{TrustDomain: td, Path: "/" + agent}
	for _, s := range selectors {
		typ, value, _ := strings.Cut(s, ":")
		e.Selectors = append(e.Selectors, &types.Selector{Type: typ, Value: value})
	}
	resp, err := w.entries.BatchCreateEntry(ctx, &entryv1.BatchCreateEntryRequest{Entries: []*types.Entry{e}})
	if err != nil {
		return "", err
	}
	r := resp.GetResults()[0]
	if r.GetStatus().GetCode() != 0 {
		return "", fmt.Errorf("create entry: %s", r.GetStatus().GetMessage())
	}
	return r.GetEntry().GetId(), nil
}

// createStep makes an entry for steps of tool, recorded by recorder.
func (w *world) createStep(ctx context.Context, path, recorder, tool string) error {
	r, err := hashFile(recorder)
	if err != nil {
		return err
	}
	t, err := hashFile(tool)
	if err != nil {
		return err
	}
	_, err = w.create(ctx, path, "binary:recorder_unprotected:sha256:"+r, "binary:tool:sha256:"+t)
	return err
}

func hashFile(name string) (string, error) {
	f, err := os.Open(name)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", err
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// dial opens a connection to the agent's socket when it is first used.
func dial(socket string) (*grpc.ClientConn, error) {
	return grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithAuthority("localhost"))
}

// withHeader adds what the SPIFFE Workload Endpoint specification demands of
// clients.
func withHeader(ctx context.Context) context.Context {
	return metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", "true")
}

// fetch is one call of FetchX509SVID on a new connection, as a workload makes.
func fetch(ctx context.Context, socket string) (*workloadpb.X509SVIDResponse, error) {
	c, err := dial(socket)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	ctx, cancel := context.WithTimeout(withHeader(ctx), 30*time.Second)
	defer cancel()
	s, err := workloadpb.NewSpiffeWorkloadAPIClient(c).FetchX509SVID(ctx, &workloadpb.X509SVIDRequest{})
	if err != nil {
		return nil, err
	}
	return s.Recv()
}
