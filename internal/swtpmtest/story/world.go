package story

import (
	"bytes"
	"context"
	"crypto/sha256"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/rootlink/rootlink/internal/swtpmtest"
)

// How long a daemon may take, and whatever comes true by itself.
const (
	StartTimeout = 30 * time.Second
	StopTimeout  = 15 * time.Second
)

// World is what a story runs in: TPMs, and daemons that end with it.
type World struct {
	Programs
	t       *testing.T
	tmp     string // the daemons' $TMPDIR
	maker   *swtpmtest.Maker
	tpms    map[string]*swtpmtest.TPM
	daemons map[string]*daemon
}

type daemon struct {
	name string
	args []string // as started, so that it can be started again
	cmd  *exec.Cmd
	log  string
	last []byte // of the log, once the story has ended
	done chan struct{}
}

func newWorld(t *testing.T, p Programs) *World {
	w := &World{Programs: p, t: t, tpms: map[string]*swtpmtest.TPM{}, daemons: map[string]*daemon{}}
	t.Cleanup(func() {
		for _, d := range w.daemons {
			if t.Failed() {
				t.Logf("--- log of %s\n%s", d.name, d.last)
			}
		}
	})
	return w
}

// end stops the daemons and keeps their last words: the story's directory goes
// before it is known whether the story failed.
func (w *World) end() {
	for _, d := range w.daemons {
		d.stop(syscall.SIGKILL)
		text, _ := os.ReadFile(d.log)
		d.last = tail(text, 6000)
	}
}

func tail(b []byte, n int) []byte {
	if len(b) > n {
		return b[len(b)-n:]
	}
	return b
}

func (w *World) setup(env *testscript.Env) error {
	swtpmtest.AtDeath(w.t, `rm -rf "$1"; rmdir "${1%/*}"`, env.WorkDir)
	// What a daemon that is killed leaves, such as its plugins' sockets, goes
	// with the story. Their paths have to be short, and any user's daemon writes.
	var err error
	if w.tmp, err = os.MkdirTemp("", "rl"); err != nil {
		return err
	}
	swtpmtest.AtDeath(w.t, `rm -rf "$1"`, w.tmp)
	env.Defer(func() { _ = os.RemoveAll(w.tmp) })
	if err := os.Chmod(w.tmp, 0o777|os.ModeSticky); err != nil {
		return err
	}
	env.Defer(w.end)
	env.Setenv("PATH", w.Bin+":"+w.Helpers+":"+env.Getenv("PATH"))
	env.Setenv("TD", "example.org")
	env.Setenv("ADMIN", filepath.Join(env.WorkDir, "admin.sock"))
	env.Setenv("SOCKET", filepath.Join(env.WorkDir, "agent.sock"))
	env.Setenv("SPIFFE_ENDPOINT_SOCKET", "unix://"+filepath.Join(env.WorkDir, "agent.sock"))
	env.Setenv("ROOTLINK_ADMIN_SOCKET", filepath.Join(env.WorkDir, "admin.sock"))
	env.Setenv("XDG_STATE_HOME", filepath.Join(env.WorkDir, ".state"))
	env.Setenv("GOTOOLCHAIN", "local")
	env.Setenv("GOFLAGS", "-buildvcs=false")
	for _, name := range []string{"GOCACHE", "GOROOT", "GOPATH", "GOMODCACHE"} {
		out, err := exec.Command("go", "env", name).Output()
		if err != nil {
			return err
		}
		env.Setenv(name, strings.TrimSpace(string(out)))
	}
	return nil
}

func (w *World) commands() map[string]Command {
	return map[string]Command{
		"tpm":     w.cmdTPM,
		"daemon":  w.cmdDaemon,
		"server":  w.cmdServer,
		"agent":   w.cmdAgent,
		"capture": cmdCapture,
		"retry":   cmdRetry,
		"flip":    cmdFlip,
		"enroll":  cmdEnroll,
		"logged":  w.cmdLogged,
		"exits":   cmdExits,
		"refused": cmdRefused,
		"ends":    w.cmdEnds,
		"holds":   cmdHolds,
		"own":     cmdOwn,
		"smallfs": cmdSmallFS,
		"public":  w.cmdPublic,
		"post":    cmdPost,
		"json":    cmdJSON,
		"splice":  cmdSplice,
		"maker":   w.cmdMaker,
	}
}

