package link

import (
	"crypto/x509"
	"encoding/json"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/rootlink/rootlink/internal/forge"
	"github.com/rootlink/rootlink/pkg/attest"
	"github.com/rootlink/rootlink/pkg/timestamp"
	"github.com/rootlink/rootlink/pkg/tlog"
)

// clockwork adds a timestamp authority, a log and a witness to a scene, all of
// them in trust.json. A test changes what they do before it signs.
type clockwork struct {
	*scene
	tsa     *forge.TSA
	log     *forge.Log
	witness *forge.LogWitness
	root    TrustedRoot
}

func newClockwork(t testing.TB) *clockwork {
	t.Helper()
	s := newScene(t)
	c := &clockwork{scene: s, tsa: forge.NewTSA(t, nil), log: forge.NewLog(t, "log.example.org")}
	c.witness = forge.NewLogWitness(t, "witness.example", s.at)
	c.root.Authorities = []Authority{{Certificate: s.Authority, Start: s.Authority.NotBefore, End: s.Authority.NotAfter}}
	c.root.Timestamps = []timestamp.Authority{c.tsa.Authority()}
	l := c.log.Info()
	l.Start, l.Operator = s.Now.Add(-time.Hour), "example.org"
	c.root.Logs = []tlog.Log{l}
	c.log.Fill(5)
	w := c.witness.Info()
	c.file.Witnesses = []Witness{{Name: w.Name, Key: w.Key, Operator: "somebody.example"}}
	return c
}

// stamped signs and lets add put things into the bundle.
func (c *clockwork) stamped(t testing.TB, add func(b *Bundle) *Bundle) {
	t.Helper()
	raw, err := c.root.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	c.file.TrustedRoot = raw
	b := add(mustParse(t, c.sign(t)))
	out, err := b.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	c.in.Links = []LinkInput{{Name: "build", Bundle: out}}
}

