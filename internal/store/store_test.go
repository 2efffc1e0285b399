package store

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/rootlink/rootlink/pkg/attest"
	"github.com/rootlink/rootlink/pkg/svid"
)

var epoch = time.Date(2027, 3, 1, 12, 0, 0, 0, time.UTC)

func open(t *testing.T, path string) *Store {
	t.Helper()
	s, err := Open(t.Context(), path, func() time.Time { return epoch })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func newStore(t *testing.T) *Store { return open(t, filepath.Join(t.TempDir(), "server.db")) }

// checkMemory is the invariant of the package: what is in memory is what is on
// disk.
func checkMemory(t *testing.T, s *Store) {
	t.Helper()
	s.writing.Lock()
	defer s.writing.Unlock()
	disk, err := s.load(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	s.mu.RLock()
	defer s.mu.RUnlock()
	disk.generation = s.mem.generation
	if diff := cmp.Diff(disk, s.mem, cmp.AllowUnexported(memory{})); diff != "" {
		t.Fatalf("memory is not what is on disk (-disk +memory):\n%s", diff)
	}
}

func web(i int) Entry {
	return Entry{
		SPIFFEID: fmt.Sprintf("spiffe://example.org/w%d", i), ParentID: "spiffe://example.org/node",
		Selectors: []Selector{{"unix", "uid:1"}, {"binary", "uid:1"}}, X509TTL: time.Hour,
		DNSNames: []string{"a.example"}, ExpiresAt: epoch.Add(time.Hour), Hint: "h",
	}
}

func create(t *testing.T, s *Store, e Entry) *Entry {
	t.Helper()
	r, err := s.CreateEntries(t.Context(), []Entry{e})
	if err != nil || r[0].Err != nil {
		t.Fatal(err, r)
	}
	return r[0].Entry
}

func agent(id string) Agent {
	secure := true
	return Agent{
		ID: id, AttestationType: "tpmnode", Serial: "1", ExpiresAt: epoch.Add(time.Hour), CanReattest: true, KeyBound: true,
		Selectors: []Selector{{"tpmnode", "ek:00"}},
		Attestation: &Attestation{
			At: epoch, EKHash: [32]byte{1}, AKName: []byte{2}, AKCert: []byte{3}, SecureBoot: &secure,
			PCRs:     []attest.PCRBank{{Bank: "sha256", Values: map[uint32][]byte{7: {7}}}},
			EventLog: &attest.TypedDigest{Alg: "sha256", Value: []byte{9}},
		},
	}
}

// fill writes one of everything.
func fill(t *testing.T, s *Store) {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	e := create(t, s, web(1))
	create(t, s, web(2))
	_, err := s.UpdateEntry(t.Context(), e.ID, func(e *Entry) error { e.Hint = "changed"; return nil })
	must(err)
	_, err = s.PutAttestedAgent(t.Context(), agent("spiffe://example.org/spire/agent/a"), "first")
	must(err)
	_, err = s.SetNewSerial(t.Context(), "spiffe://example.org/spire/agent/a", "1", "2", epoch.Add(2*time.Hour))
	must(err)
	_, err = s.PutAttestedAgent(t.Context(), agent("spiffe://example.org/spire/agent/b"), "")
	must(err)
	must(s.BanAgent(t.Context(), "spiffe://example.org/spire/agent/b"))
	must(s.AddAuthority(t.Context(), Authority{ID: "a0", Certificate: []byte{0}, KeyFile: "k0", PreparedAt: epoch}))
	must(s.ActivateAuthority(t.Context(), "a0", epoch))
	must(s.AddAuthority(t.Context(), Authority{ID: "a1", Certificate: []byte{1}, KeyFile: "k1", PreparedAt: epoch}))
	must(s.ActivateAuthority(t.Context(), "a1", epoch))
	must(s.AddAuthority(t.Context(), Authority{ID: "a2", Certificate: []byte{2}, KeyFile: "k2", PreparedAt: epoch.Add(time.Hour)}))
	must(s.AddJWTAuthority(t.Context(), jwtAuthority("j0")))
	must(s.ActivateJWTAuthority(t.Context(), "j0", epoch))
	must(s.AddJWTAuthority(t.Context(), jwtAuthority("j1")))
	must(s.ActivateJWTAuthority(t.Context(), "j1", epoch))
	must(s.AddJWTAuthority(t.Context(), jwtAuthority("j2")))
	_, err = s.PutPCRPolicy(t.Context(), "good", func(*attest.PCRPolicy) ([]attest.PCRProfile, error) { return profiles("one"), nil })
	must(err)
	must(putBundle(t, s, "other.org", 1))
	federated := web(3)
	federated.FederatesWith = []string{"other.org"}
	create(t, s, federated)
}

func putBundle(t *testing.T, s *Store, td string, sequence uint64) error {
	_, err := s.PutFederatedBundle(t.Context(), td, func(*FederatedBundle) (*FederatedBundle, error) {
		return &FederatedBundle{X509Authorities: [][]byte{{1, 2}}, JWTAuthorities: []FederatedJWTKey{{ID: "k", PublicKey: []byte{3}, ExpiresAt: 4}}, RefreshHint: 5, Sequence: sequence}, nil
	})
	return err
}

func profiles(name string) []attest.PCRProfile {
	return []attest.PCRProfile{{Name: name, Banks: map[string]map[string]string{
		"sha256": {"7": "0000000000000000000000000000000000000000000000000000000000000007"},
	}}}
}

func TestSurvivesReopening(t *testing.T) {
	path := filepath.Join(t.TempDir(), "server.db")
	s := open(t, path)
	fill(t, s)
	checkMemory(t, s)
	before, err := s.Entries()
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Entries(); !errors.Is(err, ErrClosed) {
		t.Fatal(err)
	}
	s = open(t, path)
	checkMemory(t, s)
	after, err := s.Entries()
	if err != nil || !reflect.DeepEqual(before, after) {
		t.Fatalf("%v\n%v\n%v", before, after, err)
	}
	list, err := s.Authorities()
	if err != nil || len(list) != 3 || list[0].State != svid.Retired || list[1].State != svid.Active || list[2].State != svid.Prepared {
		t.Fatalf("%+v, %v", list, err)
	}
}

// A copy of the files at any moment after an acknowledgement is what a power
// cut leaves behind: all that was acknowledged must be in it.
func TestAcknowledgedSurvivesAPowerCut(t *testing.T) {
	dir := t.TempDir()
	s := open(t, filepath.Join(dir, "server.db"))
	for i := range 20 {
		e := create(t, s, web(i))
		cut := t.TempDir()
		for _, name := range []string{"server.db", "server.db-wal"} {
			b, err := os.ReadFile(filepath.Join(dir, name))
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(cut, name), b, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		after := open(t, filepath.Join(cut, "server.db"))
		if got, err := after.Entry(e.ID); err != nil || !reflect.DeepEqual(got, e) {
			t.Fatalf("entry %d: %v, %v", i, got, err)
		}
	}
}

// Each write fails before it persisted, or after: either way nothing is
// acknowledged and memory stays what the disk holds.
func TestCommitFails(t *testing.T) {
	disk := errors.New("disk full")
	writes := map[string]func(s *Store) error{
		"create": func(s *Store) error { _, err := s.CreateEntries(t.Context(), []Entry{web(9)}); return err },
		"update": func(s *Store) error {
			all, err := s.Entries()
			if err != nil {
				return err
			}
			_, err = s.UpdateEntry(t.Context(), all[0].ID, func(e *Entry) error { e.Hint = "again"; return nil })
			return err
		},
		"delete": func(s *Store) error {
			all, err := s.Entries()
			if err != nil {
				return err
			}
			return s.DeleteEntry(t.Context(), all[0].ID)
		},
		"attest": func(s *Store) error {
			_, err := s.PutAttestedAgent(t.Context(), agent("spiffe://example.org/spire/agent/c"), "")
			return err
		},
		"ban": func(s *Store) error { return s.BanAgent(t.Context(), "spiffe://example.org/spire/agent/a") },
		"reset": func(s *Store) error {
			return s.EvictAgent(t.Context(), "spiffe://example.org/spire/agent/a", "1", "tpm_reset", "")
		},
		"evict": func(s *Store) error { return s.DeleteAgent(t.Context(), "spiffe://example.org/spire/agent/a") },
		"activate": func(s *Store) error {
			_, err := s.ActivateNewSerial(t.Context(), "spiffe://example.org/spire/agent/a", "2")
			return err
		},
		"authority": func(s *Store) error {
			return s.AddAuthority(t.Context(), Authority{ID: "a3", Certificate: []byte{3}, KeyFile: "k3", PreparedAt: epoch})
		},
		"JWT authority": func(s *Store) error { return s.AddJWTAuthority(t.Context(), jwtAuthority("j3")) },
		"rotate JWT":    func(s *Store) error { return s.ActivateJWTAuthority(t.Context(), "j2", epoch.Add(2*time.Hour)) },
		"drop JWT":      func(s *Store) error { return s.DropJWTAuthority(t.Context(), "j2") },
		"rotate":        func(s *Store) error { return s.ActivateAuthority(t.Context(), "a2", epoch.Add(2*time.Hour)) },
		"policy": func(s *Store) error {
			_, err := s.PutPCRPolicy(t.Context(), "good", func(*attest.PCRPolicy) ([]attest.PCRProfile, error) { return profiles("two"), nil })
			return err
		},
		"bundle":     func(s *Store) error { return putBundle(t, s, "other.org", 2) },
		"new bundle": func(s *Store) error { return putBundle(t, s, "third.org", 1) },
		"dissociate": func(s *Store) error {
			return s.DeleteFederatedBundle(t.Context(), "other.org", DeleteDissociate)
		},
		"drop bundle and entries": func(s *Store) error { return s.DeleteFederatedBundle(t.Context(), "other.org", DeleteEntries) },
		"taint":                   func(s *Store) error { return s.TaintAuthority(t.Context(), "a0", epoch.Add(time.Hour)) },
		"revoke":                  func(s *Store) error { return s.RevokeAuthority(t.Context(), "a0", epoch.Add(time.Hour)) },
		"taint JWT":               func(s *Store) error { return s.TaintJWTAuthority(t.Context(), "j0", epoch.Add(time.Hour)) },
		"forget policy":           func(s *Store) error { return s.DeletePCRPolicy(t.Context(), "good") },
		"serial":                  func(s *Store) error { _, err := s.NextTrustSerial(t.Context()); return err },
		"pin":                     func(s *Store) error { _, err := s.PinAK(t.Context(), [32]byte{1}, []byte{1}, false); return err },
	}
	for name, write := range writes {
		for _, persisted := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s persisted=%t", name, persisted), func(t *testing.T) {
				s := newStore(t)
				fill(t, s)
				s.failCommit = func(commit func() error) error {
					if persisted {
						if err := commit(); err != nil {
							t.Error(err)
						}
					}
					return disk
				}
				if err := write(s); !errors.Is(err, disk) {
					t.Fatalf("acknowledged: %v", err)
				}
				s.failCommit = nil
				checkMemory(t, s)
				// Done again it succeeds, or says that it is done.
				if err := write(s); err != nil && !errors.Is(err, ErrNotFound) && !errors.Is(err, ErrExists) && !errors.Is(err, ErrConflict) &&
					!(persisted && strings.HasSuffix(name, "authority")) {
					t.Fatal(err)
				}
				checkMemory(t, s)
			})
		}
	}
}

