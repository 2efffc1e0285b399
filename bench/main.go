// Command bench measures rootlink's figures on real processes and a real
// software TPM, and prints them as one table beside what bounds each of them.
// It judges nothing: a figure that misses its target is marked and the exit code
// stays 0, since a busy machine is no defect. docs/benchmarks.md says what
// each line means.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"regexp"
	"runtime"
	"syscall"
	"time"

	"github.com/rootlink/rootlink/bench/figures"
	"github.com/rootlink/rootlink/internal/recorder"
)

func init() {
	if recorder.IsStub() {
		runtime.LockOSThread() // see recorder.IsStub
	}
}

// The roles that this program plays in processes of their own.
const (
	roleWorkload = "workload" // asks for SVIDs when told to
	roleAgent    = "agent"    // an agent whose TPM is slow
	roleSigner   = "signer"   // many build steps at once
	roleBundler  = "bundler"  // many links
)

func main() {
	if recorder.IsStub() {
		recorder.RunStub()
	}
	if err := start(); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func start() error {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case roleWorkload:
			return workloadMain(os.Args[2:])
		case roleAgent:
			return agentMain(ctx, os.Args[2:])
		case roleSigner:
			return signerMain(ctx, os.Args[2:])
		case roleBundler:
			return bundlerMain(ctx, os.Args[2:])
		}
	}
	only := flag.String("only", "", "measure only what matches this regular expression")
	runs := flag.Int("runs", 3, "how often the slow figures are repeated")
	dir := flag.String("dir", "", "where to work (default $TMPDIR); its file system should be one whose times can be believed, as ext4 and xfs")
	profile := flag.String("profile", "", "directory for CPU profiles of the processes under load")
	verbose := flag.Bool("v", false, "print logs of the daemons when something fails, and every sample")
	flag.Parse()
	match, err := regexp.Compile(*only)
	if err != nil {
		return err
	}
	if flag.NArg() > 0 || *runs < 1 {
		return errors.New("usage: bench [-only REGEXP] [-runs N] [-dir DIR] [-profile DIR] [-v]")
	}
	b := &bench{runs: *runs, profile: *profile, verbose: *verbose, out: &figures.Table{W: os.Stdout}}
	return b.run(ctx, *dir, match)
}

// bench is one run of the program.
type bench struct {
	*world
	runs     int
	profile  string
	verbose  bool
	out      *figures.Table
	enrolled bool // the entry of stepPath exists
}

// group is what is measured together.
type group struct {
	name string
	do   func(context.Context, *bench) error
}

// groups in the order of the table. Those that replace the agent come last.
var groups = []group{
	{"new-entry", newEntry},
	{"warm", warmSVID},
	{"step", stepCosts},
	{"verify", verifyCosts},
	{"sizes", sizes},
	{"record", recording},
	{"trace", tracing},
	{"pipeline", pipeline},
	{"tsa", timestamps},
	{"log", logging},
	{"bundles", manyBundles},
	{"rate", evidenceRate},
}

func (b *bench) run(ctx context.Context, dir string, match *regexp.Regexp) (err error) {
	fmt.Printf("%s, %s/%s, %d CPUs (%s), load before %s\n", time.Now().UTC().Format("2006-01-02 15:04 UTC"),
		runtime.GOOS, runtime.GOARCH, runtime.NumCPU(), figures.CPUModel(), figures.LoadAverage())
	fmt.Println("Times are medians, with the 10th and the 90th percentile in brackets.")
	b.world, err = newWorld(ctx, dir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.close(err != nil && b.verbose)) }()
	b.out.Head()
	for _, g := range groups {
		if !match.MatchString(g.name) {
			continue
		}
		if err := g.do(ctx, b); err != nil {
			return fmt.Errorf("%s: %w", g.name, err)
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
	fmt.Printf("load after %s\n", figures.LoadAverage())
	return nil
}
