// Package upstream is the agent's side of its server: how it learns whom to
// trust, proves which machine it is, keeps its own SVID fresh, and calls the
// SPIRE Server API with it.
package upstream

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	nodeattestorv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/agent/nodeattestor/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"

	"github.com/rootlink/rootlink/internal/agent/notify"
	"github.com/rootlink/rootlink/internal/boundcodec"
	"github.com/rootlink/rootlink/plugins/tpmnode/wire"
)

const (
	callTimeout   = 10 * time.Second // any one call to the server
	attestTimeout = 90 * time.Second // one attestation: an RSA EK on a hardware TPM, and logs of tens of MiB
	dialTimeout   = 5 * time.Second
	// reconnectMax is the longest wait between tries to connect: a workload may
	// knock the moment the server is back. Not ResetConnectBackoff: it walks a
	// map that gRPC's balancer writes, and the runtime ends programs for that.
	reconnectMax   = time.Second
	minBackoff     = 500 * time.Millisecond
	maxBackoff     = 15 * time.Second
	rivalBackoff   = time.Minute      // first wait before taking a node back from another agent
	rivalMax       = 10 * time.Minute // and the longest
	drainOld       = 15 * time.Second // how long calls on a replaced connection may finish
	maxReply       = 16 << 20         // bytes of one reply
	maxReplyFields = 1 << 18          // in it, as boundcodec counts: 500 entries of a hundred selectors
	maxAttestSteps = 512              // challenges in one attestation, log chunks included
)

// Config is what a Node needs. All fields but Now are required.
type Config struct {
	TrustDomain  spiffeid.TrustDomain
	Server       string // host:port
	Trust        *Trust
	NodeAttestor nodeattestorv1.NodeAttestorClient
	// AttestationType is the node attestor's name; empty: tpmnode.
	AttestationType string
	Log             *slog.Logger
	Now             func() time.Time
}

// Node is this machine at its server.
type Node struct {
	cfg     Config
	changed notify.Broadcast // a new session

	reattest chan string // capacity 1: why
	fatal    chan error  // capacity 1
	tlsFault atomic.Pointer[tlsFault]
	skewed   atomic.Bool // the clock warning was given

	mu   sync.Mutex
	sess *Session // nil before the first attestation
	// attesting is set from before an attestation until its session is sess. In
	// between the server may know the new SVID alone.
	attesting bool
	// rivalWait is the next wait after another agent took the node over.
	rivalWait time.Duration
}

type tlsFault struct{ err error }

// New checks cfg.
func New(cfg Config) (*Node, error) {
	if cfg.TrustDomain.IsZero() || cfg.Server == "" || cfg.Trust == nil || cfg.NodeAttestor == nil || cfg.Log == nil {
		return nil, errors.New("upstream: incomplete configuration")
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.AttestationType == "" {
		cfg.AttestationType = wire.PluginName
	}
	return &Node{
		cfg:       cfg,
		reattest:  make(chan string, 1),
		fatal:     make(chan error, 1),
		rivalWait: rivalBackoff,
	}, nil
}

// Run attests, and attests again before each expiry and whenever the server
// asks for it, until ctx ends or the node is banned (ErrBanned)
// or the join line is another server's (ErrWrongServer).
func (n *Node) Run(ctx context.Context) error {
	defer n.drop()
	rival := false // another agent has the node
	for wait := minBackoff; ; {
		n.mu.Lock()
		n.attesting = true
		n.mu.Unlock()
		s, err := n.attest(ctx)
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, ErrBanned), errors.Is(err, ErrWrongServer):
			return err
		case err != nil:
			d := jitter(wait, 0.2)
			attrs := []any{"error", err, "retry_in", d.Round(time.Millisecond)}
			if h := hint(err); h != "" {
				attrs = append(attrs, "hint", h)
			}
			n.cfg.Log.Error("attestation failed", attrs...)
			wait = min(2*wait, maxBackoff)
			if err := n.sleep(ctx, d); err != nil {
				return n.end(ctx, err)
			}
			continue
		}
		wait = minBackoff
		n.install(s)
		if rival {
			n.cfg.Log.Warn("this agent is the node's again; if the other one still runs, it will take the node back", "agent_id", s.ID.String(),
				"hint", "run one agent for each TPM; a copy of a virtual machine needs a TPM of its own")
			rival = false
		}
		n.cfg.Log.Info("attested", "agent_id", s.ID.String(), "expires", s.leaf().NotAfter.UTC().Format(time.RFC3339))

		timer := time.NewTimer(HalfLife(n.cfg.Now(), s.leaf().NotAfter))
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case err := <-n.fatal:
			timer.Stop()
			return err
		case why := <-n.reattest:
			timer.Stop()
			var pause time.Duration
			if rival = why == whyRival; rival {
				pause = n.nextRivalWait()
			}
			n.cfg.Log.Info("attesting again", "why", why, "in", pause.Round(time.Second))
			if pause > 0 {
				if err := n.sleep(ctx, pause); err != nil {
					return n.end(ctx, err)
				}
			}
		case <-timer.C:
			n.noRival()
			n.cfg.Log.Debug("attesting again", "why", "half of the agent SVID's life is over")
		}
	}
}

