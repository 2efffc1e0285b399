package tpm

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"
	"golang.org/x/sys/unix"

	"github.com/rootlink/rootlink/pkg/attest"
)

func TestAuthorizationValueHasNoZeroByte(t *testing.T) {
	auth, err := newAuth(bytes.NewReader(append(bytes.Repeat([]byte{0, 7}, 32), 0)))
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(auth, bytes.Repeat([]byte{7}, 32)) {
		t.Errorf("auth = %x", auth)
	}
	if _, err := newAuth(bytes.NewReader(make([]byte, 100))); err == nil {
		t.Error("a broken random source went unnoticed")
	}
}

// TestPolicyB recomputes the digests of the EK profile's high range.
func TestPolicyB(t *testing.T) {
	for _, c := range []struct {
		alg     tpm2.TPMIAlgHash
		a, c, b []byte
	}{
		{tpm2.TPMAlgSHA256, policyA256, policyC256, policyB256},
		{tpm2.TPMAlgSHA384, policyA384, policyC384, policyB384},
	} {
		calc, err := tpm2.NewPolicyCalculator(c.alg)
		if err != nil {
			t.Fatal(err)
		}
		if err := (tpm2.PolicySecret{AuthHandle: tpm2.TPMRHEndorsement}).Update(calc); err != nil {
			t.Fatal(err)
		}
		if got := calc.Hash().Digest; !bytes.Equal(got, c.a) {
			t.Errorf("PolicyA = %x", got)
		}
		if err := (tpm2.PolicyOr{PHashList: tpm2.TPMLDigest{Digests: digests(c.a, c.c)}}).Update(calc); err != nil {
			t.Fatal(err)
		}
		if got := calc.Hash().Digest; !bytes.Equal(got, c.b) {
			t.Errorf("PolicyB = %x", got)
		}
	}
}

func TestFirstDERDropsPadding(t *testing.T) {
	der := []byte{0x30, 3, 2, 1, 5}
	for _, pad := range [][]byte{nil, {0xff, 0xff}, {0, 0, 0}} {
		got, rest, err := firstDER(append(bytes.Clone(der), pad...))
		if err != nil || !bytes.Equal(got, der) || !bytes.Equal(rest, pad) {
			t.Errorf("padding %x: %x, %x, %v", pad, got, rest, err)
		}
	}
	for _, bad := range [][]byte{nil, {0xff, 0xff}, {0x30}, {0x30, 0x82, 0xff, 0xff, 0}, {2, 1, 5}} {
		if _, _, err := firstDER(bad); err == nil {
			t.Errorf("%x is taken for a certificate", bad)
		}
	}
}

func TestSoftwareTPMHeuristic(t *testing.T) {
	for _, c := range []struct {
		manufacturer, vendor string
		want                 bool
	}{
		{"IBM", "SW   TPM", true},
		{"IBM", "", false},
		{"MSFT", "xCG fTPM", true},
		{"GOOG", "vTPM", true},
		{"VMW", "", true},
		{"AMZN", "NitroTPM", true},
		{"IFX", "SLB9672", false},
		{"INTC", "Intel", false},
		{"AMD", "AMD", false},
		{"", "", false},
	} {
		if got := softwareTPM(c.manufacturer, c.vendor); got != c.want {
			t.Errorf("%q %q: %v", c.manufacturer, c.vendor, got)
		}
	}
	if got := ascii([]uint32{0x1b5b336d, 0x49425f00}); got != "[3mIB_" {
		t.Errorf("a terminal escape came through: %q", got)
	}
}

func TestFixedTemplatesDoNotChange(t *testing.T) {
	// Another template is another key: AKs would be re-created, and the parent
	// name that servers pin would change on every node.
	p := &properties{curves: []tpm2.TPMECCCurve{tpm2.TPMECCNistP256}}
	if got := sha256.Sum256(tpm2.Marshal(p.parentTemplate())); got != [32]byte(mustHex(fixedParent)) {
		t.Errorf("the AK's parent template changed: %x", got)
	}
}

const fixedParent = "9430f5e63490113d4ed813e7afe4e3012af75fd74076f3c6efdd392701fa7204"

// TestCharDevice stands a datagram socket in for a kernel device, which also
// gives one response per read.
func TestCharDevice(t *testing.T) {
	pair := func() (*charDevice, int) {
		fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_NONBLOCK, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Close(fds[0]); unix.Close(fds[1]) })
		return &charDevice{fds[0]}, fds[1]
	}
	ok := []byte{0x80, 0x01, 0, 0, 0, 10, 0, 0, 0, 0}
	dev, peer := pair()
	if _, err := unix.Write(peer, ok); err != nil {
		t.Fatal(err)
	}
	if rsp, err := dev.roundTrip(t.Context(), []byte("command")); err != nil || !bytes.Equal(rsp, ok) {
		t.Errorf("%x, %v", rsp, err)
	}
	for _, bad := range [][]byte{ok[:9], append(bytes.Clone(ok), 1), {0}} {
		dev, peer := pair()
		if _, err := unix.Write(peer, bad); err != nil {
			t.Fatal(err)
		}
		if _, err := dev.roundTrip(t.Context(), []byte("command")); !errors.Is(err, errShortResponse) {
			t.Errorf("%x: err = %v", bad, err)
		}
	}
	dev, _ = pair()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if _, err := dev.roundTrip(ctx, []byte("command")); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("no answer: err = %v", err)
	}
}

func TestRefusesQuoteOfAnotherSelection(t *testing.T) {
	sel := func(alg tpm2.TPMIAlgHash, pcrs ...uint) tpm2.TPMSPCRSelection {
		return tpm2.TPMSPCRSelection{Hash: alg, PCRSelect: tpm2.PCClientCompatible.PCRs(pcrs...)}
	}
	want := []attest.PCRSelection{{Bank: "sha256", Indices: []uint32{0, 7}}}
	for _, c := range []struct {
		name string
		got  []tpm2.TPMSPCRSelection
		ok   bool
	}{
		{"as asked", []tpm2.TPMSPCRSelection{sel(tpm2.TPMAlgSHA256, 0, 7)}, true},
		{"an empty bank beside it", []tpm2.TPMSPCRSelection{sel(tpm2.TPMAlgSHA1), sel(tpm2.TPMAlgSHA256, 0, 7)}, true},
		{"nothing", nil, false},
		{"the bank is empty", []tpm2.TPMSPCRSelection{sel(tpm2.TPMAlgSHA256)}, false},
		{"one PCR is missing", []tpm2.TPMSPCRSelection{sel(tpm2.TPMAlgSHA256, 0)}, false},
		{"one PCR too many", []tpm2.TPMSPCRSelection{sel(tpm2.TPMAlgSHA256, 0, 7, 8)}, false},
		{"another bank", []tpm2.TPMSPCRSelection{sel(tpm2.TPMAlgSHA1, 0, 7)}, false},
		{"another bank too", []tpm2.TPMSPCRSelection{sel(tpm2.TPMAlgSHA256, 0, 7), sel(tpm2.TPMAlgSHA1, 0)}, false},
	} {
		if err := sameSelection(tpm2.TPMLPCRSelection{PCRSelections: c.got}, want); (err == nil) != c.ok {
			t.Errorf("%s: err = %v", c.name, err)
		}
	}
}
