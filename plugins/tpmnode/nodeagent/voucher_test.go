package nodeagent_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"log/slog"
	"math/big"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	serverv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/server/nodeattestor/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"

	"github.com/rootlink/rootlink/internal/catalog"
	"github.com/rootlink/rootlink/internal/recorder"
	"github.com/rootlink/rootlink/pkg/attest"
	"github.com/rootlink/rootlink/plugins/tpmnode/nodeagent"
	"github.com/rootlink/rootlink/plugins/tpmnode/wire"
	workloadv1 "github.com/rootlink/rootlink/proto/rootlink/workload/v1"
)

func init() {
	if recorder.IsStub() {
		// As rootlink itself does: only here is this the main thread for
		// certain, which is the one that is traced.
		runtime.LockOSThread()
	}
}

func TestMain(m *testing.M) {
	if recorder.IsStub() {
		recorder.RunStub()
	}
	if mode := os.Getenv("ROOTLINK_TEST_ROLE"); mode != "" {
		os.Exit(role(mode))
	}
	os.Exit(m.Run())
}

// authority issues SVIDs of a trust domain.
type authority struct {
	t    testing.TB
	td   string
	cert *x509.Certificate
	key  crypto.Signer
}

func newAuthority(t testing.TB, td string) *authority {
	t.Helper()
	a := &authority{t: t, td: td}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: td},
		NotBefore: time.Now().Add(-48 * time.Hour), NotAfter: time.Now().Add(48 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
		URIs: []*url.URL{{Scheme: "spiffe", Host: td}},
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	a.key = key
	if a.cert, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	return a
}

// svid issues one that was valid from ago to in from now.
func (a *authority) svid(path string, ago, in time.Duration, curve elliptic.Curve) ([]byte, *ecdsa.PrivateKey) {
	a.t.Helper()
	key, err := ecdsa.GenerateKey(curve, rand.Reader)
	if err != nil {
		a.t.Fatal(err)
	}
	serial, _ := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: serial, NotBefore: time.Now().Add(-ago), NotAfter: time.Now().Add(in),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		URIs: []*url.URL{{Scheme: "spiffe", Host: a.td, Path: path}},
	}, a.cert, key.Public(), a.key)
	if err != nil {
		a.t.Fatal(err)
	}
	return der, key
}

func (a *authority) workload() []byte {
	der, _ := a.svid("/build", time.Minute, time.Hour, elliptic.P256())
	return der
}

// stockNode is the plugin as a SPIRE agent runs it, with what that agent writes
// to its data directory, and a recorder's connection to the quoter socket.
type stockNode struct {
	*world
	t      *testing.T
	ca     *authority
	data   string // of the SPIRE agent
	socket string
	own    string // data_dir of the plugin
	plugin *catalog.Plugin
	hcl    string
	log    *syncBuffer
	path   string // of the agent ID
}

type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

func newStockNode(t *testing.T, opts ...nodeagent.Option) *stockNode {
	t.Helper()
	n := &stockNode{world: newWorld(t, setup{}), t: t, ca: newAuthority(t, trustDomain), data: t.TempDir(), own: t.TempDir(), log: &syncBuffer{}}
	if err := os.Chmod(n.data, 0o700); err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "rl") // short: t.TempDir may be too long for sun_path
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	n.socket = filepath.Join(dir, "quoter.sock")
	n.hcl = fmt.Sprintf("tpm_path = %q\ndata_dir = %q\nquoter_socket = %q\nagent_data_dir = %q\nrecorder_group = \"none\"\n", n.sw.Device(), n.own, n.socket, n.data)
	n.plugin = n.load(opts...)
	if err := n.plugin.Configure(t.Context(), n.hcl); err != nil {
		t.Fatal(err)
	}
	if n.agent, err = n.plugin.AgentNodeAttestor(); err != nil {
		t.Fatal(err)
	}
	return n
}

