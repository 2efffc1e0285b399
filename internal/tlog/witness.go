package tlog

import (
	"bufio"
	"bytes"
	"io"
	"net/http"
	"strings"
	"time"

	pub "github.com/rootlink/rootlink/pkg/tlog"
)

// maxWitnessReply bounds what a witness may answer, in bytes.
const maxWitnessReply = 64 << 10

// policyWitnesses reads the witnesses out of a policy that tessera accepted.
func policyWitnesses(policy []byte) ([]pub.Witness, error) {
	var out []pub.Witness
	s := bufio.NewScanner(bytes.NewReader(policy))
	for s.Scan() {
		line, _, _ := strings.Cut(s.Text(), "#")
		f := strings.Fields(line)
		if len(f) < 3 || f[0] != "witness" {
			continue
		}
		// The name in the key is the witness's own; the policy's is a word
		// that means nothing to verifiers.
		name, _, _ := strings.Cut(f[2], "+")
		w := pub.Witness{Name: name, Key: f[2]}
		if err := w.Check(); err != nil {
			return nil, err
		}
		out = append(out, w)
	}
	return out, s.Err()
}

// witnessClient talks to witnesses, whose answers are bounded.
func witnessClient() *http.Client {
	t := http.DefaultTransport.(*http.Transport).Clone()
	t.ResponseHeaderTimeout = witnessTimeout
	return &http.Client{Transport: bounded{t, maxWitnessReply}, Timeout: 2 * witnessTimeout, CheckRedirect: noRedirect}
}

func noRedirect(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }

// bounded cuts answers off.
type bounded struct {
	next  http.RoundTripper
	limit int64
}

func (b bounded) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := b.next.RoundTrip(r)
	if err != nil {
		return nil, err
	}
	resp.Body = struct {
		io.Reader
		io.Closer
	}{io.LimitReader(resp.Body, b.limit), resp.Body}
	return resp, nil
}

// logClient reads logs. The longest thing in one is a full entry bundle.
func logClient() *http.Client {
	const maxBundle = bundleWidth * (2 + pub.MaxBody)
	return &http.Client{Transport: bounded{http.DefaultTransport, maxBundle}, Timeout: time.Minute}
}
