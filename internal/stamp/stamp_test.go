package stamp

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"errors"
	"io"
	"math/big"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	digitorus "github.com/digitorus/timestamp"

	"github.com/rootlink/rootlink/internal/forge"
	"github.com/rootlink/rootlink/pkg/link"
	"github.com/rootlink/rootlink/pkg/timestamp"
	"github.com/rootlink/rootlink/pkg/tlog"
)

// signed is a bundle whose SVID is valid for life from now on.
func signed(t *testing.T, life time.Duration) (*link.Bundle, *forge.World) {
	t.Helper()
	w := forge.NewWorld(t)
	w.SVID = func(c *x509.Certificate) {
		c.NotBefore, c.NotAfter = time.Now().Add(-10*time.Second), time.Now().Add(life)
	}
	code := 0
	p, err := link.Prepare(&link.Statement{
		Step: "build", Command: []string{"true"}, Byproducts: link.Byproducts{ExitCode: &code},
		Subjects: []link.Resource{{Name: "a", Digest: map[string]string{"sha256": strings.Repeat("ab", 32)}}},
	})
	if err != nil {
		t.Fatal(err)
	}
	w.Leaf.Payload = p.Digest()
	b, err := p.Sign(w.SVIDKey, w.Issue(t, w.Make(t)))
	if err != nil {
		t.Fatal(err)
	}
	return b, w
}

// authority is an RFC 3161 server; bend may spoil its tokens.
func authority(t *testing.T, sig []byte, bend func(*forge.TokenSpec)) *httptest.Server {
	tsa := forge.NewTSA(t, func(c *x509.Certificate) {
		c.NotBefore, c.NotAfter = time.Now().AddDate(0, 0, -1), time.Now().AddDate(1, 0, 0)
	})
	return serve(t, func(w http.ResponseWriter, r *http.Request) {
		raw, err := io.ReadAll(r.Body)
		if err != nil {
			t.Error(err)
			return
		}
		q, err := digitorus.ParseRequest(raw)
		if err != nil || r.Method != http.MethodPost || r.Header.Get("Content-Type") != timestamp.QueryType || !q.Certificates || q.Nonce == nil {
			t.Errorf("the query: %v, %+v", err, q)
		}
		w.Header().Set("Content-Type", timestamp.ReplyType)
		w.Write(tsa.Token(t, sig, time.Now(), func(s *forge.TokenSpec) {
			s.Nonce = q.Nonce
			if bend != nil {
				bend(s)
			}
		}))
	})
}

func serve(t *testing.T, h http.HandlerFunc) *httptest.Server {
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	return s
}

// logServer is a log as the server publishes it; bend may spoil its answers.
func logServer(t *testing.T, b *link.Bundle, w *forge.World, bend func(path string, log *forge.Log, index uint64) []byte) *httptest.Server {
	log := forge.NewLog(t, "log.example.org")
	log.Fill(5)
	ak, err := x509.ParseCertificate(AKCertificate(b))
	if err != nil {
		t.Fatal(err)
	}
	akIndex := log.AppendCertificate(t, ak, w.CA.Cert, w.CA.Key)
	var mu sync.Mutex // guards log
	return serve(t, func(rw http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		index := akIndex
		if r.Method == http.MethodPost {
			var q entryRequest
			d := json.NewDecoder(r.Body)
			d.DisallowUnknownFields()
			if err := d.Decode(&q); err != nil || r.URL.Path != "/log/api/v2/log/entries" {
				t.Errorf("%s: %v", r.URL, err)
			}
			cert, err := x509.ParseCertificate(q.HashedRekord.Signature.Verifier.Certificate.RawBytes)
			if err != nil {
				t.Error(err)
				return
			}
			body, err := tlog.EntryBody([32]byte(q.HashedRekord.Digest), q.HashedRekord.Signature.Content, cert)
			if err != nil {
				t.Error(err)
			}
			index = log.Append(body)
			log.Fill(2)
		} else if r.URL.Path != "/log/proof/"+strings.TrimSuffix(strings.TrimPrefix(link.LogProofName(ak.Raw), "sha256-"), ".tlog.json") {
			http.NotFound(rw, r)
			return
		}
		rw.Header().Set("Content-Type", jsonType)
		if bend != nil {
			if raw := bend(r.Method, log, index); raw != nil {
				rw.Write(raw)
				return
			}
		}
		raw, err := tlog.MarshalEntry(log.Entry(index))
		if err != nil {
			t.Error(err)
		}
		rw.Write(raw)
	})
}