// While it is not known what the disk holds, nothing is said to be known.
func TestUnknownStateIsNotServed(t *testing.T) {
	s := newStore(t)
	fill(t, s)
	s.failCommit = func(func() error) error {
		s.db.Close() // and the disk is gone
		return errors.New("I/O error")
	}
	if _, err := s.CreateEntries(t.Context(), []Entry{web(9)}); !errors.Is(err, ErrUnknownState) {
		t.Fatal(err)
	}
	if _, err := s.Entries(); !errors.Is(err, ErrUnknownState) {
		t.Fatal(err)
	}
	if _, err := s.Agent("spiffe://example.org/spire/agent/a"); !errors.Is(err, ErrUnknownState) {
		t.Fatal(err)
	}
}

func TestRefusesNewerSchema(t *testing.T) {
	path := filepath.Join(t.TempDir(), "server.db")
	s := open(t, path)
	if _, err := s.db.Exec(`INSERT INTO migrations VALUES (?, 0)`, len(migrations)+1); err != nil {
		t.Fatal(err)
	}
	s.Close()
	if _, err := Open(t.Context(), path, nil); !errors.Is(err, ErrNewerSchema) {
		t.Fatal(err)
	}
}

func TestFilesAreOurs(t *testing.T) {
	path := filepath.Join(t.TempDir(), "server.db")
	s := open(t, path)
	create(t, s, web(1))
	for _, name := range []string{path, path + "-wal", path + "-shm"} {
		fi, err := os.Stat(name)
		if err != nil || fi.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", name, fi.Mode(), err)
		}
	}
	s.Close()
	if err := os.Chmod(path, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(t.Context(), path, nil); err == nil {
		t.Fatal("opened a database that everybody can read")
	}
}

