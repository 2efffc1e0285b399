package wire

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"

	"github.com/rootlink/rootlink/pkg/attest"
	tpmv1 "github.com/rootlink/rootlink/proto/rootlink/tpm/v1"
)

func request() *tpmv1.AttestRequest {
	return &tpmv1.AttestRequest{
		Version: Version, EkChain: [][]byte{{1}}, EkPublic: []byte{2}, AkPublic: []byte{3},
		AkCreationData: []byte{4}, AkCreationAttest: []byte{5}, AkCreationSignature: []byte{6}, TrustDomain: "example.org",
	}
}

func proof() *tpmv1.Proof {
	return &tpmv1.Proof{
		Secret: make([]byte, SecretSize), Attest: []byte{1}, Signature: []byte{2}, AgentKeySha256: make([]byte, KeyHashSize),
		Pcrs: []*tpmv1.PCRBank{{Bank: "sha256", Values: map[uint32][]byte{7: make([]byte, 32)}}},
	}
}

func agentProof(p *tpmv1.Proof) *tpmv1.AgentMessage {
	return &tpmv1.AgentMessage{Step: &tpmv1.AgentMessage_Proof{Proof: p}}
}

func chunk(c *tpmv1.LogChunk) *tpmv1.AgentMessage {
	return &tpmv1.AgentMessage{Step: &tpmv1.AgentMessage_LogChunk{LogChunk: c}}
}

func TestMessagesSurviveTheWire(t *testing.T) {
	b, err := EncodeRequest(request())
	if err != nil {
		t.Fatal(err)
	}
	got, err := DecodeRequest(b)
	if err != nil || !proto.Equal(got, request()) {
		t.Errorf("request: %v, %v", got, err)
	}
	b, err = EncodeAgent(agentProof(proof()))
	if err != nil {
		t.Fatal(err)
	}
	if got, err := DecodeAgent(b, MaxProof); err != nil || !proto.Equal(got, agentProof(proof())) {
		t.Errorf("proof: %v, %v", got, err)
	}
	full := chunk(&tpmv1.LogChunk{Kind: tpmv1.LogKind_LOG_KIND_IMA, Offset: attest.MaxIMALog - attest.LogChunk, Data: make([]byte, attest.LogChunk)})
	if b, err = EncodeAgent(full); err != nil {
		t.Fatal(err)
	}
	if _, err := DecodeAgent(b, MaxLogReply); err != nil {
		t.Errorf("the largest chunk: %v", err)
	}
	if _, err := DecodeAgent(b, MaxProof); !errors.Is(err, ErrTooLarge) {
		t.Errorf("a log chunk where a proof is due: %v", err)
	}
}

func TestRefusesRequestsOutOfBounds(t *testing.T) {
	for name, tt := range map[string]struct {
		edit func(*tpmv1.AttestRequest)
		want error
	}{
		"unknown version":      {func(r *tpmv1.AttestRequest) { r.Version = 2 }, ErrVersion},
		"long chain":           {func(r *tpmv1.AttestRequest) { r.EkChain = make([][]byte, attest.MaxChain+1) }, ErrTooLarge},
		"large certificate":    {func(r *tpmv1.AttestRequest) { r.EkChain[0] = make([]byte, attest.MaxCertificate+1) }, ErrTooLarge},
		"empty certificate":    {func(r *tpmv1.AttestRequest) { r.EkChain[0] = nil }, ErrMalformed},
		"no EK":                {func(r *tpmv1.AttestRequest) { r.EkPublic = nil }, ErrMalformed},
		"no AK":                {func(r *tpmv1.AttestRequest) { r.AkPublic = nil }, ErrMalformed},
		"large AK":             {func(r *tpmv1.AttestRequest) { r.AkPublic = make([]byte, maxTPM+1) }, ErrTooLarge},
		"no creation data":     {func(r *tpmv1.AttestRequest) { r.AkCreationData = nil }, ErrMalformed},
		"no trust domain":      {func(r *tpmv1.AttestRequest) { r.TrustDomain = "" }, ErrMalformed},
		"oversized as a whole": {func(r *tpmv1.AttestRequest) { r.TrustDomain = strings.Repeat("x", MaxRequest) }, ErrTooLarge},
	} {
		t.Run(name, func(t *testing.T) {
			r := request()
			tt.edit(r)
			if _, err := EncodeRequest(r); !errors.Is(err, tt.want) {
				t.Errorf("encode: %v", err)
			}
			b, err := proto.Marshal(r)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := DecodeRequest(b); !errors.Is(err, tt.want) {
				t.Errorf("decode: %v", err)
			}
		})
	}
	if _, err := DecodeRequest([]byte{0xff}); !errors.Is(err, ErrMalformed) {
		t.Errorf("garbage: %v", err)
	}
}

