package attest_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"errors"
	"net/url"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/rootlink/rootlink/internal/forge"
	"github.com/rootlink/rootlink/pkg/attest"
)

func TestVerifyDetached(t *testing.T) {
	w := forge.NewWorld(t)
	svid := w.Plain(t)
	d := w.Detach(t, svid)
	page, err := os.ReadFile(docFile)
	if err != nil {
		t.Fatal(err)
	}
	v, report, err := attest.VerifyDetached(d, w.DetachedBinding(svid), w.Options())
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range report {
		if c.Outcome == attest.Failed || c.Clause == "" || (c.Outcome == attest.NotRun && c.Detail == "") {
			t.Errorf("%+v", c)
		}
		if !bytes.Contains(page, []byte("| "+c.ID+" |")) {
			t.Errorf("evidence.md does not list %s", c.ID)
		}
	}
	if v.Kind() != attest.KindDetached || !v.NonceTime().IsZero() || !v.Earliest().Equal(svid.NotBefore) || v.EK().Hash != w.TPM.EKHash {
		t.Errorf("verified evidence says %+v", v)
	}
}

// The agent of a SPIRE server with an upstream authority has intermediates in
// its chain, and the trust file holds the root.
func TestVerifyDetachedThroughAnIntermediate(t *testing.T) {
	w := forge.NewWorld(t)
	svid := w.Plain(t)
	d := w.Detach(t, svid)
	key := forge.P256(t)
	inter := intermediate(t, w, key.Public(), nil)
	d.AgentSVID = [][]byte{w.AgentBy(t, w.TPM, inter, key).Raw, inter.Raw}
	forge.SignDetached(t, d, svid, w.SVIDKey)
	if _, _, err := attest.VerifyDetached(d, w.DetachedBinding(svid), w.Options()); err != nil {
		t.Error(err)
	}
}

func intermediate(t *testing.T, w *forge.World, key any, bend func(*x509.Certificate)) *x509.Certificate {
	t.Helper()
	c := &x509.Certificate{
		Subject:  pkix.Name{CommonName: "intermediate", SerialNumber: "7"},
		KeyUsage: x509.KeyUsageCertSign, IsCA: true, BasicConstraintsValid: true,
		NotBefore: w.Now.Add(-time.Hour), NotAfter: w.Now.Add(time.Hour),
	}
	if bend != nil {
		bend(c)
	}
	return forge.Sign(t, c, w.Authority, key, w.AuthorityKey())
}

// detachedAttack bends a good world, or what was made from it.
type detachedAttack struct {
	world func(*testing.T, *forge.World)
	bend  func(*testing.T, *forge.World, *attest.Detached, *attest.DetachedBinding, *attest.Options)
	sign  bool // the holder of the SVID's key takes part
	check string
	want  error
}