// sleep waits d, or less when something final happens.
func (n *Node) sleep(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case err := <-n.fatal:
		return err
	case <-timer.C:
		return nil
	}
}

func (n *Node) end(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return nil
	}
	return err
}

func (n *Node) nextRivalWait() time.Duration {
	n.mu.Lock()
	defer n.mu.Unlock()
	d := n.rivalWait
	n.rivalWait = min(2*d, rivalMax)
	return jitter(d, 0.2)
}

// noRival: an SVID that lasted half its life had no rival.
func (n *Node) noRival() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.rivalWait = rivalBackoff
}

// install makes s the session and lets calls on the one before it finish.
func (n *Node) install(s *Session) {
	n.mu.Lock()
	old := n.sess
	n.sess, n.attesting = s, false
	n.mu.Unlock()
	// A request to attest that came from a call on the old session is met.
	select {
	case <-n.reattest:
	default:
	}
	if old != nil {
		time.AfterFunc(drainOld, func() { old.conn.Close() })
	}
	n.changed.Fire()
}

func (n *Node) drop() {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.sess != nil {
		n.sess.conn.Close()
		n.sess = nil
	}
}

// Changed returns a channel that closes at the next new agent SVID.
func (n *Node) Changed() <-chan struct{} { return n.changed.Wait() }

// Session returns the present session, or ErrNotAttested.
func (n *Node) Session() (*Session, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.sess == nil {
		return nil, ErrNotAttested
	}
	return n.sess, nil
}

const (
	whyAsked   = "the server asked for it"
	whyRival   = "another agent attested with this TPM"
	whyTainted = "the authority of the agent's SVID is being withdrawn"
	whyTrust   = "the server's authority is unknown"
	whyAK      = "the TPM's attestation key has no certificate"
)

// Do calls fn with the present session and a deadline. A refusal of the agent
// itself starts a new attestation, and fn is called once more with the session
// that it brings. No caller is told "no" because of the agent: the error is
// ErrBanned, which is final, or one that says that the agent is not attested.
func (n *Node) Do(ctx context.Context, fn func(context.Context, *Session) error) error {
	for attempt := 0; ; attempt++ {
		renewed := n.Changed()
		s, err := n.Session()
		if err != nil {
			return err
		}
		cctx, cancel := context.WithTimeout(ctx, callTimeout)
		err = fn(cctx, s)
		cancel()
		if err == nil {
			return nil
		}
		reason, denied := n.judge(s, err)
		switch {
		case !denied:
			return err
		case reason == types.PermissionDeniedDetails_AGENT_BANNED:
			return &refusedError{codes.PermissionDenied, ErrBanned, err}
		case attempt == 0 && n.await(ctx, s, renewed, reason):
			continue
		}
		return &refusedError{codes.Unavailable, ErrNotAttested, err}
	}
}

// await waits until another session took the place of s, for as long as a call
// may take. Taking a node back from a rival takes longer.
func (n *Node) await(ctx context.Context, s *Session, renewed <-chan struct{}, why types.PermissionDeniedDetails_Reason) bool {
	n.mu.Lock()
	replaced, attesting := n.sess != nil && n.sess != s, n.attesting
	n.mu.Unlock()
	if replaced {
		return true
	}
	if why == types.PermissionDeniedDetails_AGENT_NOT_ACTIVE && !attesting {
		return false
	}
	timer := time.NewTimer(callTimeout)
	defer timer.Stop()
	select {
	case <-renewed:
		return true
	case <-ctx.Done():
	case <-timer.C:
	}
	return false
}

