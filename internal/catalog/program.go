package catalog

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// maxProgram is the largest program in bytes that is hashed.
	maxProgram = 1 << 30
	// drainOutput is how long what a plugin wrote last is still read when it has
	// ended. A child that it left behind could keep the pipes open for ever.
	drainOutput = time.Second
)

// ErrChecksum means that a plugin's program is not the one that was pinned.
var ErrChecksum = errors.New("the program is not the one that plugin_checksum pins")

// ErrOpenProgram means that others could replace a program that nothing pins.
var ErrOpenProgram = errors.New("the program can be replaced by others and plugin_checksum does not pin it")

// program is one run of an external plugin's executable; it is go-plugin's
// Runner. That of go-plugin notices the end of a process only when everybody
// who has its pipes has closed them, and runs whatever is at the path a moment
// after it was hashed.
type program struct {
	path string // absolute
	args []string
	sum  *[sha256.Size]byte // nil when nothing is pinned

	file   *os.File // the executable, until it runs
	digest [sha256.Size]byte

	env            []string
	cmd            *exec.Cmd
	stdout, stderr *os.File // our ends of the pipes
	exited         chan struct{}

	mu     sync.Mutex
	pid    int   // 0 before the start, and after the end, when it may be another's
	killed bool  // also before the start
	err    error // how it ended; read after exited
}

// openProgram hashes the executable. Nothing has run yet when it fails.
func openProgram(path string, args []string, sum *[sha256.Size]byte) (*program, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return nil, err
	}
	// Not blocking: a named pipe would wait for a writer.
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	p := &program{path: path, args: args, sum: sum, file: f, exited: make(chan struct{})}
	if err := p.check(); err != nil {
		f.Close()
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return p, nil
}

func (p *program) check() error {
	st, err := p.file.Stat()
	switch {
	case err != nil:
		return err
	case !st.Mode().IsRegular():
		return errors.New("not a regular file")
	case st.Size() > maxProgram:
		return fmt.Errorf("larger than %d bytes", maxProgram)
	}
	if p.digest, err = p.hash(); err != nil {
		return err
	}
	if p.sum != nil {
		if subtle.ConstantTimeCompare(p.digest[:], p.sum[:]) != 1 {
			return fmt.Errorf("%w: it is %x, not %x", ErrChecksum, p.digest, p.sum[:])
		}
		return nil
	}
	// Who can rename in its directory replaces it as well as who can write to it.
	dir, err := os.Stat(filepath.Dir(p.path))
	if err != nil {
		return err
	}
	if othersCanChange(st) || othersCanChange(dir) && dir.Mode()&os.ModeSticky == 0 {
		return ErrOpenProgram
	}
	return nil
}

func othersCanChange(st os.FileInfo) bool {
	owner := st.Sys().(*syscall.Stat_t).Uid
	return st.Mode().Perm()&0o002 != 0 || owner != 0 && int(owner) != os.Geteuid()
}

func (p *program) hash() (sum [sha256.Size]byte, err error) {
	h := sha256.New()
	if _, err := io.Copy(h, io.NewSectionReader(p.file, 0, maxProgram)); err != nil {
		return sum, err
	}
	h.Sum(sum[:0])
	return sum, nil
}

// Start runs it. The error is about this program; go-plugin only passes it on.
func (p *program) Start(context.Context) error {
	defer p.file.Close()
	stdout, out, err := os.Pipe()
	if err != nil {
		return err
	}
	defer out.Close()
	p.stdout = stdout
	stderr, errs, err := os.Pipe()
	if err != nil {
		return err
	}
	defer errs.Close()
	p.stderr = stderr
	p.cmd = &exec.Cmd{
		Path: p.path, Args: append([]string{p.path}, p.args...), Env: p.env, Stdout: out, Stderr: errs,
		// A group of its own: ^C at a terminal is for the daemon, which ends its
		// plugins in good order.
		SysProcAttr: &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL},
	}
	if p.sum != nil {
		// The very file that was hashed, whatever has been put at the path since.
		p.cmd.Path, p.cmd.ExtraFiles = "/proc/self/fd/3", []*os.File{p.file}
	}
	started := make(chan error, 1)
	go p.live(started)
	if err := <-started; err != nil {
		p.closePipes()
		return err
	}
	if p.sum == nil {
		return nil
	}
	// While it runs nobody can write to it, so now its content is settled. It
	// may have been written to between the hash and the start.
	if sum, err := p.hash(); err != nil || sum != *p.sum {
		p.kill()
		return errors.Join(fmt.Errorf("%w: it was changed while it was started", ErrChecksum), err)
	}
	return nil
}

// live starts the process and stays for its life. The thread must: the kernel
// sends the signal for a dead parent when the thread that forked ends.
func (p *program) live(started chan<- error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := p.cmd.Start(); err != nil {
		started <- err
		close(p.exited)
		return
	}
	pid := p.cmd.Process.Pid
	p.mu.Lock()
	p.pid = pid
	if p.killed {
		unix.Kill(-pid, unix.SIGKILL)
	}
	p.mu.Unlock()
	started <- nil
	// Not reaped yet: until then the group's number cannot become another's.
	for {
		err := unix.Waitid(unix.P_PID, pid, nil, unix.WEXITED|unix.WNOWAIT, nil)
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	p.mu.Lock()
	unix.Kill(-pid, unix.SIGKILL) // whoever it left behind
	p.pid = 0
	p.mu.Unlock()
	p.err = p.cmd.Wait()
	close(p.exited)
	time.AfterFunc(drainOutput, p.closePipes)
}

func (p *program) closePipes() {
	for _, f := range []*os.File{p.stdout, p.stderr} {
		if f != nil {
			f.Close()
		}
	}
}

// kill ends the process and its group at once. It never waits.
func (p *program) kill() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.killed = true
	if p.pid != 0 {
		unix.Kill(-p.pid, unix.SIGKILL)
	}
}

// ended says how it ended; only after exited.
func (p *program) ended() string {
	if p.err != nil {
		return p.err.Error()
	}
	return "exit status 0"
}

func (p *program) digestHex() string { return hex.EncodeToString(p.digest[:]) }

// The rest of go-plugin's Runner.

func (p *program) Wait(context.Context) error {
	<-p.exited
	return p.err
}

func (p *program) Kill(context.Context) error {
	p.kill()
	return nil
}

func (p *program) Stdout() io.ReadCloser           { return p.stdout }
func (p *program) Stderr() io.ReadCloser           { return p.stderr }
func (p *program) Name() string                    { return p.path }
func (p *program) Diagnose(context.Context) string { return "" }

func (p *program) ID() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return strconv.Itoa(p.pid) // never empty: go-plugin would leave its directory behind
}

// PluginToHost keeps a plugin from sending the host to any address but a socket
// in the file system.
func (p *program) PluginToHost(network, addr string) (string, string, error) {
	if network != "unix" {
		return "", "", fmt.Errorf("the plugin listens on %.20q, not on a Unix socket", network)
	}
	return network, addr, nil
}

func (p *program) HostToPlugin(network, addr string) (string, string, error) {
	return network, addr, nil
}
