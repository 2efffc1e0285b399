package nodeagent

import (
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"slices"
	"time"

	nodeattestorv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/agent/nodeattestor/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/rootlink/rootlink/internal/tpm"
	"github.com/rootlink/rootlink/pkg/attest"
	"github.com/rootlink/rootlink/plugins/tpmnode/wire"
	tpmv1 "github.com/rootlink/rootlink/proto/rootlink/tpm/v1"
)

// AidAttestation runs the agent side of one attestation (docs/plugin-tpmnode.md):
// keys, proof, logs, certificate, each once and in this order.
func (p *Plugin) AidAttestation(stream nodeattestorv1.NodeAttestor_AidAttestationServer) (err error) {
	defer p.recover("AidAttestation", &err)
	n, err := p.configured()
	if err != nil {
		return err
	}
	agentKey, _, err := wire.AgentKey(stream.Context())
	if err != nil {
		return status.Error(codes.InvalidArgument, err.Error())
	}
	a := &attestation{node: n, stream: stream, agentKey: agentKey, messages: receive(stream)}
	if err := a.run(); err != nil {
		p.log.Warn("attestation failed", "error", err.Error())
		return err
	}
	return nil
}

// attestation is one run.
type attestation struct {
	*node
	stream   nodeattestorv1.NodeAttestor_AidAttestationServer
	agentKey [32]byte // SHA-256 of the CSR key's SPKI, zero when the host hides it
	messages <-chan received

	ak   *tpm.AK
	logs map[tpmv1.LogKind][]byte
}

type received struct {
	challenge []byte
	err       error
}

// receive reads the stream in the background, so that waiting can be bounded. It
// ends with the stream, which ends with the handler.
func receive(stream nodeattestorv1.NodeAttestor_AidAttestationServer) <-chan received {
	c := make(chan received)
	go func() {
		for {
			m, err := stream.Recv()
			select {
			case c <- received{m.GetChallenge(), err}:
			case <-stream.Context().Done():
				return
			}
			if err != nil {
				return
			}
		}
	}()
	return c
}

func (a *attestation) run() error {
	if err := a.introduce(); err != nil {
		return err
	}
	m, err := a.next()
	if err != nil {
		return err
	}
	c := m.GetChallenge()
	if c == nil {
		return outOfOrder(m)
	}
	if err := a.prove(c); err != nil {
		return err
	}
	for {
		m, err := a.next()
		if err != nil {
			return err
		}
		switch {
		case m.GetLogRequest() != nil:
			err = a.sendLog(m.GetLogRequest())
		case m.GetAkCertificate() != nil:
			return a.accept(m.GetAkCertificate())
		default:
			err = outOfOrder(m)
		}
		if err != nil {
			return err
		}
	}
}

func outOfOrder(m *tpmv1.ServerMessage) error {
	return status.Errorf(codes.InvalidArgument, "server sent %T out of order", m.GetStep())
}

// next waits for the server's next message.
func (a *attestation) next() (*tpmv1.ServerMessage, error) {
	t := time.NewTimer(roundTimeout)
	defer t.Stop()
	select {
	case r := <-a.messages:
		if r.err == io.EOF {
			return nil, status.Error(codes.Aborted, "server ended the attestation early")
		}
		if r.err != nil {
			return nil, r.err
		}
		m, err := wire.DecodeServer(r.challenge)
		if err != nil {
			return nil, status.Error(codes.InvalidArgument, err.Error())
		}
		return m, nil
	case <-t.C:
		return nil, status.Errorf(codes.Unavailable, "no answer from the server within %s", roundTimeout)
	case <-a.stream.Context().Done():
		return nil, status.FromContextError(a.stream.Context().Err()).Err()
	}
}

func (a *attestation) round() (context.Context, context.CancelFunc) {
	return context.WithTimeout(a.stream.Context(), roundTimeout)
}

// introduce sends what the TPM says it is.
func (a *attestation) introduce() error {
	ctx, cancel := a.round()
	defer cancel()
	// The AK first: loading it tells whether the TPM is still the one whose EK we
	// remember.
	var err error
	if a.ak, err = a.dev.AK(ctx); err != nil {
		return deviceStatus("load the AK", err)
	}
	ek, err := a.dev.EK(ctx)
	if err != nil {
		return deviceStatus("read the EK", err)
	}
	info, err := a.dev.Info(ctx)
	if err != nil {
		return deviceStatus("describe the TPM", err)
	}
	b, err := wire.EncodeRequest(&tpmv1.AttestRequest{
		Version:             wire.Version,
		EkChain:             ek.Chain,
		EkPublic:            ek.Public,
		AkPublic:            a.ak.Public,
		AkCreationData:      a.ak.CreationData,
		AkCreationAttest:    a.ak.CreationAttest,
		AkCreationSignature: a.ak.CreationSignature,
		TrustDomain:         a.trustDomain,
		TpmManufacturer:     info.Manufacturer,
		TpmVendor:           info.VendorString,
	})
	if err != nil {
		return status.Errorf(codes.Internal, "attestation request: %v", err)
	}
	return a.stream.Send(&nodeattestorv1.PayloadOrChallengeResponse{
		Data: &nodeattestorv1.PayloadOrChallengeResponse_Payload{Payload: b},
	})
}

