package agent

import (
	"context"
	"crypto/rand"
	"crypto/x509/pkix"
	"slices"
	"sync"

	nodeattestorv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/agent/nodeattestor/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/rootlink/rootlink/pkg/attest"
	"github.com/rootlink/rootlink/plugins/tpmnode/wire"
	tpmv1 "github.com/rootlink/rootlink/proto/rootlink/tpm/v1"
)

// fakeAttestor is the agent side of node attestation without a TPM: it answers
// each challenge with the challenge and the key hash it was told.
type fakeAttestor struct {
	nodeattestorv1.UnimplementedNodeAttestorServer
}

func (fakeAttestor) AidAttestation(stream nodeattestorv1.NodeAttestor_AidAttestationServer) error {
	key, _, err := wire.AgentKey(stream.Context())
	if err != nil {
		return status.Error(codes.InvalidArgument, "bad agent key")
	}
	if err := stream.Send(&nodeattestorv1.PayloadOrChallengeResponse{Data: &nodeattestorv1.PayloadOrChallengeResponse_Payload{Payload: []byte("payload")}}); err != nil {
		return err
	}
	for {
		c, err := stream.Recv()
		if err != nil {
			return nil
		}
		answer := append(slices.Clone(c.GetChallenge()), key[:]...)
		if err := stream.Send(&nodeattestorv1.PayloadOrChallengeResponse{Data: &nodeattestorv1.PayloadOrChallengeResponse_ChallengeResponse{ChallengeResponse: answer}}); err != nil {
			return err
		}
	}
}

// fakeQuoter makes records of the right form that no verifier would accept.
type fakeQuoter struct {
	mu     sync.Mutex
	quotes int
	leaves []*tpmv1.Leaf
}

func (q *fakeQuoter) Quote(_ context.Context, req *tpmv1.QuoteRequest, _ ...grpc.CallOption) (*tpmv1.QuoteResponse, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.quotes++
	l := req.GetLeaf()
	q.leaves = append(q.leaves, l)
	e := &attest.Evidence{
		Attest: []byte{byte(q.quotes), 2, 3}, Signature: []byte{4, 5, 6}, AKCert: []byte{0x30, 0}, EKPublic: []byte{0x30, 0},
		PCRs: []attest.PCRBank{{Bank: "sha256", Values: map[uint32][]byte{7: make([]byte, 32)}}},
		Kind: attest.Kind(l.Kind), KeyOrigin: attest.KeyOrigin(l.KeyOrigin), AgentKey: [32]byte(l.AgentKeySha256),
		Executable: [32]byte(l.Executable), Recorder: [32]byte(l.Recorder), Tool: [32]byte(l.Tool), Payload: [32]byte(l.Payload),
		Selectors: l.Selectors, Nonce: [32]byte(l.Nonce), Size: 1,
	}
	rand.Read(e.Salt[:])
	b, err := e.MarshalRecord()
	return &tpmv1.QuoteResponse{Evidence: b}, err
}

func parseEvidence(x pkix.Extension) (*attest.Evidence, error) {
	return attest.ParseExtensionValue(x.Value)
}
