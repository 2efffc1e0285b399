package attest_test

import (
	"crypto/x509"
	"encoding/hex"
	"errors"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"

	"github.com/rootlink/rootlink/internal/forge"
	"github.com/rootlink/rootlink/pkg/attest"
)

func TestVerifyParent(t *testing.T) {
	for _, ek := range []string{forge.EKP256, forge.EKRSA2048} {
		m := forge.NewMaker(t, "Forge Semiconductor")
		w := forge.NewWorldWith(t, m, forge.NewTPM(t, m, forge.TPMOptions{EK: ek}))
		p, err := attest.ParentFromCertificate(w.IssueParent(t, w.MakeParent(t)))
		if err != nil {
			t.Fatal(err)
		}
		v, report, err := attest.VerifyParent(p, w.ParentBinding(), w.Options())
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range report {
			if c.Outcome == attest.Failed || c.Clause == "" || (c.Outcome == attest.NotRun && c.Detail == "") {
				t.Errorf("%+v", c)
			}
		}
		if v.EK().Hash != w.TPM.EKHash || !v.AttestedAt().Equal(w.Now) || v.Quote().ResetCount != w.TPM.ResetCount ||
			v.AgentKey() != [32]byte{} || len(v.PCRs()) != 1 || !v.Until().After(w.Now) {
			t.Errorf("verified evidence says %+v", v)
		}
	}
}

// An SVID with parent evidence has no leaf evidence to show, and the other way round.
func TestRefusesParentSVIDAsLeafEvidence(t *testing.T) {
	w := forge.NewWorld(t)
	if _, err := attest.FromCertificate(w.IssueParent(t, w.MakeParent(t))); !errors.Is(err, attest.ErrRecord) {
		t.Errorf("parent read as leaf: %v", err)
	}
	if _, err := attest.ParentFromCertificate(w.Issue(t, w.Make(t))); !errors.Is(err, attest.ErrRecord) {
		t.Errorf("leaf read as parent: %v", err)
	}
}