func quiet(what, url string, why error) {}

func complete(t *testing.T, b *link.Bundle, p Plan) *Outcome {
	t.Helper()
	c := NewClient()
	defer c.Close()
	c.attempt, c.grace = time.Second, 50*time.Millisecond
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	o, err := c.Complete(ctx, b, p, quiet)
	if err != nil {
		t.Fatal(err)
	}
	return o
}

func TestCompleteBundle(t *testing.T) {
	b, w := signed(t, time.Minute)
	one, two := authority(t, b.Signature(), nil), authority(t, b.Signature(), nil)
	log := logServer(t, b, w, nil)
	p := Plan{Timestamps: []string{one.URL, two.URL}, Needed: All, Log: log.URL + "/log/"}
	o := complete(t, b, p)
	if o.Err() != nil || len(o.Missing) != 0 || !o.Changed {
		t.Fatalf("%v, %v", o.Err(), o.Missing)
	}
	raw, err := o.Bundle.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	again, err := link.ParseBundle(raw)
	if err != nil {
		t.Fatal(err)
	}
	if len(again.Timestamps()) != 2 || len(again.LogEntries()) != 1 {
		t.Fatalf("%d tokens, %d entries", len(again.Timestamps()), len(again.LogEntries()))
	}
	e, err := tlog.ParseEntry(o.Proof)
	if err != nil {
		t.Fatal(err)
	}
	if entry, err := tlog.ParseBody(e.GetCanonicalizedBody()); err != nil || entry.Digest != sha256.Sum256(AKCertificate(b)) {
		t.Errorf("the proof: %v", err)
	}
	// Once more, when they are away: nothing changes, and nothing is lacking.
	one.Close()
	two.Close()
	log.Close()
	p.HaveProof = func(name string) bool { return name == o.ProofAs }
	if o := complete(t, again, p); o.Changed || o.Err() != nil || o.Proof != nil {
		t.Errorf("not left alone: %+v", o)
	}
}

func TestSomeAuthoritiesMayBeAway(t *testing.T) {
	b, _ := signed(t, time.Minute)
	good := authority(t, b.Signature(), nil)
	away := serve(t, func(w http.ResponseWriter, _ *http.Request) {
		http.Error(w, "in maintenance", http.StatusServiceUnavailable)
	})
	gone := serve(t, func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "no longer", http.StatusGone) })
	p := Plan{Timestamps: []string{away.URL, good.URL, gone.URL}, Needed: 1}
	o := complete(t, b, p)
	if o.Err() != nil || len(o.Missing) != 2 || len(o.Bundle.Timestamps()) != 1 {
		t.Fatalf("%v, %+v", o.Err(), o.Missing)
	}
	p.Needed = 2
	o = complete(t, b, p)
	if !errors.Is(o.Err(), ErrIncomplete) || !strings.Contains(o.Err().Error(), "in maintenance") || len(o.Bundle.Timestamps()) != 1 {
		t.Errorf("%v", o.Err())
	}
	// What was obtained is kept; the rest comes with the authority.
	back := authority(t, b.Signature(), nil)
	p.Timestamps = []string{back.URL, good.URL}
	if o = complete(t, o.Bundle, p); o.Err() != nil || len(o.Bundle.Timestamps()) != 2 {
		t.Errorf("%v, %d tokens", o.Err(), len(o.Bundle.Timestamps()))
	}
}

// A bundle with one authority's token gets the other's when that alone is named.
func TestOneMoreAuthority(t *testing.T) {
	b, _ := signed(t, time.Minute)
	own, second := authority(t, b.Signature(), nil), authority(t, b.Signature(), nil)
	o := complete(t, b, Plan{Timestamps: []string{own.URL}, Needed: 1})
	o = complete(t, o.Bundle, Plan{Timestamps: []string{second.URL}, Needed: 1})
	if o.Err() != nil || !o.Changed || len(o.Bundle.Timestamps()) != 2 {
		t.Errorf("%v, %d tokens", o.Err(), len(o.Bundle.Timestamps()))
	}
	if o = complete(t, o.Bundle, Plan{Timestamps: []string{second.URL}, Needed: 1}); o.Changed || o.Err() != nil {
		t.Errorf("asked once more: %+v", o)
	}
}

