package attest_test

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"github.com/fxamacker/cbor/v2"
	"github.com/google/go-cmp/cmp"

	"github.com/rootlink/rootlink/internal/forge"
	"github.com/rootlink/rootlink/pkg/attest"
)

func TestDetachedRoundTrip(t *testing.T) {
	w := forge.NewWorld(t)
	svid := w.Plain(t)
	full := w.Detach(t, svid)
	full.Token = []byte("token")
	unsigned, err := attest.NewDetached(full.Evidence, full.AgentSVID)
	if err != nil {
		t.Fatal(err)
	}
	signed := *full
	signed.Token = nil
	for _, d := range []*attest.Detached{full, &signed, unsigned} {
		b, err := d.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		got, err := attest.ParseDetached(b)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(d, got); diff != "" {
			t.Error(diff)
		}
	}
	// What is signed does not hold the signature.
	a, _ := full.SigningInput(svid.Raw)
	b, _ := unsigned.SigningInput(svid.Raw)
	if len(a) == 0 || !bytes.Equal(a, b) {
		t.Error("the signing input depends on the signature")
	}
}

// Steps that sign with one SVID, as they do on a SPIRE agent's socket, must not
// overwrite each other's records.
func TestDetachedFile(t *testing.T) {
	a := attest.DetachedFile([]byte("svid"), [32]byte{1})
	if a == attest.DetachedFile([]byte("svid"), [32]byte{2}) || a == attest.DetachedFile([]byte("SVID"), [32]byte{1}) {
		t.Error("two records have one name")
	}
	if want := "sha256-" + strings.Repeat("0", 64) + ".evidence.cbor"; len(a) != len(want) {
		t.Errorf("%q is not like %q", a, want)
	}
}

func TestRefusesDetachedForm(t *testing.T) {
	w := forge.NewWorld(t)
	good := w.Detach(t, w.Plain(t))
	type record = *attest.Detached
	for name, bend := range map[string]func(record){
		"no evidence":            func(d record) { d.Evidence = nil },
		"leaf evidence":          func(d record) { d.Evidence.Kind = attest.KindLeaf },
		"a server's policy":      func(d record) { d.Evidence.Policy = &attest.PolicyRef{Name: "p", Digest: *attest.EventLogDigest(nil)} },
		"no payload":             func(d record) { d.Evidence.Payload = [32]byte{} },
		"node key hash zero":     func(d record) { d.Evidence.AgentKey = [32]byte{} },
		"no agent":               func(d record) { d.AgentSVID = nil },
		"an empty certificate":   func(d record) { d.AgentSVID = [][]byte{{}} },
		"a certificate too long": func(d record) { d.AgentSVID = [][]byte{make([]byte, attest.MaxCertificate+1)} },
		"too many certificates": func(d record) {
			d.AgentSVID = slicesRepeat(d.AgentSVID[0], attest.MaxAgentChain+1)
		},
		"signature too long":   func(d record) { d.Signature = make([]byte, attest.MaxECDSASignature+1) },
		"token too long":       func(d record) { d.Token = make([]byte, attest.MaxDetachedToken+1) },
		"a token over nothing": func(d record) { d.Signature, d.Token = nil, []byte{1} },
		"no selectors":         func(d record) { d.Evidence.Selectors = nil },
		"all parts together too big": func(d record) {
			d.Token, d.AgentSVID = make([]byte, attest.MaxDetachedToken), slicesRepeat(make([]byte, attest.MaxCertificate), 5)
		},
	} {
		t.Run(name, func(t *testing.T) {
			e, d := *good.Evidence, *good
			d.Evidence = &e
			bend(&d)
			if b, err := d.Marshal(); err == nil {
				t.Errorf("written as %d bytes", len(b))
			}
			if name != "all parts together too big" {
				if _, err := d.SigningInput(nil); err == nil {
					t.Error("signed")
				}
			}
		})
	}
}

func slicesRepeat(b []byte, n int) (out [][]byte) {
	for range n {
		out = append(out, b)
	}
	return out
}

func TestRefusesDetachedBytes(t *testing.T) {
	w := forge.NewWorld(t)
	d := w.Detach(t, w.Plain(t))
	d.Token = []byte("token")
	good, err := d.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	record, _ := d.Evidence.MarshalRecord()
	type fields = map[int]any
	with := func(bend func(fields)) []byte {
		m := fields{1: 1, 2: record, 3: d.AgentSVID, 4: d.Signature, 5: d.Token}
		bend(m)
		mode, err := cbor.CoreDetEncOptions().EncMode()
		if err != nil {
			t.Fatal(err)
		}
		b, err := mode.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	if b := with(func(fields) {}); !bytes.Equal(b, good) {
		t.Fatal("the test writes another record")
	}
	leaf := forge.NewWorld(t).Make(t)
	leafRecord, _ := leaf.MarshalRecord()
	for name, b := range map[string][]byte{
		"nothing":               {},
		"not a map":             {0x01},
		"cut short":             good[:len(good)-1],
		"trailing bytes":        append(bytes.Clone(good), 0),
		"over the limit":        make([]byte, attest.MaxDetached+1),
		"unknown version":       with(func(m fields) { m[1] = 2 }),
		"no version":            with(func(m fields) { delete(m, 1) }),
		"unknown key":           with(func(m fields) { m[6] = []byte{1} }),
		"no evidence":           with(func(m fields) { delete(m, 2) }),
		"leaf evidence":         with(func(m fields) { m[2] = leafRecord }),
		"no agent":              with(func(m fields) { delete(m, 3) }),
		"empty signature":       with(func(m fields) { m[4] = []byte{} }),
		"null signature":        with(func(m fields) { m[4] = nil }),
		"null token":            with(func(m fields) { m[5] = nil }),
		"a text for a token":    with(func(m fields) { m[5] = "token" }),
		"65 agent certificates": with(func(m fields) { m[3] = slicesRepeat([]byte{1}, 65) }),
		"key twice":             append(append([]byte{0xa6}, good[1:]...), 0x05, 0x41, 0x01),
		"keys out of order":     append([]byte{0xa5}, append(bytes.Clone(good[3:]), 0x01, 0x01)...),
		"long integer":          append([]byte{0xa5, 0x01, 0x18, 0x01}, good[3:]...),
		"indefinite map":        append(append([]byte{0xbf}, good[1:]...), 0xff),
		"tagged":                append([]byte{0xc1}, good...),
	} {
		t.Run(name, func(t *testing.T) {
			if d, err := attest.ParseDetached(b); d != nil || !errors.Is(err, attest.ErrDetached) {
				t.Errorf("got %v, %v", d, err)
			}
		})
	}
}

func FuzzParseDetached(f *testing.F) {
	w := forge.NewWorld(f)
	d := w.Detach(f, w.Plain(f))
	for _, token := range [][]byte{nil, []byte("token")} {
		d.Token = token
		b, err := d.Marshal()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	unsigned, err := attest.NewDetached(d.Evidence, d.AgentSVID)
	if err != nil {
		f.Fatal(err)
	}
	b, err := unsigned.Marshal()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		d, err := attest.ParseDetached(b)
		if err != nil {
			if d != nil || !errors.Is(err, attest.ErrDetached) {
				t.Fatalf("got %v, %v", d, err)
			}
			return
		}
		if again, err := d.Marshal(); err != nil || !bytes.Equal(again, b) {
			t.Fatalf("written again it differs: %v", err)
		}
		if input, err := d.SigningInput(b); err != nil || len(input) == 0 {
			t.Fatal(err)
		}
	})
}
