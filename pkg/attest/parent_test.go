package attest

import (
	"crypto/x509/pkix"
	"errors"
	"slices"
	"testing"
	"time"

	"github.com/fxamacker/cbor/v2"
	"github.com/google/go-cmp/cmp"
)

func testParent() *Parent {
	e := testEvidence()
	return &Parent{
		Attest: e.Attest, Signature: e.Signature, AKCert: e.AKCert, EKChain: e.EKChain,
		PCRs: e.PCRs, Policy: e.Policy, EventLog: e.EventLog, IMALog: e.IMALog,
		AgentKey: [32]byte{1}, Nonce: [32]byte{6}, AttestedAt: time.UnixMilli(1_900_000_000_123).UTC(),
	}
}

func TestParentRoundTrip(t *testing.T) {
	bare := testParent()
	bare.Policy, bare.EventLog, bare.IMALog, bare.EKChain, bare.EKPublic = nil, nil, nil, nil, []byte("spki")
	for _, p := range []*Parent{testParent(), bare} {
		b, err := p.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		got, err := ParseParent(b)
		if err != nil {
			t.Fatal(err)
		}
		if !cmp.Equal(p, got) {
			t.Error(cmp.Diff(p, got))
		}
	}
}

// Each kind of record in the other's place, and each type of wrapper around the
// other's record.
func TestRefusesParentAsLeafAndLeafAsParent(t *testing.T) {
	parent, err := testParent().Marshal()
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := testEvidence().MarshalRecord()
	if err != nil {
		t.Fatal(err)
	}
	wrap := func(mediaType string, record []byte) pkix.Extension {
		x, err := marshalCMW(mediaType, evidenceIndicator, record)
		if err != nil {
			t.Fatal(err)
		}
		return x
	}
	readLeaf := func(x pkix.Extension) error { _, err := FromExtensions([]pkix.Extension{x}); return err }
	readParent := func(x pkix.Extension) error { _, err := ParentFromExtensions([]pkix.Extension{x}); return err }
	for name, tt := range map[string]struct {
		read func(pkix.Extension) error
		x    pkix.Extension
		ok   bool
	}{
		"parent":                    {readParent, wrap(parentType, parent), true},
		"leaf":                      {readLeaf, wrap(evidenceType, leaf), true},
		"parent as leaf":            {readLeaf, wrap(parentType, parent), false},
		"leaf as parent":            {readParent, wrap(evidenceType, leaf), false},
		"parent bytes named leaf":   {readLeaf, wrap(evidenceType, parent), false},
		"leaf bytes named parent":   {readParent, wrap(parentType, leaf), false},
		"AK statement for a parent": {readParent, wrap(akType, parent), false},
	} {
		err := tt.read(tt.x)
		if tt.ok != (err == nil) || !tt.ok && !errors.Is(err, ErrRecord) {
			t.Errorf("%s: %v", name, err)
		}
	}
	both := []pkix.Extension{wrap(parentType, parent), wrap(evidenceType, leaf)}
	if _, err := ParentFromExtensions(both); !errors.Is(err, ErrRecord) {
		t.Errorf("two records: %v", err)
	}
	if _, err := FromExtensions(both); !errors.Is(err, ErrRecord) {
		t.Errorf("two records: %v", err)
	}
	if _, err := ParentFromExtensions(nil); !errors.Is(err, ErrNoEvidence) {
		t.Errorf("none: %v", err)
	}
}

func TestRefusesMalformedParents(t *testing.T) {
	for name, edit := range map[string]func(*Parent){
		"no quote":             func(p *Parent) { p.Attest = nil },
		"no PCRs":              func(p *Parent) { p.PCRs = nil },
		"EK chain and EK":      func(p *Parent) { p.EKPublic = []byte("spki") },
		"no time":              func(p *Parent) { p.AttestedAt = time.Time{} },
		"a time past all ages": func(p *Parent) { p.AttestedAt = time.UnixMilli(maxUnixMilli + 1) },
		"too large":            func(p *Parent) { p.EKChain = [][]byte{make([]byte, MaxParent)} },
	} {
		p := testParent()
		edit(p)
		if _, err := p.Marshal(); !errors.Is(err, ErrRecord) {
			t.Errorf("%s: %v", name, err)
		}
	}
	good, err := testParent().Marshal()
	if err != nil {
		t.Fatal(err)
	}
	// Every single byte is either part of the value or refused.
	for i := range good {
		b := append([]byte(nil), good...)
		b[i] ^= 0x40
		p, err := ParseParent(b)
		if err != nil {
			if !errors.Is(err, ErrRecord) {
				t.Fatalf("byte %d: %v", i, err)
			}
			continue
		}
		if again, err := p.Marshal(); err != nil || string(again) != string(b) {
			t.Fatalf("byte %d: two encodings of one parent", i)
		}
	}
	for n := range good {
		if _, err := ParseParent(good[:n]); !errors.Is(err, ErrRecord) {
			t.Fatalf("first %d bytes: %v", n, err)
		}
	}
	// Fields of another length than what they are copied into.
	for name, edit := range map[string]func(*wireParent){
		"short agent key": func(w *wireParent) { w.AgentKey = w.AgentKey[:31] },
		"no agent key":    func(w *wireParent) { w.AgentKey = nil },
		"long agent key":  func(w *wireParent) { w.AgentKey = append(slices.Clone(w.AgentKey), 0) },
		"short nonce":     func(w *wireParent) { w.Nonce = w.Nonce[:31] },
		"long nonce":      func(w *wireParent) { w.Nonce = append(slices.Clone(w.Nonce), 0) },
		"no time":         func(w *wireParent) { w.AttestedAt = 0 },
		"far time":        func(w *wireParent) { w.AttestedAt = 1 << 63 },
		"version":         func(w *wireParent) { w.Version++ },
	} {
		w, err := testParent().wire()
		if err != nil {
			t.Fatal(err)
		}
		edit(w)
		mode, err := cbor.CoreDetEncOptions().EncMode()
		if err != nil {
			t.Fatal(err)
		}
		b, err := mode.Marshal(w)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := ParseParent(b); !errors.Is(err, ErrRecord) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// A record that says the same in another encoding: its keys in another order.
	if b := slices.Concat(good[:1], good[3:], good[1:3]); good[1] != 1 || good[2] != 1 {
		t.Fatal("the record does not begin with its version")
	} else if _, err := ParseParent(b); !errors.Is(err, ErrRecord) {
		t.Errorf("keys out of order: %v", err)
	}
	if _, err := ParseParent(append(good, 0)); !errors.Is(err, ErrRecord) {
		t.Error("bytes after the record")
	}
}
