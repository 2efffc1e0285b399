// Package stamp gets what makes a signature outlive its certificate: RFC 3161
// tokens over it, an entry in a transparency log with its proof, and the log's
// proof of the AK certificate. What comes back is checked to be about this very
// signature; whom to believe is the verifier's affair.
package stamp

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"mime"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"syscall"
	"time"
)

// What callers branch on.
var (
	// ErrAnswer: the answer is not about what was asked, or breaks its format.
	// Asking again is no cure.
	ErrAnswer = errors.New("unusable answer")
	// ErrUnknown: the log does not hold what was asked for.
	ErrUnknown = errors.New("the log does not hold it")
	// ErrURL: an address that nothing is fetched from.
	ErrURL = errors.New("not an http or https URL")
)

// StatusError is an HTTP answer other than 200.
type StatusError struct {
	Code   int
	Detail string // a redirect's target, or the first line of a text answer
}

func (e *StatusError) Error() string {
	s := fmt.Sprintf("HTTP status %d %s", e.Code, http.StatusText(e.Code))
	if e.Detail != "" {
		s += ": " + e.Detail
	}
	return s
}

// Times and sizes of one exchange.
const (
	attemptTimeout = 15 * time.Second // whole, so that bytes that trickle in end too
	connectTimeout = 5 * time.Second
	maxHeader      = 16 << 10 // bytes of an answer's header
	maxErrorText   = 256      // bytes of a refusal that are shown
)

// Client talks to authorities and logs.
type Client struct {
	http    *http.Client
	attempt time.Duration // how long one exchange may take
	// grace is how long the authorities that are not needed may still take once
	// enough have answered.
	grace time.Duration
}

// NewClient makes a client. Proxies are taken from the environment, as HTTP
// clients do.
func NewClient() *Client {
	t := &http.Transport{
		Proxy:                  http.ProxyFromEnvironment,
		DialContext:            (&net.Dialer{Timeout: connectTimeout, Control: refuseLinkLocal}).DialContext,
		TLSHandshakeTimeout:    connectTimeout,
		MaxResponseHeaderBytes: maxHeader,
		DisableCompression:     true,
		ForceAttemptHTTP2:      true,
	}
	return &Client{
		http: &http.Client{
			Transport: t,
			// A redirect is an answer like any other that is not the one wanted:
			// a server may not send us, with a POST, to a place of its choice.
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
		attempt: attemptTimeout,
		grace:   3 * time.Second,
	}
}

// refuseLinkLocal keeps us from what clouds offer a machine's own programs at
// such addresses, without a password: a server announces URLs, and must not have
// builders ask there for it. Resolved names come by here too.
func refuseLinkLocal(_, address string, _ syscall.RawConn) error {
	a, err := netip.ParseAddrPort(address)
	if err != nil {
		return err
	}
	if a.Addr().Unmap().IsLinkLocalUnicast() {
		return fmt.Errorf("%s is a link-local address, where no authority or log is: %w", a.Addr(), ErrURL)
	}
	return nil
}

// Close gives up the connections that are kept.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// CheckURL fails on what is no base URL of an authority or a log.
func CheckURL(s string) error {
	u, err := url.Parse(s)
	switch {
	case err != nil:
		return fmt.Errorf("%w: %w", ErrURL, err)
	case u.Scheme != "http" && u.Scheme != "https" || u.Host == "":
		return fmt.Errorf("%q: %w", s, ErrURL)
	case u.User != nil:
		return fmt.Errorf("%q names a user: %w", u.Redacted(), ErrURL)
	case strings.Contains(s, "#") || len(s) > 2048:
		return fmt.Errorf("%.80q: %w", s, ErrURL)
	}
	return nil
}

// CheckLogURL is CheckURL for the base of a log, to which paths are appended: in
// a query they would end up in it, and whoever announces the base would choose
// the path that is fetched.
func CheckLogURL(s string) error {
	if strings.Contains(s, "?") {
		return fmt.Errorf("%.80q has a query: %w", s, ErrURL)
	}
	return CheckURL(s)
}

// exchange is one request with its bounded answer.
type exchange struct {
	method, url  string
	body         []byte
	bodyType     string
	acceptedType string
	limit        int64 // bytes of the answer
}

func (c *Client) do(ctx context.Context, x exchange) ([]byte, error) {
	if err := CheckURL(x.url); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, c.attempt)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, x.method, x.url, bytes.NewReader(x.body))
	if err != nil {
		return nil, err
	}
	if x.bodyType != "" {
		req.Header.Set("Content-Type", x.bodyType)
	}
	req.Header.Set("Accept", x.acceptedType)
	req.Header.Set("User-Agent", "rootlink")
	resp, err := c.http.Do(req)
	if err != nil {
		if ue, ok := errors.AsType[*url.Error](err); ok {
			err = ue.Err // the caller names the URL
		}
		return nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode/100 != 2 {
		return nil, statusError(resp)
	}
	if t, _, err := mime.ParseMediaType(resp.Header.Get("Content-Type")); err != nil || t != x.acceptedType {
		return nil, fmt.Errorf("%w: content type %.80q, want %s", ErrAnswer, resp.Header.Get("Content-Type"), x.acceptedType)
	}
	b, err := io.ReadAll(io.LimitReader(resp.Body, x.limit+1))
	if err != nil {
		return nil, err
	}
	if int64(len(b)) > x.limit {
		return nil, fmt.Errorf("%w: more than %d bytes", ErrAnswer, x.limit)
	}
	return b, nil
}

func statusError(resp *http.Response) error {
	e := &StatusError{Code: resp.StatusCode}
	if to := resp.Header.Get("Location"); resp.StatusCode/100 == 3 {
		e.Detail = fmt.Sprintf("it redirects to %.200q, and no redirect is followed", to)
		return e
	}
	text, _ := io.ReadAll(io.LimitReader(resp.Body, maxErrorText))
	line, _, _ := bytes.Cut(bytes.TrimSpace(text), []byte("\n"))
	e.Detail = string(bytes.ToValidUTF8(line, nil))
	return e
}

// temporary reports whether the same question may be answered later: the other
// side is away, overloaded or broken, rather than in disagreement with us.
func temporary(err error) bool {
	if errors.Is(err, ErrAnswer) || errors.Is(err, ErrUnknown) || errors.Is(err, ErrURL) {
		return false
	}
	if se, ok := errors.AsType[*StatusError](err); ok {
		return se.Code >= 500 && se.Code != http.StatusNotImplemented || se.Code == http.StatusTooManyRequests || se.Code == http.StatusRequestTimeout
	}
	return true
}

// Waits between attempts.
const (
	firstRetry = 250 * time.Millisecond
	lastRetry  = 5 * time.Second
)

// retry does it until it succeeds, fails for good, or ctx ends; waiting is told
// each reason. When time is up the error is the last reason, not that.
func retry[T any](ctx context.Context, waiting func(error), do func(context.Context) (T, error)) (T, error) {
	var before error
	for wait := firstRetry; ; wait = min(2*wait, lastRetry) {
		v, err := do(ctx)
		switch {
		case err == nil:
			return v, nil
		case ctx.Err() != nil && before != nil:
			return v, before
		case ctx.Err() != nil || !temporary(err):
			return v, err
		}
		before = err
		waiting(err)
		t := time.NewTimer(wait)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return v, err
		}
	}
}
