package link

import (
	"bytes"
	"encoding/json"

	"github.com/rootlink/rootlink/pkg/strictjson"
)

func scanJSON(b []byte, limit int) error {
	return strictjson.Scan(b, limit, "")
}

func decodeStrict(b []byte, limit int, open string, v any) error {
	return strictjson.Decode(b, limit, open, v)
}

// encode is compact JSON with sorted map keys and no HTML escaping.
func encode(v any) ([]byte, error) {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(v); err != nil {
		return nil, err
	}
	return bytes.TrimSuffix(b.Bytes(), []byte("\n")), nil
}
