package recorder

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/internal/stamp"
)

// Stamping says where a signature gets its time, as somebody typed it.
type Stamping struct {
	TimestampURLs []string // in place of those the server announces; "none"
	Needed        string   // how many tokens must come: a number, or "all"
	LogURL        string   // in place of the one the server announces; "none"
}

// announced is what the server says of it.
type announced struct {
	timestamps []string
	log        string
}

func (s Stamping) check() error {
	_, err := s.plan(announced{})
	return err
}

// Plan is that of a command that no server tells anything.
func (s Stamping) Plan() (stamp.Plan, error) { return s.final(announced{}) }

// final is plan once it is known what the server announces: whoever asked for
// several authorities must not end up with none.
func (s Stamping) final(a announced) (stamp.Plan, error) {
	p, err := s.plan(a)
	if err == nil && p.Needed > 1 && len(p.Timestamps) == 0 {
		err = cli.Fail(cli.ExitRun, fmt.Errorf("%d timestamps are needed and no authority is known", p.Needed), "--timestamp-url names them")
	}
	return p, err
}

// plan decides what a bundle is to have.
func (s Stamping) plan(a announced) (stamp.Plan, error) {
	fail := func(hint, format string, args ...any) (stamp.Plan, error) {
		return stamp.Plan{}, cli.Fail(cli.ExitRun, fmt.Errorf(format, args...), hint)
	}
	p := stamp.Plan{Timestamps: a.timestamps, Log: a.log, Needed: 1}
	switch n, err := strconv.Atoi(s.Needed); {
	case s.Needed == "all":
		p.Needed = stamp.All
	case s.Needed != "" && (err != nil || n < 1):
		return fail("a number, 1 or more, or all", "--timestamps-needed %q", s.Needed)
	case s.Needed != "":
		p.Needed = n
	}
	if len(s.TimestampURLs) > 0 {
		p.Timestamps = s.TimestampURLs
	}
	if slices.Contains(p.Timestamps, stamp.None) {
		if len(p.Timestamps) > 1 {
			return fail("leave one of them out", "--timestamp-url: both %q and URLs", stamp.None)
		}
		p.Timestamps = nil
	}
	if s.LogURL != "" {
		p.Log = s.LogURL
	}
	if p.Log == stamp.None {
		p.Log = ""
	}
	if len(slices.Compact(slices.Sorted(slices.Values(p.Timestamps)))) != len(p.Timestamps) {
		return fail("one authority counts once", "one timestamp URL is named twice")
	}
	if err := p.Check(); err != nil {
		return fail("such as --timestamp-url https://tsa.example/tsr, and --timestamps-needed no more than there are of them", "%w", err)
	}
	return p, nil
}

// off: nobody wants to hear that the server announced nothing.
func (s Stamping) off() bool {
	return slices.Contains(s.TimestampURLs, stamp.None) || s.LogURL == stamp.None
}

// finish gets the signature its time and writes the bundle. One that lacks what
// was wanted is written too, since the SVID's key is gone and there will be no
// other; but it is an error, and says how to mend it while that can be done.
func (r *state) finish(ctx context.Context, s *Signed) error {
	said := s.Announced
	if len(said.timestamps) == 0 && said.log == "" && r.measured != nil {
		said = announced{r.measured.GetTimestampUrls(), r.measured.GetLogUrl()}
	}
	plan, err := r.Stamping.final(said)
	if err != nil { // what is announced has changed since the tool started
		if werr := r.write(s, nil); werr != nil {
			return werr
		}
		return cli.Fail(cli.ExitRun, fmt.Errorf("%s was written without time: %w", r.bundlePath(s), err), cli.HintOf(err))
	}
	until := s.Bundle.UnverifiedCertificate().NotAfter.UTC()
	if plan.Empty() {
		if !r.Stamping.off() {
			r.say("nobody names a timestamp authority or a log, so this will verify until %s only; --timestamp-url names one", until.Format(time.RFC3339))
		}
		return r.write(s, nil)
	}
	out, err := r.complete(ctx, s, plan)
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case err != nil:
		out = &stamp.Outcome{Bundle: s.Bundle, Missing: []stamp.Missing{{What: "timestamp and log entry", URL: "anybody", Err: err, Needed: true}}}
	}
	s.Bundle = out.Bundle
	if out.Detached != nil {
		s.Detached = out.Detached
	}
	if err := r.write(s, out); err != nil {
		return err
	}
	for _, m := range out.Missing {
		if !m.Needed {
			r.say("WITHOUT the %s, which was not needed", m)
		}
	}
	if err := out.Err(); err != nil {
		return cli.Fail(cli.ExitRun, fmt.Errorf("%s was written, and %w", r.bundlePath(s), err),
			fmt.Sprintf("complete it before %s: %s", until.Format(time.RFC3339), stampLine(plan, r.bundlePath(s))))
	}
	return nil
}

// stampLine is the command that completes a bundle.
func stampLine(p stamp.Plan, file string) string {
	line := []string{"rootlink stamp"}
	for _, u := range p.Timestamps {
		line = append(line, "--timestamp-url "+shellWord(u))
	}
	if n := p.Needs(); n > 1 {
		line = append(line, "--timestamps-needed "+strconv.Itoa(n))
	}
	if p.Log != "" {
		line = append(line, "--log-url "+shellWord(p.Log))
	}
	return strings.Join(append(line, shellWord(file)), " ")
}

func shellWord(s string) string {
	plain := func(r rune) bool {
		return r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("./:_-%+@,=", r)
	}
	if s != "" && !strings.ContainsFunc(s, func(r rune) bool { return !plain(r) }) {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}

func (r *state) complete(ctx context.Context, s *Signed, plan stamp.Plan) (*stamp.Outcome, error) {
	limited, cancel := context.WithTimeout(ctx, r.IssueTimeout)
	defer cancel()
	c := stamp.NewClient()
	defer c.Close()
	p := cli.NewProgress(r.Stderr)
	defer p.Done()
	p.Printf("getting timestamp and log entry")
	out, err := c.CompleteWith(limited, s.Bundle, s.Detached, plan, Teller(func(msg string) {
		r.say("waiting for time, up to %s: %s", r.IssueTimeout, msg)
	}))
	if errors.Is(err, context.Canceled) && ctx.Err() == nil {
		err = errors.New("time is up")
	}
	return out, err
}

// Teller says each reason to wait once for each address.
func Teller(say func(msg string)) func(what, url string, why error) {
	var mu sync.Mutex
	told := map[string]bool{}
	return func(what, url string, why error) {
		msg := fmt.Sprintf("%s from %s: %s", what, url, why)
		mu.Lock()
		defer mu.Unlock()
		if !told[msg] {
			told[msg] = true
			say(msg)
		}
	}
}
