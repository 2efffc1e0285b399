package tpm

import (
	"errors"
	"os"

	"github.com/rootlink/rootlink/internal/files"
	"github.com/rootlink/rootlink/pkg/attest"
)

// Where the kernel shows its logs.
const (
	DefaultEventLogPath = "/sys/kernel/security/tpm0/binary_bios_measurements"
	DefaultIMALogPath   = "/sys/kernel/security/ima/binary_runtime_measurements"
)

// ReadEventLog reads the boot event log. A host without one (a software TPM, a
// firmware that keeps none) yields nil.
func ReadEventLog(path string) ([]byte, error) { return readLog(path, attest.MaxEventLog) }

// ReadIMALog reads the kernel's IMA log, nil when there is none.
func ReadIMALog(path string) ([]byte, error) { return readLog(path, attest.MaxIMALog) }

func readLog(path string, limit int64) ([]byte, error) {
	b, err := files.Read(path, limit)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil || len(b) == 0 {
		return nil, err
	}
	return b, nil
}