func TestAsksAgain(t *testing.T) {
	b, _ := signed(t, time.Minute)
	good := authority(t, b.Signature(), nil)
	var asked atomic.Int32
	flaky := serve(t, func(w http.ResponseWriter, r *http.Request) {
		if asked.Add(1) < 3 {
			http.Error(w, "later", http.StatusServiceUnavailable)
			return
		}
		good.Config.Handler.ServeHTTP(w, r)
	})
	if o := complete(t, b, Plan{Timestamps: []string{flaky.URL}, Needed: 1}); o.Err() != nil || asked.Load() != 3 {
		t.Errorf("%v after %d requests", o.Err(), asked.Load())
	}
}

// Two URLs of one authority are one witness.
func TestRefusesToCountOneAuthorityTwice(t *testing.T) {
	b, _ := signed(t, time.Minute)
	good := authority(t, b.Signature(), nil)
	o := complete(t, b, Plan{Timestamps: []string{good.URL, good.URL + "/again"}, Needed: 2})
	if !errors.Is(o.Err(), ErrIncomplete) || len(o.Bundle.Timestamps()) != 1 {
		t.Errorf("%v, %d tokens", o.Err(), len(o.Bundle.Timestamps()))
	}
}

func TestRefusesToStampAfterTheSVIDExpired(t *testing.T) {
	b, _ := signed(t, -time.Second)
	good := authority(t, b.Signature(), nil)
	c := NewClient()
	defer c.Close()
	if _, err := c.Complete(context.Background(), b, Plan{Timestamps: []string{good.URL}, Needed: 1}, quiet); !errors.Is(err, ErrTooLate) {
		t.Error(err)
	}
}

func TestRefusesHostileTimestampAnswers(t *testing.T) {
	b, _ := signed(t, time.Minute)
	sig := b.Signature()
	endless := func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", timestamp.ReplyType)
		for chunk := make([]byte, 4096); ; {
			if _, err := w.Write(chunk); err != nil {
				return
			}
		}
	}
	redirect := func(to string) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			if to == "" {
				to = "http://" + r.Host + r.URL.Path
			}
			w.Header().Set("Location", to)
			w.WriteHeader(http.StatusTemporaryRedirect)
		}
	}
	for name, c := range map[string]struct {
		server *httptest.Server
		want   string
	}{
		"another signature":    {authority(t, []byte("another signature"), nil), "another signature"},
		"another nonce":        {authority(t, sig, func(s *forge.TokenSpec) { s.Nonce = big.NewInt(7) }), "another request"},
		"no nonce":             {authority(t, sig, func(s *forge.TokenSpec) { s.Nonce = nil }), "another request"},
		"not granted":          {authority(t, sig, func(s *forge.TokenSpec) { s.Status = 2 }), "not granted"},
		"changed after":        {authority(t, sig, func(s *forge.TokenSpec) { s.After = flip }), ""},
		"no certificate in it": {authority(t, sig, func(s *forge.TokenSpec) { s.Certificates = nil }), "certificate"},
		"before the SVID":      {authority(t, sig, at(-time.Hour)), "clock"},
		"after the SVID":       {authority(t, sig, at(time.Hour)), "clock"},
		"endless":              {serve(t, endless), "more than"},
		"a web page":           {serve(t, func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "<html>") }), "content type"},
		"empty": {
			serve(t, func(w http.ResponseWriter, _ *http.Request) { w.Header().Set("Content-Type", timestamp.ReplyType) }),
			"malformed",
		},
		"redirect to a file":  {serve(t, redirect("file:///etc/shadow")), "no redirect is followed"},
		"redirect to itself":  {serve(t, redirect("")), "no redirect is followed"},
		"redirect far inside": {serve(t, redirect("http://169.254.169.254/latest")), "no redirect is followed"},
	} {
		t.Run(name, func(t *testing.T) {
			o := complete(t, b, Plan{Timestamps: []string{c.server.URL}, Needed: 1})
			if !errors.Is(o.Err(), ErrIncomplete) || o.Changed || len(o.Bundle.Timestamps()) != 0 {
				t.Fatalf("taken: %v", o.Err())
			}
			if !strings.Contains(o.Err().Error(), c.want) {
				t.Errorf("%v does not say %q", o.Err(), c.want)
			}
		})
	}
}

