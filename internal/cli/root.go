package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
)

// Root returns the command that others are added to, with --output. Usage is
// not printed on errors: the error and its hint are what the person needs.
func Root(name, short, version string) *cobra.Command {
	root := &cobra.Command{
		Use:           name,
		Short:         short,
		Version:       version,
		SilenceErrors: true,
		SilenceUsage:  true,
	}
	root.RunE = needSubcommand
	root.Args = cobra.ArbitraryArgs
	out := Text
	root.PersistentFlags().Var(&out, "output", "form of what goes to stdout: text or json")
	root.SetFlagErrorFunc(func(c *cobra.Command, err error) error {
		return &Error{Code: ExitUsage, Err: err, Hint: seeHelp(c)}
	})
	return root
}

// Group is a command that only holds others, as `entry` holds `create`.
func Group(name, short string, subs ...*cobra.Command) *cobra.Command {
	g := &cobra.Command{Use: name, Short: short, Args: cobra.ArbitraryArgs, RunE: needSubcommand}
	g.AddCommand(subs...)
	return g
}

func needSubcommand(c *cobra.Command, args []string) error {
	if len(args) == 0 {
		var names []string
		for _, s := range c.Commands() {
			if s.IsAvailableCommand() && s.Name() != "help" && s.Name() != "completion" {
				names = append(names, s.Name())
			}
		}
		return &Error{Code: ExitUsage, Err: fmt.Errorf("%s needs a command", c.CommandPath()), Hint: "one of: " + strings.Join(names, ", ")}
	}
	hint := seeHelp(c)
	c.SuggestionsMinimumDistance = 2
	if s := c.SuggestionsFor(args[0]); len(s) > 0 {
		hint = fmt.Sprintf("did you mean %q?", c.CommandPath()+" "+s[0])
	}
	return &Error{Code: ExitUsage, Err: fmt.Errorf("unknown command %q for %q", args[0], c.CommandPath()), Hint: hint}
}

func seeHelp(c *cobra.Command) string { return fmt.Sprintf("see `%s --help`", c.CommandPath()) }

// Main runs root and returns the exit code. Whatever fails before a command's
// own code has begun (flags, arguments) is a usage error.
func Main(ctx context.Context, root *cobra.Command, args []string, stdout, stderr io.Writer) int {
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	started := false
	markStart(root, &started)
	cmd, err := root.ExecuteContextC(ctx)
	if err == nil {
		return ExitOK
	}
	if _, typed := errors.AsType[*Error](err); !started && !typed {
		err = &Error{Code: ExitUsage, Err: err, Hint: seeHelp(cmd)}
	}
	if _, typed := errors.AsType[*Error](err); !typed && errors.Is(err, context.Canceled) && ctx.Err() != nil {
		err = errors.New("interrupted")
	}
	if _, quiet := errors.AsType[Status](err); !quiet && ExitCode(err) == ExitUsage && HintOf(err) == "" {
		err = Hint(err, seeHelp(cmd))
	}
	return Report(stderr, err)
}

func markStart(c *cobra.Command, started *bool) {
	if run := c.RunE; run != nil {
		c.RunE = func(c *cobra.Command, args []string) error { *started = true; return run(c, args) }
	}
	for _, s := range c.Commands() {
		markStart(s, started)
	}
}

// SignalContext ends with the first SIGINT or SIGTERM, so that deferred
// clean-up runs. A second signal kills at once, for whoever cannot wait.
func SignalContext() (context.Context, context.CancelFunc) {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop)
	return ctx, stop
}

// WantsJSON reports whether --output json was given.
func WantsJSON(c *cobra.Command) bool {
	f := c.Flag("output")
	return f != nil && f.Value.String() == string(JSON)
}
