package main

import (
	"crypto/x509"
	"encoding/pem"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	workloadpb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/internal/forge"
)

// fakeAPI answers FetchX509SVID with its messages, and then ends the stream. It
// refuses calls that lack the header and counts them all.
type fakeAPI struct {
	workloadpb.UnimplementedSpiffeWorkloadAPIServer

	messages []*workloadpb.X509SVIDResponse
	seen     map[string]int // calls by method
}

func (f *fakeAPI) FetchX509SVID(_ *workloadpb.X509SVIDRequest, stream workloadpb.SpiffeWorkloadAPI_FetchX509SVIDServer) error {
	for _, m := range f.messages {
		if err := stream.Send(m); err != nil {
			return err
		}
	}
	return nil
}

// start serves f and returns the path of its socket.
func (f *fakeAPI) start(t *testing.T) string {
	t.Helper()
	f.seen = make(map[string]int)
	check := func(stream grpc.ServerStream, method string) error {
		f.seen[method]++
		if v := metadata.ValueFromIncomingContext(stream.Context(), "workload.spiffe.io"); len(v) != 1 || v[0] != "true" {
			t.Errorf("%s: no header", method)
			return status.Error(codes.InvalidArgument, "security header missing from request")
		}
		return nil
	}
	s := grpc.NewServer(
		grpc.StreamInterceptor(func(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, h grpc.StreamHandler) error {
			if err := check(stream, info.FullMethod); err != nil {
				return err
			}
			return h(srv, stream)
		}),
		grpc.UnknownServiceHandler(func(any, grpc.ServerStream) error { return status.Error(codes.Unimplemented, "not here") }),
	)
	// The streams only: what is not registered comes to the handler above, by way
	// of the interceptor.
	s.RegisterService(&grpc.ServiceDesc{
		ServiceName: workloadpb.SpiffeWorkloadAPI_ServiceDesc.ServiceName,
		HandlerType: workloadpb.SpiffeWorkloadAPI_ServiceDesc.HandlerType,
		Streams:     workloadpb.SpiffeWorkloadAPI_ServiceDesc.Streams,
	}, f)
	dir, err := os.MkdirTemp("", "rl") // short: t.TempDir may be too long for sun_path
	if err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(dir, "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		s.Serve(l)
	}()
	t.Cleanup(func() {
		s.Stop()
		<-done
		os.RemoveAll(dir)
	})
	return socket
}

// svidOf makes a whole X509SVID message.
func svidOf(t *testing.T, path string) *workloadpb.X509SVID {
	t.Helper()
	key, caKey := forge.P256(t), forge.P256(t)
	now := time.Now()
	ca := &x509.Certificate{
		NotBefore: now.Add(-time.Hour), NotAfter: now.Add(time.Hour), IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign, URIs: []*url.URL{{Scheme: "spiffe", Host: "example.org"}},
	}
	root := forge.Sign(t, ca, ca, caKey.Public(), caKey)
	id := &url.URL{Scheme: "spiffe", Host: "example.org", Path: path}
	leaf := forge.Sign(t, &x509.Certificate{
		NotBefore: now.Add(-time.Hour), NotAfter: now.Add(time.Hour), KeyUsage: x509.KeyUsageDigitalSignature, URIs: []*url.URL{id},
	}, root, key.Public(), caKey)
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return &workloadpb.X509SVID{SpiffeId: id.String(), X509Svid: leaf.Raw, X509SvidKey: der, Bundle: root.Raw}
}

func message(svids ...*workloadpb.X509SVID) *workloadpb.X509SVIDResponse {
	return &workloadpb.X509SVIDResponse{Svids: svids}
}

func TestWorkloadEndpointSection3CommandsSendTheHeader(t *testing.T) {
	f := &fakeAPI{messages: []*workloadpb.X509SVIDResponse{message(svidOf(t, "/a"))}}
	socket := f.start(t)
	for _, args := range [][]string{{"api", "fetch", "x509"}, {"api", "fetch", "jwt", "--audience", "a"}, {"healthcheck"}} {
		call(t, append(args, "--socket", socket)...)
	}
	if len(f.seen) != 3 {
		t.Errorf("calls %v", f.seen)
	}
}

func TestWorkloadEndpointSection3ServesNoTCP(t *testing.T) {
	code, _, stderr := call(t, "run", "--trust-domain", "example.org", "--join", "rootlink-join:v1:example.org:"+strings.Repeat("ab", 32),
		"--recorder-group", "", "--data-dir", t.TempDir(), "--socket", "tcp://127.0.0.1:0")
	if code != cli.ExitUsage || !strings.Contains(stderr, cli.ErrEndpointTCP.Error()) {
		t.Errorf("code %d, %q", code, stderr)
	}
}

