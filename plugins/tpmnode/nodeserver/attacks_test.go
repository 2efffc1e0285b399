package nodeserver

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/rootlink/rootlink/internal/forge"
	"github.com/rootlink/rootlink/pkg/attest"
	"github.com/rootlink/rootlink/plugins/tpmnode/wire"
	tpmv1 "github.com/rootlink/rootlink/proto/rootlink/tpm/v1"
)

func TestRefusesBannedNodeAskingForAnAKCertificate(t *testing.T) {
	var banned atomic.Bool
	banned.Store(true)
	h := newHost(t, "", func(o *Options) {
		o.Banned = func(context.Context, string) (bool, error) { return banned.Load(), nil }
	})
	a := newAgent(t, h)
	mustRefuse(t, h, a, codes.PermissionDenied, "banned")

	// Banned while its attestation was under way.
	banned.Store(false)
	a.pause = func(step string) { banned.Store(step == "proof") }
	mustRefuse(t, h, a, codes.PermissionDenied, "banned")
	banned.Store(false)
	a.pause = nil
	mustAttest(t, h, a)
}

func TestRefusesEKOnTheDenyList(t *testing.T) {
	h := newHost(t, "", nil)
	a := newAgent(t, h)
	list := hex.EncodeToString(a.tpm.EKHash[:]) + " # stolen"
	h.write(t, "deny", list)
	h.write(t, "allow", list) // the deny-list wins
	mustRefuse(t, h, a, codes.PermissionDenied, "ek_denied")

	// Denied while its attestation was under way.
	h.write(t, "deny", "")
	a.pause = func(step string) {
		if step == "proof" {
			h.write(t, "deny", list)
		}
	}
	mustRefuse(t, h, a, codes.PermissionDenied, "ek_denied")
}

func TestRefusesWhenTheDenyListIsGone(t *testing.T) {
	h := newHost(t, "", nil)
	for name, list := range map[string]func(){
		"damaged": func() { h.write(t, "deny", "not a hash") },
		"removed": func() {
			if err := os.Remove(h.path("deny")); err != nil {
				t.Fatal(err)
			}
		},
	} {
		list()
		t.Log(name)
		mustRefuse(t, h, newAgent(t, h), codes.Unavailable, "lists")
	}
}

func TestRefusesUntrustedEKs(t *testing.T) {
	h := newHost(t, "", nil)
	twin := forge.NewMaker(t, "Forge Semiconductor") // the same names, other keys
	for name, tt := range map[string]struct {
		tpm    *forge.TPM
		reason string
	}{
		"another maker under the same name": {forge.NewTPM(t, twin, forge.TPMOptions{}), "ek_untrusted"},
		"RSA-1024":                          {forge.NewTPM(t, h.maker, forge.TPMOptions{EK: forge.EKRSA2048, EKKey: rsaKey(t, 1024)}), "ek_untrusted"},
	} {
		t.Run(name, func(t *testing.T) {
			mustRefuse(t, h, &agent{tpm: tt.tpm}, codes.PermissionDenied, tt.reason)
		})
	}
	t.Run("expired for now", func(t *testing.T) {
		a := newAgent(t, h)
		h.advance(11 * 365 * 24 * time.Hour)
		defer h.advance(-11 * 365 * 24 * time.Hour)
		mustRefuse(t, h, a, codes.PermissionDenied, "ek_untrusted")
	})
}

