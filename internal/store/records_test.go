package store

import (
	"database/sql"
	"errors"
	"path/filepath"
	"reflect"
	"testing"
	"time"

	"github.com/rootlink/rootlink/pkg/attest"
)

func TestPolicyRevisionsAreKeptForEver(t *testing.T) {
	s := newStore(t)
	put := func(name string) *PolicyRevision {
		t.Helper()
		p, err := s.PutPCRPolicy(t.Context(), "good", func(*attest.PCRPolicy) ([]attest.PCRProfile, error) { return profiles(name), nil })
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	put("one")
	put("two")
	if err := s.DeletePCRPolicy(t.Context(), "good"); err != nil {
		t.Fatal(err)
	}
	if _, err := s.PCRPolicy("good"); !errors.Is(err, ErrNotFound) {
		t.Fatal(err)
	}
	if err := s.DeletePCRPolicy(t.Context(), "good"); !errors.Is(err, ErrNotFound) {
		t.Fatal(err)
	}
	// A name that comes back goes on counting: a revision says one thing only.
	if p := put("three"); p.Policy.Revision != 3 {
		t.Fatalf("revision %d", p.Policy.Revision)
	}
	all, err := s.PCRPolicyRevisions(t.Context())
	if err != nil || len(all) != 3 || all[1].DeletedAt.IsZero() || all[0].Digest != all[0].Policy.Digest() {
		t.Fatalf("%+v, %v", all, err)
	}
	checkMemory(t, s)
	bad := errors.New("no")
	if _, err := s.PutPCRPolicy(t.Context(), "good", func(*attest.PCRPolicy) ([]attest.PCRProfile, error) { return nil, bad }); !errors.Is(err, bad) {
		t.Fatal(err)
	}
	if _, err := s.PutPCRPolicy(t.Context(), "good", func(*attest.PCRPolicy) ([]attest.PCRProfile, error) { return nil, nil }); err == nil {
		t.Fatal("stored a policy without profiles")
	}
}

func TestPins(t *testing.T) {
	s := newStore(t)
	ek, other := [32]byte{1}, [32]byte{2}
	for _, c := range []struct {
		name    byte
		replace bool
		want    byte
	}{{1, false, 1}, {1, false, 1}, {2, false, 1}, {2, true, 1}, {1, false, 2}, {2, true, 2}} {
		if got, err := s.PinAK(t.Context(), ek, []byte{c.name}, c.replace); err != nil || got[0] != c.want {
			t.Fatalf("%+v: %v, %v", c, got, err)
		}
	}
	if got, err := s.PinTPM(t.Context(), []byte("seed"), ek); err != nil || got != ek {
		t.Fatal(got, err)
	}
	if got, err := s.PinTPM(t.Context(), []byte("seed"), other); err != nil || got != ek {
		t.Fatal(got, err)
	}
}

func TestAgents(t *testing.T) {
	s := newStore(t)
	const id = "spiffe://example.org/spire/agent/a"
	if _, err := s.Agent(id); !errors.Is(err, ErrNotFound) {
		t.Fatal(err)
	}
	if err := s.BanAgent(t.Context(), id); !errors.Is(err, ErrNotFound) {
		t.Fatal(err)
	}
	if _, err := s.PutAttestedAgent(t.Context(), agent(id), ""); err != nil {
		t.Fatal(err)
	}
	if _, err := s.SetNewSerial(t.Context(), id, "wrong", "2", epoch); !errors.Is(err, ErrConflict) {
		t.Fatal(err)
	}
	if _, err := s.SetNewSerial(t.Context(), id, "1", "2", epoch.Add(time.Hour)); err != nil {
		t.Fatal(err)
	}
	if _, err := s.ActivateNewSerial(t.Context(), id, "3"); !errors.Is(err, ErrConflict) {
		t.Fatal(err)
	}
	for range 2 { // the second call finds it done
		a, err := s.ActivateNewSerial(t.Context(), id, "2")
		if err != nil || a.Serial != "2" || a.NewSerial != "" || !a.ExpiresAt.Equal(epoch.Add(time.Hour)) {
			t.Fatalf("%+v, %v", a, err)
		}
	}
	if err := s.BanAgent(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	if _, err := s.PutAttestedAgent(t.Context(), agent(id), ""); !errors.Is(err, ErrBanned) {
		t.Fatal(err)
	}
	if banned, err := s.Banned(id); err != nil || !banned {
		t.Fatal(banned, err)
	}
	// A node that has itself evicted does not get rid of its ban that way.
	for serial, want := range map[string]error{"2": ErrBanned, "": ErrBanned} {
		if err := s.EvictAgent(t.Context(), id, serial, "tpm_reset", ""); !errors.Is(err, want) {
			t.Fatalf("evict with serial %q: %v", serial, err)
		}
	}
	if err := s.DeleteAgent(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	if _, err := s.PutAttestedAgent(t.Context(), agent(id), "back"); err != nil {
		t.Fatal(err)
	}
	list, err := s.AgentHistory(t.Context(), id, 10)
	if err != nil {
		t.Fatal(err)
	}
	var events []string
	for _, e := range list {
		events = append(events, e.Event)
	}
	if want := []string{"attested", "deleted", "banned", "renewed", "attested"}; !reflect.DeepEqual(events, want) {
		t.Fatalf("%v, want %v", events, want)
	}
	if err := s.EvictAgent(t.Context(), id, "another", "tpm_reset", ""); !errors.Is(err, ErrConflict) {
		t.Fatal(err)
	}
	if err := s.EvictAgent(t.Context(), id, "1", "tpm_reset", ""); err != nil {
		t.Fatal(err)
	}
	if err := s.EvictAgent(t.Context(), id, "1", "tpm_reset", ""); !errors.Is(err, ErrNotFound) {
		t.Fatal(err)
	}
	checkMemory(t, s)
}

// TestBanOfADeletedAgent: whoever was evicted can still be kept out, and nobody
// who never attested gets a record.
func TestBanOfADeletedAgent(t *testing.T) {
	s := newStore(t)
	const id = "spiffe://example.org/spire/agent/tpmnode/a"
	if _, err := s.PutAttestedAgent(t.Context(), agent(id), ""); err != nil {
		t.Fatal(err)
	}
	if err := s.DeleteAgent(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	if err := s.BanAgent(t.Context(), id+"b"); !errors.Is(err, ErrNotFound) {
		t.Fatalf("one that never attested: %v", err)
	}
	for range 2 {
		if err := s.BanAgent(t.Context(), id); err != nil {
			t.Fatal(err)
		}
	}
	a, err := s.Agent(id)
	if err != nil || !a.Banned || a.AttestationType != "tpmnode" || a.Serial != "" || a.Attestation != nil {
		t.Fatalf("%+v, %v", a, err)
	}
	if _, err := s.PutAttestedAgent(t.Context(), agent(id), ""); !errors.Is(err, ErrBanned) {
		t.Fatal(err)
	}
	checkMemory(t, s)
	if err := s.DeleteAgent(t.Context(), id); err != nil { // which lifts it
		t.Fatal(err)
	}
	if _, err := s.PutAttestedAgent(t.Context(), agent(id), ""); err != nil {
		t.Fatal(err)
	}
}

func TestTrustSerialsNeverRepeat(t *testing.T) {
	path := filepath.Join(t.TempDir(), "server.db")
	last := uint64(0)
	for range 3 {
		s := open(t, path)
		for range 3 {
			n, err := s.NextTrustSerial(t.Context())
			if err != nil || n <= last {
				t.Fatalf("%d after %d, %v", n, last, err)
			}
			last = n
		}
		s.Close()
	}
}

func TestRefusesTwoActiveAuthorities(t *testing.T) {
	s := newStore(t)
	fill(t, s)
	if err := s.ActivateAuthority(t.Context(), "a1", epoch); !errors.Is(err, ErrNotFound) {
		t.Fatalf("an active authority was activated again: %v", err)
	}
	if _, err := s.db.Exec(`UPDATE authorities SET state = 'active'`); err == nil {
		t.Fatal("the database holds two active authorities")
	}
	var n int
	if err := s.db.QueryRow(`SELECT COUNT(*) FROM authorities WHERE state = 'active'`).Scan(&n); err != nil && !errors.Is(err, sql.ErrNoRows) || n != 1 {
		t.Fatal(n, err)
	}
}
