package link

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"errors"
	"math/big"
	"strings"
	"testing"
	"time"

	"github.com/rootlink/rootlink/pkg/envelope"

	"github.com/rootlink/rootlink/internal/forge"
)

var day = time.Date(2030, 5, 1, 12, 0, 0, 0, time.UTC)

func testCA(t testing.TB, name string) (*ecdsa.PrivateKey, *x509.Certificate) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name, Organization: []string{"example.org"}},
		NotBefore: day.AddDate(0, -1, 0), NotAfter: day.AddDate(1, 0, 0),
		BasicConstraintsValid: true, IsCA: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return key, cert
}

func testTrustFile(t testing.TB) TrustFile {
	t.Helper()
	_, authority := testCA(t, "authority")
	_, ca := testCA(t, "attestation")
	root, err := MarshalTrustedRoot([]Authority{{Certificate: authority, Start: authority.NotBefore, End: authority.NotAfter}})
	if err != nil {
		t.Fatal(err)
	}
	h := strings.Repeat("ab", 32)
	from := day.Add(-time.Hour)
	return TrustFile{
		Format: TrustFormat, Version: FormatVersion, Serial: 7, Issued: day, Expires: day.AddDate(0, 3, 0),
		TrustDomain: "example.org", TrustedRoot: root,
		AttestationCAs: []AttestationCA{{Certificate: ca.Raw}},
		EK:             EKTrust{Allow: []string{h}, Deny: []string{strings.Repeat("00", 32)}, Inventory: map[string]string{h: "host-1"}},
		Requirements: []Requirement{{
			Identity: "spiffe://example.org/build/*", Tier: TierTPM, Tools: []string{h}, Recorders: []string{AnyHash},
		}},
		Revocations: []Revocation{
			{Kind: RevokedEK, ID: strings.Repeat("cd", 32), From: &from, Reason: "stolen"},
			{Kind: RevokedExecutable, ID: strings.Repeat("ef", 32), Always: true},
		},
	}
}

func TestTrustRoundTrip(t *testing.T) {
	f := testTrustFile(t)
	raw, err := f.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	trust, err := ParseUnsignedTrust(raw)
	if err != nil {
		t.Fatal(err)
	}
	again, err := trust.File().Marshal()
	if err != nil || !bytes.Equal(raw, again) {
		t.Errorf("%v; marshalled again:\n%s\nwas:\n%s", err, again, raw)
	}
	if !IsTrust(raw) || IsTrust(testBundle(t)) || IsBundle(raw) || !IsBundle(testBundle(t)) {
		t.Error("files are mistaken for each other")
	}
	if r := trust.requirements[0]; r.Evidence != EvidenceLeaf {
		t.Errorf("least evidence by default is %q, want leaf", r.Evidence)
	}
}

