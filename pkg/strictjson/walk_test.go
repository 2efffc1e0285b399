package strictjson

import (
	"encoding/json"
	"strings"
	"testing"
	"unicode/utf8"
)

// encoding/json judges the grammar beside the walker. Keys are made different
// from each other by open, and depth is left out: those are rules of our own.
func FuzzScanIsAsStrictAsEncodingJSON(f *testing.F) {
	for _, s := range []string{
		``, ` `, `{}`, `[]`, `[ ]`, `{ }`, `{"a":1}`, `{"a":1,}`, `[1,]`, `[,1]`, `{,}`, `[1 2]`, `{"a" 1}`, `{"a":}`, `{1:2}`, `{"a":1}}`, `[1]]`, `[}`, `{]`,
		`{"a":[}]`, `[{]}`, `0`, `-0`, `01`, `-`, `1.`, `.1`, `1.0`, `1e`, `1e+`, `1E-5`, `1.5e3`, `0e0`, `00`, `+1`, `1e5.0`, `- 1`, `--1`,
		`"`, `""`, `"a`, `"\u00"`, `"\u00zz"`, `"\u00aF"`, `"\q"`, `"\"`, `"\\"`, `"\/\b\f\n\r\t\""`, "\"\x1f\"", "\"\x7f\"", "\"\x00\"", "\"12345678\n\"",
		`true`, `tru`, `truex`, `nul`, `falsefalse`, "\ufeff{}", "\x00", "1\x00", "\v1", "\u00a01", `{"a":tru}`, `"12345678\\"`, `"1234567\"`, `"1234567\\8"`,
		`"\u0000\ud800\u00E9é€😀 12345678"`, `{"":{"":[[[]]]}}`, `[1,[2,[3]],{"a":[{}]}] `, "[1]\n\t\r ", "[\f1]",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		want := json.Valid([]byte(s))
		err := Scan([]byte(s), 1<<20, "")
		if err == nil && !want {
			t.Fatalf("%q is no JSON, and accepted", s)
		}
		if err == nil || !want || !utf8.ValidString(s) {
			return
		}
		// Refused, though JSON: there must be a reason.
		if why := err.Error(); !strings.Contains(why, "duplicate key") && !strings.Contains(why, "nested deeper") {
			t.Fatalf("%q is JSON, and refused: %v", s, err)
		}
	})
}

func BenchmarkScan(b *testing.B) {
	var many strings.Builder
	many.WriteString(`[{"name":"first"}`)
	for range 20_000 {
		many.WriteString(`,{"name":"src/dir001/file00001.go","digest":{"sha256":"` + strings.Repeat("0123456789abcdef", 4) + `"}}`)
	}
	many.WriteString(`]`)
	for name, doc := range map[string]string{"artifacts": many.String(), "payload": `{"payload":"` + strings.Repeat("QUJD", 800_000) + `"}`} {
		b.Run(name, func(b *testing.B) {
			raw := []byte(doc)
			b.SetBytes(int64(len(raw)))
			for b.Loop() {
				if err := Scan(raw, len(raw), ""); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
