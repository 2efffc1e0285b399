package attest_test

import (
	"testing"

	"github.com/rootlink/rootlink/internal/forge"
	"github.com/rootlink/rootlink/pkg/attest"
)

func TestVerify(t *testing.T) {
	for _, ek := range []string{forge.EKP256, forge.EKRSA2048, forge.EKP384, forge.EKRSA3072} {
		for _, ak := range []string{"ecc", "rsassa", "rsapss"} {
			t.Run(ek+"/"+ak, func(t *testing.T) {
				t.Parallel()
				m := forge.NewMaker(t, "Forge Semiconductor")
				w := forge.NewWorldWith(t, m, forge.NewTPM(t, m, forge.TPMOptions{EK: ek, RSAAK: ak != "ecc", RSAPSS: ak == "rsapss"}))
				svid := w.Issue(t, w.Make(t))
				e, err := attest.FromCertificate(svid)
				if err != nil {
					t.Fatal(err)
				}
				v, report, err := attest.Verify(e, w.Binding(), w.Options())
				if err != nil {
					t.Fatal(err)
				}
				for _, c := range report {
					if c.Outcome == attest.Failed || c.Clause == "" || (c.Outcome == attest.NotRun && c.Detail == "") {
						t.Errorf("%+v", c)
					}
				}
				if v.EK().Hash != w.TPM.EKHash || v.EK().Basis != attest.BasisMaker || v.Leaf().SPIFFEID != w.Leaf.SPIFFEID ||
					v.Quote().ResetCount != 7 || !v.AKStatement().Software || !v.NonceTime().Equal(w.Now) {
					t.Errorf("verified evidence says %+v", v)
				}
			})
		}
	}
}

func TestActivation(t *testing.T) {
	for _, kind := range []string{forge.EKP256, forge.EKRSA2048, forge.EKP384, forge.EKRSA3072} {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			m := forge.NewMaker(t, "Forge Semiconductor")
			tpm := forge.NewTPM(t, m, forge.TPMOptions{EK: kind})
			ek, err := attest.VerifyEK(tpm.EKChain, tpm.EKPublic, m.EKRoots(), forge.Epoch())
			if err != nil {
				t.Fatal(err)
			}
			if ek.Hash != tpm.EKHash || ek.Root != m.Root {
				t.Errorf("EK %+v", ek)
			}
			ak, err := attest.VerifyAK(tpm.AKPublic, tpm.AKCreationData, tpm.AKCreationAttest, tpm.AKCreationSig)
			if err != nil {
				t.Fatal(err)
			}
			if string(ak.ParentName) != string(tpm.ParentName) || string(ak.Name) != string(tpm.AKName) {
				t.Errorf("AK %+v", ak)
			}
			secret := []byte("thirty-two bytes of credential!!")
			blob, enc, err := attest.MakeCredential(tpm.EKPublic, ak.Name, secret)
			if err != nil {
				t.Fatal(err)
			}
			got, err := tpm.ActivateCredential(blob, enc)
			if err != nil || string(got) != string(secret) {
				t.Fatalf("%q, %v", got, err)
			}
		})
	}
}
