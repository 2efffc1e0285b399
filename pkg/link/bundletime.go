package link

import (
	"bytes"
	"slices"

	bundlev1 "github.com/sigstore/protobuf-specs/gen/pb-go/bundle/v1"
	commonv1 "github.com/sigstore/protobuf-specs/gen/pb-go/common/v1"
	rekorv1 "github.com/sigstore/protobuf-specs/gen/pb-go/rekor/v1"
	"google.golang.org/protobuf/proto"
)

// Signature returns the bytes of the DSSE signature: what a timestamp token is
// over, and what a log entry holds.
func (b *Bundle) Signature() []byte { return bytes.Clone(b.signature) }

// Timestamps returns the RFC 3161 tokens (DER of a TimeStampResp) as the bundle
// claims them.
func (b *Bundle) Timestamps() [][]byte {
	out := make([][]byte, len(b.tokens))
	for i, t := range b.tokens {
		out[i] = bytes.Clone(t)
	}
	return out
}

// LogEntries returns the log entries as the bundle claims them.
func (b *Bundle) LogEntries() []*rekorv1.TransparencyLogEntry {
	out := make([]*rekorv1.TransparencyLogEntry, len(b.entries))
	for i, e := range b.entries {
		out[i] = proto.Clone(e).(*rekorv1.TransparencyLogEntry)
	}
	return out
}

// WithTimestamps returns b with further RFC 3161 tokens (DER of a
// TimeStampResp). One that b has already is not added again.
func (b *Bundle) WithTimestamps(tokens ...[]byte) (*Bundle, error) {
	out := *b
	out.tokens = slices.Clip(b.tokens)
	for _, t := range tokens {
		if !slices.ContainsFunc(out.tokens, func(have []byte) bool { return bytes.Equal(have, t) }) {
			out.tokens = append(out.tokens, bytes.Clone(t))
		}
	}
	if err := checkTokens(out.tokens); err != nil {
		return nil, err
	}
	return &out, nil
}

// WithLogEntry returns b with a further log entry. One of the same index in the
// same log replaces it: it proves the same against a later checkpoint.
func (b *Bundle) WithLogEntry(e *rekorv1.TransparencyLogEntry) (*Bundle, error) {
	out := *b
	out.entries = nil
	for _, have := range b.entries {
		if have.GetLogIndex() != e.GetLogIndex() || !bytes.Equal(have.GetLogId().GetKeyId(), e.GetLogId().GetKeyId()) {
			out.entries = append(out.entries, have)
		}
	}
	out.entries = append(out.entries, proto.Clone(e).(*rekorv1.TransparencyLogEntry))
	if err := checkEntries(out.entries); err != nil {
		return nil, err
	}
	return &out, nil
}

// checkTokens bounds what the time checks will have to parse.
func checkTokens(tokens [][]byte) error {
	if len(tokens) > MaxTokens {
		return malformed("%d timestamp tokens, at most %d allowed", len(tokens), MaxTokens)
	}
	for _, t := range tokens {
		if len(t) == 0 || len(t) > MaxToken {
			return malformed("timestamp token of %d bytes, 1 to %d allowed", len(t), MaxToken)
		}
	}
	return nil
}

// checkEntries bounds what the log checks will have to parse.
func checkEntries(entries []*rekorv1.TransparencyLogEntry) error {
	if len(entries) > MaxLogEntries {
		return malformed("%d log entries, at most %d allowed", len(entries), MaxLogEntries)
	}
	for _, e := range entries {
		if e == nil {
			return malformed("empty log entry")
		}
		if n := proto.Size(e); n == 0 || n > MaxLogEntry {
			return malformed("log entry of %d bytes, 1 to %d allowed", n, MaxLogEntry)
		}
	}
	return nil
}

// timestampData is the tokens in Sigstore's form; nil without any, since a
// bundle without time must stay as it always was.
func timestampData(tokens [][]byte) *bundlev1.TimestampVerificationData {
	if len(tokens) == 0 {
		return nil
	}
	d := &bundlev1.TimestampVerificationData{}
	for _, t := range tokens {
		d.Rfc3161Timestamps = append(d.Rfc3161Timestamps, &commonv1.RFC3161SignedTimestamp{SignedTimestamp: t})
	}
	return d
}
