package tsa_test

import (
	"bytes"
	"crypto"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"io/fs"
	"log/slog"
	"math/big"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	digitorus "github.com/digitorus/timestamp"

	"github.com/sigstore/timestamp-authority/v2/pkg/verification"

	"github.com/rootlink/rootlink/internal/needs"
	"github.com/rootlink/rootlink/internal/tsa"
	"github.com/rootlink/rootlink/pkg/timestamp"
)

var signature = []byte("a signature over the statement")

// clock is a time that a test moves; the library puts the machine's own time
// into tokens too, so that it starts near that.
type clock struct{ now time.Time }

func (c *clock) Now() time.Time { return c.now }

func open(tb testing.TB, dir string, c *clock) *tsa.Authority {
	tb.Helper()
	a, err := tsa.Open(tsa.Config{Dir: dir, Name: "example.org", Now: c.Now, Log: slog.New(slog.NewTextHandler(tb.Output(), nil))})
	if err != nil {
		tb.Fatal(err)
	}
	return a
}

func query(tb testing.TB, nonce *big.Int) []byte {
	tb.Helper()
	q, err := timestamp.Request(signature, nonce)
	if err != nil {
		tb.Fatal(err)
	}
	return q
}

func answer(tb testing.TB, a *tsa.Authority, q []byte) []byte {
	tb.Helper()
	out, err := a.Answer(q)
	if err != nil {
		tb.Fatal(err)
	}
	return out
}

func verify(tb testing.TB, raw []byte, as []timestamp.Authority) timestamp.Verified {
	tb.Helper()
	tok, err := timestamp.Parse(raw)
	if err != nil {
		tb.Fatal(err)
	}
	v, err := tok.Verify(signature, as)
	if err != nil {
		tb.Fatal(err)
	}
	return v
}

func TestAnswer(t *testing.T) {
	c := &clock{time.Now()}
	a := open(t, t.TempDir(), c)
	nonce := big.NewInt(99)
	raw := answer(t, a, query(t, nonce))
	tok, err := timestamp.Parse(raw)
	if err != nil {
		t.Fatal(err)
	}
	if err := tok.Answers(signature, nonce); err != nil {
		t.Error(err)
	}
	for _, x := range a.Authorities() {
		if err := x.Validate(); err != nil {
			t.Error(err)
		}
	}
	v := verify(t, raw, a.Authorities())
	if v.Accuracy != time.Second || v.Time.After(c.now) || c.now.Sub(v.Time) >= time.Second {
		t.Errorf("%v of %v", v.Time, c.now)
	}
	if other := verify(t, answer(t, a, query(t, nonce)), a.Authorities()); other.Serial.Cmp(v.Serial) == 0 || v.Serial.BitLen() < 64 {
		t.Error("serial numbers", v.Serial, other.Serial)
	}
}

// Who asks for no certificate gets none, RFC 3161, 2.4.1.
func TestCertReq(t *testing.T) {
	a := open(t, t.TempDir(), &clock{time.Now()})
	q := query(t, nil)
	with := answer(t, a, q)
	q = bytes.TrimSuffix(q, []byte{1, 1, 0xff})
	q[1] -= 3
	without := answer(t, a, q)
	if len(without) >= len(with)-300 {
		t.Errorf("%d bytes with, %d without", len(with), len(without))
	}
	verify(t, without, a.Authorities())
}

