// Package strictjson refuses JSON that two parsers could read differently.
package strictjson

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"unicode/utf8"
)

// MaxDepth is the deepest nesting that is read.
const MaxDepth = 24

// ErrMalformed: JSON that is none, or that two parsers could read differently.
var ErrMalformed = errors.New("malformed")

func malformed(format string, args ...any) error {
	return fmt.Errorf("%w: %w", ErrMalformed, fmt.Errorf(format, args...))
}

// Scan walks one JSON document of at most limit bytes without building it. It
// refuses duplicate keys (also by letter case, since encoding/json matches
// names so), invalid UTF-8, trailing data, and nesting that would exhaust a
// recursive decoder. Unless open is empty it also wants every key in lower
// case, except below the top-level keys that open names (separated by spaces),
// since encoding/json would take "Serial" for "serial" and other parsers would
// not.
func Scan(b []byte, limit int, open string) error {
	if len(b) > limit {
		return malformed("%d bytes, at most %d allowed", len(b), limit)
	}
	if !utf8.Valid(b) {
		return malformed("invalid UTF-8")
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.UseNumber()
	type frame struct {
		keys  map[string]bool // nil in an array
		isKey bool            // the next string is a key
		mixed bool            // keys may have any case
	}
	var stack []frame
	mixed := open == "" // of the next container
	value := func() {   // a value just ended
		if n := len(stack); n > 0 && stack[n-1].keys != nil {
			stack[n-1].isKey = true
		}
	}
	for {
		tok, err := d.Token()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return malformed("JSON: %w", err)
		}
		switch t := tok.(type) {
		case json.Delim:
			switch t {
			case '{', '[':
				if len(stack) == MaxDepth {
					return malformed("JSON nested deeper than %d", MaxDepth)
				}
				f := frame{mixed: mixed}
				if t == '{' {
					f.keys, f.isKey = map[string]bool{}, true
				}
				stack = append(stack, f)
			default:
				stack = stack[:len(stack)-1]
				value()
			}
		case string:
			if n := len(stack); n > 0 && stack[n-1].isKey {
				k := strings.ToLower(strings.ToUpper(t))
				if !stack[n-1].mixed && k != t {
					return malformed("key %q is not in lower case", t)
				}
				mixed = stack[n-1].mixed || n == 1 && slices.Contains(strings.Fields(open), t)
				if stack[n-1].keys[k] {
					return malformed("duplicate key %q", t)
				}
				stack[n-1].keys[k] = true
				stack[n-1].isKey = false
				continue
			}
			value()
		default:
			value()
		}
		if len(stack) == 0 {
			if _, err := d.Token(); !errors.Is(err, io.EOF) {
				return malformed("data after the JSON value")
			}
			return nil
		}
	}
	return malformed("JSON ends early")
}

// Decode scans b and decodes it into v. Unknown keys are errors.
func Decode(b []byte, limit int, open string, v any) error {
	if err := Scan(b, limit, open); err != nil {
		return err
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return malformed("%w", err)
	}
	return nil
}
