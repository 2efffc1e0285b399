package attest_test

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"encoding/binary"
	"encoding/hex"
	"encoding/pem"
	"flag"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/rootlink/rootlink/internal/forge"
	"github.com/rootlink/rootlink/pkg/attest"
)

var newVector = flag.Bool("new-vector", false, "make a new worked vector for docs/evidence.md")

const docFile = "../../docs/evidence.md"

// lpOf is written again here, so that the page is judged by a second hand.
func lpOf(s string) []byte {
	return append(binary.BigEndian.AppendUint32(nil, uint32(len(s))), s...)
}

func vectorCert(t *testing.T, name string) *x509.Certificate {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("testdata", "vector", name))
	if err != nil {
		t.Fatal(err)
	}
	p, _ := pem.Decode(b)
	if p == nil {
		t.Fatalf("%s holds no PEM", name)
	}
	c, err := x509.ParseCertificate(p.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func makeVector(t *testing.T) {
	w := forge.NewWorld(t)
	w.Selection = []attest.PCRSelection{{Bank: "sha256", Indices: []uint32{0, 2, 4, 7}}}
	w.Leaf.Salt = [16]byte([]byte("salt of 16 bytes"))
	w.Evidence = func(e *attest.Evidence) { e.EKChain = e.EKChain[:1] }
	svid := w.Issue(t, w.Make(t))
	for name, c := range map[string]*x509.Certificate{
		"svid.pem": svid, "authority.pem": w.Authority, "attestation-ca.pem": w.CA.Cert,
		"maker-root.pem": w.Maker.Root, "maker-intermediate.pem": w.Maker.Intermediate,
	} {
		b := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})
		if err := os.WriteFile(filepath.Join("testdata", "vector", name), b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// TestWorkedVector recomputes each value of docs/evidence.md from the SVID.
func TestWorkedVector(t *testing.T) {
	if *newVector {
		makeVector(t)
	}
	svid := vectorCert(t, "svid.pem")
	e, err := attest.FromCertificate(svid)
	if err != nil {
		t.Fatal(err)
	}
	svidKey := forge.KeyHash(t, svid.PublicKey)
	const td, id, agent = "example.org", "spiffe://example.org/build", "spiffe://example.org/spire/agent/tpmnode/00"
	leaf := e.Leaf(td, id, svidKey)

	var selectors []byte
	for _, s := range e.Selectors {
		selectors = append(selectors, lpOf(s)...)
	}
	selHash := attest.SelectorsHash(e.Selectors)
	preimage := bytes.Join([][]byte{
		{0},
		[]byte("rootlink/leaf/v1\x00"),
		{byte(e.Kind), byte(e.KeyOrigin)},
		lpOf(td), lpOf(id),
		svidKey[:], e.AgentKey[:], e.Executable[:], e.Recorder[:], e.Tool[:], e.Payload[:], selHash[:], e.Nonce[:], e.Salt[:],
	}, nil)
	leafHash, err := leaf.Hash()
	if err != nil {
		t.Fatal(err)
	}
	if leafHash != sha(preimage) {
		t.Error("the leaf hash is not that of the preimage as the page writes it")
	}
	root, err := attest.RootFromPath(leafHash, e.Index, e.Size, e.Path)
	if err != nil {
		t.Fatal(err)
	}
	ak, err := x509.ParseCertificate(e.AKCert)
	if err != nil {
		t.Fatal(err)
	}
	s, err := attest.ParseAKCertificate(ak)
	if err != nil {
		t.Fatal(err)
	}
	extra := attest.QuoteExtraData(e.Size, root, s.AKName)
	if extra != sha([]byte("rootlink/quote/v1\x00"), binary.BigEndian.AppendUint64(nil, e.Size), root[:], s.AKName) {
		t.Error("extraData is not what the page writes")
	}
	node := attest.NodeExtraData(e.Nonce, s.AKName, td, [32]byte{})
	if node != sha([]byte("rootlink/attest/v1\x00"), lpOf(string(e.Nonce[:])), lpOf(string(s.AKName)), lpOf(td), make([]byte, 32)) {
		t.Error("node extraData is not what the page writes")
	}
	if want := attest.NewNonceMaker([32]byte(bytes.Repeat([]byte{1}, 32))).Make(agent, attest.NonceTime(e.Nonce)); e.Nonce != want {
		t.Errorf("nonce %x, want %x", e.Nonce, want)
	}
	record, err := e.MarshalRecord()
	if err != nil {
		t.Fatal(err)
	}
	var path []byte
	for _, h := range e.Path {
		path = append(path, h[:]...)
	}
	ext := func(id ...int) []byte {
		for _, x := range ak.Extensions {
			if x.Id.Equal(asn1.ObjectIdentifier(id)) {
				return x.Value
			}
		}
		t.Fatalf("no extension %v", id)
		return nil
	}
	checkDoc(t, map[string][]byte{
		"selectors": selectors, "selectors-sha256": selHash[:], "leaf-preimage": preimage, "leaf-hash": leafHash[:],
		"path": path, "root": root[:], "extra-data": extra[:], "nonce": e.Nonce[:], "node-extra-data": node[:],
		"ak-san": ext(2, 5, 29, 17), "ak-statement": ext(1, 3, 6, 1, 5, 5, 7, 1, 35), "record": record,
	})

	payload := e.Payload
	_, report, err := attest.Verify(e, attest.Binding{
		TrustDomain: td, SPIFFEID: id, SVIDKey: svidKey, Payload: &payload, SVIDNotBefore: svid.NotBefore, At: svid.NotBefore.Add(time.Minute),
	}, attest.Options{
		AttestationCAs: []*x509.Certificate{vectorCert(t, "attestation-ca.pem")},
		EK: attest.EKRoots{
			Roots:         []*x509.Certificate{vectorCert(t, "maker-root.pem")},
			Intermediates: []*x509.Certificate{vectorCert(t, "maker-intermediate.pem")},
		},
		RequiredPCRs: []attest.PCRSelection{{Bank: "sha256", Indices: []uint32{0, 2, 4, 7}}},
	})
	if err != nil {
		t.Error(err)
	}
	if err := svid.CheckSignatureFrom(vectorCert(t, "authority.pem")); err != nil {
		t.Error(err)
	}
	checkDocChecks(t, report)
}

func docBlocks() *regexp.Regexp { return regexp.MustCompile("(?s)```hex ([a-z0-9-]+)\n(.*?)```") }

// checkDoc compares the page's hex blocks with values; with -new-vector it
// writes them.
func checkDoc(t *testing.T, values map[string][]byte) {
	t.Helper()
	doc, err := os.ReadFile(docFile)
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	out := docBlocks().ReplaceAllStringFunc(string(doc), func(block string) string {
		m := docBlocks().FindStringSubmatch(block)
		want, ok := values[m[1]]
		if !ok || seen[m[1]] {
			t.Errorf("the page has a block %q that nothing computes, or twice", m[1])
			return block
		}
		seen[m[1]] = true
		got, err := hex.DecodeString(strings.Join(strings.Fields(m[2]), ""))
		if !*newVector && (err != nil || !bytes.Equal(got, want)) {
			t.Errorf("block %s: the page says\n%x, it is\n%x", m[1], got, want)
		}
		var b strings.Builder
		for i := 0; i < len(want); i += 64 {
			b.WriteString(hex.EncodeToString(want[i:min(i+64, len(want))]) + "\n")
		}
		return "```hex " + m[1] + "\n" + b.String() + "```"
	})
	for name := range values {
		if !seen[name] {
			t.Errorf("the page lacks a block %q", name)
		}
	}
	if *newVector {
		if err := os.WriteFile(docFile, []byte(out), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// checkDocChecks compares the page's list of checks with the verifier's own.
func checkDocChecks(t *testing.T, report []attest.Check) {
	t.Helper()
	doc, err := os.ReadFile(docFile)
	if err != nil {
		t.Fatal(err)
	}
	rows := regexp.MustCompile(`(?m)^\| (\d+) \| ([a-z_.]+) \|`).FindAllStringSubmatch(string(doc), -1)
	if len(rows) != len(report) {
		t.Fatalf("the page lists %d checks, the verifier %d", len(rows), len(report))
	}
	for i, c := range report {
		if rows[i][2] != c.ID {
			t.Errorf("check %d is %s, the page says %s", i+1, c.ID, rows[i][2])
		}
		if n, ok := strings.CutPrefix(c.Clause, "evidence.md, Verification "); ok && n != rows[i][1] {
			t.Errorf("%s cites %q but is number %s", c.ID, c.Clause, rows[i][1])
		} else if h, ok := strings.CutPrefix(c.Clause, "evidence.md, "); ok && n == c.Clause && !strings.Contains(string(doc), "\n## "+h+"\n") {
			t.Errorf("%s cites %q, which the page lacks", c.ID, c.Clause)
		}
	}
}

func sha(parts ...[]byte) [32]byte { return sha256.Sum256(bytes.Join(parts, nil)) }
