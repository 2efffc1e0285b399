package link

// DecodeStrict decodes one JSON document of at most limit bytes into v, for the
// packages that build on this one. Refused with ErrMalformed: unknown and
// duplicate keys (also those that differ by letter case alone), invalid UTF-8,
// data after the document, and nesting beyond MaxDepth. Unless open is empty,
// every key must be in lower case, except below the top-level key open.
func DecodeStrict(b []byte, limit int, open string, v any) error {
	return decodeStrict(b, limit, open, v)
}
