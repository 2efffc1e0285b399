package recorder

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"strings"
	"time"

	workloadpb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/status"

	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/pkg/attest"
	workloadv1 "github.com/rootlink/rootlink/proto/rootlink/workload/v1"
)

// ErrKeyType: the SVID's key is of a kind that signs no bundle.
var ErrKeyType = errors.New("its key is not ECDSA P-256")

// maxSVIDs bounds what is looked at of the identities that one process has.
const maxSVIDs = 64

// stock is a SPIRE agent's Workload API, and the socket on which the node
// attestor beside it vouches. The agent makes key and SVID, gives them to
// whatever matches an entry, and gives the same ones to every step of an hour.
type stock struct {
	conn     *grpc.ClientConn
	workload workloadpb.SpiffeWorkloadAPIClient
	quoter   *grpc.ClientConn // nil: no evidence
	voucher  workloadv1.VoucherClient

	id       string // that this step signs as, once known
	measured *workloadv1.Measurement

	unwatch context.CancelFunc
	lost    loss // the connection to the quoter socket
}

func newStock(ctx context.Context, conn, quoter *grpc.ClientConn) *stock {
	s := &stock{conn: conn, workload: workloadpb.NewSpiffeWorkloadAPIClient(conn), quoter: quoter, lost: newLoss()}
	ctx, s.unwatch = context.WithCancel(context.WithoutCancel(ctx))
	if quoter != nil {
		s.voucher = workloadv1.NewVoucherClient(quoter)
		go s.watch(ctx)
	}
	return s
}

func (s *stock) Close() error {
	s.unwatch()
	err := s.conn.Close()
	if s.quoter != nil {
		err = errors.Join(err, s.quoter.Close())
	}
	return err
}

// watch waits for the end of the connection that was there from the start. gRPC
// makes another by itself, which knows nothing of what was measured.
func (s *stock) watch(ctx context.Context) {
	ready := false
	for {
		state := s.quoter.GetState()
		ready = ready || state == connectivity.Ready
		if ready && state != connectivity.Ready || state == connectivity.TransientFailure {
			s.lost.end(cli.Fail(cli.ExitRun, errors.New("the connection to the quoter socket was lost, and with it what was measured there"),
				"look at the log of the SPIRE agent, which restarts no plugin: start it again, then run the step again"))
			return
		}
		if !s.quoter.WaitForStateChange(ctx, state) {
			return
		}
	}
}

func (s *stock) Route() string {
	if s.quoter == nil {
		return fmt.Sprintf("signing as %s with the Workload API's own SVID, WITHOUT EVIDENCE: nothing will tie this to hardware", s.id)
	}
	return fmt.Sprintf("signing as %s with a SPIRE agent's SVID, whose key the agent made; the node's evidence lies beside the bundle", s.id)
}

// Note says in the link what a reader of trust.json's requirements should know:
// one key signs whatever an SVID's life brings.
func (s *stock) Note() string {
	if s.quoter == nil {
		return " (no evidence; SPIRE agent's key)"
	}
	return " (SPIRE agent's key)"
}

