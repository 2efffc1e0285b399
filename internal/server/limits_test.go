package server

import (
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/rootlink/rootlink/internal/forge"
	"github.com/rootlink/rootlink/internal/store"
	"github.com/rootlink/rootlink/pkg/attest"
)

func leafNumber(n int) (h [32]byte) {
	binary.BigEndian.PutUint64(h[:], uint64(n))
	return h
}

// A leaf is remembered for at least as long as its nonce is good, whenever in
// the life of a generation it comes.
func TestReplayCacheRemembersForANoncesLife(t *testing.T) {
	for offset := time.Duration(0); offset < 3*attest.NonceLifetime; offset += 7 * time.Second {
		var c replayCache
		at := forge.Epoch()
		for n := 0; at.Before(forge.Epoch().Add(offset)); n++ { // others before it
			if err := c.use(leafNumber(1000+n), at); err != nil {
				t.Fatal(err)
			}
			at = at.Add(time.Second)
		}
		first := at
		if err := c.use(leafNumber(1), at); err != nil {
			t.Fatal(err)
		}
		for n := 0; !at.After(first.Add(attest.NonceLifetime)); n++ {
			if err := c.use(leafNumber(1), at); !errors.Is(err, errLeafUsed) {
				t.Fatalf("forgotten after %v (offset %v): %v", at.Sub(first), offset, err)
			}
			if err := c.use(leafNumber(2000+n), at); err != nil {
				t.Fatal(err)
			}
			at = at.Add(time.Second)
		}
	}
}

func TestReplayCacheForgetsAndIsBounded(t *testing.T) {
	var c replayCache
	at := forge.Epoch()
	for range 10 {
		for n := range 1000 {
			if err := c.use(leafNumber(n), at); err != nil {
				t.Fatal(err)
			}
		}
		at = at.Add(3 * attest.NonceLifetime)
		c.use(leafNumber(-1), at) // turns
		at = at.Add(3 * attest.NonceLifetime)
	}
	if n := len(c.now) + len(c.old); n > 1002 {
		t.Fatalf("%d leaves are remembered", n)
	}
	// Full, it refuses rather than forgetting.
	c.now = make(map[[32]byte]struct{}, maxRemembered)
	for n := range maxRemembered {
		c.now[leafNumber(n)] = struct{}{}
	}
	c.turned = at
	if err := c.use(leafNumber(maxRemembered), at); !errors.Is(err, errReplayFull) {
		t.Fatal(err)
	}
}

func TestAddressLimiter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newAddressLimiter(1, 2)
		start := time.Now()
		for range 5 { // two at once, then one a second
			if err := l.wait(t.Context(), "192.0.2.1", 10*time.Second); err != nil {
				t.Fatal(err)
			}
		}
		if took := time.Since(start); took != 3*time.Second {
			t.Errorf("five attestations took %v", took)
		}
		at := time.Now()
		if err := l.wait(t.Context(), "192.0.2.2", time.Second); err != nil || !time.Now().Equal(at) {
			t.Errorf("another address waits: %v", err)
		}
		// What would take too long is refused at once.
		if err := l.wait(t.Context(), "192.0.2.1", 500*time.Millisecond); err == nil || !time.Now().Equal(at) {
			t.Errorf("not refused at once: %v", err)
		}
	})
}

func TestAddressLimiterCountsAnIPv6NetworkOnce(t *testing.T) {
	l := newAddressLimiter(1, 1)
	if l.of("2001:db8::1") != l.of("2001:db8::ffff:2") || l.of("2001:db8::1") == l.of("2001:db8:0:1::1") || l.of("192.0.2.1") == l.of("192.0.2.2") {
		t.Fatal("addresses are not told apart as they should be")
	}
}

func TestAddressLimiterIsBounded(t *testing.T) {
	l := newAddressLimiter(0.001, 1)
	for n := range maxAddresses + 100 {
		l.of(fmt.Sprint(n)).Allow()
	}
	if len(l.m) > maxAddresses {
		t.Fatalf("%d addresses", len(l.m))
	}
	if l.of("a new one") != l.shared {
		t.Fatal("a flood of addresses buys a fresh allowance")
	}
}

func TestSnake(t *testing.T) {
	for in, want := range map[string]string{"OK": "o_k", "PermissionDenied": "permission_denied", "Unavailable": "unavailable"} {
		if got := snake(in); got != want {
			t.Errorf("%s: %s, want %s", in, got, want)
		}
	}
}

func TestWithPolicies(t *testing.T) {
	in := []store.Selector{{Type: "other", Value: "pcr_policy:x"}, {Type: "tpmnode", Value: "ek:0"}, {Type: "tpmnode", Value: "pcr_policy:old"}}
	var got []string
	for _, s := range withPolicies(in, "tpmnode", []string{"new"}) {
		got = append(got, s.String())
	}
	if want := "other:pcr_policy:x tpmnode:ek:0 tpmnode:pcr_policy:new"; strings.Join(got, " ") != want {
		t.Fatalf("%v, want %s", got, want)
	}
}
