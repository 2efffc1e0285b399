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
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/pkg/attest"
	"github.com/rootlink/rootlink/pkg/layout"
	"github.com/rootlink/rootlink/pkg/link"
	workloadv1 "github.com/rootlink/rootlink/proto/rootlink/workload/v1"
)

// EnvSocket is the variable of the SPIFFE Workload Endpoint specification, §4.
const EnvSocket = cli.EnvEndpoint

// maxReply bounds what the agent may send: an SVID with its logs.
const maxReply = attest.MaxEventLog + attest.MaxIMALog + 1<<20

// Agent is one connection to the agent. What the agent measured stays with it.
type Agent struct {
	conn   *grpc.ClientConn
	issuer workloadv1.IssuerClient

	unwatch context.CancelFunc
	lost    chan struct{} // closed when the connection that was measured on is gone
	why     error         // what the agent said when it left; read after lost
}

// Connect connects to the agent's socket, from SPIFFE_ENDPOINT_SOCKET when
// socket is empty, and then gives up the recorder group: the agent has seen it.
func Connect(ctx context.Context, socket string) (*Agent, error) {
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
	if scheme, _, ok := strings.Cut(socket, ":"); ok && scheme != "unix" && !strings.HasPrefix(socket, "/") {
		return nil, cli.Fail(cli.ExitRun, fmt.Errorf("%s: the agent is reached over a Unix socket only, because that is how it knows who asks", socket),
			"use unix:///path/to/agent.sock")
	}
	conn, err := cli.Socket{Path: socket, Daemon: "rootlink-agent", Flag: "--socket"}.Dial(ctx,
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxReply)))
	if err != nil {
		return nil, cli.Fail(cli.ExitRun, err, cli.HintOf(err))
	}
	if _, err := DropGroup(); err != nil {
		conn.Close()
		return nil, cli.Fail(cli.ExitRun, err, "")
	}
	a := &Agent{conn: conn, issuer: workloadv1.NewIssuerClient(conn), lost: make(chan struct{})}
	ctx, a.unwatch = context.WithCancel(context.WithoutCancel(ctx))
	go a.watch(ctx)
	return a, nil
}

// Close ends the connection, and with it what was measured.
func (a *Agent) Close() error {
	a.unwatch()
	return a.conn.Close()
}

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
		a.why = agentError(err)
	case codes.Unavailable:
		a.why = cli.Fail(cli.ExitRun, errors.New("the connection to the agent was lost, and with it what the agent measured"),
			"look at the log of rootlink-agent, then run the step again")
	default:
		return // an agent without this call, or we closed it
	}
	close(a.lost)
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
	return resp, nil
}

// Whoami asks what would be issued, to this process or to its stopped tool.
func (a *Agent) Whoami(ctx context.Context, step bool) (*workloadv1.WhoamiResponse, error) {
	resp, err := a.issuer.Whoami(withHeader(ctx), &workloadv1.WhoamiRequest{Step: step})
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
			e.Message = "the agent at this socket cannot sign build steps: it is not rootlink-agent, or it uses a server that knows no evidence (" + what + ")"
			hint = "signing with a stock SPIRE agent or server is not supported yet; run rootlink-agent and rootlink-server, or ask for an unsigned record with --if-unavailable unsigned"
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

// Prepared is what a step's one key will sign: a *link.Prepared or a
// *layout.Classic.
type Prepared interface{ Digest() [32]byte }

// Signed is a bundle and the logs that its evidence names.
type Signed struct {
	Bundle   *link.Bundle
	Classic  []byte   // in place of the bundle
	KeyHash  [32]byte // SHA-256 of the key's SPKI
	EventLog []byte
	IMALog   []byte
	Evidence *attest.Evidence
	SPIFFEID string
	// Announced is where the server says that the signature gets its time.
	Announced announced
}

const (
	firstRetry = 250 * time.Millisecond
	lastRetry  = 5 * time.Second
	oneAttempt = time.Minute // a quote that queues behind others takes its time
)

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
	var before error // of the attempt before
	for wait := firstRetry; ; wait = min(2*wait, lastRetry) {
		s, err := a.signOnce(ctx, p, key, spki)
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
		case <-a.lost:
			return nil, a.why
		default:
		}
		waiting(err)
		t := time.NewTimer(wait)
		select {
		case <-t.C:
		case <-a.lost:
			t.Stop()
			return nil, a.why
		case <-ctx.Done():
			t.Stop()
			return nil, err
		}
	}
}

func (a *Agent) signOnce(ctx context.Context, p Prepared, key *ecdsa.PrivateKey, spki []byte) (*Signed, error) {
	ctx, cancel := context.WithTimeout(withHeader(ctx), oneAttempt)
	defer cancel()
	digest := p.Digest()
	prep, err := a.issuer.Prepare(ctx, &workloadv1.PrepareRequest{Spki: spki, PayloadSha256: digest[:]})
	if err != nil {
		return nil, agentError(err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		ExtraExtensions: []pkix.Extension{{Id: attest.ExtensionID(), Value: prep.GetEvidence()}},
	}, key)
	if err != nil {
		return nil, err
	}
	resp, err := a.issuer.Issue(ctx, &workloadv1.IssueRequest{Csr: csr})
	if err != nil {
		return nil, agentError(err)
	}
	if len(resp.GetX509Svid()) == 0 {
		return nil, errors.New("the agent sent no SVID")
	}
	leaf, err := x509.ParseCertificate(resp.GetX509Svid()[0])
	if err != nil {
		return nil, fmt.Errorf("the SVID cannot be read: %w", err)
	}
	if len(leaf.URIs) != 1 {
		return nil, fmt.Errorf("the SVID has %d URIs, not one", len(leaf.URIs))
	}
	var b *link.Bundle
	var classic []byte
	switch p := p.(type) {
	case *link.Prepared:
		b, err = p.Sign(key, leaf)
	case *layout.Classic:
		classic, err = p.Sign(key, leaf)
	default:
		err = fmt.Errorf("nothing signs a %T", p)
	}
	if err != nil {
		return nil, err
	}
	ev, err := attest.FromCertificate(leaf)
	if err != nil {
		return nil, err
	}
	return &Signed{
		Bundle: b, Classic: classic, KeyHash: sha256.Sum256(spki), Evidence: ev, SPIFFEID: leaf.URIs[0].String(),
		EventLog: resp.GetEventLog(), IMALog: resp.GetImaLog(),
		Announced: announced{resp.GetTimestampUrls(), resp.GetLogUrl()},
	}, nil
}
