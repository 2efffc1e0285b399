package main

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"

	"github.com/rootlink/rootlink/bench/figures"
	"github.com/rootlink/rootlink/internal/recorder"
	"github.com/rootlink/rootlink/pkg/attest"
	workloadv1 "github.com/rootlink/rootlink/proto/rootlink/workload/v1"
)

const (
	ratePath  = "/rate"
	callers   = 900  // the agent lets one user have 1024 connections
	offered   = 1020 // a second
	warmUp    = time.Second
	quoteTime = 250 * time.Millisecond
)

// load is what a signer did.
type load struct {
	Signed  int             // SVIDs that came while it was counted
	Seconds float64         // that it was counted
	Waits   figures.Samples // of those due then: until it was held
	All     int             // signed, also while it was not counted
	Quotes  int             // that they came from

	Evidence figures.Samples // of the same, until the TPM had committed to the key
	Caller   time.Duration   // CPU time that all of it took

	agent, server, tpm time.Duration
}

// cpu says what one SVID costs each process.
func (l load) cpu() string {
	each := func(d time.Duration) string { return figures.Short(d / time.Duration(l.All)) }
	return fmt.Sprintf("CPU for each: caller %s, agent %s, server %s, swtpm %s", each(l.Caller), each(l.agent), each(l.server), each(l.tpm))
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
	steps, err := measuredSteps(ctx, *socket, *n, func(int) string { return "spiffe://" + trustDomain + ratePath })
	if err != nil {
		return err
	}
	digest := sha256.Sum256([]byte("a statement"))
	stop, err := startProfile(*profile)
	if err != nil {
		return err
	}
	defer stop()
	fmt.Println("ready")
	var before, after unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &before); err != nil {
		return err
	}
	start := time.Now()
	counted, end := start.Add(*warm), start.Add(*warm+*length)
	due := make(chan time.Time, 1<<20)
	go func() {
		defer close(due)
		if *rate == 0 {
			return
		}
		for i := 0; ; i++ {
			at := start.Add(time.Duration(float64(i) / *rate * float64(time.Second)))
			if at.After(end) {
				return
			}
			time.Sleep(time.Until(at))
			due <- at
		}
	}()
	var mu sync.Mutex
	var l load
	quotes := map[string]bool{}
	var failed error
	sign := func(s *step, at time.Time) bool {
		quote, prepared, err := s.svid(ctx, digest)
		now := time.Now()
		mu.Lock()
		defer mu.Unlock()
		if err != nil {
			failed = err
			return false
		}
		l.All++
		quotes[quote] = true
		if now.After(counted) && now.Before(end) {
			l.Signed++
		}
		if at.After(counted) {
			l.Waits, l.Evidence = append(l.Waits, now.Sub(at)), append(l.Evidence, prepared.Sub(at))
		}
		return true
	}
	var wg sync.WaitGroup
	for _, s := range steps {
		wg.Go(func() {
			if *rate > 0 {
				for at := range due {
					if !sign(s, at) {
						return
					}
				}
				return
			}
			for time.Now().Before(end) && sign(s, time.Now()) {
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
	if err := unix.Getrusage(unix.RUSAGE_SELF, &after); err != nil {
		return err
	}
	l.Caller = time.Duration(after.Utime.Nano() + after.Stime.Nano() - before.Utime.Nano() - before.Stime.Nano())
	l.Seconds, l.Quotes = length.Seconds(), len(quotes)
	return json.NewEncoder(os.Stdout).Encode(l)
}

// step is a connection on which the agent measured a recorder and its tool.
type step struct {
	workloadv1.IssuerClient
	conn *grpc.ClientConn
}

// svid gets a new key certified for the statement with the given digest. It
// returns the quote, and when the TPM had made it.
func (s *step) svid(ctx context.Context, digest [32]byte) (quote string, prepared time.Time, err error) {
	_, leaf, prepared, err := s.certify(ctx, digest)
	if err != nil {
		return "", prepared, err
	}
	e, err := attest.FromCertificate(leaf)
	if err != nil {
		return "", prepared, err
	}
	return string(e.Attest), prepared, nil
}

// measuredSteps opens n connections that have all seen one tool stopped at its
// first instruction, and lets the tool end.
// Step i is of the identity that id names.
func measuredSteps(ctx context.Context, socket string, n int, id func(i int) string) ([]*step, error) {
	t, err := tool()
	if err != nil {
		return nil, err
	}
	steps := make([]*step, n)
	for i := range steps {
		c, err := dial(socket)
		if err != nil {
			return nil, err
		}
		steps[i] = &step{workloadv1.NewIssuerClient(c), c}
	}
	_, err = recorder.Run(recorder.Command{Path: t, Args: []string{t}, Env: os.Environ(), Stdin: os.Stdin, Stdout: os.Stderr, Stderr: os.Stderr},
		func(*recorder.Exec) error {
			for i, s := range steps {
				if _, err := s.Measure(withHeader(ctx), &workloadv1.MeasureRequest{SpiffeId: id(i)}); err != nil {
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
	pipe, err := c.StdoutPipe()
	if err != nil {
		return l, err
	}
	if err := c.Start(); err != nil {
		return l, err
	}
	defer func() {
		if werr := c.Wait(); werr != nil {
			err = fmt.Errorf("signer: %w", errors.Join(werr, err))
		}
	}()
	out := bufio.NewReader(pipe)
	if _, err := out.ReadString('\n'); err != nil { // it has measured its steps and begins
		return l, err
	}
	processes := map[*daemon]*time.Duration{b.agent: &l.agent, b.server: &l.server, b.tpm: &l.tpm}
	for d, t := range processes {
		if *t, err = figures.CPUTime(d.cmd.Process.Pid); err != nil {
			return l, err
		}
	}
	if err := json.NewDecoder(out).Decode(&l); err != nil {
		return l, err
	}
	for d, t := range processes {
		after, err := figures.CPUTime(d.cmd.Process.Pid)
		if err != nil {
			return l, err
		}
		*t = after - *t
	}
	return l, nil
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
	open, err := b.load(ctx, "open", "--callers", fmt.Sprint(callers), "--rate", fmt.Sprint(offered), "--warm", warmUp.String(), "--for", length.String())
	if err != nil {
		return err
	}
	closed, err := b.load(ctx, "closed", "--callers", fmt.Sprint(callers), "--warm", warmUp.String(), "--for", length.String())
	if err != nil {
		return err
	}
	if err := b.replaceAgent(quoteTime, 1, "single"); err != nil {
		return err
	}
	single, err := b.load(ctx, "single", "--callers", "8", "--warm", warmUp.String(), "--for", "8s")
	if err != nil {
		return err
	}
	if err := b.replaceAgent(0, 0, "fast"); err != nil {
		return err
	}
	fast, err := b.load(ctx, "fast", "--callers", fmt.Sprint(callers), "--warm", warmUp.String(), "--for", "5s")
	if err != nil {
		return err
	}
	aim := "≥ 1000/s"
	if open.rate() < 1000 {
		aim += " MISSED"
	}
	b.out.Line(fmt.Sprintf("SVIDs with evidence, 250 ms quotes, %d/s due", offered), fmt.Sprintf("%.0f/s", open.rate()), aim,
		fmt.Sprintf("one leaf a quote: %.1f/s with 8 callers, p99 %s", single.rate(), figures.Short(single.Waits.At(0.99))))
	// Under this load: 250 ms, what the software TPM adds, and the wait for a CPU.
	quote := time.Duration((open.Seconds + warmUp.Seconds()) / float64(open.Quotes) * float64(time.Second))
	quotes := func(d time.Duration) string {
		return fmt.Sprintf("%s = %.2f quotes", figures.Short(d), float64(d)/float64(quote))
	}
	aim = "≤ 2 quotes"
	if open.Waits.At(0.99) > 2*quote {
		aim += " MISSED"
	}
	b.out.Line("of these, p99 from due to held", fmt.Sprintf("%s (p50 %s)", quotes(open.Waits.At(0.99)), figures.Short(open.Waits.At(0.5))), aim,
		fmt.Sprintf("until the TPM had committed to it, p99: %s; a quote took %s, for %d SVIDs; %s",
			quotes(open.Evidence.At(0.99)), figures.Short(quote), open.All/open.Quotes, open.cpu()))
	b.out.Line(fmt.Sprintf("the same, %d callers without a pause", callers), fmt.Sprintf("%.0f/s, p99 %s", closed.rate(), figures.Short(closed.Waits.At(0.99))), "",
		fmt.Sprintf("at most %.0f/s, as each waits for two quotes", callers/(2*quoteTime.Seconds())))
	b.out.Line("the same, quotes as fast as swtpm's", fmt.Sprintf("%.0f/s, p99 %s", fast.rate(), figures.Short(fast.Waits.At(0.99))), "", fast.cpu())
	return nil
}
