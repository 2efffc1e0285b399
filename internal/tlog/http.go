package tlog

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"time"

	rekorv1 "github.com/sigstore/protobuf-specs/gen/pb-go/rekor/v1"
	"github.com/transparency-dev/tessera/api/layout"
	"golang.org/x/time/rate"

	"github.com/rootlink/rootlink/pkg/strictjson"
	pub "github.com/rootlink/rootlink/pkg/tlog"
)

// Limits of the write endpoint.
const (
	maxRequest   = 2 * pub.MaxBody // bytes of a request's JSON
	writeTimeout = 20 * time.Second
	maxWriters   = 2048 // requests that wait for a checkpoint at a time
	// Anybody may ask for a proof, and an entry is on the tiles before it is
	// published: while witnesses are away, each who asks for it would wait.
	maxProofWaits = 128
	proofWait     = 2 * time.Second
	identityRate  = 20 // entries per second and SPIFFE ID
	identityBurst = 200
	maxIdentities = 4096 // remembered
)

// HandlerConfig says what the handler takes.
type HandlerConfig struct {
	// Accept returns the SPIFFE ID of a certificate that may write: an SVID of
	// this trust domain, valid now. Anybody else could fill the disk.
	Accept func(*x509.Certificate) (id string, err error)
	Now    func() time.Time // of the rate limits; default time.Now
}

// Handler serves the log below its URL: C2SP tiles to read, Rekor v2's request to
// write, and the proof of a certificate by the SHA-256 of its DER.
func (l *Log) Handler(c HandlerConfig) http.Handler {
	if c.Now == nil {
		c.Now = time.Now
	}
	h := &handler{
		l: l, c: c, writers: make(chan struct{}, maxWriters), proofs: make(chan struct{}, maxProofWaits),
		reading: make(chan struct{}, max(1, runtime.GOMAXPROCS(0)/2)), limits: map[string]*rate.Limiter{},
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /checkpoint", h.checkpoint)
	mux.HandleFunc("GET /tile/{path...}", h.tile)
	mux.HandleFunc("GET /proof/{digest}", h.proof)
	mux.HandleFunc("POST /api/v2/log/entries", h.write)
	return mux
}

type handler struct {
	l       *Log
	c       HandlerConfig
	writers chan struct{}
	proofs  chan struct{}
	reading chan struct{}

	mu     sync.Mutex
	limits map[string]*rate.Limiter
}

func (h *handler) checkpoint(w http.ResponseWriter, r *http.Request) {
	cp, err := h.l.Checkpoint(r.Context())
	if err != nil {
		h.fail(w, err)
		return
	}
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.Header().Set("Cache-Control", "no-store")
	w.Write(cp)
}

// tile serves what never changes. Only names that the layout itself would make
// reach the disk.
func (h *handler) tile(w http.ResponseWriter, r *http.Request) {
	level, rest, _ := strings.Cut(r.PathValue("path"), "/")
	var path string
	contentType := "application/octet-stream"
	if level == "entries" {
		n, p, err := layout.ParseTileIndexPartial(rest)
		if err != nil {
			http.NotFound(w, r)
			return
		}
		path = layout.EntriesPath(n, p)
	} else {
		lv, n, p, err := layout.ParseTileLevelIndexPartial(level, rest)
		if err != nil {
			http.NotFound(w, r)
			return
		}
		path = layout.TilePath(lv, n, p)
	}
	if path != "tile/"+r.PathValue("path") {
		http.NotFound(w, r) // two names of one tile are two cache entries
		return
	}
	f, err := os.Open(filepath.Join(h.l.root, filepath.FromSlash(path)))
	if err != nil {
		http.NotFound(w, r)
		return
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil || !st.Mode().IsRegular() {
		http.NotFound(w, r)
		return
	}
	w.Header().Set("Content-Type", contentType)
	w.Header().Set("Content-Length", fmt.Sprint(st.Size()))
	w.Header().Set("Cache-Control", "public, max-age=31536000, immutable")
	if r.Method != http.MethodHead {
		io.Copy(w, f)
	}
}

func (h *handler) proof(w http.ResponseWriter, r *http.Request) {
	text := r.PathValue("digest")
	digest, err := hex.DecodeString(text)
	if err != nil || len(digest) != 32 || hex.EncodeToString(digest) != text {
		h.refuse(w, http.StatusBadRequest, "not a SHA-256 in lower-case hex")
		return
	}
	select {
	case h.proofs <- struct{}{}:
		defer func() { <-h.proofs }()
	default:
		h.fail(w, ErrBusy)
		return
	}
	ctx, cancel := context.WithTimeout(r.Context(), proofWait)
	defer cancel()
	e, err := h.l.CertificateProof(ctx, [32]byte(digest))
	if err != nil {
		h.fail(w, err)
		return
	}
	h.entry(w, http.StatusOK, e)
}

// request is Rekor v2's CreateEntryRequest, as far as it is taken.
type request struct {
	HashedRekord *struct {
		Digest    []byte `json:"digest"`
		Signature struct {
			Content  []byte `json:"content"`
			Verifier struct {
				KeyDetails  string `json:"keyDetails"`
				Certificate *struct {
					RawBytes []byte `json:"rawBytes"`
				} `json:"x509Certificate"`
			} `json:"verifier"`
		} `json:"signature"`
	} `json:"hashedRekordRequestV002"`
}

func (h *handler) write(w http.ResponseWriter, r *http.Request) {
	select {
	case h.writers <- struct{}{}:
		defer func() { <-h.writers }()
	default:
		h.fail(w, ErrBusy)
		return
	}
	raw, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxRequest))
	if tooLong, ok := errors.AsType[*http.MaxBytesError](err); ok {
		h.refuse(w, http.StatusRequestEntityTooLarge, fmt.Sprintf("more than %d bytes", tooLong.Limit))
		return
	}
	if err != nil {
		h.refuse(w, http.StatusBadRequest, "the request ended early")
		return
	}
	// As many at a time as half of the processors: strangers' signatures must
	// leave the rest to those who issue SVIDs.
	select {
	case h.reading <- struct{}{}:
	case <-r.Context().Done():
		return
	}
	body, cert, err := readRequest(raw)
	<-h.reading
	if err != nil {
		h.refuse(w, http.StatusBadRequest, err.Error())
		return
	}
	id, err := h.c.Accept(cert)
	if err != nil {
		h.refuse(w, http.StatusForbidden, "only SVIDs of this trust domain write here: "+err.Error())
		return
	}
	// Entries are public: were one that is there counted, any stranger who sends
	// it again would use up what its identity may write.
	if !h.l.holds(body) && !h.allow(id) {
		w.Header().Set("Retry-After", "1")
		h.refuse(w, http.StatusTooManyRequests, "too many entries by "+id)
		return
	}
	ctx, cancel := context.WithTimeout(r.Context(), writeTimeout)
	defer cancel()
	e, err := h.l.Append(ctx, body)
	if err != nil {
		h.fail(w, err)
		return
	}
	h.entry(w, http.StatusCreated, e)
}

