package wire

import (
	"github.com/spiffe/spire-plugin-sdk/pluginsdk"
	"google.golang.org/grpc"

	tpmv1 "github.com/rootlink/rootlink/proto/rootlink/tpm/v1"
)

// QuoterService lets the agent-side plugin register its Quoter next to the
// services of SPIRE's SDK.
func QuoterService(s tpmv1.QuoterServer) pluginsdk.ServiceServer { return quoterService{s} }

type quoterService struct{ tpmv1.QuoterServer }

func (quoterService) GRPCServiceName() string { return tpmv1.Quoter_ServiceDesc.ServiceName }

func (s quoterService) RegisterServer(server *grpc.Server) any {
	tpmv1.RegisterQuoterServer(server, s.QuoterServer)
	return s.QuoterServer
}

// QuoterClient is what a host binds to reach the Quoter of a loaded plugin.
type QuoterClient struct{ tpmv1.QuoterClient }

func (*QuoterClient) GRPCServiceName() string { return tpmv1.Quoter_ServiceDesc.ServiceName }

func (c *QuoterClient) InitClient(conn grpc.ClientConnInterface) any {
	c.QuoterClient = tpmv1.NewQuoterClient(conn)
	return c.QuoterClient
}
