package upstream

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	nodeattestorv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/agent/nodeattestor/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/rootlink/rootlink/internal/join"
	"github.com/rootlink/rootlink/plugins/tpmnode/wire"
	nodev1 "github.com/rootlink/rootlink/proto/rootlink/node/v1"
)

// attest runs one attestation with a new key and returns a session that holds
// the new SVID. When the server's authority is unknown, the bootstrap source
// is asked once: the machine may have been off through a rotation.
func (n *Node) attest(ctx context.Context) (*Session, error) {
	ctx, cancel := context.WithTimeout(ctx, attestTimeout)
	defer cancel()
	if err := n.cfg.Trust.Ensure(ctx); errors.Is(err, join.ErrTrustKey) {
		return nil, fmt.Errorf("%w: %w", ErrWrongServer, err)
	} else if err != nil {
		return nil, fmt.Errorf("bootstrap: %w", err)
	}
	s, err := n.attestOnce(ctx)
	if err != nil && isUnknownAuthority(err) {
		if berr := n.cfg.Trust.Bootstrap(ctx); berr != nil {
			return nil, fmt.Errorf("%w (and asking the bootstrap source again failed: %w)", err, berr)
		}
		n.cfg.Log.Info("server has an authority that was not known; asked the bootstrap source")
		s, err = n.attestOnce(ctx)
	}
	return s, err
}

func (n *Node) attestOnce(ctx context.Context) (*Session, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return nil, err
	}
	keyHash := sha256.Sum256(spki)
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		return nil, err
	}
	n.tlsFault.Store(nil)
	conn, err := n.dial(nil)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	svid, err := n.attestOn(ctx, conn, csr, keyHash)
	if err != nil {
		if bannedAtAttestation(err) {
			return nil, fmt.Errorf("%w: %w", ErrBanned, err)
		}
		// gRPC turns a refused handshake into text; the fault we noted is typed.
		if f := n.tlsFault.Load(); f != nil && f.err != nil {
			return nil, f.err
		}
		return nil, err
	}
	// The bundle first: the server may have signed with an authority that it
	// activated since we last asked.
	b, err := bundlev1.NewBundleClient(conn).GetBundle(ctx, &bundlev1.GetBundleRequest{})
	if err != nil {
		return nil, fmt.Errorf("get bundle: %w", err)
	}
	if _, err := n.takeBundle(b); err != nil {
		return nil, err
	}
	return n.newSession(key, keyHash, svid)
}

// attestOn binds the CSR's key into the attestation if the server can check it.
// A stock SPIRE server hides the CSR from its plugins, so there the proof must
// bind none.
func (n *Node) attestOn(ctx context.Context, conn *grpc.ClientConn, csr []byte, keyHash [32]byte) (*types.X509SVID, error) {
	stock, err := isStock(ctx, conn)
	if err != nil {
		return nil, err
	}
	if !stock && n.cfg.AttestationType == wire.PluginName {
		// On the call to the server and on the call to the plugin.
		ctx = wire.WithAgentKey(ctx, keyHash)
	}
	return n.converse(ctx, conn, csr)
}

// isStock asks the verified server for something that only ours has. Nobody in
// between can answer for it.
func isStock(ctx context.Context, conn *grpc.ClientConn) (bool, error) {
	var nonce [32]byte
	rand.Read(nonce[:])
	_, err := nodev1.NewNodeClient(conn).GetSignedBundle(ctx, &nodev1.GetSignedBundleRequest{Nonce: nonce[:]})
	if status.Code(err) == codes.Unimplemented {
		return true, nil
	}
	if status.Code(err) == codes.FailedPrecondition {
		return false, nil // ours, with its trust key kept elsewhere
	}
	if err != nil {
		return false, fmt.Errorf("ask what the server is: %w", err)
	}
	return false, nil
}

