package server

import (
	"bytes"
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/health/grpc_health_v1"

	"github.com/rootlink/rootlink/internal/catalog"
	"github.com/rootlink/rootlink/internal/needs"
	"github.com/rootlink/rootlink/pkg/attest"
)

func (w *world) tryNew(bend func(*Config)) error {
	w.t.Helper()
	c := w.cfg
	if bend != nil {
		bend(&c)
	}
	s, err := New(w.t.Context(), c)
	if err == nil {
		s.Close()
	}
	return err
}

// TestBadTrustLeavesNothingBehind: a wrong path is found before keys and a
// database are made.
func TestBadTrustLeavesNothingBehind(t *testing.T) {
	w := newWorld(t, nil)
	for name, bend := range map[string]func(*Config){
		"EK roots": func(c *Config) { c.EKRoots = []string{"nofile"} },
		"EK allow": func(c *Config) { c.EKAllow = "nofile" },
		"EK deny":  func(c *Config) { c.EKDeny = "nofile" },
		"CA":       func(c *Config) { c.AttestationCACert, c.AttestationCAKey = "nofile", "nofile" },
	} {
		dir := filepath.Join(w.dir, "new")
		err := w.tryNew(func(c *Config) { bend(c); c.DataDir = dir; c.AdminSocket = filepath.Join(w.dir, "new.sock") })
		refused, ok := errors.AsType[*catalog.ConfigureError](err)
		if !ok || refused.Hint == "" {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := os.Lstat(dir); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s: the data directory was made: %v", name, err)
		}
	}
}

func TestRefusesDataDirectoryInUse(t *testing.T) {
	w := newWorld(t, nil)
	if err := w.tryNew(nil); !errors.Is(err, ErrInUse) {
		t.Fatal(err)
	}
	if err := w.tryNew(func(c *Config) { c.DataDir = filepath.Join(w.dir, "other"); c.AdminSocket = w.srv.AdminSocket() }); !errors.Is(err, ErrInUse) {
		t.Fatal(err)
	}
	// The server that runs has lost nothing by it.
	bundleOf(t, w.admin)
}

