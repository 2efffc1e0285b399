package wire

import (
	"errors"
	"fmt"

	"google.golang.org/protobuf/proto"

	"github.com/rootlink/rootlink/pkg/attest"
	tpmv1 "github.com/rootlink/rootlink/proto/rootlink/tpm/v1"
)

// Limits in bytes of one encoded message, checked before it is decoded.
const (
	MaxRequest  = 64 << 10                // AttestRequest: an EK chain and the AK
	MaxServer   = 64 << 10                // ServerMessage
	MaxProof    = 64 << 10                // AgentMessage without a log
	MaxLogReply = attest.LogChunk + 1<<10 // AgentMessage with a log chunk
	maxTPM      = 4 << 10                 // any single TPM structure
	maxDomain   = 255                     // a trust domain name
	maxText     = 64                      // what a TPM calls itself
	maxCerts    = attest.MaxChain         // certificates in a chain
	maxCert     = attest.MaxCertificate   // bytes of a certificate
	maxEventLog = uint64(attest.MaxEventLog)
	maxIMALog   = uint64(attest.MaxIMALog)
)

// Errors that callers branch on. Details come wrapped around them.
var (
	ErrTooLarge  = errors.New("message is over its size limit")
	ErrMalformed = errors.New("message is malformed")
	ErrVersion   = errors.New("unknown protocol version")
)

func malformed(format string, a ...any) error {
	return fmt.Errorf("%w: %s", ErrMalformed, fmt.Sprintf(format, a...))
}

func tooLarge(what string, size, limit int) error {
	return fmt.Errorf("%w: %s has %d bytes, limit %d", ErrTooLarge, what, size, limit)
}