func TestRefusesAnswersOutOfBounds(t *testing.T) {
	edit := func(f func(*tpmv1.Proof)) *tpmv1.AgentMessage {
		p := proof()
		f(p)
		return agentProof(p)
	}
	for name, tt := range map[string]struct {
		m    *tpmv1.AgentMessage
		want error
	}{
		"no step":            {&tpmv1.AgentMessage{}, ErrMalformed},
		"empty proof":        {agentProof(nil), ErrMalformed},
		"short secret":       {edit(func(p *tpmv1.Proof) { p.Secret = p.Secret[1:] }), ErrMalformed},
		"no key hash":        {edit(func(p *tpmv1.Proof) { p.AgentKeySha256 = nil }), ErrMalformed},
		"event log too long": {edit(func(p *tpmv1.Proof) { p.EventLogSize = attest.MaxEventLog + 1 }), ErrTooLarge},
		"IMA log too long":   {edit(func(p *tpmv1.Proof) { p.ImaLogSize = attest.MaxIMALog + 1 }), ErrTooLarge},
		"unknown bank":       {edit(func(p *tpmv1.Proof) { p.Pcrs[0].Bank = "sm3" }), ErrMalformed},
		"bank twice":         {edit(func(p *tpmv1.Proof) { p.Pcrs = append(p.Pcrs, p.Pcrs[0]) }), ErrMalformed},
		"PCR 24":             {edit(func(p *tpmv1.Proof) { p.Pcrs[0].Values[24] = make([]byte, 32) }), ErrMalformed},
		"PCR of wrong size":  {edit(func(p *tpmv1.Proof) { p.Pcrs[0].Values[7] = make([]byte, 20) }), ErrMalformed},
		"bank of no PCR":     {edit(func(p *tpmv1.Proof) { p.Pcrs[0].Values = nil }), ErrMalformed},
		"chunk of no kind":   {chunk(&tpmv1.LogChunk{Data: []byte{1}}), ErrMalformed},
		"empty chunk":        {chunk(&tpmv1.LogChunk{Kind: tpmv1.LogKind_LOG_KIND_IMA}), ErrMalformed},
		"chunk past the end": {chunk(&tpmv1.LogChunk{Kind: tpmv1.LogKind_LOG_KIND_EVENT_LOG, Offset: attest.MaxEventLog, Data: []byte{1}}), ErrTooLarge},
		"offset wraps":       {chunk(&tpmv1.LogChunk{Kind: tpmv1.LogKind_LOG_KIND_EVENT_LOG, Offset: 1<<64 - 1, Data: []byte{1, 2}}), ErrTooLarge},
		"short ack":          {&tpmv1.AgentMessage{Step: &tpmv1.AgentMessage_Ack{Ack: &tpmv1.Ack{}}}, ErrMalformed},
	} {
		t.Run(name, func(t *testing.T) {
			b, err := proto.Marshal(tt.m)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := DecodeAgent(b, MaxLogReply); !errors.Is(err, tt.want) {
				t.Errorf("got %v", err)
			}
		})
	}
}

func TestRefusesServerMessagesOutOfBounds(t *testing.T) {
	challenge := func(edit func(*tpmv1.Challenge)) *tpmv1.ServerMessage {
		c := &tpmv1.Challenge{
			CredentialBlob: []byte{1}, EncryptedSecret: []byte{2}, Nonce: make([]byte, NonceSize), Pcrs: SelectionsToProto(attest.DefaultPCRs()),
		}
		edit(c)
		return &tpmv1.ServerMessage{Step: &tpmv1.ServerMessage_Challenge{Challenge: c}}
	}
	if _, err := EncodeServer(challenge(func(*tpmv1.Challenge) {})); err != nil {
		t.Errorf("a good challenge: %v", err)
	}
	for name, m := range map[string]*tpmv1.ServerMessage{
		"no step":             {},
		"empty challenge":     {Step: &tpmv1.ServerMessage_Challenge{}},
		"short nonce":         challenge(func(c *tpmv1.Challenge) { c.Nonce = c.Nonce[1:] }),
		"long nonce":          challenge(func(c *tpmv1.Challenge) { c.Nonce = append(c.Nonce, 0) }),
		"no credential":       challenge(func(c *tpmv1.Challenge) { c.CredentialBlob = nil }),
		"no PCR":              challenge(func(c *tpmv1.Challenge) { c.Pcrs = nil }),
		"empty selection":     challenge(func(c *tpmv1.Challenge) { c.Pcrs[0].Indices = nil }),
		"bank twice":          challenge(func(c *tpmv1.Challenge) { c.Pcrs = append(c.Pcrs, c.Pcrs[0]) }),
		"log of no kind":      {Step: &tpmv1.ServerMessage_LogRequest{LogRequest: &tpmv1.LogRequest{}}},
		"empty certificate":   {Step: &tpmv1.ServerMessage_AkCertificate{AkCertificate: &tpmv1.AKCertificate{}}},
		"certificate too big": {Step: &tpmv1.ServerMessage_AkCertificate{AkCertificate: &tpmv1.AKCertificate{Certificate: make([]byte, attest.MaxCertificate+1)}}},
	} {
		t.Run(name, func(t *testing.T) {
			b, err := proto.Marshal(m)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := DecodeServer(b); !errors.Is(err, ErrMalformed) && !errors.Is(err, ErrTooLarge) {
				t.Errorf("got %v", err)
			}
		})
	}
}