func TestWorkloadEndpointSection4CommandsFallBackToTheVariable(t *testing.T) {
	f := &fakeAPI{messages: []*workloadpb.X509SVIDResponse{message(svidOf(t, "/a"))}}
	socket := f.start(t)
	t.Setenv(envSocket, "unix://"+socket)
	if code, _, stderr := call(t, "api", "fetch", "x509"); code != 0 {
		t.Errorf("code %d, %q", code, stderr)
	}
	for _, bad := range []string{socket, "unix:/" + socket[1:] + "#", "unix://" + socket[1:], "http://" + socket, "tcp://127.0.0.1:1", "tcp://localhost:1"} {
		t.Setenv(envSocket, bad)
		if code, _, stderr := call(t, "api", "fetch", "x509"); code != cli.ExitUsage || !strings.Contains(stderr, envSocket) {
			t.Errorf("%s: code %d, %q", bad, code, stderr)
		}
		if code, _, stderr := call(t, "api", "fetch", "x509", "--socket", socket); code != 0 {
			t.Errorf("a socket that is named does not win over %s: code %d, %q", bad, code, stderr)
		}
	}
}

func TestWorkloadEndpointSection6CommandsDoNotRetry(t *testing.T) {
	f := &fakeAPI{}
	socket := f.start(t)
	if code, _, _ := call(t, "api", "fetch", "jwt", "--audience", "a", "--socket", socket); code == 0 {
		t.Error("a token from nobody")
	}
	if n := f.seen["/SpiffeWorkloadAPI/FetchJWTSVID"]; n != 1 {
		t.Errorf("%d calls", n)
	}
}

// An SVID that the second message leaves out is gone from the directory.
func TestWorkloadAPISection44ClientKeepsNothingWithdrawn(t *testing.T) {
	a, b := svidOf(t, "/a"), svidOf(t, "/b")
	f := &fakeAPI{messages: []*workloadpb.X509SVIDResponse{message(a, b), message(b)}}
	dir := t.TempDir()
	other := filepath.Join(dir, "svid.7.pem") // not of this run
	if err := os.WriteFile(other, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if code, _, stderr := call(t, "api", "fetch", "x509", "--watch", "--write", dir, "--socket", f.start(t)); code != 0 {
		t.Fatalf("code %d, %q", code, stderr)
	}
	names, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil || len(names) != 4 {
		t.Errorf("%v %v", names, err)
	}
	key, err := os.ReadFile(filepath.Join(dir, "svid.0.key"))
	if err != nil || string(key) != string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: b.X509SvidKey})) {
		t.Errorf("svid.0.key is not that of the second message (%v)", err)
	}
}

// A message that lacks a mandatory field is discarded whole: nothing is written.
func TestWorkloadAPISection45ClientDiscardsIncompleteMessages(t *testing.T) {
	whole := svidOf(t, "/a")
	bent := func(f func(*workloadpb.X509SVID)) *workloadpb.X509SVIDResponse {
		m := proto.Clone(whole).(*workloadpb.X509SVID)
		f(m)
		return message(whole, m)
	}
	for name, m := range map[string]*workloadpb.X509SVIDResponse{
		"no SVIDs":    message(),
		"no ID":       bent(func(s *workloadpb.X509SVID) { s.SpiffeId = "" }),
		"another ID":  bent(func(s *workloadpb.X509SVID) { s.SpiffeId = "spiffe://example.org/b" }),
		"no chain":    bent(func(s *workloadpb.X509SVID) { s.X509Svid = nil }),
		"no key":      bent(func(s *workloadpb.X509SVID) { s.X509SvidKey = nil }),
		"another key": bent(func(s *workloadpb.X509SVID) { s.X509SvidKey = svidOf(t, "/a").X509SvidKey }),
		"no bundle":   bent(func(s *workloadpb.X509SVID) { s.Bundle = nil }),
	} {
		f := &fakeAPI{messages: []*workloadpb.X509SVIDResponse{m}}
		dir := t.TempDir()
		code, stdout, stderr := call(t, "api", "fetch", "x509", "--write", dir, "--socket", f.start(t))
		if left, err := os.ReadDir(dir); code == 0 || stdout != "" || !strings.Contains(stderr, "not valid") || err != nil || len(left) != 0 {
			t.Errorf("%s: code %d, %q, %d files", name, code, stderr, len(left))
		}
	}
}
