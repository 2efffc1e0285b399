package server

import (
	"context"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/rootlink/rootlink/pkg/attest"
	"github.com/rootlink/rootlink/pkg/svid"
)

// maxCSR bounds a CSR in bytes: the evidence record and a little more.
const maxCSR = attest.MaxEvidence + 8<<10

type svidService struct {
	svidv1.UnimplementedSVIDServer
	s *Server
}

// parseCSR reads a CSR and checks that whoever made it holds the key.
func parseCSR(der []byte) (*x509.CertificateRequest, error) {
	if len(der) == 0 || len(der) > maxCSR {
		return nil, fmt.Errorf("it has %d bytes", len(der))
	}
	csr, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return nil, err
	}
	// Checking a signature costs the square of the key's size, and anybody may
	// send a CSR. What is longer than this gets no SVID anyhow.
	if k, ok := csr.PublicKey.(*rsa.PublicKey); ok && k.N.BitLen() > svid.MaxRSABits {
		return nil, fmt.Errorf("RSA key of %d bits, at most %d", k.N.BitLen(), svid.MaxRSABits)
	}
	if err := csr.CheckSignature(); err != nil {
		return nil, err
	}
	return csr, nil
}

// issue is the one way to a signature: prepared and issued in one go.
func (s *Server) issue(ctx context.Context, r svid.Request) (*svid.SVID, error) {
	if err := s.compose(ctx, &r); err != nil {
		return nil, err
	}
	signer, err := s.authorities.signer()
	if err != nil {
		return nil, err
	}
	if r.Now.IsZero() {
		r.Now = s.cfg.Now()
	}
	token, err := signer.Prepare(r)
	if err != nil {
		return nil, err
	}
	return signer.Issue(token)
}

// issueError maps what issue can return to a gRPC status.
func (s *Server) issueError(err error) error {
	var r *refusal
	switch {
	case errors.As(err, &r):
		return status.Error(r.code, r.Error())
	case errors.Is(err, svid.ErrRequest):
		return status.Errorf(codes.InvalidArgument, "%v", err)
	case errors.Is(err, svid.ErrEvidence):
		return status.Errorf(codes.PermissionDenied, "%v", err)
	case errors.Is(err, svid.ErrAuthority):
		s.cfg.Log.Error("cannot sign", "error", err)
		return status.Errorf(codes.Unavailable, "%v", err)
	}
	return s.internal("sign SVID", err)
}

// MintX509SVID signs what an administrator asks for: never with evidence and
// never for codeSigning, so it cannot pass for an attested one.
func (v *svidService) MintX509SVID(ctx context.Context, req *svidv1.MintX509SVIDRequest) (*svidv1.MintX509SVIDResponse, error) {
	csr, err := parseCSR(req.Csr)
	if err != nil {
		return nil, status.Errorf(codes.InvalidArgument, "malformed CSR: %v", err)
	}
	if len(csr.URIs) != 1 {
		return nil, status.Errorf(codes.InvalidArgument, "CSR has %d URI names, want one", len(csr.URIs))
	}
	id, err := spiffeid.FromURI(csr.URIs[0])
	if err != nil {
		return nil, status.Errorf(codes.InvalidArgument, "CSR: %v", err)
	}
	ttl := v.s.cfg.X509TTL
	if req.Ttl > 0 {
		ttl = min(time.Duration(req.Ttl)*time.Second, svid.MaxTTL(v.s.cfg.AuthorityTTL))
	}
	cert, err := v.s.issue(ctx, svid.Request{
		Profile: svid.Minted, ID: id, PublicKey: csr.PublicKey, SPKI: csr.RawSubjectPublicKeyInfo, DNSNames: csr.DNSNames, TTL: ttl,
	})
	if err != nil {
		return nil, v.s.issueError(err)
	}
	v.s.count.add("issued/minted")
	return &svidv1.MintX509SVIDResponse{Svid: svidToProto(cert, "")}, nil
}

func svidToProto(c *svid.SVID, hint string) *types.X509SVID {
	return &types.X509SVID{
		CertChain: [][]byte{c.DER},
		Id:        &types.SPIFFEID{TrustDomain: c.ID.TrustDomain().Name(), Path: c.ID.Path()},
		ExpiresAt: c.NotAfter.Unix(),
		Hint:      hint,
	}
}

func (v *svidService) NewDownstreamX509CA(context.Context, *svidv1.NewDownstreamX509CARequest) (*svidv1.NewDownstreamX509CAResponse, error) {
	return nil, status.Error(codes.Unimplemented, "this server signs no downstream authorities; run the plugins on a SPIRE deployment for that")
}
