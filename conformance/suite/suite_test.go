package suite

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"path/filepath"
	"regexp"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
)

func outcome(t *testing.T, o Options, id string) Result {
	t.Helper()
	results, err := Run(t.Context(), o, regexp.MustCompile("^"+regexp.QuoteMeta(id)+"$"))
	if err != nil {
		t.Fatal(err)
	}
	if len(results) != 1 {
		t.Fatalf("%s: %d results", id, len(results))
	}
	return results[0]
}

// What is right passes all, and nothing is left out: every scene is there.
func TestRightEndpointPasses(t *testing.T) {
	results, err := Run(t.Context(), newFake().serve(t), nil)
	if err != nil {
		t.Fatal(err)
	}
	if len(results) != len(Clauses()) {
		t.Errorf("%d results of %d clauses", len(results), len(Clauses()))
	}
	for _, r := range results {
		if r.Outcome != Pass {
			t.Errorf("%s: %s: %s", r.Outcome, r.ID, r.Why)
		}
	}
}

// A check that cannot fail checks nothing: each MUST has a way to break it that
// it sees.
func TestEachMustSeesItsBreach(t *testing.T) {
	for _, c := range Clauses() {
		if c.Level == Should {
			continue
		}
		vs, known := variants[c.ID]
		// These two are about endpoints that no fake can be, and have their own tests.
		apart := c.ID == "workload-endpoint/3/served-over-grpc" || c.ID == "workload-endpoint/3.1/tls-not-required"
		if !known || len(vs) == 0 && !apart {
			t.Errorf("%s has no variant that breaks it", c.ID)
		}
		for _, v := range vs {
			t.Run(c.ID+"/"+v.name, func(t *testing.T) {
				t.Parallel()
				testVariant(t, c.ID, v, Fail)
			})
		}
	}
}

func TestAdviceIsNoFailure(t *testing.T) {
	for id, vs := range advice {
		for _, v := range vs {
			t.Run(id+"/"+v.name, func(t *testing.T) {
				t.Parallel()
				testVariant(t, id, v, Advice)
			})
		}
	}
}

func testVariant(t *testing.T, id string, v variant, want Outcome) {
	f := newFake()
	v.breaks(f)
	o := f.serve(t)
	if v.o != nil {
		v.o(&o)
	}
	if r := outcome(t, o, id); r.Outcome != want {
		t.Errorf("%s: %s", r.Outcome, r.Why)
	}
}

func TestNoVariantOfAnotherName(t *testing.T) {
	level := map[string]Level{}
	for _, c := range Clauses() {
		if level[c.ID] != "" {
			t.Errorf("%s is there twice", c.ID)
		}
		level[c.ID] = c.Level
	}
	for id := range variants {
		if level[id] != Must {
			t.Errorf("%s is no MUST", id)
		}
	}
	for id := range advice {
		if level[id] != Should {
			t.Errorf("%s is no SHOULD", id)
		}
	}
}

// Without its scene a clause is not run, and says what it needs.
func TestWithoutScenesNothingIsPretended(t *testing.T) {
	o := newFake().serve(t)
	o = Options{Socket: o.Socket, Audience: o.Audience, Prompt: o.Prompt, Wait: o.Wait}
	for _, id := range []string{
		"workload-api/4.3/later-messages-are-whole", "workload-api/4.3/withdrawn-is-absent", "workload-api/5.2.1/no-identity-no-empty-answer",
		"jwt-svid/4/expired-refused", "bundle/4.2.2/use-set", "workload-api/6.2.2/federated-bundles",
	} {
		if r := outcome(t, o, id); r.Outcome != NotRun || !regexp.MustCompile(`^needs --`).MatchString(r.Why) {
			t.Errorf("%s: %s: %s", id, r.Outcome, r.Why)
		}
	}
	// One caller with one identity and no federation.
	f := newFake()
	f.ids = f.ids[:1]
	f.x509msg = nil
	o = f.serve(t)
	for _, id := range []string{"workload-api/6.2.1/the-identity-asked-for", "workload-api/5.2.1/hints-unique", "spiffe-id/2.3/supports-2048-bytes"} {
		if r := outcome(t, o, id); r.Outcome != NotRun {
			t.Errorf("%s: %s: %s", id, r.Outcome, r.Why)
		}
	}
}