func TestTrustRefuses(t *testing.T) {
	h := strings.Repeat("ab", 32)
	for name, spoil := range map[string]func(*TrustFile){
		"other format":                func(f *TrustFile) { f.Format = "x" },
		"later version":               func(f *TrustFile) { f.Version = 2 },
		"never expires":               func(f *TrustFile) { f.Expires = time.Time{} },
		"expires before issue":        func(f *TrustFile) { f.Expires = f.Issued },
		"no trust domain":             func(f *TrustFile) { f.TrustDomain = "" },
		"trust domain as ID":          func(f *TrustFile) { f.TrustDomain = "spiffe://example.org" },
		"no authority":                func(f *TrustFile) { f.TrustedRoot = nil },
		"empty trusted root":          func(f *TrustFile) { f.TrustedRoot = json.RawMessage(`{}`) },
		"unknown key in trusted root": func(f *TrustFile) { f.TrustedRoot = json.RawMessage(`{"x":1,` + string(f.TrustedRoot[1:])) },
		"authority without a window": func(f *TrustFile) {
			f.TrustedRoot = json.RawMessage(strings.Replace(string(f.TrustedRoot), `"start"`, `"end"`, 1))
		},
		"leaf as an authority": func(f *TrustFile) {
			_, leaf := testSigner(t)
			var v map[string]any
			_ = json.Unmarshal(f.TrustedRoot, &v)
			ca := v["certificateAuthorities"].([]any)[0].(map[string]any)
			ca["certChain"] = map[string]any{"certificates": []any{map[string]any{"rawBytes": leaf.Raw}}}
			f.TrustedRoot, _ = json.Marshal(v)
		},
		"authority of another trust domain": func(f *TrustFile) {
			w := forge.NewWorld(t)
			f.TrustedRoot, _ = MarshalTrustedRoot([]Authority{{Certificate: w.Authority, Start: day}})
			f.TrustDomain, f.Requirements[0].Identity = "example.com", "spiffe://example.com/x"
		},
		"no attestation CA":      func(f *TrustFile) { f.AttestationCAs = nil },
		"attestation CA, a leaf": func(f *TrustFile) { _, c := testSigner(t); f.AttestationCAs[0].Certificate = c.Raw },
		"one key in both CA roles": func(f *TrustFile) {
			_, c := testCA(t, "both")
			f.TrustedRoot, _ = MarshalTrustedRoot([]Authority{{Certificate: c, Start: day}})
			f.AttestationCAs[0].Certificate = c.Raw
		},
		"no EK could be genuine":          func(f *TrustFile) { f.EK.Allow = nil },
		"EK hash in upper case":           func(f *TrustFile) { f.EK.Allow = []string{strings.ToUpper(h)} },
		"short EK hash":                   func(f *TrustFile) { f.EK.Deny = []string{"ab"} },
		"inventory of no hash":            func(f *TrustFile) { f.EK.Inventory = map[string]string{"host": h} },
		"garbage EK root":                 func(f *TrustFile) { f.EK.Roots = [][]byte{{1}} },
		"garbage layout key":              func(f *TrustFile) { f.LayoutKeys = []LayoutKey{{Key: []byte{1}}} },
		"pattern of another trust domain": func(f *TrustFile) { f.Requirements[0].Identity = "spiffe://other/**" },
		"no pattern":                      func(f *TrustFile) { f.Requirements[0].Identity = "" },
		"unknown evidence kind":           func(f *TrustFile) { f.Requirements[0].Evidence = "none" },
		"unknown tier":                    func(f *TrustFile) { f.Requirements[0].Tier = "high" },
		"tier without a PCR policy":       func(f *TrustFile) { f.Requirements[0].Tier = "" },
		"unknown PCR policy":              func(f *TrustFile) { f.Requirements[0].PCRPolicies = []string{"x"} },
		"any tool, by omission":           func(f *TrustFile) { f.Requirements[0].Tools = nil },
		"any recorder, by omission":       func(f *TrustFile) { f.Requirements[0].Recorders = nil },
		"tool that is no hash":            func(f *TrustFile) { f.Requirements[0].Tools = []string{"go"} },
		"EK that is no hash":              func(f *TrustFile) { f.Requirements[0].EKs = []string{"*"} },
		"unknown revocation kind":         func(f *TrustFile) { f.Revocations[0].Kind = "key" },
		"revocation of no ID":             func(f *TrustFile) { f.Revocations[0].ID = "" },
		"revocation, never":               func(f *TrustFile) { f.Revocations[0].From = nil },
		"revocation, from and always":     func(f *TrustFile) { f.Revocations[0].Always = true },
		"revoked AK that is no name":      func(f *TrustFile) { f.Revocations[0].Kind, f.Revocations[0].ID = RevokedAK, "000b" },
	} {
		t.Run(name, func(t *testing.T) {
			f := testTrustFile(t)
			if _, err := NewTrust(f); err != nil {
				t.Fatal(err)
			}
			spoil(&f)
			if _, err := NewTrust(f); !errors.Is(err, ErrMalformed) {
				t.Errorf("err = %v, want ErrMalformed", err)
			}
		})
	}
}

