package recorder

import (
	"net"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/pkg/link"
)

// Each call carries the header, the one that only watches the connection too.
func TestWorkloadEndpointSection3RecorderSendsTheHeader(t *testing.T) {
	type call struct {
		method string
		header []string
	}
	calls := make(chan call, 16)
	s := grpc.NewServer(grpc.UnknownServiceHandler(func(_ any, stream grpc.ServerStream) error {
		method, _ := grpc.MethodFromServerStream(stream)
		calls <- call{method, metadata.ValueFromIncomingContext(stream.Context(), "workload.spiffe.io")}
		return status.Error(codes.Unimplemented, "nothing here")
	}))
	t.Chdir(t.TempDir()) // short: the path of a socket is
	l, err := net.Listen("unix", "s")
	if err != nil {
		t.Fatal(err)
	}
	go s.Serve(l)
	defer s.Stop()
	a, err := Connect(t.Context(), "s")
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	if _, err := a.Measure(t.Context(), ""); err == nil {
		t.Error("measured by nobody")
	}
	if _, err := a.Whoami(t.Context(), nil); err == nil {
		t.Error("identified by nobody")
	}
	if _, err := a.Sign(t.Context(), &link.Prepared{}, func(error) {}); err == nil {
		t.Error("signed by nobody")
	}
	seen := make(map[string]bool)
	for len(seen) < 4 {
		select {
		case c := <-calls:
			seen[c.method] = true
			if !slices.Equal(c.header, []string{"true"}) {
				t.Errorf("%s: header %q", c.method, c.header)
			}
		case <-time.After(20 * time.Second):
			t.Fatalf("only %v were called", seen)
		}
	}
}

func TestWorkloadEndpointSection4RecorderFallsBackToTheVariable(t *testing.T) {
	newIssuer(t) // sets it
	a, err := Connect(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	a.Close()
	// A socket that is named wins, whatever the variable is.
	named := filepath.Join(t.TempDir(), "named")
	if _, err := Connect(t.Context(), named); err == nil || !strings.Contains(err.Error(), named) {
		t.Errorf("%v", err)
	}
	for _, bad := range []string{"/path/agent.sock", "unix://agent.sock", "unix:agent.sock", "http:///a", "unix:///a?b", "tcp://127.0.0.1:1"} {
		t.Setenv(EnvSocket, bad)
		if _, err := Connect(t.Context(), ""); cli.ExitCode(err) != cli.ExitRun || cli.HintOf(err) == "" || !strings.Contains(err.Error(), EnvSocket) {
			t.Errorf("%s: %v", bad, err)
		}
	}
}

// What is wrong in the request, or not there at the agent, is wrong again at the
// second attempt.
func TestWorkloadEndpointSection6RecorderDoesNotRetry(t *testing.T) {
	for _, code := range []codes.Code{codes.InvalidArgument, codes.Unimplemented} {
		t.Run(code.String(), func(t *testing.T) {
			i := newIssuer(t)
			calls := 0
			i.prepare = func() error {
				calls++
				return status.Error(code, "no")
			}
			if _, err := newStep(t, "sh", "-c", "echo x >out").Run(); err == nil || calls != 1 {
				t.Errorf("%d calls, %v", calls, err)
			}
		})
	}
}
