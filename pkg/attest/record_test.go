package attest

import (
	"bytes"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"testing"

	"github.com/fxamacker/cbor/v2"
	"github.com/google/go-cmp/cmp"
)

func testEvidence() *Evidence {
	return &Evidence{
		Attest: []byte("attest"), Signature: []byte("signature"), AKCert: []byte("ak"),
		EKChain: [][]byte{[]byte("ek"), []byte("ca")},
		PCRs: []PCRBank{
			{Bank: "sha256", Values: map[uint32][]byte{0: make([]byte, 32), 7: bytes.Repeat([]byte{7}, 32)}},
			{Bank: "sha384", Values: map[uint32][]byte{0: make([]byte, 48)}},
		},
		Policy:   &PolicyRef{Name: "golden", Revision: 3, Digest: TypedDigest{"sha256", make([]byte, 32)}},
		EventLog: &TypedDigest{"sha256", make([]byte, 32)},
		IMALog:   &TypedDigest{"sha512", make([]byte, 64)},
		Kind:     KindLeaf, KeyOrigin: OriginAgent,
		AgentKey: [32]byte{1}, Executable: [32]byte{2}, Recorder: [32]byte{3}, Tool: [32]byte{4}, Payload: [32]byte{5},
		Selectors: []string{"binary:sha256:00", "binary:uid:0"},
		Nonce:     [32]byte{6}, Salt: [16]byte{7},
		Index: 1, Size: 3, Path: [][32]byte{{8}, {9}},
	}
}

func TestRecordRoundTrip(t *testing.T) {
	bare := testEvidence()
	bare.Policy, bare.EventLog, bare.IMALog, bare.EKChain, bare.Path = nil, nil, nil, nil, nil
	bare.EKPublic, bare.Index, bare.Size = []byte("spki"), 0, 1
	for _, e := range []*Evidence{testEvidence(), bare} {
		b, err := e.MarshalRecord()
		if err != nil {
			t.Fatal(err)
		}
		back, err := ParseRecord(b)
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(e, back); d != "" {
			t.Error(d)
		}
		x, err := e.Extension()
		if err != nil {
			t.Fatal(err)
		}
		if x.Critical {
			t.Error("the extension is critical")
		}
		if back, err = FromExtensions([]pkix.Extension{x}); err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(e, back); d != "" {
			t.Error(d)
		}
	}
}

// rawRecord returns the record as a map, so that tests can bend it.
func rawRecord(t *testing.T) map[any]any {
	t.Helper()
	b, err := testEvidence().MarshalRecord()
	if err != nil {
		t.Fatal(err)
	}
	var m map[any]any
	if err := cbor.Unmarshal(b, &m); err != nil {
		t.Fatal(err)
	}
	return m
}

