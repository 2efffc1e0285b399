package attest_test

import (
	"bytes"
	"crypto"
	"crypto/sha256"
	"errors"
	"testing"

	"github.com/google/go-tpm/tpm2"

	"github.com/rootlink/rootlink/internal/forge"
	"github.com/rootlink/rootlink/pkg/attest"
)

func TestRefusesQuote(t *testing.T) {
	maker := forge.NewMaker(t, "Forge Semiconductor")
	x := [32]byte{1, 2, 3}
	sel256 := []attest.PCRSelection{{Bank: "sha256", Indices: []uint32{0, 4, 7}}}
	both := append([]attest.PCRSelection{{Bank: "sha384", Indices: []uint32{0, 4, 7}}}, sel256...)
	type args struct {
		tpm      *forge.TPM
		att, sig []byte
		ak       *attest.AK
		pcrs     []attest.PCRBank
		required []attest.PCRSelection
	}
	info := func(a *tpm2.TPMSAttest) *tpm2.TPMSQuoteInfo {
		q, err := a.Attested.Quote()
		if err != nil {
			t.Fatal(err)
		}
		return q
	}
	for name, c := range map[string]struct {
		o    forge.TPMOptions
		sel  []attest.PCRSelection
		hook func(*tpm2.TPMSAttest)
		bend func(*args)
		want error
	}{
		"wrong magic":       {want: attest.ErrQuoteMagic, hook: func(a *tpm2.TPMSAttest) { a.Magic = 0xff544348 }},
		"creation as quote": {want: attest.ErrQuoteType, bend: func(a *args) { a.att, a.sig = a.tpm.AKCreationAttest, a.tpm.AKCreationSig }},
		"trailing bytes": {want: attest.ErrTPMStructure, bend: func(a *args) {
			a.att = append(a.att, 0)
			a.sig = a.tpm.SignAK(t, a.att)
		}},
		"cut short": {want: attest.ErrTPMStructure, bend: func(a *args) {
			a.att = a.att[:len(a.att)-1]
			a.sig = a.tpm.SignAK(t, a.att)
		}},
		"empty":                         {want: attest.ErrTPMStructure, bend: func(a *args) { a.att = nil }},
		"signature of another message":  {want: attest.ErrQuoteSignature, bend: func(a *args) { a.sig = a.tpm.SignAK(t, []byte("other")) }},
		"signature with trailing bytes": {want: attest.ErrTPMStructure, bend: func(a *args) { a.sig = append(a.sig, 0) }},
		"signature by another AK": {want: attest.ErrQuoteSignature, bend: func(a *args) {
			a.ak = forge.NewTPM(t, maker, forge.TPMOptions{}).AK()
		}},
		"RSA signature for an ECC key": {want: attest.ErrQuoteSignature, bend: func(a *args) {
			a.sig = forge.NewTPM(t, maker, forge.TPMOptions{RSAAK: true}).SignAK(t, a.att)
		}},
		"ECC signature for an RSA key": {want: attest.ErrQuoteSignature, o: forge.TPMOptions{RSAAK: true}, bend: func(a *args) {
			a.sig = forge.NewTPM(t, maker, forge.TPMOptions{}).SignAK(t, a.att)
		}},
		"SHA-1 signature, ECDSA":  {want: attest.ErrQuoteSignature, bend: func(a *args) { a.sig = a.tpm.SignAKWith(t, a.att, crypto.SHA1) }},
		"SHA-1 signature, RSASSA": {want: attest.ErrQuoteSignature, o: forge.TPMOptions{RSAAK: true}, bend: func(a *args) { a.sig = a.tpm.SignAKWith(t, a.att, crypto.SHA1) }},
		"SHA-1 signature, RSAPSS": {want: attest.ErrQuoteSignature, o: forge.TPMOptions{RSAAK: true, RSAPSS: true}, bend: func(a *args) { a.sig = a.tpm.SignAKWith(t, a.att, crypto.SHA1) }},
		"NULL signature":          {want: attest.ErrQuoteSignature, bend: func(a *args) { a.sig = []byte{0, 0x10} }},
		"HMAC as signature": {want: attest.ErrQuoteSignature, bend: func(a *args) {
			a.sig = append([]byte{0, 5, 0, 11}, make([]byte, 32)...)
		}},
		"other extraData": {want: attest.ErrQuoteExtraData, hook: func(a *tpm2.TPMSAttest) { a.ExtraData.Buffer = make([]byte, 32) }},
		"longer extraData": {want: attest.ErrQuoteExtraData, hook: func(a *tpm2.TPMSAttest) {
			a.ExtraData.Buffer = append(bytes.Clone(x[:]), 0)
		}},
		"disabled bank, empty selection": {want: attest.ErrQuoteSelection, sel: []attest.PCRSelection{{Bank: "sha512", Indices: []uint32{7}}}},
		"disabled bank beside a live one": {
			want: attest.ErrQuoteSelection, sel: append([]attest.PCRSelection{{Bank: "sha512", Indices: []uint32{7}}}, sel256...),
			bend: func(a *args) { a.required = []attest.PCRSelection{{Bank: "sha512", Indices: []uint32{7}}} },
		},
		"SHA-1 bank only": {
			want: attest.ErrQuoteSelection, sel: []attest.PCRSelection{{Bank: "sha1", Indices: []uint32{0, 4, 7}}},
			bend: func(a *args) { a.required[0].Bank = "sha256" },
		},
		"SHA-1 bank required": {
			want: attest.ErrQuoteSelection, sel: []attest.PCRSelection{{Bank: "sha1", Indices: []uint32{0, 4, 7}}},
			bend: func(a *args) { a.required = []attest.PCRSelection{{Bank: "sha1", Indices: []uint32{7}}} },
		},
		"required PCR missing from the selection": {want: attest.ErrQuoteSelection, bend: func(a *args) {
			a.required = []attest.PCRSelection{{Bank: "sha256", Indices: []uint32{7, 11}}}
		}},
		"required bank missing": {want: attest.ErrQuoteSelection, bend: func(a *args) {
			a.required = []attest.PCRSelection{{Bank: "sha384", Indices: []uint32{7}}}
		}},
		"resettable PCR required": {
			want: attest.ErrQuoteSelection, sel: []attest.PCRSelection{{Bank: "sha256", Indices: []uint32{7, 23}}},
			bend: func(a *args) { a.required = []attest.PCRSelection{{Bank: "sha256", Indices: []uint32{7, 23}}} },
		},
		"nothing required": {want: attest.ErrQuoteSelection, bend: func(a *args) { a.required = nil }},
		"bank twice": {want: attest.ErrQuoteSelection, hook: func(a *tpm2.TPMSAttest) {
			s := &info(a).PCRSelect
			s.PCRSelections = append(s.PCRSelections, s.PCRSelections[0])
		}},
		"unknown bank": {want: attest.ErrQuoteSelection, hook: func(a *tpm2.TPMSAttest) {
			info(a).PCRSelect.PCRSelections[0].Hash = 0x12
		}},
		"PCR beyond 23": {want: attest.ErrQuoteSelection, hook: func(a *tpm2.TPMSAttest) {
			info(a).PCRSelect.PCRSelections[0].PCRSelect = []byte{0x91, 0, 0, 1}
		}},
		"same digest under another selection": {want: attest.ErrQuoteValues, hook: func(a *tpm2.TPMSAttest) {
			info(a).PCRSelect.PCRSelections[0].PCRSelect = []byte{0x91, 0x08, 0} // 0, 4, 7, and 11
		}},
		"value changed": {want: attest.ErrQuoteValues, bend: func(a *args) { a.pcrs[0].Values[7] = make([]byte, 32) }},
		"values of two PCRs exchanged": {want: attest.ErrQuoteValues, bend: func(a *args) {
			v := a.pcrs[0].Values
			v[4], v[7] = v[7], v[4]
		}},
		"value of an unselected PCR added":     {want: attest.ErrQuoteValues, bend: func(a *args) { a.pcrs[0].Values[11] = make([]byte, 32) }},
		"value under another index":            {want: attest.ErrQuoteValues, bend: func(a *args) { v := a.pcrs[0].Values; v[5] = v[4]; delete(v, 4) }},
		"bank added":                           {want: attest.ErrQuoteValues, bend: func(a *args) { a.pcrs = append(a.pcrs, a.tpm.PCRs[2]) }},
		"values missing":                       {want: attest.ErrQuoteValues, bend: func(a *args) { a.pcrs = nil }},
		"values of one of two banks":           {want: attest.ErrQuoteValues, sel: both, bend: func(a *args) { a.pcrs = a.pcrs[:1] }},
		"PCR digest of the values of one bank": {want: attest.ErrQuoteValues, sel: both, hook: func(a *tpm2.TPMSAttest) { info(a).PCRDigest.Buffer = make([]byte, 32) }},
	} {
		t.Run(name, func(t *testing.T) {
			p := forge.NewTPM(t, maker, c.o)
			// A bank that this TPM has, but whose collisions are practical.
			p.PCRs = append([]attest.PCRBank{{Bank: "sha1", Values: map[uint32][]byte{}}}, p.PCRs...)
			for i := range uint32(24) {
				p.PCRs[0].Values[i] = make([]byte, 20)
			}
			sel := c.sel
			if sel == nil {
				sel = sel256
			}
			a := &args{tpm: p, ak: p.AK(), required: []attest.PCRSelection{{Bank: "sha256", Indices: []uint32{0, 7}}}}
			a.att, a.sig, a.pcrs = p.Quote(t, x[:], sel, c.hook)
			if sel[0].Bank == "sha384" { // records hold banks in order
				a.pcrs[0], a.pcrs[1] = a.pcrs[1], a.pcrs[0]
			}
			if c.bend != nil {
				c.bend(a)
			}
			q, err := attest.VerifyQuote(a.att, a.sig, a.ak, x, a.pcrs, a.required)
			if !errors.Is(err, c.want) || q != nil {
				t.Errorf("got %v, %v; want %v", q, err, c.want)
			}
		})
	}
}

