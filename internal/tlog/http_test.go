package tlog_test

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/rootlink/rootlink/internal/forge"
	"github.com/rootlink/rootlink/internal/tlog"
	pub "github.com/rootlink/rootlink/pkg/tlog"
)

// server is a log behind its handler, for SVIDs of one signer.
type server struct {
	url    string
	log    *tlog.Log
	dir    string
	signer *signer
}

func newServer(t *testing.T) *server {
	dir := t.TempDir()
	s := &server{log: open(t, dir), dir: dir, signer: newSigner(t)}
	web := httptest.NewServer(s.log.Handler(tlog.HandlerConfig{
		Accept: func(c *x509.Certificate) (string, error) {
			if !c.Equal(s.signer.cert) {
				return "", errors.New("a stranger")
			}
			return "spiffe://example.org/signer", nil
		},
		Now: func() time.Time { return forge.Epoch() }, // no token comes back
	}))
	t.Cleanup(web.Close)
	s.url = web.URL
	return s
}

func writeRequest(t *testing.T, s *signer, what string) string {
	t.Helper()
	digest := sha256.Sum256([]byte(what))
	sig, err := s.key.Sign(rand.Reader, digest[:], crypto.SHA256)
	if err != nil {
		t.Fatal(err)
	}
	return requestOf(digest[:], sig, s.cert.Raw)
}

func requestOf(digest, sig, cert []byte) string {
	j := func(b []byte) string { out, _ := json.Marshal(b); return string(out) }
	return fmt.Sprintf(`{"hashedRekordRequestV002":{"digest":%s,"signature":{"content":%s,"verifier":{"keyDetails":"PKIX_ECDSA_P256_SHA_256","x509Certificate":{"rawBytes":%s}}}}}`,
		j(digest), j(sig), j(cert))
}