func flip(info []byte) []byte {
	out := append([]byte(nil), info...)
	out[len(out)/2] ^= 1
	return out
}

func at(d time.Duration) func(*forge.TokenSpec) {
	return func(s *forge.TokenSpec) {
		s.Time, s.SigningTime = time.Now().Add(d).UTC().Format("20060102150405Z"), time.Now().Add(d)
	}
}

// One byte now and then must not hold a build for ever.
func TestRefusesAnswersThatTrickle(t *testing.T) {
	b, _ := signed(t, time.Minute)
	over := make(chan struct{})
	slow := serve(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", timestamp.ReplyType)
		for tick := time.NewTicker(10 * time.Millisecond); ; {
			if _, err := w.Write([]byte{0x30}); err != nil {
				return
			}
			w.(http.Flusher).Flush()
			select {
			case <-tick.C:
			case <-over:
				return
			case <-r.Context().Done():
				return
			}
		}
	})
	defer close(over)
	c := NewClient()
	defer c.Close()
	c.attempt = 100 * time.Millisecond
	if _, err := c.Timestamp(context.Background(), slow.URL, b); !errors.Is(err, context.DeadlineExceeded) || !temporary(err) {
		t.Error(err)
	}
}

func TestRefusesHostileLogAnswers(t *testing.T) {
	b, w := signed(t, time.Minute)
	entry := func(spoil func(log *forge.Log, index uint64) []byte) func(string, *forge.Log, uint64) []byte {
		return func(method string, log *forge.Log, index uint64) []byte {
			if method != http.MethodPost {
				return nil
			}
			return spoil(log, index)
		}
	}
	marshal := func(log *forge.Log, index uint64) []byte {
		raw, err := tlog.MarshalEntry(log.Entry(index))
		if err != nil {
			t.Error(err)
		}
		return raw
	}
	for name, spoil := range map[string]func(log *forge.Log, index uint64) []byte{
		"another entry": func(log *forge.Log, index uint64) []byte { return marshal(log, index-1) },
		"another tree": func(log *forge.Log, index uint64) []byte {
			e := log.Entry(index)
			e.InclusionProof.Checkpoint.Envelope = log.Checkpoint(index)
			raw, _ := tlog.MarshalEntry(e)
			return raw
		},
		"another size beside the checkpoint's": func(log *forge.Log, index uint64) []byte {
			e := log.Entry(index)
			e.InclusionProof.TreeSize++
			raw, _ := tlog.MarshalEntry(e)
			return raw
		},
		"another root beside the checkpoint's": func(log *forge.Log, index uint64) []byte {
			e := log.Entry(index)
			e.InclusionProof.RootHash[0] ^= 1
			raw, _ := tlog.MarshalEntry(e)
			return raw
		},
		"path to nowhere": func(log *forge.Log, index uint64) []byte {
			e := log.Entry(index)
			e.InclusionProof.Hashes[0][0] ^= 1
			raw, _ := tlog.MarshalEntry(e)
			return raw
		},
		"oversized":  func(*forge.Log, uint64) []byte { return []byte(`{"x":"` + strings.Repeat("a", 1<<20) + `"}`) },
		"no JSON":    func(*forge.Log, uint64) []byte { return []byte("tree") },
		"empty":      func(*forge.Log, uint64) []byte { return []byte{'{', '}'} },
		"deep":       func(*forge.Log, uint64) []byte { return []byte(strings.Repeat(`{"a":`, 20_000)) },
		"two values": func(log *forge.Log, index uint64) []byte { return append(marshal(log, index), "{}"...) },
	} {
		t.Run(name, func(t *testing.T) {
			s := logServer(t, b, w, entry(spoil))
			o := complete(t, b, Plan{Log: s.URL + "/log"})
			if !errors.Is(o.Err(), ErrIncomplete) || o.Changed || len(o.Bundle.LogEntries()) != 0 {
				t.Errorf("taken: %v", o.Err())
			}
		})
	}
	t.Run("proof of another certificate", func(t *testing.T) {
		s := logServer(t, b, w, func(method string, log *forge.Log, index uint64) []byte {
			if method == http.MethodPost {
				return nil
			}
			other := forge.NewWorld(t)
			cert := other.CA.Certify(t, forge.Statement(other.TPM, nil), w.SVIDKey.Public(), time.Now(), nil)
			return marshal(log, log.AppendCertificate(t, cert, other.CA.Cert, other.CA.Key))
		})
		o := complete(t, b, Plan{Log: s.URL + "/log"})
		if !errors.Is(o.Err(), ErrIncomplete) || o.Proof != nil {
			t.Errorf("taken: %v", o.Err())
		}
	})
	t.Run("proof of another certificate of this CA", func(t *testing.T) {
		s := logServer(t, b, w, func(method string, log *forge.Log, index uint64) []byte {
			if method == http.MethodPost {
				return nil
			}
			cert := w.CA.Certify(t, forge.Statement(forge.NewWorld(t).TPM, nil), w.SVIDKey.Public(), time.Now(), nil)
			return marshal(log, log.AppendCertificate(t, cert, w.CA.Cert, w.CA.Key))
		})
		o := complete(t, b, Plan{Log: s.URL + "/log"})
		if !errors.Is(o.Err(), ErrIncomplete) || o.Proof != nil {
			t.Errorf("taken: %v", o.Err())
		}
	})
	t.Run("proof by another issuer", func(t *testing.T) {
		s := logServer(t, b, w, func(method string, log *forge.Log, index uint64) []byte {
			if method == http.MethodPost {
				return nil
			}
			other := forge.NewWorld(t)
			ak, _ := x509.ParseCertificate(AKCertificate(b))
			return marshal(log, log.AppendCertificate(t, ak, other.CA.Cert, other.CA.Key))
		})
		o := complete(t, b, Plan{Log: s.URL + "/log"})
		if !errors.Is(o.Err(), ErrIncomplete) || o.Proof != nil {
			t.Errorf("taken: %v", o.Err())
		}
	})
}

