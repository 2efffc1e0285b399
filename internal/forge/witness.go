package forge

import (
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/rootlink/rootlink/pkg/tlog"
)

// WitnessServer is a witness by C2SP tlog-witness, for one log: it cosigns what
// continues all that it cosigned before, and nothing else. It believes the log's
// first checkpoint; a real witness knows the log's key.
type WitnessServer struct {
	*LogWitness
	Away atomic.Bool // it answers nobody

	mu      sync.Mutex
	last    tlog.Checkpoint
	refused error // guarded by mu
}

// Refused is why it last refused a checkpoint, nil when it refused none.
func (w *WitnessServer) Refused() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.refused
}

func (w *WitnessServer) ServeHTTP(rw http.ResponseWriter, r *http.Request) {
	w.mu.Lock()
	defer w.mu.Unlock()
	raw, err := io.ReadAll(r.Body)
	if err != nil || w.Away.Load() || r.URL.Path != "/add-checkpoint" {
		http.Error(rw, "away", http.StatusServiceUnavailable)
		return
	}
	head, signed, _ := strings.Cut(string(raw), "\n\n")
	lines := strings.Split(head, "\n")
	var old uint64
	if _, err := fmt.Sscanf(lines[0], "old %d", &old); err != nil {
		http.Error(rw, err.Error(), http.StatusBadRequest)
		return
	}
	var proof [][]byte
	for _, l := range lines[1:] {
		h, err := base64.StdEncoding.DecodeString(l)
		if err != nil {
			http.Error(rw, err.Error(), http.StatusBadRequest)
			return
		}
		proof = append(proof, h)
	}
	if old != w.last.Size {
		rw.Header().Set("Content-Type", "text/x.tlog.size")
		rw.WriteHeader(http.StatusConflict)
		fmt.Fprintf(rw, "%d\n", w.last.Size)
		return
	}
	next := readCheckpoint(signed)
	w.last.Origin = next.Origin
	if old == 0 {
		proof, w.last.Root = nil, sha256.Sum256(nil)
	}
	if err := tlog.CheckConsistent(w.last, next, proof); err != nil {
		w.refused = err
		http.Error(rw, err.Error(), http.StatusUnprocessableEntity)
		return
	}
	w.last = next
	w.Time = time.Now()
	text, _, _ := strings.Cut(signed, "\n\n")
	_, _ = io.WriteString(rw, w.Cosign([]byte(text+"\n")))
}

func readCheckpoint(signed string) (c tlog.Checkpoint) {
	var root string
	_, _ = fmt.Sscanf(signed, "%s\n%d\n%s\n", &c.Origin, &c.Size, &root)
	b, _ := base64.StdEncoding.DecodeString(root)
	copy(c.Root[:], b)
	return c
}
