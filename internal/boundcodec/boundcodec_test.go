package boundcodec

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/proto"

	tpmv1 "github.com/rootlink/rootlink/proto/rootlink/tpm/v1"
)

const most = 1 << 12

func decode(b []byte, m proto.Message) error {
	return New(most).Unmarshal(mem.BufferSlice{mem.SliceBuffer(b)}, m)
}

// Two bytes of each become more than a hundred.
func TestRefusesMessagesThatGrow(t *testing.T) {
	nested, err := proto.Marshal(&entryv1.BatchCreateEntryRequest{Entries: []*types.Entry{{Selectors: make([]*types.Selector, most)}}})
	if err != nil {
		t.Fatal(err)
	}
	packed, err := proto.Marshal(&tpmv1.PCRSelection{Indices: make([]uint32, most+1)})
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		b []byte
		m proto.Message
	}{
		"empty messages":        {bytes.Repeat([]byte{0x0a, 0}, most), new(svidv1.BatchNewX509SVIDRequest)},
		"empty strings":         {bytes.Repeat([]byte{0x12, 0}, most+1), new(entryv1.SyncAuthorizedEntriesRequest)},
		"messages in a message": {nested, new(entryv1.BatchCreateEntryRequest)},
		"one field set again":   {bytes.Repeat([]byte{0x0a, 0}, most), new(agentv1.AttestAgentRequest)},
		"packed numbers":        {packed, new(tpmv1.PCRSelection)},
	} {
		if err := decode(c.b, c.m); !errors.Is(err, ErrTooMany) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestDecodesWhatIsMeant(t *testing.T) {
	want := &entryv1.BatchCreateEntryRequest{Entries: []*types.Entry{{
		Id: strings.Repeat("x", 4*most), SpiffeId: &types.SPIFFEID{TrustDomain: "example.org", Path: "/x"},
		Selectors: []*types.Selector{{Type: "unix", Value: "uid:0"}}, X509SvidTtl: 60,
	}}}
	b, err := proto.Marshal(want)
	if err != nil {
		t.Fatal(err)
	}
	// Fields that the type does not know stay with it, whatever their number.
	unknown := bytes.Repeat([]byte{0xf8, 0x07, 1}, 2*most)
	got := new(entryv1.BatchCreateEntryRequest)
	if err := decode(append(b, unknown...), got); err != nil {
		t.Fatal(err)
	}
	got.ProtoReflect().SetUnknown(nil)
	if !proto.Equal(got, want) {
		t.Fatalf("got %v", got)
	}
	for _, n := range []int{1, 2, len(b) - 1} {
		if err := decode(b[:n], got); err == nil {
			t.Errorf("the first %d bytes were taken", n)
		}
	}
}
