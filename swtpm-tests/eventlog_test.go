package stories

import (
	"crypto/sha256"
	"encoding/binary"
	"os"
	"strconv"

	"github.com/rogpeppe/go-internal/testscript"
)

// eventlog FILE [PCR TEXT]…: writes the boot event log of a firmware that
// measured these texts, as `tpm extend` does (TCG PC Client Platform Firmware
// Profile §10, with the SHA-256 bank alone).
func cmdEventLog(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args)%2 != 1 {
		ts.Fatalf("usage: eventlog FILE [PCR TEXT]…")
	}
	const (
		evNoAction = 3
		evIPL      = 0x0d
		algSHA256  = 0x000b
	)
	le := binary.LittleEndian
	spec := append([]byte("Spec ID Event03\x00"), 0, 0, 0, 0, 0 /* minor */, 2 /* major */, 0 /* errata */, 2 /* 64-bit */)
	spec = le.AppendUint32(spec, 1) // algorithms
	spec = le.AppendUint16(spec, algSHA256)
	spec = le.AppendUint16(spec, sha256.Size)
	spec = append(spec, 0) // no vendor info

	log := le.AppendUint32(nil, 0)
	log = le.AppendUint32(log, evNoAction)
	log = append(log, make([]byte, 20)...) // SHA-1 of nothing
	log = le.AppendUint32(log, uint32(len(spec)))
	log = append(log, spec...)
	for rest := args[1:]; len(rest) > 0; rest = rest[2:] {
		pcr, err := strconv.ParseUint(rest[0], 10, 32)
		ts.Check(err)
		digest := sha256.Sum256([]byte(rest[1]))
		log = le.AppendUint32(log, uint32(pcr))
		log = le.AppendUint32(log, evIPL)
		log = le.AppendUint32(log, 1) // digests
		log = le.AppendUint16(log, algSHA256)
		log = append(log, digest[:]...)
		log = le.AppendUint32(log, uint32(len(rest[1])))
		log = append(log, rest[1]...)
	}
	ts.Check(os.WriteFile(ts.MkAbs(args[0]), log, 0o600))
}
