//go:build bench

package fleet

import (
	"bytes"
	"context"
	"encoding/pem"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	"github.com/rootlink/rootlink/internal/forge"
	"github.com/rootlink/rootlink/internal/swtpmtest"
	"github.com/rootlink/rootlink/internal/swtpmtest/story"
)

const td = "bench.example"

// side is a server under test.
type side struct {
	t       *testing.T
	dir     string
	maker   *forge.Maker
	address string // where agents connect
	admin   *grpc.ClientConn
	pid     int
}

func newSide(t *testing.T, maker *forge.Maker) *side {
	dir, err := os.MkdirTemp("", "rlfleet")
	if err != nil {
		t.Fatal(err)
	}
	swtpmtest.AtDeath(t, `rm -rf "$1"`, dir)
	t.Cleanup(func() { os.RemoveAll(dir) })
	s := &side{t: t, dir: dir, maker: maker}
	s.write("roots.pem", string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: maker.Root.Raw})))
	return s
}

func (s *side) path(name string) string { return filepath.Join(s.dir, name) }

func (s *side) write(name, text string) {
	if err := os.WriteFile(s.path(name), []byte(text), 0o600); err != nil {
		s.t.Fatal(err)
	}
}

// ours starts rootlink-server. Each agent has an address of its own, so that its
// limits for one stay as they are, but for how often it attests.
func ours(t *testing.T, maker *forge.Maker) *side {
	s := newSide(t, maker)
	log := s.start("server", filepath.Join(bin, "rootlink-server"), "run", "--trust-domain", td, "--data-dir", s.path("data"),
		"--listen", "127.0.0.1:0", "--http-listen", "127.0.0.1:0", "--admin-socket", s.path("admin.sock"), "--ek-roots", s.path("roots.pem"),
		"--attest-rate", "100", "--attest-burst", "100", "--max-connections", "100000", "--log-level", "warn")
	ready := regexp.MustCompile(`ready: .*agents at (127\.0\.0\.1:[0-9]+)`)
	s.until(log, func() bool {
		m := ready.FindSubmatch(read(log))
		if m != nil {
			s.address = string(m[1])
		}
		return m != nil
	})
	s.dialAdmin()
	return s
}

// stock starts stock spire-server with our node attestor as a plugin, its rate
// limits off.
func stock(t *testing.T, maker *forge.Maker) *side {
	return stockAt(t, newSide(t, maker), nil)
}

// stockAt is stock, with other roots of TPM makers where they are given.
func stockAt(t *testing.T, s *side, roots []byte) *side {
	if roots != nil {
		s.write("roots.pem", string(roots))
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s.address = l.Addr().String()
	_, port, _ := net.SplitHostPort(s.address)
	l.Close()
	s.write("server.conf", fmt.Sprintf(`
server {
  bind_address = "127.0.0.1"
  bind_port = %q
  socket_path = %q
  trust_domain = %q
  data_dir = %q
  log_level = "WARN"
  ratelimit {
    attestation = false
    signing = false
  }
}
plugins {
  DataStore "sql" {
    plugin_data {
      database_type = "sqlite3"
      connection_string = %q
    }
  }
  KeyManager "memory" { plugin_data {} }
  NodeAttestor "tpmnode" {
    plugin_cmd = %q
    plugin_args = ["server"]
    plugin_data {
      ek_roots = [%q]
      data_dir = %q
    }
  }
}
`, port, s.path("admin.sock"), td, s.path("data"), s.path("server.sqlite3"), filepath.Join(bin, "rootlink-tpmnode"), s.path("roots.pem"), s.path("tpmnode")))
	log := s.start("spire-server", filepath.Join(spire, "spire-server"), "run", "-config", s.path("server.conf"))
	s.dialAdmin()
	s.until(log, func() bool {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		resp, err := healthpb.NewHealthClient(s.admin).Check(ctx, &healthpb.HealthCheckRequest{})
		return err == nil && resp.Status == healthpb.HealthCheckResponse_SERVING
	})
	return s
}

// start starts a daemon that ends with the test, and returns its log.
func (s *side) start(name, program string, args ...string) (log string) {
	s.t.Helper()
	log = s.path(name + ".log")
	f, err := os.Create(log)
	if err != nil {
		s.t.Fatal(err)
	}
	defer f.Close()
	cmd := exec.Command(program, args...)
	cmd.Stdout, cmd.Stderr, cmd.Dir = f, f, s.dir
	if err := cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	swtpmtest.AtDeath(s.t, `kill -KILL "$1"`, fmt.Sprint(cmd.Process.Pid))
	s.pid = cmd.Process.Pid
	done := make(chan struct{})
	go func() { defer close(done); _ = cmd.Wait() }()
	s.t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-done:
		case <-time.After(story.StopTimeout):
			_ = cmd.Process.Kill()
			<-done
		}
		if s.t.Failed() {
			text := read(log)
			s.t.Logf("--- %s\n%s", name, text[max(0, len(text)-4000):])
		}
	})
	return log
}

func read(name string) []byte {
	b, _ := os.ReadFile(name)
	return bytes.TrimSpace(b)
}

func (s *side) until(log string, ok func() bool) {
	s.t.Helper()
	if !story.Poll(story.StartTimeout, ok) {
		s.t.Fatalf("it never came true: %s", read(log))
	}
}

func (s *side) dialAdmin() {
	s.t.Helper()
	var err error
	s.admin, err = grpc.NewClient("unix:"+s.path("admin.sock"), grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithAuthority("localhost"))
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { s.admin.Close() })
}

// create makes entries and returns their IDs.
func (s *side) create(entries ...*types.Entry) (ids []string) {
	s.t.Helper()
	resp, err := entryv1.NewEntryClient(s.admin).BatchCreateEntry(s.t.Context(), &entryv1.BatchCreateEntryRequest{Entries: entries})
	if err != nil {
		s.t.Fatal(err)
	}
	for _, r := range resp.Results {
		if r.GetStatus().GetCode() != 0 {
			s.t.Fatalf("create entry: %s", r.GetStatus().GetMessage())
		}
		ids = append(ids, r.GetEntry().GetId())
	}
	return ids
}

// entry makes one from "type:value" selectors; parent and path without the
// trust domain.
func entry(parent, path string, selectors ...string) *types.Entry {
	e := &types.Entry{SpiffeId: &types.SPIFFEID{TrustDomain: td, Path: path}, ParentId: &types.SPIFFEID{TrustDomain: td, Path: parent}}
	for _, s := range selectors {
		typ, value, _ := strings.Cut(s, ":")
		e.Selectors = append(e.Selectors, &types.Selector{Type: typ, Value: value})
	}
	return e
}