func rsaKey(t *testing.T, bits int) *rsa.PrivateKey {
	t.Helper()
	t.Setenv("GODEBUG", "rsa1024min=0")
	k, err := rsa.GenerateKey(rand.Reader, bits)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func TestRefusesEKTypeThatIsNotConfigured(t *testing.T) {
	h := newHost(t, `ek_types = ["ecc-p256"]`, nil)
	mustAttest(t, h, newAgent(t, h))
	mustRefuse(t, h, &agent{tpm: forge.NewTPM(t, h.maker, forge.TPMOptions{EK: forge.EKRSA2048})}, codes.PermissionDenied, "ek_type")
}

// The agent of TPM A shows the EK certificate of TPM B, to become B.
func TestRefusesEKCertificateOfAnotherTPM(t *testing.T) {
	h := newHost(t, "", nil)
	a, b := newAgent(t, h), newAgent(t, h)
	mustAttest(t, h, b)

	a.request = func(r *tpmv1.AttestRequest) { r.EkChain = b.tpm.EKChain }
	mustRefuse(t, h, a, codes.PermissionDenied, "ek_mismatch")

	a.request = func(r *tpmv1.AttestRequest) { r.EkChain, r.EkPublic = b.tpm.EKChain, b.tpm.EKPublic }
	mustRefuse(t, h, a, codes.PermissionDenied, "activation")
}

// The same for an allow-list: whoever knows the hash knows the key soon.
func TestRefusesTakeoverOfAnAllowListedEK(t *testing.T) {
	h := newHost(t, "", nil)
	a, b := newAgent(t, h), newAgent(t, h)
	h.write(t, "allow", hex.EncodeToString(b.tpm.EKHash[:]))
	a.request = func(r *tpmv1.AttestRequest) { r.EkChain, r.EkPublic = nil, b.tpm.EKPublic }
	mustRefuse(t, h, a, codes.PermissionDenied, "activation")
	// The AK that the attacker named was not pinned to B's EK.
	mustAttest(t, h, b)
	if h.alarmKinds() != "" {
		t.Errorf("alarms %s", h.alarmKinds())
	}
}

// An allow-listed software TPM with a certificate of its owner's making.
func TestMakersNameNeedsTheMakersRoot(t *testing.T) {
	var got attest.AK
	h := newHost(t, "", func(o *Options) {
		o.OnAttested = func(_ context.Context, a *Attested) error { got = a.AK; return nil }
	})
	a := newAgent(t, h)
	h.write(t, "allow", hex.EncodeToString(a.tpm.EKHash[:]))
	a.request = func(r *tpmv1.AttestRequest) { r.TpmManufacturer, r.TpmVendor = "IFX", "SLB9672" }
	mustAttest(t, h, a)
	genuine := got.Manufacturer
	if genuine == "" || strings.Contains(genuine, "says the node") {
		t.Fatalf("the maker's word is lost: %q", genuine)
	}
	forger := forge.NewMaker(t, "Forge Semiconductor")
	a.tpm.EKChain = forger.IssueEK(t, a.tpm.EKKey(), nil)
	mustAttest(t, h, a)
	if got.Manufacturer != "IFX (says the node)" {
		t.Errorf("a forged certificate names the maker %q", got.Manufacturer)
	}
}

// TestAgentIDIsNeverTheAgentsChoice: A says all it can to be taken for B, on a
// server that knows B by its maker and by the allow-list. Whoever it attests,
// it is not B.
func TestAgentIDIsNeverTheAgentsChoice(t *testing.T) {
	for name, tt := range map[string]struct {
		lie    func(r *tpmv1.AttestRequest, a, b *forge.TPM)
		reason string // empty: attested, as A
	}{
		"B's public key":              {func(r *tpmv1.AttestRequest, _, b *forge.TPM) { r.EkPublic = b.EKPublic }, "ek_mismatch"},
		"B's certificate":             {func(r *tpmv1.AttestRequest, _, b *forge.TPM) { r.EkChain = b.EKChain }, "ek_mismatch"},
		"B's public key, none of B's": {func(r *tpmv1.AttestRequest, _, b *forge.TPM) { r.EkChain, r.EkPublic = nil, b.EKPublic }, "activation"},
		"B's EK":                      {func(r *tpmv1.AttestRequest, _, b *forge.TPM) { r.EkChain, r.EkPublic = b.EKChain, b.EKPublic }, "activation"},
		"B's certificate behind its own": {func(r *tpmv1.AttestRequest, a, b *forge.TPM) {
			r.EkChain = [][]byte{a.EKChain[0], a.EKChain[1], b.EKChain[0]}
		}, ""},
		"B's certificate before its own": {func(r *tpmv1.AttestRequest, a, b *forge.TPM) {
			r.EkChain = [][]byte{b.EKChain[0], a.EKChain[1], a.EKChain[0]}
		}, "ek_mismatch"},
		"B's AK": {func(r *tpmv1.AttestRequest, _, b *forge.TPM) {
			r.AkPublic, r.AkCreationData = b.AKPublic, b.AKCreationData
			r.AkCreationAttest, r.AkCreationSignature = b.AKCreationAttest, b.AKCreationSig
		}, "activation"},
		"no lie": {func(*tpmv1.AttestRequest, *forge.TPM, *forge.TPM) {}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t, "", nil)
			a, b := newAgent(t, h), newAgent(t, h)
			h.write(t, "allow", hex.EncodeToString(b.tpm.EKHash[:]))
			a.request = func(r *tpmv1.AttestRequest) { tt.lie(r, a.tpm, b.tpm) }
			if tt.reason != "" {
				mustRefuse(t, h, a, codes.PermissionDenied, tt.reason)
				return
			}
			if id := mustAttest(t, h, a).attributes.SpiffeId; id != wire.AgentID(trustDomain, a.tpm.EKHash) {
				t.Errorf("attested as %s", id)
			}
		})
	}
}

