package server

import (
	"bytes"
	"io"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
)

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// Two agents on one TPM: each attestation looks right, and only that the
// replaced agent still calls gives the second one away.
func TestAlarmsOfAReplacedAgentThatStillLives(t *testing.T) {
	var log lockedBuffer
	w := newWorld(t, func(c *Config) {
		c.Log = slog.New(slog.NewTextHandler(io.MultiWriter(&log, t.Output()), &slog.HandlerOptions{Level: slog.LevelWarn}))
	})
	n := w.attest(w.newTPM(), attestOptions{})
	newer := w.attest(n.tpm, attestOptions{})
	const alarm = "ALARM: a newer attestation replaced"

	// A slow agent has not had its answer yet, and then a call is on its way.
	w.clock.add(unusedGrace - time.Second)
	wantReason(t, n.sync(), types.PermissionDeniedDetails_AGENT_NOT_ACTIVE)
	if err := newer.sync(); err != nil {
		t.Fatal(err)
	}
	wantReason(t, n.sync(), types.PermissionDeniedDetails_AGENT_NOT_ACTIVE)
	if strings.Contains(log.String(), alarm) {
		t.Fatal("an agent's own attestation gave an alarm")
	}
	w.clock.add(rivalGrace + time.Second)
	for range 3 {
		wantReason(t, n.sync(), types.PermissionDeniedDetails_AGENT_NOT_ACTIVE)
	}
	for _, want := range []string{alarm, "replaced_agent=127.0.0.1", "newer_attestation_from=127.0.0.1"} {
		if strings.Count(log.String(), want) != 1 {
			t.Errorf("want %q once in\n%s", want, log.String())
		}
	}
	// A replacement after that is another event, if its SVID is used or not.
	w.attest(n.tpm, attestOptions{})
	w.clock.add(unusedGrace)
	wantReason(t, n.sync(), types.PermissionDeniedDetails_AGENT_NOT_ACTIVE)
	if strings.Count(log.String(), alarm) != 2 {
		t.Error("the second replacement gave no alarm of its own")
	}
}

// An agent that renewed its SVID has calls on their way with the one before,
// however long ago it attested.
func TestRenewalIsNoRival(t *testing.T) {
	var r rivals
	at := time.Unix(1e9, 0)
	r.inUse("a", "1", at)
	renewed := at.Add(time.Hour)
	r.inUse("a", "2", renewed)
	r.inUse("a", "2", renewed.Add(2*time.Second))
	if r.settled("a", "2", at, renewed.Add(rivalGrace-1)) {
		t.Error("a call on its way counts as a rival's")
	}
	if !r.settled("a", "2", at, renewed.Add(rivalGrace)) {
		t.Error("a rival counts as a call on its way")
	}
}