func TestParseTrustRefuses(t *testing.T) {
	raw, err := testTrustFile(t).Marshal()
	if err != nil {
		t.Fatal(err)
	}
	good := string(raw)
	for name, bad := range map[string]string{
		"unknown key":       strings.Replace(good, `"serial"`, `"x": 1, "serial"`, 1),
		"duplicate key":     strings.Replace(good, `"serial"`, `"serial": 9, "serial"`, 1),
		"other letter case": strings.Replace(good, `"serial"`, `"Serial"`, 1),
		"negative serial":   strings.Replace(good, `"serial": 7`, `"serial": -7`, 1),
		"unknown in a rule": strings.Replace(good, `"tools"`, `"tool": [], "tools"`, 1),
		"trailing data":     good + "{}",
		"oversized":         good + strings.Repeat(" ", MaxTrust),
		"deep nesting":      strings.Repeat(`{"ek":`, 100000),
		"empty":             "",
	} {
		t.Run(name, func(t *testing.T) {
			if bad == good {
				t.Fatal("the fixture is not broken")
			}
			if _, err := ParseUnsignedTrust([]byte(bad)); !errors.Is(err, ErrMalformed) {
				t.Errorf("err = %v, want ErrMalformed", err)
			}
		})
	}
}

func TestRefusesTrustRolledBack(t *testing.T) {
	trust, err := NewTrust(testTrustFile(t))
	if err != nil {
		t.Fatal(err)
	}
	if err := trust.CheckSerial(8); !errors.Is(err, ErrRolledBack) {
		t.Errorf("serial 7 after 8: %v, want ErrRolledBack", err)
	}
	if err := trust.CheckSerial(7); err != nil {
		t.Errorf("the same file again: %v", err)
	}
}

