package main

import (
	"bytes"
	"context"
	"encoding/hex"
	"path/filepath"
	"strconv"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/rootlink/rootlink/internal/store"
	"github.com/rootlink/rootlink/pkg/attest"
)

// cmdSeed puts an attested agent into the database of a server that does not
// run: seed BYTE, where the EK hash is 32 times BYTE (in hex) and PCR i of the
// SHA-256 bank is 32 times BYTE+i. A real node attests in the swtpm stories.
func cmdSeed(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: seed BYTE")
	}
	n, err := strconv.ParseUint(args[0], 16, 8)
	ts.Check(err)
	st, err := store.Open(context.Background(), filepath.Join(ts.Getenv("D"), "server.db"), nil)
	ts.Check(err)
	defer st.Close()
	ek := [32]byte(bytes.Repeat([]byte{byte(n)}, 32))
	values := map[uint32][]byte{}
	for i := range uint32(16) {
		values[i] = bytes.Repeat([]byte{byte(n) + byte(i)}, 32)
	}
	_, err = st.PutAttestedAgent(context.Background(), store.Agent{
		ID:              "spiffe://example.org/spire/agent/tpmnode/" + hex.EncodeToString(ek[:]),
		AttestationType: "tpmnode", Serial: "1", ExpiresAt: time.Now().Add(time.Hour), CanReattest: true, KeyBound: true,
		Selectors: []store.Selector{{Type: "tpmnode", Value: "ek:" + hex.EncodeToString(ek[:])}},
		Attestation: &store.Attestation{
			At: time.Now(), EKHash: ek, EKBasis: "allow_list", AKName: []byte{0, 11, 1}, Manufacturer: "IBM", Firmware: "1.2", Software: true,
			PCRs: []attest.PCRBank{{Bank: "sha256", Values: values}},
		},
	}, "seeded")
	ts.Check(err)
}