// TestQuoteOverTwoBanks hashes the values in the order of the selection, which
// need not be the order of the record.
func TestQuoteOverTwoBanks(t *testing.T) {
	m := forge.NewMaker(t, "Forge Semiconductor")
	p := forge.NewTPM(t, m, forge.TPMOptions{})
	sel := []attest.PCRSelection{{Bank: "sha384", Indices: []uint32{0, 7}}, {Bank: "sha256", Indices: []uint32{7}}}
	att, sig, pcrs := p.Quote(t, make([]byte, 32), sel, nil)
	pcrs[0], pcrs[1] = pcrs[1], pcrs[0]
	q, err := attest.VerifyQuote(att, sig, p.AK(), [32]byte{}, pcrs, sel)
	if err != nil {
		t.Fatal(err)
	}
	d := sha256.Sum256(bytes.Join([][]byte{p.PCRs[1].Values[0], p.PCRs[1].Values[7], p.PCRs[0].Values[7]}, nil))
	if !bytes.Equal(q.Digest, d[:]) || len(q.Selection) != 2 {
		t.Errorf("quote %+v", q)
	}
}

func FuzzVerifyQuote(f *testing.F) {
	m := forge.NewMaker(f, "Forge Semiconductor")
	p := forge.NewTPM(f, m, forge.TPMOptions{})
	sel := []attest.PCRSelection{{Bank: "sha256", Indices: []uint32{7}}}
	att, sig, pcrs := p.Quote(f, make([]byte, 32), sel, nil)
	f.Add(att, sig)
	f.Add(p.AKCreationAttest, p.AKCreationSig)
	ak := p.AK()
	f.Fuzz(func(t *testing.T, a, s []byte) {
		_, err := attest.VerifyQuote(a, s, ak, [32]byte{}, pcrs, sel)
		if err == nil && !bytes.Equal(a, att) {
			t.Errorf("accepted %x", a)
		}
	})
}
