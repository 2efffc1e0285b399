package server

import (
	"context"
	"time"

	debugv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/debug/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
)

type debugService struct {
	debugv1.UnimplementedDebugServer
	s *Server
}

// GetInfo tells how much there is, and the server's own SVID with its authority.
func (d *debugService) GetInfo(context.Context, *debugv1.GetInfoRequest) (*debugv1.GetInfoResponse, error) {
	agents, err := d.s.store.Agents()
	if err != nil {
		return nil, d.s.internal("count agents", err)
	}
	entries, err := d.s.store.Entries()
	if err != nil {
		return nil, d.s.internal("count entries", err)
	}
	federated, err := d.s.store.FederatedBundles()
	if err != nil {
		return nil, d.s.internal("count bundles", err)
	}
	resp := &debugv1.GetInfoResponse{
		Uptime:      int32(d.s.cfg.Now().Sub(d.s.started) / time.Second),
		AgentsCount: int32(len(agents)), EntriesCount: int32(len(entries)), FederatedBundlesCount: int32(len(federated)),
	}
	own := d.s.authorities.own.Load()
	if own == nil {
		return resp, nil
	}
	resp.SvidChain = append(resp.SvidChain, &debugv1.GetInfoResponse_Cert{
		Id: &types.SPIFFEID{TrustDomain: d.s.cfg.TrustDomain, Path: "/spire/server"}, ExpiresAt: own.Leaf.NotAfter.Unix(), Subject: own.Leaf.Subject.String(),
	})
	for _, a := range d.s.authorities.set.Load().all {
		if string(a.Certificate.SubjectKeyId) == string(own.Leaf.AuthorityKeyId) {
			resp.SvidChain = append(resp.SvidChain, &debugv1.GetInfoResponse_Cert{
				Id: &types.SPIFFEID{TrustDomain: d.s.cfg.TrustDomain}, ExpiresAt: a.Certificate.NotAfter.Unix(), Subject: a.Certificate.Subject.String(),
			})
		}
	}
	return resp, nil
}
