package nodeserver

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/rootlink/rootlink/internal/attestca"
	"github.com/rootlink/rootlink/internal/catalog"
	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/internal/forge"
	"github.com/rootlink/rootlink/internal/policy"
	"github.com/rootlink/rootlink/pkg/attest"
	tpmv1 "github.com/rootlink/rootlink/proto/rootlink/tpm/v1"
)

func TestRefusesConfigurationsThatMissACheck(t *testing.T) {
	h := newHost(t, "", nil)
	roots, dir := fmt.Sprintf("ek_roots = %q\n", h.path("roots.pem")), fmt.Sprintf("data_dir = %q\n", h.path("data"))
	h.write(t, "empty.pem", "")
	h.write(t, "bad.json", "{}")
	empty := filepath.Join(t.TempDir(), "empty")
	if err := os.Mkdir(empty, 0o700); err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct{ hcl, want string }{
		"nothing":                {"", "no TPM could ever be accepted"},
		"not HCL":                {"ek_roots = [", "configuration"},
		"unknown key":            {roots + dir + "ek_rots = \"x\"\n", "unknown key ek_rots"},
		"no data_dir":            {roots, "no data_dir"},
		"roots missing":          {dir + `ek_roots = "/does/not/exist"`, "ek_roots"},
		"roots empty":            {dir + fmt.Sprintf("ek_roots = %q", h.path("empty.pem")), "ek_roots"},
		"roots of an empty dir":  {dir + fmt.Sprintf("ek_roots = %q", empty), "no .pem"},
		"roots not text":         {dir + "ek_roots = 7", "ek_roots"},
		"allow-list missing":     {roots + dir + `ek_allow = "/does/not/exist"`, "ek_allow"},
		"deny-list missing":      {roots + dir + `ek_deny = "/does/not/exist"`, "ek_deny"},
		"unknown EK type":        {roots + dir + `ek_types = ["rsa-1024"]`, "ek_types"},
		"SHA-1":                  {roots + dir + `pcrs = "sha1:0-7"`, "SHA-1"},
		"resettable PCR":         {roots + dir + `pcrs = "sha256:0-16"`, "PCR 16"},
		"no such PCR":            {roots + dir + `pcrs = "sha256:24"`, "pcrs"},
		"selector without quote": {roots + dir + `pcr_selectors = "sha256:17"`, "sha256:17 is not among pcrs"},
		"CA without its key":     {roots + dir + `attestation_ca_cert = "x"`, "go together"},
		"CA missing":             {roots + dir + "attestation_ca_cert = \"/no/a\"\nattestation_ca_key = \"/no/b\"\n", "attestation CA"},
		"policies missing":       {roots + dir + `pcr_policies = "/does/not/exist"`, "PCR policies"},
		"policies damaged":       {roots + dir + fmt.Sprintf("pcr_policies = %q", h.path("bad.json")), "PCR polic"},
		"log required, unwanted": {roots + dir + "want_event_log = false\nrequire_event_log = true\n", "require_event_log"},
		"timeout":                {roots + dir + `round_timeout = "soon"`, "round_timeout"},
		"no time at all":         {roots + dir + `round_timeout = "0s"`, "round_timeout"},
	} {
		t.Run(name, func(t *testing.T) {
			err := h.loaded.Configure(t.Context(), tt.hcl)
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("configure: %v", err)
			}
			notes, err := h.loaded.Validate(t.Context(), tt.hcl)
			var invalid *catalog.InvalidConfigError
			if !errors.As(err, &invalid) || !strings.Contains(strings.Join(notes, "\n"), tt.want) {
				t.Errorf("validate: %q, %v", notes, err)
			}
		})
	}
	// What was in force before still is.
	mustAttest(t, h, newAgent(t, h))
}

func TestValidateWritesNothing(t *testing.T) {
	h := newHost(t, "", nil)
	dir := filepath.Join(t.TempDir(), "not-there-yet")
	notes, err := h.loaded.Validate(t.Context(), fmt.Sprintf("ek_roots = [%q]\ndata_dir = %q\n", h.path("roots.pem"), dir))
	if err != nil {
		t.Errorf("%v, %q", err, notes)
	}
	if !strings.Contains(strings.Join(notes, "\n"), "no pcr_policies") {
		t.Errorf("notes %q", notes)
	}
	if _, err := os.Stat(dir); !os.IsNotExist(err) {
		t.Errorf("the directory was made: %v", err)
	}
}