func TestRefusesSocketOrDirectoryOfSomebodyElse(t *testing.T) {
	needs.Root(t)
	w := newWorld(t, nil)
	w.stop()
	sock := filepath.Join(w.dir, "sock")
	l, err := net.Listen("unix", sock)
	if err != nil {
		t.Fatal(err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	l.Close()
	if err := os.Chown(sock, 65534, 65534); err != nil {
		t.Fatal(err)
	}
	if err := w.tryNew(func(c *Config) { c.AdminSocket = sock }); !errors.Is(err, ErrForeignOwner) {
		t.Fatal(err)
	}
	if _, err := os.Lstat(sock); err != nil {
		t.Fatal("somebody else's socket was removed")
	}
	if err := os.Chown(w.cfg.DataDir, 65534, 65534); err != nil {
		t.Fatal(err)
	}
	if err := w.tryNew(nil); !errors.Is(err, ErrForeignOwner) {
		t.Fatal(err)
	}
}

func TestRefusesFileInPlaceOfTheSocket(t *testing.T) {
	w := newWorld(t, nil)
	w.stop()
	file := filepath.Join(w.dir, "notes.txt")
	if err := os.WriteFile(file, []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := w.tryNew(func(c *Config) { c.AdminSocket = file }); err == nil {
		t.Fatal("started over a file")
	}
	if b, err := os.ReadFile(file); err != nil || string(b) != "mine" {
		t.Fatal("the file was touched")
	}
}

func TestStaleSocketIsReplaced(t *testing.T) {
	w := newWorld(t, nil)
	w.stop()
	if _, err := os.Lstat(w.srv.AdminSocket()); err == nil {
		t.Error("the socket is left behind")
	}
	l, err := net.Listen("unix", w.srv.AdminSocket())
	if err != nil {
		t.Fatal(err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	l.Close() // as a server that was killed leaves it
	w.start()
	fi, err := os.Lstat(w.srv.AdminSocket())
	if err != nil || fi.Mode().Perm() != 0o600 {
		t.Fatal(fi, err)
	}
	bundleOf(t, w.admin)
}

// The longest path that the system allows works, although the socket is first
// bound under a longer one.
func TestLongestSocketPath(t *testing.T) {
	w := newWorld(t, nil)
	w.stop()
	w.cfg.AdminSocket = filepath.Join(w.dir, strings.Repeat("s", 107-len(w.dir)-1))
	w.start()
	bundleOf(t, w.admin)
}

func TestRefusesLooseFiles(t *testing.T) {
	w := newWorld(t, nil)
	w.stop()
	for _, name := range []string{"trust.key", "server.db", "."} {
		path := filepath.Join(w.cfg.DataDir, name)
		fi, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, fi.Mode().Perm()|0o066); err != nil {
			t.Fatal(err)
		}
		if err := w.tryNew(nil); err == nil {
			t.Errorf("started with %s open to others", name)
		}
		if err := os.Chmod(path, fi.Mode().Perm()); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.tryNew(nil); err != nil {
		t.Fatal(err)
	}
}

// A key that is lost is said, never replaced: with another trust key every
// join line would be void, with another authority every SVID.
func TestRefusesToReplaceLostKeys(t *testing.T) {
	for _, pattern := range []string{"trust.key", "authority-*.key"} {
		t.Run(pattern, func(t *testing.T) {
			w := newWorld(t, nil)
			w.stop()
			names, err := filepath.Glob(filepath.Join(w.cfg.DataDir, pattern))
			if err != nil || len(names) != 1 {
				t.Fatal(names, err)
			}
			if err := os.Remove(names[0]); err != nil {
				t.Fatal(err)
			}
			if err := w.tryNew(nil); err == nil {
				t.Fatal("started")
			}
		})
	}
}

func TestRestartKeepsEverything(t *testing.T) {
	w := newWorld(t, nil)
	n := w.attest(w.newTPM(), attestOptions{})
	step := w.create(entry(n.id, "/build", stepSelectorsOf("go")...))
	join, bundle := w.srv.JoinLine(), bundleOf(t, w.admin)
	cas := w.srv.AttestationCAs()
	w.stop()
	w.start()
	if w.srv.JoinLine() != join {
		t.Error("another join line")
	}
	if after := bundleOf(t, w.admin); !bytes.Equal(after.X509Authorities[0].Asn1, bundle.X509Authorities[0].Asn1) || after.SequenceNumber != bundle.SequenceNumber {
		t.Error("another bundle")
	}
	if !w.srv.AttestationCAs()[0].Equal(cas[0]) {
		t.Error("another attestation CA")
	}
	n.conn = w.dialTCP(n.tlsCert())
	if _, err := n.sign(step, n.csr(n.step("/build"))); err != nil {
		t.Fatalf("the agent of before is not known: %v", err)
	}
}

func TestConfigErrors(t *testing.T) {
	w := newWorld(t, nil)
	w.stop()
	for name, bend := range map[string]func(*Config){
		"no trust domain":        func(c *Config) { c.TrustDomain = "" },
		"trust domain":           func(c *Config) { c.TrustDomain = "Example Org" },
		"no data directory":      func(c *Config) { c.DataDir = "" },
		"listen":                 func(c *Config) { c.Listen = "8081" },
		"socket path":            func(c *Config) { c.AdminSocket = "/" + strings.Repeat("a", 200) },
		"CA without its key":     func(c *Config) { c.AttestationCACert = "ca.pem" },
		"pattern":                func(c *Config) { c.EvidencePatterns = []string{"web"} },
		"PCR 16":                 func(c *Config) { c.QuotePCRs = []attest.PCRSelection{{Bank: "sha256", Indices: []uint32{16}}} },
		"SHA-1":                  func(c *Config) { c.QuotePCRs = []attest.PCRSelection{{Bank: "sha1", Indices: []uint32{7}}} },
		"TTL over the authority": func(c *Config) { c.X509TTL = c.AuthorityTTL + 400*24*time.Hour },
		"issuer TTL":             func(c *Config) { c.IssuerTTL = time.Hour },
		"negative TTL":           func(c *Config) { c.AgentTTL = -1 },
	} {
		t.Run(name, func(t *testing.T) {
			if err := w.tryNew(bend); !errors.Is(err, ErrConfig) {
				t.Fatal(err)
			}
		})
	}
}

func TestHealth(t *testing.T) {
	w := newWorld(t, nil)
	check := func() grpc_health_v1.HealthCheckResponse_ServingStatus {
		t.Helper()
		r, err := grpc_health_v1.NewHealthClient(w.admin).Check(t.Context(), new(grpc_health_v1.HealthCheckRequest))
		if err != nil {
			t.Fatal(err)
		}
		return r.Status
	}
	if s := check(); s != grpc_health_v1.HealthCheckResponse_SERVING {
		t.Fatal(s)
	}
	w.clock.add(2 * DefaultAuthorityTTL)
	if s := check(); s != grpc_health_v1.HealthCheckResponse_NOT_SERVING {
		t.Fatal("healthy with an authority that has expired")
	}
}

// A port that is taken leaves the data directory free for the next try.
func TestFailedStartReleasesEverything(t *testing.T) {
	w := newWorld(t, nil)
	w.stop()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if err := w.tryNew(func(c *Config) { c.Listen = l.Addr().String() }); err == nil {
		t.Fatal("listens on a taken port")
	}
	if err := w.tryNew(nil); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if s, err := New(ctx, w.cfg); err == nil {
		s.Close()
	}
	if err := w.tryNew(nil); err != nil {
		t.Fatal(err)
	}
}
