// Package boundcodec is gRPC's protobuf codec with a bound on what a message
// becomes in memory. gRPC bounds bytes only, and decodes before anybody asks who
// sent them: two bytes on the wire, an empty message in a list, are more than a
// hundred once decoded, so that 4 MiB become hundreds.
package boundcodec

import (
	"errors"
	"fmt"

	"google.golang.org/grpc/encoding"
	encproto "google.golang.org/grpc/encoding/proto"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// ErrTooMany means that a message has more fields than the codec lets through.
var ErrTooMany = errors.New("the message has too many fields")

const (
	messageCost = 4  // of a field that is a message; any other costs 1
	maxDepth    = 32 // of messages in messages
)

// New returns the codec. most bounds the fields of a message and of those within
// it, where one that is a message counts as four.
func New(most int) encoding.CodecV2 {
	return codec{encoding.GetCodecV2(encproto.Name), most}
}

type codec struct {
	encoding.CodecV2
	most int
}

// Unmarshal counts before anything is allocated for what is counted.
func (c codec) Unmarshal(data mem.BufferSlice, v any) error {
	m, ok := v.(proto.Message)
	if !ok {
		return fmt.Errorf("%T is no protobuf message", v)
	}
	buf := data.MaterializeToBuffer(mem.DefaultBufferPool())
	defer buf.Free()
	b := buf.ReadOnlyData()
	// Most are so short that there is nothing to count.
	if len(b) > c.most {
		left := c.most
		if err := count(b, m.ProtoReflect().Descriptor(), &left, maxDepth); err != nil {
			return err
		}
	}
	return proto.Unmarshal(b, m)
}

// count takes what the fields of b cost from left.
func count(b []byte, d protoreflect.MessageDescriptor, left *int, depth int) error {
	if depth == 0 {
		return errors.New("the message is nested too deep")
	}
	for len(b) > 0 {
		num, typ, n := protowire.ConsumeTag(b)
		if n < 0 {
			return protowire.ParseError(n)
		}
		value := b[n:]
		if n = protowire.ConsumeFieldValue(num, typ, value); n < 0 {
			return protowire.ParseError(n)
		}
		value, b = value[:n], value[n:]
		// What the type does not know is kept as the bytes it is.
		f := d.Fields().ByNumber(num)
		if f == nil {
			continue
		}
		inner := f.Message()
		cost := 1
		switch {
		case inner != nil:
			cost = messageCost
		case typ == protowire.BytesType && f.IsList() && f.Kind() != protoreflect.StringKind && f.Kind() != protoreflect.BytesKind:
			cost = max(1, len(value)) // packed numbers, a byte each at least
		}
		if *left -= cost; *left < 0 {
			return ErrTooMany
		}
		if inner == nil || typ != protowire.BytesType {
			continue
		}
		body, n := protowire.ConsumeBytes(value)
		if n < 0 {
			return protowire.ParseError(n)
		}
		if err := count(body, inner, left, depth-1); err != nil {
			return err
		}
	}
	return nil
}
