package vouch

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"runtime/debug"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"golang.org/x/time/rate"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/rootlink/rootlink/internal/boundcodec"
	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/internal/measured"
	"github.com/rootlink/rootlink/pkg/attest"
	"github.com/rootlink/rootlink/plugins/tpmnode/wire"
	workloadv1 "github.com/rootlink/rootlink/proto/rootlink/workload/v1"
)

// Bounds on what one connection may send, and on what it may wait for.
const (
	maxRequest     = 256 << 10 // bytes: an SVID with the largest evidence, and room
	maxFields      = 64        // in it
	maxHeaders     = 16 << 10  // bytes
	maxStreams     = 2         // calls at once on one connection, which take turns anyhow
	maxSVIDChain   = 5         // certificates
	maxSVIDBytes   = 96 << 10  // bytes of one of them
	connectTimeout = 10 * time.Second
	callTimeout    = 75 * time.Second // one call, a quote on a busy TPM included
	lastWords      = time.Second      // how long Close waits for calls to be answered
	logRate        = 20               // lines a second that callers cause
	logBurst       = 500
	// attestPatience is how long a call waits for an attestation: the agent may
	// have started a moment ago, and its workloads with it.
	attestPatience = 15 * time.Second
	attestPoll     = 200 * time.Millisecond
)

// Node is the machine that vouches.
type Node interface {
	Quoter
	// NodePath is the path of this node's agent ID.
	NodePath(ctx context.Context) (string, error)
}

// Settings are what a Service works by. They may change under way.
type Settings struct {
	TrustDomain  spiffeid.TrustDomain
	AgentDataDir string // of the SPIRE agent
	Attestor     measured.Attestor
	RecorderGID  uint32 // 0: none, no recorder is protected
	Logs         Logs
}

// Service serves the Voucher on a socket.
type Service struct {
	workloadv1.UnimplementedVoucherServer

	node Node
	log  *slog.Logger
	now  func() time.Time
	set  atomic.Pointer[Settings]
	grpc *grpc.Server

	lines  *rate.Limiter // of the log
	untold atomic.Uint64 // since the last one

	stopped chan struct{} // closed when the listener is gone
	close   sync.Once
}

// Listen opens the socket. The Service it returns answers once it is served.
func Listen(path string) (*net.UnixListener, error) { return measured.Listen(path, "quoter_socket") }

// Serve serves the Voucher on l until Close. What was measured on a connection
// outlives a change of settings: a build may have begun hours ago.
func Serve(l *net.UnixListener, node Node, s Settings, log *slog.Logger, now func() time.Time) *Service {
	v := &Service{node: node, log: log, now: now, lines: rate.NewLimiter(logRate, logBurst), stopped: make(chan struct{})}
	v.Change(s)
	v.grpc = grpc.NewServer(
		grpc.Creds(measured.Credentials()),
		grpc.MaxRecvMsgSize(maxRequest),
		grpc.ForceServerCodecV2(boundcodec.New(maxFields)),
		grpc.MaxHeaderListSize(maxHeaders),
		grpc.MaxConcurrentStreams(maxStreams),
		grpc.ConnectionTimeout(connectTimeout),
		grpc.UnaryInterceptor(v.unary),
		grpc.ReadBufferSize(4<<10), grpc.WriteBufferSize(4<<10),
	)
	workloadv1.RegisterVoucherServer(v.grpc, v)
	go func() {
		defer close(v.stopped)
		if err := v.grpc.Serve(measured.NewListener(l)); err != nil {
			log.Error("quoter socket failed", "error", err)
		}
	}()
	return v
}

// Change replaces the settings.
func (v *Service) Change(s Settings) { v.set.Store(&s) }

// Close answers what can be answered in a moment, ends the rest, and removes the
// socket.
func (v *Service) Close() {
	v.close.Do(func() {
		t := time.AfterFunc(lastWords, v.grpc.Stop)
		defer t.Stop()
		v.grpc.GracefulStop()
		<-v.stopped
	})
}

func (v *Service) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, h grpc.UnaryHandler) (_ any, err error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	defer func() {
		if r := recover(); r != nil {
			v.log.Error("panic", "method", info.FullMethod, "panic", fmt.Sprint(r), "stack", string(debug.Stack()))
			err = status.Error(codes.Internal, "internal error")
		}
	}()
	if err := measured.CheckHeader(ctx, info.FullMethod); err != nil {
		return nil, err
	}
	return h(ctx, req)
}

