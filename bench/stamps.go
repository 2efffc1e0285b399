package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"

	"github.com/rootlink/rootlink/bench/figures"
	"github.com/rootlink/rootlink/pkg/timestamp"
	"github.com/rootlink/rootlink/pkg/tlog"
)

const (
	tsaCallers = 16
	tsaTime    = 3 * time.Second
	logRate    = 1000 // entries a second
	logCallers = 400  // connections; the server lets one address have 512
	patience   = 20 * time.Second
)

// timestamps: tokens a second over HTTP, each over a signature of its own, and
// the bare signatures that they need.
func timestamps(ctx context.Context, b *bench) error {
	var rates, floors, echoes []float64
	var waits figures.Samples
	var cpu time.Duration
	var made int64
	for range b.runs {
		callers, err := newCallers(tsaCallers, b.web)
		if err != nil {
			return err
		}
		var next atomic.Int64
		var mu sync.Mutex
		before, err := figures.CPUTime(b.server.cmd.Process.Pid)
		if err != nil {
			return err
		}
		r, err := figures.PerSecond(tsaTime, tsaCallers, func(i int) error {
			start := time.Now()
			n := next.Add(1)
			err := callers[i].token(n)
			if took := time.Since(start); n%16 == 0 {
				mu.Lock()
				waits = append(waits, took)
				mu.Unlock()
			}
			return err
		})
		closeAll(callers)
		if err != nil {
			return err
		}
		after, err := figures.CPUTime(b.server.cmd.Process.Pid)
		if err != nil {
			return err
		}
		cpu, made = cpu+after-before, made+next.Load()
		f, err := signFloor()
		if err != nil {
			return err
		}
		e, err := echoFloor()
		if err != nil {
			return err
		}
		rates, floors, echoes = append(rates, r), append(floors, f), append(echoes, e)
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
	aim := "≥ 5000/s"
	if figures.Middle(rates) < 5000 {
		aim += " MISSED"
	}
	b.out.Line(fmt.Sprintf("RFC 3161 tokens over HTTP, %d connections", tsaCallers), fmt.Sprintf("%.0f/s (p99 %s)", figures.Middle(rates), figures.Short(waits.At(0.99))), aim,
		fmt.Sprintf("bare P-256 signatures, all cores: %.0f/s; such answers by Go's HTTP server with nothing made: %.0f/s; the server's CPU time for one: %s",
			figures.Middle(floors), figures.Middle(echoes), figures.Short(cpu/time.Duration(made))))
	return nil
}

// caller is one connection that asks as cheaply as a client can, since it takes
// its time from the server's cores.
type caller struct {
	conn net.Conn
	in   *bufio.Reader
	host string
}

func newCallers(n int, base string) ([]*caller, error) {
	host := strings.TrimPrefix(base, "http://")
	var out []*caller
	for range n {
		c, err := net.Dial("tcp", host)
		if err != nil {
			closeAll(out)
			return nil, err
		}
		out = append(out, &caller{conn: c, in: bufio.NewReader(c), host: host})
	}
	return out, nil
}

func closeAll(cs []*caller) {
	for _, c := range cs {
		c.conn.Close()
	}
}

// post sends a request and returns the answer's body.
func (c *caller) post(path, kind string, body []byte) ([]byte, error) {
	if err := c.conn.SetDeadline(time.Now().Add(patience)); err != nil {
		return nil, err
	}
	req := fmt.Appendf(nil, "POST %s HTTP/1.1\r\nHost: %s\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n", path, c.host, kind, len(body))
	if _, err := c.conn.Write(append(req, body...)); err != nil {
		return nil, err
	}
	resp, err := http.ReadResponse(c.in, nil)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	out, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode/100 != 2 {
		err = fmt.Errorf("%s: %s: %.200s", path, resp.Status, out)
	}
	return out, err
}

// token gets one over a signature that nobody has asked about before. One in a
// hundred is looked into: the others cost the machine that makes them nothing.
func (c *caller) token(n int64) error {
	var signature [64]byte
	binary.BigEndian.PutUint64(signature[:], uint64(n))
	if _, err := rand.Read(signature[8:24]); err != nil {
		return err
	}
	nonce := new(big.Int).SetBytes(append([]byte{1}, signature[8:24]...))
	query, err := timestamp.Request(signature[:], nonce)
	if err != nil {
		return err
	}
	raw, err := c.post("/tsa", timestamp.QueryType, query)
	if err != nil {
		return err
	}
	if n%100 != 0 {
		return nil
	}
	token, err := timestamp.Parse(raw)
	if err != nil {
		return err
	}
	return token.Answers(signature[:], nonce)
}

// signFloor is how many signatures all cores make in a second.
func signFloor() (float64, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return 0, err
	}
	digest := sha256.Sum256([]byte("floor"))
	return figures.PerSecond(time.Second, tsaCallers, func(int) error {
		_, err := ecdsa.SignASN1(rand.Reader, key, digest[:])
		return err
	})
}

// echoFloor is how many answers of a token's size Go's HTTP server gives when it
// has nothing to do, to the same callers in this process.
func echoFloor() (float64, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	answer := make([]byte, 1500)
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		w.Header().Set("Content-Type", timestamp.ReplyType)
		_, _ = w.Write(answer)
	})}
	go func() { _ = srv.Serve(l) }()
	defer srv.Close()
	callers, err := newCallers(tsaCallers, "http://"+l.Addr().String())
	if err != nil {
		return 0, err
	}
	defer closeAll(callers)
	query := make([]byte, 80)
	return figures.PerSecond(time.Second, tsaCallers, func(i int) error {
		_, err := callers[i].post("/", timestamp.QueryType, query)
		return err
	})
}