func (s *server) post(t *testing.T, body string) (int, string) {
	t.Helper()
	resp, err := http.Post(s.url+"/api/v2/log/entries", "application/json", strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	return read(t, resp)
}

func (s *server) get(t *testing.T, path string) (int, string) {
	t.Helper()
	resp, err := http.Get(s.url + path)
	if err != nil {
		t.Fatal(err)
	}
	return read(t, resp)
}

func read(t *testing.T, resp *http.Response) (int, string) {
	t.Helper()
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(b)
}

func TestHandlerWritesAndReads(t *testing.T) {
	s := newServer(t)
	req := writeRequest(t, s.signer, "statement")
	code, first := s.post(t, req)
	if code != http.StatusCreated {
		t.Fatal(code, first)
	}
	e, err := pub.ParseEntry([]byte(first))
	if err != nil {
		t.Fatal(err)
	}
	entry, err := pub.ParseBody(e.CanonicalizedBody)
	if err != nil {
		t.Fatal(err)
	}
	body, err := pub.EntryBody(sha256.Sum256([]byte("statement")), entry.Signature, s.signer.cert)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := pub.Verify(e, body, []pub.Log{s.log.Info()}, nil); err != nil {
		t.Error(err)
	}
	if code, second := s.post(t, req); code != http.StatusCreated || second != first {
		t.Errorf("the same again: %d %s", code, second)
	}

	// What is served is a log that anybody can check.
	src, err := tlog.FromURL(s.url)
	if err != nil {
		t.Fatal(err)
	}
	cp, _, err := tlog.CheckTree(t.Context(), src, s.log.Info(), nil, nil)
	if err != nil || cp.Size != 1 {
		t.Errorf("%v, %+v", err, cp)
	}

	ca := forge.NewAttestationCA(t, nil)
	digest := sha256.Sum256(ca.Cert.Raw)
	sig, err := ca.Key.Sign(rand.Reader, digest[:], crypto.SHA256)
	if err != nil {
		t.Fatal(err)
	}
	caBody, err := pub.CertificateBody(ca.Cert, sig, ca.Cert)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.log.Integrate(t.Context(), caBody); err != nil {
		t.Fatal(err)
	}
	code, text := s.get(t, "/proof/"+hex.EncodeToString(digest[:]))
	if e, err = pub.ParseEntry([]byte(text)); code != http.StatusOK || err != nil {
		t.Fatal(code, text, err)
	}
	if _, err := pub.VerifyCertificate(e, ca.Cert, ca.Cert, []pub.Log{s.log.Info()}, nil); err != nil {
		t.Error(err)
	}
}

func TestRefusesRequests(t *testing.T) {
	s := newServer(t)
	good := writeRequest(t, s.signer, "statement")
	digest := sha256.Sum256([]byte("statement"))
	for name, c := range map[string]struct {
		body string
		code int
	}{
		"nothing":                        {"", 400},
		"garbage":                        {"garbage", 400},
		"another kind":                   {`{"dsseRequestV002":{}}`, 400},
		"an unknown key":                 {`{"x":1,` + good[1:], 400},
		"a duplicate key":                {good[:len(good)-1] + `,"HASHEDREKORDREQUESTV002":{}}`, 400},
		"two values":                     {good + good, 400},
		"cut short":                      {good[:len(good)-1], 400},
		"nested deeply":                  {strings.Repeat(`{"a":`, 100), 400},
		"another algorithm":              {strings.Replace(good, "P256", "P384", 1), 400},
		"a signature for another digest": {requestOf(make([]byte, 32), []byte("not a signature"), s.signer.cert.Raw), 400},
		"a short digest":                 {requestOf(digest[:31], []byte("signature"), s.signer.cert.Raw), 400},
		"no certificate":                 {requestOf(digest[:], []byte("signature"), nil), 400},
		"a stranger":                     {writeRequest(t, newSigner(t), "statement"), 403},
		"an endless request":             {good + strings.Repeat(" ", 1<<20), 413},
	} {
		if code, text := s.post(t, c.body); code != c.code {
			t.Errorf("%s: %d, want %d: %s", name, code, c.code, text)
		}
	}
	for path, want := range map[string]int{
		"/proof/" + strings.Repeat("0", 64):    404,
		"/proof/" + strings.Repeat("A", 64):    400,
		"/proof/00":                            400,
		"/tile/0/000":                          404,
		"/tile/0/000.p/0":                      404,
		"/tile/0/0":                            404,
		"/tile/00/000.p/1":                     404,
		"/tile/../../log.key":                  404,
		"/tile/..%2f..%2flog.key":              404,
		"/tile/entries/..%2f..%2f..%2flog.key": 404,
		"/.state/treeState":                    404,
		"/.lock":                               404,
		"/":                                    404,
	} {
		if code, text := s.get(t, path); code != want {
			t.Errorf("%s: %d, want %d: %.200s", path, code, want, text)
		}
	}
	if code, _ := s.get(t, "/checkpoint"); code != 200 {
		t.Errorf("checkpoint: %d", code)
	}
	if cp, _, err := tlog.CheckTree(t.Context(), tlog.FromDir(s.dir), s.log.Info(), nil, nil); err != nil || cp.Size != 0 {
		t.Errorf("something was written: %v %+v", err, cp)
	}
}

// One stolen SVID must not fill the disk.
func TestRefusesFloods(t *testing.T) {
	s := newServer(t)
	reqs := make(chan string, 220)
	for i := range cap(reqs) {
		reqs <- writeRequest(t, s.signer, fmt.Sprint("statement ", i))
	}
	close(reqs)
	var limited atomic.Int32
	var wg sync.WaitGroup
	for range 20 { // for one checkpoint holds many
		wg.Go(func() {
			for req := range reqs {
				if code, _ := s.post(t, req); code == http.StatusTooManyRequests {
					limited.Add(1)
				}
			}
		})
	}
	wg.Wait()
	if n := limited.Load(); n != 20 {
		t.Errorf("%d of 220 were refused, want 20", n)
	}
}

// What is in the log anybody can send again.
func TestRefusesToCountReplaysAgainstTheSigner(t *testing.T) {
	s := newServer(t)
	req := writeRequest(t, s.signer, "statement")
	for range 220 {
		if code, body := s.post(t, req); code != http.StatusCreated {
			t.Fatalf("%d %s", code, body)
		}
	}
	if code, body := s.post(t, writeRequest(t, s.signer, "another")); code != http.StatusCreated {
		t.Errorf("the signer may write no more: %d %s", code, body)
	}
}

// While witnesses are away nothing is published, and who asks for the proof of
// what the tiles show already would wait for it.
func TestRefusesToLetManyWaitForProofs(t *testing.T) {
	w := &forge.WitnessServer{LogWitness: forge.NewLogWitness(t, "witness.example.com", time.Now())}
	witness := httptest.NewServer(w)
	defer witness.Close()
	c := config(t.TempDir())
	c.WitnessPolicy = fmt.Appendf(nil, "witness one %s %s\nquorum one\n", w.Info().Key, witness.URL)
	l, err := tlog.Open(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	w.Away.Store(true)
	ca := forge.P256(t)
	cert := forge.Sign(t, &x509.Certificate{NotBefore: forge.Epoch(), NotAfter: forge.Epoch().AddDate(1, 0, 0), IsCA: true, BasicConstraintsValid: true}, nil, ca.Public(), ca)
	digest := sha256.Sum256(cert.Raw)
	sig, err := ca.Sign(rand.Reader, digest[:], crypto.SHA256)
	if err != nil {
		t.Fatal(err)
	}
	body, err := pub.EntryBody(digest, sig, cert)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := l.Integrate(t.Context(), body); err != nil {
		t.Fatal(err)
	}
	h := l.Handler(tlog.HandlerConfig{})
	ask := func() int {
		rec := httptest.NewRecorder()
		h.ServeHTTP(rec, httptest.NewRequestWithContext(t.Context(), "GET", fmt.Sprintf("/proof/%x", digest), nil))
		return rec.Code
	}
	begun := time.Now()
	var wg sync.WaitGroup
	for range 300 {
		wg.Go(func() {
			if code := ask(); code != http.StatusServiceUnavailable {
				t.Errorf("status %d", code)
			}
		})
	}
	wg.Wait()
	if took := time.Since(begun); took > 10*time.Second {
		t.Errorf("they waited %v", took)
	}
}

func FuzzRequest(f *testing.F) {
	key := newSigner(f)
	digest := sha256.Sum256([]byte("statement"))
	sig, err := key.key.Sign(rand.Reader, digest[:], crypto.SHA256)
	if err != nil {
		f.Fatal(err)
	}
	f.Add([]byte(requestOf(digest[:], sig, key.cert.Raw)))
	f.Add([]byte(`{"hashedRekordRequestV002":{"signature":{}}}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		body, cert, err := tlog.ReadRequest(raw)
		if err != nil {
			return
		}
		e, err := pub.ParseBody(body)
		if err != nil || !e.Certificate.Equal(cert) || e.CheckSignature() != nil {
			t.Fatalf("%v: %s", err, body)
		}
		if !bytes.Contains(raw, []byte("hashedRekordRequestV002")) {
			t.Fatal("something else passed")
		}
	})
}