func TestRefusesBadParents(t *testing.T) {
	type scene struct {
		w *forge.World
		p *attest.Parent
		b attest.ParentBinding
		o attest.Options
	}
	other := forge.NewWorld(t)
	for name, tt := range map[string]struct {
		bend  func(*scene)
		check string
		err   error
	}{
		"no evidence":         {func(s *scene) { s.p = nil }, "options", attest.ErrOptions},
		"no trust domain":     {func(s *scene) { s.b.TrustDomain = "" }, "options", attest.ErrOptions},
		"no time":             {func(s *scene) { s.b.At = time.Time{} }, "options", attest.ErrOptions},
		"no attestation CA":   {func(s *scene) { s.o.AttestationCAs = nil }, "options", attest.ErrOptions},
		"no EK roots":         {func(s *scene) { s.o.EK = attest.EKRoots{} }, "options", attest.ErrOptions},
		"no PCRs required":    {func(s *scene) { s.o.RequiredPCRs = nil }, "options", attest.ErrOptions},
		"another CA's AK":     {func(s *scene) { s.o.AttestationCAs = []*x509.Certificate{other.CA.Cert} }, "ak_cert.signature", attest.ErrAKCertIssuer},
		"another maker's EK":  {func(s *scene) { s.o.EK = other.Maker.EKRoots() }, "ek.genuine", nil},
		"EK of another TPM":   {func(s *scene) { s.p.EKChain = forge.NewTPM(t, s.w.Maker, forge.TPMOptions{}).EKChain }, "ek.identity", attest.ErrWrongEK},
		"another node's":      {func(s *scene) { s.b.EKHash = &other.TPM.EKHash }, "ek.identity", attest.ErrWrongEK},
		"another TPM's quote": {func(s *scene) { q := other.MakeParent(t); s.p.Attest, s.p.Signature = q.Attest, q.Signature }, "quote.signature", attest.ErrQuoteSignature},
		"a leaf's quote": {func(s *scene) {
			e := s.w.Make(t)
			s.p.Attest, s.p.Signature, s.p.PCRs = e.Attest, e.Signature, e.PCRs
		}, "parent.commitment", attest.ErrQuoteExtraData},
		"changed PCR":        {func(s *scene) { s.p.PCRs[0].Values[7] = make([]byte, 32); s.p.PCRs[0].Values[7][0] = 9 }, "quote.pcr_digest", attest.ErrQuoteValues},
		"PCR not quoted":     {func(s *scene) { s.o.RequiredPCRs = []attest.PCRSelection{{Bank: "sha256", Indices: []uint32{17}}} }, "quote.selection", attest.ErrQuoteSelection},
		"wrong trust domain": {func(s *scene) { s.b.TrustDomain = "example.com" }, "parent.commitment", attest.ErrQuoteExtraData},
		"wrong nonce":        {func(s *scene) { s.p.Nonce[0] ^= 1 }, "parent.commitment", attest.ErrQuoteExtraData},
		"wrong agent key":    {func(s *scene) { s.p.AgentKey[0] = 1 }, "parent.commitment", attest.ErrQuoteExtraData},
		"reset since certified": {func(s *scene) {
			s.w.TPM.Reboot(true)
			q := s.w.MakeParent(t)
			s.p.Attest, s.p.Signature, s.p.PCRs = q.Attest, q.Signature, q.PCRs
		}, "quote.boot", attest.ErrBoot},
		"attested after the SVID began": {func(s *scene) { s.b.SVIDNotBefore = s.w.Now.Add(-time.Minute) }, "parent.time", attest.ErrTime},
		"signed before the SVID began":  {func(s *scene) { s.b.At = s.b.SVIDNotBefore.Add(-time.Second) }, "parent.time", attest.ErrTime},
		"signed before the SVID began, after the node attested": {func(s *scene) {
			s.b.SVIDNotBefore = s.w.Now.Add(time.Minute)
			s.b.At = s.w.Now.Add(time.Minute - time.Second)
		}, "parent.time", attest.ErrTime},
		"signed before the node attested, in the backdated SVID": {func(s *scene) { s.b.At = s.w.Now.Add(-time.Second) }, "parent.time", attest.ErrTime},
		// The AK certificate began a minute before the attestation and lives a day.
		"signed after the AK certificate": {func(s *scene) { s.b.At = s.w.Now.Add(24 * time.Hour) }, "parent.time", attest.ErrAKCertTime},
		"stale": {func(s *scene) {
			s.b.SVIDNotBefore = s.w.Now.Add(24*time.Hour + time.Second)
			s.b.At = s.b.SVIDNotBefore
		}, "parent.time", attest.ErrParentAge},
		"stale at the server":        {func(s *scene) { s.b.SVIDNotBefore, s.b.At = time.Time{}, s.w.Now.Add(25*time.Hour) }, "parent.time", attest.ErrParentAge},
		"old quote under a new time": {func(s *scene) { s.p.AttestedAt = s.w.Now.Add(24 * time.Hour) }, "ak_cert.time", attest.ErrAKCertTime},
		"AK revoked": {func(s *scene) {
			s.o.Revoked = revoke(attest.RevokedAK, hex.EncodeToString(s.w.TPM.AKName), s.b.At)
		}, "ak_cert.revocation", attest.ErrRevoked},
		"EK revoked": {func(s *scene) {
			s.o.Revoked = revoke(attest.RevokedEK, hex.EncodeToString(s.w.TPM.EKHash[:]), s.b.At)
		}, "ek.revocation", attest.ErrRevoked},
	} {
		t.Run(name, func(t *testing.T) {
			w := forge.NewWorld(t)
			s := &scene{w, w.MakeParent(t), w.ParentBinding(), w.Options()}
			tt.bend(s)
			v, report, err := attest.VerifyParent(s.p, s.b, s.o)
			if v != nil {
				t.Fatal("verified")
			}
			var c *attest.CheckError
			if !errors.As(err, &c) || c.ID != tt.check || tt.err != nil && !errors.Is(err, tt.err) {
				t.Fatalf("got %v, want %s: %v", err, tt.check, tt.err)
			}
			failed := 0
			for _, line := range report {
				if line.Outcome == attest.Failed {
					failed++
				}
			}
			if failed != 1 || report[len(report)-1].Outcome != attest.NotRun {
				t.Errorf("report %+v", report)
			}
		})
	}
}

// What a quote of the same TPM cannot be: of another type, or unsafe to read.
func TestRefusesParentThatIsNoQuote(t *testing.T) {
	w := forge.NewWorld(t)
	w.Attest = func(a *tpm2.TPMSAttest) { a.Magic = 0 }
	_, _, err := attest.VerifyParent(w.MakeParent(t), w.ParentBinding(), w.Options())
	if !errors.Is(err, attest.ErrQuoteMagic) {
		t.Error(err)
	}
}
