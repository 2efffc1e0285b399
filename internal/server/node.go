package server

import (
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	nodev1 "github.com/rootlink/rootlink/proto/rootlink/node/v1"
)

// bundleDomain separates signatures over bundles from any other use of the
// trust key.
const bundleDomain = "rootlink/bundle/v1\x00"

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
	resp := &nodev1.GetConfigResponse{EvidencePatterns: n.s.cfg.EvidencePatterns}
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
	now := n.s.cfg.Now()
	sb := &nodev1.SignedBundle{TrustDomain: n.s.cfg.TrustDomain, IssuedUnix: now.Unix(), Nonce: req.Nonce}
	for _, c := range n.s.authorities.set.Load().valid(now) {
		sb.X509Authorities = append(sb.X509Authorities, c.Raw)
	}
	b, err := proto.Marshal(sb)
	if err != nil {
		return nil, n.s.internal("encode bundle", err)
	}
	digest := sha256.Sum256(append([]byte(bundleDomain), b...))
	sig, err := ecdsa.SignASN1(rand.Reader, n.s.trustKey, digest[:])
	if err != nil {
		return nil, n.s.internal("sign bundle", err)
	}
	spki, err := x509.MarshalPKIXPublicKey(n.s.trustKey.Public())
	if err != nil {
		return nil, n.s.internal("encode trust key", err)
	}
	return &nodev1.GetSignedBundleResponse{Bundle: b, TrustKey: spki, Signature: sig}, nil
}

// JoinLine is what an agent needs to find and check this trust domain:
// rootlink-join:v1:<trust domain>:<hex SHA-256 of the trust key's SPKI>.
func (s *Server) JoinLine() string {
	spki, err := x509.MarshalPKIXPublicKey(s.trustKey.Public())
	if err != nil {
		panic(err) // a P-256 key that was loaded or made by us
	}
	sum := sha256.Sum256(spki)
	return "rootlink-join:v1:" + s.cfg.TrustDomain + ":" + hex.EncodeToString(sum[:])
}