func TestReadsRootsFromADirectory(t *testing.T) {
	h := newHost(t, "", nil)
	dir := t.TempDir()
	for name, b := range map[string][]byte{"root.cer": h.maker.Root.Raw, "intermediate.crt": h.maker.Intermediate.Raw, "README": []byte("not a certificate")} {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := h.loaded.Configure(t.Context(), fmt.Sprintf("ek_roots = %q\ndata_dir = %q", dir, h.path("data"))); err != nil {
		t.Fatal(err)
	}
	r, err := h.plugin.EKRoots()
	if err != nil || len(r.Roots) != 1 || len(r.Intermediates) != 1 {
		t.Errorf("%d roots, %d intermediates, %v", len(r.Roots), len(r.Intermediates), err)
	}
	// A TPM without the intermediate in its NV.
	a := newAgent(t, h)
	a.request = func(r *tpmv1.AttestRequest) { r.EkChain = r.EkChain[:1] }
	mustAttest(t, h, a)
}

func TestOperatorsFilesGiveTheCA(t *testing.T) {
	h := newHost(t, "", nil)
	shared := t.TempDir()
	ca, err := attestca.LoadOrCreate(shared, h.clock())
	if err != nil {
		t.Fatal(err)
	}
	config := fmt.Sprintf("attestation_ca_cert = %q\nattestation_ca_key = %q", filepath.Join(shared, attestca.CertFile), filepath.Join(shared, attestca.KeyFile))
	if err := h.loaded.Configure(t.Context(), h.hcl(config)); err != nil {
		t.Fatal(err)
	}
	if r := mustAttest(t, h, newAgent(t, h)); r.akCert.CheckSignatureFrom(ca.Certificate()) != nil {
		t.Error("signed by another CA")
	}
}

func TestHostsThatKeepThingsThemselvesRefuseFilesForThem(t *testing.T) {
	h := newHost(t, "", func(o *Options) {
		o.Policies = func(context.Context) ([]policy.Revision, error) { return nil, nil }
	})
	if err := h.loaded.Configure(t.Context(), h.hcl(`pcr_policies = "x"`)); err == nil {
		t.Error("a file that nobody reads was accepted")
	}
}

func TestWarnsOfPoliciesThatAreNeverMet(t *testing.T) {
	h := newHost(t, "", nil)
	h.write(t, "p.json", policyFile(t, attest.PCRPolicy{Name: "p", Revision: 1, Profiles: []attest.PCRProfile{
		{Name: "a", Banks: map[string]map[string]string{"sha384": {"7": strings.Repeat("00", 48)}}},
	}}))
	notes, err := h.loaded.Validate(t.Context(), h.hcl(fmt.Sprintf("pcr_policies = %q", h.path("p.json"))))
	if err != nil || !strings.Contains(strings.Join(notes, "\n"), "never met") {
		t.Errorf("%v, %q", err, notes)
	}
}

func TestPinsOutliveARestart(t *testing.T) {
	path := filepath.Join(t.TempDir(), pinsFile)
	ctx := t.Context()
	ek1, ek2, ak1, ak2, tpm := [32]byte{1}, [32]byte{2}, []byte{0, 11, 1}, []byte{0, 11, 2}, []byte{0, 11, 9}
	open := func() *filePins {
		p, err := openPins(path)
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	ak := func(p *filePins, name []byte, replace bool, want []byte) {
		t.Helper()
		if got, err := p.PinAK(ctx, ek1, name, replace); err != nil || !bytes.Equal(got, want) {
			t.Errorf("got %x, %v, want %x", got, err, want)
		}
	}
	p := open()
	ak(p, ak1, false, ak1)
	ak(p, ak2, false, ak1)
	p = open()
	ak(p, ak2, false, ak1)
	ak(p, ak2, true, ak1) // returns what was pinned
	ak(p, ak1, false, ak2)
	p = open()
	ak(p, ak1, false, ak2)
	for _, ek := range [][32]byte{ek1, ek2} {
		if got, err := open().PinTPM(ctx, tpm, ek); err != nil {
			t.Error(err)
		} else if p := open(); got != ek1 && ek == ek1 || p.data.TPMs[hex.EncodeToString(tpm)] != hex.EncodeToString(ek1[:]) {
			t.Errorf("TPM is pinned to %x", got)
		}
	}
	if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", st.Mode(), err)
	}
}

func TestPinsThatCannotBeSavedAreNotMade(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "gone")
	p, err := openPins(filepath.Join(dir, pinsFile)) // the directory does not exist
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.PinAK(t.Context(), [32]byte{1}, []byte{1}, false); err == nil {
		t.Fatal("pinned in memory only")
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if got, err := p.PinAK(t.Context(), [32]byte{1}, []byte{2}, false); err != nil || !bytes.Equal(got, []byte{2}) {
		t.Errorf("the failed pin stayed: %x, %v", got, err)
	}
}

func TestRefusesDamagedPins(t *testing.T) {
	for _, text := range []string{"", "{}", `{"version":2,"ak_by_ek":{},"ek_by_tpm":{}}`, `{"version":1,"ak_by_ek":{},"ek_by_tpm":{},"x":1}`, `{"version":1,"ek_by_tpm":null}`} {
		path := filepath.Join(t.TempDir(), pinsFile)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := openPins(path); err == nil || cli.HintOf(err) == "" {
			t.Errorf("%q: %v", text, err)
		}
	}
}

func TestLabelsVirtualTPMs(t *testing.T) {
	for _, tt := range []struct {
		maker, model string
		want         bool
	}{
		{"IFX", "SLB9670", false},
		{"STM", "ST33", false},
		{"NTC", "NPCT75x", false},
		{"IBM", "SW   TPM", true},
		{"IBM", "swtpm", true},
		{"MSFT", "", true},
		{"VMW", "VMware TPM", true},
		{"GOOG", "", true},
		{"AMZN", "", true},
		{"", "", false},
		{"ACME", "swtpm", true},
	} {
		if got := virtual(tt.maker, tt.model); got != tt.want {
			t.Errorf("%s %q: virtual %t", tt.maker, tt.model, got)
		}
	}
	for in, want := range map[string]string{"id:49465800": "IFX", "id:00001014": "IBM", "id:4D534654": "MSFT", "id:zz": "id:zz", "STM": "STM"} {
		if got := vendorID(in); got != want {
			t.Errorf("%s: %q", in, got)
		}
	}
	h := newHost(t, "", nil)
	a := newAgent(t, h)
	a.request = func(r *tpmv1.AttestRequest) { r.TpmManufacturer, r.TpmVendor = "evil\n\x00maker", "SWTPM" }
	mustAttest(t, h, a)
	if ak := h.attested[0].AK; ak.Manufacturer != "FRGE" || !ak.Software {
		t.Errorf("labelled %+v: the maker's word comes first, and any sign of software counts", ak)
	}
	if got := plain("evil\n\x00maker" + strings.Repeat("x", 100)); len(got) != 64 || strings.ContainsAny(got, "\n\x00") {
		t.Errorf("%q", got)
	}
}

func TestLiveForgetsAndBounds(t *testing.T) {
	l := newLive()
	now := forge.Epoch()
	for i := range 100 {
		l.finish([32]byte{byte(i)}, l.begin(), [32]byte{}, now)
	}
	now = now.Add(liveLife + time.Minute)
	l.finish([32]byte{200}, l.begin(), [32]byte{}, now)
	if n := len(l.nodes); n != 1 {
		t.Errorf("%d TPMs remembered", n)
	}
	var alarms []int
	for i := range 9 { // one TPM, again and again
		if _, crowd := l.finish([32]byte{201}, l.begin(), [32]byte{byte(i + 1)}, now.Add(time.Duration(i)*time.Second)); crowd != "" {
			alarms = append(alarms, i)
		}
	}
	if !cmp.Equal(alarms, []int{3, 6}) {
		t.Errorf("alarms at %v", alarms)
	}
	if n := len(l.nodes[[32]byte{201}].keys); n > crowdLimit {
		t.Errorf("%d keys remembered", n)
	}
	if !slices.IsSortedFunc(l.nodes[[32]byte{201}].at, time.Time.Compare) {
		t.Error("times out of order")
	}
}