func FuzzDecodeAgent(f *testing.F) {
	b, err := EncodeAgent(agentProof(proof()))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add([]byte{0x0a, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := DecodeAgent(b, MaxLogReply)
		if err != nil {
			return
		}
		if _, err := EncodeAgent(m); err != nil {
			t.Errorf("accepted what it would not send: %v", err)
		}
	})
}

func TestAgentIDIsAFunctionOfTheEK(t *testing.T) {
	var ek [32]byte
	ek[0] = 0xab
	id := AgentID("example.org", ek)
	if want := "spiffe://example.org/spire/agent/tpmnode/ab" + strings.Repeat("0", 62); id != want {
		t.Errorf("got %s", id)
	}
}

func TestAgentKeyMetadataIsNeverHalfTrusted(t *testing.T) {
	incoming := func(values ...string) context.Context {
		return metadata.NewIncomingContext(t.Context(), metadata.MD{AgentKeyMetadata: values})
	}
	if _, bound, err := AgentKey(t.Context()); bound || err != nil {
		t.Errorf("absent: %v, %v", bound, err)
	}
	want := [32]byte{1}
	out, _ := metadata.FromOutgoingContext(WithAgentKey(t.Context(), want))
	if got, bound, err := AgentKey(metadata.NewIncomingContext(t.Context(), out)); got != want || !bound || err != nil {
		t.Errorf("present: %x, %v, %v", got, bound, err)
	}
	for name, ctx := range map[string]context.Context{
		"short": incoming("x"), "empty": incoming(""), "zero": incoming(string(make([]byte, 32))),
		"twice": incoming(string(want[:]), string(want[:])),
	} {
		if _, _, err := AgentKey(ctx); !errors.Is(err, ErrAgentKey) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestPCRSelectionText(t *testing.T) {
	for in, want := range map[string]string{
		"sha256:0-15":                           "sha256:0-15",
		"sha256:7":                              "sha256:7",
		"sha256:7,0-2,1":                        "sha256:0-2,7",
		"sha384:7+sha256:0,7":                   "sha256:0,7+sha384:7",
		"sha256:0,2,4,22-23":                    "sha256:0,2,4,22-23",
		attest.FormatPCRs(attest.DefaultPCRs()): "sha256:0-15",
	} {
		sel, err := attest.ParsePCRs(in)
		if err != nil {
			t.Errorf("%q: %v", in, err)
			continue
		}
		if got := attest.FormatPCRs(sel); got != want {
			t.Errorf("%q: got %q, want %q", in, got, want)
		}
		back, err := SelectionsFromProto(SelectionsToProto(sel))
		if err != nil || !cmp.Equal(back, sel) {
			t.Errorf("%q over the wire: %v, %v", in, back, err)
		}
	}
	for _, bad := range []string{"", "7", "sha256:", "sha256", "sha256:24", "sha256:7-0", "sha256:-1", "sha256:a", "sm3:1", "sha256:0-4294967295"} {
		if sel, err := attest.ParsePCRs(bad); err == nil {
			t.Errorf("%q reads as %v", bad, sel)
		}
	}
}

func TestPCRBanksOverTheWire(t *testing.T) {
	banks := []attest.PCRBank{{Bank: "sha256", Values: map[uint32][]byte{0: bytes.Repeat([]byte{1}, 32), 7: bytes.Repeat([]byte{2}, 32)}}}
	got, err := BanksFromProto(BanksToProto(banks))
	if err != nil || !cmp.Equal(got, banks) {
		t.Errorf("got %v, %v", got, err)
	}
}