// load is a plugin with what it serves as an external one.
func (n *stockNode) load(opts ...nodeagent.Option) *catalog.Plugin {
	n.t.Helper()
	plugin, services := nodeagent.New(opts...).ExternalServers()
	loaded, err := catalog.LoadBuiltIn(context.Background(), catalog.BuiltIn{Name: wire.PluginName, Plugin: plugin, Services: services},
		catalog.Options{TrustDomain: trustDomain, Log: slog.New(slog.NewTextHandler(n.log, nil))})
	if err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() {
		loaded.Close()
		if n.t.Failed() {
			n.t.Log(n.log.String())
		}
	})
	return loaded
}

// attested attests the node and saves the SVID that its server would give it.
func (n *stockNode) attested() *serverv1.AgentAttributes {
	n.t.Helper()
	attrs, err := n.attest(n.t.Context(), nil)
	if err != nil {
		n.t.Fatal(err)
	}
	n.path = strings.TrimPrefix(attrs.GetSpiffeId(), "spiffe://"+trustDomain)
	der, _ := n.ca.svid(n.path, time.Minute, time.Hour, elliptic.P256())
	n.save(der)
	return attrs
}

// save writes agent-data.json as SPIRE does, by rename.
func (n *stockNode) save(svid ...[]byte) {
	n.t.Helper()
	var chain [][]byte
	for _, der := range svid {
		chain = append(chain, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
	}
	b, err := json.Marshal(map[string]any{"svid": chain, "bundle": [][]byte{pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: n.ca.cert.Raw})}, "reattestable": true, "bootstrap_use": 0})
	if err != nil {
		n.t.Fatal(err)
	}
	n.write(b)
}

func (n *stockNode) write(b []byte) {
	n.t.Helper()
	path := filepath.Join(n.data, "agent-data.json")
	if err := os.WriteFile(path+".tmp", b, 0o600); err != nil {
		n.t.Fatal(err)
	}
	if err := os.Rename(path+".tmp", path); err != nil {
		n.t.Fatal(err)
	}
}

// client is one connection, whose calls carry the header.
type client struct {
	workloadv1.VoucherClient
	t   *testing.T
	ctx context.Context
}

func (n *stockNode) dial() *client {
	n.t.Helper()
	conn, err := grpc.NewClient("unix:"+n.socket, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithAuthority("localhost"))
	if err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() { conn.Close() })
	ctx, cancel := context.WithTimeout(n.t.Context(), time.Minute)
	n.t.Cleanup(cancel)
	return &client{workloadv1.NewVoucherClient(conn), n.t, metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", "true")}
}

// record runs a program as the tool of a step and measures it at its start.
func (c *client) record() *workloadv1.MeasureResponse {
	c.t.Helper()
	m, err := c.tryRecord()
	if err != nil {
		c.t.Fatal(err)
	}
	return m
}

func (c *client) tryRecord() (m *workloadv1.MeasureResponse, err error) {
	c.t.Helper()
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		c.t.Fatal(err)
	}
	defer null.Close()
	_, err = recorder.Run(recorder.Command{Path: program(c.t), Args: []string{"true"}, Env: os.Environ(), Stdin: null, Stdout: null, Stderr: null},
		func(*recorder.Exec) error {
			var err error
			m, err = c.Measure(c.ctx, &workloadv1.MeasureRequest{})
			return err
		})
	return m, err
}

func program(t *testing.T) string {
	t.Helper()
	p, err := exec.LookPath("true")
	if err == nil {
		p, err = filepath.EvalSymlinks(p)
	}
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func hashOf(t *testing.T, path string) [32]byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return sha256.Sum256(b)
}

var payload = sha256.Sum256([]byte("statement"))

func (c *client) vouch(svid ...[]byte) (*workloadv1.VouchResponse, error) {
	return c.Vouch(c.ctx, &workloadv1.VouchRequest{X509Svid: svid, PayloadSha256: payload[:]})
}

