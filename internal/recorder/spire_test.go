package recorder

import (
	"context"
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/digitorus/timestamp"
	workloadpb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/rootlink/rootlink/internal/forge"
	"github.com/rootlink/rootlink/pkg/attest"
	"github.com/rootlink/rootlink/pkg/link"
	workloadv1 "github.com/rootlink/rootlink/proto/rootlink/workload/v1"
)

// spire is a SPIRE agent's Workload API, and a voucher that measures for real and
// quotes in a forged world.
type spire struct {
	workloadpb.UnimplementedSpiffeWorkloadAPIServer
	*issuer // the world, the header's check and the pinned peers

	agent, quoter *grpc.Server
	quoterSocket  string

	mu    sync.Mutex
	svids func() []*workloadpb.X509SVID // nil: one, signed anew for each call
	fetch func() error
	vouch func(*attest.Detached) error
	given [][]byte // leaves
}

func newSPIRE(t *testing.T) *spire {
	t.Helper()
	s := &spire{issuer: newIssuer(t)}
	s.world.Now = time.Now()
	dir := filepath.Dir(strings.TrimPrefix(os.Getenv(EnvSocket), "unix://"))
	listen := func(name string) *net.UnixListener {
		l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, name)})
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	s.agent, s.quoter = grpc.NewServer(), grpc.NewServer()
	workloadpb.RegisterSpiffeWorkloadAPIServer(s.agent, s)
	workloadv1.RegisterVoucherServer(s.quoter, voucher{spire: s})
	go s.agent.Serve(listen("spire.sock"))
	go s.quoter.Serve(pinning{listen("quoter.sock"), s.issuer})
	t.Cleanup(func() {
		s.agent.Stop()
		s.quoter.Stop()
	})
	s.quoterSocket = filepath.Join(dir, "quoter.sock")
	t.Setenv(EnvSocket, "unix://"+filepath.Join(dir, "spire.sock"))
	t.Setenv(EnvQuoter, s.quoterSocket)
	return s
}

// svid signs an SVID of its own beginning for a new key.
func (s *spire) svid(id string, chain ...*x509.Certificate) *workloadpb.X509SVID {
	s.world.SVIDKey = forge.P256(s.t)
	s.world.Leaf.SPIFFEID = id
	leaf := s.world.Plain(s.t)
	key, err := x509.MarshalPKCS8PrivateKey(s.world.SVIDKey)
	if err != nil {
		s.t.Error(err)
	}
	der := leaf.Raw
	for _, c := range chain {
		der = append(der, c.Raw...)
	}
	return &workloadpb.X509SVID{SpiffeId: id, X509Svid: der, X509SvidKey: key, Bundle: s.world.Authority.Raw}
}

const buildID1 = "spiffe://example.org/build"

func (s *spire) FetchX509SVID(_ *workloadpb.X509SVIDRequest, stream workloadpb.SpiffeWorkloadAPI_FetchX509SVIDServer) error {
	if err := errors.Join(s.header(stream.Context()), hook(s.fetch)); err != nil {
		return err
	}
	s.mu.Lock()
	resp := &workloadpb.X509SVIDResponse{}
	if s.svids != nil {
		resp.Svids = s.svids()
	} else {
		resp.Svids = append(resp.Svids, s.svid(buildID1))
	}
	for _, v := range resp.Svids {
		if certs, err := x509.ParseCertificates(v.GetX509Svid()); err == nil {
			s.given = append(s.given, certs[0].Raw)
		}
	}
	s.mu.Unlock()
	if err := stream.Send(resp); err != nil {
		return err
	}
	<-stream.Context().Done()
	return nil
}

type voucher struct {
	workloadv1.UnimplementedVoucherServer
	*spire
}

func (v voucher) Measure(ctx context.Context, req *workloadv1.MeasureRequest) (*workloadv1.MeasureResponse, error) {
	if req.GetSpiffeId() != "" {
		return nil, status.Error(codes.InvalidArgument, "no identity is chosen here")
	}
	resp, err := v.issuer.Measure(ctx, req)
	if err != nil {
		return nil, err
	}
	return &workloadv1.MeasureResponse{Measurement: resp.GetMeasurement(), TrustDomain: "example.org"}, nil
}

func (v voucher) Vouch(ctx context.Context, req *workloadv1.VouchRequest) (*workloadv1.VouchResponse, error) {
	if err := v.header(ctx); err != nil {
		return nil, err
	}
	if len(v.tools) == 0 {
		return nil, status.Error(codes.FailedPrecondition, "nothing was measured")
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	w := v.world
	leaf, err := x509.ParseCertificate(req.GetX509Svid()[0])
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	copy(w.Leaf.Payload[:], req.GetPayloadSha256())
	w.Leaf.SVIDKey, w.Leaf.KeyOrigin = sha256.Sum256(leaf.RawSubjectPublicKeyInfo), attest.OriginAgent
	d := w.Detach(v.t, leaf)
	d.Signature = nil
	if v.vouch != nil {
		if err := v.vouch(d); err != nil {
			return nil, err
		}
	}
	b, err := d.Marshal()
	return &workloadv1.VouchResponse{Detached: b}, err
}

// tsa is a timestamp authority; bend may spoil the token of its nth answer.
func tsa(t *testing.T, refuse func(n int) bool) string {
	a := forge.NewTSA(t, func(c *x509.Certificate) {
		c.NotBefore, c.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	})
	n := 0
	var mu sync.Mutex // guards n
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		n++
		no := refuse != nil && refuse(n)
		mu.Unlock()
		raw, err := io.ReadAll(r.Body)
		if no || err != nil {
			http.Error(w, "busy", http.StatusForbidden)
			return
		}
		q, err := timestamp.ParseRequest(raw)
		if err != nil {
			t.Error(err)
			return
		}
		w.Header().Set("Content-Type", "application/timestamp-reply")
		w.Write(a.Token(t, nil, time.Now(), func(s *forge.TokenSpec) { s.Imprint, s.Nonce = q.HashedMessage, q.Nonce }))
	}))
	t.Cleanup(s.Close)
	return s.URL
}

// checkRecord: what VerifyDetached makes of such a record is tested where it is.
func checkRecord(t *testing.T, b *link.Bundle, d *attest.Detached) {
	t.Helper()
	leaf := b.UnverifiedCertificate()
	input, err := d.SigningInput(leaf.Raw)
	if err != nil {
		t.Fatal(err)
	}
	if digest := sha256.Sum256(input); !ecdsa.VerifyASN1(leaf.PublicKey.(*ecdsa.PublicKey), digest[:], d.Signature) {
		t.Error("the SVID's key did not sign the record")
	}
	if e := d.Evidence; e.Payload != link.PayloadDigest(b.UnverifiedPayload()) || e.Nonce != attest.DetachedNonce(leaf.Raw) {
		t.Error("the record is about another statement or SVID")
	}
}

func clean(t *testing.T) {
	t.Helper()
	for _, n := range strings.Fields(left(t)) {
		if err := os.Remove(n); err != nil {
			t.Fatal(err)
		}
	}
}

func stockBundle(t *testing.T) (*link.Bundle, *attest.Detached) {
	t.Helper()
	names, err := filepath.Glob("*" + link.BundleSuffix)
	if err != nil || len(names) != 1 {
		t.Fatal(names, err)
	}
	b, err := readBundle(names[0])
	if err != nil {
		t.Fatal(err)
	}
	d, _, err := readRecord(names[0], b)
	if err != nil {
		t.Fatal(err)
	}
	return b, d
}
