package strictjson

import (
	"cmp"
	"encoding/binary"
	"encoding/json"
	"errors"
)

// walk goes through one document of RFC 8259, without recursion. What it takes
// for JSON is what encoding/json does, which a test compares; to look at keys on
// the way is what encoding/json has no means for, and looking at large
// statements twice is most of what reading them costs.
func (w *walker) walk(b []byte) (err error) {
	i := space(b, 0)
	for {
		// A value begins at i.
		ok := true
		switch c := at(b, i); {
		case c == '{' || c == '[':
			if len(w.stack) == MaxDepth {
				return malformed("JSON nested deeper than %d", MaxDepth)
			}
			w.stack = append(w.stack, frame{object: c == '{', mixed: w.mixed, start: len(w.keys)})
			i = space(b, i+1)
			if at(b, i) == c+2 {
				break // empty: '{' and '}', '[' and ']' are two apart
			}
			if c == '{' {
				if i, err = w.member(b, i); err != nil {
					return err
				}
			}
			continue
		case c == '"':
			i, ok = text(b, i)
		case c == '-' || digit(c):
			i, ok = number(b, i)
		default:
			i, ok = word(b, i)
		}
		if !ok {
			return syntax(b)
		}
		// What may follow are the ends of containers, and then a comma.
		i = space(b, i)
		for n := len(w.stack); n > 0 && at(b, i) == w.stack[n-1].end(); n-- {
			w.keys, w.stack = w.keys[:w.stack[n-1].start], w.stack[:n-1]
			i = space(b, i+1)
		}
		switch n := len(w.stack); {
		case n == 0 && i == len(b):
			return nil
		case n == 0 || at(b, i) != ',':
			return syntax(b)
		}
		i = space(b, i+1)
		if w.stack[len(w.stack)-1].object {
			if i, err = w.member(b, i); err != nil {
				return err
			}
		}
	}
}

func (f *frame) end() byte {
	if f.object {
		return '}'
	}
	return ']'
}

// member takes a key and its colon, and returns where the value begins.
func (w *walker) member(b []byte, i int) (int, error) {
	if at(b, i) != '"' {
		return 0, syntax(b)
	}
	end, ok := text(b, i)
	if !ok {
		return 0, syntax(b)
	}
	if err := w.key(b[i:end]); err != nil {
		return 0, err
	}
	if end = space(b, end); at(b, end) != ':' {
		return 0, syntax(b)
	}
	return space(b, end+1), nil
}

var errGrammar = errors.New("not a JSON document")

// syntax has encoding/json say what is wrong, and where.
func syntax(b []byte) error {
	var v json.RawMessage
	return malformed("JSON: %w", cmp.Or(json.Unmarshal(b, &v), errGrammar))
}

// at is the byte at i, and 0, which is none of JSON's, behind the end.
func at(b []byte, i int) byte {
	if i < len(b) {
		return b[i]
	}
	return 0
}

func digit(c byte) bool { return '0' <= c && c <= '9' }

func space(b []byte, i int) int {
	for i < len(b) && (b[i] == ' ' || b[i] == '\n' || b[i] == '\t' || b[i] == '\r') {
		i++
	}
	return i
}

// text takes the string whose opening quote is at i.
func text(b []byte, i int) (end int, ok bool) {
	for i++; i < len(b); i++ {
		i = ordinary(b, i)
		switch c := at(b, i); {
		case c == '"':
			return i + 1, true
		case c == '\\':
			i++
			switch at(b, i) {
			case '"', '\\', '/', 'b', 'f', 'n', 'r', 't':
			case 'u':
				for range 4 {
					i++
					if c := at(b, i) | 0x20; !digit(at(b, i)) && (c < 'a' || c > 'f') {
						return i, false
					}
				}
			default:
				return i, false
			}
		case c < ' ': // control characters, and the end
			return i, false
		}
	}
	return i, false
}

// ordinary skips eight bytes at a time while none of them is a quote, a
// backslash or a control character: a payload in base64 is one long string.
// It may stop early.
func ordinary(b []byte, i int) int {
	const ones, highs = 0x0101010101010101, 0x8080808080808080
	for len(b)-i >= 8 {
		x := binary.LittleEndian.Uint64(b[i:])
		quote, slash := x^ones*'"', x^ones*'\\'
		if ((x-ones*' ')&^x|(quote-ones)&^quote|(slash-ones)&^slash)&highs != 0 {
			break
		}
		i += 8
	}
	return i
}

func digits(b []byte, i int) (end int, ok bool) {
	for end = i; end < len(b) && digit(b[end]); end++ {
	}
	return end, end > i
}

func number(b []byte, i int) (end int, ok bool) {
	if b[i] == '-' {
		i++
	}
	if at(b, i) == '0' {
		i, ok = i+1, true
	} else {
		i, ok = digits(b, i)
	}
	if ok && at(b, i) == '.' {
		i, ok = digits(b, i+1)
	}
	if ok && at(b, i)|0x20 == 'e' {
		if i++; at(b, i) == '+' || at(b, i) == '-' {
			i++
		}
		i, ok = digits(b, i)
	}
	return i, ok
}

func word(b []byte, i int) (end int, ok bool) {
	for _, w := range []string{"true", "false", "null"} {
		if end = i + len(w); end <= len(b) && string(b[i:end]) == w {
			return end, true
		}
	}
	return i, false
}
