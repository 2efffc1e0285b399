package forge

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"net/url"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"

	"github.com/rootlink/rootlink/pkg/attest"
)

// AttestationCA signs AK certificates.
type AttestationCA struct {
	Cert *x509.Certificate
	Key  *ecdsa.PrivateKey
}

// NewAttestationCA makes one.
func NewAttestationCA(tb testing.TB, bend func(*x509.Certificate)) *AttestationCA {
	tb.Helper()
	key := P256(tb)
	t := &x509.Certificate{
		Subject:  pkix.Name{CommonName: "forge attestation CA", SerialNumber: "1"},
		KeyUsage: x509.KeyUsageCertSign, IsCA: true, BasicConstraintsValid: true, MaxPathLenZero: true,
		NotBefore: Epoch().AddDate(0, -1, 0), NotAfter: Epoch().AddDate(5, 0, 0),
	}
	if bend != nil {
		bend(t)
	}
	return &AttestationCA{Cert: Sign(tb, t, nil, key.Public(), key), Key: key}
}

// Statement is what an attestation CA would say about t.
func Statement(t *TPM, root *x509.Certificate) attest.AKStatement {
	s := attest.AKStatement{
		EKHash: t.EKHash, EKBasis: attest.BasisAllowList, AKName: t.AKName,
		Manufacturer: "FRGE", Firmware: "1.2.3.4", Software: true,
		Boot: &attest.BootCounters{Reset: t.ResetCount, Restart: t.RestartCount},
	}
	if root != nil {
		s.EKBasis, s.EKRoot = attest.BasisMaker, sha256.Sum256(root.Raw)
	}
	return s
}

// Certify signs an AK certificate that begins a minute before now and lives for
// 24 hours. bend may change its template.
func (ca *AttestationCA) Certify(tb testing.TB, s attest.AKStatement, key crypto.PublicKey, now time.Time, bend func(*x509.Certificate)) *x509.Certificate {
	tb.Helper()
	nb := now.Add(-time.Minute)
	t, err := attest.AKTemplate(s, nb, nb.Add(attest.MaxAKCertLife))
	if err != nil {
		tb.Fatal(err)
	}
	if bend != nil {
		bend(t)
	}
	return Sign(tb, t, ca.Cert, key, ca.Key)
}

// AgentID is whom NewWorld's nonce is for.
const AgentID = "spiffe://example.org/spire/agent/tpmnode/00"

// Nonces makes the nonces of a World.
func Nonces() *attest.NonceMaker {
	return attest.NewNonceMaker([32]byte(bytes.Repeat([]byte{1}, 32)))
}

// World is one of everything: a maker, a TPM, an attestation CA, an SVID
// authority, an agent, and a workload about to sign a statement.
type World struct {
	Now       time.Time
	Maker     *Maker
	TPM       *TPM
	CA        *AttestationCA
	Authority *x509.Certificate
	SVIDKey   *ecdsa.PrivateKey
	AgentKey  *ecdsa.PrivateKey
	Selection []attest.PCRSelection // what is quoted
	Leaf      attest.Leaf           // what is committed to
	Others    int                   // other leaves under the same quote

	// Hooks to bend one thing.
	AKCert    func(*x509.Certificate)
	Statement func(*attest.AKStatement)
	Attest    func(*tpm2.TPMSAttest)
	Evidence  func(*attest.Evidence)
	SVID      func(*x509.Certificate)
	AgentSVID func(*x509.Certificate)

	authorityKey *ecdsa.PrivateKey
}

// NewWorld makes a world in which all is well.
func NewWorld(tb testing.TB) *World {
	tb.Helper()
	m := NewMaker(tb, "Forge Semiconductor")
	return NewWorldWith(tb, m, NewTPM(tb, m, TPMOptions{}))
}

// NewWorldWith makes a world around a TPM.
func NewWorldWith(tb testing.TB, m *Maker, t *TPM) *World {
	tb.Helper()
	w := &World{
		Now: Epoch(), Maker: m, TPM: t, CA: NewAttestationCA(tb, nil),
		SVIDKey: P256(tb), AgentKey: P256(tb), authorityKey: P256(tb), Others: 2,
		Selection: []attest.PCRSelection{{Bank: "sha256", Indices: []uint32{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}}},
	}
	td := &url.URL{Scheme: "spiffe", Host: "example.org"}
	w.Authority = Sign(tb, &x509.Certificate{
		Subject: pkix.Name{CommonName: "example.org", SerialNumber: "1"}, URIs: []*url.URL{td},
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, IsCA: true, BasicConstraintsValid: true,
		NotBefore: w.Now.AddDate(0, -1, 0), NotAfter: w.Now.AddDate(0, 11, 0),
	}, nil, w.authorityKey.Public(), w.authorityKey)

	exe, rec, tool := sha256.Sum256([]byte("rootlink")), sha256.Sum256([]byte("rootlink")), sha256.Sum256([]byte("go"))
	w.Leaf = attest.Leaf{
		Kind: attest.KindLeaf, KeyOrigin: attest.OriginCaller,
		TrustDomain: "example.org", SPIFFEID: "spiffe://example.org/build",
		SVIDKey: KeyHash(tb, w.SVIDKey.Public()), AgentKey: KeyHash(tb, w.AgentKey.Public()),
		Executable: exe, Recorder: rec, Tool: tool,
		Payload:   sha256.Sum256([]byte("the statement")),
		Selectors: []string{"binary:recorder:sha256:00", "binary:tool:sha256:01"},
		Nonce:     Nonces().Make(AgentID, w.Now),
	}
	if _, err := rand.Read(w.Leaf.Salt[:]); err != nil {
		tb.Fatal(err)
	}
	return w
}

