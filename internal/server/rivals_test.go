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
	w.attest(n.tpm, attestOptions{})
	const alarm = "ALARM: a newer attestation replaced"

	// A call that was on its way while the agent attested again.
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
	// A replacement after that is another event.
	w.attest(n.tpm, attestOptions{})
	w.clock.add(rivalGrace + time.Second)
	wantReason(t, n.sync(), types.PermissionDeniedDetails_AGENT_NOT_ACTIVE)
	if strings.Count(log.String(), alarm) != 2 {
		t.Error("the second replacement gave no alarm of its own")
	}
}
