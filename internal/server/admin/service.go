// Package admin serves rootlink.admin.v1, what the server's command line needs
// beside SPIRE's Server API: PCR policies, the trust.json export, authorities
// and counters. It is registered on the admin socket alone, whose file mode is
// its access control.
package admin

import (
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/rootlink/rootlink/internal/policy"
	"github.com/rootlink/rootlink/internal/server"
	"github.com/rootlink/rootlink/internal/store"
	"github.com/rootlink/rootlink/internal/trustdoc"
	"github.com/rootlink/rootlink/pkg/attest"
	"github.com/rootlink/rootlink/pkg/timestamp"
	"github.com/rootlink/rootlink/pkg/tlog"
	adminv1 "github.com/rootlink/rootlink/proto/rootlink/admin/v1"
)

const maxHistory = 20 // events of a node that GetNode returns

// Backend is the server that is administered; *server.Server is one.
type Backend interface {
	TrustDomain() string
	Store() *store.Store
	Authorities() ([]server.AuthorityInfo, error)
	RotateAuthority(ctx context.Context) (*x509.Certificate, error)
	AttestationCAs() []*x509.Certificate
	Logs() []tlog.Log
	JoinLine() string
	// TrustKey is the key that signs trust.json; the signer is nil where its
	// private half is kept elsewhere.
	TrustKey() (crypto.Signer, crypto.PublicKey)
	// TimestampAuthorities are the server's own, with every window there ever was.
	TimestampAuthorities() []timestamp.Authority
	Counters() map[string]uint64
}

// Config is what a Service is made from. All fields but Now are required.
type Config struct {
	Backend Backend
	// EK returns what makes an endorsement key genuine, as the node attestor
	// judges it now.
	EK  func() (attest.EKRoots, error)
	Now func() time.Time // default time.Now
}

// Service implements rootlink.admin.v1.Admin.
type Service struct {
	adminv1.UnimplementedAdminServer
	b     Backend
	store *store.Store
	ek    func() (attest.EKRoots, error)
	now   func() time.Time

	exporting sync.Mutex // held from the choice of a serial to the end of its export
}

