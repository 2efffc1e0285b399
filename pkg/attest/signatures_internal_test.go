package attest

import (
	"errors"
	"fmt"
	"testing"
)

func TestSignaturesAreBoundedAndRememberOnlyGoodOnes(t *testing.T) {
	s := NewSignatures()
	calls := 0
	ask := func(name string, err error) error {
		_, got := s.check(rememberKey(rememberedQuote, []byte(name)), func() (tpmHash, error) {
			calls++
			return tpmHash{}, err
		})
		return got
	}
	bad := errors.New("bad")
	for range 2 {
		if err := ask("bad", bad); !errors.Is(err, bad) {
			t.Fatal(err)
		}
	}
	if calls != 2 {
		t.Errorf("a bad signature was checked %d times, want each time", calls)
	}
	calls = 0
	for i := range 5 * maxRemembered {
		if err := errors.Join(ask("in use", nil), ask(fmt.Sprint(i), nil)); err != nil {
			t.Fatal(err)
		}
		if n := len(s.young) + len(s.old); n > 2*maxRemembered {
			t.Fatalf("%d remembered", n)
		}
	}
	if want := 1 + 5*maxRemembered; calls != want {
		t.Errorf("%d checks, want %d: what is in use must stay", calls, want)
	}
	if rememberKey(1, []byte("a"), []byte("bc")) == rememberKey(1, []byte("ab"), []byte("c")) || rememberKey(1, []byte("a")) == rememberKey(2, []byte("a")) {
		t.Error("different things have one key")
	}
}
