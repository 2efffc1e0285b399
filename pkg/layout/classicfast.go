package layout

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"slices"

	"github.com/secure-systems-lab/go-securesystemslib/cjson"
)

// artifactSet is the materials or products of a classic link: name → algorithm →
// digest. A link may hold tens of thousands, and to read them by reflection, and
// once more to put them into canonical form, was most of what verifying it cost.
type artifactSet map[string]map[string]string

// UnmarshalJSON reads what encoding/json has found to be JSON, and the scan
// before it to be without duplicate keys.
func (s *artifactSet) UnmarshalJSON(b []byte) error {
	if string(b) == "null" {
		return nil
	}
	r := &objectReader{b: b}
	out := artifactSet{}
	err := r.object(func(name string) error {
		digests := map[string]string{}
		out[name] = digests
		return r.object(func(alg string) (err error) {
			digests[alg], err = r.text()
			return err
		})
	})
	if err != nil {
		return err
	}
	*s = out
	return nil
}

// objectReader walks valid JSON of which it knows the shape.
type objectReader struct {
	b []byte
	i int
}

func (r *objectReader) next() byte {
	for r.i < len(r.b) {
		switch c := r.b[r.i]; c {
		case ' ', '\t', '\r', '\n':
			r.i++
		default:
			return c
		}
	}
	return 0
}

func (r *objectReader) eat(want byte) error {
	if c := r.next(); c != want {
		return fmt.Errorf("%q where %q should be", c, want)
	}
	r.i++
	return nil
}

// object calls member for each key, which must read the value.
func (r *objectReader) object(member func(key string) error) error {
	if err := r.eat('{'); err != nil {
		return err
	}
	if r.next() == '}' {
		r.i++
		return nil
	}
	for {
		key, err := r.text()
		if err != nil {
			return err
		}
		if err := r.eat(':'); err != nil {
			return err
		}
		if err := member(key); err != nil {
			return err
		}
		if r.next() == '}' {
			r.i++
			return nil
		}
		if err := r.eat(','); err != nil {
			return err
		}
	}
}

func (r *objectReader) text() (string, error) {
	if err := r.eat('"'); err != nil {
		return "", err
	}
	rest := r.b[r.i:]
	end := bytes.IndexByte(rest, '"')
	if end < 0 {
		return "", fmt.Errorf("a string without end")
	}
	if bytes.IndexByte(rest[:end], '\\') < 0 {
		r.i += end + 1
		return string(rest[:end]), nil
	}
	for end = 0; end < len(rest) && rest[end] != '"'; end++ {
		if rest[end] == '\\' {
			end++
		}
	}
	if end >= len(rest) {
		return "", fmt.Errorf("a string without end")
	}
	var s string
	err := json.Unmarshal(r.b[r.i-1:r.i+end+1], &s)
	r.i += end + 1
	return s, err
}

// canonical is the canonical JSON of a link whose members were all there, in
// their own spelling; ok is false for any other, which cjson must encode as read.
func (c *classicLink) canonical() (out []byte, ok bool, err error) {
	if c.Type == "" || c.Name == "" || c.Materials == nil || c.Products == nil || c.ByProducts == nil || c.Environment == nil || c.Command == nil {
		return nil, false, nil
	}
	var b bytes.Buffer
	small := func(v any) {
		var raw []byte
		if err == nil {
			raw, err = cjson.EncodeCanonical(v)
		}
		b.Write(raw)
	}
	b.WriteString(`{"_type":`)
	canonicalText(&b, c.Type)
	b.WriteString(`,"byproducts":`)
	small(c.ByProducts)
	b.WriteString(`,"command":`)
	small(c.Command)
	b.WriteString(`,"environment":`)
	small(c.Environment)
	b.WriteString(`,"materials":`)
	c.Materials.canonical(&b)
	b.WriteString(`,"name":`)
	canonicalText(&b, c.Name)
	b.WriteString(`,"products":`)
	c.Products.canonical(&b)
	b.WriteByte('}')
	return b.Bytes(), true, err
}

func (s artifactSet) canonical(b *bytes.Buffer) {
	b.WriteByte('{')
	for i, name := range slices.Sorted(maps.Keys(s)) {
		if i > 0 {
			b.WriteByte(',')
		}
		canonicalText(b, name)
		b.WriteString(`:{`)
		for j, alg := range slices.Sorted(maps.Keys(s[name])) {
			if j > 0 {
				b.WriteByte(',')
			}
			canonicalText(b, alg)
			b.WriteByte(':')
			canonicalText(b, s[name][alg])
		}
		b.WriteByte('}')
	}
	b.WriteByte('}')
}

// canonicalText escapes what canonical JSON escapes and nothing else.
func canonicalText(b *bytes.Buffer, s string) {
	b.WriteByte('"')
	for i := range len(s) {
		if s[i] == '"' || s[i] == '\\' {
			b.WriteByte('\\')
		}
		b.WriteByte(s[i])
	}
	b.WriteByte('"')
}
