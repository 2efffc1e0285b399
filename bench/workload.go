package main

import (
	"bufio"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"time"

	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	"github.com/rootlink/rootlink/bench/figures"
)

// workloadMain is a workload: for each line "svid" or "health" on stdin it
// makes that call on a new connection and prints how long it took, in ns.
func workloadMain(args []string) error {
	if len(args) != 1 {
		return errors.New("usage: bench workload SOCKET")
	}
	in := bufio.NewScanner(os.Stdin)
	fmt.Println("up")
	for in.Scan() {
		start := time.Now()
		var err error
		if in.Text() == "health" {
			err = health(args[0])
		} else {
			_, err = fetch(context.Background(), args[0])
		}
		took := time.Since(start)
		if err != nil {
			return err
		}
		fmt.Println(took.Nanoseconds())
	}
	return in.Err()
}

func health(socket string) error {
	c, err := dial(socket)
	if err != nil {
		return err
	}
	defer c.Close()
	_, err = healthpb.NewHealthClient(c).Check(withHeader(context.Background()), &healthpb.HealthCheckRequest{})
	return err
}

// workload is such a process, seen from outside.
type workload struct {
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Reader
}

func startWorkload(program, socket string) (*workload, error) {
	w := &workload{cmd: exec.Command(program, roleWorkload, socket)}
	var err error
	if w.in, err = w.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := w.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	w.out = bufio.NewReader(out)
	w.cmd.Stderr = os.Stderr
	if err := w.cmd.Start(); err != nil {
		return nil, err
	}
	if _, err := w.out.ReadString('\n'); err != nil {
		w.stop()
		return nil, fmt.Errorf("the workload did not start: %w", err)
	}
	return w, nil
}

// ask makes one call and returns how long the workload waited.
func (w *workload) ask(what string) (time.Duration, error) {
	if _, err := io.WriteString(w.in, what+"\n"); err != nil {
		return 0, err
	}
	line, err := w.out.ReadString('\n')
	if err != nil {
		return 0, fmt.Errorf("the workload got no answer: %w", err)
	}
	ns, err := strconv.ParseInt(strings.TrimSpace(line), 10, 64)
	return time.Duration(ns), err
}

func (w *workload) stop() {
	w.in.Close()
	_ = w.cmd.Process.Kill()
	_ = w.cmd.Wait()
}

// copyOfSelf makes an executable of its own content, this program with random
// bytes behind it, of at least size bytes.
func (w *world) copyOfSelf(name string, size int64) (path string, err error) {
	src, err := os.Open(w.self)
	if err != nil {
		return "", err
	}
	defer src.Close()
	path = w.path(name)
	dst, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o700)
	if err != nil {
		return "", err
	}
	n, err := io.Copy(dst, src)
	if err == nil {
		_, err = io.CopyN(dst, rand.Reader, max(32, size-n))
	}
	return path, errors.Join(err, dst.Close())
}

// settle waits until a file is old enough that its times say whether it
// changes: only then is its hash remembered.
func settle(path string) error {
	st, err := os.Stat(path)
	if err != nil {
		return err
	}
	time.Sleep(time.Until(st.ModTime().Add(3 * time.Second)))
	return nil
}

// newEntry: a program that the agent has never seen runs already; its entry is
// made, and it asks for its SVID at once.
func newEntry(ctx context.Context, b *bench) error {
	const n = 15
	var all, creates figures.Samples
	var exe int64
	for i := range n {
		program, err := b.copyOfSelf("new"+strconv.Itoa(i), 0)
		if err != nil {
			return err
		}
		hash, err := hashFile(program)
		if err != nil {
			return err
		}
		w, err := startWorkload(program, b.socket())
		if err != nil {
			return err
		}
		start := time.Now()
		_, err = b.create(ctx, fmt.Sprintf("/new/%d", i), "binary:sha256:"+hash)
		created := time.Since(start)
		if err == nil {
			_, err = w.ask("svid")
		}
		took := time.Since(start)
		w.stop()
		if err != nil {
			return err
		}
		if st, err := os.Stat(program); err == nil {
			exe = st.Size()
		}
		os.Remove(program)
		all, creates = append(all, took), append(creates, created)
		time.Sleep(100 * time.Millisecond) // syncs that workloads cause keep a distance
	}
	b.out.Most("entry created → SVID held by the workload", all, 100*time.Millisecond,
		fmt.Sprintf("stock SPIRE 6.4 s (recorded elsewhere); of it the entry, on disk: %s; SHA-256 of its %s here: %s",
			figures.Short(creates.Median()), figures.Bytes(exe), figures.Short(hashTime(exe))))
	return nil
}

// warmSVID: a program of 90 MiB asks again and again.
func warmSVID(ctx context.Context, b *bench) error {
	const exe, n = 90 << 20, 300
	program, err := b.copyOfSelf("big", exe)
	if err != nil {
		return err
	}
	defer os.Remove(program)
	hash, err := hashFile(program)
	if err != nil {
		return err
	}
	if err := settle(program); err != nil {
		return err
	}
	w, err := startWorkload(program, b.socket())
	if err != nil {
		return err
	}
	defer w.stop()
	if _, err := b.create(ctx, "/big", "binary:sha256:"+hash); err != nil {
		return err
	}
	first, err := w.ask("svid")
	if err != nil {
		return err
	}
	var warm, floor figures.Samples
	for range n {
		d, err := w.ask("svid")
		if err != nil {
			return err
		}
		warm = append(warm, d)
		if d, err = w.ask("health"); err != nil {
			return err
		}
		floor = append(floor, d)
	}
	b.out.Most("warm SVID, executable of 90 MiB", warm, 3*time.Millisecond,
		fmt.Sprintf("stock SPIRE 59 ms (recorded elsewhere); a health call, new connection too: %s; first SVID %s; SHA-256 of 90 MiB: %s",
			figures.Short(floor.Median()), figures.Short(first), figures.Short(hashTime(exe))))
	return nil
}

// hashTime is how long one core hashes n bytes that lie in memory.
func hashTime(n int64) time.Duration {
	buf := make([]byte, 1<<20)
	var s figures.Samples
	for range 3 {
		start := time.Now()
		h := sha256.New()
		for left := n; left > 0; left -= int64(len(buf)) {
			h.Write(buf[:min(left, int64(len(buf)))])
		}
		h.Sum(nil)
		s = append(s, time.Since(start))
	}
	return s.Median()
}
