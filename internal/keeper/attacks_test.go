package keeper_test

import (
	"bytes"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/internal/keeper"
)

func TestRefusesBundlesThatWouldSpoilTrust(t *testing.T) {
	w := newWorld(t)
	k := w.keeper(t)
	good := authority(t, epoch, time.Hour, nil)
	other := bundle(1, good)
	other.TrustDomain = "other.org"
	huge := bundle(1)
	for range 1025 {
		huge.Authorities = append(huge.Authorities, keeper.Authority{Certificate: good})
	}
	for name, b := range map[string]keeper.Bundle{"another trust domain": other, "empty": bundle(1), "huge": huge, "no name": {Authorities: other.Authorities}} {
		if err := k.Publish(b); !errors.Is(err, keeper.ErrBundle) {
			t.Errorf("%s: err = %v", name, err)
		}
	}
	if _, err := os.Stat(w.c.TrustFile); err == nil {
		t.Error("a trust.json was written")
	}
	// One bad authority does not cost the good one beside it.
	for name, bad := range map[string][]byte{
		"no CA":          authority(t, epoch, time.Hour, func(c *x509.Certificate) { c.IsCA = false }),
		"no certSign":    authority(t, epoch, time.Hour, func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageCRLSign }),
		"another domain": authority(t, epoch, time.Hour, func(c *x509.Certificate) { c.URIs[0].Host = "other.org" }),
		"critical extension": authority(t, epoch, time.Hour, func(c *x509.Certificate) {
			c.ExtraExtensions = []pkix.Extension{{Id: []int{1, 2, 3}, Critical: true, Value: []byte{5, 0}}}
		}),
		"junk":  []byte("junk"),
		"large": make([]byte, 1<<20),
	} {
		if err := k.Publish(bundle(1, bad, good)); !errors.Is(err, keeper.ErrBundle) {
			t.Errorf("%s: err = %v", name, err)
		}
		if as := w.trust(t).Authorities(); len(as) != 1 || !bytes.Equal(as[0].Certificate.Raw, good) {
			t.Errorf("%s: %d authorities", name, len(as))
		}
	}
}

// Whoever puts an old trust.json in the place of the new one, or an old backup in
// the place of the archive, brings nothing back.
func TestRefusesRolledBackFiles(t *testing.T) {
	w := newWorld(t)
	k := w.keeper(t)
	a, b, c := authority(t, epoch, time.Hour, nil), authority(t, epoch, time.Hour, nil), authority(t, epoch, time.Hour, nil)
	w.publish(t, k, 1, a)
	oldTrust, oldArchive := read(t, w.c.TrustFile), read(t, w.path("keeper/archive.json"))
	w.publish(t, k, 2, a, b)
	now := read(t, w.c.TrustFile)
	w.write(t, "trust.json", oldTrust)
	if err := k.Check(); err != nil || read(t, w.c.TrustFile) != now {
		t.Errorf("the old trust.json stayed: %v", err)
	}
	w.write(t, "keeper/archive.json", oldArchive)
	w.publish(t, w.keeper(t), 3, a, c)
	trust := w.trust(t)
	if trust.Serial() <= 2 || len(trust.Authorities()) != 3 {
		t.Errorf("serial %d, %d authorities", trust.Serial(), len(trust.Authorities()))
	}
	// The archive is lost as a whole.
	if err := os.Remove(w.path("keeper/archive.json")); err != nil {
		t.Fatal(err)
	}
	serial := trust.Serial()
	w.publish(t, w.keeper(t), 3, a)
	if trust = w.trust(t); trust.Serial() <= serial || len(trust.Authorities()) != 3 {
		t.Errorf("begun anew: serial %d, %d authorities", trust.Serial(), len(trust.Authorities()))
	}
	// A damaged one is not an empty one.
	w.write(t, "keeper/archive.json", oldArchive[:len(oldArchive)/2])
	if err := w.bare(t).Publish(bundle(4, a)); !errors.Is(err, keeper.ErrDamaged) || cli.HintOf(err) == "" {
		t.Errorf("err = %v", err)
	}
}

