package layout

import (
	"crypto/x509"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/in-toto/in-toto-golang/in_toto"

	"github.com/rootlink/rootlink/internal/forge"
	"github.com/rootlink/rootlink/pkg/link"
)

func classicStatement() *link.Statement {
	code := 0
	return &link.Statement{
		Step: "build", Command: []string{"cc", "-o", "a<b>", "a.c"}, Byproducts: link.Byproducts{ExitCode: &code},
		Environment: link.Environment{BuildID: "7"},
		Subjects:    []link.Resource{{Name: "a<b>", Digest: map[string]string{"sha256": strings.Repeat("ab", 32)}}},
		Materials:   []link.Resource{{Name: "a.c", Digest: map[string]string{"sha256": strings.Repeat("cd", 32)}}},
	}
}

// in-toto's own library reads the link, finds the certificate's key under the
// key ID and verifies the signature.
func TestClassicLinkIsInTotos(t *testing.T) {
	w := forge.NewWorld(t)
	c, err := PrepareClassic(classicStatement())
	if err != nil {
		t.Fatal(err)
	}
	w.Leaf.Payload = c.Digest()
	raw, err := c.Sign(w.SVIDKey, w.Issue(t, w.Make(t)))
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "build.link")
	if err := os.WriteFile(file, raw, 0o600); err != nil {
		t.Fatal(err)
	}
	md, err := in_toto.LoadMetadata(file)
	if err != nil {
		t.Fatal(err)
	}
	key, err := md.Sigs()[0].GetCertificate()
	if err != nil {
		t.Fatal(err)
	}
	if err := md.VerifySignature(key); err != nil {
		t.Error(err)
	}
	l, ok := md.GetPayload().(in_toto.Link)
	if !ok || l.Name != "build" || l.Products["a<b>"]["sha256"] != strings.Repeat("ab", 32) {
		t.Errorf("%+v", md.GetPayload())
	}
	block, _, _, err := parseClassic(raw)
	if err != nil || block.Environment["build_id"] != "7" {
		t.Errorf("our own reader: %v", err)
	}
}

func TestRefusesToSignAnotherClassicLink(t *testing.T) {
	w := forge.NewWorld(t)
	c, err := PrepareClassic(classicStatement())
	if err != nil {
		t.Fatal(err)
	}
	p, err := link.Prepare(classicStatement())
	if err != nil {
		t.Fatal(err)
	}
	// Evidence over the same step in the other form is for that form.
	w.Leaf.Payload = p.Digest()
	if _, err := c.Sign(w.SVIDKey, w.Issue(t, w.Make(t))); !errors.Is(err, link.ErrSignerMismatch) {
		t.Errorf("evidence for the bundle: %v", err)
	}
	w.Leaf.Payload = c.Digest()
	leaf := w.Issue(t, w.Make(t))
	if _, err := c.Sign(forge.P256(t), leaf); !errors.Is(err, link.ErrSignerMismatch) {
		t.Errorf("another key: %v", err)
	}
	if _, err := c.Sign(w.SVIDKey, &x509.Certificate{PublicKey: w.SVIDKey.Public()}); !errors.Is(err, link.ErrSignerMismatch) {
		t.Errorf("no evidence: %v", err)
	}
}