// readRequest returns the body that a request asks for, whose signature holds.
func readRequest(raw []byte) ([]byte, *x509.Certificate, error) {
	var req request
	if err := strictjson.Decode(raw, maxRequest, "", &req); err != nil {
		return nil, nil, fmt.Errorf("not a hashedRekordRequestV002: %w", err)
	}
	hr := req.HashedRekord
	if hr == nil || hr.Signature.Verifier.Certificate == nil {
		return nil, nil, errors.New("not a hashedRekordRequestV002 with an x509Certificate")
	}
	if len(hr.Digest) != 32 {
		return nil, nil, fmt.Errorf("a digest of %d bytes, not a SHA-256", len(hr.Digest))
	}
	cert, err := x509.ParseCertificate(hr.Signature.Verifier.Certificate.RawBytes)
	if err != nil {
		return nil, nil, err
	}
	if d := hr.Signature.Verifier.KeyDetails; d != "PKIX_ECDSA_P256_SHA_256" {
		return nil, nil, fmt.Errorf("keyDetails %.64q, want PKIX_ECDSA_P256_SHA_256", d)
	}
	body, err := pub.EntryBody([32]byte(hr.Digest), hr.Signature.Content, cert)
	if err != nil {
		return nil, nil, err
	}
	entry, err := pub.ParseBody(body)
	if err != nil {
		return nil, nil, err
	}
	// The body names the curve: a P-384 key does not read as P-256.
	if !bytes.Contains(body, []byte(`"PKIX_ECDSA_P256_SHA_256"`)) {
		return nil, nil, errors.New("the certificate's key is not P-256")
	}
	if err := entry.CheckSignature(); err != nil {
		return nil, nil, err
	}
	return body, cert, nil
}

// allow limits entries by identity.
func (h *handler) allow(id string) bool {
	now := h.c.Now()
	h.mu.Lock()
	defer h.mu.Unlock()
	lim := h.limits[id]
	if lim == nil {
		if len(h.limits) >= maxIdentities {
			for k, v := range h.limits {
				if v.TokensAt(now) >= identityBurst {
					delete(h.limits, k) // as good as new
				}
			}
			if len(h.limits) >= maxIdentities {
				return false
			}
		}
		lim = rate.NewLimiter(identityRate, identityBurst)
		h.limits[id] = lim
	}
	return lim.AllowN(now, 1)
}

func (h *handler) entry(w http.ResponseWriter, code int, e *rekorv1.TransparencyLogEntry) {
	raw, err := pub.MarshalEntry(e)
	if err != nil {
		h.fail(w, err)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(code)
	w.Write(raw)
}

// fail answers for what is not the caller's fault.
func (h *handler) fail(w http.ResponseWriter, err error) {
	switch {
	case errors.Is(err, ErrNotLogged):
		h.refuse(w, http.StatusNotFound, "not in the log")
	case errors.Is(err, ErrBusy), errors.Is(err, context.DeadlineExceeded), errors.Is(err, ErrClosed):
		w.Header().Set("Retry-After", "1")
		h.refuse(w, http.StatusServiceUnavailable, "the log is busy or waits for its witnesses: try again")
	case errors.Is(err, context.Canceled):
		// Nobody listens.
	default:
		h.l.log.Error("transparency log", "error", err)
		h.refuse(w, http.StatusInternalServerError, "the log failed")
	}
}

// refuse answers in the form of Rekor v2's errors.
func (h *handler) refuse(w http.ResponseWriter, code int, message string) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(code)
	json.NewEncoder(w).Encode(map[string]any{"code": code, "message": message})
}
