package recorder

import (
	"context"
	"errors"
	"os"

	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/internal/files"
	"github.com/rootlink/rootlink/pkg/link"
	workloadv1 "github.com/rootlink/rootlink/proto/rootlink/workload/v1"
)

// errLooked ends the tool of whoami, which must never run.
var errLooked = errors.New("looked")

// ownHash is the hash of this program as it sees itself.
func ownHash() ([32]byte, error) { return files.SHA256("/proc/self/exe") }

// explainer says what would be measured and issued.
type explainer interface {
	// Whoami explains this process, or its tool e stopped at exec.
	Whoami(ctx context.Context, e *Exec) (*workloadv1.WhoamiResponse, error)
}

// Whoami asks what this process, or a command that is started and killed
// before its first instruction, would be given.
func Whoami(from Sources, command []string, sign bool) (*workloadv1.WhoamiResponse, error) {
	ctx, stop := interruptible()
	defer stop()
	var path string
	if sign {
		path, command = "/proc/self/exe", []string{"rootlink", PredicateArg, os.DevNull, link.PredicateType}
	} else if len(command) > 0 {
		var err error
		if path, err = Lookup(command[0], os.Environ()); err != nil {
			return nil, explain(err)
		}
	}
	c, err := from.connect(ctx)
	if err != nil {
		return nil, explain(err)
	}
	defer c.close()
	var a explainer
	if c.ours {
		agent := newAgent(ctx, c.agent)
		defer agent.unwatch()
		a = agent
	} else {
		st := newStock(ctx, c.agent, c.quoter)
		defer st.unwatch()
		a = st
	}
	outer := ctx
	ctx, cancel := context.WithTimeout(ctx, oneAttempt)
	defer cancel()
	ask := func(e *Exec) (*workloadv1.WhoamiResponse, error) {
		resp, err := a.Whoami(ctx, e)
		if outer.Err() != nil {
			return nil, outer.Err()
		}
		return resp, err
	}
	if len(command) == 0 {
		resp, err := ask(nil)
		return resp, explain(err)
	}
	var resp *workloadv1.WhoamiResponse
	_, err = Run(Command{Path: path, Args: command, Env: os.Environ(), Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr}, func(e *Exec) error {
		var err error
		if resp, err = ask(e); err != nil {
			return err
		}
		resp.Notes = append(resp.Notes, scriptNotes(e, os.Environ())...)
		return errLooked
	})
	if err != nil && !errors.Is(err, errLooked) {
		return nil, explain(err)
	}
	if resp == nil {
		return nil, cli.Fail(cli.ExitRun, errors.New("the command ended before it could be looked at"), "")
	}
	return resp, nil
}
