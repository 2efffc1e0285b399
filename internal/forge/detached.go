package forge

import (
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"net/url"
	"testing"
	"time"

	"github.com/rootlink/rootlink/pkg/attest"
)

// A SPIRE server of somebody else: it puts no evidence into SVIDs, nor
// codeSigning, and a node speaks for them beside the link.

// Plain signs an SVID as such a server does: an hour, serverAuth and clientAuth.
func (w *World) Plain(tb testing.TB) *x509.Certificate {
	tb.Helper()
	bend := w.SVID
	w.SVID = func(c *x509.Certificate) {
		c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
		c.NotAfter = w.Now.Add(time.Hour)
		if bend != nil {
			bend(c)
		}
	}
	defer func() { w.SVID = bend }()
	return w.Issue(tb, nil)
}

// AgentOf signs the SVID of the agent that its server attested as TPM t, for
// w.AgentKey.
func (w *World) AgentOf(tb testing.TB, t *TPM) *x509.Certificate {
	tb.Helper()
	return w.agentSVID(tb, t, w.Authority, w.authorityKey)
}

// AgentBy is AgentOf by another authority.
func (w *World) AgentBy(tb testing.TB, t *TPM, authority *x509.Certificate, key *ecdsa.PrivateKey) *x509.Certificate {
	tb.Helper()
	return w.agentSVID(tb, t, authority, key)
}

func (w *World) agentSVID(tb testing.TB, t *TPM, authority *x509.Certificate, key *ecdsa.PrivateKey) *x509.Certificate {
	tb.Helper()
	id := &url.URL{Scheme: "spiffe", Host: w.Leaf.TrustDomain, Path: attest.AgentPath + hex.EncodeToString(t.EKHash[:])}
	c := &x509.Certificate{
		URIs: []*url.URL{id}, KeyUsage: x509.KeyUsageDigitalSignature, BasicConstraintsValid: true,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		NotBefore:   w.Now.Add(-time.Minute), NotAfter: w.Now.Add(59 * time.Minute),
	}
	if w.AgentSVID != nil {
		w.AgentSVID(c)
	}
	return Sign(tb, c, authority, w.AgentKey.Public(), key)
}

// Detach has the node vouch for an SVID and w.Leaf.Payload, and the SVID's key
// sign what it says.
func (w *World) Detach(tb testing.TB, svid *x509.Certificate) *attest.Detached {
	tb.Helper()
	w.Leaf.Kind, w.Leaf.Nonce = attest.KindDetached, attest.DetachedNonce(svid.Raw)
	d := &attest.Detached{Evidence: w.Make(tb), AgentSVID: [][]byte{w.AgentOf(tb, w.TPM).Raw}}
	SignDetached(tb, d, svid, w.SVIDKey)
	return d
}

// SignDetached signs d for an SVID, or with a key that is not the SVID's.
func SignDetached(tb testing.TB, d *attest.Detached, svid *x509.Certificate, key *ecdsa.PrivateKey) {
	tb.Helper()
	d.Signature, d.Token = nil, nil
	input, err := d.SigningInput(svid.Raw)
	if err != nil {
		tb.Fatal(err)
	}
	digest := sha256.Sum256(input)
	if d.Signature, err = ecdsa.SignASN1(rand.Reader, key, digest[:]); err != nil {
		tb.Fatal(err)
	}
}

// DetachedBinding is what an offline verifier knows about an SVID from Plain.
func (w *World) DetachedBinding(svid *x509.Certificate) attest.DetachedBinding {
	return attest.DetachedBinding{
		TrustDomain: w.Leaf.TrustDomain, SPIFFEID: w.Leaf.SPIFFEID, SVID: svid, Payload: w.Leaf.Payload,
		Authorities: []attest.Authority{{Certificate: w.Authority, From: w.Authority.NotBefore}},
		At:          w.Now.Add(time.Second),
	}
}
