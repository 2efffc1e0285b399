package link

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"testing"
	"time"

	"github.com/rootlink/rootlink/pkg/tlog"
)

// Links are judged at the same time, and fare as if it was one after the other:
// of two that show forks of one log the later is refused, whichever was done
// first.
func TestLinksSideBySideFareAsOneAfterTheOther(t *testing.T) {
	c := newClockwork(t)
	honest, forged := *c.log, *c.log
	forged.Bodies = append(slices.Clone(c.log.Bodies[:4]), []byte("another story"))
	var links []LinkInput
	for i := range 24 {
		c.stamped(t, func(b *Bundle) *Bundle {
			b = c.token(t, b, c.at)
			switch i % 6 {
			case 1, 2:
				*c.log = honest
				b = c.logged(t, b)
				honest = *c.log
			case 3:
				*c.log = forged
				b = c.logged(t, b)
				forged = *c.log
			case 4:
				b.signature = slices.Clone(b.signature)
				b.signature[len(b.signature)-1] ^= 1
			}
			return b
		})
		links = append(links, LinkInput{Name: fmt.Sprint(i), Bundle: c.in.Links[0].Bundle})
	}
	c.in.Links = links
	trust := c.scene.trust(t)

	seen, first := newCheckpoints(nil), failure{}
	var want []LinkResult
	forks := 0
	for i := range links {
		j := judgeLink(c.in, i, trust, c.at, seen, true)
		seen.merge(j.trees)
		want = append(want, j.out)
		if first.err == nil {
			first = j.first
		}
		if errors.Is(j.first.err, tlog.ErrFork) {
			forks++
		}
	}
	if forks == 0 || first.link != "3" {
		t.Fatalf("%d forks, first failure of link %q", forks, first.link)
	}
	for range 5 {
		res, err := Verify(c.in, trust, c.at)
		consistent(t, res, err)
		if !errors.Is(err, tlog.ErrFork) || res.Failure.Link != "3" {
			t.Errorf("refused for %v, link %s", err, res.Failure.Link)
		}
		for i := range want {
			// The functions that they hold cannot be compared.
			if !reflect.DeepEqual(want[i].Checks, res.Links[i].Checks) || !reflect.DeepEqual(want[i].Time, res.Links[i].Time) || want[i].Verdict != res.Links[i].Verdict || want[i].Name != res.Links[i].Name {
				t.Errorf("link %d:\n%+v\n%+v", i, want[i], res.Links[i])
			}
		}
		if !slices.Equal(res.Checkpoints, seen.largest()) {
			t.Errorf("%+v, %+v", res.Checkpoints, seen.largest())
		}
	}
}

// BenchmarkVerifyStamped is one bundle among many: a quote, an SVID, a token and
// a log entry of its own, on a machine and with authorities that all share.
func BenchmarkVerifyStamped(b *testing.B) {
	c := newClockwork(b)
	c.file.Time.AuthoritiesNeeded = 1
	var links []LinkInput
	for range 64 {
		c.stamped(b, func(x *Bundle) *Bundle { return c.logged(b, c.token(b, x, c.at)) })
		links = append(links, c.in.Links...)
	}
	trust := c.scene.trust(b)
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		c.in.Links = links[i%len(links) : i%len(links)+1]
		if _, err := Verify(c.in, trust, c.at); err != nil {
			b.Fatal(err)
		}
	}
}

// A link may name thousands of programs, a trust.json tens of thousands that are
// revoked. Both files are as large as they may be here, and nothing applies.
func TestRevocationsAreLookedUp(t *testing.T) {
	s := newScene(t)
	for i := range MaxIDs {
		s.file.Revocations = append(s.file.Revocations, Revocation{Kind: RevokedExecutable, ID: fmt.Sprintf("%064x", i%(MaxIDs/2)), Always: true})
	}
	for i := range MaxExecutables {
		s.stmt.Byproducts.Executables = append(s.stmt.Byproducts.Executables, Executable{Path: "/x", Role: fmt.Sprint(i), Digest: map[string]string{"sha256": fmt.Sprintf("f%063x", i)}})
	}
	start := time.Now()
	s.accepts(t)
	if d := time.Since(start); d > 10*time.Second {
		t.Errorf("took %s", d)
	}
	// One of them does, and the list that came first decides what is said.
	last := &s.stmt.Byproducts.Executables[MaxExecutables-1]
	last.Digest = map[string]string{"sha256": fmt.Sprintf("%064x", 7)}
	s.file.Revocations[7].Reason = "the first"
	s.in.Links = nil
	s.Leaf.Payload = sha256.Sum256([]byte("the statement")) // which sign fills in
	s.refuses(t, "revocation", ErrPolicy, "the first")
}
