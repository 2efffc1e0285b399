package tpm

import (
	"encoding/asn1"
	"errors"
	"fmt"

	"github.com/google/go-tpm/tpm2"

	"github.com/rootlink/rootlink/pkg/attest"
)

const (
	// maxNV bounds one index. Chains are the largest thing read from NV.
	maxNV = attest.MaxChain * attest.MaxCertificate
	// minNVBuffer is what every TPM can read at once.
	minNVBuffer = 512
	maxNVBuffer = 2048
)

// errNoIndex means that an NV index is not defined or was never written.
var errNoIndex = errors.New("NV index is not defined")

// nvRead reads a whole NV index, at most limit bytes of it.
func (s *state) nvRead(index tpm2.TPMHandle, limit int) ([]byte, error) {
	pub, err := tpm2.NVReadPublic{NVIndex: index}.Execute(s.conn)
	if errors.Is(err, tpm2.TPMRCHandle) {
		return nil, errNoIndex
	}
	if err != nil {
		return nil, typed(fmt.Sprintf("NV index %#x", uint32(index)), err)
	}
	nv, err := pub.NVPublic.Contents()
	if err != nil {
		return nil, fmt.Errorf("NV index %#x: %w", uint32(index), err)
	}
	if !nv.Attributes.Written {
		return nil, errNoIndex
	}
	size := int(nv.DataSize)
	if size > limit {
		return nil, fmt.Errorf("NV index %#x: %w: %d bytes of at most %d", uint32(index), ErrTooLarge, size, limit)
	}
	auth := tpm2.AuthHandle{Handle: index, Name: pub.NVName, Auth: tpm2.PasswordAuth(nil)}
	if !nv.Attributes.AuthRead {
		if !nv.Attributes.OwnerRead {
			return nil, fmt.Errorf("NV index %#x can be read by neither its own nor the owner's authorization", uint32(index))
		}
		auth = tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)}
	}
	step := s.nvBuffer()
	out := make([]byte, 0, size)
	for len(out) < size {
		rsp, err := tpm2.NVRead{
			AuthHandle: auth,
			NVIndex:    tpm2.NamedHandle{Handle: index, Name: pub.NVName},
			Size:       uint16(min(step, size-len(out))),
			Offset:     uint16(len(out)),
		}.Execute(s.conn)
		if err != nil {
			return nil, typed(fmt.Sprintf("NV index %#x", uint32(index)), err)
		}
		if n := len(rsp.Data.Buffer); n == 0 || n > size-len(out) {
			return nil, fmt.Errorf("NV index %#x: TPM returned %d bytes at offset %d of %d", uint32(index), n, len(out), size)
		}
		out = append(out, rsp.Data.Buffer...)
	}
	return out, nil
}

// nvBuffer is how much one NVRead may ask for.
func (s *state) nvBuffer() int {
	p, err := s.properties()
	if err != nil || p.nvBuffer < minNVBuffer {
		return minNVBuffer
	}
	return min(int(p.nvBuffer), maxNVBuffer)
}

// firstDER cuts the first DER element off b. Certificates in NV are padded to
// the size of their index.
func firstDER(b []byte) (der, rest []byte, err error) {
	var raw asn1.RawValue
	if rest, err = asn1.Unmarshal(b, &raw); err != nil {
		return nil, nil, err
	}
	if raw.Class != asn1.ClassUniversal || raw.Tag != asn1.TagSequence || !raw.IsCompound {
		return nil, nil, errors.New("not a DER sequence")
	}
	return raw.FullBytes, rest, nil
}
