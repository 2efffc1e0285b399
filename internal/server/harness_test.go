package server

import (
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"io"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/rootlink/rootlink/internal/forge"
	"github.com/rootlink/rootlink/pkg/attest"
	"github.com/rootlink/rootlink/plugins/tpmnode/wire"
	nodev1 "github.com/rootlink/rootlink/proto/rootlink/node/v1"
	tpmv1 "github.com/rootlink/rootlink/proto/rootlink/tpm/v1"
)

const td = "example.org"

// clock is a time that a test moves.
type clock struct {
	mu  sync.Mutex
	now time.Time // guarded by mu
}

func (c *clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *clock) add(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}

// world is a running server, a maker of TPMs that it trusts, and its admin.
type world struct {
	t     testing.TB
	dir   string
	cfg   Config
	clock *clock
	maker *forge.Maker
	srv   *Server
	stop  func() // ends Run and waits for it
	admin *grpc.ClientConn
}

// newWorld starts a server. It keeps no transparency log unless bend is withLog
// or sets it: logging what a new server has takes longer than most tests.
func newWorld(t testing.TB, bend func(*Config)) *world {
	t.Helper()
	// t.TempDir is too long a path for a socket in some tests.
	dir, err := os.MkdirTemp("", "rl")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	w := &world{t: t, dir: dir, clock: &clock{now: forge.Epoch()}, maker: forge.NewMaker(t, "Forge Semiconductor")}
	roots := filepath.Join(dir, "roots.pem")
	if err := os.WriteFile(roots, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: w.maker.Root.Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	w.cfg = Config{
		TrustDomain: td, DataDir: filepath.Join(dir, "data"), Listen: "127.0.0.1:0", EKRoots: []string{roots},
		AttestationRate: 1000, AttestationBurst: 1000, NoTransparencyLog: true, Now: w.clock.Now,
		Log: slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelWarn})),
	}
	if bend != nil {
		bend(&w.cfg)
	}
	w.start()
	return w
}

// withLog has a world's server log its certificates, as servers do.
func withLog(c *Config) { c.NoTransparencyLog = false }

// start starts the server on the data directory as it is.
func (w *world) start() {
	w.t.Helper()
	var err error
	if w.srv, err = New(w.t.Context(), w.cfg); err != nil {
		w.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- w.srv.Run(ctx) }()
	var once sync.Once
	w.stop = func() {
		once.Do(func() {
			cancel()
			if err := <-done; err != nil {
				w.t.Error(err)
			}
		})
	}
	w.t.Cleanup(w.stop)
	w.admin = dial(w.t, "unix:"+w.srv.AdminSocket(), insecure.NewCredentials())
}

func dial(t testing.TB, target string, creds credentials.TransportCredentials) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient(target, grpc.WithTransportCredentials(creds))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// dialTCP connects as somebody with cert, or without a certificate.
func (w *world) dialTCP(cert *tls.Certificate) *grpc.ClientConn {
	w.t.Helper()
	c := &tls.Config{
		InsecureSkipVerify: true, // verified below, by SPIFFE ID instead of name
		VerifyConnection: func(cs tls.ConnectionState) error {
			leaf := cs.PeerCertificates[0]
			pool := x509.NewCertPool()
			for _, a := range w.srv.authorities.set.Load().all {
				pool.AddCert(a.Certificate)
			}
			if _, err := leaf.Verify(x509.VerifyOptions{Roots: pool, CurrentTime: w.clock.Now()}); err != nil {
				return err
			}
			if got := leaf.URIs[0].String(); got != "spiffe://"+td+"/spire/server" {
				return errors.New("server is " + got)
			}
			return nil
		},
	}
	if cert != nil {
		c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return cert, nil }
	}
	return dial(w.t, w.srv.Addr().String(), credentials.NewTLS(c))
}

func (w *world) entries() entryv1.EntryClient { return entryv1.NewEntryClient(w.admin) }
func (w *world) agents() agentv1.AgentClient  { return agentv1.NewAgentClient(w.admin) }