func TestRevocationsExtend(t *testing.T) {
	key, trust := signedTrust(t, nil)
	id := strings.Repeat("11", 32)
	later := RevocationsFile{TrustDomain: "example.org", Issued: day.Add(time.Hour), Revocations: []Revocation{{Kind: RevokedEK, ID: id, Always: true}}}
	raw, err := later.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	signed, err := SignRevocations(raw, key)
	if err != nil {
		t.Fatal(err)
	}
	more, err := trust.WithRevocations(signed)
	if err != nil {
		t.Fatal(err)
	}
	if _, yes := more.revoked(RevokedEK, id, day); !yes {
		t.Error("the extension does not revoke")
	}
	if _, yes := trust.revoked(RevokedEK, id, day); yes {
		t.Error("the extension changed the original")
	}
	for name, spoil := range map[string]func(*RevocationsFile){
		"another trust domain":  func(r *RevocationsFile) { r.TrustDomain = "other" },
		"older than trust.json": func(r *RevocationsFile) { r.Issued = day.Add(-time.Hour) },
	} {
		r := later
		spoil(&r)
		raw, err := r.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		signed, err := SignRevocations(raw, key)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := trust.WithRevocations(signed); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	if _, err := trust.WithRevocations(raw); !errors.Is(err, ErrUnsigned) {
		t.Errorf("unsigned: %v", err)
	}
	stranger, _ := testSigner(t)
	if signed, err = SignRevocations(raw, stranger); err != nil {
		t.Fatal(err)
	}
	if _, err := trust.WithRevocations(signed); !errors.Is(err, ErrForeignTrust) {
		t.Errorf("by a stranger: %v", err)
	}
}

func TestRevokedFromATimeOn(t *testing.T) {
	trust, err := NewTrust(testTrustFile(t))
	if err != nil {
		t.Fatal(err)
	}
	id, from := strings.Repeat("cd", 32), day.Add(-time.Hour)
	for _, c := range []struct {
		kind, id string
		at       time.Time
		want     bool
	}{
		{RevokedEK, id, from.Add(-time.Nanosecond), false},
		{RevokedEK, id, from, true},
		{RevokedEK, id, from.AddDate(1, 0, 0), true},
		{RevokedAuthority, id, from, false},
		{RevokedExecutable, strings.Repeat("ef", 32), time.Time{}, true},
	} {
		if _, got := trust.revoked(c.kind, c.id, c.at); got != c.want {
			t.Errorf("revoked(%s, %s, %s) = %t", c.kind, c.id[:4], c.at, got)
		}
	}
}

func FuzzParseTrust(f *testing.F) {
	raw, err := testTrustFile(f).Marshal()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(raw)
	f.Fuzz(func(t *testing.T, b []byte) {
		trust, err := ParseUnsignedTrust(b)
		if err != nil {
			return
		}
		once, err := trust.File().Marshal()
		if err != nil {
			t.Fatalf("parsed and cannot be written: %v", err)
		}
		again, err := ParseUnsignedTrust(once)
		if err != nil {
			t.Fatalf("written and cannot be read: %v", err)
		}
		if twice, err := again.File().Marshal(); err != nil || !bytes.Equal(once, twice) {
			t.Fatalf("%v\n%s\n%s", err, once, twice)
		}
	})
}

// A revocation file that is not understood must not count as an empty one.
func TestRefusesMalformedRevocations(t *testing.T) {
	key, trust := signedTrust(t, nil)
	open := func(document string) error {
		signed, err := envelope.Sign(RevocationsPayloadType, []byte(document), key)
		if err != nil {
			t.Fatal(err)
		}
		_, err = trust.WithRevocations(signed)
		return err
	}
	good := `{"format":"rootlink-revocations","version":1,"trust_domain":"example.org","issued":"2030-06-01T00:00:00Z","revocations":[{"kind":"ek","id":"` + strings.Repeat("11", 32) + `","always":true}]}`
	if err := open(good); err != nil {
		t.Fatal(err)
	}
	for name, bad := range map[string]string{
		"empty":         "",
		"unknown key":   strings.Replace(good, `"format"`, `"x":1,"format"`, 1),
		"duplicate key": strings.Replace(good, `"revocations"`, `"revocations":[],"revocations"`, 1),
		"other case":    strings.Replace(good, `"revocations":`, `"Revocations":`, 1),
		"other format":  strings.Replace(good, "rootlink-revocations", "rootlink-trust", 1),
		"other version": strings.Replace(good, `"version":1`, `"version":2`, 1),
		"no issue time": strings.Replace(good, `"issued":"2030-06-01T00:00:00Z",`, "", 1),
		"unknown kind":  strings.Replace(good, `"kind":"ek"`, `"kind":"host"`, 1),
		"oversized":     good + strings.Repeat(" ", MaxRevocations),
	} {
		t.Run(name, func(t *testing.T) {
			if bad == good {
				t.Fatal("the fixture is not broken")
			}
			if err := open(bad); !errors.Is(err, ErrMalformed) {
				t.Errorf("err = %v, want ErrMalformed", err)
			}
		})
	}
}

func TestRefusesMalformedTrustedRoot(t *testing.T) {
	good := string(testTrustFile(t).TrustedRoot)
	_, other := testCA(t, "second")
	cert := good[strings.Index(good, `{"rawBytes"`) : strings.Index(good, `"}]}`)+2]
	for name, bad := range map[string]string{
		"unknown key at the end": strings.TrimSuffix(good, "}") + `,"x":1}`,
		"other media type":       strings.Replace(good, trustedRootMediaType, "application/vnd.dev.sigstore.trustedroot+json;version=9", 1),
		"no authority":           `{"mediaType":"` + trustedRootMediaType01 + `"}`,
		"two certificates":       strings.Replace(good, cert, cert+`,{"rawBytes":"`+base64.StdEncoding.EncodeToString(other.Raw)+`"}`, 1),
		"no certificate":         strings.Replace(good, cert, "", 1),
		"garbage certificate":    strings.Replace(good, cert, `{"rawBytes":"AAAA"}`, 1),
		"no window":              good[:strings.Index(good, `"start"`)] + good[strings.Index(good, `Z"}`)+2:],
		"window that ends early": strings.Replace(good, `"end":"2031`, `"end":"2029`, 1),
	} {
		t.Run(name, func(t *testing.T) {
			if bad == good {
				t.Fatal("the fixture is not broken")
			}
			f := testTrustFile(t)
			f.TrustedRoot = json.RawMessage(bad)
			if _, err := NewTrust(f); !errors.Is(err, ErrMalformed) {
				t.Errorf("err = %v, want ErrMalformed", err)
			}
		})
	}
	if _, err := MarshalTrustedRoot([]Authority{{Certificate: other}}); !errors.Is(err, ErrMalformed) {
		t.Errorf("an authority without a window was written: %v", err)
	}
}

// A key of a kind that signs no layouts would sit in trust.json and count for
// nothing.
func TestRefusesLayoutKeyThatCannotSign(t *testing.T) {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	f := testTrustFile(t)
	f.LayoutKeys = []LayoutKey{{Name: "rsa", Key: der}}
	if _, err := NewTrust(f); !errors.Is(err, ErrMalformed) {
		t.Errorf("err = %v, want ErrMalformed", err)
	}
}