// New returns the service.
func New(c Config) (*Service, error) {
	if c.Backend == nil || c.EK == nil {
		return nil, errors.New("admin: no backend or no EK trust")
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	return &Service{b: c.Backend, store: c.Backend.Store(), ek: c.EK, now: c.Now}, nil
}

// Register puts s on r.
func (s *Service) Register(r grpc.ServiceRegistrar) { adminv1.RegisterAdminServer(r, s) }

// Refusals that the command line gives a hint for, by their status code.
var (
	errExists    = errors.New("exists already")
	errNoValues  = errors.New("reported no PCR values")
	errMalformed = errors.New("malformed")
	errNoKey     = errors.New("cannot sign")
)

// toStatus maps what went wrong to a gRPC status, in one place.
func toStatus(err error) error {
	if err == nil {
		return nil
	}
	code := codes.Internal
	switch {
	case errors.Is(err, store.ErrNotFound):
		code = codes.NotFound
	case errors.Is(err, errExists), errors.Is(err, policy.ErrSameProfile):
		code = codes.AlreadyExists
	case errors.Is(err, errNoValues), errors.Is(err, trustdoc.ErrNothing), errors.Is(err, errNoKey), errors.Is(err, policy.ErrNotQuoted):
		code = codes.FailedPrecondition
	case errors.Is(err, errMalformed), errors.Is(err, trustdoc.ErrMalformed), errors.Is(err, policy.ErrResettable), errors.Is(err, attest.ErrPCRPolicy):
		code = codes.InvalidArgument
	case errors.Is(err, store.ErrUnknownState), errors.Is(err, store.ErrClosed):
		code = codes.Unavailable
	case errors.Is(err, context.Canceled):
		code = codes.Canceled
	case errors.Is(err, context.DeadlineExceeded):
		code = codes.DeadlineExceeded
	}
	// The store's errors carry its package's name, which says nothing to people.
	return status.Error(code, strings.ReplaceAll(err.Error(), "store: ", ""))
}

func malformed(format string, args ...any) error {
	return fmt.Errorf("%w: %w", errMalformed, fmt.Errorf(format, args...))
}

// JoinLine returns the line that a new agent is started with. Without the
// private key nobody here could answer an agent that has it.
func (s *Service) JoinLine(context.Context, *adminv1.JoinLineRequest) (*adminv1.JoinLineResponse, error) {
	if key, _ := s.b.TrustKey(); key == nil {
		return nil, status.Error(codes.FailedPrecondition, "no join line: the trust key is not kept on this server")
	}
	return &adminv1.JoinLineResponse{Line: s.b.JoinLine()}, nil
}

// Counters returns the counters since the server's start.
func (s *Service) Counters(context.Context, *adminv1.CountersRequest) (*adminv1.CountersResponse, error) {
	return &adminv1.CountersResponse{Counters: s.b.Counters()}, nil
}

// ListAuthorities returns every X.509 authority there ever was, oldest first.
func (s *Service) ListAuthorities(context.Context, *adminv1.ListAuthoritiesRequest) (*adminv1.ListAuthoritiesResponse, error) {
	list, err := s.b.Authorities()
	if err != nil {
		return nil, toStatus(err)
	}
	r := &adminv1.ListAuthoritiesResponse{}
	for _, a := range list {
		r.Authorities = append(r.Authorities, &adminv1.Authority{
			Id:            fmt.Sprintf("%x", a.Certificate.SubjectKeyId),
			State:         string(a.State),
			Certificate:   a.Certificate.Raw,
			PreparedUnix:  unix(a.PreparedAt),
			ActivatedUnix: unix(a.ActivatedAt),
			RetiredUnix:   unix(a.RetiredAt),
		})
	}
	return r, nil
}

// RotateAuthority prepares and activates a new X.509 authority.
func (s *Service) RotateAuthority(ctx context.Context, _ *adminv1.RotateAuthorityRequest) (*adminv1.RotateAuthorityResponse, error) {
	c, err := s.b.RotateAuthority(ctx)
	if err != nil {
		return nil, toStatus(err)
	}
	return &adminv1.RotateAuthorityResponse{Certificate: c.Raw}, nil
}

// GetNode returns an agent's hardware, as it last attested it, and history.
func (s *Service) GetNode(ctx context.Context, req *adminv1.GetNodeRequest) (*adminv1.Node, error) {
	a, err := s.agent(req.AgentId)
	if err != nil {
		return nil, toStatus(err)
	}
	n := &adminv1.Node{AgentId: a.ID, KeyBound: a.KeyBound}
	if at := a.Attestation; at != nil {
		n.AttestedUnix = unix(at.At)
		n.EkHash, n.EkBasis, n.EkRoot, n.AkName = at.EKHash[:], at.EKBasis, at.EKRoot[:], at.AKName
		n.Manufacturer, n.Firmware, n.Software = at.Manufacturer, at.Firmware, at.Software
		if at.SecureBoot != nil {
			n.SecureBoot = map[bool]string{true: "on", false: "off"}[*at.SecureBoot]
		}
		for _, bank := range at.PCRs {
			for _, i := range sortedIndices(bank.Values) {
				n.Pcrs = append(n.Pcrs, &adminv1.PCRValue{Bank: bank.Bank, Index: i, Value: bank.Values[i]})
			}
		}
	}
	history, err := s.store.AgentHistory(ctx, a.ID, maxHistory)
	if err != nil {
		return nil, toStatus(err)
	}
	for _, e := range history {
		n.History = append(n.History, &adminv1.NodeEvent{AtUnix: unix(e.At), Event: e.Event, Detail: e.Detail})
	}
	return n, nil
}

func (s *Service) agent(id string) (*store.Agent, error) {
	if id == "" {
		return nil, malformed("no agent ID")
	}
	a, err := s.store.Agent(id)
	if err == nil && a == nil {
		err = store.ErrNotFound
	}
	if errors.Is(err, store.ErrNotFound) {
		return nil, fmt.Errorf("agent %s: %w", id, err)
	}
	return a, err
}

func unix(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.Unix()
}
