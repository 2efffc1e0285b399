package forge

import (
	"crypto/sha256"
	"crypto/x509"
	"testing"

	"github.com/rootlink/rootlink/pkg/attest"
)

// MakeParent has the world's TPM attest to a server at w.Now as a stock agent's
// does, whose key its plugin never knows. w.Attest and w.AKCert bend it.
func (w *World) MakeParent(tb testing.TB) *attest.Parent {
	tb.Helper()
	p := &attest.Parent{Nonce: sha256.Sum256([]byte("a server's nonce")), AttestedAt: w.Now, EKChain: w.TPM.EKChain}
	extra := attest.NodeExtraData(p.Nonce, w.TPM.AKName, w.Leaf.TrustDomain, p.AgentKey)
	p.Attest, p.Signature, p.PCRs = w.TPM.Quote(tb, extra[:], w.Selection, w.Attest)
	s := Statement(w.TPM, w.Maker.Root)
	p.AKCert = w.CA.Certify(tb, s, w.TPM.AKKey(), w.Now, w.AKCert).Raw
	return p
}

// IssueParent signs a workload SVID with p inside.
func (w *World) IssueParent(tb testing.TB, p *attest.Parent) *x509.Certificate {
	tb.Helper()
	x, err := p.Extension()
	if err != nil {
		tb.Fatal(err)
	}
	bend := w.SVID
	w.SVID = func(c *x509.Certificate) {
		c.ExtraExtensions = append(c.ExtraExtensions, x)
		if bend != nil {
			bend(c)
		}
	}
	defer func() { w.SVID = bend }()
	return w.Plain(tb)
}

// ParentBinding is what an offline verifier knows about an SVID from IssueParent.
func (w *World) ParentBinding() attest.ParentBinding {
	return attest.ParentBinding{TrustDomain: w.Leaf.TrustDomain, SVIDNotBefore: w.Now.Add(-attest.NonceBackdate), At: w.Now}
}