func (c *clockwork) token(t testing.TB, b *Bundle, at time.Time) *Bundle {
	t.Helper()
	out, err := b.WithTimestamps(c.tsa.Token(t, b.Signature(), at, nil))
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func (c *clockwork) logged(t testing.TB, b *Bundle) *Bundle {
	t.Helper()
	body, err := tlog.EntryBody(PayloadDigest(b.payload), b.signature, b.leaf)
	if err != nil {
		t.Fatal(err)
	}
	out, err := b.WithLogEntry(c.log.Entry(c.log.Append(body)))
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// An SVID lives minutes; the link is verified for as long as trust.json lasts.
func TestTimestampOutlivesTheSVID(t *testing.T) {
	c := newClockwork(t)
	signed := c.at
	c.stamped(t, func(b *Bundle) *Bundle { return c.token(t, b, signed) })
	c.at = c.at.AddDate(0, 1, 0)
	res := c.accepts(t)
	l := res.Links[0].Time
	if !l.Attested || !l.At.Equal(signed) || l.Authorities != 1 || len(l.Sources) != 1 || !l.Sources[0].Counted || l.Sources[0].SameOperator {
		t.Errorf("%+v", l)
	}
	if !res.Time.Attested || !res.Time.At.Equal(signed) {
		t.Errorf("%+v", res.Time)
	}
	for _, want := range []string{"attested by 1 authority", "https://tsa.forge.example/tsa", "operator forge.example"} {
		if !strings.Contains(res.Text(), want) {
			t.Errorf("the text lacks %q:\n%s", want, res.Text())
		}
	}
}

func TestRefusesStrippedTokenAfterExpiry(t *testing.T) {
	c := newClockwork(t)
	c.stamped(t, func(b *Bundle) *Bundle { return b })
	c.at = c.at.AddDate(0, 0, 1)
	c.refuses(t, "svid.validity", ErrExpired, "without a timestamp")
}

func TestRefusesStrippedTokenWhereOneIsNeeded(t *testing.T) {
	c := newClockwork(t)
	c.file.Time.AuthoritiesNeeded = 1
	c.stamped(t, func(b *Bundle) *Bundle { return b })
	c.refuses(t, "time.authorities", ErrNoTime, "0 distinct", "1 needed")
}

func TestRefusesLinkSignedAfterTheSVIDExpired(t *testing.T) {
	c := newClockwork(t)
	late := time.Time{}
	c.stamped(t, func(b *Bundle) *Bundle {
		late = b.leaf.NotAfter.Add(time.Second)
		return c.token(t, b, late)
	})
	c.at = late.Add(time.Hour)
	c.refuses(t, "svid.validity", ErrExpired, "before the link was signed")
}

func TestRefusesTimeBeforeTheSVID(t *testing.T) {
	c := newClockwork(t)
	c.stamped(t, func(b *Bundle) *Bundle { return c.token(t, b, b.leaf.NotBefore.Add(-time.Second)) })
	c.refuses(t, "svid.validity", ErrNotYetValid)
}

// One time inside and one outside: the latest alone would have passed.
func TestRefusesAnyTimeOutsideTheSVID(t *testing.T) {
	c := newClockwork(t)
	other := forge.NewTSA(t, nil)
	c.root.Timestamps = append(c.root.Timestamps, other.Authority())
	c.stamped(t, func(b *Bundle) *Bundle {
		b, err := b.WithTimestamps(other.Token(t, b.Signature(), b.leaf.NotBefore.Add(-time.Second), nil))
		if err != nil {
			t.Fatal(err)
		}
		return c.token(t, b, c.at)
	})
	c.refuses(t, "svid.validity", ErrNotYetValid)
}

func TestRefusesTokenForAnotherSignature(t *testing.T) {
	c := newClockwork(t)
	c.stamped(t, func(b *Bundle) *Bundle {
		out, err := b.WithTimestamps(c.tsa.Token(t, []byte("another signature"), c.at, nil))
		if err != nil {
			t.Fatal(err)
		}
		return c.token(t, out, c.at)
	})
	c.refuses(t, "time.tokens", timestamp.ErrWrongImprint)
}

func TestRefusesTwoTokensOfOneAuthorityAsTwo(t *testing.T) {
	c := newClockwork(t)
	c.file.Time.AuthoritiesNeeded = 2
	turned := c.tsa.Rotated(t, nil)
	c.root.Timestamps = append(c.root.Timestamps, turned.Authority())
	c.stamped(t, func(b *Bundle) *Bundle {
		b = c.token(t, c.token(t, b, c.at), c.at)
		out, err := b.WithTimestamps(turned.Token(t, b.Signature(), c.at, nil))
		if err != nil {
			t.Fatal(err)
		}
		return out
	})
	res := c.refuses(t, "time.authorities", ErrNoTime, "1 distinct", "2 needed")
	if n := len(res.Links[0].Time.Sources); n != 3 {
		t.Errorf("%d sources", n)
	}
	// A witness of the log is the second one.
	c = newClockwork(t)
	c.file.Time.AuthoritiesNeeded = 2
	c.log.Witnesses = []*forge.LogWitness{c.witness}
	c.stamped(t, func(b *Bundle) *Bundle { return c.logged(t, c.token(t, b, c.at)) })
	if l := c.accepts(t).Links[0].Time; l.Authorities != 2 || len(l.Logs) != 1 || !l.Logs[0].SameOperator {
		t.Errorf("%+v", l)
	}
}

func TestRefusesTimesThatDisagree(t *testing.T) {
	c := newClockwork(t)
	c.log.Witnesses = []*forge.LogWitness{c.witness}
	c.witness.Time = c.at.Add(maxTimeSpread + time.Second)
	c.stamped(t, func(b *Bundle) *Bundle { return c.logged(t, c.token(t, b, c.at)) })
	c.at = c.at.AddDate(0, 0, 1)
	c.refuses(t, "time.agreement", ErrCrypto, "disagree")
}

func TestRefusesTimeInTheFuture(t *testing.T) {
	c := newClockwork(t)
	c.stamped(t, func(b *Bundle) *Bundle { return c.token(t, b, c.at.Add(MaxClockSkew+time.Second)) })
	c.refuses(t, "time.agreement", ErrNotYetValid)
}

func TestRefusesTimeBeforeTheNonce(t *testing.T) {
	v := &linkVerifier{verified: new(attest.Verified), times: []time.Time{{}}}
	for _, early := range []time.Duration{maxBeforeNonce, maxBeforeNonce + time.Second} {
		v.first = v.verified.NonceTime().Add(-early)
		if _, err := v.timeAfterNonce(); (err == nil) != (early == maxBeforeNonce) {
			t.Errorf("%s before the nonce: %v", early, err)
		}
	}
}

func TestRefusesWhenNobodyIsKnown(t *testing.T) {
	c := newClockwork(t)
	c.root.Timestamps = nil
	c.stamped(t, func(b *Bundle) *Bundle { return c.token(t, b, c.at) })
	c.refuses(t, "time.known", ErrNoTime, "none by an authority")

	// An entry of a known log attests no time for a token that nobody knows.
	c = newClockwork(t)
	c.root.Timestamps = nil
	c.stamped(t, func(b *Bundle) *Bundle { return c.logged(t, c.token(t, b, c.at)) })
	c.refuses(t, "time.known", ErrNoTime)

	c = newClockwork(t)
	c.root.Logs = nil
	c.stamped(t, func(b *Bundle) *Bundle { return c.logged(t, b) })
	c.refuses(t, "time.known", ErrNoTime, "none in a log")

	// Beside a known one, an unknown one counts for nothing, and is said so.
	c = newClockwork(t)
	stranger := forge.NewTSA(t, nil)
	c.file.Time.AuthoritiesNeeded = 1
	c.stamped(t, func(b *Bundle) *Bundle {
		out, err := b.WithTimestamps(stranger.Token(t, b.Signature(), c.at, nil))
		if err != nil {
			t.Fatal(err)
		}
		return c.token(t, out, c.at)
	})
	res := c.accepts(t)
	if l := res.Links[0].Time; l.Authorities != 1 || len(l.Sources) != 2 || l.Sources[0].Counted || !strings.Contains(res.Text(), "NOT COUNTED") {
		t.Errorf("%+v\n%s", l, res.Text())
	}
}

func TestRefusesLogEntryOfAnotherBundle(t *testing.T) {
	c := newClockwork(t)
	c.stamped(t, func(b *Bundle) *Bundle {
		other := c.logged(t, mustParse(t, testBundle(t)))
		out, err := b.WithLogEntry(other.LogEntries()[0])
		if err != nil {
			t.Fatal(err)
		}
		return out
	})
	c.refuses(t, "time.log_entries", tlog.ErrOtherEntry)
}

func TestRefusesLogOutsideItsWindow(t *testing.T) {
	c := newClockwork(t)
	c.root.Logs[0].Start, c.root.Logs[0].End = c.Now.AddDate(-1, 0, 0), c.Now.Add(-time.Hour)
	c.stamped(t, func(b *Bundle) *Bundle { return c.logged(t, c.token(t, b, c.at)) })
	c.refuses(t, "time.agreement", tlog.ErrWindow)
}

func TestRefusesForkedLog(t *testing.T) {
	c := newClockwork(t)
	c.stamped(t, func(b *Bundle) *Bundle { return c.logged(t, b) })
	seen := c.accepts(t).Checkpoints
	if len(seen) != 1 || seen[0].Size != 6 || seen[0].Origin != "log.example.org" {
		t.Fatalf("%+v", seen)
	}
	c.in.Seen = seen
	c.accepts(t)
	// The log tells another story about its first six entries.
	c.in.Seen = slices.Clone(seen)
	c.in.Seen[0].Root = strings.Repeat("ab", 32)
	c.refuses(t, "time.log_entries", tlog.ErrFork, "two trees of size 6")
	// Of another size nothing can be said without the log.
	c.in.Seen[0].Size = 4
	if res := c.accepts(t); res.Checkpoints[0].Size != 6 {
		t.Errorf("%+v", res.Checkpoints)
	}
}

func TestRefusesRevokedBetweenNonceAndSigning(t *testing.T) {
	c := newClockwork(t)
	c.stamped(t, func(b *Bundle) *Bundle { return c.token(t, b, c.at.Add(30*time.Second)) })
	between := c.at.Add(20 * time.Second)
	c.at = c.at.AddDate(0, 0, 1)
	c.file.Revocations = []Revocation{{Kind: RevokedExecutable, ID: hexOf(c.Leaf.Tool), From: &between}}
	c.refuses(t, "revocation", ErrPolicy)
	// Revoked after it was signed: the link is as good as it was.
	later := between.Add(time.Minute)
	c.file.Revocations[0].From = &later
	c.accepts(t)
}

func TestLogged(t *testing.T) {
	all := []string{LoggedSignature, LoggedAK, LoggedAuthority, LoggedAttestationCA}
	build := func(t *testing.T, without string) *clockwork {
		c := newClockwork(t)
		c.requirement().Logged = all
		proof := func(cert, issuer *x509.Certificate, index uint64) json.RawMessage {
			raw, err := tlog.MarshalEntry(c.log.Entry(index))
			if err != nil {
				t.Fatal(err)
			}
			return raw
		}
		if without != LoggedAuthority {
			c.file.LogProofs = append(c.file.LogProofs, proof(c.Authority, c.Authority, c.log.AppendCertificate(t, c.Authority, c.Authority, c.AuthorityKey())))
		}
		if without != LoggedAttestationCA {
			c.file.LogProofs = append(c.file.LogProofs, proof(c.CA.Cert, c.CA.Cert, c.log.AppendCertificate(t, c.CA.Cert, c.CA.Cert, c.CA.Key)))
		}
		c.stamped(t, func(b *Bundle) *Bundle {
			if without == LoggedSignature {
				return b
			}
			return c.logged(t, b)
		})
		if without != LoggedAK {
			e, err := attest.FromCertificate(mustParse(t, c.in.Links[0].Bundle).leaf)
			if err != nil {
				t.Fatal(err)
			}
			ak, err := x509.ParseCertificate(e.AKCert)
			if err != nil {
				t.Fatal(err)
			}
			c.in.Links[0].LogProofs = [][]byte{[]byte("{}"), proof(ak, c.CA.Cert, c.log.AppendCertificate(t, ak, c.CA.Cert, c.CA.Key))}
			if name := LogProofName(e.AKCert); !strings.HasSuffix(name, ".tlog.json") {
				t.Error(name)
			}
		}
		return c
	}
	whole := build(t, "")
	l := whole.accepts(t).Links[0].Time
	if len(l.Logs) != 4 {
		t.Errorf("%+v", l.Logs)
	}
	trust := whole.trust(t)
	for range 2 { // the proofs in trust.json are remembered
		if res, err := Verify(whole.in, trust, whole.at); err != nil || !slices.Equal(res.Links[0].Time.Logs, l.Logs) {
			t.Errorf("%+v, %v", res.Links[0].Time.Logs, err)
		}
	}
	for _, without := range all {
		t.Run("without "+without, func(t *testing.T) {
			build(t, without).refuses(t, "requirement.logged", ErrNotLogged, loggedName(without))
		})
	}
}
