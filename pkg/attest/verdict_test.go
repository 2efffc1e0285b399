package attest

import "testing"

// TestVerdictIsNotReused names the ways in which a cached verdict would be
// wrong.
func TestVerdictIsNotReused(t *testing.T) {
	type args struct {
		ak AK
		q  Quote
		p  *PCRPolicy
	}
	fresh := func() *args {
		return &args{AK{Name: []byte{0, 11, 1}}, Quote{
			ResetCount: 7, RestartCount: 1, Safe: true, DigestAlg: "sha256", Digest: make([]byte, 32),
			Selection: []PCRSelection{{Bank: "sha256", Indices: []uint32{4, 7}}},
		}, testPolicy()}
	}
	a := fresh()
	seen := map[[32]byte]string{VerdictKey(&a.ak, &a.q, a.p): "itself"}
	for name, bend := range map[string]func(*args){
		"reboot":                   func(a *args) { a.q.ResetCount++; a.q.RestartCount = 0 },
		"unclean reboot":           func(a *args) { a.q.ResetCount++; a.q.RestartCount, a.q.Safe = 0, false },
		"resume":                   func(a *args) { a.q.RestartCount++ },
		"TPM2_Clear":               func(a *args) { a.q.ResetCount, a.q.RestartCount = 0, 0 },
		"another AK":               func(a *args) { a.ak.Name = []byte{0, 11, 2} },
		"same digest, other PCRs":  func(a *args) { a.q.Selection[0].Indices = []uint32{4, 8} },
		"same digest, other bank":  func(a *args) { a.q.Selection[0].Bank = "sha384" },
		"same digest, other split": func(a *args) { a.q.Selection = []PCRSelection{{"sha256", []uint32{4}}, {"sha384", []uint32{7}}} },
		"other digest":             func(a *args) { a.q.Digest[0]++ },
		"other hash":               func(a *args) { a.q.DigestAlg = "sha384" },
		"new revision":             func(a *args) { a.p.Revision++ },
		"values exchanged":         func(a *args) { a.p.Profiles[0].Banks["sha256"]["7"] = hex32(9) },
	} {
		a := fresh()
		bend(a)
		k := VerdictKey(&a.ak, &a.q, a.p)
		if other, dup := seen[k]; dup {
			t.Errorf("%s: the verdict of %s would be reused", name, other)
		}
		seen[k] = name
	}
}