func TestPeers(t *testing.T) {
	dir := t.TempDir()
	a := open(t, dir, &clock{time.Now()})
	raw := answer(t, a, query(t, nil))
	chain := a.Authorities()[0].Chain
	for name, leaf := range map[string]*x509.Certificate{"pinned": chain[0], "embedded": nil} {
		if _, err := verification.VerifyTimestampResponse(raw, bytes.NewReader(signature), verification.VerifyOpts{
			TSACertificate: leaf, Roots: chain[1:],
		}); err != nil {
			t.Errorf("Sigstore, certificate %s: %v", name, err)
		}
	}
	openssl, err := exec.LookPath("openssl")
	if err != nil {
		needs.Missing(t, "no openssl: %v", err)
	}
	for name, b := range map[string][]byte{
		"data": signature, "token.tsr": raw,
		"root.pem": pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: chain[1].Raw}),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, policy := range [][]string{nil, {"-queryfile", "q.tsq"}} {
		if policy != nil {
			if err := os.WriteFile(filepath.Join(dir, "q.tsq"), query(t, nil), 0o600); err != nil {
				t.Fatal(err)
			}
		} else {
			policy = []string{"-data", "data"}
		}
		cmd := exec.Command(openssl, append([]string{"ts", "-verify", "-in", "token.tsr", "-CAfile", "root.pem"}, policy...)...)
		cmd.Dir = dir
		if out, err := cmd.CombinedOutput(); err != nil || !bytes.Contains(out, []byte("Verification: OK")) {
			t.Errorf("openssl %v: %v\n%s", policy, err, out)
		}
	}
}

// What is wrong is said in the answer, RFC 3161, 2.4.2.
func TestRefusesBadRequests(t *testing.T) {
	c := &clock{time.Now()}
	a := open(t, t.TempDir(), c)
	request := func(r digitorus.Request) []byte {
		r.HashedMessage = make([]byte, r.HashAlgorithm.Size())
		raw, err := r.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		return raw
	}
	version2 := query(t, nil)
	version2[bytes.Index(version2, []byte{2, 1, 1})+2] = 2
	for name, x := range map[string]struct {
		query []byte
		info  digitorus.FailureInfo
	}{
		"nothing":        {nil, digitorus.BadDataFormat},
		"no DER":         {[]byte("GET / HTTP/1.1"), digitorus.BadDataFormat},
		"trailing bytes": {append(query(t, nil), 0), digitorus.BadDataFormat},
		"version 2":      {version2, digitorus.BadRequest},
		"SHA-1":          {request(digitorus.Request{HashAlgorithm: crypto.SHA1}), digitorus.BadAlgorithm},
		"other policy":   {request(digitorus.Request{HashAlgorithm: crypto.SHA256, TSAPolicyOID: asn1.ObjectIdentifier{1, 2, 3}}), digitorus.UnacceptedPolicy},
		"extension": {
			request(digitorus.Request{HashAlgorithm: crypto.SHA256, ExtraExtensions: []pkix.Extension{{Id: asn1.ObjectIdentifier{1, 2, 3}, Value: []byte{5, 0}}}}),
			digitorus.UnacceptedExtension,
		},
	} {
		t.Run(name, func(t *testing.T) { refusedWith(t, answer(t, a, x.query), x.info) })
	}
	for _, hash := range []crypto.Hash{crypto.SHA256, crypto.SHA384, crypto.SHA512} {
		if _, err := timestamp.Parse(answer(t, a, request(digitorus.Request{HashAlgorithm: hash, TSAPolicyOID: tsa.Policy()}))); err != nil {
			t.Errorf("%v: %v", hash, err)
		}
	}
}

func refusedWith(t *testing.T, raw []byte, info digitorus.FailureInfo) {
	t.Helper()
	_, err := timestamp.Parse(raw)
	var s *timestamp.StatusError
	if !errors.As(err, &s) || s.Status != 2 || len(s.Info) != 1 || s.Info[0] != int(info) {
		t.Errorf("%v, want rejection with bit %d", err, info)
	}
}

// A clock that is turned back would stamp into the past.
func TestRefusesToStampThePast(t *testing.T) {
	c := &clock{time.Now()}
	dir := t.TempDir()
	a := open(t, dir, c)
	verify(t, answer(t, a, query(t, nil)), a.Authorities())
	c.now = c.now.Add(-500 * time.Millisecond) // within the accuracy
	verify(t, answer(t, a, query(t, nil)), a.Authorities())
	c.now = c.now.Add(-10 * time.Second)
	refusedWith(t, answer(t, a, query(t, nil)), digitorus.TimeNotAvailable)
	c.now = c.now.Add(-time.Hour) // before the certificate
	refusedWith(t, answer(t, open(t, dir, c), query(t, nil)), digitorus.TimeNotAvailable)
}

