// Package tsa is the server's timestamp authority, RFC 3161: it says when it
// saw the hash of a signature.
//
// A root, whose key identifies the authority for good, certifies a key that
// signs tokens for a year and is then replaced. Nobody else signs with either.
package tsa

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/asn1"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"mime"
	"net/http"
	"runtime"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	digitorus "github.com/digitorus/timestamp"

	"github.com/rootlink/rootlink/pkg/timestamp"
)

// Policy is what a token says it was made under: the clock of the machine that
// runs this server, within Accuracy. It is registered nowhere. The arc 2.25 is for
// identifiers made of UUIDs (ITU-T X.667); readers of ASN.1 take 31 bits in one
// number, so this is 30 bits of one.
func Policy() asn1.ObjectIdentifier {
	return asn1.ObjectIdentifier{2, 25, 714309281, 1}
}

// Accuracy is what tokens claim: they name whole seconds. The clock itself is
// the operator's to keep.
const Accuracy = time.Second

// Lifetimes of what the authority makes for itself.
const (
	RootLife = 20 * 365 * 24 * time.Hour
	LeafLife = 365 * 24 * time.Hour
	// prepareLead is how long before it signs a key is in trust.json.
	prepareLead = 60 * 24 * time.Hour
	// overlap is how long the windows of two keys share, for tokens that are
	// made while one takes over.
	overlap = 24 * time.Hour
	// backdate is for verifiers whose clock is behind ours.
	backdate = time.Minute
)

// Errors that callers branch on.
var (
	// ErrIncomplete: files of an authority that exists are missing or do not fit
	// together.
	ErrIncomplete = errors.New("timestamp authority is incomplete")
	// ErrClock: the clock is not one that a token could name.
	ErrClock = errors.New("no time to name")
)

// Config is what an Authority is opened from. Dir is required.
type Config struct {
	Dir      string // the server's data directory, locked by the caller
	Name     string // the trust domain, for people who read certificates
	LeafLife time.Duration
	Now      func() time.Time
	Log      *slog.Logger
}

// Authority answers requests for timestamps.
type Authority struct {
	cfg Config
	// signing holds those whose token is being made: half of the processors.
	// Strangers who ask without end must leave the rest to those who issue SVIDs.
	signing chan struct{}

	changing sync.Mutex // held by Maintain
	state    atomic.Pointer[state]
	last     atomic.Int64 // unix nanoseconds of the newest token
	warned   atomic.Int64 // unix seconds of the last word about the clock
}

// state is one state of keys and certificates; it never changes.
type state struct {
	root    *x509.Certificate
	leaves  []*x509.Certificate // all that ever signed and one that will, oldest first
	rootKey *ecdsa.PrivateKey
	leaf    *x509.Certificate // that signs, one of leaves
	key     *ecdsa.PrivateKey
	nextKey *ecdsa.PrivateKey // of the last of leaves, nil when that signs already
}

// Open loads the authority kept in a directory, made on first use.
func Open(c Config) (*Authority, error) {
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Log == nil {
		c.Log = slog.Default()
	}
	if c.LeafLife == 0 {
		c.LeafLife = LeafLife
	}
	a := &Authority{cfg: c, signing: make(chan struct{}, max(1, runtime.GOMAXPROCS(0)/2))}
	s, err := a.load()
	if err != nil {
		return nil, fmt.Errorf("timestamp authority: %w", err)
	}
	a.state.Store(s)
	if _, err := a.Maintain(); err != nil {
		return nil, err
	}
	return a, nil
}

// Authorities are what verifiers must trust to accept every token that was ever
// made here: one entry for each key, all with one root.
func (a *Authority) Authorities() []timestamp.Authority {
	s := a.state.Load()
	var out []timestamp.Authority
	for _, c := range s.leaves {
		out = append(out, timestamp.Authority{
			Chain: []*x509.Certificate{c, s.root},
			Start: c.NotBefore, End: c.NotAfter,
		})
	}
	return out
}

// refusal is a PKIFailureInfo with its reason, for the log.
type refusal struct {
	info digitorus.FailureInfo
	err  error
}

// Answer makes the TimeStampResp to a TimeStampReq. Whatever is wrong with the
// request is said inside the answer, RFC 3161, 2.4.2.
func (a *Authority) Answer(request []byte) ([]byte, error) {
	q, r := query(request)
	if r == nil {
		var out []byte
		if out, r = a.stamp(q); r == nil {
			return out, nil
		}
	}
	a.cfg.Log.Debug("timestamp refused", "error", r.err, "info", int(r.info))
	return digitorus.CreateErrorResponse(digitorus.Rejection, r.info)
}

