package verifycmd

import (
	"crypto/sha256"
	"crypto/x509"
	"fmt"
	"strings"
	"testing"

	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/internal/forge"
	"github.com/rootlink/rootlink/pkg/link"
)

// A file that lists an older authority is one of the same line, and so are those
// before it.
func TestRefusesTrustRolledBackBehindAnOlderAuthority(t *testing.T) {
	d := newDesk(t)
	d.trust.Serial = 6
	alone := d.trust.TrustedRoot
	ca := forge.P256(t)
	older := forge.Sign(t, &x509.Certificate{
		NotBefore: d.world.Authority.NotBefore.AddDate(-1, 0, 0), NotAfter: d.world.Authority.NotAfter,
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign, URIs: d.world.Authority.URIs,
	}, nil, ca.Public(), ca)
	both, err := link.MarshalTrustedRoot([]link.Authority{{Certificate: older, Start: older.NotBefore}, {Certificate: d.world.Authority, Start: d.world.Authority.NotBefore}})
	if err != nil {
		t.Fatal(err)
	}
	d.trust.TrustedRoot = both
	d.writeTrust(t)
	if code, out, errOut := d.verify(t, bundleName); code != cli.ExitOK {
		t.Fatalf("exit %d\n%s%s", code, out, errOut)
	}
	d.trust.Serial, d.trust.TrustedRoot = 5, alone
	d.writeTrust(t)
	if code, _, errOut := d.verify(t, bundleName); code != cli.ExitPolicy || !strings.Contains(errOut, "rolled back") {
		t.Errorf("exit %d: %s", code, errOut)
	}
}

// What earlier releases wrote has one line, by the oldest authority.
func TestRefusesTrustOlderThanAnEarlierReleaseSaw(t *testing.T) {
	d := newDesk(t)
	line := fmt.Sprintf("example.org %x", sha256.Sum256(d.world.Authority.RawSubjectPublicKeyInfo))
	d.write(t, "state", []byte(`{"format":"rootlink-trust-state","version":1,"serials":{"`+line+`":6}}`))
	if code, _, errOut := d.verify(t, bundleName); code != cli.ExitPolicy || !strings.Contains(errOut, "rolled back") {
		t.Errorf("exit %d: %s", code, errOut)
	}
	d.trust.Serial = 6
	d.writeTrust(t)
	if code, out, errOut := d.verify(t, bundleName); code != cli.ExitOK {
		t.Errorf("exit %d\n%s%s", code, out, errOut)
	}
}
