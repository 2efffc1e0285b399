package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"github.com/rootlink/rootlink/bench/figures"
)

// tool is the cheapest thing that can be recorded.
func tool() (string, error) { return exec.LookPath("true") }

const stepPath = "/step"

// enrolStep makes the entry that stepCosts, verifyCosts and recording use.
func (b *bench) enrolStep(ctx context.Context) error {
	if b.enrolled {
		return nil
	}
	t, err := tool()
	if err != nil {
		return err
	}
	if err := b.createStep(ctx, stepPath, b.program("rootlink"), t); err != nil {
		return err
	}
	b.enrolled = true
	return os.WriteFile(b.path("product"), []byte("a product\n"), 0o600)
}

// unstamped keeps `rootlink run` from asking for the time and for a log entry.
var unstamped = []string{"--timestamp-url", "none", "--log-url", "none"}

// runStep runs `rootlink run` of true in the world's directory.
func (b *bench) runStep(ctx context.Context, args ...string) (*run, error) {
	t, err := tool()
	if err != nil {
		return nil, err
	}
	args = append(append([]string{"run", "--step", "bench", "--bundle-out", b.path("step.sigstore.json")}, args...), "--", t)
	return timed(exec.CommandContext(ctx, b.program("rootlink"), args...), b.dir, "SPIFFE_ENDPOINT_SOCKET=unix://"+b.socket())
}

// run is how a command went.
type run struct {
	took time.Duration
	cpu  time.Duration // of itself and what it waited for
	peak int64         // resident bytes
}

func timed(c *exec.Cmd, dir string, env ...string) (*run, error) {
	c.Dir, c.Env = dir, append(os.Environ(), env...)
	stderr, err := os.CreateTemp(dir, "stderr")
	if err != nil {
		return nil, err
	}
	defer os.Remove(stderr.Name())
	defer stderr.Close()
	c.Stderr = stderr
	start := time.Now()
	err = c.Run()
	took := time.Since(start)
	if err != nil {
		text, _ := os.ReadFile(stderr.Name())
		return nil, fmt.Errorf("%s: %w\n%s", c.Path, err, text)
	}
	p := c.ProcessState
	return &run{took: took, cpu: p.UserTime() + p.SystemTime(), peak: p.SysUsage().(*syscall.Rusage).Maxrss << 10}, nil
}

// stepCosts: `rootlink run -- true` and `true`, in turns.
func stepCosts(ctx context.Context, b *bench) error {
	if err := b.enrolStep(ctx); err != nil {
		return err
	}
	t, err := tool()
	if err != nil {
		return err
	}
	const n = 60
	var more, stamped, alone, empty, cpu, disk figures.Samples
	for i := range n + 3 {
		with, err := b.runStep(ctx, append([]string{"--products", "product"}, unstamped...)...)
		if err != nil {
			return err
		}
		all, err := b.runStep(ctx, "--products", "product")
		if err != nil {
			return err
		}
		without, err := timed(exec.CommandContext(ctx, t), b.dir)
		if err != nil {
			return err
		}
		start, err := timed(exec.CommandContext(ctx, b.program("rootlink"), "--version"), b.dir)
		if err != nil {
			return err
		}
		if i < 3 { // the agent has to hash both programs once
			continue
		}
		sync, err := repeat(1, func() error { return writeDurably(b.path("written"), make([]byte, 8<<10)) })
		if err != nil {
			return err
		}
		disk = append(disk, sync...)
		more, alone, empty = append(more, with.took-without.took), append(alone, without.took), append(empty, start.took)
		stamped, cpu = append(stamped, all.took-with.took), append(cpu, with.cpu)
	}
	b.out.Most("rootlink run -- true, more than true", more, 30*time.Millisecond,
		fmt.Sprintf("true alone: %s; writing such a bundle to disk: %s; rootlink --version, and a run starts itself twice: %s; CPU time of a run: %s",
			figures.Short(alone.Median()), figures.Short(disk.Median()), figures.Short(empty.Median()), figures.Short(cpu.Median())))
	b.out.Most("with a timestamp and a log entry, more than that", stamped, 0,
		"the log publishes a checkpoint every 100 ms at most, and the entry waits for one")
	return nil
}

// writeDurably writes a file as rootlink does its bundles: synced, put in place
// by rename, and the directory synced.
func writeDurably(path string, content []byte) error {
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer dir.Close()
	f, err := os.CreateTemp(dir.Name(), "new")
	if err != nil {
		return err
	}
	_, err = f.Write(content)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	return errors.Join(os.Rename(f.Name(), path), dir.Sync())
}
