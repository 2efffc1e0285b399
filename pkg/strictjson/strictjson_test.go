package strictjson

import (
	"errors"
	"strings"
	"testing"
)

func TestScanRefuses(t *testing.T) {
	for name, bad := range map[string]string{
		"empty":                  ``,
		"unclosed object":        `{"a":1`,
		"unclosed string":        `{"a":"`,
		"missing comma":          `{"a":1 "b":2}`,
		"trailing data":          `{} x`,
		"second value":           `{}{}`,
		"duplicate key":          `{"a":1,"a":1}`,
		"duplicate key, nested":  `[{"b":{"a":1,"a":1}}]`,
		"duplicate key, by case": `{"a":1,"A":1}`,
		"duplicate by escape":    `{"a":1,"\u0061":1}`,
		"duplicate by folding":   `{"k":1,"` + "\u212a" + `":1}`,
		"too deep":               strings.Repeat("[", MaxDepth+1) + strings.Repeat("]", MaxDepth+1),
		"invalid UTF-8":          "{\"a\":\"\xff\"}",
	} {
		t.Run(name, func(t *testing.T) {
			if err := Scan([]byte(bad), 1<<20, ""); !errors.Is(err, ErrMalformed) {
				t.Errorf("err = %v, want ErrMalformed", err)
			}
		})
	}
	if err := Scan([]byte(`{"a":1}`), 3, ""); !errors.Is(err, ErrMalformed) {
		t.Error("over the limit, and accepted")
	}
}

func TestScanAccepts(t *testing.T) {
	for _, good := range []string{
		`{}`, `[]`, `"x"`, `1`, `null`, ` {"a":{"a":{"a":["a","a"]}},"b":[{"a":1},{"a":1}]} ` + "\n",
		strings.Repeat("[", MaxDepth) + strings.Repeat("]", MaxDepth),
	} {
		if err := Scan([]byte(good), 1<<20, ""); err != nil {
			t.Errorf("%s: %v", good, err)
		}
	}
}

func TestDecodeRefusesKeysOfAnotherCase(t *testing.T) {
	var v struct {
		Serial int            `json:"serial"`
		Open   map[string]any `json:"open"`
		List   []struct {
			Name string `json:"name"`
		} `json:"list"`
	}
	for _, c := range []struct {
		in string
		ok bool
	}{
		{`{"serial":1}`, true},
		{`{"Serial":1}`, false},
		{`{"open":{"Any":{"Case":[{"Here":1}]}},"serial":1}`, true},
		{`{"open":{"Any":1},"Serial":1}`, false},
		{`{"list":[{"name":"A"},{"name":"B"}]}`, true},
		{`{"list":[{"name":"A"},{"Name":"B"}]}`, false},
		{`{"list":[{"open":{"A":1}}]}`, false},
		{`{"unknown":1}`, false},
	} {
		if err := Decode([]byte(c.in), 1<<20, "open", &v); (err == nil) != c.ok {
			t.Errorf("%s: %v", c.in, err)
		}
	}
}
