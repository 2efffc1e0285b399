package store

import (
	"errors"
	"path/filepath"
	"testing"
	"time"

	"github.com/rootlink/rootlink/pkg/svid"
)

func jwtAuthority(id string) JWTAuthority {
	return JWTAuthority{ID: id, PublicKey: []byte(id), KeyFile: id + ".key", NotBefore: epoch, NotAfter: epoch.Add(time.Hour), PreparedAt: epoch}
}

// One is active at a time, what was prepared cannot be skipped, and the sequence
// of the bundle grows with each that comes or goes.
func TestJWTAuthorities(t *testing.T) {
	path := filepath.Join(t.TempDir(), "server.db")
	s := open(t, path)
	states := func(want ...svid.State) {
		t.Helper()
		for range 2 { // and again from disk
			list, err := s.JWTAuthorities()
			if err != nil || len(list) != len(want) {
				t.Fatal(list, err)
			}
			for i, a := range list {
				if a.State != want[i] || a.ActivatedAt.IsZero() != (a.State == svid.Prepared) || a.RetiredAt.IsZero() != (a.State != svid.Retired) {
					t.Fatalf("%+v, want %v", a, want)
				}
			}
			s.Close()
			s = open(t, path)
		}
	}
	sequence := func() uint64 {
		t.Helper()
		n, err := s.BundleSequence()
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	for _, id := range []string{"j1", "j2"} {
		before := sequence()
		if err := s.AddJWTAuthority(t.Context(), jwtAuthority(id)); err != nil {
			t.Fatal(err)
		}
		if sequence() != before+1 {
			t.Error("the bundle's sequence stands still")
		}
	}
	if err := s.AddJWTAuthority(t.Context(), jwtAuthority("j1")); err == nil {
		t.Fatal("two of one name")
	}
	states(svid.Prepared, svid.Prepared)
	if err := s.ActivateJWTAuthority(t.Context(), "j1", epoch); err != nil {
		t.Fatal(err)
	}
	states(svid.Active, svid.Prepared)
	for _, id := range []string{"j1", "nobody"} {
		if err := s.ActivateJWTAuthority(t.Context(), id, epoch); !errors.Is(err, ErrNotFound) {
			t.Fatal(err)
		}
	}
	states(svid.Active, svid.Prepared)
	if err := s.DropJWTAuthority(t.Context(), "j1"); !errors.Is(err, ErrNotFound) {
		t.Fatal("dropped the one that signs:", err)
	}
	if err := s.ActivateJWTAuthority(t.Context(), "j2", epoch.Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	states(svid.Retired, svid.Active)
	before := sequence()
	if err := s.DropJWTAuthority(t.Context(), "j1"); err != nil || sequence() != before+1 {
		t.Fatal(err)
	}
	states(svid.Active)
	s.Close()
}
