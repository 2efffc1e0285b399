package agent

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/binary"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/url"
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
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/rootlink/rootlink/plugins/tpmnode/wire"
	nodev1 "github.com/rootlink/rootlink/proto/rootlink/node/v1"
)

const (
	testTD    = "example.test"
	testAgent = "/spire/agent/tpmnode/00000000000000000000000000000000000000000000000000000000000000aa"
)

// fakeServer speaks the SPIRE Server API as a stock server does, and node.v1
// unless stock is set. What it signs is real; what it believes is not.
type fakeServer struct {
	agentv1.UnimplementedAgentServer
	bundlev1.UnimplementedBundleServer
	entryv1.UnimplementedEntryServer
	svidv1.UnimplementedSVIDServer
	nodev1.UnimplementedNodeServer

	t        *testing.T
	stock    bool
	trustKey *ecdsa.PrivateKey

	mu        sync.Mutex
	srv       *grpc.Server
	addr      string
	ca        *x509.Certificate
	caKey     crypto.Signer
	oldCAs    []*x509.Certificate
	federated map[string][]byte // authority of other trust domains by their name
	jwt       fakeJWT
	entries   []*types.Entry
	nextID    int
	banned    bool
	stale     int           // evidence under another agent SVID that was sent
	noAttest  bool          // attestation fails, for the time being
	hold      chan struct{} // until it is closed, nobody hears that they are attested
	activeKey [32]byte      // SHA-256 of its SPKI
	active    *big.Int      // serial of the agent SVID in force, nil: not attested
	agentTTL  time.Duration
	svidTTL   time.Duration
	clock     time.Duration // added to the server's time in certificates
	patterns  []string
	pageSize  int
	attests   int
	notActive int // calls with a replaced agent SVID
	syncs     int
	misnamed  string // the name in federated bundles, if not their own
	// flood, when set, is what answers a sync.
	flood      func(entryv1.Entry_SyncAuthorizedEntriesServer) error
	taintAll   bool // the bundle says of each authority that it is being withdrawn
	batches    []int
	lastNonce  [32]byte
	badNonce   bool // refuse evidence with any nonce but lastNonce
	signDenied error
	stripExt   bool
	answer     func() []byte // certificate in place of the right one
	// replayBundle answers GetSignedBundle with the first answer for ever.
	replayBundle bool
	firstBundle  *nodev1.GetSignedBundleResponse
	showKey      *ecdsa.PrivateKey // trust key to show, not the one that signs
	keyElsewhere bool              // the trust key is not on this server
}

func newFakeServer(t *testing.T) *fakeServer {
	t.Helper()
	s := &fakeServer{t: t, agentTTL: time.Hour, svidTTL: time.Hour, pageSize: 500}
	s.trustKey, _ = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	s.rotate(false)
	t.Cleanup(s.stop)
	return s
}

// rotate makes a new authority, the only one known unless keep is set.
func (s *fakeServer) rotate(keep bool) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		s.t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: serial(), Subject: pkix.Name{CommonName: "CA", SerialNumber: serial().String()},
		NotBefore: time.Now().Add(-48 * time.Hour), NotAfter: time.Now().Add(48 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
		URIs: []*url.URL{{Scheme: "spiffe", Host: testTD}},
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		s.t.Fatal(err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if keep && s.ca != nil {
		s.oldCAs = append(s.oldCAs, s.ca)
	}
	s.ca, _ = x509.ParseCertificate(der)
	s.caKey = key
}

func serial() *big.Int {
	n, _ := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	return n
}

// sign issues a certificate; s.mu is held.
func (s *fakeServer) sign(path string, pub any, ttl time.Duration, ext []pkix.Extension) []byte {
	now := time.Now().Add(s.clock)
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: serial(), NotBefore: now.Add(-10 * time.Second), NotAfter: now.Add(ttl),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		URIs: []*url.URL{{Scheme: "spiffe", Host: testTD, Path: path}}, ExtraExtensions: ext,
	}, s.ca, pub, s.caKey)
	if err != nil {
		s.t.Error(err)
	}
	return der
}

func (s *fakeServer) bundlePEM() []byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.ca.Raw})
}