// tpm start [NAME [KIND]] | extend NAME PCR TEXT |
// reboot|powercut|clear|lockout|off|on|share NAME
//
// start sets $TPM_NAME (the --tpm flag) and $TCTI_NAME (for tpm2-tools); NAME is
// "tpm" by default, then the variables are $TPM and $TCTI. $MAKER is a PEM file
// with the roots of the one maker of a story's TPMs.
func (w *World) cmdTPM(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) == 0 {
		ts.Fatalf("usage: tpm start|extend|reboot|powercut|clear|lockout [NAME] …")
	}
	name := "tpm"
	if len(args) > 1 {
		name = args[1]
	}
	suffix := ""
	if name != "tpm" {
		suffix = "_" + strings.ToUpper(name)
	}
	if args[0] == "start" {
		kind := "p256"
		if len(args) > 2 {
			kind = args[2]
		}
		w.startTPM(ts, name, kind)
		ts.Setenv("TPM"+suffix, w.tpms[name].Device())
		ts.Setenv("TCTI"+suffix, w.tpms[name].TCTI())
		return
	}
	tpm := w.tpms[name]
	if tpm == nil {
		ts.Fatalf("no TPM %q", name)
	}
	switch {
	case args[0] == "extend" && len(args) == 4:
		pcr, err := strconv.Atoi(args[2])
		ts.Check(err)
		tpm.Extend(uint32(pcr), sha256.Sum256([]byte(args[3])))
	case args[0] == "reboot":
		tpm.Restart()
	case args[0] == "powercut":
		tpm.RestartUnclean()
	case args[0] == "lockout":
		tpm.Lockout()
	case args[0] == "clear":
		tpm.Clear()
	case args[0] == "off":
		tpm.Stop()
	case args[0] == "on":
		tpm.Resume()
	case args[0] == "share": // with every user of the host
		ts.Check(os.Chmod(filepath.Dir(tpm.Socket()), 0o755))
		ts.Check(os.Chmod(tpm.Socket(), 0o666))
	default:
		ts.Fatalf("unknown: tpm %s", strings.Join(args, " "))
	}
}

func (w *World) startTPM(ts *testscript.TestScript, name, kind string) {
	kinds := map[string]swtpmtest.EKKind{
		"p256": swtpmtest.ECCP256, "rsa2048": swtpmtest.RSA2048, "p384": swtpmtest.ECCP384, "none": swtpmtest.NoEK,
	}
	var options []swtpmtest.Option
	if kind == "tcp" { // a P-256 EK, and the device at a TCP port
		kind, options = "p256", append(options, swtpmtest.WithTCP())
	}
	ek, ok := kinds[kind]
	if !ok {
		ts.Fatalf("unknown kind of EK %q", kind)
	}
	if w.maker == nil {
		w.maker = swtpmtest.NewMaker(w.t, "Story TPM Maker")
		maker := ts.MkAbs("maker.pem")
		ts.Check(os.WriteFile(maker, append(w.maker.RootPEM(), w.maker.IntermediatePEM()...), 0o600))
		ts.Setenv("MAKER", maker)
	}
	options = append(options, swtpmtest.WithMaker(w.maker), swtpmtest.WithEK(ek))
	w.tpms[name] = swtpmtest.Start(w.t, options...)
}

// server start [ARGS…]: starts rootlink-server on a free port with $MAKER's
// roots, waits until it is ready and sets $SERVER and $HTTP, the base URL of its
// HTTP port. A later start reuses the data directory and the ports.
func (w *World) cmdServer(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) == 0 || args[0] != "start" {
		w.control(ts, "server", args)
		return
	}
	listen, web := "127.0.0.1:0", "127.0.0.1:0"
	if was := ts.Getenv("SERVER"); was != "" {
		listen, web = was, strings.TrimPrefix(ts.Getenv("HTTP"), "http://")
	}
	argv := append([]string{
		"rootlink-server", "run", "--trust-domain", ts.Getenv("TD"), "--data-dir", ts.MkAbs("server"),
		"--listen", listen, "--http-listen", web, "--admin-socket", ts.Getenv("ADMIN"), "--ek-roots", ts.Getenv("MAKER"), "--log-level", "debug",
		// Stories attest more often than a machine does.
		"--attest-rate", "100", "--attest-burst", "100",
	}, args[1:]...)
	d := w.start(ts, "server", argv)
	line := d.readyLine(ts)
	address := regexp.MustCompile(`127\.0\.0\.1:[0-9]+`).FindString(line)
	if address == "" {
		ts.Fatalf("no address in the server's ready line")
	}
	ts.Setenv("SERVER", address)
	if m := regexp.MustCompile(`HTTP port (127\.0\.0\.1:[0-9]+)`).FindStringSubmatch(line); m != nil {
		ts.Setenv("HTTP", "http://"+m[1])
	}
}

