package tlog_test

import (
	"context"
	"encoding/base64"
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

// witness is one by C2SP tlog-witness: it cosigns what continues all that it
// cosigned before, and nothing else.
type witness struct {
	*forge.LogWitness
	away atomic.Bool

	mu   sync.Mutex
	last pub.Checkpoint
	bad  error // why it refused
}

func (w *witness) ServeHTTP(rw http.ResponseWriter, r *http.Request) {
	w.mu.Lock()
	defer w.mu.Unlock()
	raw, err := io.ReadAll(r.Body)
	if err != nil || w.away.Load() || r.URL.Path != "/add-checkpoint" {
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
	// The test's log is new, so the first checkpoint of all tells its key.
	cp := parse(signed)
	w.last.Origin = cp.Origin
	if old == 0 {
		proof, w.last.Root = nil, emptyRoot
	}
	if err := pub.CheckConsistent(w.last, cp, proof); err != nil {
		w.bad = err
		http.Error(rw, err.Error(), http.StatusUnprocessableEntity)
		return
	}
	w.last = cp
	w.Time = time.Now()
	text, _, _ := strings.Cut(signed, "\n\n")
	io.WriteString(rw, w.Cosign([]byte(text+"\n")))
}

var emptyRoot = [32]byte{
	0xe3, 0xb0, 0xc4, 0x42, 0x98, 0xfc, 0x1c, 0x14, 0x9a, 0xfb, 0xf4, 0xc8, 0x99, 0x6f, 0xb9, 0x24,
	0x27, 0xae, 0x41, 0xe4, 0x64, 0x9b, 0x93, 0x4c, 0xa4, 0x95, 0x99, 0x1b, 0x78, 0x52, 0xb8, 0x55,
}

// parse reads a checkpoint's text; a real witness verifies its signature too.
func parse(signed string) (cp pub.Checkpoint) {
	var root string
	fmt.Sscanf(signed, "%s\n%d\n%s\n", &cp.Origin, &cp.Size, &root)
	b, _ := base64.StdEncoding.DecodeString(root)
	copy(cp.Root[:], b)
	return cp
}

func TestWitnesses(t *testing.T) {
	w := &witness{LogWitness: forge.NewLogWitness(t, "witness.example.com", time.Now())}
	web := httptest.NewServer(w)
	defer web.Close()
	c := config(t.TempDir())
	c.WitnessPolicy = fmt.Appendf(nil, "witness one %s %s\nquorum one\n", w.Info().Key, web.URL)
	l, err := tlog.Open(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if ws := l.Witnesses(); len(ws) != 1 || ws[0].Key != w.Info().Key {
		t.Fatalf("%+v", ws)
	}
	s := newSigner(t)
	before := time.Now().Add(-time.Second)
	for _, what := range []string{"a", "b", "c"} {
		body := s.body(t, what)
		e, err := l.Append(t.Context(), body)
		if err != nil {
			t.Fatal(err)
		}
		in, err := pub.Verify(e, body, []pub.Log{l.Info()}, l.Witnesses())
		if err != nil {
			t.Fatal(err)
		}
		if len(in.Cosigned) != 1 || in.Cosigned[0].Time.Before(before.Truncate(time.Second)) {
			t.Errorf("%+v", in.Cosigned)
		}
	}
	if w.bad != nil {
		t.Error(w.bad)
	}

	// Without its witness the log takes entries and acknowledges none.
	w.away.Store(true)
	body := s.body(t, "d")
	if _, err := l.Integrate(t.Context(), body); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if _, err := l.Append(ctx, body); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
	w.away.Store(false)
	e, err := l.Append(t.Context(), body)
	if err != nil {
		t.Fatal(err)
	}
	if in, err := pub.Verify(e, body, []pub.Log{l.Info()}, l.Witnesses()); err != nil || len(in.Cosigned) != 1 || in.Index != 3 {
		t.Errorf("%v, %+v", err, in)
	}
}

func TestRefusesWitnessPolicies(t *testing.T) {
	for name, policy := range map[string]string{
		"no quorum": "witness one " + forge.NewLogWitness(t, "w", time.Now()).Info().Key + " http://127.0.0.1:1/\n",
		"no key":    "witness one x http://127.0.0.1:1/\nquorum one\n",
		"garbage":   "garbage\n",
	} {
		c := config(t.TempDir())
		c.WitnessPolicy = []byte(policy)
		if l, err := tlog.Open(t.Context(), c); err == nil {
			l.Close()
			t.Errorf("%s passes", name)
		}
	}
}
