package link

import (
	"errors"
	"fmt"
	"strings"
	"testing"
)

func TestParseStatementRefuses(t *testing.T) {
	raw, err := testStatement().Marshal()
	if err != nil {
		t.Fatal(err)
	}
	good := string(raw)
	if _, err := ParseStatement(raw); err != nil {
		t.Fatal(err)
	}
	many := func(n int) string {
		var b strings.Builder
		for i := range n {
			fmt.Fprintf(&b, `{"name":"s%d","digest":{"sha256":"%s"}},`, i, strings.Repeat("ab", 32))
		}
		return b.String()
	}
	for name, bad := range map[string]string{
		"other type":           strings.Replace(good, "Statement/v1", "Statement/v0.1", 1),
		"other predicate":      strings.Replace(good, "link/v0.3", "link/v0.2", 1),
		"extra key":            strings.Replace(good, `"predicate":{`, `"predicate":{"x":1,`, 1),
		"extra key in subject": strings.Replace(good, `{"name":"a"`, `{"x":1,"name":"a"`, 1),
		"duplicate key":        strings.Replace(good, `"_type"`, `"_type":"","_type"`, 1),
		"no subject":           strings.Replace(good, good[strings.Index(good, `"subject":[`):strings.Index(good, `"predicateType"`)], `"subject":[],`, 1),
		"duplicate subject":    strings.Replace(good, `"name":"z"`, `"name":"a"`, 1),
		"nameless subject":     strings.Replace(good, `"name":"z"`, `"name":""`, 1),
		"nameless step":        strings.Replace(good, `"name":"build"`, `"name":""`, 1),
		"upper-case digest":    strings.Replace(good, "abab", "ABab", 1),
		"short digest":         strings.Replace(good, "abab", "ab", 1),
		"no digest":            strings.Replace(good, `{"sha256":"`+strings.Repeat("ab", 32)+`"}`, `{}`, 1),
		"1025 subjects":        strings.Replace(good, `"subject":[`, `"subject":[`+many(MaxSubjects-1), 1),
		"a number for a name":  strings.Replace(good, `"name":"z"`, `"name":1`, 1),
		"exit code in words":   strings.Replace(good, `"return-value":0`, `"return-value":"0"`, 1),
		"oversized":            good + strings.Repeat(" ", MaxStatement),
		"deep nesting":         strings.Replace(good, `"byproducts":{`, `"byproducts":{"x":`+strings.Repeat("[", 50)+strings.Repeat("]", 50)+`,`, 1),
	} {
		t.Run(name, func(t *testing.T) {
			if bad == good {
				t.Fatal("the fixture is not broken")
			}
			if _, err := ParseStatement([]byte(bad)); !errors.Is(err, ErrMalformed) {
				t.Errorf("err = %v, want ErrMalformed", err)
			}
		})
	}
	// The limit itself is fine.
	full := strings.Replace(good, `"subject":[`, `"subject":[`+many(MaxSubjects-2), 1)
	if _, err := ParseStatement([]byte(full)); err != nil {
		t.Errorf("%d subjects: %v", MaxSubjects, err)
	}
	// in-toto leaves these two dictionaries open.
	open := strings.Replace(good, `"byproducts":{`, `"byproducts":{"stdout":"x",`, 1)
	if s, err := ParseStatement([]byte(open)); err != nil || s.Byproducts.ExitCode == nil {
		t.Errorf("unknown byproduct: %v", err)
	}
}

func TestStatementBytesDoNotDependOnOrder(t *testing.T) {
	a, b := testStatement(), testStatement()
	b.Subjects[0], b.Subjects[1] = b.Subjects[1], b.Subjects[0]
	x, err := Prepare(a)
	if err != nil {
		t.Fatal(err)
	}
	y, err := Prepare(b)
	if err != nil {
		t.Fatal(err)
	}
	if x.Digest() != y.Digest() {
		t.Errorf("two encodings:\n%s\n%s", x.Payload(), y.Payload())
	}
}

// The example of in-toto's digest_set page, computed there with sha256sum.
func TestDirHash(t *testing.T) {
	files := map[string][32]byte{}
	for name, digest := range map[string]string{
		"github.com/marklodato/go-hello-world@v0.0.1/README.md": "3a137eef6458bfb76bb2c63fc29ffc7166604d2d2e09ed9d8250a534122a8364",
		"github.com/marklodato/go-hello-world@v0.0.1/go.mod":    "28e7c942a036902d981759d0bf5704d2bfc7cb500caf68b84711b234af01c6a5",
		"github.com/marklodato/go-hello-world@v0.0.1/main.go":   "ddc4da627d9a9f45fb29641a1b185d6f53287ecfd921aacbf4fe54b7a86fe8d1",
	} {
		h, err := parseHash(digest)
		if err != nil {
			t.Fatal(err)
		}
		files[name] = h
	}
	got, err := DirHash(files)
	if want := "2a1bb6127fb481c60f67692e22285fb306f3c6ffe62075e0ccf674d7c3adcb8f"; got != want || err != nil {
		t.Errorf("DirHash = %s, %v, want %s", got, err, want)
	}
	if _, err := DirHash(map[string][32]byte{"a\nb": {}}); !errors.Is(err, ErrMalformed) {
		t.Errorf("a newline in a name: %v", err)
	}
}