// judge looks at a failed call on s and starts what must follow. It returns
// why the server refused the agent, if that is what happened.
func (n *Node) judge(s *Session, err error) (reason types.PermissionDeniedDetails_Reason, denied bool) {
	if f := n.tlsFault.Load(); f != nil && isUnknownAuthority(f.err) {
		n.ask(whyTrust)
	}
	if reason, denied = denial(err); !denied {
		return 0, false
	}
	n.mu.Lock()
	ours := n.sess != nil && n.sess != s || n.attesting
	n.mu.Unlock()
	// Our own attestation has ended s at the server, or is about to: that is no
	// rival, and there is nothing more to ask for.
	if ours && reason != types.PermissionDeniedDetails_AGENT_BANNED {
		return reason, true
	}
	switch reason {
	case types.PermissionDeniedDetails_AGENT_BANNED:
		select {
		case n.fatal <- ErrBanned:
		default:
		}
	case types.PermissionDeniedDetails_AGENT_NOT_ACTIVE:
		// Either two agents run on this TPM or somebody has a copy of it
		// (virtual machines are cloned with their vTPM). The newer one wins.
		// The calls that go on meanwhile are refused likewise: one alarm says it.
		if !s.replaced.Swap(true) {
			n.cfg.Log.Error("ALARM: another agent attested with this machine's TPM; its SVID replaced ours",
				"agent_id", s.ID.String(),
				"hint", "stop one of the two; the server's log has the other's address")
		}
		n.ask(whyRival)
	case types.PermissionDeniedDetails_AGENT_NOT_ATTESTED,
		types.PermissionDeniedDetails_AGENT_EXPIRED,
		types.PermissionDeniedDetails_AGENT_MUST_REATTEST:
		n.ask(whyAsked)
	default:
		return 0, false
	}
	return reason, true
}

// Uncertified tells that the AK has no valid certificate (the TPM was cleared,
// say), which the next attestation brings.
func (n *Node) Uncertified() { n.ask(whyAK) }

// ask has Run attest again soon. Asking twice is asking once.
func (n *Node) ask(why string) {
	select {
	case n.reattest <- why:
	default:
	}
}

// dial opens a connection that verifies the server and, with a session's
// certificate, authenticates as the agent. It connects in the background.
func (n *Node) dial(cert *tls.Certificate) (*grpc.ClientConn, error) {
	cfg := &tls.Config{
		MinVersion: tls.VersionTLS12,
		// The name is a SPIFFE ID, which VerifyConnection checks together with
		// the chain; crypto/tls cannot.
		InsecureSkipVerify: true,
		VerifyConnection: func(cs tls.ConnectionState) error {
			err := n.verifyServer(cs.PeerCertificates)
			n.tlsFault.Store(&tlsFault{err})
			return err
		},
	}
	if cert != nil {
		cfg.Certificates = []tls.Certificate{*cert}
	}
	return grpc.NewClient(target(n.cfg.Server),
		grpc.WithTransportCredentials(credentials.NewTLS(cfg)),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: reconnectMax},
			MinConnectTimeout: dialTimeout,
		}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxReply), grpc.ForceCodecV2(boundcodec.New(maxReplyFields))),
	)
}

// target makes gRPC resolve the name anew for each connection.
func target(server string) string { return "passthrough:///" + server }

// verifyServer checks the X509-SVID of the server: chain to the trust domain's
// authorities, and the ID that only its servers have.
func (n *Node) verifyServer(certs []*x509.Certificate) error {
	if len(certs) == 0 {
		return errors.New("server sent no certificate")
	}
	now := n.cfg.Now()
	id, _, err := x509svid.Verify(certs, n.cfg.Trust, x509svid.WithTime(now))
	if err != nil {
		ce := clockError(certs[0], now, func(at time.Time) error {
			_, _, err := x509svid.Verify(certs, n.cfg.Trust, x509svid.WithTime(at))
			return err
		})
		if ce != nil {
			return ce
		}
		return fmt.Errorf("verify the server's certificate: %w", err)
	}
	want, err := spiffeid.FromPath(n.cfg.TrustDomain, "/spire/server")
	if err != nil {
		return err
	}
	if id != want {
		return fmt.Errorf("server is %q, want %q", id, want)
	}
	return nil
}

func isUnknownAuthority(err error) bool {
	_, ok := errors.AsType[x509.UnknownAuthorityError](err)
	return ok
}

// NoteServerTime warns once when the server's clock, read from something it
// just made, is far from ours.
func (n *Node) NoteServerTime(server time.Time) {
	now := n.cfg.Now()
	if server.Sub(now).Abs() <= maxClockSkew {
		n.skewed.Store(false)
		return
	}
	if !n.skewed.Swap(true) {
		ce := &ClockError{Ours: now, Theirs: server}
		n.cfg.Log.Warn("clocks differ", "error", ce, "hint", ce.Hint())
	}
}

// HalfLife is the wait until about half of what is left before end, with a
// tenth of jitter so that a fleet that started together does not stay together.
func HalfLife(now, end time.Time) time.Duration {
	return max(jitter(end.Sub(now)/2, 0.1), 100*time.Millisecond)
}

func jitter(d time.Duration, part float64) time.Duration {
	return time.Duration(float64(d) * (1 + part*(2*rand.Float64()-1)))
}