// TestVouches is the whole of it, judged by the verifier that trusts nothing but
// the CAs: attested, measured, vouched for, signed, verified.
func TestVouches(t *testing.T) {
	n := newStockNode(t)
	n.attested()
	c := n.dial()
	m := c.record()
	self, tool := hashOf(t, "/proc/self/exe"), hashOf(t, program(t))
	if m.GetTrustDomain() != trustDomain || m.GetSpiffeId() != "" || !bytes.Equal(m.GetMeasurement().GetTool(), tool[:]) ||
		!bytes.Equal(m.GetMeasurement().GetRecorder(), self[:]) || m.GetMeasurement().GetRecorderProtected() {
		t.Errorf("measured %v", m)
	}
	svid, key := n.ca.svid("/build", time.Minute, time.Hour, elliptic.P256())
	resp, err := c.vouch(svid)
	if err != nil {
		t.Fatal(err)
	}
	d := n.verify(resp.GetDetached(), svid, key)
	e := d.Evidence
	want := []string{"binary:recorder_unprotected:sha256:" + hex.EncodeToString(self[:]), "binary:sha256:" + hex.EncodeToString(self[:]), "binary:tool:sha256:" + hex.EncodeToString(tool[:])}
	for _, s := range want {
		if !slices.Contains(e.Selectors, s) {
			t.Errorf("selectors %v lack %s", e.Selectors, s)
		}
	}
	for _, s := range e.Selectors {
		if !strings.HasPrefix(s, "binary:") {
			t.Errorf("selector %s is not of what was measured", s)
		}
	}
	if e.KeyOrigin != attest.OriginAgent || e.Executable != self || e.Recorder != self || e.Tool != tool || e.Payload != payload {
		t.Errorf("evidence %+v", e)
	}
	// Again for the same statement: an answer may get lost.
	if _, err := c.vouch(svid); err != nil {
		t.Errorf("the same statement again: %v", err)
	}
}

// verify signs the record and has pkg/attest judge it.
func (n *stockNode) verify(b, svid []byte, key *ecdsa.PrivateKey) *attest.Detached {
	n.t.Helper()
	d, err := attest.ParseDetached(b)
	if err != nil {
		n.t.Fatal(err)
	}
	input, err := d.SigningInput(svid)
	if err != nil {
		n.t.Fatal(err)
	}
	digest := sha256.Sum256(input)
	if d.Signature, err = ecdsa.SignASN1(rand.Reader, key, digest[:]); err != nil {
		n.t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(svid)
	if err != nil {
		n.t.Fatal(err)
	}
	v, checks, err := attest.VerifyDetached(d, attest.DetachedBinding{
		TrustDomain: trustDomain, SPIFFEID: leaf.URIs[0].String(), SVID: leaf, Payload: payload,
		Authorities: []attest.Authority{{Certificate: n.ca.cert, From: n.ca.cert.NotBefore}}, At: time.Now(),
	}, attest.Options{
		AttestationCAs: n.attestationCA(), EK: attest.EKRoots{Roots: []*x509.Certificate{n.sw.Maker.Root}, Intermediates: []*x509.Certificate{n.sw.Maker.Intermediate}}, RequiredPCRs: attest.DefaultPCRs(),
	})
	if err != nil {
		for _, c := range checks {
			n.t.Logf("%+v", c)
		}
		n.t.Fatalf("the verifier says: %v", err)
	}
	if v == nil {
		n.t.Fatal("nothing verified")
	}
	return d
}

// attestationCA is what the AK certificate came with.
func (n *stockNode) attestationCA() (cas []*x509.Certificate) {
	n.t.Helper()
	b, err := os.ReadFile(filepath.Join(n.own, "ak-cert.pem"))
	if err != nil {
		n.t.Fatal(err)
	}
	_, b = pem.Decode(b) // the AK certificate itself
	for block, rest := pem.Decode(b); block != nil; block, rest = pem.Decode(rest) {
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			n.t.Fatal(err)
		}
		cas = append(cas, c)
	}
	return cas
}
