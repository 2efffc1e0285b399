package layout

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"fmt"

	"github.com/in-toto/in-toto-golang/in_toto"
	"github.com/secure-systems-lab/go-securesystemslib/cjson"

	"github.com/rootlink/rootlink/pkg/attest"
	"github.com/rootlink/rootlink/pkg/link"
)

// Classic is a step's record in in-toto's older form, the very one that will be
// signed: a Metablock with the signer's certificate. Its Digest, SHA-256 of the
// canonical JSON of the signed part, goes to the TPM first, as that of a
// link.Prepared does; Sign redeems it.
type Classic struct {
	signed in_toto.Link
	digest [32]byte
}

// PrepareClassic turns a statement into a classic link.
func PrepareClassic(s *link.Statement) (*Classic, error) {
	if err := s.Validate(); err != nil {
		return nil, err
	}
	c := &Classic{signed: in_toto.Link{
		Type: "link", Name: s.Step, Command: append([]string{}, s.Command...),
		Materials: classicHashes(s.Materials), Products: classicHashes(s.Subjects),
		ByProducts: map[string]any{}, Environment: map[string]any{},
	}}
	if code := s.Byproducts.ExitCode; code != nil {
		c.signed.ByProducts["return-value"] = *code
	}
	if id := s.Environment.BuildID; id != "" {
		c.signed.Environment["build_id"] = id
	}
	if dir := s.Environment.WorkDir; dir != "" {
		c.signed.Environment["workdir"] = dir
	}
	canonical, err := cjson.EncodeCanonical(c.signed)
	if err != nil {
		return nil, malformed("%w", err)
	}
	if len(canonical) > MaxClassic {
		return nil, malformed("link of %d bytes, at most %d allowed", len(canonical), MaxClassic)
	}
	c.digest = sha256.Sum256(canonical)
	return c, nil
}

func classicHashes(rs []link.Resource) map[string]in_toto.HashObj {
	out := make(map[string]in_toto.HashObj, len(rs))
	for _, r := range rs {
		out[r.Name] = r.Digest
	}
	return out
}

// Digest is what evidence commits to, and what the key signs.
func (c *Classic) Digest() [32]byte { return c.digest }

// Sign signs c with key, whose certificate is leaf, and returns the Metablock.
// The leaf must carry evidence that commits to exactly this link.
func (c *Classic) Sign(key crypto.Signer, leaf *x509.Certificate) ([]byte, error) {
	e, err := attest.FromCertificate(leaf)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", link.ErrSignerMismatch, err)
	}
	if e.Payload != c.digest {
		return nil, fmt.Errorf("%w: its evidence commits to another statement", link.ErrSignerMismatch)
	}
	return c.SignWithoutEvidence(key, leaf)
}

// SignDetached signs c and d, the evidence beside it, as link.Prepared does.
func (c *Classic) SignDetached(key crypto.Signer, leaf *x509.Certificate, d *attest.Detached) ([]byte, error) {
	if err := link.SignRecord(key, leaf, d, c.digest); err != nil {
		return nil, err
	}
	return c.SignWithoutEvidence(key, leaf)
}

// SignWithoutEvidence signs c and looks for no evidence.
func (c *Classic) SignWithoutEvidence(key crypto.Signer, leaf *x509.Certificate) ([]byte, error) {
	pub, ok := key.Public().(*ecdsa.PublicKey)
	if !ok || pub.Curve != elliptic.P256() || !pub.Equal(leaf.PublicKey) {
		return nil, fmt.Errorf("%w: it holds another key, or none of P-256", link.ErrSignerMismatch)
	}
	sig, err := key.Sign(rand.Reader, c.digest[:], crypto.SHA256)
	if err != nil {
		return nil, fmt.Errorf("signing: %w", err)
	}
	cert := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: leaf.Raw})
	var id in_toto.Key // in-toto's name of the key
	if err := id.LoadKeyReaderDefaults(bytes.NewReader(cert)); err != nil {
		return nil, fmt.Errorf("key ID: %w", err)
	}
	var out bytes.Buffer
	enc := json.NewEncoder(&out)
	enc.SetEscapeHTML(false)
	err = enc.Encode(in_toto.Metablock{
		Signed:     c.signed,
		Signatures: []in_toto.Signature{{KeyID: id.KeyID, Sig: hex.EncodeToString(sig), Certificate: string(cert)}},
	})
	return out.Bytes(), err
}