// create creates one entry and returns its ID.
func (w *world) create(e *types.Entry) string {
	w.t.Helper()
	resp, err := w.entries().BatchCreateEntry(w.t.Context(), &entryv1.BatchCreateEntryRequest{Entries: []*types.Entry{e}})
	if err != nil {
		w.t.Fatal(err)
	}
	r := resp.Results[0]
	if r.Status.Code != int32(codes.OK) {
		w.t.Fatalf("create entry: %v", r.Status)
	}
	return r.Entry.Id
}

// entry makes an entry from "type:value" selectors.
func entry(parent, path string, selectors ...string) *types.Entry {
	e := &types.Entry{SpiffeId: idToProto("spiffe://" + td + path), ParentId: idToProto(parent)}
	for _, s := range selectors {
		for i := range s {
			if s[i] == ':' {
				e.Selectors = append(e.Selectors, &types.Selector{Type: s[:i], Value: s[i+1:]})
				break
			}
		}
	}
	return e
}

// node is an attested agent on a forged TPM.
type node struct {
	w      *world
	tpm    *forge.TPM
	id     string
	key    *ecdsa.PrivateKey
	cert   *x509.Certificate
	conn   *grpc.ClientConn
	akCert []byte
}

type attestOptions struct {
	unbound bool                       // as a stock agent
	key     *ecdsa.PrivateKey          // of the CSR
	proof   func(*tpmv1.Proof)         // bends the proof
	pause   func()                     // before the proof is sent
	payload func(*tpmv1.AttestRequest) // bends the payload
}

// attest attests tpm and fails the test when it is refused.
func (w *world) attest(tpm *forge.TPM, o attestOptions) *node {
	w.t.Helper()
	n, err := w.tryAttest(tpm, o)
	if err != nil {
		w.t.Fatalf("attest: %v", err)
	}
	return n
}