// A caller whom nobody knows would see next to nothing: that is no conformance.
func TestRunWithoutIdentityIsNoPass(t *testing.T) {
	f := newFake()
	f.state = 2
	f.ids = nil
	o := f.serve(t)
	for _, id := range []string{"workload-api/1/x509-profile", "workload-api/1/jwt-profile"} {
		if r := outcome(t, o, id); r.Outcome != Fail {
			t.Errorf("%s: %s: %s", id, r.Outcome, r.Why)
		}
	}
}

func TestDisabledProfileIsNotJudged(t *testing.T) {
	f := newFake()
	f.unsupported = "JWT"
	o := f.serve(t)
	o.Disabled, o.JWTKey = []string{"jwt"}, nil
	results, err := Run(t.Context(), o, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range results {
		if r.Outcome == Fail {
			t.Errorf("%s: %s", r.ID, r.Why)
		}
	}
}

func TestEndpointThatDemandsTLS(t *testing.T) {
	f := newFake()
	f.makeAuthorities()
	o := f.serve(t, grpc.Creds(credentials.NewServerTLSFromCert(&tls.Certificate{Certificate: [][]byte{f.ca.Raw}, PrivateKey: f.caKey})))
	for id, want := range map[string]Outcome{
		"workload-endpoint/3/served-over-grpc": Fail, "workload-endpoint/3.1/tls-not-required": Fail,
		"workload-endpoint/3/missing-header-rejected": NotRun, "x509-svid/4.1/leaf-is-no-ca": NotRun,
	} {
		if r := outcome(t, o, id); r.Outcome != want {
			t.Errorf("%s: %s: %s", id, r.Outcome, r.Why)
		}
	}
}

func TestEndpointThatIsNoGRPC(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = c.Write([]byte("HTTP/1.1 400 Bad Request\r\n\r\n"))
			c.Close()
		}
	}()
	o := Options{Socket: "unix://" + socket, Prompt: time.Second}
	for id, want := range map[string]Outcome{"workload-endpoint/3/served-over-grpc": Fail, "workload-endpoint/3.1/tls-not-required": NotRun} {
		if r := outcome(t, o, id); r.Outcome != want {
			t.Errorf("%s: %s: %s", id, r.Outcome, r.Why)
		}
	}
	if _, err := Run(t.Context(), Options{Socket: "unix://" + socket + ".not"}, nil); !errors.Is(err, ErrUnreachable) {
		t.Error(err)
	}
}

func TestSocketAddresses(t *testing.T) {
	for _, good := range []string{"unix:///run/agent.sock", "tcp://127.0.0.1:8000", "tcp://[::1]:8000"} {
		if _, err := target(good); err != nil {
			t.Errorf("%s: %v", good, err)
		}
	}
	for _, bad := range []string{"", "/run/agent.sock", "unix:run/agent.sock", "unix://host/run/agent.sock", "unix:///s?x", "unix:///s#x", "tcp://localhost:8000", "tcp://127.0.0.1", "tcp://127.0.0.1:8000/foo", "http://127.0.0.1:8000"} {
		if _, err := target(bad); !errors.Is(err, ErrSocket) {
			t.Errorf("%s: %v", bad, err)
		}
	}
}

func TestRunEndsWithItsContext(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	o := newFake().serve(t)
	o.WithoutIdentity = func(context.Context) (Probe, error) { cancel(); return nil, ctx.Err() }
	if _, err := Run(ctx, o, nil); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}
