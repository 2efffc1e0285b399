package tpm_test

import (
	"bytes"
	"crypto/x509"
	"encoding/hex"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/rootlink/rootlink/internal/swtpmtest"
	"github.com/rootlink/rootlink/internal/tpm"
	"github.com/rootlink/rootlink/pkg/attest"
)

// roots trusts the maker of sw.
func roots(sw *swtpmtest.TPM) attest.EKRoots {
	return attest.EKRoots{Roots: []*x509.Certificate{sw.Maker.Root}}
}

// TestVerifierAcceptsWhatTheDeviceMakes runs each primitive past pkg/attest.
func TestVerifierAcceptsWhatTheDeviceMakes(t *testing.T) {
	for _, c := range []struct {
		name string
		opts []swtpmtest.Option
	}{
		{"ECC P-256 EK", nil},
		{"RSA-2048 EK", []swtpmtest.Option{swtpmtest.WithEK(swtpmtest.RSA2048)}},
		{"ECC P-384 EK", []swtpmtest.Option{swtpmtest.WithEK(swtpmtest.ECCP384)}},
		{"chain in NV", []swtpmtest.Option{swtpmtest.WithChainInNV()}},
		{"allow-listed EK", []swtpmtest.Option{swtpmtest.WithEK(swtpmtest.NoEK)}},
	} {
		t.Run(c.name, func(t *testing.T) {
			sw := swtpmtest.Start(t, c.opts...)
			d, ctx := open(t, sw, tpm.Options{}), background(t)
			dev, err := d.EK(ctx)
			if err != nil {
				t.Fatal(err)
			}
			r := roots(sw)
			if len(dev.Chain) == 0 {
				r.Allow = map[[32]byte]bool{dev.Hash(): true}
			}
			ek, err := attest.VerifyEK(dev.Chain, dev.Public, r, time.Now())
			if err != nil {
				t.Fatalf("EK: %v", err)
			}
			if ek.Hash != dev.Hash() {
				t.Error("verifier and device disagree about the EK's hash")
			}
			devAK, err := d.AK(ctx)
			if err != nil {
				t.Fatal(err)
			}
			ak, err := attest.VerifyAK(devAK.Public, devAK.CreationData, devAK.CreationAttest, devAK.CreationSignature)
			if err != nil {
				t.Fatalf("AK: %v", err)
			}
			if !bytes.Equal(ak.Name, devAK.Name) {
				t.Error("verifier and device disagree about the AK's name")
			}
			secret := []byte("a secret of thirty-two bytes...!")
			blob, enc, err := attest.MakeCredential(dev.Public, ak.Name, secret)
			if err != nil {
				t.Fatalf("make credential: %v", err)
			}
			got, err := d.ActivateCredential(ctx, blob, enc)
			if err != nil {
				t.Fatalf("activate credential: %v", err)
			}
			if !bytes.Equal(got, secret) {
				t.Error("another secret came out")
			}
			nonce, key := [32]byte{1}, [32]byte{2}
			sel := []attest.PCRSelection{{Bank: "sha384", Indices: []uint32{7}}, {Bank: "sha256", Indices: []uint32{9, 0, 1, 2, 3, 4, 5, 6, 7, 8, 22}}}
			q, err := d.QuoteNode(ctx, sel, nonce, "example.org", key)
			if err != nil {
				t.Fatalf("quote: %v", err)
			}
			if _, err := attest.VerifyQuote(q.Attest, q.Signature, ak, attest.NodeExtraData(nonce, ak.Name, "example.org", key), q.PCRs, sel); err != nil {
				t.Errorf("node quote: %v", err)
			}
			leaves := leavesOf(t, 5)
			com, err := d.QuoteLeaves(ctx, pcrs(), leaves)
			if err != nil {
				t.Fatalf("quote leaves: %v", err)
			}
			for i, l := range leaves {
				h, err := l.Hash()
				if err != nil {
					t.Fatal(err)
				}
				root, err := attest.RootFromPath(h, uint64(i), 5, com.Tree.Path(uint64(i)))
				if err != nil {
					t.Fatal(err)
				}
				if _, err := attest.VerifyQuote(com.Attest, com.Signature, ak, attest.QuoteExtraData(5, root, ak.Name), com.PCRs, pcrs()); err != nil {
					t.Errorf("leaf %d: %v", i, err)
				}
			}
		})
	}
}

func leavesOf(t testing.TB, n int) []*attest.Leaf {
	t.Helper()
	out := make([]*attest.Leaf, n)
	for i := range out {
		out[i] = &attest.Leaf{
			Kind: attest.KindLeaf, KeyOrigin: attest.OriginCaller,
			TrustDomain: "example.org", SPIFFEID: "spiffe://example.org/build",
			SVIDKey: [32]byte{byte(i), byte(i >> 8), 1}, AgentKey: [32]byte{1}, Nonce: [32]byte{1},
			Selectors: []string{"binary:sha256:" + strings.Repeat("0", 64)},
		}
	}
	return out
}

// TestPeerAcceptsQuote lets tpm2-tools judge a quote.
func TestPeerAcceptsQuote(t *testing.T) {
	if _, err := exec.LookPath("tpm2_checkquote"); err != nil {
		t.Fatal("tpm2_checkquote is not installed\nhint: apt-get install tpm2-tools")
	}
	sw := swtpmtest.Start(t)
	d, ctx := open(t, sw, tpm.Options{}), background(t)
	sw.Extend(7, [32]byte{7})
	ak, err := d.AK(ctx)
	if err != nil {
		t.Fatal(err)
	}
	q, err := d.QuoteNode(ctx, pcrs(), [32]byte{1}, "example.org", [32]byte{})
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	file := func(name string, b []byte) string {
		p := filepath.Join(dir, name)
		if err := os.WriteFile(p, b, 0o600); err != nil {
			t.Fatal(err)
		}
		return p
	}
	extra := attest.NodeExtraData([32]byte{1}, ak.Name, "example.org", [32]byte{})
	args := []string{"-u", file("ak", ak.Public), "-m", file("quote", q.Attest), "-s", file("sig", q.Signature), "-g", "sha256"}
	// tpm2_checkquote wants TPM2B_PUBLIC.
	file("ak", append([]byte{byte(len(ak.Public) >> 8), byte(len(ak.Public))}, ak.Public...))
	check := func(qualification string) error {
		out, err := exec.Command("tpm2_checkquote", append(args, "-q", qualification)...).CombinedOutput()
		if err != nil {
			t.Logf("%s", out)
		}
		return err
	}
	if err := check(hex.EncodeToString(extra[:])); err != nil {
		t.Errorf("tpm2_checkquote refuses our quote: %v", err)
	}
	extra[0] ^= 1
	if check(hex.EncodeToString(extra[:])) == nil {
		t.Error("tpm2_checkquote accepts any extraData: this test checks nothing")
	}
}

func TestRefusesCredentialOfAnotherAK(t *testing.T) {
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
	name := slices.Clone(ak.Name)
	name[5] ^= 1
	blob, enc, err := attest.MakeCredential(ek.Public, name, make([]byte, 32))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := d.ActivateCredential(ctx, blob, enc); !isErr(err, tpm.ErrCredential) {
		t.Errorf("err = %v", err)
	}
	noLeak(t, sw)
}