// prove opens the credential and quotes.
func (a *attestation) prove(c *tpmv1.Challenge) error {
	sel, err := wire.SelectionsFromProto(c.GetPcrs())
	if err != nil {
		return status.Errorf(codes.InvalidArgument, "PCRs to quote: %v", err)
	}
	if err := refuseResettable(sel); err != nil {
		return err
	}
	ctx, cancel := a.round()
	defer cancel()
	secret, err := a.dev.ActivateCredential(ctx, c.GetCredentialBlob(), c.GetEncryptedSecret())
	if err != nil {
		return deviceStatus("activate the credential", err)
	}
	q, err := a.dev.QuoteNode(ctx, sel, [32]byte(c.GetNonce()), a.trustDomain, a.agentKey)
	if err != nil {
		return deviceStatus("quote", err)
	}
	// After the quote: the kernel appends to the IMA log before it extends the
	// PCR, so now the log has every entry that the quote covers.
	a.logs = map[tpmv1.LogKind][]byte{}
	if c.GetWantEventLog() {
		if a.logs[tpmv1.LogKind_LOG_KIND_EVENT_LOG], err = tpm.ReadEventLog(a.eventLogPath); err != nil {
			return status.Errorf(codes.FailedPrecondition, "boot event log: %v", err)
		}
	}
	if c.GetWantImaLog() {
		if a.logs[tpmv1.LogKind_LOG_KIND_IMA], err = tpm.ReadIMALog(a.imaLogPath); err != nil {
			return status.Errorf(codes.FailedPrecondition, "IMA log: %v", err)
		}
	}
	return a.respond(&tpmv1.AgentMessage{Step: &tpmv1.AgentMessage_Proof{Proof: &tpmv1.Proof{
		Secret:         secret,
		Attest:         q.Attest,
		Signature:      q.Signature,
		Pcrs:           wire.BanksToProto(q.PCRs),
		AgentKeySha256: a.agentKey[:],
		EventLogSize:   uint64(len(a.logs[tpmv1.LogKind_LOG_KIND_EVENT_LOG])),
		ImaLogSize:     uint64(len(a.logs[tpmv1.LogKind_LOG_KIND_IMA])),
	}}})
}

// refuseResettable fails on PCRs that any program can reset and extend: a
// policy over them would be met by whoever wants to meet it.
func refuseResettable(sel []attest.PCRSelection) error {
	for _, s := range sel {
		if i := slices.IndexFunc(s.Indices, attest.ResettablePCR); i >= 0 {
			return status.Errorf(codes.InvalidArgument, "PCR %d can be reset from user space and is never quoted", s.Indices[i])
		}
	}
	return nil
}

// sendLog sends the chunk at the offset the server asks for.
func (a *attestation) sendLog(r *tpmv1.LogRequest) error {
	log := a.logs[r.GetKind()]
	if r.GetOffset() >= uint64(len(log)) {
		return status.Errorf(codes.InvalidArgument, "server asks for byte %d of a log of %d", r.GetOffset(), len(log))
	}
	rest := log[r.GetOffset():]
	return a.respond(&tpmv1.AgentMessage{Step: &tpmv1.AgentMessage_LogChunk{LogChunk: &tpmv1.LogChunk{
		Kind: r.GetKind(), Offset: r.GetOffset(), Data: rest[:min(len(rest), attest.LogChunk)],
	}}})
}

// accept stores the AK certificate before anything else: the plugin is never
// told how the attestation ended.
func (a *attestation) accept(m *tpmv1.AKCertificate) error {
	chain := append([][]byte{m.GetCertificate()}, m.GetCaChain()...)
	if err := a.dev.StoreAKCertificate(a.ak, chain); err != nil {
		return status.Errorf(codes.FailedPrecondition, "AK certificate: %v", err)
	}
	a.q.certified(a.ak, chain)
	sum := sha256.Sum256(m.GetCertificate())
	return a.respond(&tpmv1.AgentMessage{Step: &tpmv1.AgentMessage_Ack{Ack: &tpmv1.Ack{AkCertificateSha256: sum[:]}}})
}

func (a *attestation) respond(m *tpmv1.AgentMessage) error {
	b, err := wire.EncodeAgent(m)
	if err != nil {
		return status.Error(codes.Internal, fmt.Sprintf("answer: %v", err))
	}
	return a.stream.Send(&nodeattestorv1.PayloadOrChallengeResponse{
		Data: &nodeattestorv1.PayloadOrChallengeResponse_ChallengeResponse{ChallengeResponse: b},
	})
}