func decode(b []byte, limit int, what string, m proto.Message) error {
	if len(b) > limit {
		return tooLarge(what, len(b), limit)
	}
	// Unknown fields are skipped, so that a later version may add some that
	// this side can do without; what it cannot do without changes Version.
	if err := (proto.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(b, m); err != nil {
		return malformed("%s does not decode", what)
	}
	return nil
}

func encode(m proto.Message, limit int, what string) ([]byte, error) {
	b, err := proto.Marshal(m)
	if err != nil {
		return nil, fmt.Errorf("encode %s: %w", what, err)
	}
	if len(b) > limit {
		return nil, tooLarge(what, len(b), limit)
	}
	return b, nil
}

// field is a byte field with its bounds.
type field struct {
	name     string
	b        []byte
	min, max int
}

func check(fields ...field) error {
	for _, f := range fields {
		switch {
		case len(f.b) < f.min:
			return malformed("%s has %d bytes, at least %d are needed", f.name, len(f.b), f.min)
		case len(f.b) > f.max:
			return tooLarge(f.name, len(f.b), f.max)
		}
	}
	return nil
}

func checkChain(name string, chain [][]byte) error {
	if len(chain) > maxCerts {
		return fmt.Errorf("%w: %s has %d certificates, limit %d", ErrTooLarge, name, len(chain), maxCerts)
	}
	for _, c := range chain {
		if err := check(field{name + " certificate", c, 1, maxCert}); err != nil {
			return err
		}
	}
	return nil
}

func checkRequest(m *tpmv1.AttestRequest) error {
	if m.Version != Version {
		return fmt.Errorf("%w: %d, this side speaks %d", ErrVersion, m.Version, Version)
	}
	if err := checkChain("EK chain", m.EkChain); err != nil {
		return err
	}
	return check(
		field{"EK public area", m.EkPublic, 1, maxTPM},
		field{"AK public area", m.AkPublic, 1, maxTPM},
		field{"AK creation data", m.AkCreationData, 1, maxTPM},
		field{"AK creation attestation", m.AkCreationAttest, 1, maxTPM},
		field{"AK creation signature", m.AkCreationSignature, 1, maxTPM},
		field{"trust domain", []byte(m.TrustDomain), 1, maxDomain},
		field{"TPM manufacturer", []byte(m.TpmManufacturer), 0, maxText},
		field{"TPM vendor", []byte(m.TpmVendor), 0, maxText},
	)
}

// EncodeRequest encodes the agent's first payload.
func EncodeRequest(m *tpmv1.AttestRequest) ([]byte, error) {
	if err := checkRequest(m); err != nil {
		return nil, err
	}
	return encode(m, MaxRequest, "attestation request")
}

// DecodeRequest decodes and bounds the agent's first payload.
func DecodeRequest(b []byte) (*tpmv1.AttestRequest, error) {
	m := new(tpmv1.AttestRequest)
	if err := decode(b, MaxRequest, "attestation request", m); err != nil {
		return nil, err
	}
	return m, checkRequest(m)
}

func checkServer(m *tpmv1.ServerMessage) error {
	switch s := m.Step.(type) {
	case *tpmv1.ServerMessage_Challenge:
		c := s.Challenge
		if c == nil {
			return malformed("empty challenge")
		}
		if len(c.Pcrs) == 0 {
			return malformed("challenge for a quote of no PCR")
		}
		if _, err := SelectionsFromProto(c.Pcrs); err != nil {
			return err
		}
		return check(
			field{"credential", c.CredentialBlob, 1, maxTPM},
			field{"encrypted secret", c.EncryptedSecret, 1, maxTPM},
			field{"nonce", c.Nonce, NonceSize, NonceSize},
		)
	case *tpmv1.ServerMessage_LogRequest:
		if s.LogRequest == nil {
			return malformed("empty log request")
		}
		_, err := maxLog(s.LogRequest.Kind)
		return err
	case *tpmv1.ServerMessage_AkCertificate:
		if s.AkCertificate == nil {
			return malformed("empty AK certificate message")
		}
		if err := checkChain("attestation CA", s.AkCertificate.CaChain); err != nil {
			return err
		}
		return check(field{"AK certificate", s.AkCertificate.Certificate, 1, maxCert})
	}
	return malformed("server message without a step")
}

// EncodeServer encodes a challenge of the server side.
func EncodeServer(m *tpmv1.ServerMessage) ([]byte, error) {
	if err := checkServer(m); err != nil {
		return nil, err
	}
	return encode(m, MaxServer, "server message")
}

// DecodeServer decodes and bounds a challenge of the server side.
func DecodeServer(b []byte) (*tpmv1.ServerMessage, error) {
	m := new(tpmv1.ServerMessage)
	if err := decode(b, MaxServer, "server message", m); err != nil {
		return nil, err
	}
	return m, checkServer(m)
}

func checkAgent(m *tpmv1.AgentMessage) error {
	switch s := m.Step.(type) {
	case *tpmv1.AgentMessage_Proof:
		p := s.Proof
		switch {
		case p == nil:
			return malformed("empty proof")
		case p.EventLogSize > maxEventLog:
			return fmt.Errorf("%w: event log of %d bytes, limit %d", ErrTooLarge, p.EventLogSize, maxEventLog)
		case p.ImaLogSize > maxIMALog:
			return fmt.Errorf("%w: IMA log of %d bytes, limit %d", ErrTooLarge, p.ImaLogSize, maxIMALog)
		}
		if _, err := BanksFromProto(p.Pcrs); err != nil {
			return err
		}
		return check(
			field{"activated secret", p.Secret, SecretSize, SecretSize},
			field{"quote", p.Attest, 1, maxTPM},
			field{"quote signature", p.Signature, 1, maxTPM},
			field{"agent key hash", p.AgentKeySha256, KeyHashSize, KeyHashSize},
		)
	case *tpmv1.AgentMessage_LogChunk:
		c := s.LogChunk
		if c == nil {
			return malformed("empty log chunk")
		}
		limit, err := maxLog(c.Kind)
		if err != nil {
			return err
		}
		if c.Offset > limit || uint64(len(c.Data)) > limit-c.Offset {
			return fmt.Errorf("%w: log chunk ends past %d bytes", ErrTooLarge, limit)
		}
		return check(field{"log chunk", c.Data, 1, attest.LogChunk})
	case *tpmv1.AgentMessage_Ack:
		if s.Ack == nil {
			return malformed("empty acknowledgement")
		}
		return check(field{"acknowledged hash", s.Ack.AkCertificateSha256, HashSize, HashSize})
	}
	return malformed("agent message without a step")
}

// EncodeAgent encodes a challenge response.
func EncodeAgent(m *tpmv1.AgentMessage) ([]byte, error) {
	if err := checkAgent(m); err != nil {
		return nil, err
	}
	return encode(m, MaxLogReply, "agent message")
}

// DecodeAgent decodes and bounds a challenge response. limit is MaxProof, or
// MaxLogReply where a log chunk was asked for.
func DecodeAgent(b []byte, limit int) (*tpmv1.AgentMessage, error) {
	m := new(tpmv1.AgentMessage)
	if err := decode(b, limit, "agent message", m); err != nil {
		return nil, err
	}
	return m, checkAgent(m)
}

func maxLog(k tpmv1.LogKind) (uint64, error) {
	switch k {
	case tpmv1.LogKind_LOG_KIND_EVENT_LOG:
		return maxEventLog, nil
	case tpmv1.LogKind_LOG_KIND_IMA:
		return maxIMALog, nil
	}
	return 0, malformed("unknown log kind %d", k)
}