// A relay that answers A's challenge with what B's TPM released for B's.
func TestRefusesSecretsCrossedBetweenSessions(t *testing.T) {
	h := newHost(t, "", nil)
	a, b := newAgent(t, h), newAgent(t, h)
	aSecret, bSecret := make(chan []byte, 1), make(chan []byte, 1)
	cross := func(x *agent, mine, other chan []byte) {
		x.secret = func(blob, encrypted []byte) ([]byte, error) {
			s, err := x.tpm.ActivateCredential(blob, encrypted)
			if err != nil {
				return nil, err
			}
			mine <- s
			return <-other, nil
		}
	}
	cross(a, aSecret, bSecret)
	cross(b, bSecret, aSecret)
	errs := make(chan error, 2)
	for _, x := range []*agent{a, b} {
		go func() {
			_, err := x.do(t, h)
			errs <- err
		}()
	}
	for range 2 {
		if err := <-errs; status.Code(err) != codes.PermissionDenied {
			t.Errorf("got %v", err)
		}
	}
	if !strings.Contains(h.logged(), "reason=activation") {
		t.Error(h.logged())
	}
}

func TestRefusesSecretOfAnEarlierSession(t *testing.T) {
	h := newHost(t, "", nil)
	a := newAgent(t, h)
	old := mustAttest(t, h, a).proof.Secret
	a.secret = func(_, _ []byte) ([]byte, error) { return old, nil }
	mustRefuse(t, h, a, codes.PermissionDenied, "activation")
}

func TestRefusesReplayedNodeQuote(t *testing.T) {
	h := newHost(t, "", nil)
	a := newAgent(t, h)
	old := mustAttest(t, h, a).proof
	a.proof = func(p *tpmv1.Proof) { p.Attest, p.Signature, p.Pcrs = old.Attest, old.Signature, old.Pcrs }
	mustRefuse(t, h, a, codes.InvalidArgument, "quote_binding")
}

func TestRefusesQuoteForAnotherTrustDomainOrKey(t *testing.T) {
	h := newHost(t, "", nil)
	for name, extra := range map[string]func(c *tpmv1.Challenge, a *agent) [32]byte{
		"another trust domain": func(c *tpmv1.Challenge, a *agent) [32]byte {
			return attest.NodeExtraData([32]byte(c.Nonce), a.tpm.AKName, "evil.example", [32]byte{})
		},
		"another AK": func(c *tpmv1.Challenge, a *agent) [32]byte {
			return attest.NodeExtraData([32]byte(c.Nonce), newAgent(t, h).tpm.AKName, trustDomain, [32]byte{})
		},
		"another agent's key": func(c *tpmv1.Challenge, a *agent) [32]byte {
			return attest.NodeExtraData([32]byte(c.Nonce), a.tpm.AKName, trustDomain, [32]byte{1})
		},
		"a leaf quote": func(_ *tpmv1.Challenge, a *agent) [32]byte {
			return attest.QuoteExtraData(1, [32]byte{1}, a.tpm.AKName)
		},
	} {
		t.Run(name, func(t *testing.T) {
			a := newAgent(t, h)
			var c *tpmv1.Challenge
			a.challenge = func(m *tpmv1.Challenge) { c = m }
			a.quote = func(q *tpm2.TPMSAttest) {
				e := extra(c, a)
				q.ExtraData = tpm2.TPM2BData{Buffer: e[:]}
			}
			mustRefuse(t, h, a, codes.InvalidArgument, "quote_binding")
		})
	}
}

func TestRefusesWrongTrustDomain(t *testing.T) {
	h := newHost(t, "", nil)
	a := newAgent(t, h)
	a.request = func(r *tpmv1.AttestRequest) { r.TrustDomain = "evil.example" }
	mustRefuse(t, h, a, codes.PermissionDenied, "trust_domain")
}

