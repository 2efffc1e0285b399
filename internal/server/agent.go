package server

import (
	"context"
	"errors"
	"strings"
	"time"

	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/rootlink/rootlink/internal/store"
	"github.com/rootlink/rootlink/pkg/svid"
)

type agentService struct {
	agentv1.UnimplementedAgentServer
	s *Server
}

// expiresBefore is the format of the filter by_expires_before, as SPIRE's
// command line writes it.
const expiresBefore = "2006-01-02 15:04:05 -0700 -07"

func (a *agentService) filter(f *agentv1.ListAgentsRequest_Filter) (func(*store.Agent) bool, error) {
	if f == nil {
		return func(*store.Agent) bool { return true }, nil
	}
	selectors, err := selectorMatch(f.BySelectorMatch)
	if err != nil {
		return nil, err
	}
	var before time.Time
	if f.ByExpiresBefore != "" {
		if before, err = time.Parse(expiresBefore, f.ByExpiresBefore); err != nil {
			return nil, err
		}
	}
	return func(x *store.Agent) bool {
		switch {
		case f.ByAttestationType != "" && x.AttestationType != f.ByAttestationType,
			f.ByBanned != nil && x.Banned != f.ByBanned.Value,
			f.ByCanReattest != nil && x.CanReattest != f.ByCanReattest.Value,
			!before.IsZero() && !x.ExpiresAt.Before(before):
			return false
		}
		return selectors(a.s.nodeSelectors(x))
	}, nil
}

func (a *agentService) CountAgents(ctx context.Context, req *agentv1.CountAgentsRequest) (*agentv1.CountAgentsResponse, error) {
	var f *agentv1.ListAgentsRequest_Filter
	if c := req.Filter; c != nil {
		f = &agentv1.ListAgentsRequest_Filter{
			ByAttestationType: c.ByAttestationType, BySelectorMatch: c.BySelectorMatch, ByBanned: c.ByBanned,
			ByCanReattest: c.ByCanReattest, ByExpiresBefore: c.ByExpiresBefore,
		}
	}
	match, err := a.filter(f)
	if err != nil {
		return nil, status.Errorf(codes.InvalidArgument, "malformed filter: %v", err)
	}
	all, err := a.s.store.Agents()
	if err != nil {
		return nil, a.s.internal("count agents", err)
	}
	n := int32(0)
	for _, x := range all {
		if match(x) {
			n++
		}
	}
	return &agentv1.CountAgentsResponse{Count: n}, nil
}

func (a *agentService) ListAgents(ctx context.Context, req *agentv1.ListAgentsRequest) (*agentv1.ListAgentsResponse, error) {
	match, err := a.filter(req.Filter)
	if err != nil {
		return nil, status.Errorf(codes.InvalidArgument, "malformed filter: %v", err)
	}
	all, err := a.s.store.Agents()
	if err != nil {
		return nil, a.s.internal("list agents", err)
	}
	resp := new(agentv1.ListAgentsResponse)
	resp.NextPageToken, err = page(all, func(x *store.Agent) string { return x.ID }, req.PageToken, req.PageSize, match, func(x *store.Agent) int {
		p := a.s.agentToProto(x, req.OutputMask)
		resp.Agents = append(resp.Agents, p)
		return proto.Size(p)
	})
	return resp, err
}

func (a *agentService) GetAgent(ctx context.Context, req *agentv1.GetAgentRequest) (*types.Agent, error) {
	id, err := a.agentID(req.Id)
	if err != nil {
		return nil, err
	}
	x, err := a.s.store.Agent(id)
	if errors.Is(err, store.ErrNotFound) {
		return nil, status.Error(codes.NotFound, "agent not found")
	}
	if err != nil {
		return nil, a.s.internal("get agent", err)
	}
	return a.s.agentToProto(x, req.OutputMask), nil
}

func (a *agentService) agentID(p *types.SPIFFEID) (string, error) {
	id, err := a.s.memberID(p)
	if err != nil {
		return "", status.Errorf(codes.InvalidArgument, "invalid agent ID: %v", err)
	}
	if !strings.HasPrefix(id.Path(), "/spire/agent/") {
		return "", status.Errorf(codes.InvalidArgument, "invalid agent ID: %q is not below /spire/agent/", id)
	}
	return id.String(), nil
}

// BanAgent ends the agent at its next call and keeps it out until DeleteAgent.
func (a *agentService) BanAgent(ctx context.Context, req *agentv1.BanAgentRequest) (*emptypb.Empty, error) {
	return a.change(ctx, req.Id, "ban", a.s.store.BanAgent)
}