// converse carries messages between the server and the plugin until the server
// has an SVID for us.
func (n *Node) converse(ctx context.Context, conn *grpc.ClientConn, csr []byte) (*types.X509SVID, error) {
	// Ending the plugin's stream tells it that the attestation is over.
	pctx, cancel := context.WithCancel(ctx)
	defer cancel()
	plugin, err := n.cfg.NodeAttestor.AidAttestation(pctx)
	if err != nil {
		return nil, pluginError(err)
	}
	first, err := plugin.Recv()
	if err != nil {
		return nil, pluginError(err)
	}
	if len(first.GetPayload()) == 0 {
		return nil, errors.New("node attestor sent no payload")
	}
	stream, err := agentv1.NewAgentClient(conn).AttestAgent(ctx)
	if err != nil {
		return nil, serverError(err)
	}
	send := func(r *agentv1.AttestAgentRequest) error {
		if err := stream.Send(r); err != nil {
			// The reason is on the receiving side.
			if _, rerr := stream.Recv(); rerr != nil {
				err = rerr
			}
			return serverError(err)
		}
		return nil
	}
	err = send(&agentv1.AttestAgentRequest{Step: &agentv1.AttestAgentRequest_Params_{Params: &agentv1.AttestAgentRequest_Params{
		Data:   &types.AttestationData{Type: n.cfg.AttestationType, Payload: first.GetPayload()},
		Params: &agentv1.AgentX509SVIDParams{Csr: csr},
	}}})
	if err != nil {
		return nil, err
	}
	for range maxAttestSteps {
		resp, err := stream.Recv()
		if err != nil {
			return nil, serverError(err)
		}
		switch step := resp.GetStep().(type) {
		case *agentv1.AttestAgentResponse_Result_:
			if step.Result.GetSvid() == nil {
				return nil, errors.New("server's attestation result holds no SVID")
			}
			return step.Result.GetSvid(), nil
		case *agentv1.AttestAgentResponse_Challenge:
			if err := plugin.Send(&nodeattestorv1.Challenge{Challenge: step.Challenge}); err != nil {
				if _, rerr := plugin.Recv(); rerr != nil {
					err = rerr
				}
				return nil, pluginError(err)
			}
			answer, err := plugin.Recv()
			if err != nil {
				return nil, pluginError(err)
			}
			if len(answer.GetChallengeResponse()) == 0 {
				return nil, errors.New("node attestor sent an empty challenge response")
			}
			err = send(&agentv1.AttestAgentRequest{Step: &agentv1.AttestAgentRequest_ChallengeResponse{ChallengeResponse: answer.GetChallengeResponse()}})
			if err != nil {
				return nil, err
			}
		default:
			return nil, errors.New("server sent an attestation step that is neither challenge nor result")
		}
	}
	return nil, fmt.Errorf("attestation took more than %d steps", maxAttestSteps)
}

// newSession checks that the SVID is ours (key, kind of ID, chain) before
// anything is done in its name.
func (n *Node) newSession(key *ecdsa.PrivateKey, keyHash [32]byte, svid *types.X509SVID) (*Session, error) {
	chain, err := ParseChain(svid.GetCertChain())
	if err != nil {
		return nil, fmt.Errorf("agent SVID: %w", err)
	}
	id, err := CheckSVID(chain, key.Public(), n.cfg.Trust, n.cfg.Now())
	if err != nil {
		return nil, fmt.Errorf("agent SVID: %w", err)
	}
	if id.TrustDomain() != n.cfg.TrustDomain || !strings.HasPrefix(id.Path(), "/spire/agent/"+n.cfg.AttestationType+"/") {
		return nil, fmt.Errorf("server issued %q, which is not an agent ID of node attestation %s", id, n.cfg.AttestationType)
	}
	cert := tls.Certificate{PrivateKey: key, Leaf: chain[0]}
	for _, c := range chain {
		cert.Certificate = append(cert.Certificate, c.Raw)
	}
	conn, err := n.dial(&cert)
	if err != nil {
		return nil, err
	}
	return &Session{ID: id, KeyHash: keyHash, Chain: chain, conn: conn, node: n}, nil
}

// ParseChain parses a DER chain, leaf first.
func ParseChain(ders [][]byte) ([]*x509.Certificate, error) {
	if len(ders) == 0 {
		return nil, errors.New("empty certificate chain")
	}
	size := 0
	for _, der := range ders {
		size += len(der)
	}
	if len(ders) > maxChain || size > maxChainBytes {
		return nil, fmt.Errorf("chain of %d certificates in %d bytes, at most %d and %d are taken", len(ders), size, maxChain, maxChainBytes)
	}
	var chain []*x509.Certificate
	for _, der := range ders {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, err
		}
		chain = append(chain, c)
	}
	return chain, nil
}

// CheckSVID verifies chain to trust at now and that its leaf is for key. A
// server's backdating is enough for small differences between the two clocks.
func CheckSVID(chain []*x509.Certificate, key crypto.PublicKey, trust *Trust, now time.Time) (spiffeid.ID, error) {
	k, ok := key.(interface{ Equal(crypto.PublicKey) bool })
	if !ok || !k.Equal(chain[0].PublicKey) {
		return spiffeid.ID{}, errors.New("certificate is for another key than the one we asked for")
	}
	verify := func(at time.Time) (spiffeid.ID, error) {
		id, _, err := x509svid.Verify(chain, trust, x509svid.WithTime(at))
		return id, err
	}
	id, err := verify(now)
	if err != nil {
		ce := clockError(chain[0], now, func(at time.Time) error { _, err := verify(at); return err })
		if ce != nil {
			return spiffeid.ID{}, ce
		}
	}
	return id, err
}
