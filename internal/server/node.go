package server

import (
	"context"
	"crypto"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/rootlink/rootlink/internal/join"
	nodev1 "github.com/rootlink/rootlink/proto/rootlink/node/v1"
)

type nodeService struct {
	nodev1.UnimplementedNodeServer
	s *Server
}

// GetNonce returns a nonce that is good for this agent only.
func (n *nodeService) GetNonce(ctx context.Context, _ *nodev1.GetNonceRequest) (*nodev1.GetNonceResponse, error) {
	nonce := n.s.nonces.Make(callerOf(ctx).agent.ID, n.s.cfg.Now())
	return &nodev1.GetNonceResponse{Nonce: nonce[:]}, nil
}

func (n *nodeService) GetConfig(context.Context, *nodev1.GetConfigRequest) (*nodev1.GetConfigResponse, error) {
	resp := &nodev1.GetConfigResponse{
		EvidencePatterns: n.s.cfg.EvidencePatterns,
		TimestampUrls:    n.s.timestampURLs(), LogUrl: n.s.logURL(),
	}
	for _, sel := range n.s.cfg.QuotePCRs {
		resp.QuotePcrs = append(resp.QuotePcrs, &nodev1.PCRSelection{Bank: sel.Bank, Indices: sel.Indices})
	}
	return resp, nil
}

// GetSignedBundle tells today's authorities to an agent that knows nothing but
// a join line. The caller's nonce keeps an old answer from being passed off as
// new.
func (n *nodeService) GetSignedBundle(_ context.Context, req *nodev1.GetSignedBundleRequest) (*nodev1.GetSignedBundleResponse, error) {
	if len(req.Nonce) != 32 {
		return nil, status.Errorf(codes.InvalidArgument, "nonce of %d bytes, want 32", len(req.Nonce))
	}
	if n.s.trustKey == nil {
		return nil, status.Error(codes.FailedPrecondition, "the trust key is not kept on this server, so nobody can answer a join line")
	}
	now := n.s.cfg.Now()
	sb := &nodev1.SignedBundle{TrustDomain: n.s.cfg.TrustDomain, IssuedUnix: now.Unix(), Nonce: req.Nonce}
	for _, c := range n.s.authorities.set.Load().valid(now) {
		sb.X509Authorities = append(sb.X509Authorities, c.Raw)
	}
	resp, err := join.Sign(n.s.trustKey, sb)
	if err != nil {
		return nil, n.s.internal("sign bundle", err)
	}
	return resp, nil
}

// TrustKey returns the key that signs trust.json: its private half where this
// server holds it, else nil.
func (s *Server) TrustKey() (crypto.Signer, crypto.PublicKey) {
	if s.trustKey == nil {
		return nil, s.trustPublic
	}
	return s.trustKey, s.trustPublic
}

// JoinLine is what an agent needs to find and check this trust domain.
func (s *Server) JoinLine() string { return s.joinLine.String() }
