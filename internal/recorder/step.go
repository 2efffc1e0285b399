package recorder

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/pkg/layout"
	"github.com/rootlink/rootlink/pkg/link"
	workloadv1 "github.com/rootlink/rootlink/proto/rootlink/workload/v1"
)

// Step is one run of `rootlink run`.
type Step struct {
	Name      string
	Command   []string
	Materials []string
	Products  []string
	Exclude   []string
	BundleDir string // "" with BundleOut
	BundleOut string
	LinkOut   string // a classic link, in place of the bundle
	Sources   Sources
	ExtraEnv  []string
	BuildID   string // names the run of the pipeline, "" when it has none

	RecordFailure bool // sign also when the command failed
	AllowUnsigned bool // without agent or identity, record unsigned
	MainOnly      bool // follow the main process alone
	IssueTimeout  time.Duration
	Stamping      Stamping
	Version       string
	Stderr        *os.File
}

// stepName is what can also be part of a file name.
var stepName = sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9._-]{0,127}$`) })

// buildID is what people can read and compare, such as the URL of a job.
var buildID = sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile(`^[A-Za-z0-9._:/@+=-]{1,200}$`) })

func (s *Step) validate() error {
	usage := func(hint, format string, args ...any) error {
		return cli.Fail(cli.ExitRun, fmt.Errorf(format, args...), hint)
	}
	var missing []string
	if s.Name == "" {
		missing = append(missing, "--step NAME")
	}
	if len(s.Products) == 0 {
		missing = append(missing, "--products PATH (what the command makes: a statement is about the products of a step)")
	}
	if len(s.Command) == 0 {
		missing = append(missing, "a command behind --")
	}
	switch {
	case len(missing) > 0:
		return usage("such as: rootlink run --step build --products hello -- make hello", "missing: %s", strings.Join(missing, ", "))
	case !stepName().MatchString(s.Name):
		return usage("letters, digits, dot, dash and underscore, at most 128", "--step %q is not a step name", s.Name)
	case s.BuildID != "" && !buildID().MatchString(s.BuildID):
		return usage("up to 200 letters, digits and . _ : / @ + = -, such as the job's number", "--build-id %q is none", s.BuildID)
	case s.IssueTimeout <= 0:
		return usage("such as 5m", "--issue-timeout must be positive")
	}
	if err := s.Sources.check(); err != nil {
		return err
	}
	if err := s.Stamping.check(); err != nil {
		return err
	}
	// What would fail at the end is to fail before hours of building.
	dir := s.BundleDir
	switch {
	case s.LinkOut != "" && (s.BundleOut != "" || s.AllowUnsigned || len(s.Stamping.TimestampURLs) > 0 || s.Stamping.LogURL != ""):
		return usage("leave it out, or run without --link-out: one key signs one statement, and the classic form holds neither time nor log entry",
			"--link-out with --bundle-out, --if-unavailable unsigned, --timestamp-url or --log-url")
	case s.LinkOut != "":
		dir = filepath.Dir(s.LinkOut)
	case s.BundleOut != "":
		dir = filepath.Dir(s.BundleOut)
	}
	if st, err := os.Stat(dir); err != nil {
		return usage("make the directory first", "the bundle cannot be written: %w", err)
	} else if !st.IsDir() {
		return usage("", "%s is not a directory", dir)
	}
	// Asked of the user's own group, not of the recorder's, which is given up
	// before anything is written.
	if err := unix.Access(dir, unix.W_OK|unix.X_OK); err != nil {
		return usage("name a place that you may write to, with --bundle-out or --bundle-dir", "the bundle cannot be written: %w",
			&os.PathError{Op: "access", Path: dir, Err: err})
	}
	for _, p := range s.Products {
		if _, err := Normalise(p); err != nil {
			return usage("run from a directory that holds them all", "--products: %w", err)
		}
	}
	return nil
}

// state is what a run has found out so far.
type state struct {
	*Step
	source   source // nil when the record will be unsigned
	measured *workloadv1.MeasureResponse
	execs    []link.Executable // of the main process, as the agent measured them
	ran
	stmt link.Statement
}

// Run runs the step and returns the code to exit with: the command's own once
// it has run. An error is ours. Nothing is left behind unless all went well.
func (s *Step) Run() (code int, err error) {
	if err := s.validate(); err != nil {
		return 0, err
	}
	env := os.Environ()
	path, err := Lookup(s.Command[0], env)
	if err != nil {
		return 0, explain(err)
	}
	r := &state{Step: s}
	if err := r.connect(); err != nil {
		return 0, explain(err)
	}
	defer func() {
		if r.source != nil {
			r.source.Close()
		}
	}()
	materials, err := r.before(env)
	if err != nil {
		return 0, explain(err)
	}
	r.stmt.Byproducts.Started = time.Now().UTC().Truncate(time.Millisecond)
	r.watch(env)
	st, err := Run(Command{Path: path, Args: s.Command, Env: env, Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr, Tree: r.tree}, r.onExec)
	if errors.Is(err, ErrTrace) && s.AllowUnsigned {
		r.unsigned(err)
		r.tree, r.untraced = nil, true
		st, err = Run(Command{Path: path, Args: s.Command, Env: env, Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr, Untraced: true}, nil)
	}
	if err != nil {
		return 0, explain(err)
	}
	r.stmt.Byproducts.Finished = time.Now().UTC().Truncate(time.Millisecond)
	r.stmt.Byproducts.ExitCode, r.stmt.Byproducts.Signal = &st.Code, st.Signal
	if st.Code != 0 {
		r.sayPowerless()
	}
	if st.Code != 0 && !s.RecordFailure {
		r.say("the command failed (%s): nothing was signed", describe(st))
		return st.Code, nil
	}
	err = r.after(materials)
	if err != nil && st.Code != 0 {
		// The command's failure is what the caller must hear of first.
		cli.Report(s.Stderr, explain(err))
		return st.Code, nil
	}
	return st.Code, explain(err)
}

func describe(st Status) string {
	if st.Signal != "" {
		return st.Signal
	}
	return fmt.Sprintf("exit code %d", st.Code)
}

// interruptible is a context that ends with ^C, for what happens outside of
// the tool's life. The second ^C kills.
func interruptible() (context.Context, context.CancelFunc) {
	// What the caller ignores (nohup) stays ignored, for the tool too: once
	// caught here, forwardSignals could not tell that it was.
	var sigs []os.Signal
	for _, sig := range []os.Signal{os.Interrupt, syscall.SIGTERM, syscall.SIGHUP} {
		if !signal.Ignored(sig) {
			sigs = append(sigs, sig)
		}
	}
	if len(sigs) == 0 { // Notify would take that for every signal
		return context.WithCancel(context.Background())
	}
	ctx, stop := signal.NotifyContext(context.Background(), sigs...)
	context.AfterFunc(ctx, stop)
	return ctx, stop
}

func (r *state) connect() error {
	ctx, stop := interruptible()
	defer stop()
	src, err := r.Sources.open(ctx)
	if err == nil {
		r.source = src
		if route := src.Route(); route != "" {
			r.say("%s", route)
		}
		return nil
	}
	if ctx.Err() != nil {
		return explain(ctx.Err())
	}
	if _, derr := DropGroup(); derr != nil {
		return derr
	}
	if r.AllowUnsigned && ctx.Err() == nil {
		r.unsigned(err)
		return nil
	}
	return err
}

// unsigned gives up signing, loudly.
func (r *state) unsigned(why error) {
	if r.source != nil {
		r.source.Close()
		r.source = nil
	}
	r.say("UNSIGNED: %s", why)
}

func (r *state) say(format string, args ...any) {
	fmt.Fprintln(r.Stderr, "rootlink: "+cli.Clean(fmt.Sprintf(format, args...)))
}

// before records what there is before the tool starts.
func (r *state) before(env []string) (*Recording, error) {
	ctx, stop := interruptible()
	defer stop()
	git := make(chan *link.Git, 1)
	go func() { git <- gitState(ctx) }()
	materials, err := r.hash(ctx, "materials", r.Materials, nil)
	if err != nil {
		return nil, err
	}
	r.stmt.Step, r.stmt.Command = r.Name, r.Command
	r.stmt.Environment = environment(env, r.ExtraEnv, r.Version)
	r.stmt.Environment.BuildID = r.BuildID
	r.stmt.Environment.Git = <-git
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if r.stmt.Materials, err = materials.Materials(); err != nil {
		return nil, err
	}
	return materials, nil
}

func (r *state) hash(ctx context.Context, what string, paths []string, before *Recording) (*Recording, error) {
	p := cli.NewProgress(r.Stderr)
	defer p.Done()
	rec, err := Hash(ctx, paths, Options{Exclude: r.Exclude, Before: before, Progress: func(files, bytes int64) {
		p.Printf("hashing %s: %d files, %d MiB", what, files, bytes>>20)
	}})
	if err != nil {
		return nil, fmt.Errorf("%s: %w", what, err)
	}
	return rec, nil
}

// onExec has the tool measured while it is stopped.
func (r *state) onExec(e *Exec) error {
	if r.source == nil {
		return r.note(e, nil)
	}
	outer := context.Background()
	if e.N == 1 {
		// ^C before the tool has run its first instruction is for us.
		var stop context.CancelFunc
		outer, stop = interruptible()
		defer stop()
	}
	ctx, cancel := context.WithTimeout(outer, r.IssueTimeout)
	defer cancel()
	m, err := r.source.Measure(ctx, r.Sources.SPIFFEID)
	if outer.Err() != nil {
		return outer.Err()
	}
	if err != nil {
		if r.AllowUnsigned && Unavailable(err) {
			r.unsigned(err)
			return r.note(e, nil)
		}
		err = withScriptNotes(err, e, os.Environ())
		if e.N > 1 {
			err = cli.Hint(fmt.Errorf("the tool went on to run %s: %w", e.Path, err), cli.HintOf(err))
		}
		return err
	}
	if e.N == 1 {
		r.stmt.Environment.Recorder += r.source.Note()
	}
	if m == nil {
		return r.note(e, nil)
	}
	r.measured = m
	if _, err := r.Stamping.final(announced{m.GetTimestampUrls(), m.GetLogUrl()}); err != nil {
		return err
	}
	if e.N == 1 && !m.GetMeasurement().GetRecorderProtected() {
		// Known to whoever verifies; here only for who debugs an installation.
		r.stmt.Environment.Recorder += " (unprotected)"
	}
	return r.note(e, m.GetMeasurement().GetTool())
}

// note adds an exec to the record, with the agent's digest of it or our own.
func (r *state) note(e *Exec, tool []byte) error {
	if tool == nil {
		sum, err := e.HashExecutable()
		if err != nil {
			return err
		}
		tool = sum[:]
	}
	add := func(path, role string, sum []byte) {
		x := link.Executable{Path: path, Role: role, Digest: map[string]string{"sha256": hex.EncodeToString(sum)}}
		for _, have := range r.execs {
			if have.Path == x.Path && have.Role == x.Role && have.Digest["sha256"] == x.Digest["sha256"] {
				return
			}
		}
		r.execs = append(r.execs, x)
	}
	role := "tool"
	if e.Script != nil {
		role = "interpreter"
	}
	add(e.Path, role, tool)
	if e.Script != nil {
		add(e.Script.Path, "script", e.Script.SHA256[:])
	}
	return nil
}

// after records what came out, and signs.
func (r *state) after(materials *Recording) error {
	ctx, stop := interruptible()
	defer stop()
	products, err := r.hash(ctx, "products", r.Products, materials)
	if errors.Is(err, os.ErrNotExist) {
		return cli.Hint(err, "the command did not make it there: check --products, which is relative to where rootlink runs")
	}
	if err != nil {
		return err
	}
	if r.stmt.Subjects, err = products.Resources(link.MaxSubjects); err != nil {
		return fmt.Errorf("products: %w", err)
	}
	if len(r.stmt.Subjects) == 0 {
		return cli.Fail(cli.ExitRun, errors.New("the products are empty directories: nothing to sign"), "check --products and --exclude")
	}
	r.noteSkipped(materials, products)
	if err := r.noteRecorder(); err != nil {
		return err
	}
	r.noteRan()
	prepared, err := link.Prepare(&r.stmt)
	if err != nil {
		return err
	}
	if r.source == nil {
		return r.writeUnsigned(prepared)
	}
	var toSign Prepared = prepared
	if r.LinkOut != "" {
		if toSign, err = layout.PrepareClassic(&r.stmt); err != nil {
			return err
		}
	}
	signed, err := r.sign(ctx, toSign)
	if err != nil {
		if r.AllowUnsigned && Unavailable(err) && ctx.Err() == nil {
			r.unsigned(err)
			return r.writeUnsigned(prepared)
		}
		return err
	}
	if id := r.Sources.SPIFFEID; id != "" && signed.SPIFFEID != id {
		return fmt.Errorf("the agent issued %s, not the identity that --spiffe-id asks for", signed.SPIFFEID)
	}
	if r.LinkOut != "" {
		return r.writeClassic(signed)
	}
	return r.finish(ctx, signed)
}

// noteRecorder says who recorded: as the agent measured it, or as we see ourselves
// where nobody did.
func (r *state) noteRecorder() error {
	self, err := os.Readlink("/proc/self/exe")
	if err != nil || r.source == nil {
		return nil
	}
	sum := r.measured.GetMeasurement().GetRecorder()
	if r.measured == nil {
		own, err := ownHash()
		if err != nil {
			return err
		}
		sum = own[:]
	}
	r.execs = append(r.execs, link.Executable{Path: self, Role: "recorder", Digest: map[string]string{"sha256": hex.EncodeToString(sum)}})
	return nil
}

// maxSkipped bounds what is listed of names without content.
const maxSkipped = 256

func (r *state) noteSkipped(recs ...*Recording) {
	var names []string
	for _, rec := range recs {
		names = append(names, rec.Skipped...)
	}
	slices.Sort(names)
	names = slices.Compact(names)
	if len(names) == 0 {
		return
	}
	r.say("%d names have no content of their own and were passed over, the first is %s", len(names), names[0])
	if more := len(names) - maxSkipped; more > 0 {
		names = append(names[:maxSkipped], fmt.Sprintf("and %d more", more))
	}
	r.stmt.Byproducts.Skipped = names
}

// silence is how long the agent may take for a signature without a word to the user.
const silence = 5 * time.Second

func (r *state) sign(ctx context.Context, p Prepared) (*Signed, error) {
	limited, cancel := context.WithTimeout(ctx, r.IssueTimeout)
	defer cancel()
	var mu sync.Mutex
	told := ""
	tell := func(msg string) {
		told = msg
		r.say("waiting to sign, up to %s: %s", r.IssueTimeout, msg)
	}
	silent := time.AfterFunc(silence, func() {
		mu.Lock()
		defer mu.Unlock()
		if told == "" {
			tell("the agent has not answered yet; is its TPM there?")
		}
	})
	s, err := r.source.Sign(limited, p, func(why error) {
		mu.Lock()
		defer mu.Unlock()
		if msg := why.Error(); msg != told {
			tell(msg)
		}
	})
	silent.Stop()
	mu.Lock() // one that began is let finish, one that comes now is too late
	told = "over"
	mu.Unlock()
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	return s, err
}

// explain gives an error of this package its exit code and hint.
func explain(err error) error {
	if err == nil {
		return nil
	}
	if errors.Is(err, context.Canceled) {
		return cli.Fail(130, errors.New("interrupted: nothing was signed"), "run it again")
	}
	code := cli.ExitRun
	switch {
	case errors.Is(err, ErrNotFound):
		code = cli.ExitNotFound
	case errors.Is(err, ErrNotExecutable):
		code = cli.ExitNotRunnable
	}
	hint := Hint(err)
	if hint == "" {
		hint = cli.HintOf(err)
	}
	return cli.Fail(code, err, hint)
}
