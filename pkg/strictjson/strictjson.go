// Package strictjson refuses JSON that two parsers could read differently.
package strictjson

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
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
	w := walker{open: strings.Fields(open), mixed: open == ""}
	return w.walk(b)
}

// walker goes through a document once: its grammar, its depth and its keys.
type walker struct {
	open  []string
	mixed bool // keys of the next container may have any case
	stack []frame
	keys  [][]byte // of all objects that are open, folded; each frame's from its start on
}

type frame struct {
	object bool
	mixed  bool // keys may have any case
	start  int
	many   map[string]bool // once they are more than few
}

// few keys are faster compared one by one.
const few = 8

// key takes one key with its quotes.
func (w *walker) key(quoted []byte) error {
	n := len(w.stack)
	top := &w.stack[n-1]
	folded, same := quoted[1:len(quoted)-1], true
	if !plain(folded) {
		var t string
		if err := json.Unmarshal(quoted, &t); err != nil {
			return malformed("JSON: %w", err)
		}
		k := strings.ToLower(strings.ToUpper(t))
		folded, same = []byte(k), k == t
		if !top.mixed && !same {
			return malformed("key %q is not in lower case", t)
		}
	}
	w.mixed = top.mixed || n == 1 && same && slices.Contains(w.open, string(folded))
	mine := w.keys[top.start:]
	duplicate := top.many[string(folded)]
	if top.many == nil {
		duplicate = slices.ContainsFunc(mine, func(k []byte) bool { return bytes.Equal(k, folded) })
	}
	if duplicate {
		return malformed("duplicate key %q", folded)
	}
	if top.many == nil && len(mine) < few {
		w.keys = append(w.keys, folded)
		return nil
	}
	if top.many == nil {
		top.many = make(map[string]bool)
		for _, k := range mine {
			top.many[string(k)] = true
		}
	}
	top.many[string(folded)] = true
	return nil
}

// plain: what is between the quotes is the key itself, and folded already.
func plain(key []byte) bool {
	for _, c := range key {
		if c >= 0x80 || c == '\\' || 'A' <= c && c <= 'Z' {
			return false
		}
	}
	return true
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