// agent start [NAME [ARGS…]]: starts rootlink-agent with a join line, on $TPM
// (or $TPM_NAME), with its socket at $SOCKET (or NAME.sock), and waits until
// it is ready; launch does not wait.
func (w *World) cmdAgent(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) == 0 || args[0] != "start" && args[0] != "launch" {
		w.control(ts, "agent", args)
		return
	}
	name, tpm, socket := "agent", ts.Getenv("TPM"), ts.Getenv("SOCKET")
	rest := args[1:]
	if len(rest) > 0 && !strings.HasPrefix(rest[0], "-") {
		name, rest = rest[0], rest[1:]
		if name != "agent" {
			if own := ts.Getenv("TPM_" + strings.ToUpper(name)); own != "" {
				tpm = own
			}
			socket = ts.MkAbs(name + ".sock")
		}
	}
	join, err := exec.Command(filepath.Join(w.Bin, "rootlink-server"), "join-line", "--admin-socket", ts.Getenv("ADMIN")).Output()
	ts.Check(err)
	argv := append([]string{
		"rootlink-agent", "run", "--trust-domain", ts.Getenv("TD"), "--server", ts.Getenv("SERVER"),
		"--join", strings.TrimSpace(string(join)), "--data-dir", ts.MkAbs(name), "--socket", socket, "--tpm", tpm, "--log-level", "debug",
		// Nor do they wait as long for news.
		"--sync-interval", "500ms",
	}, rest...)
	d := w.start(ts, name, argv)
	if args[0] == "start" {
		d.readyLine(ts)
	}
}

// daemon start NAME COMMAND… | stop NAME | kill NAME | wait NAME
func (w *World) cmdDaemon(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) > 2 && args[0] == "start" {
		w.start(ts, args[1], args[2:])
		return
	}
	if len(args) == 2 {
		w.control(ts, args[1], args[:1])
		return
	}
	ts.Fatalf("usage: daemon start NAME COMMAND… | stop NAME | kill NAME | wait NAME")
}

// control: stop ends it kindly, kill does not, wait waits for its own end.
func (w *World) control(ts *testscript.TestScript, name string, args []string) {
	if len(args) == 2 {
		name = args[1]
	}
	d := w.daemons[name]
	if d == nil || len(args) == 0 {
		ts.Fatalf("no daemon %q", name)
	}
	switch args[0] {
	case "stop":
		d.stop(syscall.SIGTERM)
		if code := d.cmd.ProcessState.ExitCode(); code != 0 {
			ts.Fatalf("%s ended with exit code %d after SIGTERM", name, code)
		}
	case "kill":
		d.stop(syscall.SIGKILL)
	case "wait":
		d.wait(ts)
	default:
		ts.Fatalf("unknown: %s", strings.Join(args, " "))
	}
}

func (w *World) start(ts *testscript.TestScript, name string, argv []string) *daemon {
	if d := w.daemons[name]; d != nil {
		select {
		case <-d.done:
		default:
			ts.Fatalf("%s runs already", name)
		}
	}
	d := &daemon{name: name, args: argv, log: ts.MkAbs(name + ".log"), done: make(chan struct{})}
	logFile, err := os.Create(d.log)
	ts.Check(err)
	program := argv[0]
	if strings.HasPrefix(program, "rootlink") {
		program = filepath.Join(w.Bin, program)
	}
	d.cmd = exec.Command(program, argv[1:]...)
	d.cmd.Dir = ts.MkAbs(".")
	d.cmd.Stdout, d.cmd.Stderr = logFile, logFile
	d.cmd.Env = append(os.Environ(), "XDG_STATE_HOME="+ts.Getenv("XDG_STATE_HOME"), "PATH="+ts.Getenv("PATH"), "TMPDIR="+w.tmp)
	// Dies with us, whatever we die of: with the thread that started it, which
	// therefore stays with it.
	d.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	started := make(chan error)
	w.daemons[name] = d
	go func() {
		runtime.LockOSThread()
		err := d.cmd.Start()
		started <- err
		if err == nil {
			_ = d.cmd.Wait()
		}
		logFile.Close()
		close(d.done)
	}()
	ts.Check(<-started)
	return d
}