func TestRefusesMalformedRecord(t *testing.T) {
	good, err := testEvidence().MarshalRecord()
	if err != nil {
		t.Fatal(err)
	}
	enc, err := cbor.CoreDetEncOptions().EncMode()
	if err != nil {
		t.Fatal(err)
	}
	bend := func(f func(m map[any]any)) []byte {
		m := rawRecord(t)
		f(m)
		b, err := enc.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	if !bytes.Equal(bend(func(map[any]any) {}), good) {
		t.Fatal("the test's own encoder does not write what ours does")
	}
	u := func(n int) any { return uint64(n) }
	for name, b := range map[string][]byte{
		"empty":              {},
		"not a map":          {0x01},
		"trailing byte":      append(bytes.Clone(good), 0),
		"cut short":          good[:len(good)-1],
		"version 0":          bend(func(m map[any]any) { m[u(1)] = 0 }),
		"version 2":          bend(func(m map[any]any) { m[u(1)] = 2 }),
		"no version":         bend(func(m map[any]any) { delete(m, u(1)) }),
		"unknown key":        bend(func(m map[any]any) { m[u(24)] = 1 }),
		"unknown text key":   bend(func(m map[any]any) { m["24"] = 1 }),
		"known key as text":  bend(func(m map[any]any) { m["21"] = m[u(21)]; delete(m, u(21)) }),
		"negative key":       bend(func(m map[any]any) { m[int64(-1)] = 1 }),
		"no attest":          bend(func(m map[any]any) { delete(m, u(2)) }),
		"null policy":        bend(func(m map[any]any) { m[u(8)] = nil }),
		"no EK":              bend(func(m map[any]any) { delete(m, u(5)) }),
		"EK twice":           bend(func(m map[any]any) { m[u(6)] = []byte{1} }),
		"unknown bank":       bend(func(m map[any]any) { m[u(7)] = map[int]any{99: map[int][]byte{0: {1}}} }),
		"no banks":           bend(func(m map[any]any) { m[u(7)] = map[int]any{} }),
		"empty bank":         bend(func(m map[any]any) { m[u(7)] = map[int]any{11: map[int]any{}} }),
		"short PCR":          bend(func(m map[any]any) { m[u(7)] = map[int]any{11: map[int][]byte{0: {1}}} }),
		"PCR 24":             bend(func(m map[any]any) { m[u(7)] = map[int]any{11: map[int][]byte{24: make([]byte, 32)}} }),
		"PCR 2^32":           bend(func(m map[any]any) { m[u(7)] = map[int]any{11: map[int][]byte{1 << 32: make([]byte, 32)}} }),
		"unknown kind":       bend(func(m map[any]any) { m[u(11)] = 3 }),
		"kind 257":           bend(func(m map[any]any) { m[u(11)] = 257 }),
		"origin 0":           bend(func(m map[any]any) { m[u(12)] = 0 }),
		"short agent key":    bend(func(m map[any]any) { m[u(13)] = make([]byte, 31) }),
		"no payload":         bend(func(m map[any]any) { delete(m, u(17)) }),
		"no selectors":       bend(func(m map[any]any) { delete(m, u(18)) }),
		"selectors unsorted": bend(func(m map[any]any) { m[u(18)] = []string{"b:1", "a:1"} }),
		"short nonce":        bend(func(m map[any]any) { m[u(19)] = make([]byte, 8) }),
		"index = size":       bend(func(m map[any]any) { m[u(21)] = 3 }),
		"size over limit":    bend(func(m map[any]any) { m[u(22)] = MaxLeaves + 1 }),
		"long path":          bend(func(m map[any]any) { m[u(23)] = make([][32]byte, maxPath+1) }),
		"short path hash":    bend(func(m map[any]any) { m[u(23)] = [][]byte{{1}} }),
		"empty path":         bend(func(m map[any]any) { m[u(23)] = [][]byte{} }),
		"SHA-1 log digest":   bend(func(m map[any]any) { m[u(9)] = []any{4, make([]byte, 20)} }),
		"short log digest":   bend(func(m map[any]any) { m[u(9)] = []any{11, make([]byte, 31)} }),
		"float index":        bend(func(m map[any]any) { m[u(21)] = 1.0 }),
		"tag":                append([]byte{0xc1}, good...),
		"duplicate key":      append(append([]byte{good[0] + 1, 0x01, 0x01}, good[1:]...), nil...),
		"indefinite map":     append(append([]byte{0xbf}, good[1:]...), 0xff),
		"long map header":    append([]byte{0xb8, good[0] & 0x1f}, good[1:]...),
		"too big":            make([]byte, MaxEvidence+1),
		"deep nesting":       bytes.Repeat([]byte{0x81}, 1000),
		"huge string length": {0xa1, 0x02, 0x5b, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff},
		"huge array length":  {0xa1, 0x05, 0x9b, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff},
	} {
		if e, err := ParseRecord(b); !errors.Is(err, ErrRecord) {
			t.Errorf("%s: %v, want ErrRecord (%v)", name, err, e != nil)
		}
	}
}

func TestRefusesRecordWithUnsortedKeys(t *testing.T) {
	good, err := testEvidence().MarshalRecord()
	if err != nil {
		t.Fatal(err)
	}
	// The map starts b6 01 01 02 46 …: move the version behind the attest field.
	if good[0] != 0xb6 || good[1] != 1 || good[2] != 1 || good[3] != 2 || good[4] != 0x46 {
		t.Fatalf("record starts %x", good[:5])
	}
	b := append([]byte{0xb6}, good[3:11]...)
	b = append(append(b, 1, 1), good[11:]...)
	if _, err := ParseRecord(b); !errors.Is(err, ErrRecord) {
		t.Errorf("unsorted keys: %v", err)
	}
}

func TestRefusesMalformedExtension(t *testing.T) {
	e := testEvidence()
	x, err := e.Extension()
	if err != nil {
		t.Fatal(err)
	}
	rec, err := e.MarshalRecord()
	if err != nil {
		t.Fatal(err)
	}
	other := func(typ string, ind uint64) []byte {
		x, err := marshalCMW(typ, ind, rec)
		if err != nil {
			t.Fatal(err)
		}
		return x.Value
	}
	var inner []byte
	if _, err := asn1.Unmarshal(x.Value, &inner); err != nil {
		t.Fatal(err)
	}
	// The record ends in the indicator, 04: write it as 18 04.
	long, err := asn1.Marshal(append(bytes.Clone(inner[:len(inner)-1]), 0x18, 0x04))
	if err != nil {
		t.Fatal(err)
	}
	for name, der := range map[string][]byte{
		"empty":            {},
		"long indicator":   long,
		"json choice":      append([]byte{0x0c}, x.Value[1:]...),
		"trailing":         append(bytes.Clone(x.Value), 0),
		"other type":       other("application/other", 4),
		"other indicator":  other(evidenceType, 8),
		"AK statement":     other(akType, akIndicator),
		"without wrapping": rec,
		"too big":          make([]byte, MaxEvidence+200),
	} {
		if _, err := ParseExtensionValue(der); !errors.Is(err, ErrRecord) {
			t.Errorf("%s: %v", name, err)
		}
	}

	if _, err := FromExtensions(nil); !errors.Is(err, ErrNoEvidence) {
		t.Errorf("none: %v", err)
	}
	if _, err := FromExtensions([]pkix.Extension{x, x}); !errors.Is(err, ErrRecord) {
		t.Errorf("two extensions: %v", err)
	}
	crit := x
	crit.Critical = true
	if _, err := FromExtensions([]pkix.Extension{crit}); !errors.Is(err, ErrRecord) {
		t.Errorf("critical: %v", err)
	}
	if _, err := FromExtensions([]pkix.Extension{{Id: ExtensionID()}}); !errors.Is(err, ErrRecord) {
		t.Errorf("empty value: %v", err)
	}
}

func TestRefusesStatementInOtherEncoding(t *testing.T) {
	s := &AKStatement{EKBasis: BasisAllowList, AKName: append([]byte{0, 11}, make([]byte, 32)...)}
	x, err := s.extension()
	if err != nil {
		t.Fatal(err)
	}
	b, err := parseCMW(x.Value, akType, akIndicator)
	if err != nil {
		t.Fatal(err)
	}
	// The map starts with a6 01 01: write the version as 18 01.
	long := append([]byte{b[0], b[1], 0x18}, b[2:]...)
	if x, err = marshalCMW(akType, akIndicator, long); err != nil {
		t.Fatal(err)
	}
	if _, err := parseStatement(x.Value); !errors.Is(err, ErrAKCert) {
		t.Errorf("got %v", err)
	}
}

func FuzzParseRecord(f *testing.F) {
	b, err := testEvidence().MarshalRecord()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add([]byte{0xa1, 1, 1})
	f.Fuzz(func(t *testing.T, in []byte) {
		e, err := ParseRecord(in)
		if err != nil {
			return
		}
		out, err := e.MarshalRecord()
		if err != nil || !bytes.Equal(in, out) {
			t.Fatalf("parse → marshal changed the record: %v", err)
		}
	})
}

func FuzzParseExtensionValue(f *testing.F) {
	x, err := testEvidence().Extension()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(x.Value)
	f.Fuzz(func(t *testing.T, in []byte) {
		e, err := ParseExtensionValue(in)
		if err != nil {
			return
		}
		out, err := e.Extension()
		if err != nil || !bytes.Equal(in, out.Value) {
			t.Fatalf("parse → marshal changed the extension: %v", err)
		}
	})
}