// first fetches the SVID before anything else happens, and keeps its name: at the
// end of the step it must be the same identity, whatever its SVID is then.
func (s *stock) first(ctx context.Context, wanted string, patience time.Duration) (*svid, error) {
	limited, cancel := context.WithTimeout(ctx, oneAttempt)
	defer cancel()
	s.id = wanted
	v, err := s.fetch(limited)
	again := time.NewTicker(time.Second)
	defer again.Stop()
	for end := time.Now().Add(patience); unknown(err) && time.Now().Before(end); v, err = s.fetch(limited) {
		select {
		case <-again.C:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	if err == nil {
		s.id = v.id()
	}
	return v, err
}

// svids asks for what the Workload API has for this process now.
func (s *stock) svids(ctx context.Context) ([]*workloadpb.X509SVID, error) {
	ctx, cancel := context.WithCancel(withHeader(ctx))
	defer cancel()
	stream, err := s.workload.FetchX509SVID(ctx, &workloadpb.X509SVIDRequest{})
	var resp *workloadpb.X509SVIDResponse
	if err == nil {
		resp, err = stream.Recv()
	}
	if err != nil {
		return nil, workloadAPIError(err)
	}
	if n := len(resp.GetSvids()); n == 0 || n > maxSVIDs {
		return nil, fmt.Errorf("the agent sent %d SVIDs, at most %d are looked at", n, maxSVIDs)
	}
	return resp.GetSvids(), nil
}

// fetch returns the newest SVID of s.id, or of the only identity there is.
func (s *stock) fetch(ctx context.Context) (*svid, error) {
	have, err := s.svids(ctx)
	if err != nil {
		return nil, err
	}
	var found []*workloadpb.X509SVID
	var ids []string
	for _, v := range have {
		ids = append(ids, v.GetSpiffeId())
		if s.id == "" || v.GetSpiffeId() == s.id {
			found = append(found, v)
		}
	}
	switch {
	case len(found) == 0:
		return nil, cli.Fail(cli.ExitRun, &AgentError{Code: codes.PermissionDenied, Message: fmt.Sprintf("the SPIRE agent gives no SVID for %s, only for %s", s.id, strings.Join(ids, ", "))},
			"`rootlink whoami` shows the identities, and the entry to create")
	case len(found) > 1 && s.id == "":
		return nil, cli.Fail(cli.ExitRun, fmt.Errorf("several identities match: %s", strings.Join(ids, ", ")), "choose one with --spiffe-id")
	}
	v, err := readSVID(found[0])
	if err != nil {
		return nil, err
	}
	// An agent that lost its server goes on giving out what it has.
	if now := time.Now(); now.After(v.leaf.NotAfter) {
		return nil, cli.Fail(cli.ExitRun, &AgentError{Code: codes.Unavailable, Message: fmt.Sprintf("the SVID of %s ended at %s", v.id(), v.leaf.NotAfter.UTC().Format(time.RFC3339))},
			"the SPIRE agent did not renew it: look at its log, and at its server's")
	}
	v.bare = s.quoter == nil
	return v, nil
}

// unknown: the agent has no such identity for this process, yet.
func unknown(err error) bool {
	e, ok := errors.AsType[*AgentError](err)
	return ok && e.Code == codes.PermissionDenied
}

func readSVID(m *workloadpb.X509SVID) (*svid, error) {
	certs, err := x509.ParseCertificates(m.GetX509Svid())
	if err != nil {
		return nil, fmt.Errorf("the SVID of %s cannot be read: %w", m.GetSpiffeId(), err)
	}
	var chain [][]byte
	for _, c := range certs {
		chain = append(chain, c.Raw)
	}
	leaf, err := oneLeaf(chain)
	if err != nil {
		return nil, err
	}
	if id := leaf.URIs[0].String(); id != m.GetSpiffeId() {
		return nil, fmt.Errorf("the SVID is of %s, the agent says of %s", id, m.GetSpiffeId())
	}
	k, err := x509.ParsePKCS8PrivateKey(m.GetX509SvidKey())
	if err != nil {
		return nil, errors.New("the SVID's key cannot be read") // the reason might quote it
	}
	key, ok := k.(*ecdsa.PrivateKey)
	if !ok || key.Curve != elliptic.P256() {
		return nil, cli.Fail(cli.ExitRun, fmt.Errorf("%s: %w", m.GetSpiffeId(), ErrKeyType),
			`set workload_x509_svid_key_type = "ec-p256" in the configuration of the SPIRE agent`)
	}
	if !key.PublicKey.Equal(leaf.PublicKey) {
		return nil, fmt.Errorf("the SVID of %s is for another key than the agent sent", m.GetSpiffeId())
	}
	return &svid{key: key, leaf: leaf}, nil
}

// Measure has the quoter socket measure. The identity was chosen before.
func (s *stock) Measure(ctx context.Context, _ string) (*workloadv1.MeasureResponse, error) {
	if s.quoter == nil {
		return nil, nil
	}
	resp, err := s.voucher.Measure(withHeader(ctx), &workloadv1.MeasureRequest{})
	if err != nil {
		return nil, s.voucherError(err)
	}
	if len(resp.GetMeasurement().GetTool()) != sha256.Size {
		return nil, cli.Fail(cli.ExitRun, errors.New("the quoter socket measured no tool"), "install the plugin and rootlink from one build")
	}
	if td := resp.GetTrustDomain(); !strings.HasPrefix(s.id, "spiffe://"+td+"/") {
		return nil, cli.Fail(cli.ExitRun, fmt.Errorf("the quoter socket is of trust domain %s, the SVID is of %s", td, s.id),
			"both sockets must be those of one SPIRE agent")
	}
	s.measured = resp.GetMeasurement()
	return resp, nil
}

// Sign fetches the SVID anew, which may have been renewed since the step began,
// has the node vouch for it and signs.
func (s *stock) Sign(ctx context.Context, p Prepared, waiting func(error)) (*Signed, error) {
	return persist(ctx, s.lost, waiting, func(ctx context.Context) (*Signed, error) { return s.signOnce(ctx, p) })
}

func (s *stock) signOnce(ctx context.Context, p Prepared) (*Signed, error) {
	select {
	case <-s.lost.over: // on another connection nothing was measured
		return nil, *s.lost.why
	default:
	}
	v, err := s.fetch(ctx)
	if err != nil {
		return nil, err
	}
	var resp *workloadv1.VouchResponse
	signed, err := v.sign(p, func() (*attest.Detached, error) {
		digest := p.Digest()
		var err error
		if resp, err = s.voucher.Vouch(withHeader(ctx), &workloadv1.VouchRequest{X509Svid: [][]byte{bytes.Clone(v.leaf.Raw)}, PayloadSha256: digest[:]}); err != nil {
			return nil, s.voucherError(err)
		}
		return readDetached(resp.GetDetached(), attest.OriginAgent, s.measured)
	})
	if err != nil {
		return nil, err
	}
	signed.EventLog, signed.IMALog = resp.GetEventLog(), resp.GetImaLog()
	return signed, nil
}

// workloadAPIError is agentError for an agent that knows nothing of us.
func workloadAPIError(err error) error {
	st, ok := status.FromError(err)
	if !ok {
		return cli.Fail(cli.ExitRun, err, cli.HintOf(err))
	}
	what, hint := cli.CutHint(st.Message())
	e := &AgentError{Code: st.Code(), Message: "Workload API: " + what}
	if hint == "" {
		switch st.Code() {
		case codes.PermissionDenied:
			hint = "no registration entry matches this program: `rootlink whoami` prints the command that creates one; a new one takes some seconds to arrive"
		case codes.Unavailable, codes.DeadlineExceeded:
			hint = "look at the log of the SPIRE agent; --issue-timeout says how long to wait for it"
		case codes.Unimplemented:
			hint = "is this the socket of a SPIFFE Workload API?"
		}
	}
	return cli.Fail(cli.ExitRun, e, hint)
}

func (s *stock) voucherError(err error) error {
	st, ok := status.FromError(err)
	if !ok {
		return cli.Fail(cli.ExitRun, err, cli.HintOf(err))
	}
	what, hint := cli.CutHint(st.Message())
	e := &AgentError{Code: st.Code(), Message: "quoter socket: " + what}
	if hint == "" {
		switch st.Code() {
		case codes.Unimplemented:
			hint = "name the quoter_socket of the plugin rootlink-tpmnode, not the Workload API's"
		case codes.Unavailable, codes.DeadlineExceeded:
			hint = "look at the log of the SPIRE agent, where the plugin writes too; --issue-timeout says how long to wait for its TPM"
		default:
			hint = "look at the log of the SPIRE agent, where the plugin writes too"
		}
	}
	return cli.Fail(cli.ExitRun, e, hint)
}
