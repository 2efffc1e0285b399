package tpm_test

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"

	"github.com/rootlink/rootlink/internal/swtpmtest"
	"github.com/rootlink/rootlink/internal/tpm"
	"github.com/rootlink/rootlink/pkg/attest"
)

// TestRefusesGarbageFromTPM: whatever answers at the device's address, the agent
// neither crashes nor hangs nor takes an unbounded answer into memory.
func TestRefusesGarbageFromTPM(t *testing.T) {
	sw := swtpmtest.Start(t)
	p := newProxy(t, sw.Socket())
	d, err := tpm.Open(tpm.Options{Address: "unix:" + p.path, DataDir: t.TempDir(), Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	for name, rsp := range map[string][]byte{
		"size below the header":   {0x80, 0x01, 0, 0, 0, 9, 0, 0, 0, 0},
		"size of four gigabytes":  {0x80, 0x01, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0},
		"success without a body":  {0x80, 0x01, 0, 0, 0, 10, 0, 0, 0, 0},
		"unknown response code":   {0x80, 0x01, 0, 0, 0, 10, 0xff, 0xff, 0xff, 0xff},
		"body shorter than size":  {0x80, 0x01, 0, 0, 0, 20, 0, 0, 0, 0},
		"sessions without a body": {0x80, 0x02, 0, 0, 0, 10, 0, 0, 0, 0},
		"list longer than body":   {0x80, 0x01, 0, 0, 0, 19, 0, 0, 0, 0, 1, 0, 0, 0, 1, 0xff, 0xff, 0xff, 0xff},
	} {
		p.mu.Lock()
		p.hook = func(net.Conn, []byte) []byte { return rsp }
		p.mu.Unlock()
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		if _, err := d.QuoteNode(ctx, pcrs(), [32]byte{}, "example.org", [32]byte{}); err == nil {
			t.Errorf("%s: no error", name)
		}
		cancel()
	}
	p.mu.Lock()
	p.hook = nil
	p.mu.Unlock()
	if _, err := d.QuoteNode(background(t), pcrs(), [32]byte{}, "example.org", [32]byte{}); err != nil {
		t.Errorf("after the garbage: %v", err)
	}
	noLeak(t, sw)
}

// TestRefusesSpoiledAnswers flips bits in genuine answers, so that what fails is
// deep inside a response. Each operation must fail or give something a verifier
// accepts; none may hang or crash.
func TestRefusesSpoiledAnswers(t *testing.T) {
	sw := swtpmtest.Start(t)
	p := newProxy(t, sw.Socket())
	d, err := tpm.Open(tpm.Options{Address: "unix:" + p.path, DataDir: t.TempDir(), Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if _, err := d.AK(background(t)); err != nil {
		t.Fatal(err)
	}
	r := rand.New(rand.NewPCG(1, 2))
	for range 150 {
		left := 1 + r.IntN(12)
		p.mu.Lock()
		p.hook = func(up net.Conn, cmd []byte) []byte {
			if left--; left != 0 {
				return nil
			}
			rsp, err := exchange(up, cmd)
			if err == nil && len(rsp) > 10 {
				rsp[10+r.IntN(len(rsp)-10)] ^= byte(1 << r.IntN(8))
			}
			return rsp
		}
		p.mu.Unlock()
		ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
		q, err := d.QuoteNode(ctx, pcrs(), [32]byte{}, "example.org", [32]byte{})
		cancel()
		if errors.Is(err, context.DeadlineExceeded) {
			t.Logf("gave up: %v", err)
		}
		if err == nil && len(q.PCRs[0].Values) != 16 {
			t.Errorf("%d PCR values", len(q.PCRs[0].Values))
		}
	}
	p.mu.Lock()
	p.hook = nil
	p.mu.Unlock()
	q, err := d.QuoteNode(background(t), pcrs(), [32]byte{}, "example.org", [32]byte{})
	if err != nil {
		t.Fatal(err)
	}
	parse(t, d, q)
	noLeak(t, sw)
}

func TestEndorsementHierarchyWithPassword(t *testing.T) {
	sw := swtpmtest.Start(t)
	sw.Do(func(c swtpmtest.Sender) error {
		_, err := tpm2.HierarchyChangeAuth{
			AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHEndorsement, Auth: tpm2.PasswordAuth(nil)},
			NewAuth:    tpm2.TPM2BAuth{Buffer: []byte("owner's secret")},
		}.Execute(c)
		return err
	})
	d := open(t, sw, tpm.Options{})
	if _, err := d.EK(background(t)); !isErr(err, tpm.ErrHierarchyAuth) || tpm.Hint(err) == "" {
		t.Errorf("EK: err = %v", err)
	}
	if _, err := d.AK(background(t)); !isErr(err, tpm.ErrHierarchyAuth) {
		t.Errorf("AK: err = %v", err)
	}
}

// TestEKTemplateAndNonceInNV: a maker may have made the EK from something else
// than the default template, and then says so in NV.
func TestEKTemplateAndNonceInNV(t *testing.T) {
	nonce := bytes.Repeat([]byte{9}, 20)
	special := tpm2.ECCEKTemplate
	x := make([]byte, 32)
	copy(x, nonce)
	special.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{
		X: tpm2.TPM2BECCParameter{Buffer: x}, Y: tpm2.TPM2BECCParameter{Buffer: make([]byte, 32)},
	})
	for _, c := range []struct {
		name  string
		index tpm2.TPMHandle
		data  []byte
	}{
		{"template", 0x01c0000c, tpm2.Marshal(special)},
		{"nonce", 0x01c0000b, nonce},
		{"neither", 0, nil},
	} {
		sw := swtpmtest.Start(t, swtpmtest.WithEK(swtpmtest.NoEK))
		var want [32]byte
		sw.Do(func(s swtpmtest.Sender) error {
			if c.index != 0 {
				if err := swtpmtest.WriteNV(s, c.index, c.data); err != nil {
					return err
				}
			}
			tmpl := special
			if c.index == 0 {
				tmpl = tpm2.ECCEKTemplate
			}
			rsp, err := tpm2.CreatePrimary{PrimaryHandle: tpm2.TPMRHEndorsement, InPublic: tpm2.New2B(tmpl)}.Execute(s)
			if err != nil {
				return err
			}
			want, err = attest.EKHash(rsp.OutPublic.Bytes())
			return err
		})
		d, ctx := open(t, sw, tpm.Options{}), background(t)
		ek, err := d.EK(ctx)
		if err != nil {
			t.Fatalf("%s: %v", c.name, err)
		}
		if ek.Hash() != want {
			t.Errorf("%s: another EK than the maker's", c.name)
		}
		ak, err := d.AK(ctx)
		if err != nil {
			t.Fatal(err)
		}
		blob, enc, err := attest.MakeCredential(ek.Public, ak.Name, make([]byte, 32))
		if err != nil {
			t.Fatalf("%s: %v", c.name, err)
		}
		if _, err := d.ActivateCredential(ctx, blob, enc); err != nil {
			t.Errorf("%s: %v", c.name, err)
		}
	}
}

func TestRefusesOversizedEKCertificate(t *testing.T) {
	sw := swtpmtest.Start(t, swtpmtest.WithEK(swtpmtest.NoEK))
	// A DER length that goes beyond the index.
	sw.Do(func(c swtpmtest.Sender) error {
		return swtpmtest.WriteNV(c, 0x01c0000a, []byte{0x30, 0x82, 0xff, 0xff, 1, 2, 3})
	})
	if _, err := open(t, sw, tpm.Options{}).EK(background(t)); err == nil {
		t.Error("a certificate longer than its NV index was read")
	}
}

// TestPaddedEKCertificate: indices are often larger than what they hold.
func TestPaddedEKCertificate(t *testing.T) {
	for _, pad := range []byte{0, 0xff} {
		sw := swtpmtest.Start(t)
		sw.Do(func(c swtpmtest.Sender) error {
			if err := swtpmtest.UndefineNV(c, 0x01c0000a); err != nil {
				return err
			}
			return swtpmtest.WriteNV(c, 0x01c0000a, append(bytes.Clone(sw.EKCert), bytes.Repeat([]byte{pad}, 700)...))
		})
		ek, err := open(t, sw, tpm.Options{}).EK(background(t))
		if err != nil || !bytes.Equal(ek.Chain[0], sw.EKCert) {
			t.Errorf("padding %#x: %v", pad, err)
		}
	}
}

func TestOverTCP(t *testing.T) {
	sw := swtpmtest.Start(t, swtpmtest.WithTCP())
	if _, err := tpm.Open(tpm.Options{Address: sw.Device()}); !isErr(err, tpm.ErrShared) {
		t.Errorf("a port that every user can reach: err = %v", err)
	}
	d := open(t, sw, tpm.Options{AllowSharedDevice: true})
	for range 3 {
		if _, err := d.QuoteNode(background(t), pcrs(), [32]byte{}, "example.org", [32]byte{}); err != nil {
			t.Fatal(err)
		}
		sw.Restart()
	}
}

func TestWithoutDataDirThereIsNoAK(t *testing.T) {
	sw := swtpmtest.Start(t)
	d, err := tpm.Open(tpm.Options{Address: sw.Device(), Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if _, err := d.AK(background(t)); !isErr(err, tpm.ErrNoDataDir) {
		t.Errorf("err = %v", err)
	}
	if _, err := d.EK(background(t)); err != nil {
		t.Error(err)
	}
}

// TestSharesTheTPMWithTools extends a PCR while an agent is busy.
func TestSharesTheTPMWithTools(t *testing.T) {
	sw := swtpmtest.Start(t)
	d := open(t, sw, tpm.Options{})
	ctx, stop := context.WithCancel(background(t))
	const callers = 4 // so that an operation always waits
	done := make(chan error, callers)
	for range callers {
		go func() {
			for {
				if _, err := d.QuoteNode(ctx, pcrs(), [32]byte{}, "example.org", [32]byte{}); err != nil {
					if ctx.Err() != nil {
						err = nil
					}
					done <- err
					return
				}
			}
		}()
	}
	for i := range 3 {
		sw.Extend(10, [32]byte{byte(i)})
	}
	cmd := exec.Command("tpm2_pcrextend", "10:sha256="+strings.Repeat("5a", 32))
	cmd.Env = append(os.Environ(), "TPM2TOOLS_TCTI="+sw.TCTI())
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("tpm2_pcrextend beside a busy agent: %v\n%s", err, out)
	}
	stop()
	for range callers {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}
