package link

import (
	"encoding/json"
	"strings"
)

// splitResources takes the two lists that make statements large out of one, so
// that encoding/json, which is slow for a byte and needs several bytes of memory
// for it, decodes only what is left. b has been scanned. A list with anything in
// it but names and digests stays where it is. What is decoded here is what
// encoding/json would have made of it, which a test compares.
func splitResources(b []byte) (rest []byte, subjects, materials *[]Resource, err error) {
	c := cursor{s: string(b)} // names and digests are parts of this one string
	done := 0                 // with so much of it
	take := func() *[]Resource {
		start := c.i
		n := 0
		c.list('[', ']', func() { c.skip(); n++ })
		if n > MaxMaterials {
			err = malformed("a list of %d artifacts, at most %d allowed", n, MaxMaterials)
		}
		end := c.i
		if c.bad || err != nil {
			c = cursor{s: c.s, i: start}
			c.skip() // null, or what the decoder will refuse
			return nil
		}
		c.i = start
		list := make([]Resource, 0, n)
		if !c.resources(&list) {
			c = cursor{s: c.s, i: end}
			return nil
		}
		rest = append(append(rest, c.s[done:start]...), "null"...)
		done = c.i
		return &list
	}
	c.object(func(key string) {
		switch {
		case means(key, "subject"):
			subjects = take()
		case means(key, "predicate") && c.peek() == '{':
			c.object(func(key string) {
				if means(key, "materials") {
					materials = take()
				} else {
					c.skip()
				}
			})
		default:
			c.skip()
		}
	})
	if c.bad || done == 0 {
		return b, nil, nil, err
	}
	return append(rest, c.s[done:]...), subjects, materials, err
}

// means says whether encoding/json takes a key, with its quotes, for name.
func means(quoted, name string) bool {
	c := cursor{s: quoted}
	return strings.EqualFold(c.text(), name)
}

// cursor reads JSON that is known to be valid. Where it meets what it does not
// read it goes bad, and stays so.
type cursor struct {
	s   string
	i   int
	bad bool
}

// peek skips white space and returns the next byte, 0 at the end.
func (c *cursor) peek() byte {
	for ; c.i < len(c.s); c.i++ {
		switch c.s[c.i] {
		case ' ', '\n', '\t', '\r':
		default:
			return c.s[c.i]
		}
	}
	return 0
}

func (c *cursor) eat(b byte) bool {
	if c.bad || c.peek() != b {
		return false
	}
	c.i++
	return true
}

func (c *cursor) want(b byte) {
	if !c.eat(b) {
		c.bad = true
	}
}

// list reads what is between two brackets, and calls each at every entry.
func (c *cursor) list(open, end byte, each func()) {
	c.want(open)
	if c.eat(end) {
		return
	}
	for !c.bad {
		if each(); c.eat(end) {
			return
		}
		c.want(',')
	}
}

// object calls member at every value; key has its quotes.
func (c *cursor) object(member func(key string)) {
	c.list('{', '}', func() {
		key := c.quoted()
		c.want(':')
		if !c.bad {
			member(key)
		}
	})
}

// quoted reads a string as it is written.
func (c *cursor) quoted() string {
	if c.want('"'); c.bad {
		return ""
	}
	for start := c.i - 1; ; {
		n := strings.IndexByte(c.s[c.i:], '"')
		if n < 0 {
			c.bad = true
			return ""
		}
		part := c.s[c.i : c.i+n]
		c.i += n + 1
		if slashes := len(part) - len(strings.TrimRight(part, `\`)); slashes%2 == 0 {
			return c.s[start:c.i]
		}
	}
}

// text reads a string as it is meant.
func (c *cursor) text() (out string) {
	q := c.quoted()
	switch {
	case c.bad:
	case strings.IndexByte(q, '\\') < 0:
		return q[1 : len(q)-1]
	case json.Unmarshal([]byte(q), &out) != nil:
		c.bad = true
	}
	return out
}

// skip reads any value.
func (c *cursor) skip() {
	for depth := 0; !c.bad; {
		switch c.peek() {
		case '"':
			c.quoted()
		case '{', '[':
			depth++
			c.i++
		case '}', ']':
			depth--
			c.i++
		case 0:
			c.bad = true
		case ',', ':':
			c.i++
		default: // a number or a word
			for c.i < len(c.s) && !strings.ContainsRune(" \n\t\r,:]}", rune(c.s[c.i])) {
				c.i++
			}
		}
		if depth == 0 {
			return
		}
	}
}

// resources reads a list of objects that hold a name and digests alone.
func (c *cursor) resources(out *[]Resource) bool {
	c.list('[', ']', func() {
		var r Resource
		c.object(func(key string) {
			switch key {
			case `"name"`:
				r.Name = c.text()
			case `"digest"`:
				r.Digest = make(map[string]string, 1)
				c.object(func(key string) {
					if alg := key[1 : len(key)-1]; strings.IndexByte(alg, '\\') < 0 {
						r.Digest[alg] = c.text()
					} else {
						c.bad = true
					}
				})
			default:
				c.bad = true
			}
		})
		*out = append(*out, r)
	})
	return !c.bad
}

// decodeStatement is decodeStrict for statements.
func decodeStatement(b []byte, w *wireStatement) error {
	if err := scanJSON(b, MaxStatement); err != nil {
		return err
	}
	rest, subjects, materials, err := splitResources(b)
	if err != nil {
		return err
	}
	if err := decodeStrict(rest, MaxStatement, "", w); err != nil {
		return err
	}
	if subjects != nil {
		w.Subject = *subjects
	}
	if materials != nil {
		w.Predicate.Materials = *materials
	}
	return nil
}
