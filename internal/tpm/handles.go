package tpm

import (
	"errors"

	"github.com/google/go-tpm/tpm2"
)

// First handle of each type (TPM 2.0 Part 2, 7.2).
const (
	firstLoadedSession tpm2.TPMHandle = 0x02000000
	firstSavedSession  tpm2.TPMHandle = 0x03000000
	firstTransient     tpm2.TPMHandle = 0x80000000
)

// handles lists the TPM's handles from first on, at most limit of them.
func (s *state) handles(first tpm2.TPMHandle, limit int) ([]tpm2.TPMHandle, error) {
	var all []tpm2.TPMHandle
	next := first
	for len(all) < limit {
		rsp, err := tpm2.GetCapability{
			Capability:    tpm2.TPMCapHandles,
			Property:      uint32(next),
			PropertyCount: uint32(limit - len(all)),
		}.Execute(s.conn)
		if err != nil {
			return nil, err
		}
		list, err := rsp.CapabilityData.Data.Handles()
		if err != nil {
			return nil, err
		}
		all = append(all, list.Handle...)
		// Lists of sessions mix handles of type 0x02 and 0x03, and are short.
		if !rsp.MoreData || len(list.Handle) == 0 || all[len(all)-1] < next {
			break
		}
		next = all[len(all)-1] + 1
	}
	return all[:min(len(all), limit)], nil
}

// flushLeftovers empties the TPM of objects and sessions that nobody owns.
func (s *state) flushLeftovers() error {
	n := 0
	for _, first := range []tpm2.TPMHandle{firstTransient, firstLoadedSession, firstSavedSession} {
		list, err := s.handles(first, 256)
		if err != nil {
			return err
		}
		for _, h := range list {
			if _, err := (tpm2.FlushContext{FlushHandle: h}).Execute(s.conn); err != nil {
				if isConnError(err) {
					return err
				}
				s.d.log.Warn("cannot flush a handle left in the TPM", "handle", uint32(h), "error", err)
				continue
			}
			n++
		}
	}
	if n > 0 {
		s.d.log.Info("flushed handles that another TPM client left behind", "count", n)
	}
	return nil
}

// flush unloads h. A failure is not the operation's: at worst the slot is taken
// until the next connection finds it.
func (s *state) flush(h tpm2.TPMHandle) {
	if h == 0 {
		return
	}
	_, err := tpm2.FlushContext{FlushHandle: h}.Execute(s.conn)
	switch {
	case err == nil:
	case isConnError(err): // nothing more can be done on it, and perform drops it
	case errors.Is(err, tpm2.TPMRCHandle), errors.Is(err, tpm2.TPMRCReferenceH0):
		// Gone already: the TPM was reset.
	default:
		s.d.log.Warn("cannot flush a TPM handle", "handle", uint32(h), "error", err)
		s.fresh = true
	}
}
