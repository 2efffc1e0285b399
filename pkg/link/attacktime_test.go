package link

import (
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"testing"
	"time"

	"github.com/rootlink/rootlink/internal/forge"
	"github.com/rootlink/rootlink/pkg/tlog"
)

// Whoever stole the key of a log that was given up, and so closed in trust.json,
// makes an entry for what he signs. Without any token there is no attested time
// that the log's window would be held against.
func TestRefusesClosedLogWhereNoTimeIsAttested(t *testing.T) {
	c := newClockwork(t)
	c.requirement().Logged = []string{LoggedSignature}
	c.root.Logs[0].Start, c.root.Logs[0].End = c.Now.AddDate(-1, 0, 0), c.Now.Add(-time.Hour)
	c.stamped(t, func(b *Bundle) *Bundle { return c.logged(t, b) })
	c.refuses(t, "time.agreement", tlog.ErrWindow)
}

// One witness that trust.json lists under two names signs two checkpoints, once
// as each: its key is one vote.
func TestRefusesOneWitnessUnderTwoNamesAsTwo(t *testing.T) {
	c := newClockwork(t)
	c.file.Time.AuthoritiesNeeded = 2
	other := &forge.LogWitness{Name: "other.example", Key: c.witness.Key, Time: c.at}
	w := other.Info()
	c.file.Witnesses = append(c.file.Witnesses, Witness{Name: w.Name, Key: w.Key, Operator: "another.example"})
	c.stamped(t, func(b *Bundle) *Bundle {
		c.log.Witnesses = []*forge.LogWitness{c.witness}
		b = c.logged(t, b)
		c.log.Witnesses = []*forge.LogWitness{other}
		return c.logged(t, b)
	})
	c.refuses(t, "time.authorities", ErrNoTime, "1 distinct", "2 needed")
}

// An authority that may also date its SVIDs brings back every one that expired,
// for whoever has its key.
func TestRefusesOneKeyForTimeAndForSVIDs(t *testing.T) {
	c := newClockwork(t)
	key := c.AuthorityKey()
	root := &x509.Certificate{
		SerialNumber: c.Authority.SerialNumber, Subject: c.Authority.Subject, NotBefore: c.Authority.NotBefore, NotAfter: c.Authority.NotAfter,
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, root, root, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	a := c.tsa.Authority()
	a.Chain = []*x509.Certificate{cert}
	c.root.Timestamps = append(c.root.Timestamps, a)
	raw, err := c.root.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	c.file.TrustedRoot = raw
	if _, err := NewTrust(c.file); err == nil {
		t.Error("the SVID authority may date its own SVIDs")
	}
}

// The key of a log that was closed proves that certificates are in it for
// whoever has it now.
func TestRefusesCertificateProofsOfAClosedLog(t *testing.T) {
	c := newClockwork(t)
	c.requirement().Logged = []string{LoggedAuthority}
	raw, err := tlog.MarshalEntry(c.log.Entry(c.log.AppendCertificate(t, c.Authority, c.Authority, c.AuthorityKey())))
	if err != nil {
		t.Fatal(err)
	}
	c.file.LogProofs = []json.RawMessage{raw}
	c.stamped(t, func(b *Bundle) *Bundle { return b })
	c.accepts(t)
	c.root.Logs[0].Start, c.root.Logs[0].End = c.Now.AddDate(-1, 0, 0), c.Now.Add(-time.Hour)
	c.stamped(t, func(b *Bundle) *Bundle { return b })
	c.refuses(t, "requirement.logged", ErrNotLogged)
}

func TestRefusesHeapsOfProofsBesideALink(t *testing.T) {
	c := newClockwork(t)
	c.stamped(t, func(b *Bundle) *Bundle { return b })
	c.in.Links[0].LogProofs = make([][]byte, MaxLogProofs)
	c.accepts(t)
	c.in.Links[0].LogProofs = make([][]byte, MaxLogProofs+1)
	c.refuses(t, "log.proofs", ErrCrypto)
}