// Two servers with different keys would each sign a trust.json that the other's
// verifiers refuse.
func TestRefusesAnotherServersKey(t *testing.T) {
	w := newWorld(t)
	one, two := newKey(t, w, "one.pem"), newKey(t, w, "two.pem")
	a := authority(t, epoch, time.Hour, nil)
	w.c.TrustKeys = []string{one}
	w.publish(t, w.keeper(t), 1, a)
	was := w.trust(t)
	w.c.TrustKeys = []string{two}
	if err := w.bare(t).Open(); !errors.Is(err, keeper.ErrKey) {
		t.Errorf("at the start: %v", err)
	}
	if err := w.bare(t).Publish(bundle(2, a, authority(t, epoch, time.Hour, nil))); !errors.Is(err, keeper.ErrKey) {
		t.Errorf("later: %v", err)
	}
	if got := w.trust(t); got.Digest() != was.Digest() {
		t.Error("trust.json was written with the other key")
	}
	// The authority was kept all the same, and both keys together hand over.
	w.c.TrustKeys = []string{one, two}
	w.publish(t, w.keeper(t), 3, a)
	got := w.trust(t)
	if len(got.Signers()) != 2 || got.CheckSigner(was.Signers()) != nil || len(got.Authorities()) != 2 {
		t.Errorf("signed by %v, %d authorities", got.Signers(), len(got.Authorities()))
	}
	w.c.TrustKeys = []string{two}
	w.publish(t, w.keeper(t), 3, a)
	if n := len(w.trust(t).Signers()); n != 1 {
		t.Errorf("%d signers", n)
	}
}

// What is at trust_file and is not ours may be anything.
func TestRefusesToOverwriteOthersFiles(t *testing.T) {
	w := newWorld(t)
	other := newWorld(t)
	other.publish(t, other.keeper(t), 1, authority(t, epoch, time.Hour, nil))
	a := authority(t, epoch, time.Hour, nil)
	for name, text := range map[string]string{"text": "root:x:0:0\n", "another keeper's": read(t, other.c.TrustFile)} {
		w.write(t, "trust.json", text)
		if err := w.bare(t).Publish(bundle(1, a)); !errors.Is(err, keeper.ErrForeign) || read(t, w.c.TrustFile) != text {
			t.Errorf("%s: err = %v", name, err)
		}
	}
	w.write(t, "trust.json", "")
	w.publish(t, w.keeper(t), 1, a)
}

// The disk is full, or the process ends, between any two writes: the file that
// verifiers read is always a whole one, and no serial is given twice.
func TestRefusesHalfAFile(t *testing.T) {
	w := newWorld(t)
	w.publish(t, w.keeper(t), 1, authority(t, epoch, time.Hour, nil))
	was := w.trust(t)
	seen := map[uint64]string{was.Serial(): was.Digest()}
	for i, at := range []string{"keeper/archive.json", "keeper/trust.json", "trust.json", "trusted_root.json"} {
		// A directory in the file's place fails the write like a full disk.
		text := read(t, w.path(at))
		if err := errors.Join(os.Remove(w.path(at)), os.MkdirAll(w.path(at)+"/x", 0o700)); err != nil {
			t.Fatal(err)
		}
		b := authority(t, epoch, time.Hour, nil)
		if err := w.bare(t).Publish(bundle(uint64(i)+2, b)); err == nil {
			t.Errorf("%s: no error", at)
		}
		if err := os.RemoveAll(w.path(at)); err != nil {
			t.Fatal(err)
		}
		w.write(t, at, text)
		w.publish(t, w.keeper(t), uint64(i)+2, b)
		got := w.trust(t)
		if d, ok := seen[got.Serial()]; ok && d != got.Digest() {
			t.Errorf("%s: two files with serial %d", at, got.Serial())
		}
		seen[got.Serial()] = got.Digest()
		if n := len(got.Authorities()); n != i+2 {
			t.Errorf("%s: %d authorities", at, n)
		}
		if err := got.CheckSerial(was.Serial()); err != nil {
			t.Error(err)
		}
		was = got
	}
	left, err := filepath.Glob(w.path("keeper/.*tmp*"))
	if err != nil || len(left) > 0 {
		t.Errorf("left over: %v, %v", left, err)
	}
}

func TestRefusesConfigurations(t *testing.T) {
	for name, bend := range map[string]func(*world){
		"relative data_dir":  func(w *world) { w.c.DataDir = "x" },
		"no trust_file":      func(w *world) { w.c.TrustFile = "" },
		"no CA":              func(w *world) { w.c.AttestationCAs = nil },
		"no EK":              func(w *world) { w.c.EKRoots = nil },
		"no requirements":    func(w *world) { w.c.Requirements = "" },
		"one file for two":   func(w *world) { w.c.SigstoreFile = w.c.TrustFile },
		"unsigned, no key":   func(w *world) { w.c.Unsigned = true },
		"short":              func(w *world) { w.c.Lifetime = time.Second },
		"forget":             func(w *world) { w.c.Forget = []string{"x"} },
		"forget half a hash": func(w *world) { w.c.Forget = []string{"abcd"} },
		"any node vouches": func(w *world) {
			w.write(t, "requirements.json", `[{"identity":"spiffe://example.org/build","evidence":"detached","tier":"tpm","tools":["*"],"recorders":["*"]}]`)
		},
		"unknown key": func(w *world) {
			w.write(t, "requirements.json", `[{"identity":"spiffe://example.org/build","evidense":"leaf"}]`)
		},
		"duplicate key": func(w *world) {
			w.write(t, "requirements.json", `[{"identity":"spiffe://example.org/build","identity":"x"}]`)
		},
		"not a PEM": func(w *world) { w.write(t, "ca.pem", "x") },
	} {
		w := newWorld(t)
		bend(w)
		if _, err := keeper.New(w.c); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	// A file that another plugin has yet to make is none.
	w := newWorld(t)
	if err := os.Remove(w.path("ca.pem")); err != nil {
		t.Fatal(err)
	}
	k := w.keeper(t)
	if err := k.Publish(bundle(1, authority(t, epoch, time.Hour, nil))); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("err = %v", err)
	}
}

