// Command spiffe-conformance judges a SPIFFE Workload API endpoint, clause by
// clause, from outside.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"regexp"
	"strings"
	"time"

	"github.com/rootlink/rootlink/conformance/suite"
)

const (
	exitOK    = 0
	exitIO    = 1 // the endpoint, a file or a command
	exitUsage = 2
	exitFail  = 4 // a MUST does not hold, or the deviations are not those expected
)

var errUsage = errors.New("usage")

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	code := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

type config struct {
	suite.Options
	output, match, expect string
	list                  bool
	re                    *regexp.Regexp
	deviations            map[string]string
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	c, err := parse(args, stderr)
	switch {
	case errors.Is(err, flag.ErrHelp):
		return exitOK
	case errors.Is(err, errUsage):
		fmt.Fprintln(stderr, "spiffe-conformance:", err)
		return exitUsage
	case err != nil:
		fmt.Fprintln(stderr, "spiffe-conformance:", err)
		return exitIO
	}
	if c.list {
		for _, cl := range suite.Clauses() {
			if c.re == nil || c.re.MatchString(cl.ID) {
				fmt.Fprintf(stdout, "%-6s  %-58s  %s\n", strings.ToUpper(string(cl.Level)), cl.ID, cl.Says)
			}
		}
		return exitOK
	}
	if c.output == "probe" {
		return probe(ctx, c, stdout, stderr)
	}
	results, err := suite.Run(ctx, c.Options, c.re)
	if errors.Is(err, suite.ErrSocket) {
		fmt.Fprintln(stderr, "spiffe-conformance:", err)
		return exitUsage
	}
	if err != nil {
		fmt.Fprintln(stderr, "spiffe-conformance:", err)
		return exitIO
	}
	ok := judge(results, c)
	if err := ok.write(stdout, c.output); err != nil {
		fmt.Fprintln(stderr, "spiffe-conformance:", err)
		return exitIO
	}
	if !ok.Conforms {
		return exitFail
	}
	return exitOK
}

func parse(args []string, stderr io.Writer) (*config, error) {
	c := &config{}
	f := flag.NewFlagSet("spiffe-conformance", flag.ContinueOnError)
	f.SetOutput(stderr)
	f.StringVar(&c.Socket, "socket", os.Getenv("SPIFFE_ENDPOINT_SOCKET"), "the endpoint, `unix:///path or tcp://IP:PORT`; $SPIFFE_ENDPOINT_SOCKET")
	f.StringVar(&c.output, "output", "text", "`text or json`")
	f.StringVar(&c.match, "run", "", "only clauses whose ID matches this `regexp`")
	f.BoolVar(&c.list, "list", false, "print the clauses and end")
	f.StringVar(&c.Audience, "audience", "spiffe-conformance", "the audience of the tokens that are fetched")
	f.StringVar(&c.expect, "expect", "", "`file` of known deviations: exactly those must fail")
	f.StringVar(&c.Federated, "federated", "", "`SPIFFE ID` of a trust domain that the caller federates with")
	f.DurationVar(&c.Prompt, "prompt", 5*time.Second, "how soon a stream's first message is to come")
	f.DurationVar(&c.Wait, "wait", time.Minute, "how long the effect of a scene's command may take")
	f.Func("disabled", "a profile that the operator has disabled, `x509 or jwt`", func(s string) error {
		if s != "x509" && s != "jwt" {
			return fmt.Errorf("no such profile")
		}
		c.Disabled = append(c.Disabled, s)
		return nil
	})
	var bundles []string
	f.Func("bundle", "`file` with a SPIFFE bundle of the trust domain; again for a later one", func(s string) error {
		bundles = append(bundles, s)
		return nil
	})
	key := f.String("jwt-key", "", "PEM `file` of a key in the trust domain's JWT bundle, to sign what must be refused")
	without := f.String("without-identity", "", "`command` that starts this program as a process without identity")
	rotate := f.String("trigger-rotation", "", "`command` that has the caller's SVIDs or bundles replaced")
	withdraw := f.String("withdraw", "", "`command` that takes one or all of the caller's identities; run last")
	probing := len(args) > 0 && args[0] == "probe"
	if probing {
		args = args[1:]
	}
	if err := f.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return nil, err
		}
		return nil, fmt.Errorf("%w: %w", errUsage, err)
	}
	switch {
	case f.NArg() > 0:
		return nil, fmt.Errorf("%w: %q is no flag", errUsage, f.Arg(0))
	case c.output != "text" && c.output != "json":
		return nil, fmt.Errorf("%w: --output text or json", errUsage)
	case c.Socket == "" && !c.list:
		return nil, fmt.Errorf("%w: --socket is missing\nhint: --socket unix:///path/of/the/endpoint.sock, or set SPIFFE_ENDPOINT_SOCKET", errUsage)
	case c.expect != "" && c.match != "":
		return nil, fmt.Errorf("%w: --expect judges a whole run, without --run", errUsage)
	}
	if probing {
		c.output = "probe"
	}
	if c.match != "" {
		re, err := regexp.Compile(c.match)
		if err != nil {
			return nil, fmt.Errorf("%w: --run: %w", errUsage, err)
		}
		c.re = re
	}
	return c, c.load(bundles, *key, *without, *rotate, *withdraw)
}
