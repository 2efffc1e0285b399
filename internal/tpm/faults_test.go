package tpm_test

import (
	"bytes"
	"context"
	"crypto/rsa"
	"encoding/binary"
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"

	"github.com/rootlink/rootlink/internal/swtpmtest"
	"github.com/rootlink/rootlink/internal/tpm"
	"github.com/rootlink/rootlink/pkg/attest"
)

func isErr(err, target error) bool { return errors.Is(err, target) }

// noLeak fails when the TPM holds an object or session.
func noLeak(t *testing.T, sw *swtpmtest.TPM) {
	t.Helper()
	for _, first := range []uint32{0x80000000, 0x02000000, 0x03000000} {
		if h := sw.Handles(first); len(h) > 0 {
			t.Errorf("handles left in the TPM: %x", h)
		}
	}
}

func TestThousandOperationsLeaveNothingBehind(t *testing.T) {
	sw := swtpmtest.Start(t)
	d, ctx := open(t, sw, tpm.Options{}), background(t)
	ek, err := d.EK(ctx)
	if err != nil {
		t.Fatal(err)
	}
	ak, err := d.AK(ctx)
	if err != nil {
		t.Fatal(err)
	}
	blob, enc, err := attest.MakeCredential(ek.Public, ak.Name, make([]byte, 32))
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for worker := range 4 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for i := range 250 {
				var err error
				switch (i + worker) % 5 {
				case 0:
					_, err = d.ActivateCredential(ctx, blob, enc)
				case 1:
					// A failing operation must clean up as well.
					if _, e := d.ActivateCredential(ctx, blob, enc[:len(enc)-1]); e == nil {
						err = errors.New("a cut credential was activated")
					}
				case 2:
					_, err = d.Info(ctx)
				default:
					_, err = d.QuoteNode(ctx, pcrs(), [32]byte{byte(i)}, "example.org", [32]byte{})
				}
				if err != nil {
					t.Errorf("operation %d: %v", i, err)
					return
				}
			}
		}()
	}
	wg.Wait()
	noLeak(t, sw)
}

// TestFlushesLeftoversOfACrashedPredecessor fills all slots first.
func TestFlushesLeftoversOfACrashedPredecessor(t *testing.T) {
	sw := swtpmtest.Start(t)
	fillSlots(sw)
	d := open(t, sw, tpm.Options{})
	if _, err := d.QuoteNode(background(t), pcrs(), [32]byte{}, "example.org", [32]byte{}); err != nil {
		t.Fatal(err)
	}
	noLeak(t, sw)
}

func fillSlots(sw *swtpmtest.TPM) {
	sw.Do(func(c swtpmtest.Sender) error {
		for range 3 {
			if _, err := (tpm2.CreatePrimary{PrimaryHandle: tpm2.TPMRHOwner, InPublic: tpm2.New2B(tpm2.ECCSRKTemplate)}).Execute(c); err != nil {
				return err
			}
			if _, _, err := tpm2.PolicySession(c, tpm2.TPMAlgSHA256, 16); err != nil {
				return err
			}
		}
		return nil
	})
}

func TestSurvivesRestartUnderIt(t *testing.T) {
	sw := swtpmtest.Start(t)
	d, ctx := open(t, sw, tpm.Options{}), background(t)
	quote := func() *attest.Quote {
		t.Helper()
		q, err := d.QuoteNode(ctx, pcrs(), [32]byte{}, "example.org", [32]byte{})
		if err != nil {
			t.Fatal(err)
		}
		return parse(t, d, q)
	}
	before := quote()
	sw.Restart()
	after := quote()
	if after.ResetCount != before.ResetCount+1 || !after.Safe {
		t.Errorf("reset count %d → %d, safe %v", before.ResetCount, after.ResetCount, after.Safe)
	}
	sw.RestartUnclean()
	if q := quote(); q.ResetCount != after.ResetCount+1 || q.Safe {
		t.Errorf("after an unclean stop: reset count %d → %d, safe %v", after.ResetCount, q.ResetCount, q.Safe)
	}
	noLeak(t, sw)
}