func (s *fakeServer) joinLine() string {
	spki, _ := x509.MarshalPKIXPublicKey(s.trustKey.Public())
	return fmt.Sprintf("rootlink-join:v1:%s:%x", testTD, sha256.Sum256(spki))
}

// start listens, on the address of an earlier start if there was one.
func (s *fakeServer) start() {
	s.t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	addr := s.addr
	if addr == "" {
		addr = "127.0.0.1:0"
	}
	l, err := net.Listen("tcp", addr)
	if err != nil {
		s.t.Fatal(err)
	}
	s.addr = l.Addr().String()
	s.srv = grpc.NewServer(grpc.Creds(credentials.NewTLS(&tls.Config{
		ClientAuth: tls.RequestClientCert,
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
			if err != nil {
				return nil, err
			}
			s.mu.Lock()
			defer s.mu.Unlock()
			return &tls.Certificate{Certificate: [][]byte{s.sign("/spire/server", key.Public(), 10*time.Minute, nil)}, PrivateKey: key}, nil
		},
	})))
	agentv1.RegisterAgentServer(s.srv, s)
	bundlev1.RegisterBundleServer(s.srv, s)
	entryv1.RegisterEntryServer(s.srv, s)
	svidv1.RegisterSVIDServer(s.srv, s)
	if !s.stock {
		nodev1.RegisterNodeServer(s.srv, s)
	}
	srv := s.srv
	go srv.Serve(l)
}

func (s *fakeServer) stop() {
	s.mu.Lock()
	srv := s.srv
	s.srv = nil
	s.mu.Unlock()
	if srv != nil {
		srv.Stop()
	}
}

// with changes state under the lock.
func (s *fakeServer) with(fn func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	fn()
}

func (s *fakeServer) addEntry(path string, selectors ...string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.nextID++
	e := &types.Entry{
		Id: fmt.Sprintf("entry-%03d", s.nextID), SpiffeId: &types.SPIFFEID{TrustDomain: testTD, Path: path},
		ParentId: &types.SPIFFEID{TrustDomain: testTD, Path: testAgent}, CreatedAt: int64(1000 + s.nextID),
	}
	for _, sel := range selectors {
		e.Selectors = append(e.Selectors, &types.Selector{Type: "binary", Value: sel[len("binary:"):]})
	}
	s.entries = append(s.entries, e)
	return e.Id
}

func (s *fakeServer) deleteEntry(id string) {
	s.with(func() {
		s.entries = slices.DeleteFunc(s.entries, func(e *types.Entry) bool { return e.Id == id })
	})
}

func denied(reason types.PermissionDeniedDetails_Reason) error {
	st, err := status.New(codes.PermissionDenied, "agent refused").WithDetails(&types.PermissionDeniedDetails{Reason: reason})
	if err != nil {
		return err
	}
	return st.Err()
}

// authorize demands the agent SVID in force.
func (s *fakeServer) authorize(ctx context.Context) error {
	p, _ := peer.FromContext(ctx)
	info, ok := p.AuthInfo.(credentials.TLSInfo)
	if !ok || len(info.State.PeerCertificates) == 0 {
		return denied(types.PermissionDeniedDetails_AGENT_NOT_ATTESTED)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.banned:
		return denied(types.PermissionDeniedDetails_AGENT_BANNED)
	case s.active == nil:
		return denied(types.PermissionDeniedDetails_AGENT_NOT_ATTESTED)
	case info.State.PeerCertificates[0].SerialNumber.Cmp(s.active) != 0:
		s.notActive++
		return denied(types.PermissionDeniedDetails_AGENT_NOT_ACTIVE)
	case time.Now().After(info.State.PeerCertificates[0].NotAfter):
		return denied(types.PermissionDeniedDetails_AGENT_EXPIRED)
	}
	return nil
}

