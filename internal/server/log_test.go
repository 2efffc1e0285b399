package server

import (
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/rootlink/rootlink/internal/forge"
	"github.com/rootlink/rootlink/internal/store"
	"github.com/rootlink/rootlink/internal/tlog"
	pub "github.com/rootlink/rootlink/pkg/tlog"
)

// logged proves that the log of w holds cert, put there by issuer.
func (w *world) logged(cert, issuer *x509.Certificate) {
	w.t.Helper()
	e, err := w.srv.CertificateProof(w.t.Context(), sha256.Sum256(cert.Raw))
	if err != nil {
		w.t.Fatal(err)
	}
	if _, err := pub.VerifyCertificate(e, cert, issuer, w.srv.Logs(), nil); err != nil {
		w.t.Error(err)
	}
}

func (w *world) audit() *tlog.Audit {
	w.t.Helper()
	a, err := tlog.RunAudit(w.t.Context(), tlog.FromDir(w.cfg.DataDir), w.srv.Logs()[0], nil, nil, time.Now())
	if err != nil {
		w.t.Fatal(err)
	}
	return a
}

func TestCertificatesAreLogged(t *testing.T) {
	w := newWorld(t, withLog)
	n := w.attest(forge.NewTPM(t, w.maker, forge.TPMOptions{}), attestOptions{})
	ak, err := x509.ParseCertificate(n.akCert)
	if err != nil {
		t.Fatal(err)
	}
	ca := w.srv.attestationCA.Certificate()
	w.logged(ak, ca)
	w.logged(ca, ca)
	if _, err := w.srv.authorities.rotate(t.Context()); err != nil {
		t.Fatal(err)
	}
	all := w.srv.authorities.set.Load().all
	if len(all) != 2 {
		t.Fatalf("%d authorities", len(all))
	}
	for _, a := range all {
		w.logged(a.Certificate, a.Certificate)
	}
	if w.srv.Logs()[0].Origin != "log."+td {
		t.Errorf("origin %s", w.srv.Logs()[0].Origin)
	}
	// A restart logs nothing again.
	w.stop()
	w.start()
	w.logged(ak, ca)
	if a := w.audit(); a.Checkpoint.Size != 4 || len(a.Alarms) != 0 {
		t.Errorf("%+v", a)
	}
}

// Killed after the record and before the log: the next start logs it.
func TestRecordedCertificateIsLoggedAfterACrash(t *testing.T) {
	w := newWorld(t, withLog)
	ca := w.srv.attestationCA
	cert := w.akCertificates(1)[0]
	body, err := ca.LogEntry(cert)
	if err != nil {
		t.Fatal(err)
	}
	digest := sha256.Sum256(cert.Raw)
	if err := w.srv.store.AddCertificates(t.Context(), []store.IssuedCertificate{{Digest: digest, Kind: store.CertAK, IssuedAt: w.clock.Now(), Body: body}}); err != nil {
		t.Fatal(err)
	}
	if _, err := w.srv.CertificateProof(t.Context(), digest); !errors.Is(err, tlog.ErrNotLogged) {
		t.Fatalf("got %v", err)
	}
	w.stop()
	w.start()
	w.logged(cert, ca.Certificate())
}

// akCertificates makes n AK certificates as the node attestor does.
func (w *world) akCertificates(n int) (out []*x509.Certificate) {
	w.t.Helper()
	tpm := forge.NewTPM(w.t, w.maker, forge.TPMOptions{})
	for range n {
		cert, err := w.srv.attestationCA.SignAK(forge.Statement(tpm, nil), tpm.AKKey(), w.clock.Now())
		if err != nil {
			w.t.Fatal(err)
		}
		out = append(out, cert)
	}
	return out
}

// 500 nodes that attest at once wait for a few commits and batches.
func TestStormOfCertificatesIsLogged(t *testing.T) {
	w := newWorld(t, func(c *Config) { withLog(c); c.Log = slog.New(slog.DiscardHandler) })
	const nodes = 500
	certs := w.akCertificates(nodes)
	start := time.Now()
	var wg sync.WaitGroup
	for _, c := range certs {
		wg.Go(func() {
			if err := w.srv.logAKCertificate(t.Context(), "agent", c); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	t.Logf("%d certificates recorded and logged in %v", nodes, time.Since(start).Round(time.Millisecond))
	w.logged(certs[nodes-1], w.srv.attestationCA.Certificate())
	list, err := store.ReadCertificates(t.Context(), filepath.Join(w.cfg.DataDir, "server.db"))
	if err != nil || len(list) != nodes+2 {
		t.Errorf("%d records (%v)", len(list), err)
	}
}

func TestLogOff(t *testing.T) {
	w := newWorld(t, nil)
	w.attest(forge.NewTPM(t, w.maker, forge.TPMOptions{}), attestOptions{})
	if _, err := w.srv.CertificateProof(t.Context(), [32]byte{}); !errors.Is(err, ErrNoLog) || w.srv.Logs() != nil || w.srv.LogHandler() != nil {
		t.Errorf("got %v, %v", err, w.srv.Logs())
	}
	// A log that begins later has the certificates of before.
	w.stop()
	w.cfg.NoTransparencyLog = false
	w.start()
	a := w.srv.authorities.set.Load().all[0].Certificate
	w.logged(a, a)
}

func TestRefusesLogWriters(t *testing.T) {
	w := newWorld(t, withLog)
	n := w.attest(forge.NewTPM(t, w.maker, forge.TPMOptions{}), attestOptions{})
	other := newWorld(t, withLog)
	foreign := other.attest(forge.NewTPM(t, other.maker, forge.TPMOptions{}), attestOptions{})
	if id, err := w.srv.acceptLogEntry(n.cert); err != nil || id != n.id {
		t.Errorf("%q, %v", id, err)
	}
	for name, cert := range map[string]*x509.Certificate{
		"of another trust root": foreign.cert,
		"an authority":          w.srv.authorities.set.Load().all[0].Certificate,
		"the attestation CA":    w.srv.attestationCA.Certificate(),
	} {
		if _, err := w.srv.acceptLogEntry(cert); err == nil {
			t.Errorf("%s may write", name)
		}
	}
	w.clock.add(2 * time.Hour)
	if _, err := w.srv.acceptLogEntry(n.cert); err == nil {
		t.Error("an expired SVID may write")
	}
	web := httptest.NewServer(w.srv.LogHandler())
	defer web.Close()
	resp, err := http.Get(web.URL + "/checkpoint")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if b, err := io.ReadAll(resp.Body); err != nil || resp.StatusCode != http.StatusOK || pub.UnverifiedOrigin(b) != "log."+td {
		t.Errorf("%v, %d: %s", err, resp.StatusCode, b)
	}
}