func parse(t *testing.T, d *tpm.Device, q *tpm.Quoted) *attest.Quote {
	t.Helper()
	dev, err := d.AK(background(t))
	if err != nil {
		t.Fatal(err)
	}
	ak, err := attest.VerifyAK(dev.Public, dev.CreationData, dev.CreationAttest, dev.CreationSignature)
	if err != nil {
		t.Fatal(err)
	}
	v, err := attest.VerifyQuote(q.Attest, q.Signature, ak, attest.NodeExtraData([32]byte{}, ak.Name, "example.org", [32]byte{}), q.PCRs, pcrs())
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func TestWaitsForTPMThatIsAway(t *testing.T) {
	sw := swtpmtest.Start(t)
	d, ctx := open(t, sw, tpm.Options{}), background(t)
	if _, err := d.AK(ctx); err != nil {
		t.Fatal(err)
	}
	sw.Stop()
	short, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
	defer cancel()
	if _, err := d.Info(short); !isErr(err, context.DeadlineExceeded) {
		t.Errorf("err = %v", err)
	}
	done := make(chan error, 1)
	go func() {
		_, err := d.QuoteNode(ctx, pcrs(), [32]byte{}, "example.org", [32]byte{})
		done <- err
	}()
	sw.Resume()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

func TestSurvivesLossOfConnectionAtEveryCommand(t *testing.T) {
	sw := swtpmtest.Start(t)
	p := newProxy(t, sw.Socket())
	dir := t.TempDir()
	seed := open(t, sw, tpm.Options{DataDir: dir})
	if _, err := seed.AK(background(t)); err != nil {
		t.Fatal(err)
	}
	seed.Close()
	for n := 1; ; n++ {
		d, err := tpm.Open(tpm.Options{Address: "unix:" + p.path, DataDir: dir, Log: slog.New(slog.DiscardHandler)})
		if err != nil {
			t.Fatal(err)
		}
		cut := p.cutAfter(n)
		_, err = d.QuoteNode(background(t), pcrs(), [32]byte{}, "example.org", [32]byte{})
		d.Close()
		if err != nil {
			t.Fatalf("connection lost at command %d: %v", n, err)
		}
		if !cut() {
			if n < 8 {
				t.Fatalf("a quote took only %d commands: nothing was cut", n)
			}
			break
		}
	}
	noLeak(t, sw)
}

// TestQuoteCoversPCRExtendedMeanwhile extends a PCR between reading and quoting.
func TestQuoteCoversPCRExtendedMeanwhile(t *testing.T) {
	sw := swtpmtest.Start(t)
	p := newProxy(t, sw.Socket())
	d := open(t, sw, tpm.Options{})
	d.Close()
	d, err := tpm.Open(tpm.Options{Address: "unix:" + p.path, DataDir: t.TempDir(), Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if _, err := d.AK(background(t)); err != nil {
		t.Fatal(err)
	}
	p.before(tpm2.TPMCCQuote, 1, extendCommand(10))
	q, err := d.QuoteNode(background(t), pcrs(), [32]byte{}, "example.org", [32]byte{})
	if err != nil {
		t.Fatal(err)
	}
	parse(t, d, q) // fails unless the values are those of the quote
	if bytes.Equal(q.PCRs[0].Values[10], make([]byte, 32)) {
		t.Error("the PCR was not extended: this test checks nothing")
	}
	p.before(tpm2.TPMCCQuote, 1<<30, extendCommand(10))
	if _, err := d.QuoteNode(background(t), pcrs(), [32]byte{}, "example.org", [32]byte{}); !isErr(err, tpm.ErrPCRsChanging) {
		t.Errorf("a PCR extended for ever: err = %v", err)
	}
}

func extendCommand(pcr byte) []byte {
	c := []byte{
		0x80, 0x02, 0, 0, 0, 0, 0, 0, 0x01, 0x82, 0, 0, 0, pcr,
		0, 0, 0, 9, 0x40, 0, 0, 0x09, 0, 0, 0, 0, 0,
		0, 0, 0, 1, 0, 0x0b,
	}
	c = append(c, bytes.Repeat([]byte{0x5a}, 32)...)
	binary.BigEndian.PutUint32(c[2:], uint32(len(c)))
	return c
}

func TestRetriesWhenTPMIsBusy(t *testing.T) {
	sw := swtpmtest.Start(t)
	p := newProxy(t, sw.Socket())
	d, err := tpm.Open(tpm.Options{Address: "unix:" + p.path, DataDir: t.TempDir(), Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	for _, rc := range []tpm2.TPMRC{tpm2.TPMRCRetry, tpm2.TPMRCYielded, tpm2.TPMRCTesting, tpm2.TPMRCNVRate} {
		p.answer(tpm2.TPMCCQuote, 2, rc)
		if _, err := d.QuoteNode(background(t), pcrs(), [32]byte{}, "example.org", [32]byte{}); err != nil {
			t.Errorf("%v: %v", rc, err)
		}
	}
	p.answer(tpm2.TPMCCQuote, 1<<30, tpm2.TPMRCRetry)
	ctx, cancel := context.WithTimeout(background(t), 50*time.Millisecond)
	defer cancel()
	if _, err := d.QuoteNode(ctx, pcrs(), [32]byte{}, "example.org", [32]byte{}); !isErr(err, context.DeadlineExceeded) {
		t.Errorf("busy for ever: err = %v", err)
	}
	for rc, want := range map[tpm2.TPMRC]error{
		tpm2.TPMRCLockout: tpm.ErrLockout, tpm2.TPMRCInitialize: tpm.ErrNotStarted, tpm2.TPMRCFailure: tpm.ErrFailure,
	} {
		p.answer(tpm2.TPMCCQuote, 1, rc)
		if _, err := d.QuoteNode(background(t), pcrs(), [32]byte{}, "example.org", [32]byte{}); !isErr(err, want) || tpm.Hint(err) == "" {
			t.Errorf("%v: err = %v", rc, err)
		}
	}
	noLeak(t, sw)
}

// TestFullSlotsMeanwhile lets another client fill the slots between operations.
func TestFullSlotsMeanwhile(t *testing.T) {
	sw := swtpmtest.Start(t)
	d, ctx := open(t, sw, tpm.Options{}), background(t)
	for range 3 {
		if _, err := d.QuoteNode(ctx, pcrs(), [32]byte{}, "example.org", [32]byte{}); err != nil {
			t.Fatal(err)
		}
		fillSlots(sw)
	}
}

func TestLockedOutTPMStillAttests(t *testing.T) {
	sw := swtpmtest.Start(t)
	sw.Lockout()
	d, ctx := open(t, sw, tpm.Options{}), background(t)
	i, err := d.Info(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if !i.InLockout {
		t.Fatal("the TPM is not in lockout: this test checks nothing")
	}
	ek, err := d.EK(ctx)
	if err != nil {
		t.Fatal(err)
	}
	ak, err := d.AK(ctx)
	if err != nil {
		t.Fatal(err)
	}
	blob, enc, err := attest.MakeCredential(ek.Public, ak.Name, make([]byte, 32))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := d.ActivateCredential(ctx, blob, enc); err != nil {
		t.Error(err)
	}
	if _, err := d.QuoteNode(ctx, pcrs(), [32]byte{}, "example.org", [32]byte{}); err != nil {
		t.Error(err)
	}
}

func TestLockoutIsNamed(t *testing.T) {
	sw := swtpmtest.Start(t, swtpmtest.WithEK(swtpmtest.NoEK))
	sw.Do(func(c swtpmtest.Sender) error { return swtpmtest.WriteNVWithDA(c, 0x01c0000a, []byte{0x30, 0}) })
	sw.Lockout()
	_, err := open(t, sw, tpm.Options{}).EK(background(t))
	if !isErr(err, tpm.ErrLockout) || tpm.Hint(err) == "" {
		t.Errorf("err = %v", err)
	}
}

func TestRefusesQuoteOverDisabledBank(t *testing.T) {
	sw := swtpmtest.Start(t)
	sw.AllocateBanks("sha1", "sha256")
	d, ctx := open(t, sw, tpm.Options{}), background(t)
	for name, sel := range map[string][]attest.PCRSelection{
		"disabled bank":           {{Bank: "sha384", Indices: []uint32{7}}},
		"disabled beside enabled": {{Bank: "sha256", Indices: []uint32{7}}, {Bank: "sha512", Indices: []uint32{7}}},
		"bank nobody knows":       {{Bank: "md5", Indices: []uint32{7}}},
		"PCR that does not exist": {{Bank: "sha256", Indices: []uint32{24}}},
		"no PCR":                  {{Bank: "sha256"}},
		"nothing":                 nil,
	} {
		if _, err := d.QuoteNode(ctx, sel, [32]byte{}, "example.org", [32]byte{}); !isErr(err, tpm.ErrBankDisabled) {
			t.Errorf("%s: err = %v", name, err)
		}
		if _, err := d.ReadPCRs(ctx, sel); !isErr(err, tpm.ErrBankDisabled) {
			t.Errorf("%s: reading: err = %v", name, err)
		}
	}
}

func TestClearedTPM(t *testing.T) {
	sw, dir := swtpmtest.Start(t), t.TempDir()
	var log bytes.Buffer
	d := open(t, sw, tpm.Options{DataDir: dir, Log: slog.New(slog.NewTextHandler(&log, nil))})
	ctx := background(t)
	ek, err := d.EK(ctx)
	if err != nil {
		t.Fatal(err)
	}
	first, err := d.AK(ctx)
	if err != nil {
		t.Fatal(err)
	}
	q, err := d.QuoteNode(ctx, pcrs(), [32]byte{}, "example.org", [32]byte{})
	if err != nil {
		t.Fatal(err)
	}
	before := parse(t, d, q)
	sw.Restart() // so that the count is not 0
	sw.Clear()
	second, err := d.AK(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Equal(first.Name, second.Name) || !strings.Contains(log.String(), "ALARM") {
		t.Errorf("no new AK, or no alarm:\n%s", log.String())
	}
	if !bytes.Equal(first.ParentName, second.ParentName) {
		t.Error("the parent depends on more than the endorsement seed, which TPM2_Clear keeps")
	}
	if q, err = d.QuoteNode(ctx, pcrs(), [32]byte{}, "example.org", [32]byte{}); err != nil {
		t.Fatal(err)
	}
	after := parse(t, d, q)
	if after.ResetCount >= before.ResetCount {
		t.Errorf("reset count %d → %d: it should have fallen", before.ResetCount, after.ResetCount)
	}
	blob, enc, err := attest.MakeCredential(ek.Public, second.Name, make([]byte, 32))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := d.ActivateCredential(ctx, blob, enc); err != nil {
		t.Error(err)
	}
	noLeak(t, sw)
}

// TestRefusesAKBlobOfAnotherTPM moves a data directory to another machine.
func TestRefusesAKBlobOfAnotherTPM(t *testing.T) {
	dir := t.TempDir()
	a, b := swtpmtest.Start(t), swtpmtest.Start(t)
	d := open(t, a, tpm.Options{DataDir: dir})
	first, err := d.AK(background(t))
	if err != nil {
		t.Fatal(err)
	}
	d.Close()
	var log bytes.Buffer
	d = open(t, b, tpm.Options{DataDir: dir, Log: slog.New(slog.NewTextHandler(&log, nil))})
	second, err := d.AK(background(t))
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Equal(first.Name, second.Name) {
		t.Error("the same AK on two TPMs")
	}
	if !strings.Contains(log.String(), "ALARM") {
		t.Error("no alarm in the log")
	}
	noLeak(t, b)
}

func TestRefusesSecondAgentOnOneDataDir(t *testing.T) {
	sw, dir := swtpmtest.Start(t), t.TempDir()
	d := open(t, sw, tpm.Options{DataDir: dir})
	if _, err := tpm.Open(tpm.Options{Address: sw.Device(), DataDir: dir}); !isErr(err, tpm.ErrDataDirLocked) || tpm.Hint(err) == "" {
		t.Errorf("err = %v", err)
	}
	d.Close()
	d, err := tpm.Open(tpm.Options{Address: sw.Device(), DataDir: dir})
	if err != nil {
		t.Fatal(err)
	}
	d.Close()
	if _, err := d.Info(background(t)); !isErr(err, tpm.ErrClosed) {
		t.Errorf("after Close: err = %v", err)
	}
}

func TestDamagedAKFileIsReplaced(t *testing.T) {
	sw := swtpmtest.Start(t)
	for name, content := range map[string]string{
		"empty": "", "cut": `{"version":1,"pub`, "another version": `{"version":2}`, "fields missing": `{"version":1}`,
	} {
		dir := t.TempDir()
		path := filepath.Join(dir, "ak.json")
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		var log bytes.Buffer
		d := open(t, sw, tpm.Options{DataDir: dir, Log: slog.New(slog.NewTextHandler(&log, nil))})
		if _, err := d.AK(background(t)); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		d.Close()
		if !strings.Contains(log.String(), "level=ERROR") {
			t.Errorf("%s: nothing in the log", name)
		}
		if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", name, fi.Mode(), err)
		}
	}
}

// TestRSAKeysOnTPMWithoutP256 hides the TPM's curves.
func TestRSAKeysOnTPMWithoutP256(t *testing.T) {
	sw := swtpmtest.Start(t, swtpmtest.WithEK(swtpmtest.RSA2048))
	p := newProxy(t, sw.Socket())
	p.hook = func(_ net.Conn, cmd []byte) []byte {
		if tpm2.TPMCC(binary.BigEndian.Uint32(cmd[6:])) != tpm2.TPMCCGetCapability || tpm2.TPMCap(binary.BigEndian.Uint32(cmd[10:])) != tpm2.TPMCapECCCurves {
			return nil
		}
		return []byte{0x80, 0x01, 0, 0, 0, 19, 0, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 0}
	}
	d, err := tpm.Open(tpm.Options{Address: "unix:" + p.path, DataDir: t.TempDir(), Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	dev, err := d.AK(background(t))
	if err != nil {
		t.Fatal(err)
	}
	ak, err := attest.VerifyAK(dev.Public, dev.CreationData, dev.CreationAttest, dev.CreationSignature)
	if err != nil {
		t.Fatal(err)
	}
	if _, ok := ak.Public.(*rsa.PublicKey); !ok {
		t.Errorf("the AK is a %T", ak.Public)
	}
	q, err := d.QuoteNode(background(t), pcrs(), [32]byte{}, "example.org", [32]byte{})
	if err != nil {
		t.Fatal(err)
	}
	parse(t, d, q)
}