func TestRefusesDetachedEvidence(t *testing.T) {
	type wo = *forge.World
	type de = *attest.Detached
	type bi = *attest.DetachedBinding
	type op = *attest.Options
	d := func(f func(wo, de)) func(*testing.T, wo, de, bi, op) {
		return func(_ *testing.T, w wo, d de, _ bi, _ op) { f(w, d) }
	}
	b := func(f func(wo, bi)) func(*testing.T, wo, de, bi, op) {
		return func(_ *testing.T, w wo, _ de, b bi, _ op) { f(w, b) }
	}
	agent := func(f func(*x509.Certificate)) func(*testing.T, wo) {
		return func(_ *testing.T, w wo) { w.AgentSVID = f }
	}
	at := func(d time.Duration) func(*testing.T, wo, de, bi, op) {
		return b(func(w wo, b bi) { b.At = w.Now.Add(d) })
	}
	id := func(s string) func(*testing.T, wo) {
		return agent(func(c *x509.Certificate) {
			u, err := url.Parse(s)
			if err != nil {
				panic(err)
			}
			c.URIs = []*url.URL{u}
		})
	}
	ekOf := func(w wo) string { return hex.EncodeToString(w.TPM.EKHash[:]) }

	for name, a := range map[string]detachedAttack{
		"without a record":    {bend: func(_ *testing.T, _ wo, d de, _ bi, _ op) { d.Evidence = nil }, check: "options", want: attest.ErrOptions},
		"without an SVID":     {bend: b(func(_ wo, b bi) { b.SVID = nil }), check: "options", want: attest.ErrOptions},
		"without a time":      {bend: b(func(_ wo, b bi) { b.At = time.Time{} }), check: "options", want: attest.ErrOptions},
		"without authorities": {bend: b(func(_ wo, b bi) { b.Authorities = nil }), check: "options", want: attest.ErrOptions},

		"leaf evidence":      {world: func(_ *testing.T, w wo) {}, bend: d(func(_ wo, d de) { d.Evidence.Kind = attest.KindLeaf }), check: "evidence.kind", want: attest.ErrDetachedKind},
		"node key hash zero": {bend: d(func(_ wo, d de) { d.Evidence.AgentKey = [32]byte{} }), check: "evidence.kind", want: attest.ErrDetachedKind},

		"signature stripped": {bend: d(func(_ wo, d de) { d.Signature = nil }), check: "detached.signature", want: attest.ErrDetachedSignature},
		"signed by another key": {bend: func(t *testing.T, _ wo, d de, b bi, _ op) {
			forge.SignDetached(t, d, b.SVID, forge.P256(t))
		}, check: "detached.signature", want: attest.ErrDetachedSignature},
		"signed by the agent's key": {bend: func(t *testing.T, w wo, d de, b bi, _ op) {
			forge.SignDetached(t, d, b.SVID, w.AgentKey)
		}, check: "detached.signature", want: attest.ErrDetachedSignature},
		"agent SVID exchanged after it was signed": {bend: func(t *testing.T, w wo, d de, _ bi, _ op) {
			d.AgentSVID = [][]byte{w.AgentOf(t, w.TPM).Raw}
		}, check: "detached.signature", want: attest.ErrDetachedSignature},
		"evidence changed after it was signed": {bend: d(func(_ wo, d de) { d.Evidence.Tool[0] ^= 1 }), check: "detached.signature", want: attest.ErrDetachedSignature},
		"moved to another SVID of the same key": {bend: func(t *testing.T, w wo, _ de, b bi, _ op) {
			b.SVID = w.Plain(t)
		}, check: "detached.signature", want: attest.ErrDetachedSignature},
		"moved to another SVID of the same key and signed": {bend: func(t *testing.T, w wo, _ de, b bi, _ op) {
			b.SVID = w.Plain(t)
		}, sign: true, check: "nonce.svid", want: attest.ErrDetachedNonce},
		"moved to another SVID": {bend: func(t *testing.T, w wo, d de, b bi, _ op) {
			w.SVIDKey = forge.P256(t)
			b.SVID = w.Plain(t)
		}, sign: true, check: "leaf.commitment", want: attest.ErrQuoteExtraData},
		"moved to another statement": {bend: b(func(_ wo, b bi) { b.Payload = sha256.Sum256([]byte("another")) }), check: "leaf.payload", want: attest.ErrWrongPayload},
		"moved to another statement, record changed": {bend: func(_ *testing.T, _ wo, d de, b bi, _ op) {
			b.Payload = sha256.Sum256([]byte("another"))
			d.Evidence.Payload = b.Payload
		}, sign: true, check: "leaf.commitment", want: attest.ErrQuoteExtraData},
		"moved to another SPIFFE ID": {bend: b(func(_ wo, b bi) { b.SPIFFEID = "spiffe://example.org/other" }), check: "leaf.commitment", want: attest.ErrQuoteExtraData},

		"agent SVID is none": {bend: d(func(_ wo, d de) { d.AgentSVID = [][]byte{{1}} }), sign: true, check: "agent_svid.profile", want: attest.ErrAgentSVID},
		"agent SVID is a workload's": {bend: func(t *testing.T, w wo, d de, b bi, _ op) {
			d.AgentSVID = [][]byte{b.SVID.Raw}
		}, sign: true, check: "agent_svid.profile", want: attest.ErrAgentSVID},
		"agent of another attestor":     {world: id("spiffe://example.org/spire/agent/join_token/" + strings.Repeat("00", 32)), check: "agent_svid.profile", want: attest.ErrAgentSVID},
		"agent of another trust domain": {world: id("spiffe://example.com" + attest.AgentPath + strings.Repeat("00", 32)), check: "agent_svid.profile", want: attest.ErrAgentSVID},
		"agent ID in capitals":          {world: id("spiffe://example.org" + attest.AgentPath + strings.Repeat("AA", 32)), check: "agent_svid.profile", want: attest.ErrAgentSVID},
		"agent ID too short":            {world: id("spiffe://example.org" + attest.AgentPath + strings.Repeat("aa", 31)), check: "agent_svid.profile", want: attest.ErrAgentSVID},
		"agent ID too long":             {world: id("spiffe://example.org" + attest.AgentPath + strings.Repeat("aa", 33)), check: "agent_svid.profile", want: attest.ErrAgentSVID},
		"agent ID with a query": {world: func(t *testing.T, w wo) {
			id("spiffe://example.org"+attest.AgentPath+ekOf(w)+"?x")(t, w)
		}, check: "agent_svid.profile", want: attest.ErrAgentSVID},
		"agent with two names": {world: agent(func(c *x509.Certificate) { c.URIs = append(c.URIs, c.URIs[0]) }), check: "agent_svid.profile", want: attest.ErrAgentSVID},
		"agent is a CA": {world: agent(func(c *x509.Certificate) {
			c.IsCA, c.KeyUsage = true, c.KeyUsage|x509.KeyUsageCertSign
		}), check: "agent_svid.profile", want: attest.ErrAgentSVID},
		"agent that says it is a CA": {world: agent(func(c *x509.Certificate) { c.IsCA = true }), check: "agent_svid.profile", want: attest.ErrAgentSVID},
		"agent that may sign certificates": {world: agent(func(c *x509.Certificate) {
			c.KeyUsage |= x509.KeyUsageCRLSign
		}), check: "agent_svid.profile", want: attest.ErrAgentSVID},
		"agent without digitalSignature":           {world: agent(func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageKeyAgreement }), check: "agent_svid.profile", want: attest.ErrAgentSVID},
		"agent with an unknown critical extension": {world: agent(unknownCritical), check: "agent_svid.profile", want: attest.ErrAgentSVID},

		"agent of an authority that is not trusted": {bend: func(t *testing.T, w wo, d de, _ bi, _ op) {
			other := forge.NewWorld(t)
			d.AgentSVID = [][]byte{w.AgentBy(t, w.TPM, other.Authority, other.AuthorityKey()).Raw}
		}, sign: true, check: "agent_svid.authority", want: attest.ErrAgentAuthority},
		"agent of a workload that plays CA": {bend: func(t *testing.T, w wo, d de, b bi, _ op) {
			d.AgentSVID = [][]byte{w.AgentBy(t, w.TPM, b.SVID, w.SVIDKey).Raw, b.SVID.Raw}
		}, sign: true, check: "agent_svid.authority", want: attest.ErrAgentAuthority},
		"agent of an intermediate that is left out": {bend: func(t *testing.T, w wo, d de, _ bi, _ op) {
			key := forge.P256(t)
			d.AgentSVID = [][]byte{w.AgentBy(t, w.TPM, intermediate(t, w, key.Public(), nil), key).Raw}
		}, sign: true, check: "agent_svid.authority", want: attest.ErrAgentAuthority},
		"agent of an intermediate that expired": {bend: func(t *testing.T, w wo, d de, _ bi, _ op) {
			key := forge.P256(t)
			inter := intermediate(t, w, key.Public(), func(c *x509.Certificate) { c.NotAfter = w.Now })
			d.AgentSVID = [][]byte{w.AgentBy(t, w.TPM, inter, key).Raw, inter.Raw}
		}, sign: true, check: "agent_svid.authority", want: attest.ErrAgentAuthority},
		"an intermediate that is none":                         {bend: d(func(_ wo, d de) { d.AgentSVID = append(d.AgentSVID, []byte{1}) }), sign: true, check: "agent_svid.authority", want: attest.ErrAgentAuthority},
		"after expiry of the agent SVID":                       {bend: at(59*time.Minute + time.Second), check: "agent_svid.authority", want: attest.ErrAgentAuthority},
		"before the agent SVID":                                {world: agent(func(c *x509.Certificate) { c.NotBefore = forge.Epoch().Add(time.Minute) }), check: "agent_svid.authority", want: attest.ErrAgentAuthority},
		"authority given up":                                   {bend: b(func(w wo, b bi) { b.Authorities[0].Until = w.Now }), check: "agent_svid.authority", want: attest.ErrAgentAuthority},
		"authority only prepared when the agent was certified": {bend: b(func(w wo, b bi) { b.Authorities[0].From = w.Now }), check: "agent_svid.authority", want: attest.ErrAgentAuthority},
		"after expiry of the SVID": {
			world: agent(func(c *x509.Certificate) { c.NotAfter = forge.Epoch().Add(5 * time.Hour) }),
			bend:  at(time.Hour + time.Second), check: "time.detached", want: attest.ErrTime,
		},
		"before the SVID": {world: func(_ *testing.T, w wo) {
			w.SVID = func(c *x509.Certificate) { c.NotBefore = w.Now.Add(time.Minute) }
		}, check: "time.detached", want: attest.ErrTime},
		"after expiry of the AK certificate": {world: func(_ *testing.T, w wo) {
			w.AKCert = func(c *x509.Certificate) { c.NotAfter = w.Now }
		}, check: "ak_cert.time", want: attest.ErrAKCertTime},
		"before the AK certificate": {world: func(_ *testing.T, w wo) {
			w.AKCert = func(c *x509.Certificate) { c.NotBefore = w.Now.Add(time.Minute) }
		}, check: "ak_cert.time", want: attest.ErrAKCertTime},

		"by another node": {bend: func(t *testing.T, w wo, d de, _ bi, _ op) {
			d.AgentSVID = [][]byte{w.AgentOf(t, forge.NewTPM(t, w.Maker, forge.TPMOptions{})).Raw}
		}, sign: true, check: "ek.identity", want: attest.ErrWrongEK},
		"by another agent of the node": {bend: func(t *testing.T, w wo, d de, _ bi, _ op) {
			w.AgentKey = forge.P256(t)
			d.AgentSVID = [][]byte{w.AgentOf(t, w.TPM).Raw}
		}, sign: true, check: "leaf.agent_key", want: attest.ErrWrongAgent},
		"another TPM's quote under this node's agent": {bend: func(t *testing.T, w wo, d de, b bi, _ op) {
			mine := d.AgentSVID
			w.TPM = forge.NewTPM(t, w.Maker, forge.TPMOptions{})
			*d = *w.Detach(t, b.SVID)
			d.AgentSVID = mine
		}, sign: true, check: "ek.identity", want: attest.ErrWrongEK},
		"EK revoked": {bend: func(_ *testing.T, w wo, _ de, _ bi, o op) {
			o.Revoked = revoke(attest.RevokedEK, ekOf(w), w.Now)
		}, check: "ek.revocation", want: attest.ErrRevoked},

		"after a reboot": {world: func(_ *testing.T, w wo) {
			before := attest.BootCounters{Reset: w.TPM.ResetCount, Restart: w.TPM.RestartCount}
			w.Statement = func(s *attest.AKStatement) { s.Boot = &before }
			w.TPM.Reboot(true)
		}, check: "quote.boot", want: attest.ErrBoot},
		"after a suspend": {world: func(_ *testing.T, w wo) {
			w.Statement = func(s *attest.AKStatement) {
				s.Boot = &attest.BootCounters{Reset: s.Boot.Reset, Restart: s.Boot.Restart + 1}
			}
		}, check: "quote.boot", want: attest.ErrBoot},
		"AK certificate without counters": {world: func(_ *testing.T, w wo) {
			w.Statement = func(s *attest.AKStatement) { s.Boot = nil }
		}, check: "quote.boot", want: attest.ErrBoot},
		"nonce of a server": {world: func(_ *testing.T, w wo) {
			w.Evidence = func(e *attest.Evidence) { e.Nonce = forge.Nonces().Make(forge.AgentID, w.Now) }
		}, check: "leaf.commitment", want: attest.ErrQuoteExtraData},
		"PCR values changed": {world: func(_ *testing.T, w wo) {
			w.Evidence = func(e *attest.Evidence) { e.PCRs[0].Values[7] = make([]byte, 32) }
		}, check: "quote.pcr_digest", want: attest.ErrQuoteValues},
		"event log of another boot": {world: func(_ *testing.T, w wo) {
			w.Evidence = func(e *attest.Evidence) { e.EventLog = attest.EventLogDigest([]byte("other log")) }
		}, bend: func(_ *testing.T, _ wo, _ de, _ bi, o op) { o.EventLog = []byte("log") }, check: "event_log.replay", want: attest.ErrEventLogOther},
	} {
		t.Run(name, func(t *testing.T) {
			w := forge.NewWorld(t)
			if a.world != nil {
				a.world(t, w)
			}
			svid := w.Plain(t)
			d, b, o := w.Detach(t, svid), w.DetachedBinding(svid), w.Options()
			o.Signatures = attest.NewSignatures()
			if a.bend != nil {
				_, _, _ = attest.VerifyDetached(d, b, o) // the memory has seen the good ones
				a.bend(t, w, d, &b, &o)
			}
			if a.sign {
				forge.SignDetached(t, d, b.SVID, w.SVIDKey)
			}
			v, report, err := attest.VerifyDetached(d, b, o)
			mustFail(t, v, report, err, a.check)
			if !errors.Is(err, a.want) {
				t.Errorf("got %v; want %v", err, a.want)
			}
		})
	}
}