// An authority whose key was stolen, and which has run out since, is in no bundle
// any more; a policy revision that was given up is in no file. A backup of the
// archive from before both must not make them good again.
func TestRefusesABackupFromBeforeAnAuthorityOrPolicyWasGivenUp(t *testing.T) {
	w := newWorld(t)
	w.c.PCRPolicies = w.path("pcr.json")
	w.write(t, "pcr.json", policies([2]int{1, 1}))
	k := w.keeper(t)
	stolen, good := authority(t, epoch, 24*time.Hour, nil), authority(t, epoch, 1000*time.Hour, nil)
	w.publish(t, k, 1, stolen, good)
	w.now = epoch.Add(time.Hour)
	w.publish(t, k, 2, good, stolen)
	backup := read(t, w.path("keeper/archive.json"))
	w.now = epoch.Add(2 * time.Hour)
	w.write(t, "pcr.json", policies([2]int{2, 2}))
	w.publish(t, k, 3, good, nil, stolen)
	ended := func(when string) {
		t.Helper()
		if _, end := w.window(t, stolen); end > 2*time.Hour {
			t.Errorf("%s: the tainted authority ends at %v", when, end)
		}
		if _, end := w.window(t, good); end != 1000*time.Hour {
			t.Errorf("%s: the good one ends at %v", when, end)
		}
		for _, p := range w.trust(t).File().PCRPolicies {
			if p.Revision == 1 && (p.Replaced.IsZero() || p.Replaced.After(epoch.Add(2*time.Hour))) {
				t.Errorf("%s: revision 1 was replaced at %v", when, p.Replaced)
			}
		}
	}
	ended("before")
	w.now = epoch.Add(48 * time.Hour)
	w.publish(t, k, 4, good)
	serial := w.trust(t).Serial()
	w.write(t, "keeper/archive.json", backup)
	w.now = epoch.Add(49 * time.Hour)
	w.publish(t, w.keeper(t), 4, good)
	if w.trust(t).Serial() <= serial {
		t.Error("nothing was written")
	}
	ended("restored")
	// The policy is gone as a whole.
	w.write(t, "pcr.json", "[]")
	w.write(t, "keeper/archive.json", backup)
	w.publish(t, w.keeper(t), 5, good)
	ended("restored, without the policy")
}

// An archive that is not this keeper's, or not one that it could have written,
// is neither taken up nor written over.
func TestRefusesAnArchiveThatIsNotItsOwn(t *testing.T) {
	w := newWorld(t)
	w.publish(t, w.keeper(t), 1, authority(t, epoch, time.Hour, nil))
	good := read(t, w.path("keeper/archive.json"))
	for name, c := range map[string]struct {
		from, to string
		want     error
	}{
		"of another trust domain": {`"trust_domain": "example.org"`, `"trust_domain": "example.com"`, nil},
		"of a later version":      {`"version": 1`, `"version": 2`, keeper.ErrDamaged},
		"with an empty authority": {`"x509_authorities": [`, `"x509_authorities": [null, `, keeper.ErrDamaged},
		"with an unknown key":     {`"version": 1`, `"version": 1, "extra": 1`, keeper.ErrDamaged},
		"with a key twice":        {`"version": 1`, `"version": 1, "version": 1`, keeper.ErrDamaged},
		"with a bad certificate":  {`"certificate": "`, `"certificate": "AAAA`, keeper.ErrDamaged},
	} {
		bad := strings.Replace(good, c.from, c.to, 1)
		if bad == good {
			t.Fatalf("%s: nothing was changed", name)
		}
		w.write(t, "keeper/archive.json", bad)
		err := w.bare(t).Publish(bundle(2, authority(t, epoch, time.Hour, nil)))
		if err == nil || c.want != nil && !errors.Is(err, c.want) || cli.HintOf(err) == "" {
			t.Errorf("%s: err = %v", name, err)
		}
		if read(t, w.path("keeper/archive.json")) != bad {
			t.Errorf("%s: it was written over", name)
		}
	}
}
