package recorder

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/rootlink/rootlink/internal/forge"
	"github.com/rootlink/rootlink/internal/workload"
	"github.com/rootlink/rootlink/pkg/attest"
	workloadv1 "github.com/rootlink/rootlink/proto/rootlink/workload/v1"
)

// issuer is an agent that measures for real and issues from a forged world.
type issuer struct {
	workloadv1.UnimplementedIssuerServer
	healthpb.UnimplementedHealthServer
	t     *testing.T
	world *forge.World
	m     *workload.Measurer

	// Hooks; nil means well.
	measure, prepare, issue func() error
	detach                  bool   // as on a SPIRE server
	keepDetached            bool   // and promises more than it gives
	log                     []byte // event log named by the evidence
	sendLog                 []byte // what is sent for it, log when nil

	leave chan error // what it says to open calls when it leaves

	mu       sync.Mutex
	peers    []*workload.Peer // one for each connection
	tools    []string
	evidence *attest.Evidence
}

func hook(f func() error) error {
	if f == nil {
		return nil
	}
	return f()
}

// pinning is a listener that pins who connects, as the agent does.
type pinning struct {
	*net.UnixListener
	i *issuer
}

func (p pinning) Accept() (net.Conn, error) {
	c, err := p.AcceptUnix()
	if err != nil {
		return nil, err
	}
	peer, err := workload.PeerOf(c)
	if err != nil {
		return nil, err
	}
	p.i.mu.Lock()
	p.i.peers = append(p.i.peers, peer)
	p.i.mu.Unlock()
	return c, nil
}

func newIssuer(t *testing.T) *issuer {
	t.Helper()
	m, err := workload.NewMeasurer(workload.Options{})
	if err != nil {
		t.Fatal(err)
	}
	i := &issuer{t: t, world: forge.NewWorld(t), m: m, leave: make(chan error, 1)}
	dir, err := os.MkdirTemp("", "ag")
	if err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(dir, "agent.sock")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket})
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer()
	workloadv1.RegisterIssuerServer(s, i)
	healthpb.RegisterHealthServer(s, i)
	go s.Serve(pinning{l, i})
	t.Cleanup(func() {
		s.Stop()
		os.RemoveAll(dir)
		for _, p := range i.peers {
			p.Close()
		}
	})
	t.Setenv(EnvSocket, "unix://"+socket)
	t.Chdir(t.TempDir())
	return i
}

func (i *issuer) Watch(_ *healthpb.HealthCheckRequest, stream healthpb.Health_WatchServer) error {
	select {
	case err := <-i.leave:
		return err
	case <-stream.Context().Done():
		return nil
	}
}

func (i *issuer) header(ctx context.Context) error {
	md, _ := metadata.FromIncomingContext(ctx)
	if v := md.Get("workload.spiffe.io"); len(v) != 1 || v[0] != "true" {
		return status.Error(codes.InvalidArgument, "security header missing from request")
	}
	return nil
}