func TestRefusesNoDetachedRecord(t *testing.T) {
	w := forge.NewWorld(t)
	v, report, err := attest.VerifyDetached(nil, w.DetachedBinding(w.Plain(t)), w.Options())
	mustFail(t, v, report, err, "options")
}

// Each kind has rules of its own: neither passes for the other.
func TestRefusesDetachedEvidenceInsideAnSVID(t *testing.T) {
	w := forge.NewWorld(t)
	d := w.Detach(t, w.Plain(t))
	v, report, err := attest.Verify(d.Evidence, w.Binding(), w.Options())
	mustFail(t, v, report, err, "evidence.kind")
	if !errors.Is(err, attest.ErrKind) {
		t.Errorf("got %v", err)
	}
}

// Leaf evidence too is void after a reboot, once CAs say in which boot they saw
// the TPM; certificates from before that are judged as they were.
func TestRefusesLeafEvidenceOfAnotherBoot(t *testing.T) {
	w := forge.NewWorld(t)
	w.Statement = func(s *attest.AKStatement) { s.Boot.Reset-- }
	v, report, err := attest.Verify(w.Make(t), w.Binding(), w.Options())
	mustFail(t, v, report, err, "quote.boot")
	var boot *attest.BootError
	if !errors.As(err, &boot) || boot.Quoted.Reset != boot.Certified.Reset+1 || !errors.Is(err, attest.ErrBoot) {
		t.Errorf("got %v", err)
	}
	w.Statement = func(s *attest.AKStatement) { s.Boot = nil }
	if _, _, err := attest.Verify(w.Make(t), w.Binding(), w.Options()); err != nil {
		t.Errorf("an older AK certificate: %v", err)
	}
}

// Neither is an SVID of ours, whose signature could be checked here.
func TestRefusesDetachedRecordOfAnotherKindOfKey(t *testing.T) {
	p224, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	ed, _, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for name, key := range map[string]crypto.PublicKey{"P-224": p224.Public(), "Ed25519": ed} {
		w := forge.NewWorld(t)
		plain := w.Plain(t)
		d := w.Detach(t, plain)
		b := w.DetachedBinding(forge.Sign(t, plain, w.Authority, key, w.AuthorityKey()))
		if k, ok := key.(*ecdsa.PublicKey); ok && k.Curve == elliptic.P224() {
			forge.SignDetached(t, d, b.SVID, p224)
		}
		v, report, err := attest.VerifyDetached(d, b, w.Options())
		mustFail(t, v, report, err, "detached.signature")
		if !errors.Is(err, attest.ErrDetachedSignature) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
