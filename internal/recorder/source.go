package recorder

import (
	"cmp"
	"context"
	"errors"
	"os"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/pkg/attest"
	"github.com/rootlink/rootlink/pkg/link"
	workloadv1 "github.com/rootlink/rootlink/proto/rootlink/workload/v1"
)

// source is where a step's key, SVID and evidence come from.
type source interface {
	// Route says before the tool starts which way the step goes; empty for the
	// way that needs no words.
	Route() string
	// Note is what environment.recorder of the link says of it; may be empty.
	Note() string
	// Measure has this process and its stopped tool measured; nil when nobody
	// does, which was asked for.
	Measure(ctx context.Context, spiffeID string) (*workloadv1.MeasureResponse, error)
	// Sign signs, and tries again under the same measurement until ctx ends;
	// waiting is told each reason.
	Sign(ctx context.Context, p Prepared, waiting func(error)) (*Signed, error)
	// Close ends the connections, and with them what was measured.
	Close() error
}

// Sources says which sources there are, as somebody typed it.
type Sources struct {
	Socket   string // of the agent; "" is that of SPIFFE_ENDPOINT_SOCKET
	Quoter   string // of the node attestor of a SPIRE agent; "" is that of ROOTLINK_QUOTER_SOCKET
	SPIFFEID string // which identity, when several match
	// NoEvidence signs with an SVID of the Workload API alone. Nothing ties
	// such a link to hardware, so it has to be asked for.
	NoEvidence bool
	// Patience is how long a SPIRE agent that knows no identity for us is asked
	// again: it hears of a new entry some seconds after the server.
	Patience time.Duration
}

// EnvQuoter names the quoter socket.
const EnvQuoter = "ROOTLINK_QUOTER_SOCKET"

// ErrNoQuoter: a SPIRE agent, and nobody beside it who shows its TPM.
var ErrNoQuoter = errors.New("the agent at this socket is a SPIRE agent's, which gives an identity and no evidence, and no quoter socket is named")

func (s Sources) check() error {
	if s.NoEvidence && s.Quoter != "" {
		return cli.Fail(cli.ExitRun, errors.New("both --evidence none and --quoter-socket"), "leave one of them out")
	}
	return nil
}

// connected are the sockets that were there.
type connected struct {
	agent    *grpc.ClientConn
	ours     bool             // rootlink-agent is behind it
	quoter   *grpc.ClientConn // nil where none is named, answers or is needed
	noQuoter error            // why
}

func (c *connected) close() {
	c.agent.Close()
	if c.quoter != nil {
		c.quoter.Close()
	}
}

// connect connects to all that may be needed, and then gives up the recorder
// group, which each of them has seen.
func (s Sources) connect(ctx context.Context) (_ *connected, err error) {
	if err := s.check(); err != nil {
		return nil, err
	}
	c := &connected{noQuoter: cli.Fail(cli.ExitRun, ErrNoQuoter,
		"name the quoter_socket of its rootlink plugin with --quoter-socket or in "+EnvQuoter+"; --evidence none signs without hardware behind it")}
	if c.agent, err = dialAgent(ctx, s.Socket); err != nil {
		return nil, err
	}
	if q := cmp.Or(s.Quoter, os.Getenv(EnvQuoter)); q != "" && !s.NoEvidence {
		c.quoter, c.noQuoter = dial(ctx, q, "the SPIRE agent with the plugin rootlink-tpmnode", "--quoter-socket")
	}
	if _, err = DropGroup(); err != nil {
		err = cli.Fail(cli.ExitRun, err, "")
	}
	if err == nil && !s.NoEvidence {
		c.ours, err = hasIssuer(ctx, c.agent)
	}
	if err != nil {
		c.close()
		return nil, err
	}
	if c.ours && c.quoter != nil { // it shows its own TPM
		c.quoter.Close()
		c.quoter = nil
	}
	return c, nil
}

// open fails on what would fail at the end of the step.
func (s Sources) open(ctx context.Context) (source, error) {
	c, err := s.connect(ctx)
	if err != nil {
		return nil, err
	}
	if c.ours {
		return newAgent(ctx, c.agent), nil
	}
	if c.quoter == nil && !s.NoEvidence {
		c.close()
		return nil, c.noQuoter
	}
	st := newStock(ctx, c.agent, c.quoter)
	if _, err := st.first(ctx, s.SPIFFEID, s.Patience); err != nil {
		st.Close()
		return nil, err
	}
	return st, nil
}

// hasIssuer asks whether rootlink-agent is there, by a request that it refuses:
// nothing was measured on this connection.
func hasIssuer(ctx context.Context, conn *grpc.ClientConn) (bool, error) {
	limited, cancel := context.WithTimeout(withHeader(ctx), oneAttempt)
	defer cancel()
	_, err := workloadv1.NewIssuerClient(conn).Issue(limited, &workloadv1.IssueRequest{})
	if ctx.Err() != nil {
		return false, ctx.Err()
	}
	switch status.Code(err) {
	case codes.Unimplemented:
		return false, nil
	case codes.Unavailable, codes.DeadlineExceeded:
		return false, agentError(err)
	}
	return true, nil
}

// loss is what happens once to a connection that was measured on: it cannot be
// made again.
type loss struct {
	over chan struct{}
	once *sync.Once
	why  *error // read after over
}

func newLoss() loss { return loss{make(chan struct{}), new(sync.Once), new(error)} }

func (l loss) end(why error) {
	l.once.Do(func() {
		*l.why = why
		close(l.over)
	})
}

// Prepared is what a step's key will sign: a *link.Prepared or a
// *layout.Classic.
type Prepared interface{ Digest() [32]byte }

// Signed is a bundle and the logs that its evidence names.
type Signed struct {
	Bundle   *link.Bundle
	Classic  []byte   // in place of the bundle
	KeyHash  [32]byte // SHA-256 of the key's SPKI
	EventLog []byte
	IMALog   []byte
	Evidence *attest.Evidence // nil when the step has none
	Detached *attest.Detached // holds Evidence, when the SVID does not
	// DetachedAs is the name of the file with Detached.
	DetachedAs string
	SPIFFEID   string
	// Announced is where the server says that the signature gets its time.
	Announced announced
}

const (
	firstRetry = 250 * time.Millisecond
	lastRetry  = 5 * time.Second
	oneAttempt = time.Minute // a quote that queues behind others takes its time
)

// persist does it until it succeeds, fails for good, or what was measured is lost.
func persist(ctx context.Context, lost loss, waiting func(error), do func(context.Context) (*Signed, error)) (*Signed, error) {
	var before error // of the attempt before
	for wait := firstRetry; ; wait = min(2*wait, lastRetry) {
		attempt, cancel := context.WithTimeout(ctx, oneAttempt)
		s, err := do(attempt)
		cancel()
		switch {
		case err == nil:
			return s, nil
		case ctx.Err() != nil && before != nil:
			return nil, before // the reason, not that time is up
		case !temporary(err) || ctx.Err() != nil:
			return nil, err
		}
		before = err
		select {
		case <-lost.over:
			return nil, *lost.why
		default:
		}
		waiting(err)
		t := time.NewTimer(wait)
		select {
		case <-t.C:
		case <-lost.over:
			t.Stop()
			return nil, *lost.why
		case <-ctx.Done():
			t.Stop()
			return nil, err
		}
	}
}