// DeleteAgent evicts the agent, which attests again by itself, and lifts a ban.
func (a *agentService) DeleteAgent(ctx context.Context, req *agentv1.DeleteAgentRequest) (*emptypb.Empty, error) {
	return a.change(ctx, req.Id, "delete", a.s.store.DeleteAgent)
}

func (a *agentService) change(ctx context.Context, p *types.SPIFFEID, what string, f func(context.Context, string) error) (*emptypb.Empty, error) {
	id, err := a.agentID(p)
	if err != nil {
		return nil, err
	}
	switch err := f(ctx, id); {
	case errors.Is(err, store.ErrNotFound):
		return nil, status.Error(codes.NotFound, "agent not found")
	case err != nil:
		return nil, a.s.internal(what+" agent", err)
	}
	a.s.cfg.Log.Info("agent changed", "agent", id, "change", what)
	return new(emptypb.Empty), nil
}

// agentToProto returns the fields of x that mask names; the ID always.
func (s *Server) agentToProto(x *store.Agent, mask *types.AgentMask) *types.Agent {
	if mask == nil {
		mask = &types.AgentMask{AttestationType: true, X509SvidSerialNumber: true, X509SvidExpiresAt: true, Selectors: true, Banned: true, CanReattest: true}
	}
	p := &types.Agent{Id: idToProto(x.ID)}
	if mask.AttestationType {
		p.AttestationType = x.AttestationType
	}
	if mask.X509SvidSerialNumber {
		p.X509SvidSerialNumber = x.Serial
	}
	if mask.X509SvidExpiresAt {
		p.X509SvidExpiresAt = unixOrZero(x.ExpiresAt)
	}
	if mask.Selectors {
		p.Selectors = selectorsToProto(s.nodeSelectors(x))
	}
	if mask.Banned {
		p.Banned = x.Banned
	}
	if mask.CanReattest {
		p.CanReattest = x.CanReattest
	}
	return p
}

// RenewAgent gives an agent that cannot attest again another SVID. The present
// one works until the new one is used.
func (a *agentService) RenewAgent(ctx context.Context, req *agentv1.RenewAgentRequest) (*agentv1.RenewAgentResponse, error) {
	c := callerOf(ctx)
	if c.agent.CanReattest {
		// A renewed SVID would rest on a quote that never saw its key.
		return nil, permissionDenied(types.PermissionDeniedDetails_AGENT_MUST_REATTEST, "agent must reattest instead of renew")
	}
	key, err := parseCSR(req.GetParams().GetCsr())
	if err != nil {
		return nil, status.Errorf(codes.InvalidArgument, "malformed CSR: %v", err)
	}
	cert, err := a.s.issue(ctx, svid.Request{Profile: svid.Agent, ID: c.id, PublicKey: key.PublicKey, SPKI: key.RawSubjectPublicKeyInfo, TTL: a.s.cfg.AgentTTL})
	if err != nil {
		return nil, a.s.issueError(err)
	}
	// The caller holds the active serial: authorizeAgent has made it so.
	_, err = a.s.store.SetNewSerial(ctx, c.agent.ID, c.cert.SerialNumber.String(), cert.Serial.String(), cert.NotAfter)
	switch {
	case errors.Is(err, store.ErrBanned):
		return nil, permissionDenied(types.PermissionDeniedDetails_AGENT_BANNED, "agent is banned")
	case errors.Is(err, store.ErrNotFound), errors.Is(err, store.ErrConflict):
		return nil, permissionDenied(types.PermissionDeniedDetails_AGENT_NOT_ACTIVE, "agent SVID is not active")
	case err != nil:
		return nil, a.s.internal("renew agent", err)
	}
	return &agentv1.RenewAgentResponse{Svid: svidToProto(cert, "")}, nil
}

// PostStatus tells which bundle an agent serves; there is nothing to do about it.
func (a *agentService) PostStatus(context.Context, *agentv1.PostStatusRequest) (*agentv1.PostStatusResponse, error) {
	return new(agentv1.PostStatusResponse), nil
}

func (a *agentService) CreateJoinToken(context.Context, *agentv1.CreateJoinTokenRequest) (*types.JoinToken, error) {
	return nil, status.Error(codes.Unimplemented, "this server attests nodes by their TPM only, there are no join tokens; "+
		"an agent of ours joins with the line that `rootlink-server join-line` prints, SPIRE's with the plugin tpmnode")
}