func TestHTTP(t *testing.T) {
	a := open(t, t.TempDir(), &clock{time.Now()})
	post := func(method, contentType string, body []byte) *httptest.ResponseRecorder {
		w := httptest.NewRecorder()
		r := httptest.NewRequest(method, "/tsa", bytes.NewReader(body))
		if contentType != "" {
			r.Header.Set("Content-Type", contentType)
		}
		a.ServeHTTP(w, r)
		return w
	}
	w := post(http.MethodPost, timestamp.QueryType, query(t, nil))
	if w.Code != http.StatusOK || w.Header().Get("Content-Type") != timestamp.ReplyType {
		t.Error(w.Code, w.Header())
	}
	verify(t, w.Body.Bytes(), a.Authorities())
	w = post(http.MethodPost, timestamp.QueryType, []byte("x"))
	if w.Code != http.StatusOK || w.Header().Get("Content-Type") != timestamp.ReplyType {
		t.Error("a refusal has", w.Code, w.Header())
	}
	refusedWith(t, w.Body.Bytes(), digitorus.BadDataFormat)
	for _, x := range []struct {
		method, contentType string
		body                []byte
		code                int
	}{
		{http.MethodGet, timestamp.QueryType, nil, http.StatusMethodNotAllowed},
		{http.MethodPost, "", query(t, nil), http.StatusUnsupportedMediaType},
		{http.MethodPost, "application/json", query(t, nil), http.StatusUnsupportedMediaType},
		{http.MethodPost, timestamp.QueryType, make([]byte, timestamp.MaxQuery+1), http.StatusRequestEntityTooLarge},
	} {
		if w := post(x.method, x.contentType, x.body); w.Code != x.code {
			t.Errorf("%s %s: %d, want %d", x.method, x.contentType, w.Code, x.code)
		}
	}
}

func TestSurvivesRestartsAndRotates(t *testing.T) {
	c := &clock{time.Now()}
	dir := t.TempDir()
	a := open(t, dir, c)
	first := verify(t, answer(t, a, query(t, nil)), a.Authorities())
	old := answer(t, a, query(t, nil))
	a = open(t, dir, c)
	if as := a.Authorities(); len(as) != 1 || !as[0].Chain[0].Equal(first.Authority.Chain[0]) {
		t.Fatal("another certificate after a restart")
	}
	fi, err := os.Stat(filepath.Join(dir, tsa.KeyFile))
	if err != nil || fi.Mode().Perm() != 0o600 {
		t.Error(fi.Mode(), err)
	}
	maintain := func() {
		t.Helper()
		again, err := a.Maintain()
		if err != nil || !again.After(c.now) {
			t.Fatal(again, err)
		}
	}
	// The next key is known to verifiers long before it signs.
	c.now = first.Authority.End.Add(-59 * 24 * time.Hour)
	maintain()
	a = open(t, dir, c)
	known := a.Authorities()
	if len(known) != 2 || !known[1].Start.After(c.now) || !known[1].Start.Before(known[0].End) {
		t.Fatalf("%+v", known)
	}
	c.now = known[1].Start.Add(time.Hour)
	maintain()
	tok, err := timestamp.Parse(answer(t, a, query(t, nil)))
	if err != nil {
		t.Fatal(err)
	}
	// The library writes the machine's own time beside the one it was told, and
	// a certificate of next year did not hold then: all else must be well.
	if _, err := tok.Verify(signature, known[1:]); !errors.Is(err, timestamp.ErrSigner) {
		t.Error(err)
	}
	if _, err := tok.Verify(signature, known[:1]); !errors.Is(err, timestamp.ErrUnknownAuthority) {
		t.Error("the old key still signs:", err)
	}
	a = open(t, dir, c)
	v := verify(t, old, a.Authorities())
	if v.AuthorityID != first.AuthorityID {
		t.Error("a rotated authority is another")
	}
	if _, err := os.Lstat(filepath.Join(dir, "tsa-next.key")); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
	// Off for years.
	c.now = c.now.AddDate(3, 0, 0)
	a = open(t, dir, c)
	if as := a.Authorities(); len(as) != 3 || c.now.Before(as[2].Start) || c.now.After(as[2].End) {
		t.Errorf("%+v", as)
	}
}