func newCSR(t testing.TB, key *ecdsa.PrivateKey, template *x509.CertificateRequest) []byte {
	t.Helper()
	if template == nil {
		template = new(x509.CertificateRequest)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, template, key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func (w *world) tryAttest(tpm *forge.TPM, o attestOptions) (*node, error) {
	t := w.t
	t.Helper()
	n := &node{w: w, tpm: tpm, key: o.key}
	if n.key == nil {
		n.key = forge.P256(t)
	}
	ctx := t.Context()
	var agentKey [32]byte
	if !o.unbound {
		agentKey = forge.KeyHash(t, n.key.Public())
		ctx = wire.WithAgentKey(ctx, agentKey)
	}
	stream, err := agentv1.NewAgentClient(w.dialTCP(nil)).AttestAgent(ctx)
	if err != nil {
		return nil, err
	}
	req := &tpmv1.AttestRequest{
		Version: wire.Version, EkChain: tpm.EKChain, EkPublic: tpm.EKPublic, AkPublic: tpm.AKPublic,
		AkCreationData: tpm.AKCreationData, AkCreationAttest: tpm.AKCreationAttest, AkCreationSignature: tpm.AKCreationSig,
		TrustDomain: td, TpmManufacturer: "FRGE", TpmVendor: "forge",
	}
	if o.payload != nil {
		o.payload(req)
	}
	payload, err := wire.EncodeRequest(req)
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(&agentv1.AttestAgentRequest{Step: &agentv1.AttestAgentRequest_Params_{Params: &agentv1.AttestAgentRequest_Params{
		Data:   &types.AttestationData{Type: wire.PluginName, Payload: payload},
		Params: &agentv1.AgentX509SVIDParams{Csr: newCSR(t, n.key, nil)},
	}}}); err != nil && !errors.Is(err, io.EOF) { // then Recv has the reason
		return nil, err
	}
	for {
		resp, err := stream.Recv()
		if err != nil {
			return nil, err
		}
		if r := resp.GetResult(); r != nil {
			if n.cert, err = x509.ParseCertificate(r.Svid.CertChain[0]); err != nil {
				t.Fatal(err)
			}
			n.id = n.cert.URIs[0].String()
			n.conn = w.dialTCP(&tls.Certificate{Certificate: r.Svid.CertChain, PrivateKey: n.key})
			return n, nil
		}
		m, err := wire.DecodeServer(resp.GetChallenge())
		if err != nil {
			t.Fatal(err)
		}
		out := new(tpmv1.AgentMessage)
		switch s := m.Step.(type) {
		case *tpmv1.ServerMessage_Challenge:
			secret, err := tpm.ActivateCredential(s.Challenge.CredentialBlob, s.Challenge.EncryptedSecret)
			if err != nil {
				secret = make([]byte, wire.SecretSize) // a guess
			}
			sel, err := wire.SelectionsFromProto(s.Challenge.Pcrs)
			if err != nil {
				t.Fatal(err)
			}
			extra := attest.NodeExtraData([32]byte(s.Challenge.Nonce), tpm.AKName, td, agentKey)
			att, sig, values := tpm.Quote(t, extra[:], sel, nil)
			p := &tpmv1.Proof{Secret: secret, Attest: att, Signature: sig, Pcrs: wire.BanksToProto(values), AgentKeySha256: agentKey[:]}
			if o.proof != nil {
				o.proof(p)
			}
			if o.pause != nil {
				o.pause()
			}
			out.Step = &tpmv1.AgentMessage_Proof{Proof: p}
		case *tpmv1.ServerMessage_AkCertificate:
			n.akCert = s.AkCertificate.Certificate
			sum := sha256.Sum256(n.akCert)
			out.Step = &tpmv1.AgentMessage_Ack{Ack: &tpmv1.Ack{AkCertificateSha256: sum[:]}}
		default:
			t.Fatalf("unexpected step %T", s)
		}
		b, err := wire.EncodeAgent(out)
		if err != nil {
			t.Fatal(err)
		}
		// When the server has given up, its reason comes from Recv.
		_ = stream.Send(&agentv1.AttestAgentRequest{Step: &agentv1.AttestAgentRequest_ChallengeResponse{ChallengeResponse: b}})
	}
}

func (w *world) newTPM() *forge.TPM { return forge.NewTPM(w.t, w.maker, forge.TPMOptions{}) }

// quoted is how one piece of evidence is made; a test bends it.
type quoted struct {
	leaf      attest.Leaf
	key       *ecdsa.PrivateKey // of the CSR
	selection []attest.PCRSelection
	tpm       *forge.TPM
	record    func(*attest.Evidence)
	nonce     *[32]byte
}

func hashOf(s string) [32]byte     { return sha256.Sum256([]byte(s)) }
func hexOf(h [32]byte) string      { return hex.EncodeToString(h[:]) }
func sel(role, what string) string { return "binary:" + role + "sha256:" + hexOf(hashOf(what)) }

// stepSelectorsOf are those of a recorded step with this tool.
func stepSelectorsOf(tool string) []string {
	return []string{sel("recorder:", "rootlink"), sel("tool:", tool)}
}

// step is a leaf for a recorded step of "go" under the ID.
func (n *node) step(path string) *quoted {
	q := n.workload(path, stepSelectorsOf("go")...)
	q.leaf.KeyOrigin = attest.OriginCaller
	q.leaf.Executable, q.leaf.Recorder, q.leaf.Tool = hashOf("rootlink"), hashOf("rootlink"), hashOf("go")
	q.leaf.Payload = hashOf("the statement")
	return q
}

// workload is a leaf for a Workload API SVID.
func (n *node) workload(path string, selectors ...string) *quoted {
	n.w.t.Helper()
	key := forge.P256(n.w.t)
	q := &quoted{
		key: key, tpm: n.tpm, selection: attest.DefaultPCRs(),
		leaf: attest.Leaf{
			Kind: attest.KindLeaf, KeyOrigin: attest.OriginAgent, TrustDomain: td, SPIFFEID: "spiffe://" + td + path,
			SVIDKey: forge.KeyHash(n.w.t, key.Public()), AgentKey: forge.KeyHash(n.w.t, n.key.Public()), Selectors: selectors,
		},
	}
	rand.Read(q.leaf.Salt[:])
	return q
}

// csr has the TPM quote the leaf among others and puts it into a CSR.
func (n *node) csr(q *quoted) []byte {
	t := n.w.t
	t.Helper()
	if q.nonce == nil {
		resp, err := nodev1.NewNodeClient(n.conn).GetNonce(t.Context(), &nodev1.GetNonceRequest{})
		if err != nil {
			t.Fatal(err)
		}
		nonce := [32]byte(resp.Nonce)
		q.nonce = &nonce
	}
	q.leaf.Nonce = *q.nonce
	h, err := q.leaf.Hash()
	if err != nil {
		t.Fatal(err)
	}
	tree, err := attest.NewTree([][32]byte{hashOf("another"), h, hashOf("a third")})
	if err != nil {
		t.Fatal(err)
	}
	extra := attest.QuoteExtraData(tree.Size(), tree.Root(), q.tpm.AKName)
	att, sig, values := q.tpm.Quote(t, extra[:], q.selection, nil)
	e := &attest.Evidence{
		Attest: att, Signature: sig, AKCert: n.akCert, EKChain: q.tpm.EKChain, PCRs: values,
		Kind: q.leaf.Kind, KeyOrigin: q.leaf.KeyOrigin, AgentKey: q.leaf.AgentKey, Executable: q.leaf.Executable,
		Recorder: q.leaf.Recorder, Tool: q.leaf.Tool, Payload: q.leaf.Payload, Selectors: q.leaf.Selectors,
		Nonce: q.leaf.Nonce, Salt: q.leaf.Salt, Index: 1, Size: tree.Size(), Path: tree.Path(1),
	}
	if q.record != nil {
		q.record(e)
	}
	ext, err := e.Extension()
	if err != nil {
		t.Fatal(err)
	}
	return newCSR(t, q.key, &x509.CertificateRequest{ExtraExtensions: []pkix.Extension{ext}})
}

// sign sends one CSR and returns the SVID, or the item's status as an error.
func (n *node) sign(entryID string, csr []byte) (*x509.Certificate, error) {
	n.w.t.Helper()
	resp, err := svidv1.NewSVIDClient(n.conn).BatchNewX509SVID(n.w.t.Context(), &svidv1.BatchNewX509SVIDRequest{
		Params: []*svidv1.NewX509SVIDParams{{EntryId: entryID, Csr: csr}},
	})
	if err != nil {
		return nil, err
	}
	r := resp.Results[0]
	if r.Status.Code != int32(codes.OK) {
		if r.Svid != nil {
			n.w.t.Error("a refusal came with an SVID")
		}
		return nil, status.Error(codes.Code(r.Status.Code), r.Status.Message)
	}
	return x509.ParseCertificate(r.Svid.CertChain[0])
}

// refused fails the test unless signing is refused and counted under reason.
func (n *node) refused(reason, entryID string, csr []byte) {
	n.w.t.Helper()
	before := n.w.srv.Counters()
	if _, err := n.sign(entryID, csr); err == nil {
		n.w.t.Fatalf("signed, want refusal %s", reason)
	}
	after := n.w.srv.Counters()
	if name := "issue_refused/" + reason; after[name] != before[name]+1 {
		n.w.t.Fatalf("not counted as %s: before %v, after %v", name, before, after)
	}
	for name := range after {
		if len(name) > 7 && name[:7] == "issued/" && after[name] != before[name] {
			n.w.t.Fatalf("%s grew", name)
		}
	}
}

// reasonOf returns why an agent was refused.
func reasonOf(err error) types.PermissionDeniedDetails_Reason {
	for _, d := range status.Convert(err).Details() {
		if p, ok := d.(*types.PermissionDeniedDetails); ok {
			return p.Reason
		}
	}
	return types.PermissionDeniedDetails_UNKNOWN
}

func bundleOf(t testing.TB, conn grpc.ClientConnInterface) *types.Bundle {
	t.Helper()
	b, err := bundlev1.NewBundleClient(conn).GetBundle(t.Context(), &bundlev1.GetBundleRequest{})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func sorted(s []string) []string {
	slices.Sort(s)
	return s
}

func spiffeURL(s string) ([]*url.URL, error) {
	u, err := url.Parse(s)
	return []*url.URL{u}, err
}
