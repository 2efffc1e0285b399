package server

import (
	"crypto/x509"
	"testing"

	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"

	"github.com/rootlink/rootlink/pkg/attest"
)

// The whole way: a TPM becomes a node, the node gets an entry through an
// alias, and one statement is signed for.
func TestFromTPMToSVID(t *testing.T) {
	w := newWorld(t, withLog)
	n := w.attest(w.newTPM(), attestOptions{})
	server := "spiffe://" + td + "/spire/server"
	w.create(entry(server, "/builders", "tpmnode:ek_basis:maker"))
	id := w.create(entry("spiffe://"+td+"/builders", "/build", stepSelectorsOf("go")...))

	got, err := entryv1.NewEntryClient(n.conn).GetAuthorizedEntries(t.Context(), &entryv1.GetAuthorizedEntriesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if len(got.Entries) != 1 || got.Entries[0].Id != id {
		t.Fatalf("authorized entries: %v", got.Entries)
	}
	q := n.step("/build")
	cert, err := n.sign(id, n.csr(q))
	if err != nil {
		t.Fatal(err)
	}
	rec, err := attest.FromCertificate(cert)
	if err != nil {
		t.Fatal(err)
	}
	// The certificate alone must convince a verifier that has no server.
	payload := q.leaf.Payload
	pool := x509.NewCertPool()
	for _, a := range bundleOf(t, n.conn).X509Authorities {
		c, err := x509.ParseCertificate(a.Asn1)
		if err != nil {
			t.Fatal(err)
		}
		pool.AddCert(c)
	}
	if _, err := cert.Verify(x509.VerifyOptions{Roots: pool, CurrentTime: w.clock.Now(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageCodeSigning}}); err != nil {
		t.Fatal(err)
	}
	if _, _, err := attest.Verify(rec, attest.Binding{
		TrustDomain: td, SPIFFEID: cert.URIs[0].String(), SVIDKey: q.leaf.SVIDKey, Payload: &payload,
		SVIDNotBefore: cert.NotBefore, At: w.clock.Now(),
	}, attest.Options{AttestationCAs: w.srv.AttestationCAs(), EK: w.maker.EKRoots(), RequiredPCRs: q.selection}); err != nil {
		t.Fatal(err)
	}
}