func TestRefusesMissingAgentKeyBinding(t *testing.T) {
	h := newHost(t, "", nil)
	// Our server names a key, the proof binds none, or another.
	for _, claim := range [][32]byte{{}, {9}} {
		a := newAgent(t, h)
		a.key = &[32]byte{1}
		a.proof = func(p *tpmv1.Proof) { p.AgentKeySha256 = claim[:] }
		mustRefuse(t, h, a, codes.PermissionDenied, "agent_key")
	}
	// Quote over zeros, hash in the message as the server wants it.
	a := newAgent(t, h)
	a.key = &[32]byte{1}
	var c *tpmv1.Challenge
	a.challenge = func(m *tpmv1.Challenge) { c = m }
	a.quote = func(q *tpm2.TPMSAttest) {
		e := attest.NodeExtraData([32]byte(c.Nonce), a.tpm.AKName, trustDomain, [32]byte{})
		q.ExtraData = tpm2.TPM2BData{Buffer: e[:]}
	}
	mustRefuse(t, h, a, codes.InvalidArgument, "quote_binding")
	// Under a stock SPIRE the key is hidden, and a claim about it is worth nothing.
	a = newAgent(t, h)
	a.proof = func(p *tpmv1.Proof) { p.AgentKeySha256 = bytes.Repeat([]byte{1}, 32) }
	mustRefuse(t, h, a, codes.PermissionDenied, "agent_key")
	if len(h.attested) != 0 {
		t.Error("observed a node")
	}
}

