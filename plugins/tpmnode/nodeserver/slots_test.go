package nodeserver

import (
	"context"
	"errors"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// EK certificates travel in every link, so a few addresses can begin as many
// attestations as there are slots with somebody's, and answer none.
func TestStalledAttestationsMakeRoom(t *testing.T) {
	h := newHost(t, "", nil)
	// The oldest of them is real, and waits for an answer that does not come.
	stalled, challenged := newAgent(t, h), make(chan struct{})
	stalled.stall = "proof"
	stalled.pause = func(step string) {
		if step == "proof" {
			close(challenged)
		}
	}
	ended := make(chan error, 1)
	go func() {
		_, err := stalled.do(t, h)
		ended <- err
	}()
	<-challenged
	for range maxSessions - 1 {
		x := h.plugin.slots.take(func(error) { t.Error("not the oldest made room") })
		defer h.plugin.slots.release(x)
	}
	mustAttest(t, h, newAgent(t, h))
	if err := <-ended; status.Code(err) != codes.Unavailable {
		t.Errorf("the stalled attestation: %v", err)
	}
}

// An attestation whose TPM has answered stays, however many come after it.
func TestAttestationThatProvedItsTPMKeepsItsSlot(t *testing.T) {
	h := newHost(t, "", nil)
	a := newAgent(t, h)
	a.pause = func(step string) {
		if step != "ack" {
			return
		}
		for range 2 * maxSessions {
			h.plugin.slots.take(func(error) {})
		}
	}
	mustAttest(t, h, a)
}

// One TPM in bad hands answers as often as it likes.
func TestOneTPMDoesNotHoldAllSlots(t *testing.T) {
	var s slots
	var evicted []int
	for i := range maxSessions {
		x := s.take(func(err error) {
			if !errors.Is(err, errEvicted) {
				t.Error(err)
			}
			evicted = append(evicted, i)
		})
		ek := [32]byte{1}
		if i == 0 {
			ek = [32]byte{2} // the oldest is alone with its TPM
		}
		s.prove(x, ek)
	}
	_, cancel := context.WithCancelCause(t.Context())
	defer cancel(nil)
	if s.take(cancel) == nil || len(evicted) != 1 || evicted[0] != 1 {
		t.Errorf("made room: %v", evicted)
	}
}
