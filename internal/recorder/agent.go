package recorder

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"os"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/pkg/attest"
	workloadv1 "github.com/rootlink/rootlink/proto/rootlink/workload/v1"
)

// EnvSocket is the variable of the SPIFFE Workload Endpoint specification, §4.
const EnvSocket = cli.EnvEndpoint

// maxReply bounds what the agent may send: an SVID with its logs.
const maxReply = attest.MaxEventLog + attest.MaxIMALog + 1<<20

// Agent is one connection to rootlink-agent. What it measured stays with it.
type Agent struct {
	conn   *grpc.ClientConn
	issuer workloadv1.IssuerClient

	measured *workloadv1.Measurement // the last

	unwatch context.CancelFunc
	lost    loss // the connection that was measured on
}

// Connect connects to the agent's socket, from SPIFFE_ENDPOINT_SOCKET when
// socket is empty, and then gives up the recorder group: the agent has seen it.
func Connect(ctx context.Context, socket string) (*Agent, error) {
	conn, err := dialAgent(ctx, socket)
	if err != nil {
		return nil, err
	}
	if _, err := DropGroup(); err != nil {
		conn.Close()
		return nil, cli.Fail(cli.ExitRun, err, "")
	}
	return newAgent(ctx, conn), nil
}

// dialAgent connects with the recorder group, if there is one.
func dialAgent(ctx context.Context, socket string) (*grpc.ClientConn, error) {
	if env := os.Getenv(EnvSocket); socket == "" && env != "" {
		var err error
		if socket, err = cli.EndpointSocket(env); err != nil {
			return nil, cli.Fail(cli.ExitRun, err, "set it to unix:///path/to/agent.sock, or name the socket with --socket")
		}
	}
	if socket == "" {
		return nil, cli.Fail(cli.ExitRun, errors.New("no agent: its socket is not known"),
			"name it with --socket or in "+EnvSocket+", as unix:///path/to/agent.sock")
	}
	return dial(ctx, socket, "rootlink-agent", "--socket")
}

// dial connects now. An idle connection stays: what was measured on it would go
// with it, and a build may say nothing for hours.
func dial(ctx context.Context, socket, daemon, flag string) (*grpc.ClientConn, error) {
	if scheme, _, ok := strings.Cut(socket, ":"); ok && scheme != "unix" && !strings.HasPrefix(socket, "/") {
		return nil, cli.Fail(cli.ExitRun, fmt.Errorf("%s: the agent is reached over a Unix socket only, because that is how it knows who asks", socket),
			"use unix:///path/to/agent.sock")
	}
	conn, err := cli.Socket{Path: socket, Daemon: daemon, Flag: flag}.Dial(ctx,
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxReply)), grpc.WithIdleTimeout(0))
	return conn, cli.Fail(cli.ExitRun, err, cli.HintOf(err))
}

func newAgent(ctx context.Context, conn *grpc.ClientConn) *Agent {
	a := &Agent{conn: conn, issuer: workloadv1.NewIssuerClient(conn), lost: newLoss()}
	ctx, a.unwatch = context.WithCancel(context.WithoutCancel(ctx))
	go a.watch(ctx)
	return a
}

// Close ends the connection, and with it what was measured.
func (a *Agent) Close() error {
	a.unwatch()
	return a.conn.Close()
}

// Route says nothing before the tool starts: this is the way that needs no words,
// and whether the server takes evidence shows when it has issued.
func (a *Agent) Route() string { return "" }

// Note: the key is made for the one statement, as ever.
func (a *Agent) Note() string { return "" }

// watch keeps a call open for as long as the connection lives. gRPC connects
// again by itself, but what the agent measured does not come back with it, and
// an agent that leaves for good says why only to open calls.
func (a *Agent) watch(ctx context.Context) {
	stream, err := healthpb.NewHealthClient(a.conn).Watch(withHeader(ctx), &healthpb.HealthCheckRequest{})
	for err == nil {
		_, err = stream.Recv()
	}
	switch status.Code(err) {
	case codes.PermissionDenied:
		a.lost.end(agentError(err))
	case codes.Unavailable:
		a.lost.end(cli.Fail(cli.ExitRun, errors.New("the connection to the agent was lost, and with it what the agent measured"),
			"look at the log of rootlink-agent, then run the step again"))
	default: // an agent without this call, or we closed it
	}
}

// withHeader adds what the SPIFFE Workload Endpoint specification, §3,
// demands against requests forged by way of a browser or proxy.
func withHeader(ctx context.Context) context.Context {
	return metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", "true")
}

// Measure has the agent measure this process and its stopped tool.
func (a *Agent) Measure(ctx context.Context, spiffeID string) (*workloadv1.MeasureResponse, error) {
	resp, err := a.issuer.Measure(withHeader(ctx), &workloadv1.MeasureRequest{SpiffeId: spiffeID})
	if err != nil {
		return nil, agentError(err)
	}
	if resp.GetMeasurement() == nil || len(resp.GetMeasurement().GetTool()) != sha256.Size {
		return nil, cli.Fail(cli.ExitRun, errors.New("the agent measured no tool"), "install the agent and rootlink from one build")
	}
	a.measured = resp.GetMeasurement()
	return resp, nil
}

