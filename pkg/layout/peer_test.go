package layout

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/in-toto/in-toto-golang/in_toto"

	"github.com/rootlink/rootlink/internal/needs"
	"github.com/rootlink/rootlink/pkg/link"
)

// The peers judge what we write: in-toto-golang here as a library, Debian's
// in-toto 1.3 as the programs that its package installs.

func program(t *testing.T, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		needs.Missing(t, "%s is not installed: apt-get install in-toto", name)
	}
	return path
}

func newKey() (crypto.Signer, error) { return ecdsa.GenerateKey(elliptic.P256(), rand.Reader) }

// pinned exports the scene into a directory. The peers go by the real clock.
func pinned(t *testing.T, s *scene, key crypto.Signer) (dir string, p *Pinned) {
	t.Helper()
	s.layout.Expires = s.layout.Issued.AddDate(MaxLife, 0, 0) // the peers' clock is today's
	res := s.accepts(t)
	p, err := ExportPinned(s.in, res, key, newKey, time.Time{})
	if err != nil {
		t.Fatal(err)
	}
	dir = t.TempDir()
	for name, raw := range map[string][]byte{"root.layout": p.Layout, "key.json": p.Key, "key.pem": p.KeyPEM} {
		if err := os.WriteFile(filepath.Join(dir, name), raw, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for _, l := range p.Links {
		if err := os.WriteFile(filepath.Join(dir, l.Name), l.Raw, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir, p
}

func mustSign(t testing.TB, s *scene) []byte {
	t.Helper()
	raw, err := Sign(s.layout, s.form, s.keys...)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

func goVerify(t *testing.T, dir string) error {
	t.Helper()
	t.Chdir(dir) // it writes where it stands
	md, err := in_toto.LoadMetadata(filepath.Join(dir, "root.layout"))
	if err != nil {
		return err
	}
	var k in_toto.Key
	if err := k.LoadKeyDefaults(filepath.Join(dir, "key.pem")); err != nil {
		return err
	}
	_, err = in_toto.InTotoVerify(md, map[string]in_toto.Key{k.KeyID: k}, dir, "", nil, nil, false)
	return err
}

func pythonVerify(t *testing.T, dir, keyType string) error {
	t.Helper()
	cmd := exec.Command(program(t, "in-toto-verify"), "-l", "root.layout", "-k", "key.json", "-t", keyType)
	cmd.Dir = dir
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Logf("in-toto-verify: %s", out)
	}
	return err
}

func TestPeersAcceptThePinnedExport(t *testing.T) {
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	ec, err := newKey()
	if err != nil {
		t.Fatal(err)
	}
	for keyType, key := range map[string]crypto.Signer{"ecdsa": ec, "ed25519": ed} {
		t.Run(keyType, func(t *testing.T) {
			s := newScene(t)
			// dirHash digests must get through too.
			tree := link.Resource{Name: "dist", Digest: map[string]string{link.DirHashAlg: sum("a tree")}}
			s.links[0].stmt.Subjects = append(s.links[0].stmt.Subjects, tree)
			s.layout.Steps[0].Products = rules("CREATE src/*", "CREATE dist", "DISALLOW *")
			dir, _ := pinned(t, s, key)
			if err := goVerify(t, dir); err != nil {
				t.Errorf("in-toto-golang: %v", err)
			}
			if err := pythonVerify(t, dir, keyType); err != nil {
				t.Errorf("in-toto in Python: %v", err)
			}
			// And refuse what was changed since.
			links, err := filepath.Glob(filepath.Join(dir, "build.*.link"))
			if err != nil || len(links) != 2 {
				t.Fatal(links, err)
			}
			raw, err := os.ReadFile(links[0])
			if err != nil {
				t.Fatal(err)
			}
			raw = bytes.ReplaceAll(raw, []byte(sum("the program")), []byte(sum("a trojan")))
			if err := os.WriteFile(links[0], raw, 0o644); err != nil {
				t.Fatal(err)
			}
			if goVerify(t, dir) == nil || pythonVerify(t, dir, keyType) == nil {
				t.Error("a changed link passes with a peer")
			}
		})
	}
}

func TestRefusesToVouchForWhatWasRefused(t *testing.T) {
	s := newScene(t)
	s.in.Seen = map[string]Seen{"hello": {Serial: 8}}
	res, err := s.verify(t)
	if err == nil {
		t.Fatal("accepted")
	}
	key, _ := newKey()
	if _, err := ExportPinned(s.in, res, key, newKey, time.Time{}); err == nil {
		t.Error("exported")
	}
}

// What peers make of the layout itself, extension and all.
func TestPeersReadTheLayoutAndIgnoreItsExtension(t *testing.T) {
	for _, form := range []string{FormDSSE, FormMetablock} {
		s := newScene(t)
		s.form = form
		dir := t.TempDir()
		path := filepath.Join(dir, "hello.layout")
		if err := os.WriteFile(path, mustSign(t, s), 0o644); err != nil {
			t.Fatal(err)
		}
		key, err := NewKey(s.keys[0].Public())
		if err != nil {
			t.Fatal(err)
		}
		md, err := in_toto.LoadMetadata(path)
		if err != nil {
			t.Fatalf("in-toto-golang, %s: %v", form, err)
		}
		if err := md.VerifySignature(key); err != nil {
			t.Errorf("in-toto-golang, %s: %v", form, err)
		}
		l, ok := md.GetPayload().(in_toto.Layout)
		if !ok || len(l.Steps) != 2 {
			t.Fatalf("in-toto-golang, %s: %T", form, md.GetPayload())
		}
		// Where a constraint says all that we do it is there; where it cannot,
		// nobody is named, and the old tool refuses.
		if form == FormDSSE && (len(l.Steps[0].CertificateConstraints) != 1 || len(l.Steps[1].CertificateConstraints) != 0) {
			t.Errorf("constraints %+v", l.Steps)
		}
		if _, err := in_toto.InTotoVerify(md, map[string]in_toto.Key{key.KeyID: key}, dir, "", nil, nil, false); err == nil {
			t.Errorf("in-toto-golang, %s: verified without a link", form)
		}
		if form != FormMetablock {
			continue
		}
		var p Pinned
		if err := p.setKey(s.keys[0].Public()); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "key.json"), p.Key, 0o644); err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command(program(t, "in-toto-sign"), "--verify", "-f", path, "-k", "key.json", "-t", "ecdsa")
		cmd.Dir = dir
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("in-toto in Python does not verify the signature: %v\n%s", err, out)
		}
	}
}

// The reverse: links that in-toto-run wrote, for a step that allows them.
func TestLinksOfInTotoRunVerifyWhereTheLayoutAllowsIt(t *testing.T) {
	s := newScene(t)
	work := t.TempDir()
	if err := os.MkdirAll(filepath.Join(work, "src"), 0o755); err != nil {
		t.Fatal(err)
	}
	for n, c := range map[string]string{"src/main.go": "package main", "src/go.mod": "module hello"} {
		if err := os.WriteFile(filepath.Join(work, n), []byte(c), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	gen := exec.Command(program(t, "in-toto-keygen"), "-t", "ed25519", "functionary")
	gen.Dir = work
	if out, err := gen.CombinedOutput(); err != nil {
		t.Fatalf("in-toto-keygen: %v\n%s", err, out)
	}
	var public struct {
		KeyVal struct{ Public string }
	}
	if raw, err := os.ReadFile(filepath.Join(work, "functionary.pub")); err != nil || json.Unmarshal(raw, &public) != nil {
		t.Fatal(string(raw), err)
	}
	point, err := hex.DecodeString(public.KeyVal.Public)
	if err != nil {
		t.Fatal(err)
	}
	key, err := NewKey(ed25519.PublicKey(point))
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(program(t, "in-toto-run"), "-n", "build", "-m", "src", "-p", "hello", "-k", "functionary", "-t", "ed25519",
		"--", "/bin/sh", "-c", "printf 'the program' > hello")
	cmd.Dir = work
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("in-toto-run: %v\n%s", err, out)
	}
	name := filepath.Join(work, "build."+key.KeyID[:8]+".link")
	raw, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	build := s.build()
	*build = Step{
		Name: "build", Threshold: 1, PubKeys: []string{key.KeyID}, Demands: Demands{KeyPinned: true},
		Materials: build.Materials, Products: build.Products,
	}
	s.layout.Keys = map[string]in_toto.Key{key.KeyID: key}
	s.links = s.links[:1]
	s.in.Classic = []NamedFile{{name, raw}}
	if !IsClassic(raw) {
		t.Error("not known as a classic link")
	}
	res := s.accepts(t)
	if !res.Steps[1].Unproved || !strings.Contains(res.Text(), "no hardware evidence") {
		t.Errorf("the result does not say that nothing is proved: %s", res.Text())
	}
	if _, err := ExportPinned(s.in, res, s.keys[0], newKey, time.Time{}); err == nil {
		t.Error("links by pinned keys were signed anew")
	}

	// Changed.
	s.in.Classic[0].Raw = bytes.ReplaceAll(raw, []byte(sum("the program")), []byte(sum("a trojan")))
	s.refuses(t, "link.classic", link.ErrCrypto, link.ErrCrypto, "signed it")
	// By another key than the step's.
	other, err := NewKey(s.keys[0].Public())
	if err != nil {
		t.Fatal(err)
	}
	s.in.Classic[0].Raw = raw
	s.layout.Keys = map[string]in_toto.Key{other.KeyID: other}
	build.PubKeys = []string{other.KeyID}
	s.in.Layout = NamedFile{}
	s.refuses(t, "link.classic", link.ErrCrypto, link.ErrCrypto, "signed it")
	// For a step that does not say so.
	s = newScene(t)
	s.in.Classic = []NamedFile{{name, raw}}
	s.refuses(t, "link.classic", link.ErrCrypto, link.ErrCrypto, "no links by pinned keys")
}