func TestDurabilitySettings(t *testing.T) {
	s := newStore(t)
	for pragma, want := range map[string]string{"journal_mode": "wal", "synchronous": "2", "foreign_keys": "1", "busy_timeout": "5000"} {
		var got string
		if err := s.db.QueryRow("PRAGMA " + pragma).Scan(&got); err != nil || got != want {
			t.Errorf("%s = %q, want %q (%v)", pragma, got, want, err)
		}
	}
}

func TestBatchIsAllOrNothing(t *testing.T) {
	s := newStore(t)
	first := create(t, s, web(0))
	r, err := s.CreateEntries(t.Context(), []Entry{web(1), web(0), web(2), web(1)})
	if err != nil {
		t.Fatal(err)
	}
	if r[0].Err != nil || r[2].Err != nil || !errors.Is(r[1].Err, ErrExists) || r[1].Entry.ID != first.ID ||
		!errors.Is(r[3].Err, ErrExists) || r[3].Entry.ID != r[0].Entry.ID {
		t.Fatalf("%+v", r)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.CreateEntries(ctx, []Entry{web(3), web(4)}); err == nil {
		t.Fatal("a cancelled call was acknowledged")
	}
	all, err := s.Entries()
	if err != nil || len(all) != 3 {
		t.Fatalf("%d entries, %v", len(all), err)
	}
	checkMemory(t, s)
}

func TestConcurrentWriters(t *testing.T) {
	s := newStore(t)
	e := create(t, s, web(0))
	const writers, each = 8, 20
	var wg sync.WaitGroup
	for range writers {
		wg.Go(func() {
			for range each {
				if _, err := s.UpdateEntry(t.Context(), e.ID, func(e *Entry) error { e.X509TTL += time.Second; return nil }); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	got, err := s.Entry(e.ID)
	if err != nil || got.Revision != writers*each || got.X509TTL != time.Hour+writers*each*time.Second {
		t.Fatalf("%+v, %v", got, err)
	}
	checkMemory(t, s)
}

// A full disk is an error, nothing is half written, and when there is room
// again the store goes on.
func TestFullDisk(t *testing.T) {
	s := newStore(t)
	var pages int
	if err := s.db.QueryRow(`PRAGMA page_count`).Scan(&pages); err != nil {
		t.Fatal(err)
	}
	if _, err := s.db.Exec(fmt.Sprintf(`PRAGMA max_page_count = %d`, pages+8)); err != nil {
		t.Fatal(err)
	}
	var err error
	made := 0
	for ; err == nil; made++ {
		if made > 100_000 {
			t.Fatal("the disk never fills")
		}
		batch := make([]Entry, 10)
		for i := range batch {
			batch[i] = web(made*10 + i)
		}
		_, err = s.CreateEntries(t.Context(), batch)
	}
	made--
	checkMemory(t, s)
	all, err := s.Entries()
	if err != nil || len(all) != made*10 {
		t.Fatalf("%d entries of %d acknowledged, %v", len(all), made*10, err)
	}
	if _, err := s.db.Exec(`PRAGMA max_page_count = 100000`); err != nil {
		t.Fatal(err)
	}
	create(t, s, web(-1))
	checkMemory(t, s)
}
