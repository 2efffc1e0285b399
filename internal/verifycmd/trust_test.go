package verifycmd

import (
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/pem"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/internal/forge"
	"github.com/rootlink/rootlink/pkg/envelope"
)

func TestRefusesTrustThatWasRolledBack(t *testing.T) {
	d := newDesk(t)
	d.trust.Serial = 6
	d.writeTrust(t)
	if code, out, errOut := d.verify(t, bundleName); code != cli.ExitOK {
		t.Fatalf("exit %d\n%s%s", code, out, errOut)
	}
	d.trust.Serial = 5
	d.writeTrust(t)
	if code, _, errOut := d.verify(t, bundleName); code != cli.ExitPolicy || !strings.Contains(errOut, "rolled back") {
		t.Errorf("exit %d: %s", code, errOut)
	}
	// It is still so the next time: the lower serial was not remembered.
	if code, _, _ := d.verify(t, bundleName); code != cli.ExitPolicy {
		t.Errorf("exit %d at the second try", code)
	}
	// A state that was damaged is no reason to believe anything.
	d.write(t, "state", []byte("{"))
	if code, _, errOut := d.verify(t, bundleName); code != cli.ExitInternal || !strings.Contains(errOut, "not a trust state") {
		t.Errorf("exit %d: %s", code, errOut)
	}
}

// Whoever can replace trust.json must not be able to replace its key as well.
func TestRefusesTrustOfAnotherKey(t *testing.T) {
	d := newDesk(t)
	id, err := envelope.Fingerprint(d.key.Public())
	if err != nil {
		t.Fatal(err)
	}
	_, out, _ := d.verify(t, bundleName)
	if !strings.Contains(out, id) || !strings.Contains(out, "SEEN FOR THE FIRST TIME") {
		t.Errorf("the first use does not show the key:\n%s", out)
	}
	if _, out, _ = d.verify(t, bundleName); strings.Contains(out, "FIRST TIME") {
		t.Errorf("the second use:\n%s", out)
	}
	if code, out, errOut := d.verify(t, "--trust-key", id, bundleName); code != cli.ExitOK {
		t.Errorf("pinned: exit %d\n%s%s", code, out, errOut)
	}
	own := d.key
	d.key = forge.P256(t)
	d.trust.Serial++
	d.writeTrust(t)
	for range 2 { // the stranger's key is not remembered
		if code, _, errOut := d.verify(t, bundleName); code != cli.ExitCrypto || !strings.Contains(errOut, "signed by another key") || !strings.Contains(errOut, "--trust-key") {
			t.Errorf("exit %d: %s", code, errOut)
		}
	}
	if code, _, errOut := d.verify(t, "--trust-key", id, "--trust-state", d.path("fresh"), bundleName); code != cli.ExitCrypto {
		t.Errorf("exit %d: %s", code, errOut)
	}
	// Unless it is pinned: then the trust domain has changed hands on purpose.
	d.write(t, "new.pem", publicPEM(t, d.key))
	if code, _, errOut := d.verify(t, "--trust-key", "new.pem", bundleName); code != cli.ExitOK {
		t.Errorf("exit %d: %s", code, errOut)
	}
	d.key = own
	d.trust.Serial++
	d.writeTrust(t)
	if code, _, _ := d.verify(t, bundleName); code != cli.ExitCrypto {
		t.Errorf("the old key still counts: exit %d", code)
	}
}

func publicPEM(t *testing.T, key *ecdsa.PrivateKey) []byte {
	t.Helper()
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})
}

func TestRefusesUnsignedTrust(t *testing.T) {
	d := newDesk(t)
	d.write(t, "trust.json", []byte("{}"))
	doc, err := os.ReadFile(d.path("unsigned.json"))
	if err != nil {
		t.Fatal(err)
	}
	d.write(t, "trust.json", doc)
	if code, _, errOut := d.verify(t, bundleName); code != cli.ExitCrypto || !strings.Contains(errOut, "not signed") || !strings.Contains(errOut, "rootlink trust sign --key") {
		t.Errorf("exit %d: %s", code, errOut)
	}
}

func TestRefusesTwoTrustsWithOneSerial(t *testing.T) {
	d := newDesk(t)
	d.verify(t, bundleName)
	d.trust.Expires = d.trust.Expires.Add(time.Hour)
	d.writeTrust(t)
	if code, _, errOut := d.verify(t, bundleName); code != cli.ExitPolicy || !strings.Contains(errOut, "another history") || !strings.Contains(errOut, "somebody is shown another") {
		t.Errorf("exit %d: %s", code, errOut)
	}
}

// Even an expired trust.json with a high serial must not lock out the right one.
func TestExpiredTrustIsNotRemembered(t *testing.T) {
	d := newDesk(t)
	d.trust.Serial, d.trust.Expires = 1000, d.trust.Issued.Add(time.Minute)
	d.writeTrust(t)
	if code, _, _ := d.verify(t, bundleName); code != cli.ExitPolicy {
		t.Fatalf("exit %d", code)
	}
	d.trust.Serial, d.trust.Expires = 5, d.now.Add(time.Hour)
	d.writeTrust(t)
	if code, _, errOut := d.verify(t, bundleName); code != cli.ExitOK {
		t.Errorf("exit %d: %s", code, errOut)
	}
}

func TestStateIsInTheXDGDirectoryByDefault(t *testing.T) {
	d := newDesk(t)
	t.Setenv("XDG_STATE_HOME", d.path("xdg"))
	if code, _, errOut := d.run(t, "verify", "--trust", "trust.json", "--identity", "spiffe://example.org/build", bundleName); code != cli.ExitOK {
		t.Fatalf("exit %d: %s", code, errOut)
	}
	if raw, err := os.ReadFile(d.path("xdg/rootlink/trust-state.json")); err != nil || !strings.Contains(string(raw), `"example.org `) {
		t.Errorf("%s %v", raw, err)
	}
}