func (s *fakeServer) AttestAgent(stream agentv1.Agent_AttestAgentServer) error {
	req, err := stream.Recv()
	if err != nil {
		return err
	}
	if req.GetParams().GetData().GetType() != "tpmnode" || string(req.GetParams().GetData().GetPayload()) != "payload" {
		return status.Error(codes.InvalidArgument, "unexpected attestation data")
	}
	csr, err := x509.ParseCertificateRequest(req.GetParams().GetParams().GetCsr())
	if err != nil || csr.CheckSignature() != nil {
		return status.Error(codes.InvalidArgument, "bad CSR")
	}
	key, _ := x509.MarshalPKIXPublicKey(csr.PublicKey)
	want := sha256.Sum256(key)
	if said, bound, err := wire.AgentKey(stream.Context()); err != nil || bound == s.stock || bound && said != want {
		return status.Errorf(codes.InvalidArgument, "agent key named: %v, %x, %v", bound, said, err)
	}
	if s.stock { // its plugins cannot know the key
		want = [32]byte{}
	}
	for i := range 3 {
		if err := stream.Send(&agentv1.AttestAgentResponse{Step: &agentv1.AttestAgentResponse_Challenge{Challenge: []byte{byte(i)}}}); err != nil {
			return err
		}
		req, err := stream.Recv()
		if err != nil {
			return err
		}
		if got := req.GetChallengeResponse(); len(got) != 33 || got[0] != byte(i) || [32]byte(got[1:]) != want {
			return status.Error(codes.PermissionDenied, "challenge not met, or the proof does not bind the CSR key")
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.banned && s.stock:
		return status.Error(codes.PermissionDenied, "failed to attest: agent is banned")
	case s.banned:
		return denied(types.PermissionDeniedDetails_AGENT_BANNED)
	case s.noAttest:
		return status.Error(codes.Unavailable, "not now")
	}
	s.attests++
	der := s.sign(testAgent, csr.PublicKey, s.agentTTL, nil)
	c, _ := x509.ParseCertificate(der)
	s.active, s.activeKey = c.SerialNumber, sha256.Sum256(key)
	if hold := s.hold; hold != nil {
		s.mu.Unlock()
		<-hold
		s.mu.Lock()
	}
	return stream.Send(&agentv1.AttestAgentResponse{Step: &agentv1.AttestAgentResponse_Result_{Result: &agentv1.AttestAgentResponse_Result{
		Svid: &types.X509SVID{CertChain: [][]byte{der}}, Reattestable: true,
	}}})
}

func (s *fakeServer) GetBundle(context.Context, *bundlev1.GetBundleRequest) (*types.Bundle, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	b := &types.Bundle{TrustDomain: testTD}
	for _, ca := range append([]*x509.Certificate{s.ca}, s.oldCAs...) {
		b.X509Authorities = append(b.X509Authorities, &types.X509Certificate{Asn1: ca.Raw, Tainted: s.taintAll})
	}
	b.JwtAuthorities = s.jwt.published
	return b, nil
}

func (s *fakeServer) SyncAuthorizedEntries(stream entryv1.Entry_SyncAuthorizedEntriesServer) error {
	if _, err := stream.Recv(); err != nil {
		return err
	}
	if err := s.authorize(stream.Context()); err != nil {
		return err
	}
	s.mu.Lock()
	s.syncs++
	entries := slices.Clone(s.entries)
	page, flood := s.pageSize, s.flood
	s.mu.Unlock()
	if flood != nil {
		return flood(stream)
	}
	if len(entries) < page {
		return stream.Send(&entryv1.SyncAuthorizedEntriesResponse{Entries: entries})
	}
	byID := make(map[string]*types.Entry)
	var revs []*entryv1.EntryRevision
	for _, e := range entries {
		byID[e.Id] = e
		revs = append(revs, &entryv1.EntryRevision{Id: e.Id, RevisionNumber: e.RevisionNumber, CreatedAt: e.CreatedAt})
	}
	for part := range slices.Chunk(revs, page) {
		more := part[len(part)-1] != revs[len(revs)-1]
		if err := stream.Send(&entryv1.SyncAuthorizedEntriesResponse{EntryRevisions: part, More: more}); err != nil {
			return err
		}
	}
	for {
		req, err := stream.Recv()
		if err != nil {
			return nil
		}
		var want []*types.Entry
		for _, id := range req.Ids {
			want = append(want, byID[id])
		}
		for part := range slices.Chunk(want, page) {
			more := part[len(part)-1] != want[len(want)-1]
			if err := stream.Send(&entryv1.SyncAuthorizedEntriesResponse{Entries: part, More: more}); err != nil {
				return err
			}
		}
	}
}

func (s *fakeServer) BatchNewX509SVID(ctx context.Context, req *svidv1.BatchNewX509SVIDRequest) (*svidv1.BatchNewX509SVIDResponse, error) {
	if err := s.authorize(ctx); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.batches = append(s.batches, len(req.Params))
	resp := &svidv1.BatchNewX509SVIDResponse{}
	for _, p := range req.Params {
		resp.Results = append(resp.Results, s.signOne(p))
	}
	return resp, nil
}

func (s *fakeServer) signOne(p *svidv1.NewX509SVIDParams) *svidv1.BatchNewX509SVIDResponse_Result {
	fail := func(c codes.Code, msg string) *svidv1.BatchNewX509SVIDResponse_Result {
		return &svidv1.BatchNewX509SVIDResponse_Result{Status: &types.Status{Code: int32(c), Message: msg}}
	}
	if s.signDenied != nil {
		return fail(status.Code(s.signDenied), status.Convert(s.signDenied).Message())
	}
	csr, err := x509.ParseCertificateRequest(p.Csr)
	if err != nil || csr.CheckSignature() != nil {
		return fail(codes.InvalidArgument, "bad CSR")
	}
	var e *types.Entry
	for _, x := range s.entries {
		if x.Id == p.EntryId {
			e = x
		}
	}
	if e == nil {
		return fail(codes.NotFound, "entry not found or not authorized")
	}
	var ext []pkix.Extension
	for _, x := range csr.Extensions {
		if x.Id.String() == "1.3.6.1.5.5.7.1.35" {
			rec, err := parseEvidence(x)
			if err != nil {
				return fail(codes.InvalidArgument, err.Error())
			}
			if rec.AgentKey != s.activeKey {
				s.stale++
				return fail(codes.PermissionDenied, "evidence names another agent SVID")
			}
			if s.badNonce && rec.Nonce != s.lastNonce {
				return fail(codes.PermissionDenied, "nonce is not ours")
			}
			if !s.stripExt {
				ext = append(ext, x)
			}
		}
	}
	der := s.sign(e.SpiffeId.Path, csr.PublicKey, s.svidTTL, ext)
	if s.answer != nil {
		der = s.answer()
	}
	return &svidv1.BatchNewX509SVIDResponse_Result{
		Status: &types.Status{}, Svid: &types.X509SVID{CertChain: [][]byte{der}, Id: e.SpiffeId},
	}
}

func (s *fakeServer) GetNonce(ctx context.Context, _ *nodev1.GetNonceRequest) (*nodev1.GetNonceResponse, error) {
	if err := s.authorize(ctx); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	rand.Read(s.lastNonce[:])
	binary.BigEndian.PutUint64(s.lastNonce[:8], uint64(time.Now().UnixMilli()))
	return &nodev1.GetNonceResponse{Nonce: slices.Clone(s.lastNonce[:])}, nil
}

func (s *fakeServer) GetConfig(ctx context.Context, _ *nodev1.GetConfigRequest) (*nodev1.GetConfigResponse, error) {
	if err := s.authorize(ctx); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return &nodev1.GetConfigResponse{EvidencePatterns: s.patterns}, nil
}

func (s *fakeServer) GetSignedBundle(_ context.Context, req *nodev1.GetSignedBundleRequest) (*nodev1.GetSignedBundleResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.keyElsewhere {
		return nil, status.Error(codes.FailedPrecondition, "the trust key is not kept on this server")
	}
	b, err := proto.Marshal(&nodev1.SignedBundle{
		TrustDomain: testTD, X509Authorities: [][]byte{s.ca.Raw}, IssuedUnix: time.Now().Add(s.clock).Unix(), Nonce: req.Nonce,
	})
	if err != nil {
		return nil, err
	}
	digest := sha256.Sum256(append([]byte("rootlink/bundle/v1\x00"), b...))
	sig, err := ecdsa.SignASN1(rand.Reader, s.trustKey, digest[:])
	if err != nil {
		return nil, err
	}
	show := s.trustKey
	if s.showKey != nil {
		show = s.showKey
	}
	spki, err := x509.MarshalPKIXPublicKey(show.Public())
	resp := &nodev1.GetSignedBundleResponse{Bundle: b, TrustKey: spki, Signature: sig}
	if s.replayBundle && s.firstBundle != nil {
		return s.firstBundle, nil
	}
	s.firstBundle = resp
	return resp, err
}
