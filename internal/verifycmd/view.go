package verifycmd

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strings"

	"github.com/rootlink/rootlink/pkg/link"
)

// view is an ordered list of named values, printed as text or as a JSON object.
type view []field

type field struct {
	name  string // a JSON key
	value any    // view, []view, []string, or what JSON and fmt both print well
}

func (v *view) add(name string, value any) {
	if list, ok := value.([]string); ok && list == nil {
		value = []string{} // [] in JSON, not null
	}
	*v = append(*v, field{name, value})
}

// addIf leaves empty strings out.
func (v *view) addIf(name, value string) {
	if value != "" {
		v.add(name, value)
	}
}

// MarshalJSON keeps the order.
func (v view) MarshalJSON() ([]byte, error) {
	var b bytes.Buffer
	b.WriteByte('{')
	for i, f := range v {
		if i > 0 {
			b.WriteByte(',')
		}
		name, err := json.Marshal(f.name)
		if err != nil {
			return nil, err
		}
		value, err := json.Marshal(f.value)
		if err != nil {
			return nil, err
		}
		b.Write(name)
		b.WriteByte(':')
		b.Write(value)
	}
	b.WriteByte('}')
	return b.Bytes(), nil
}

func (v view) text(b *strings.Builder, indent string) {
	width := 0
	for _, f := range v {
		width = max(width, len(f.name))
	}
	for _, f := range v {
		name := strings.ReplaceAll(f.name, "_", " ")
		switch x := f.value.(type) {
		case view:
			fmt.Fprintf(b, "%s%s\n", indent, name)
			x.text(b, indent+"  ")
		case []view:
			fmt.Fprintf(b, "%s%s: %d\n", indent, name, len(x))
			for _, one := range x {
				fmt.Fprintf(b, "%s  -\n", indent)
				one.text(b, indent+"    ")
			}
		case []string:
			fmt.Fprintf(b, "%s%s: %d\n", indent, name, len(x))
			for _, s := range x {
				fmt.Fprintf(b, "%s  - %s\n", indent, link.Clean(s))
			}
		default:
			fmt.Fprintf(b, "%s%-*s  %s\n", indent, width, name, link.Clean(fmt.Sprint(x)))
		}
	}
}
