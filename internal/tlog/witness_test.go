package tlog_test

import (
	"context"
	"errors"
	"fmt"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/rootlink/rootlink/internal/forge"
	"github.com/rootlink/rootlink/internal/tlog"
	pub "github.com/rootlink/rootlink/pkg/tlog"
)

func TestWitnesses(t *testing.T) {
	w := &forge.WitnessServer{LogWitness: forge.NewLogWitness(t, "witness.example.com", time.Now())}
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
	if err := w.Refused(); err != nil {
		t.Error(err)
	}

	// Without its witness the log takes entries and acknowledges none.
	w.Away.Store(true)
	body := s.body(t, "d")
	if _, err := l.Integrate(t.Context(), body); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if _, err := l.Append(ctx, body); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
	w.Away.Store(false)
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
