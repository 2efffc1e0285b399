package store

import (
	"errors"
	"path/filepath"
	"testing"
	"time"
)

func TestFederatedBundles(t *testing.T) {
	path := filepath.Join(t.TempDir(), "server.db")
	s := open(t, path)
	for _, td := range []string{"other.org", "another.org"} {
		if err := putBundle(t, s, td, 7); err != nil {
			t.Fatal(err)
		}
	}
	s.Close()
	s = open(t, path)
	checkMemory(t, s)
	list, err := s.FederatedBundles()
	if err != nil || len(list) != 2 || list[0].TrustDomain != "another.org" || list[1].Sequence != 7 || list[1].JWTAuthorities[0].ID != "k" {
		t.Fatal(list, err)
	}
	if _, err := s.FederatedBundle("absent.org"); !errors.Is(err, ErrNotFound) {
		t.Fatal(err)
	}
	refused := errors.New("refused")
	if _, err := s.PutFederatedBundle(t.Context(), "other.org", func(*FederatedBundle) (*FederatedBundle, error) { return nil, refused }); !errors.Is(err, refused) {
		t.Fatal(err)
	}
	checkMemory(t, s)
}

// No entry names a bundle that is not there, whichever of the two goes.
func TestRefusesEntryWithoutItsFederatedBundle(t *testing.T) {
	s := newStore(t)
	e := web(1)
	e.FederatesWith = []string{"other.org"}
	var missing *NoBundleError
	r, err := s.CreateEntries(t.Context(), []Entry{e, web(2)})
	if err != nil || !errors.As(r[0].Err, &missing) || r[1].Err != nil {
		t.Fatal(r, err)
	}
	if _, err := s.UpdateEntry(t.Context(), r[1].Entry.ID, func(e *Entry) error { e.FederatesWith = []string{"other.org"}; return nil }); !errors.As(err, &missing) {
		t.Fatal(err)
	}
	if err := putBundle(t, s, "other.org", 1); err != nil {
		t.Fatal(err)
	}
	fed := create(t, s, e)
	var used *BundleInUseError
	if err := s.DeleteFederatedBundle(t.Context(), "other.org", DeleteRestrict); !errors.As(err, &used) || used.Entries != 1 {
		t.Fatal(err)
	}
	before, err := s.Generation()
	if err != nil {
		t.Fatal(err)
	}
	if err := s.DeleteFederatedBundle(t.Context(), "other.org", DeleteDissociate); err != nil {
		t.Fatal(err)
	}
	got, err := s.Entry(fed.ID)
	if err != nil || len(got.FederatesWith) != 0 || got.Revision != fed.Revision+1 || got.CreatedAt != fed.CreatedAt {
		t.Fatal(got, err)
	}
	if after, _ := s.Generation(); after == before {
		t.Fatal("who looked at the entries before is not told")
	}
	if err := s.DeleteFederatedBundle(t.Context(), "other.org", DeleteRestrict); !errors.Is(err, ErrNotFound) {
		t.Fatal(err)
	}
	if err := putBundle(t, s, "other.org", 1); err != nil {
		t.Fatal(err)
	}
	if _, err := s.UpdateEntry(t.Context(), fed.ID, func(e *Entry) error { e.FederatesWith = []string{"other.org"}; return nil }); err != nil {
		t.Fatal(err)
	}
	if err := s.DeleteFederatedBundle(t.Context(), "other.org", DeleteEntries); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Entry(fed.ID); !errors.Is(err, ErrNotFound) {
		t.Fatal(err)
	}
	checkMemory(t, s)
}

func TestDistrustOfAuthorities(t *testing.T) {
	s := newStore(t)
	fill(t, s)
	sequence, err := s.BundleSequence()
	if err != nil {
		t.Fatal(err)
	}
	for _, id := range []string{"a1", "a2"} { // active, prepared
		if err := s.TaintAuthority(t.Context(), id, epoch); !errors.Is(err, ErrConflict) {
			t.Error(id, err)
		}
	}
	if err := s.TaintAuthority(t.Context(), "absent", epoch); !errors.Is(err, ErrNotFound) {
		t.Error(err)
	}
	for i, at := range []time.Time{epoch.Add(time.Hour), epoch.Add(2 * time.Hour)} { // the first counts
		if err := s.TaintAuthority(t.Context(), "a0", at); err != nil {
			t.Fatal(err)
		}
		if err := s.RevokeAuthority(t.Context(), "a0", at); err != nil {
			t.Fatal(err)
		}
		list, err := s.Authorities()
		if err != nil || !list[0].TaintedAt.Equal(epoch.Add(time.Hour)) || !list[0].RevokedAt.Equal(epoch.Add(time.Hour)) {
			t.Fatal(i, list[0], err)
		}
	}
	if after, _ := s.BundleSequence(); after != sequence+2 {
		t.Errorf("bundle sequence %d, was %d", after, sequence)
	}
	checkMemory(t, s)
}