// Measure measures the caller and its stopped child.
func (v *Service) Measure(ctx context.Context, req *workloadv1.MeasureRequest) (*workloadv1.MeasureResponse, error) {
	if req.GetSpiffeId() != "" {
		return nil, status.Error(codes.InvalidArgument, "this socket chooses no identity: the SVID comes from the Workload API")
	}
	c, err := measured.CallerOf(ctx)
	if err != nil {
		return nil, err
	}
	unlock, err := c.Lock(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()
	s := v.set.Load()
	if err := c.MeasureStep(ctx, s.Attestor, s.RecorderGID); err != nil {
		return nil, err
	}
	return &workloadv1.MeasureResponse{Measurement: c.Step.Measurement(), TrustDomain: s.TrustDomain.Name()}, nil
}

// Vouch has the TPM commit to the caller's SVID, its statement and what was
// measured. Whether the caller holds the SVID's key is for the record's signature
// to show: without that key the answer is of no use.
func (v *Service) Vouch(ctx context.Context, req *workloadv1.VouchRequest) (*workloadv1.VouchResponse, error) {
	c, err := measured.CallerOf(ctx)
	if err != nil {
		return nil, err
	}
	chain, payload, err := readVouch(req)
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	unlock, err := c.Lock(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()
	s := v.set.Load()
	if err := c.StepEnded(s.RecorderGID); err != nil {
		return nil, err
	}
	if err := c.Step.OneStatement(payload); err != nil {
		return nil, err
	}
	d, err := v.detached(ctx, &c.Step, chain, payload)
	if err != nil {
		v.say(slog.LevelWarn, "no detached evidence", "error", err)
		return nil, vouchError(err)
	}
	b, err := d.Marshal()
	if err != nil {
		return nil, status.Error(codes.Internal, err.Error())
	}
	// Still the process that was measured: it alone gets the answer.
	if err := c.Check(); err != nil {
		return nil, measured.Error(err)
	}
	c.Step.Signed(payload)
	resp := &workloadv1.VouchResponse{Detached: b}
	if s.Logs != nil {
		resp.EventLog, resp.ImaLog = s.Logs(d.Evidence)
	}
	v.say(slog.LevelInfo, "vouched", "uri", chain[0].URIs[0].String(), "tool", fmt.Sprintf("%x", d.Evidence.Tool), "recorder_protected", c.Step.Protected())
	return resp, nil
}

// say logs what a caller made happen, and can make happen thousands of times a
// second: nobody's disk must fill with it.
func (v *Service) say(level slog.Level, msg string, args ...any) {
	if !v.lines.Allow() {
		v.untold.Add(1)
		return
	}
	if n := v.untold.Swap(0); n > 0 {
		v.log.Warn("callers cause more lines than are logged", "lines_left_out", n)
	}
	v.log.Log(context.Background(), level, msg, args...)
}

// readVouch takes a chain of certificates and a digest that is one.
func readVouch(req *workloadv1.VouchRequest) (chain []*x509.Certificate, payload [32]byte, err error) {
	if n := len(req.GetX509Svid()); n == 0 || n > maxSVIDChain {
		return nil, payload, fmt.Errorf("x509_svid: %d certificates, want 1 to %d", n, maxSVIDChain)
	}
	for _, der := range req.GetX509Svid() {
		if len(der) > maxSVIDBytes {
			return nil, payload, fmt.Errorf("x509_svid: a certificate of %d bytes, at most %d", len(der), maxSVIDBytes)
		}
	}
	if chain, err = parseDER(req.GetX509Svid()); err != nil {
		return nil, payload, fmt.Errorf("x509_svid: %w", err)
	}
	if key, ok := chain[0].PublicKey.(*ecdsa.PublicKey); !ok || key.Curve != elliptic.P256() {
		return nil, payload, errors.New(cli.JoinHint("x509_svid: its key is not ECDSA P-256",
			`set workload_x509_svid_key_type = "ec-p256" in the SPIRE agent's configuration`))
	}
	if len(req.GetPayloadSha256()) != len(payload) {
		return nil, payload, fmt.Errorf("payload_sha256: %d bytes, want %d", len(req.GetPayloadSha256()), len(payload))
	}
	copy(payload[:], req.GetPayloadSha256())
	if payload == ([32]byte{}) {
		return nil, payload, errors.New("payload_sha256: all zero, which means no statement")
	}
	return chain, payload, nil
}

// detached tries until the node is attested, for as long as that may take. A
// caller that waits for less hears why before its own deadline: after that it
// would know no more than that nobody answered.
func (v *Service) detached(ctx context.Context, step *measured.Step, chain []*x509.Certificate, payload [32]byte) (*attest.Detached, error) {
	patience := attestPatience
	if end, ok := ctx.Deadline(); ok {
		patience = min(patience, time.Until(end)*3/4)
	}
	deadline := time.NewTimer(patience)
	defer deadline.Stop()
	for {
		d, err := v.tryDetached(ctx, step, chain, payload)
		if !passes(err) {
			return d, err
		}
		t := time.NewTimer(attestPoll)
		select {
		case <-t.C:
			continue
		case <-deadline.C:
		case <-ctx.Done():
		}
		t.Stop()
		return nil, err
	}
}

// passes says whether err is one that an attestation ends, or a TPM that comes
// back.
func passes(err error) bool {
	return errors.Is(err, ErrNoAgentSVID) || errors.Is(err, ErrNotReady) || wire.IsMustAttest(err) || err != nil && status.Code(err) == codes.Unavailable
}

// ErrNotReady is what a Node answers while its host configures it.
var ErrNotReady = errors.New("the plugin is not configured")

func (v *Service) tryDetached(ctx context.Context, step *measured.Step, chain []*x509.Certificate, payload [32]byte) (*attest.Detached, error) {
	s := v.set.Load()
	agent, err := readAgentData(s.AgentDataDir, s.TrustDomain)
	if err != nil {
		return nil, err
	}
	path, err := v.node.NodePath(ctx)
	if err != nil {
		return nil, err
	}
	node, err := spiffeid.FromPath(s.TrustDomain, path)
	if err != nil {
		return nil, err
	}
	now := v.now()
	if err := agent.check(node, now); err != nil {
		return nil, err
	}
	id, err := checkSVID(chain, agent, s.TrustDomain, now)
	if err != nil {
		return nil, err
	}
	return Detached(ctx, v.node, Statement{
		Step: step, Origin: attest.OriginAgent, SPIFFEID: id, SVID: chain[0], AgentSVID: agent.svid, Payload: payload,
	})
}

// svidError is an SVID that nobody will vouch for.
type svidError struct{ err error }

func (e *svidError) Error() string { return "x509_svid: " + e.err.Error() }
func (e *svidError) Unwrap() error { return e.err }

// checkSVID fails unless chain is a workload's SVID of this trust domain, valid
// now: what a verifier would refuse is not worth a quote, and a caller should
// hear it before it publishes anything.
func checkSVID(chain []*x509.Certificate, agent *agentData, td spiffeid.TrustDomain, now time.Time) (spiffeid.ID, error) {
	id, err := x509svid.IDFromCert(chain[0])
	if err != nil {
		return id, &svidError{err}
	}
	if id.TrustDomain() != td {
		return id, &svidError{fmt.Errorf("it is of trust domain %q, this node is of %q", id.TrustDomain().Name(), td.Name())}
	}
	if p := id.Path(); p == "" || p == "/spire" || strings.HasPrefix(p, "/spire/") {
		return id, &svidError{fmt.Errorf("%s is not a workload's", id)}
	}
	if now.Before(chain[0].NotBefore) || now.After(chain[0].NotAfter) {
		return id, &svidError{cli.Hint(fmt.Errorf("it is valid from %s to %s only",
			chain[0].NotBefore.UTC().Format(time.RFC3339), chain[0].NotAfter.UTC().Format(time.RFC3339)),
			"fetch it again, the measurement still stands")}
	}
	if _, _, err := x509svid.Verify(chain, agent.bundle, x509svid.WithTime(now)); err != nil {
		return id, &svidError{err}
	}
	return id, nil
}

// vouchError is the one place that turns what went wrong into a status.
// Unavailable is what callers try again.
func vouchError(err error) error {
	var svid *svidError
	text := cli.JoinHint(err.Error(), cli.HintOf(err))
	switch {
	case errors.As(err, &svid):
		return status.Error(codes.PermissionDenied, text)
	case errors.Is(err, ErrNoAgentSVID):
		return status.Error(codes.Unavailable, cli.JoinHint(err.Error(), "is the SPIRE agent attested by this plugin? its log says so"))
	case errors.Is(err, ErrNotReady):
		return status.Error(codes.Unavailable, text)
	case wire.IsMustAttest(err):
		return status.Error(codes.Unavailable, cli.JoinHint(status.Convert(err).Message(),
			"the SPIRE agent attests when it starts; `spire-server agent evict` has it attest again at once"))
	}
	if st, ok := status.FromError(err); ok {
		return st.Err()
	}
	if errors.Is(err, attest.ErrDetached) || errors.Is(err, ErrOtherLeaf) {
		return status.Error(codes.Internal, text)
	}
	return status.Error(codes.FailedPrecondition, text)
}
