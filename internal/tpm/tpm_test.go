package tpm_test

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"testing"
	"time"

	"github.com/rootlink/rootlink/internal/swtpmtest"
	"github.com/rootlink/rootlink/internal/tpm"
	"github.com/rootlink/rootlink/pkg/attest"
)

func open(t testing.TB, sw *swtpmtest.TPM, o tpm.Options) *tpm.Device {
	t.Helper()
	o.Address = sw.Device()
	if o.DataDir == "" {
		o.DataDir = t.TempDir()
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	d, err := tpm.Open(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

// pcrs is what agents quote.
func pcrs() []attest.PCRSelection {
	sel := attest.PCRSelection{Bank: "sha256"}
	for i := range uint32(16) {
		sel.Indices = append(sel.Indices, i)
	}
	return []attest.PCRSelection{sel}
}

func background(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

func TestInfoSaysSoftware(t *testing.T) {
	d := open(t, swtpmtest.Start(t), tpm.Options{})
	i, err := d.Info(background(t))
	if err != nil {
		t.Fatal(err)
	}
	if !i.Software || i.Manufacturer != "IBM" || i.Firmware == "" || len(i.Banks) == 0 {
		t.Errorf("info = %+v", i)
	}
}

func TestEKTypes(t *testing.T) {
	for _, c := range []struct {
		name  string
		kind  swtpmtest.EKKind
		typ   tpm.EKType
		chain int
	}{
		{"P-256", swtpmtest.ECCP256, tpm.EKECCP256, 1},
		{"RSA-2048", swtpmtest.RSA2048, tpm.EKRSA2048, 1},
		{"P-384", swtpmtest.ECCP384, tpm.EKECCP384, 1},
		{"none", swtpmtest.NoEK, tpm.EKECCP256, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			sw := swtpmtest.Start(t, swtpmtest.WithEK(c.kind))
			ek, err := open(t, sw, tpm.Options{}).EK(background(t))
			if err != nil {
				t.Fatal(err)
			}
			if ek.Type != c.typ || len(ek.Chain) != c.chain {
				t.Fatalf("EK type %s with a chain of %d", ek.Type, len(ek.Chain))
			}
			if c.chain > 0 && !bytes.Equal(ek.Chain[0], sw.EKCert) {
				t.Error("the EK certificate is not the one in NV")
			}
		})
	}
}

func TestEKChainInNV(t *testing.T) {
	sw := swtpmtest.Start(t, swtpmtest.WithChainInNV())
	ek, err := open(t, sw, tpm.Options{}).EK(background(t))
	if err != nil {
		t.Fatal(err)
	}
	if len(ek.Chain) != 2 || !bytes.Equal(ek.Chain[1], sw.Maker.Intermediate.Raw) {
		t.Errorf("chain of %d certificates", len(ek.Chain))
	}
}

func TestRefusesEKCertificateOfAnotherTPM(t *testing.T) {
	other := swtpmtest.Start(t)
	sw := swtpmtest.Start(t, swtpmtest.WithEKCertificateOf(other))
	_, err := open(t, sw, tpm.Options{}).EK(background(t))
	if !errors.Is(err, tpm.ErrEKMismatch) {
		t.Fatalf("err = %v", err)
	}
}

func TestAKSurvivesReopening(t *testing.T) {
	sw, dir := swtpmtest.Start(t), t.TempDir()
	d := open(t, sw, tpm.Options{DataDir: dir})
	first, err := d.AK(background(t))
	if err != nil {
		t.Fatal(err)
	}
	d.Close()
	sw.Restart()
	second, err := open(t, sw, tpm.Options{DataDir: dir}).AK(background(t))
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(first.Name, second.Name) || !bytes.Equal(first.CreationSignature, second.CreationSignature) {
		t.Error("another AK after reopening")
	}
}

func TestTwoTPMsHaveDifferentParents(t *testing.T) {
	a, err := open(t, swtpmtest.Start(t), tpm.Options{}).AK(background(t))
	if err != nil {
		t.Fatal(err)
	}
	b, err := open(t, swtpmtest.Start(t), tpm.Options{}).AK(background(t))
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Equal(a.ParentName, b.ParentName) {
		t.Error("two TPMs have the same parent key")
	}
}

func TestQuoteNode(t *testing.T) {
	sw := swtpmtest.Start(t)
	d := open(t, sw, tpm.Options{})
	q, err := d.QuoteNode(background(t), pcrs(), [32]byte{1}, "example.org", [32]byte{})
	if err != nil {
		t.Fatal(err)
	}
	if len(q.Attest) == 0 || len(q.Signature) == 0 || len(q.PCRs) != 1 || len(q.PCRs[0].Values) != 16 {
		t.Errorf("quote = %+v", q)
	}
}
