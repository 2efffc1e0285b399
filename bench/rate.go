package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"sync"
	"time"

	"github.com/rootlink/rootlink/internal/recorder"
	"github.com/rootlink/rootlink/pkg/link"
)

const (
	ratePath  = "/rate"
	callers   = 500 // the agent lets one user have 512 connections
	quoteTime = 250 * time.Millisecond
)

// load is what a signer did.
type load struct {
	Signed  int
	Seconds float64 // from the first to the last SVID held
	Waits   samples // from the moment it was due until it was held
}

func (l load) rate() float64 { return float64(l.Signed) / l.Seconds }

// signerMain makes many build steps of one tool that end at about the same
// time: each connection is a step that the agent measured, and has a new key
// certified again and again. With --rate, one SVID is due every 1/rate seconds
// whatever became of those before; without, each step asks as soon as it was
// answered.
func signerMain(ctx context.Context, args []string) error {
	fs := flag.NewFlagSet(roleSigner, flag.ContinueOnError)
	socket := fs.String("socket", "", "")
	n := fs.Int("callers", 1, "")
	rate := fs.Float64("rate", 0, "SVIDs that fall due in a second")
	warm := fs.Duration("warm", 0, "not counted at the start")
	length := fs.Duration("for", time.Second, "")
	profile := fs.String("cpuprofile", "", "")
	if err := fs.Parse(args); err != nil {
		return err
	}
	steps, err := measuredSteps(ctx, *socket, *n)
	if err != nil {
		return err
	}
	stmt, err := link.Prepare(&link.Statement{
		Step: "rate", Command: []string{"true"},
		Subjects: []link.Resource{{Name: "product", Digest: map[string]string{"sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"}}},
	})
	if err != nil {
		return err
	}
	stop, err := startProfile(*profile)
	if err != nil {
		return err
	}
	defer stop()
	start := time.Now()
	due := make(chan time.Time, 1<<20)
	go func() {
		defer close(due)
		if *rate == 0 {
			return
		}
		for i := 0; ; i++ {
			at := start.Add(time.Duration(float64(i) / *rate * float64(time.Second)))
			if at.After(start.Add(*warm + *length)) {
				return
			}
			time.Sleep(time.Until(at))
			due <- at
		}
	}()
	var mu sync.Mutex
	var l load
	var failed error
	var last time.Time
	counted := start.Add(*warm)
	sign := func(a *recorder.Agent, at time.Time) bool {
		_, err := a.Sign(ctx, stmt, func(error) {})
		now := time.Now()
		mu.Lock()
		defer mu.Unlock()
		if err != nil {
			failed = err
			return false
		}
		if at.After(counted) {
			l.Signed, last = l.Signed+1, now
			l.Waits = append(l.Waits, now.Sub(at))
		}
		return true
	}
	var wg sync.WaitGroup
	for _, a := range steps {
		wg.Go(func() {
			if *rate > 0 {
				for at := range due {
					if !sign(a, at) {
						return
					}
				}
				return
			}
			for time.Since(start) < *warm+*length && sign(a, time.Now()) {
			}
		})
	}
	wg.Wait()
	if failed != nil {
		return failed
	}
	if l.Signed == 0 {
		return errors.New("nothing was signed in time")
	}
	l.Seconds = last.Sub(counted).Seconds()
	return json.NewEncoder(os.Stdout).Encode(l)
}

// measuredSteps opens n connections that have all seen one tool stopped at its
// first instruction, and lets the tool end.
func measuredSteps(ctx context.Context, socket string, n int) ([]*recorder.Agent, error) {
	t, err := tool()
	if err != nil {
		return nil, err
	}
	steps := make([]*recorder.Agent, n)
	for i := range steps {
		if steps[i], err = recorder.Connect(ctx, socket); err != nil {
			return nil, err
		}
	}
	_, err = recorder.Run(recorder.Command{Path: t, Args: []string{t}, Env: os.Environ(), Stdin: os.Stdin, Stdout: os.Stderr, Stderr: os.Stderr},
		func(*recorder.Exec) error {
			for _, s := range steps {
				if _, err := s.Measure(ctx, "spiffe://"+trustDomain+ratePath); err != nil {
					return err
				}
			}
			return nil
		})
	return steps, err
}

func (b *bench) load(ctx context.Context, name string, args ...string) (l load, err error) {
	args = append([]string{roleSigner, "--socket", b.socket()}, args...)
	if b.profile != "" {
		args = append(args, "--cpuprofile", b.profile+"/signer-"+name)
	}
	c := exec.CommandContext(ctx, b.self, args...)
	c.Stderr = os.Stderr
	out, err := c.Output()
	if err != nil {
		return l, fmt.Errorf("signer: %w", err)
	}
	return l, json.Unmarshal(out, &l)
}

// evidenceRate: how many SVIDs with evidence one node gets when its TPM is as
// slow as hardware, in batches and one by one, and when its TPM costs nothing.
func evidenceRate(ctx context.Context, b *bench) error {
	t, err := tool()
	if err != nil {
		return err
	}
	if err := b.createStep(ctx, ratePath, b.self, t); err != nil {
		return err
	}
	length := time.Duration(b.runs) * 4 * time.Second
	if err := b.replaceAgent(quoteTime, 0, "batched"); err != nil {
		return err
	}
	open, err := b.load(ctx, "open", "--callers", fmt.Sprint(callers), "--rate", "1010", "--warm", "1s", "--for", length.String())
	if err != nil {
		return err
	}
	closed, err := b.load(ctx, "closed", "--callers", fmt.Sprint(callers), "--warm", "1s", "--for", length.String())
	if err != nil {
		return err
	}
	if err := b.replaceAgent(quoteTime, 1, "single"); err != nil {
		return err
	}
	single, err := b.load(ctx, "single", "--callers", "8", "--warm", "1s", "--for", "8s")
	if err != nil {
		return err
	}
	if err := b.replaceAgent(0, 0, "fast"); err != nil {
		return err
	}
	fast, err := b.load(ctx, "fast", "--callers", fmt.Sprint(callers), "--warm", "1s", "--for", "5s")
	if err != nil {
		return err
	}
	aim := "≥ 1000/s"
	if open.rate() < 1000 {
		aim += " OVER"
	}
	b.out.line("SVIDs with evidence, quotes of 250 ms, 1,010/s due", fmt.Sprintf("%.0f/s", open.rate()), aim,
		fmt.Sprintf("one leaf a quote: %.1f/s with 8 callers, p99 %s", single.rate(), short(single.Waits.at(0.99))))
	aim = "≤ 500 ms"
	if open.Waits.at(0.99) > 2*quoteTime {
		aim += " OVER"
	}
	b.out.line("of these, p99 from due to held", fmt.Sprintf("%s = %.2f quotes (p50 %s)", short(open.Waits.at(0.99)), float64(open.Waits.at(0.99))/float64(quoteTime), short(open.Waits.at(0.5))), aim, "")
	b.out.line("the same, 500 callers without a pause", fmt.Sprintf("%.0f/s, p99 %s", closed.rate(), short(closed.Waits.at(0.99))), "",
		fmt.Sprintf("at most %.0f/s, as each waits for two quotes", callers/(2*quoteTime).Seconds()))
	b.out.line("the same, quotes as fast as swtpm's", fmt.Sprintf("%.0f/s, p99 %s", fast.rate(), short(fast.Waits.at(0.99))), "", "what the CPUs allow callers, agent and server together")
	return nil
}
