package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/rootlink/rootlink/bench/figures"
	"github.com/rootlink/rootlink/internal/recorder"
)

// tracing: one build, alone and with its whole process tree followed, in turns.
// Agent and signature are not in it: what a run costs besides is in stepCosts.
func tracing(ctx context.Context, b *bench) error {
	tool, err := exec.LookPath("go")
	if err != nil {
		return err
	}
	for _, c := range []struct {
		name, pkg string
		cold      bool
	}{
		{"go build cmd/gofmt, empty cache", "cmd/gofmt", true},
		{"go build cmd/go, full cache", "cmd/go", false},
	} {
		if err := b.traceBuild(ctx, tool, c.name, c.pkg, c.cold); err != nil {
			return err
		}
	}
	return nil
}

func (b *bench) traceBuild(ctx context.Context, tool, name, pkg string, cold bool) error {
	cache := b.path("gocache")
	defer os.RemoveAll(cache)
	args := []string{"go", "build", "-o", b.path("built"), pkg}
	env := append(os.Environ(), "GOCACHE="+cache, "GOFLAGS=", "GOTOOLCHAIN=local", "GOWORK=off")
	var traced, alone figures.Samples
	var times, work []float64
	programs, started := 0, 0
	for i := range b.runs + 1 {
		var with, without build
		// Who goes first changes from round to round.
		steps := []func() error{
			func() (err error) { with, err = measure(tool, args, env, recorder.NewTree()); return err },
			func() (err error) { without, err = measure(tool, args, env, nil); return err },
		}
		if i%2 == 1 {
			slices.Reverse(steps)
		}
		for _, step := range steps {
			// A binary that is up to date would not even be linked.
			if err := os.RemoveAll(b.path("built")); err != nil {
				return err
			}
			if cold {
				if err := os.RemoveAll(cache); err != nil {
					return err
				}
			}
			if err := step(); err != nil {
				return err
			}
			if ctx.Err() != nil {
				return ctx.Err()
			}
		}
		if i == 0 {
			continue // fills the page cache, and the build cache where there is one
		}
		traced, alone = append(traced, with.took), append(alone, without.took)
		times = append(times, float64(with.took)/float64(without.took))
		work = append(work, float64(with.cpu)/float64(without.cpu))
		programs, started = with.programs, with.started
	}
	b.out.Ratio(name+", traced : alone", times, 1.05,
		fmt.Sprintf("%s to %s; CPU time %.3f; %d programs listed, started %d times", figures.Short(traced.Median()), figures.Short(alone.Median()), figures.Middle(work), programs, started))
	return nil
}

// build is how one went.
type build struct {
	took, cpu         time.Duration
	programs, started int
}

// measure runs a command, its tree followed or with tree nil untraced.
func measure(tool string, args, env []string, tree *recorder.Tree) (b build, err error) {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return b, err
	}
	defer null.Close()
	cpu, start := spent(), time.Now()
	st, err := recorder.Run(recorder.Command{Path: tool, Args: args, Env: env, Stdin: null, Stdout: null, Stderr: os.Stderr, Tree: tree, Untraced: tree == nil},
		func(*recorder.Exec) error { return nil })
	if err == nil && tree != nil {
		ran, gaps := tree.Result()
		for _, e := range ran {
			b.programs, b.started = b.programs+1, b.started+e.Count
		}
		if len(gaps) > 0 {
			err = errors.New(strings.Join(gaps, "; "))
		}
	}
	b.took, b.cpu = time.Since(start), spent()-cpu
	if err == nil && st.Code != 0 {
		err = fmt.Errorf("%s: exit code %d", strings.Join(args, " "), st.Code)
	}
	return b, err
}

// spent is the CPU time of this process and of those it has waited for.
func spent() (sum time.Duration) {
	for _, who := range []int{unix.RUSAGE_SELF, unix.RUSAGE_CHILDREN} {
		var u unix.Rusage
		if unix.Getrusage(who, &u) == nil {
			sum += time.Duration(u.Utime.Nano() + u.Stime.Nano())
		}
	}
	return sum
}