func (i *issuer) Measure(ctx context.Context, _ *workloadv1.MeasureRequest) (*workloadv1.MeasureResponse, error) {
	if err := errors.Join(i.header(ctx), hook(i.measure)); err != nil {
		return nil, err
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	peer := i.peers[len(i.peers)-1] // of the step that runs now
	child, err := workload.StoppedChild(peer)
	if err != nil {
		return nil, status.Error(codes.FailedPrecondition, err.Error())
	}
	defer child.Close()
	tool, err := i.m.MeasurePeer(ctx, child)
	if err != nil {
		return nil, status.Error(codes.Internal, err.Error())
	}
	self, err := i.m.MeasurePeer(ctx, peer)
	if err != nil {
		return nil, status.Error(codes.Internal, err.Error())
	}
	i.tools = append(i.tools, hex.EncodeToString(tool.SHA256[:]))
	i.world.Leaf.Tool, i.world.Leaf.Executable, i.world.Leaf.Recorder = tool.SHA256, self.SHA256, self.SHA256
	return &workloadv1.MeasureResponse{
		Measurement: &workloadv1.Measurement{Tool: tool.SHA256[:], Recorder: self.SHA256[:], Executable: self.SHA256[:]},
		SpiffeId:    i.world.Leaf.SPIFFEID,
	}, nil
}

func (i *issuer) Prepare(ctx context.Context, req *workloadv1.PrepareRequest) (*workloadv1.PrepareResponse, error) {
	if err := errors.Join(i.header(ctx), hook(i.prepare)); err != nil {
		return nil, err
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	i.world.Leaf.SVIDKey = sha256.Sum256(req.GetSpki())
	copy(i.world.Leaf.Payload[:], req.GetPayloadSha256())
	if i.detach {
		return &workloadv1.PrepareResponse{}, nil
	}
	i.world.Evidence = func(e *attest.Evidence) {
		if i.log != nil {
			sum := sha256.Sum256(i.log)
			e.EventLog = &attest.TypedDigest{Alg: "sha256", Value: sum[:]}
		}
	}
	i.evidence = i.world.Make(i.t)
	x, err := i.evidence.Extension()
	if err != nil {
		return nil, err
	}
	return &workloadv1.PrepareResponse{Evidence: x.Value}, nil
}

func (i *issuer) Issue(ctx context.Context, req *workloadv1.IssueRequest) (*workloadv1.IssueResponse, error) {
	if len(req.GetCsr()) == 0 { // asks whether we are here
		return nil, status.Error(codes.FailedPrecondition, "measure first")
	}
	if err := errors.Join(i.header(ctx), hook(i.issue)); err != nil {
		return nil, err
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	csr, err := x509.ParseCertificateRequest(req.GetCsr())
	if err != nil || csr.CheckSignature() != nil {
		return nil, status.Error(codes.InvalidArgument, "bad CSR")
	}
	if i.detach {
		cert := forge.Sign(i.t, i.world.Plain(i.t), i.world.Authority, csr.PublicKey, i.world.AuthorityKey())
		i.world.Leaf.SVIDKey = sha256.Sum256(cert.RawSubjectPublicKeyInfo)
		d := i.world.Detach(i.t, cert)
		d.Signature = nil
		if i.keepDetached {
			return &workloadv1.IssueResponse{X509Svid: [][]byte{cert.Raw}}, nil
		}
		b, err := d.Marshal()
		return &workloadv1.IssueResponse{X509Svid: [][]byte{cert.Raw}, Detached: b}, err
	}
	if _, err := attest.FromExtensions(csr.Extensions); err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	// As World.Issue, for the caller's key.
	leaf := i.world.Issue(i.t, i.evidence)
	again := &x509.Certificate{URIs: leaf.URIs, KeyUsage: leaf.KeyUsage, ExtKeyUsage: leaf.ExtKeyUsage, NotBefore: leaf.NotBefore, NotAfter: leaf.NotAfter}
	x, err := i.evidence.Extension()
	if err != nil {
		return nil, err
	}
	again.ExtraExtensions = append(again.ExtraExtensions, x)
	cert := forge.Sign(i.t, again, i.world.Authority, csr.PublicKey, i.world.AuthorityKey())
	resp := &workloadv1.IssueResponse{X509Svid: [][]byte{cert.Raw}, EventLog: i.log}
	if i.sendLog != nil {
		resp.EventLog = i.sendLog
	}
	return resp, nil
}

func (i *issuer) Whoami(ctx context.Context, req *workloadv1.WhoamiRequest) (*workloadv1.WhoamiResponse, error) {
	m, err := i.Measure(ctx, nil)
	if err != nil {
		return nil, err
	}
	return &workloadv1.WhoamiResponse{Measurement: m.GetMeasurement(), EntryCreate: "rootlink-server entry create"}, nil
}