// Making a new one in place of what is lost would void what verifiers trust.
func TestRefusesLostKey(t *testing.T) {
	c := &clock{time.Now()}
	for _, name := range []string{tsa.KeyFile, tsa.RootKeyFile, tsa.CertFile} {
		dir := t.TempDir()
		open(t, dir, c)
		if err := os.Remove(filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
		if _, err := tsa.Open(tsa.Config{Dir: dir, Now: c.Now}); !errors.Is(err, tsa.ErrIncomplete) {
			t.Errorf("without %s: %v", name, err)
		}
	}
	one, other := t.TempDir(), t.TempDir()
	open(t, one, c)
	open(t, other, c)
	for _, name := range []string{tsa.KeyFile, tsa.RootKeyFile} {
		b, err := os.ReadFile(filepath.Join(other, name))
		if err != nil {
			t.Fatal(err)
		}
		was, err := os.ReadFile(filepath.Join(one, name))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(one, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := tsa.Open(tsa.Config{Dir: one, Now: c.Now}); !errors.Is(err, tsa.ErrIncomplete) {
			t.Errorf("another's %s: %v", name, err)
		}
		if err := os.WriteFile(filepath.Join(one, name), was, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chmod(filepath.Join(one, tsa.KeyFile), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := tsa.Open(tsa.Config{Dir: one, Now: c.Now}); err == nil {
		t.Error("a key that everybody can read")
	}
}

// A stop at any moment of the first start loses nothing that was made.
func TestStoppedAtFirstStart(t *testing.T) {
	c := &clock{time.Now()}
	dir := t.TempDir()
	a := open(t, dir, c)
	id := a.Authorities()[0].Chain[1]
	for _, name := range []string{tsa.KeyFile, tsa.RootKeyFile} {
		if err := os.Rename(filepath.Join(dir, name), filepath.Join(dir, name+".new")); err != nil {
			t.Fatal(err)
		}
	}
	if a = open(t, dir, c); !a.Authorities()[0].Chain[1].Equal(id) {
		t.Error("certificates were written, and others made")
	}
	for _, name := range []string{tsa.KeyFile, tsa.RootKeyFile} {
		if err := os.Rename(filepath.Join(dir, name), filepath.Join(dir, name+".new")); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Remove(filepath.Join(dir, tsa.CertFile)); err != nil {
		t.Fatal(err)
	}
	open(t, dir, c)
}

func BenchmarkAnswer(b *testing.B) {
	a := open(b, b.TempDir(), &clock{time.Now()})
	q := query(b, big.NewInt(1<<62))
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if _, err := a.Answer(q); err != nil {
				b.Error(err)
			}
		}
	})
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "tokens/s")
}

// BenchmarkHTTP has the client on the same cores.
func BenchmarkHTTP(b *testing.B) {
	srv := httptest.NewServer(open(b, b.TempDir(), &clock{time.Now()}))
	defer srv.Close()
	q := query(b, big.NewInt(1<<62))
	client := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 64}}
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			resp, err := client.Post(srv.URL, timestamp.QueryType, bytes.NewReader(q))
			if err != nil {
				b.Error(err)
				return
			}
			var body bytes.Buffer
			if _, err := body.ReadFrom(resp.Body); err != nil || resp.StatusCode != http.StatusOK {
				b.Error(resp.Status, err)
			}
			resp.Body.Close()
		}
	})
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "tokens/s")
}
