package main

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"

	"github.com/rootlink/rootlink/conformance/suite"
)

func try(t *testing.T, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	t.Setenv("SPIFFE_ENDPOINT_SOCKET", "")
	var out, errs bytes.Buffer
	code = run(t.Context(), args, &out, &errs)
	return code, out.String(), errs.String()
}

// hollow is an endpoint that implements nothing: it conforms to next to nothing.
func hollow(t *testing.T) string {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	srv := grpc.NewServer()
	workload.RegisterSpiffeWorkloadAPIServer(srv, workload.UnimplementedSpiffeWorkloadAPIServer{})
	done := make(chan struct{})
	go func() { defer close(done); _ = srv.Serve(l) }()
	t.Cleanup(func() { srv.Stop(); <-done })
	return "unix://" + socket
}

func write(t *testing.T, text string) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return name
}

func TestUsage(t *testing.T) {
	for _, args := range [][]string{
		{},
		{"--socket", "relative"},
		{"--socket", "tcp://localhost:1"},
		{"--output", "xml", "--socket", "unix:///s"},
		{"--disabled", "ssh"},
		{"--socket", "unix:///s", "--run", "("},
		{"--socket", "unix:///s", "more"},
		{"--socket", "unix:///s", "--run", "x", "--expect", "y"},
	} {
		if code, _, stderr := try(t, args...); code != exitUsage || stderr == "" {
			t.Errorf("%q: exit %d: %s", args, code, stderr)
		}
	}
	for _, args := range [][]string{
		{"--socket", "unix:///not/there.sock"},
		{"--socket", "unix:///s", "--bundle", "/not/there"},
		{"--socket", "unix:///s", "--jwt-key", write(t, "no key")},
		{"--socket", "unix:///s", "--expect", write(t, "no-such-clause because")},
	} {
		if code, _, stderr := try(t, args...); code != exitIO || stderr == "" {
			t.Errorf("%q: exit %d: %s", args, code, stderr)
		}
	}
}

func TestListNamesEachClause(t *testing.T) {
	code, out, _ := try(t, "--list")
	if code != exitOK || strings.Count(out, "\n") != len(suite.Clauses()) {
		t.Errorf("exit %d, %d lines of %d clauses", code, strings.Count(out, "\n"), len(suite.Clauses()))
	}
	if _, one, _ := try(t, "--list", "--run", "^x509-svid/4.1/leaf-is-no-ca$"); strings.Count(one, "\n") != 1 {
		t.Errorf("%s", one)
	}
}

// The README's figures are those of the program.
func TestReadmeCountsTheClauses(t *testing.T) {
	must := 0
	for _, c := range suite.Clauses() {
		if c.Level == suite.Must {
			must++
		}
	}
	readme, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		fmt.Sprintf("(%d MUST, %d SHOULD)", must, len(suite.Clauses())-must),
		fmt.Sprintf("passes all %d;", len(suite.Clauses())),
	} {
		if !strings.Contains(string(readme), want) {
			t.Errorf("README.md does not say %q", want)
		}
	}
}

func TestFailuresAndExpectedOnes(t *testing.T) {
	socket := hollow(t)
	code, out, _ := try(t, "--socket", socket, "--output", "json")
	var rep report
	if err := json.Unmarshal([]byte(out), &rep); err != nil {
		t.Fatal(err)
	}
	if code != exitFail || rep.Conforms || rep.Counts[suite.Fail] == 0 || rep.Counts[suite.NotRun] == 0 {
		t.Fatalf("exit %d: %v", code, rep.Counts)
	}
	var expect strings.Builder
	expect.WriteString("# a comment\n\n")
	for _, r := range rep.Results {
		if r.Outcome == suite.Fail {
			fmt.Fprintf(&expect, "%s  it implements nothing\n", r.ID)
		}
	}
	if code, out, _ := try(t, "--socket", socket, "--expect", write(t, expect.String())); code != exitOK || !strings.Contains(out, "expected: it implements nothing") {
		t.Errorf("exactly those: exit %d\n%s", code, out)
	}
	less := expect.String()[:strings.LastIndex(strings.TrimSpace(expect.String()), "\n")]
	if code, out, _ := try(t, "--socket", socket, "--expect", write(t, less)); code != exitFail || !strings.Contains(out, "is not expected to") {
		t.Errorf("one more than expected: exit %d\n%s", code, out)
	}
	more := expect.String() + "workload-endpoint/3/served-over-grpc  never\n"
	if code, out, _ := try(t, "--socket", socket, "--expect", write(t, more)); code != exitFail || !strings.Contains(out, "and does not") {
		t.Errorf("one less than expected: exit %d\n%s", code, out)
	}
	if code, _, _ := try(t, "--socket", socket, "--run", "^workload-endpoint/3/served-over-grpc$"); code != exitOK {
		t.Errorf("the clause that holds: exit %d", code)
	}
}

func TestDeviationLists(t *testing.T) {
	for _, bad := range []string{"x509-svid/4.1/leaf-is-no-ca", "x509-svid/4.1/leaf why", "workload-endpoint/7/reflection a SHOULD fails nobody", "x509-svid/4.1/leaf-is-no-ca a\nx509-svid/4.1/leaf-is-no-ca b"} {
		if _, err := readDeviations([]byte(bad)); !errors.Is(err, errDeviation) {
			t.Errorf("%q: %v", bad, err)
		}
	}
	files, err := filepath.Glob("../../deviations/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatal(files, err)
	}
	for _, name := range files {
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if d, err := readDeviations(b); err != nil || len(d) == 0 {
			t.Errorf("%s: %d, %v", name, len(d), err)
		}
	}
}

func TestKeys(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	sec1, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	for kind, der := range map[string][]byte{"PRIVATE KEY": pkcs8, "EC PRIVATE KEY": sec1} {
		got, err := readKey(write(t, string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}))))
		if err != nil || !key.Equal(got) {
			t.Errorf("%s: %v", kind, err)
		}
	}
	if _, err := readKey(write(t, string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: []byte("x")})))); !errors.Is(err, errJWTKey) {
		t.Error(err)
	}
}

// A command that does not start this program is no answer of a caller.
func TestWithoutIdentityMustBeThisProgram(t *testing.T) {
	for _, command := range []string{"false", "echo", "echo '{}' #"} {
		code, out, _ := try(t, "--socket", hollow(t), "--without-identity", command, "--run", "no-identity-no-empty-answer")
		if code != exitFail || strings.Contains(out, "pass  ") {
			t.Errorf("%s: exit %d\n%s", command, code, out)
		}
	}
}