// Make quotes the leaf among others and returns the evidence.
func (w *World) Make(tb testing.TB) *attest.Evidence {
	tb.Helper()
	h, err := w.Leaf.Hash()
	if err != nil {
		tb.Fatal(err)
	}
	return w.MakeHash(tb, h)
}

// MakeHash is Make for a leaf hash that is not that of w.Leaf.
func (w *World) MakeHash(tb testing.TB, h [32]byte) *attest.Evidence {
	tb.Helper()
	leaves := make([][32]byte, w.Others+1)
	for i := range leaves {
		leaves[i] = sha256.Sum256([]byte{byte(i), byte(i >> 8)})
	}
	index := uint64(w.Others / 2)
	leaves[index] = h
	tree, err := attest.NewTree(leaves)
	if err != nil {
		tb.Fatal(err)
	}
	x := attest.QuoteExtraData(tree.Size(), tree.Root(), w.TPM.AKName)
	att, sig, values := w.TPM.Quote(tb, x[:], w.Selection, w.Attest)
	s := Statement(w.TPM, w.Maker.Root)
	if w.Statement != nil {
		w.Statement(&s)
	}
	cert := w.CA.Certify(tb, s, w.TPM.AKKey(), w.Now, w.AKCert)
	e := &attest.Evidence{
		Attest: att, Signature: sig, AKCert: cert.Raw, EKChain: w.TPM.EKChain, PCRs: values,
		Kind: w.Leaf.Kind, KeyOrigin: w.Leaf.KeyOrigin, AgentKey: w.Leaf.AgentKey,
		Executable: w.Leaf.Executable, Recorder: w.Leaf.Recorder, Tool: w.Leaf.Tool, Payload: w.Leaf.Payload,
		Selectors: w.Leaf.Selectors, Nonce: w.Leaf.Nonce, Salt: w.Leaf.Salt,
		Index: index, Size: tree.Size(), Path: tree.Path(index),
	}
	if w.Evidence != nil {
		w.Evidence(e)
	}
	return e
}

// Issue signs an SVID with the evidence inside, none when e is nil.
func (w *World) Issue(tb testing.TB, e *attest.Evidence) *x509.Certificate {
	tb.Helper()
	id, err := url.Parse(w.Leaf.SPIFFEID)
	if err != nil {
		tb.Fatal(err)
	}
	t := &x509.Certificate{
		URIs: []*url.URL{id}, KeyUsage: x509.KeyUsageDigitalSignature, BasicConstraintsValid: true,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageCodeSigning},
		NotBefore:   w.Now.Add(-attest.NonceBackdate), NotAfter: w.Now.Add(10 * time.Minute),
	}
	if e != nil {
		x, err := e.Extension()
		if err != nil {
			tb.Fatal(err)
		}
		t.ExtraExtensions = []pkix.Extension{x}
	}
	if w.SVID != nil {
		w.SVID(t)
	}
	return Sign(tb, t, w.Authority, w.SVIDKey.Public(), w.authorityKey)
}

// AuthorityKey signs SVIDs.
func (w *World) AuthorityKey() *ecdsa.PrivateKey { return w.authorityKey }

// Binding is what an offline verifier knows about an SVID from Issue.
func (w *World) Binding() attest.Binding {
	payload := w.Leaf.Payload
	return attest.Binding{
		TrustDomain: w.Leaf.TrustDomain, SPIFFEID: w.Leaf.SPIFFEID, SVIDKey: w.Leaf.SVIDKey,
		Payload: &payload, SVIDNotBefore: w.Now.Add(-attest.NonceBackdate), At: w.Now.Add(time.Second),
	}
}

// Options trust this world's maker and attestation CA.
func (w *World) Options() attest.Options {
	return attest.Options{
		AttestationCAs: []*x509.Certificate{w.CA.Cert},
		EK:             w.Maker.EKRoots(),
		RequiredPCRs:   []attest.PCRSelection{{Bank: "sha256", Indices: []uint32{0, 2, 4, 7}}},
	}
}

// TrySign is Certify around Epoch for templates that may not even encode.
func TrySign(ca *AttestationCA, s attest.AKStatement, key crypto.PublicKey, bend func(*x509.Certificate)) ([]byte, error) {
	nb := Epoch().Add(-time.Minute)
	t, err := attest.AKTemplate(s, nb, nb.Add(attest.MaxAKCertLife))
	if err != nil {
		return nil, err
	}
	bend(t)
	return x509.CreateCertificate(rand.Reader, t, ca.Cert, key, ca.Key)
}
