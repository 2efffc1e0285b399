package nodeagent

import (
	"context"
	"net"

	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"

	"github.com/rootlink/rootlink/internal/measured"
	"github.com/rootlink/rootlink/internal/vouch"
	"github.com/rootlink/rootlink/internal/workload"
	"github.com/rootlink/rootlink/plugins/tpmnode/hostside"
	"github.com/rootlink/rootlink/plugins/tpmnode/wire"
	tpmv1 "github.com/rootlink/rootlink/proto/rootlink/tpm/v1"
)

// voucher is the service behind quoter_socket.
type voucher struct {
	socket   string
	listener *net.UnixListener // of a service that does not run yet
	service  *vouch.Service    // nil until it runs
	settings vouch.Settings
}

// prepare returns the voucher for c, nil when c wants none. It takes over the
// service of the present one when the socket stays where it is: steps that were
// measured there go on.
func (v *voucher) prepare(c *config, log hclog.Logger) (*voucher, error) {
	if c.voucher == nil {
		return nil, nil
	}
	td, err := spiffeid.TrustDomainFromString(c.trustDomain)
	if err != nil {
		return nil, err
	}
	m, err := workload.NewMeasurer(c.voucher.measure)
	if err != nil {
		return nil, err
	}
	if err := m.Limitation(); err != nil {
		log.Warn("Only processes of this user can use quoter_socket", "reason", err.Error(), "hint", workload.Hint(err))
	}
	next := &voucher{socket: c.voucher.socket, settings: vouch.Settings{
		TrustDomain:  td,
		AgentDataDir: c.voucher.agentDataDir,
		Attestor:     measured.FromMeasurer(m),
		RecorderGID:  c.voucher.recorderGID,
		Logs:         vouch.LogFiles(c.eventLogPath, c.imaLogPath),
	}}
	if v != nil && v.socket == next.socket {
		next.service = v.service
		return next, nil
	}
	next.listener, err = vouch.Listen(next.socket)
	return next, err
}

// abandon gives up a voucher that was prepared and not used.
func (v *voucher) abandon() {
	if v != nil && v.service == nil {
		v.listener.Close()
	}
}

// replace ends v where next does not go on with it, and starts next.
func (v *voucher) replace(next *voucher, p *Plugin) *voucher {
	if v != nil && (next == nil || next.service != v.service) {
		v.service.Close()
	}
	if next == nil {
		return nil
	}
	if next.service == nil {
		next.service = vouch.Serve(next.listener, vouchingNode{p}, next.settings, hostside.Logger(p.log), p.now)
		next.listener = nil
	} else {
		next.service.Change(next.settings)
	}
	return next
}

// vouchingNode is the node of the moment.
type vouchingNode struct{ p *Plugin }

func (n vouchingNode) Quote(ctx context.Context, in *tpmv1.QuoteRequest, _ ...grpc.CallOption) (*tpmv1.QuoteResponse, error) {
	if _, err := n.p.configured(); err != nil {
		return nil, vouch.ErrNotReady
	}
	return n.p.Quote(ctx, in)
}

func (n vouchingNode) NodePath(ctx context.Context) (string, error) {
	node, err := n.p.configured()
	if err != nil {
		return "", vouch.ErrNotReady
	}
	ek, err := node.dev.EK(ctx)
	if err != nil {
		return "", deviceStatus("read the EK", err)
	}
	return wire.AgentIDPath(ek.Hash()), nil
}