// readyLine waits for the line that says that the daemon is ready.
func (d *daemon) readyLine(ts *testscript.TestScript) string {
	ctx, cancel := context.WithTimeout(context.Background(), StartTimeout)
	defer cancel()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		text, _ := os.ReadFile(d.log)
		for line := range bytes.Lines(text) {
			if bytes.Contains(line, []byte("ready")) {
				return string(line)
			}
		}
		select {
		case <-d.done:
			ts.Fatalf("%s ended before it was ready:\n%s", d.name, tail(text, 3000))
		case <-ctx.Done():
			ts.Fatalf("%s is not ready:\n%s", d.name, tail(text, 3000))
		case <-tick.C:
		}
	}
}

func (d *daemon) stop(sig syscall.Signal) {
	select {
	case <-d.done:
		return
	default:
	}
	_ = d.cmd.Process.Signal(sig)
	select {
	case <-d.done:
	case <-time.After(StopTimeout):
		_ = d.cmd.Process.Kill()
		<-d.done
	}
}

func (d *daemon) wait(ts *testscript.TestScript) {
	select {
	case <-d.done:
	case <-time.After(StartTimeout):
		ts.Fatalf("%s still runs", d.name)
	}
}

// logged [!] NAME REGEXP: the daemon's log has (or comes to have) such a line.
func (w *World) cmdLogged(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) != 2 {
		ts.Fatalf("usage: logged NAME REGEXP")
	}
	d := w.daemons[args[0]]
	if d == nil {
		ts.Fatalf("no daemon %q", args[0])
	}
	re := regexp.MustCompile(args[1])
	seen := func() bool {
		text, _ := os.ReadFile(d.log)
		return re.Match(text)
	}
	if neg {
		if seen() {
			ts.Fatalf("the log of %s matches %q", args[0], args[1])
		}
		return
	}
	if !Poll(StartTimeout, seen) {
		ts.Fatalf("the log of %s has nothing that matches %q", args[0], args[1])
	}
}

// Poll asks until it is so, for no longer than limit.
func Poll(limit time.Duration, ok func() bool) bool {
	deadline := time.After(limit)
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-deadline:
			return false
		case <-tick.C:
		}
	}
	return true
}

// capture VAR REGEXP: the first match (or its first group) in the last
// command's stdout becomes $VAR.
func cmdCapture(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: capture VAR REGEXP")
	}
	m := regexp.MustCompile(args[1]).FindStringSubmatch(ts.ReadFile("stdout"))
	if m == nil {
		ts.Fatalf("stdout has nothing that matches %q", args[1])
	}
	ts.Setenv(args[0], strings.TrimSpace(m[len(m)-1]))
}

// retry COMMAND…: runs it until it succeeds (or, with !, fails), for what
// becomes true a moment later, such as a node's next attestation.
func cmdRetry(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) > 0 && args[0] == "exec" { // so that a story reads like the line without retry
		args = args[1:]
	}
	if len(args) == 0 {
		ts.Fatalf("usage: retry [exec] COMMAND…")
	}
	ok := Poll(StartTimeout, func() bool { return (ts.Exec(args[0], args[1:]...) == nil) != neg })
	if !ok {
		ts.Fatalf("it never came true: %s", strings.Join(args, " "))
	}
}

// flip FILE: changes one byte in the middle.
func cmdFlip(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: flip FILE")
	}
	file := ts.MkAbs(args[0])
	info, err := os.Stat(file)
	ts.Check(err)
	b, err := os.ReadFile(file)
	ts.Check(err)
	b[len(b)/2] ^= 1
	ts.Check(os.WriteFile(file, b, info.Mode()))
}

// enroll ID PARENT COMMAND…: asks whoami what COMMAND would be, and pastes the
// entry create line that it prints, with the given SPIFFE ID and parent
// ("-" keeps the parent that whoami names).
func cmdEnroll(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 3 {
		ts.Fatalf("usage: enroll ID PARENT COMMAND…")
	}
	// Nothing matches yet, so whoami ends with the policy exit code.
	_ = ts.Exec("rootlink", append([]string{"whoami", "--"}, args[2:]...)...)
	m := regexp.MustCompile(`rootlink-server entry create .*`).FindString(ts.ReadFile("stdout"))
	if m == "" {
		ts.Fatalf("whoami printed no entry create line")
	}
	line := m + " --spiffe-id " + args[0]
	if args[1] != "-" {
		line += " --parent-id " + args[1]
	}
	ts.Check(ts.Exec("sh", "-c", line+" --admin-socket "+ts.Getenv("ADMIN")))
}
