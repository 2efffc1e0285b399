package server

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"testing"
	"time"

	"github.com/rootlink/rootlink/pkg/timestamp"
	nodev1 "github.com/rootlink/rootlink/proto/rootlink/node/v1"
)

func newHTTPWorld(t *testing.T, bend func(*Config)) *world {
	return newWorld(t, func(c *Config) {
		withLog(c)
		// The timestamp library writes the machine's own time into tokens too.
		c.Now, c.HTTPListen = time.Now, "127.0.0.1:0"
		if bend != nil {
			bend(c)
		}
	})
}

func (w *world) nodeConfig() *nodev1.GetConfigResponse {
	w.t.Helper()
	resp, err := (&nodeService{s: w.srv}).GetConfig(w.t.Context(), nil)
	if err != nil {
		w.t.Fatal(err)
	}
	return resp
}

func stampOver(t *testing.T, url string, signature []byte) *timestamp.Token {
	t.Helper()
	nonce := big.NewInt(5)
	q, err := timestamp.Request(signature, nonce)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := http.Post(url, timestamp.QueryType, bytes.NewReader(q))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(io.LimitReader(resp.Body, timestamp.MaxToken))
	if err != nil || resp.StatusCode != http.StatusOK || resp.Header.Get("Content-Type") != timestamp.ReplyType {
		t.Fatal(resp.Status, resp.Header, err)
	}
	tok, err := timestamp.Parse(raw)
	if err != nil {
		t.Fatal(err)
	}
	if err := tok.Answers(signature, nonce); err != nil {
		t.Fatal(err)
	}
	return tok
}

// What agents are told is where tokens are made, and what verifiers are told is
// who makes them, before and after a restart.
func TestTimestampsOverHTTP(t *testing.T) {
	w := newHTTPWorld(t, nil)
	urls := w.nodeConfig().GetTimestampUrls()
	if len(urls) != 1 {
		t.Fatal(w.nodeConfig())
	}
	signature := []byte("a signature")
	tok := stampOver(t, urls[0], signature)
	w.stop()
	w.start()
	for _, tok := range []*timestamp.Token{tok, stampOver(t, w.nodeConfig().GetTimestampUrls()[0], signature)} {
		v, err := tok.Verify(signature, w.srv.TimestampAuthorities())
		if err != nil {
			t.Fatal(err)
		}
		if v.Authority.Operator != td || v.Authority.URI == "" {
			t.Errorf("%+v", v.Authority)
		}
	}
}

func TestHTTPPortOff(t *testing.T) {
	w := newWorld(t, withLog)
	if c := w.nodeConfig(); w.srv.HTTPAddr() != nil || w.srv.HTTPURL() != "" || c.GetTimestampUrls() != nil || c.GetLogUrl() != "" || w.srv.TimestampAuthorities() != nil {
		t.Error("something is told of an HTTP port that is off")
	}
	// Tokens of before are still to be verified when it is switched off.
	w = newHTTPWorld(t, nil)
	w.stop()
	w.cfg.HTTPListen = ""
	w.start()
	if len(w.srv.TimestampAuthorities()) != 1 || w.nodeConfig().GetTimestampUrls() != nil {
		t.Error("the authority of before is forgotten, or announced")
	}
}

func TestHTTPURLIsAnnounced(t *testing.T) {
	w := newHTTPWorld(t, func(c *Config) { c.HTTPURL = "https://time.example.org/rootlink/" })
	c := w.nodeConfig()
	if c.GetTimestampUrls()[0] != "https://time.example.org/rootlink/tsa" || c.GetLogUrl() != "https://time.example.org/rootlink/log" {
		t.Error(c)
	}
	for _, bad := range []string{"time.example.org", "ftp://x", "http://", "http://u:p@x", "http://x?y", "http://x#y", ":"} {
		cfg := w.cfg
		cfg.HTTPURL = bad
		if _, err := cfg.check(); err == nil {
			t.Errorf("HTTP URL %q", bad)
		}
	}
	cfg := w.cfg
	cfg.HTTPListen = ""
	if _, err := cfg.check(); err == nil {
		t.Error("a URL of a port that is off")
	}
}

// The log's handler sees paths below its mount.
func TestLogIsMounted(t *testing.T) {
	s := &Server{logHandler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, r.URL.Path) })}
	mux := http.NewServeMux()
	s.mountHTTP(mux)
	client, server := net.Pipe()
	t.Cleanup(func() { client.Close() })
	go func() { _ = (&http.Server{Handler: mux}).Serve(&oneConn{c: server}) }()
	fmt.Fprint(client, "GET /log/checkpoint HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
	resp, err := http.ReadResponse(bufio.NewReader(client), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if body, err := io.ReadAll(resp.Body); err != nil || string(body) != "/checkpoint" {
		t.Errorf("%q %v", body, err)
	}
}

// oneConn is a listener with one connection.
type oneConn struct {
	net.Listener
	c net.Conn
}

func (l *oneConn) Accept() (net.Conn, error) {
	if l.c == nil {
		return nil, net.ErrClosed
	}
	c := l.c
	l.c = nil
	return c, nil
}

func (l *oneConn) Close() error   { return nil }
func (l *oneConn) Addr() net.Addr { return &net.UnixAddr{} }

// What strangers send is bounded before it is read.
func TestRefusesOversizedHTTP(t *testing.T) {
	w := newHTTPWorld(t, nil)
	url := w.nodeConfig().GetTimestampUrls()[0]
	resp, err := http.Post(url, timestamp.QueryType, bytes.NewReader(make([]byte, 1<<20)))
	if err == nil {
		resp.Body.Close()
		if resp.StatusCode != http.StatusRequestEntityTooLarge {
			t.Error("a body of 1 MiB:", resp.Status)
		}
	}
	req, err := http.NewRequest(http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("X", string(bytes.Repeat([]byte("x"), 64<<10)))
	if resp, err := http.DefaultClient.Do(req); err == nil {
		resp.Body.Close()
		if resp.StatusCode != http.StatusRequestHeaderFieldsTooLarge {
			t.Error("a header of 64 KiB:", resp.Status)
		}
	}
	for _, path := range []string{"/", "/tsa/x", "/log/x", "/debug/pprof/"} {
		resp, err := http.Get(w.srv.HTTPURL() + path)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != http.StatusNotFound {
			t.Error(path, resp.Status)
		}
	}
}

// Connections that say nothing make room for who comes next.
func TestIdleHTTPConnectionsMakeRoom(t *testing.T) {
	w := newHTTPWorld(t, func(c *Config) { c.MaxConnections, c.MaxConnectionsOfAddress = 3, 3 })
	for range 3 {
		c, err := net.Dial("tcp", w.srv.HTTPAddr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
	}
	stampOver(t, w.nodeConfig().GetTimestampUrls()[0], []byte("a signature"))
}

func TestRefusesBusyHTTPPort(t *testing.T) {
	w := newHTTPWorld(t, nil)
	cfg := w.cfg
	cfg.DataDir, cfg.HTTPListen = t.TempDir(), w.srv.HTTPAddr().String()
	if s, err := New(t.Context(), cfg); err == nil {
		s.Close()
		t.Error("two servers on one HTTP port")
	}
}