// Whoami asks what would be issued, to this process or to its stopped tool.
func (a *Agent) Whoami(ctx context.Context, e *Exec) (*workloadv1.WhoamiResponse, error) {
	resp, err := a.issuer.Whoami(withHeader(ctx), &workloadv1.WhoamiRequest{Step: e != nil})
	return resp, agentError(err)
}

// agentError makes a person's error of an RPC's. The agent puts what to do
// behind "hint:" in its message.
func agentError(err error) error {
	if err == nil {
		return nil
	}
	st, ok := status.FromError(err)
	if !ok {
		return cli.Fail(cli.ExitRun, err, cli.HintOf(err))
	}
	what, hint := cli.CutHint(st.Message())
	e := &AgentError{Code: st.Code(), Message: what}
	if hint == "" {
		switch st.Code() {
		case codes.Unimplemented:
			e.Message = "the agent at this socket cannot sign build steps (" + what + ")"
			hint = "install rootlink-agent and rootlink from one build, or ask for an unsigned record with --if-unavailable unsigned"
		case codes.Unavailable, codes.DeadlineExceeded:
			hint = "look at the logs of rootlink-agent and rootlink-server; --issue-timeout says how long to wait for them"
		case codes.PermissionDenied:
			if strings.HasPrefix(what, "no SVID issued") {
				hint = "the server refused it on what the TPM and the agent showed; the log of rootlink-server has the reason in full"
				break
			}
			hint = "`rootlink whoami -- COMMAND` shows what was measured and what is missing"
		case codes.NotFound:
			hint = "the entry was deleted, or this node no longer has what the entry asks of it (a PCR policy, say): `rootlink whoami -- COMMAND` shows what it has now"
		case codes.FailedPrecondition, codes.Aborted:
			hint = "run the step again; if it stays so, look at the log of rootlink-agent"
		}
	}
	return cli.Fail(cli.ExitRun, e, hint)
}

// AgentError is what the agent answered.
type AgentError struct {
	Code    codes.Code
	Message string
}

func (e *AgentError) Error() string {
	if e.Message == "" {
		return "agent: " + e.Code.String()
	}
	return e.Message
}

// Unavailable reports whether err means that there is no agent, no server or
// no identity to be had, rather than that something is wrong.
func Unavailable(err error) bool {
	if ae, ok := errors.AsType[*AgentError](err); ok {
		switch ae.Code {
		case codes.Unavailable, codes.DeadlineExceeded, codes.Unimplemented, codes.PermissionDenied:
			return true
		}
		return false
	}
	return errors.Is(err, ErrTrace)
}

// temporary reports whether the same call may succeed later. Aborted: the
// evidence grew too old while the server was away; Prepare makes new.
func temporary(err error) bool {
	ae, ok := errors.AsType[*AgentError](err)
	if !ok {
		return false
	}
	switch ae.Code {
	case codes.Unavailable, codes.DeadlineExceeded, codes.Aborted, codes.ResourceExhausted:
		return true
	}
	return false
}

// Sign makes a key, has the TPM commit it to the statement, gets its SVID and
// signs. It retries under the same measurement until ctx ends; waiting is told
// each reason.
func (a *Agent) Sign(ctx context.Context, p Prepared, waiting func(error)) (*Signed, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return nil, err
	}
	return persist(ctx, a.lost, waiting, func(ctx context.Context) (*Signed, error) { return a.signOnce(ctx, p, key, spki) })
}

func (a *Agent) signOnce(ctx context.Context, p Prepared, key *ecdsa.PrivateKey, spki []byte) (*Signed, error) {
	ctx = withHeader(ctx)
	digest := p.Digest()
	prep, err := a.issuer.Prepare(ctx, &workloadv1.PrepareRequest{Spki: spki, PayloadSha256: digest[:]})
	if err != nil {
		return nil, agentError(err)
	}
	// Without evidence to put in, the server takes none: it comes with the SVID.
	template := &x509.CertificateRequest{}
	beside := len(prep.GetEvidence()) == 0
	if !beside {
		template.ExtraExtensions = []pkix.Extension{{Id: attest.ExtensionID(), Value: prep.GetEvidence()}}
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, template, key)
	if err != nil {
		return nil, err
	}
	resp, err := a.issuer.Issue(ctx, &workloadv1.IssueRequest{Csr: csr})
	if err != nil {
		return nil, agentError(err)
	}
	if beside != (len(resp.GetDetached()) > 0) {
		return nil, fmt.Errorf("%w: the agent sent it in another place than it said, or not at all", ErrEvidence)
	}
	s := &svid{key: key}
	if s.leaf, err = oneLeaf(resp.GetX509Svid()); err != nil {
		return nil, err
	}
	signed, err := s.sign(p, func() (*attest.Detached, error) {
		if !beside {
			return nil, nil
		}
		return readDetached(resp.GetDetached(), attest.OriginCaller, a.measured)
	})
	if err != nil {
		return nil, err
	}
	signed.EventLog, signed.IMALog = resp.GetEventLog(), resp.GetImaLog()
	signed.Announced = announced{resp.GetTimestampUrls(), resp.GetLogUrl()}
	return signed, nil
}