func query(request []byte) (*timestamp.Query, *refusal) {
	q, err := timestamp.ParseQuery(request)
	switch {
	case errors.Is(err, timestamp.ErrWeak):
		return nil, &refusal{digitorus.BadAlgorithm, err}
	case errors.Is(err, timestamp.ErrVersion):
		return nil, &refusal{digitorus.BadRequest, err}
	case err != nil:
		return nil, &refusal{digitorus.BadDataFormat, err}
	case q.Extension:
		return nil, &refusal{digitorus.UnacceptedExtension, errors.New("extensions are not understood")}
	case q.Policy != nil && !q.Policy.Equal(Policy()):
		return nil, &refusal{digitorus.UnacceptedPolicy, fmt.Errorf("policy %v", q.Policy)}
	}
	return q, nil
}

func (a *Authority) stamp(q *timestamp.Query) ([]byte, *refusal) {
	s := a.state.Load()
	now, err := a.time(s.leaf)
	if err != nil {
		return nil, &refusal{digitorus.TimeNotAvailable, err}
	}
	t := digitorus.Timestamp{
		HashAlgorithm: q.Hash, HashedMessage: q.Imprint, Nonce: q.Nonce,
		// Whole seconds, so the order of two tokens within one is unknown, and
		// Ordering stays false.
		Time: now.UTC().Truncate(time.Second), Accuracy: Accuracy, Policy: Policy(),
		AddTSACertificate: q.CertReq,
	}
	// The library makes the serial number: 160 random bits.
	out, err := t.CreateResponseWithOpts(s.leaf, s.key, crypto.SHA256)
	if err != nil {
		a.cfg.Log.Error("timestamp", "error", err)
		return nil, &refusal{digitorus.SystemFailure, err}
	}
	return out, nil
}

// time is now, unless the clock cannot be right: a certificate that does not
// hold yet or no more, or a token already made for a later time. A clock that
// is turned back would stamp into a past that SVIDs since expired belong to.
func (a *Authority) time(leaf *x509.Certificate) (time.Time, error) {
	now := a.cfg.Now()
	if now.Before(leaf.NotBefore) || now.After(leaf.NotAfter) {
		return now, a.noTime(now, fmt.Errorf("%w: %v is outside the validity of the signing certificate", ErrClock, now))
	}
	for {
		last := a.last.Load()
		if now.UnixNano() < last-int64(Accuracy) {
			return now, a.noTime(now, fmt.Errorf("%w: the clock went back by %v", ErrClock, time.Duration(last-now.UnixNano())))
		}
		if now.UnixNano() <= last || a.last.CompareAndSwap(last, now.UnixNano()) {
			return now, nil
		}
	}
}

// noTime says so in the log, once a minute.
func (a *Authority) noTime(now time.Time, err error) error {
	if last := a.warned.Load(); now.Unix()-last >= 60 || now.Unix() < last {
		if a.warned.CompareAndSwap(last, now.Unix()) {
			a.cfg.Log.Error("no timestamps are made", "error", err, "hint", "set this machine's clock; if it was ahead before, restart the server")
		}
	}
	return err
}

// ServeHTTP is RFC 3161, 3.4. A refusal is an answer too, and has status 200;
// other statuses are for what is no request at all.
func (a *Authority) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodPost {
		w.Header().Set("Allow", http.MethodPost)
		http.Error(w, "POST a timestamp query (RFC 3161) here", http.StatusMethodNotAllowed)
		return
	}
	if m, _, err := mime.ParseMediaType(r.Header.Get("Content-Type")); err != nil || m != timestamp.QueryType {
		http.Error(w, "want Content-Type: "+timestamp.QueryType, http.StatusUnsupportedMediaType)
		return
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, timestamp.MaxQuery))
	if err != nil {
		code := http.StatusBadRequest
		if _, ok := errors.AsType[*http.MaxBytesError](err); ok {
			code = http.StatusRequestEntityTooLarge
		}
		http.Error(w, "the request does not end in time or size", code)
		return
	}
	// Not before the body is here: one who sends it slowly keeps nobody waiting.
	select {
	case a.signing <- struct{}{}:
	case <-r.Context().Done():
		return
	}
	out, err := a.Answer(body)
	<-a.signing
	if err != nil {
		a.cfg.Log.Error("timestamp", "error", err)
		http.Error(w, "internal error", http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", timestamp.ReplyType)
	w.Header().Set("Content-Length", strconv.Itoa(len(out)))
	w.Header().Set("Cache-Control", "no-store")
	_, _ = w.Write(out) // the client is gone
}
