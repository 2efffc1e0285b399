package vouch

import (
	"crypto/sha256"
	"crypto/sha512"
	"crypto/subtle"

	"github.com/rootlink/rootlink/internal/files"
	"github.com/rootlink/rootlink/pkg/attest"
)

// maxLogs is how many bytes of logs go into one reply; gRPC clients take
// 4 MiB by default. Logs are a convenience: verifiers find them by digest.
const maxLogs = 3 << 20

// Logs returns the logs that a record names by digest, where they are at hand.
type Logs func(*attest.Evidence) (eventLog, imaLog []byte)

// LogFiles returns the logs as they are in the files. A log that has grown since
// has another digest and is left out.
func LogFiles(eventLog, imaLog string) Logs {
	return func(e *attest.Evidence) (ev, ima []byte) {
		ev = readLog(eventLog, e.EventLog, maxLogs)
		ima = readLog(imaLog, e.IMALog, maxLogs-int64(len(ev)))
		return ev, ima
	}
}

func readLog(path string, want *attest.TypedDigest, limit int64) []byte {
	if path == "" || want == nil {
		return nil
	}
	b, err := files.Read(path, limit)
	if err != nil {
		return nil
	}
	var got []byte
	switch want.Alg {
	case "sha256":
		h := sha256.Sum256(b)
		got = h[:]
	case "sha384":
		h := sha512.Sum384(b)
		got = h[:]
	default:
		return nil
	}
	if subtle.ConstantTimeCompare(got, want.Value) != 1 {
		return nil
	}
	return b
}