// A public log holds none of our certificates; that is no failure.
func TestLogWithoutTheAK(t *testing.T) {
	b, w := signed(t, time.Minute)
	s := logServer(t, b, w, nil)
	only := serve(t, func(rw http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodGet {
			http.NotFound(rw, r)
			return
		}
		s.Config.Handler.ServeHTTP(rw, r)
	})
	o := complete(t, b, Plan{Log: only.URL + "/log"})
	if o.Err() != nil || len(o.Missing) != 1 || !errors.Is(o.Missing[0].Err, ErrUnknown) || len(o.Bundle.LogEntries()) != 1 {
		t.Errorf("%v, %+v", o.Err(), o.Missing)
	}
}

// ^C while an authority is waited for ends it at once, with nothing to keep.
func TestInterrupted(t *testing.T) {
	b, _ := signed(t, time.Minute)
	away := serve(t, func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "away", http.StatusServiceUnavailable) })
	ctx, cancel := context.WithCancel(context.Background())
	c := NewClient()
	defer c.Close()
	_, err := c.Complete(ctx, b, Plan{Timestamps: []string{away.URL}, Needed: 1}, func(_, _ string, _ error) { cancel() })
	if !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

func TestRefusesURLs(t *testing.T) {
	for _, u := range []string{"", "file:///etc/passwd", "ftp://x/y", "http://", "tsa.example", "http://user:secret@x/", "unix:/x", "http://x/#a", "gopher://x"} {
		if err := (Plan{Timestamps: []string{u}}).Check(); !errors.Is(err, ErrURL) {
			t.Errorf("%q: %v", u, err)
		}
		if err := (Plan{Log: u}).Check(); u != "" && !errors.Is(err, ErrURL) {
			t.Errorf("log %q: %v", u, err)
		}
		if err := CheckURL(u); strings.Contains(err.Error(), "secret") {
			t.Errorf("the password is shown: %v", err)
		}
	}
	// What is appended to the base of a log would be part of its query.
	for _, u := range []string{"http://x/?a=", "http://x/?", "http://x/#"} {
		if err := (Plan{Log: u}).Check(); !errors.Is(err, ErrURL) {
			t.Errorf("log %q: %v", u, err)
		}
	}
	if err := (Plan{Timestamps: []string{"http://x"}, Needed: 2}).Check(); err == nil {
		t.Error("two of one")
	}
}
