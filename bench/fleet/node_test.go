//go:build bench

package fleet

import (
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"testing"

	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/rootlink/rootlink/internal/forge"
	"github.com/rootlink/rootlink/pkg/attest"
	"github.com/rootlink/rootlink/plugins/tpmnode/wire"
	tpmv1 "github.com/rootlink/rootlink/proto/rootlink/tpm/v1"
)

// node is a simulated agent.
type node struct {
	from net.Addr // each has an address of its own, as machines do
	tpm  *forge.TPM
	key  *ecdsa.PrivateKey
	path string           // of its SPIFFE ID
	conn *grpc.ClientConn // as that agent
}

// dialTCP connects with cert, or without a certificate. Whom it reaches is not
// checked: it is what was started a moment ago.
func (n *node) dialTCP(address string, cert *tls.Certificate) (*grpc.ClientConn, error) {
	c := &tls.Config{InsecureSkipVerify: true}
	if cert != nil {
		c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return cert, nil }
	}
	dialer := net.Dialer{LocalAddr: n.from}
	return grpc.NewClient("passthrough:"+address, grpc.WithTransportCredentials(credentials.NewTLS(c)), grpc.WithSharedWriteBuffer(true),
		grpc.WithContextDialer(func(ctx context.Context, to string) (net.Conn, error) { return dialer.DialContext(ctx, "tcp", to) }))
}

// newNode makes the i-th agent, at 127.1.0.1 and on.
func newNode(t *testing.T, maker *forge.Maker, i int) *node {
	from := &net.TCPAddr{IP: net.IPv4(127, 1+byte(i/62500), byte(i/250%250), 1+byte(i%250))}
	return &node{from: from, tpm: forge.NewTPM(t, maker, forge.TPMOptions{}), key: forge.P256(t)}
}

// attest attests as a stock agent does: over a connection of its own and without
// naming its key, and then connects with the SVID.
func (n *node) attest(ctx context.Context, t *testing.T, address string) error {
	conn, err := n.dialTCP(address, nil)
	if err != nil {
		return err
	}
	defer conn.Close()
	stream, err := agentv1.NewAgentClient(conn).AttestAgent(ctx)
	if err != nil {
		return err
	}
	payload, err := wire.EncodeRequest(&tpmv1.AttestRequest{
		Version: wire.Version, EkChain: n.tpm.EKChain, EkPublic: n.tpm.EKPublic, AkPublic: n.tpm.AKPublic,
		AkCreationData: n.tpm.AKCreationData, AkCreationAttest: n.tpm.AKCreationAttest, AkCreationSignature: n.tpm.AKCreationSig,
		TrustDomain: td, TpmManufacturer: "FRGE", TpmVendor: "forge",
	})
	if err != nil {
		return err
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, new(x509.CertificateRequest), n.key)
	if err != nil {
		return err
	}
	// When the server has given up, its reason comes from Recv.
	send := func(r *agentv1.AttestAgentRequest) error {
		if err := stream.Send(r); err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		return nil
	}
	if err := send(&agentv1.AttestAgentRequest{Step: &agentv1.AttestAgentRequest_Params_{Params: &agentv1.AttestAgentRequest_Params{
		Data: &types.AttestationData{Type: wire.PluginName, Payload: payload}, Params: &agentv1.AgentX509SVIDParams{Csr: csr},
	}}}); err != nil {
		return err
	}
	for {
		resp, err := stream.Recv()
		if err != nil {
			return err
		}
		if r := resp.GetResult(); r != nil {
			n.path = r.GetSvid().GetId().GetPath()
			if n.conn != nil {
				n.conn.Close()
			}
			n.conn, err = n.dialTCP(address, &tls.Certificate{Certificate: r.GetSvid().GetCertChain(), PrivateKey: n.key})
			return err
		}
		answer, err := n.answer(t, resp.GetChallenge())
		if err != nil {
			return err
		}
		if err := send(&agentv1.AttestAgentRequest{Step: &agentv1.AttestAgentRequest_ChallengeResponse{ChallengeResponse: answer}}); err != nil {
			return err
		}
	}
}

func (n *node) answer(t *testing.T, challenge []byte) ([]byte, error) {
	m, err := wire.DecodeServer(challenge)
	if err != nil {
		return nil, err
	}
	switch s := m.Step.(type) {
	case *tpmv1.ServerMessage_Challenge:
		secret, err := n.tpm.ActivateCredential(s.Challenge.CredentialBlob, s.Challenge.EncryptedSecret)
		if err != nil {
			return nil, err
		}
		sel, err := wire.SelectionsFromProto(s.Challenge.Pcrs)
		if err != nil {
			return nil, err
		}
		var hidden [32]byte
		extra := attest.NodeExtraData([32]byte(s.Challenge.Nonce), n.tpm.AKName, td, hidden)
		att, sig, values := n.tpm.Quote(t, extra[:], sel, nil)
		return wire.EncodeAgent(&tpmv1.AgentMessage{Step: &tpmv1.AgentMessage_Proof{Proof: &tpmv1.Proof{
			Secret: secret, Attest: att, Signature: sig, Pcrs: wire.BanksToProto(values), AgentKeySha256: hidden[:],
		}}})
	case *tpmv1.ServerMessage_AkCertificate:
		sum := sha256.Sum256(s.AkCertificate.Certificate)
		return wire.EncodeAgent(&tpmv1.AgentMessage{Step: &tpmv1.AgentMessage_Ack{Ack: &tpmv1.Ack{AkCertificateSha256: sum[:]}}})
	}
	return nil, fmt.Errorf("unexpected step %T", m.Step)
}

func (n *node) close() {
	if n.conn != nil {
		n.conn.Close()
	}
}

// newCSR is one with a key and the URI of a SPIFFE ID.
func newCSR(t *testing.T, path string) []byte {
	t.Helper()
	u := &url.URL{Scheme: "spiffe", Host: td, Path: path}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{URIs: []*url.URL{u}}, forge.P256(t))
	if err != nil {
		t.Fatal(err)
	}
	return der
}