// logging: entries that come at a steady rate, each a signature of its own by a
// live SVID, until the answer with the proof: from when it was due.
func logging(ctx context.Context, b *bench) error {
	entries, err := b.logEntries(ctx, logRate*(5*b.runs))
	if err != nil {
		return err
	}
	callers, err := newCallers(min(len(entries), logCallers), b.web)
	if err != nil {
		return err
	}
	defer closeAll(callers)
	before, err := figures.CPUTime(b.server.cmd.Process.Pid)
	if err != nil {
		return err
	}
	var mu sync.Mutex
	var waits figures.Samples
	var failed error
	type due struct {
		at    time.Time
		entry []byte
	}
	queue := make(chan due, len(entries))
	var wg sync.WaitGroup
	for _, c := range callers {
		wg.Go(func() {
			for d := range queue {
				raw, err := c.post("/log/api/v2/log/entries", "application/json", d.entry)
				took := time.Since(d.at)
				if err == nil && len(raw) < 1000 {
					err = fmt.Errorf("the log answered %s", raw)
				}
				mu.Lock()
				waits = append(waits, took)
				if failed == nil {
					failed = err
				}
				mu.Unlock()
				if err != nil {
					break
				}
			}
		})
	}
	start := time.Now()
	for i, e := range entries {
		if ctx.Err() != nil {
			break
		}
		at := start.Add(time.Duration(i) * time.Second / logRate)
		time.Sleep(time.Until(at))
		queue <- due{at, e}
	}
	close(queue)
	wg.Wait()
	took := time.Since(start)
	if failed != nil || ctx.Err() != nil {
		return errors.Join(failed, ctx.Err())
	}
	after, err := figures.CPUTime(b.server.cmd.Process.Pid)
	if err != nil {
		return err
	}
	disk, err := repeat(50, func() error { return writeDurably(b.path("written"), make([]byte, 8<<10)) })
	if err != nil {
		return err
	}
	aim := "≤ 500 ms"
	if waits.At(1) > 500*time.Millisecond {
		aim += " MISSED"
	}
	b.out.Line(fmt.Sprintf("log entry due → in a published checkpoint, %d/s", logRate),
		fmt.Sprintf("p50 %s, p99 %s, max %s", figures.Short(waits.At(0.5)), figures.Short(waits.At(0.99)), figures.Short(waits.At(1))), aim,
		fmt.Sprintf("%d entries, answered at %.0f/s; a checkpoint is made every 100 ms at most, of batches of 50 ms; writing a file durably: %s; the server's CPU time for one: %s",
			len(entries), float64(len(entries))/took.Seconds(), figures.Short(disk.Median()), figures.Short((after-before)/time.Duration(len(entries)))))
	return b.checkLog(ctx)
}

// checkLog has the whole tree verified anew, as an auditor does.
func (b *bench) checkLog(ctx context.Context) error {
	c := exec.CommandContext(ctx, b.program("rootlink-server"), "log", "check", "--data-dir", b.path("server"), "--admin-socket", b.path("admin.sock"))
	start := time.Now()
	out, err := c.CombinedOutput()
	if err != nil {
		return fmt.Errorf("log check: %w\n%s", err, out)
	}
	first, _, _ := bytes.Cut(bytes.TrimSpace(out), []byte("\n"))
	b.out.Line("rootlink-server log check of it", figures.Short(time.Since(start)), "", string(first))
	return nil
}

// logIdentities is by how many SPIFFE IDs the entries are: the log takes 20 a
// second of each.
const logIdentities = 100

// logEntries makes n requests for the log: signatures over different digests,
// by the keys of many SVIDs in turn.
func (b *bench) logEntries(ctx context.Context, n int) ([][]byte, error) {
	client := svidv1.NewSVIDClient(b.admin)
	var keys []*ecdsa.PrivateKey
	var leaves []*x509.Certificate
	for i := range logIdentities {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return nil, err
		}
		u := &url.URL{Scheme: "spiffe", Host: trustDomain, Path: fmt.Sprintf("/log/%d", i)}
		csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{URIs: []*url.URL{u}}, key)
		if err != nil {
			return nil, err
		}
		resp, err := client.MintX509SVID(ctx, &svidv1.MintX509SVIDRequest{Csr: csr})
		if err != nil {
			return nil, err
		}
		leaf, err := x509.ParseCertificate(resp.GetSvid().GetCertChain()[0])
		if err != nil {
			return nil, err
		}
		keys, leaves = append(keys, key), append(leaves, leaf)
	}
	var out [][]byte
	for i := range n {
		var digest [32]byte
		if _, err := rand.Read(digest[:]); err != nil {
			return nil, err
		}
		sig, err := ecdsa.SignASN1(rand.Reader, keys[i%logIdentities], digest[:])
		if err != nil {
			return nil, err
		}
		req, err := entryRequest(digest, sig, leaves[i%logIdentities])
		if err != nil {
			return nil, err
		}
		out = append(out, req)
	}
	return out, nil
}

// entryRequest is what a log takes (Rekor v2): the entry's own words.
func entryRequest(digest [32]byte, sig []byte, leaf *x509.Certificate) ([]byte, error) {
	body, err := tlog.EntryBody(digest, sig, leaf)
	if err != nil {
		return nil, err
	}
	var entry struct {
		Spec struct {
			HashedRekord struct {
				Data      struct{ Digest []byte }
				Signature json.RawMessage
			} `json:"hashedRekordV002"`
		}
	}
	if err := json.Unmarshal(body, &entry); err != nil {
		return nil, err
	}
	return json.Marshal(map[string]any{"hashedRekordRequestV002": map[string]any{
		"digest": entry.Spec.HashedRekord.Data.Digest, "signature": entry.Spec.HashedRekord.Signature,
	}})
}
