package oci

import (
	"errors"
	"io"
	"strings"
	"sync/atomic"
	"testing"
)

// A registry that never stops sending, over many answers of which none is too
// long.
func TestRefusesMoreThanOneOperationMayReceive(t *testing.T) {
	var total atomic.Int64
	read := func(n int) error {
		_, err := io.Copy(io.Discard, &metered{io.NopCloser(strings.NewReader(strings.Repeat("x", n))), &total})
		return err
	}
	total.Store(maxReceived - 1000)
	if err := read(1000); err != nil {
		t.Error(err)
	}
	if err := read(1); !errors.Is(err, ErrTooLarge) {
		t.Error(err)
	}
}