func TestRefusesMalformedAgentKeyOfTheHost(t *testing.T) {
	h := newHost(t, "", nil)
	stream, err := h.client.Attest(metadata.AppendToOutgoingContext(t.Context(), wire.AgentKeyMetadata, "short"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); status.Code(err) != codes.Unavailable {
		t.Errorf("got %v", err)
	}
}

func TestRefusesUnfitAKs(t *testing.T) {
	h := newHost(t, "", nil)
	attr := func(f func(*tpm2.TPMAObject)) forge.TPMOptions {
		return forge.TPMOptions{AKPublic: func(p *tpm2.TPMTPublic) { f(&p.ObjectAttributes) }}
	}
	null := func(p *tpm2.TPMTPublic) {
		d, err := p.Parameters.ECCDetail()
		if err != nil {
			t.Fatal(err)
		}
		d.Scheme = tpm2.TPMTECCScheme{Scheme: tpm2.TPMAlgNull}
		p.Parameters = tpm2.NewTPMUPublicParms(tpm2.TPMAlgECC, d)
	}
	for name, o := range map[string]forge.TPMOptions{
		"not restricted":        attr(func(a *tpm2.TPMAObject) { a.Restricted = false }),
		"not fixed to the TPM":  attr(func(a *tpm2.TPMAObject) { a.FixedTPM = false }),
		"not fixed to a parent": attr(func(a *tpm2.TPMAObject) { a.FixedParent = false }),
		"imported":              attr(func(a *tpm2.TPMAObject) { a.SensitiveDataOrigin = false }),
		"decrypts":              attr(func(a *tpm2.TPMAObject) { a.Decrypt = true }),
		"NULL scheme, no panic": {AKPublic: null},
		"creation of nothing":   {Creation: func(_ *tpm2.TPMSCreationData, a *tpm2.TPMSAttest) { a.Magic = 0 }},
		"under another hierarchy": {Creation: func(d *tpm2.TPMSCreationData, _ *tpm2.TPMSAttest) {
			d.ParentQualifiedName = tpm2.TPM2BName{Buffer: append([]byte{0, 0x0b}, make([]byte, 32)...)}
		}},
	} {
		t.Run(name, func(t *testing.T) {
			mustRefuse(t, h, &agent{tpm: forge.NewTPM(t, h.maker, o)}, codes.PermissionDenied, "ak_unacceptable")
			if strings.Contains(h.logged(), "panicked") {
				t.Error("a handler panicked")
			}
		})
	}
}

func TestRefusesUnfitQuotes(t *testing.T) {
	h := newHost(t, "", nil)
	all := attest.DefaultPCRs()
	fewer := []attest.PCRSelection{{Bank: "sha256", Indices: all[0].Indices[1:]}}
	for name, bend := range map[string]func(*agent){
		"wrong magic":    func(a *agent) { a.quote = func(q *tpm2.TPMSAttest) { q.Magic = 1 } },
		"trailing bytes": func(a *agent) { a.proof = func(p *tpmv1.Proof) { p.Attest = append(p.Attest, 0) } },
		"flipped bit":    func(a *agent) { a.proof = func(p *tpmv1.Proof) { p.Attest[len(p.Attest)-1] ^= 1 } },
		"not a quote": func(a *agent) {
			a.proof = func(p *tpmv1.Proof) { p.Attest = a.tpm.AKCreationAttest; p.Signature = a.tpm.AKCreationSig }
		},
		"a PCR is missing":   func(a *agent) { a.pcrs = fewer },
		"disabled bank":      func(a *agent) { a.pcrs = []attest.PCRSelection{{Bank: "sha512", Indices: all[0].Indices}} },
		"another bank":       func(a *agent) { a.pcrs = []attest.PCRSelection{{Bank: "sha384", Indices: all[0].Indices}} },
		"a value is changed": func(a *agent) { a.proof = func(p *tpmv1.Proof) { p.Pcrs[0].Values[7] = make([]byte, 32) } },
		"a value is added":   func(a *agent) { a.proof = func(p *tpmv1.Proof) { p.Pcrs[0].Values[20] = make([]byte, 32) } },
		"signed by another AK": func(a *agent) {
			a.proof = func(p *tpmv1.Proof) { p.Signature = newAgent(t, h).tpm.SignAK(t, p.Attest) }
		},
	} {
		t.Run(name, func(t *testing.T) {
			a := newAgent(t, h)
			bend(a)
			mustRefuse(t, h, a, codes.PermissionDenied, "quote")
		})
	}
}

func TestRefusesSHA1BankOnly(t *testing.T) {
	h := newHost(t, "", nil)
	a := newAgent(t, h)
	bank := attest.PCRBank{Bank: "sha1", Values: map[uint32][]byte{}}
	for i := range uint32(24) {
		bank.Values[i] = make([]byte, 20)
	}
	a.tpm.PCRs = []attest.PCRBank{bank}
	a.pcrs = []attest.PCRSelection{{Bank: "sha1", Indices: attest.DefaultPCRs()[0].Indices}}
	mustRefuse(t, h, a, codes.PermissionDenied, "quote")
}

// twoAKs returns two agents whose AKs are different keys in one TPM.
func twoAKs(t *testing.T, h *host) (a, b *agent) {
	t.Helper()
	o := forge.TPMOptions{EKKey: forge.P256(t)}
	return &agent{tpm: forge.NewTPM(t, h.maker, o)}, &agent{tpm: forge.NewTPM(t, h.maker, o)}
}

// underParentOf makes an AK's creation data name the storage key of another.
func underParentOf(t *testing.T, other *forge.TPM) func(*tpm2.TPMSCreationData, *tpm2.TPMSAttest) {
	name := func(parts ...[]byte) []byte {
		h := sha256.Sum256(bytes.Join(parts, nil))
		return append([]byte{0, 0x0b}, h[:]...)
	}
	return func(d *tpm2.TPMSCreationData, a *tpm2.TPMSAttest) {
		info, err := a.Attested.Creation()
		if err != nil {
			t.Fatal(err)
		}
		qn := name(binary.BigEndian.AppendUint32(nil, uint32(tpm2.TPMRHEndorsement)), other.ParentName)
		d.ParentName = tpm2.TPM2BName{Buffer: other.ParentName}
		d.ParentQualifiedName = tpm2.TPM2BName{Buffer: qn}
		a.QualifiedSigner = tpm2.TPM2BName{Buffer: name(qn, info.ObjectName.Buffer)}
	}
}

func TestSecondAKOnOneEK(t *testing.T) {
	t.Run("is alarmed", func(t *testing.T) {
		h := newHost(t, "", nil)
		a, b := twoAKs(t, h)
		mustAttest(t, h, a)
		h.advance(time.Hour)
		mustAttest(t, h, b)
		if h.alarmKinds() != "ak_changed:false" || !strings.Contains(h.logged(), "ALARM") {
			t.Errorf("alarms %q", h.alarmKinds())
		}
		h.advance(time.Hour)
		mustAttest(t, h, b) // pinned now
		if h.alarmKinds() != "ak_changed:false" {
			t.Errorf("alarms %q", h.alarmKinds())
		}
	})
	t.Run("is refused where configured", func(t *testing.T) {
		h := newHost(t, "refuse_ak_change = true", nil)
		a, b := twoAKs(t, h)
		mustAttest(t, h, a)
		mustRefuse(t, h, b, codes.PermissionDenied, "ak_changed")
		if h.alarmKinds() != "ak_changed:true" {
			t.Errorf("alarms %q", h.alarmKinds())
		}
		h.advance(time.Hour)
		mustAttest(t, h, a) // the pin did not move
	})
}

// The RSA EK and the P-256 EK of one TPM would be two nodes.
func TestRefusesOneTPMUnderTwoEKs(t *testing.T) {
	h := newHost(t, "", nil)
	a := newAgent(t, h)
	mustAttest(t, h, a)
	other := forge.NewTPM(t, h.maker, forge.TPMOptions{EK: forge.EKRSA2048, Creation: underParentOf(t, a.tpm)})
	mustRefuse(t, h, &agent{tpm: other}, codes.PermissionDenied, "second_ek")
	if h.alarmKinds() != "second_ek:true" {
		t.Errorf("alarms %q", h.alarmKinds())
	}
}
