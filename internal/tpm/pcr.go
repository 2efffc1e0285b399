package tpm

import (
	"context"
	"fmt"
	"slices"

	"github.com/google/go-tpm/tpm2"

	"github.com/rootlink/rootlink/pkg/attest"
)

var bankAlgs = []struct {
	name string
	alg  tpm2.TPMIAlgHash
}{
	{"sha1", tpm2.TPMAlgSHA1}, {"sha256", tpm2.TPMAlgSHA256}, {"sha384", tpm2.TPMAlgSHA384}, {"sha512", tpm2.TPMAlgSHA512},
}

func bankAlg(name string) (tpm2.TPMIAlgHash, error) {
	for _, b := range bankAlgs {
		if b.name == name {
			return b.alg, nil
		}
	}
	return 0, fmt.Errorf("%w: unknown bank %q", ErrBankDisabled, name)
}

// normalize is attest.NormalizePCRs with this package's error.
func normalize(sel []attest.PCRSelection) ([]attest.PCRSelection, error) {
	sel, err := attest.NormalizePCRs(sel)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrBankDisabled, err)
	}
	return sel, nil
}

func toTPM(sel []attest.PCRSelection) (tpm2.TPMLPCRSelection, error) {
	var out tpm2.TPMLPCRSelection
	for _, s := range sel {
		alg, err := bankAlg(s.Bank)
		if err != nil {
			return out, err
		}
		idx := make([]uint, len(s.Indices))
		for i, n := range s.Indices {
			idx[i] = uint(n)
		}
		out.PCRSelections = append(out.PCRSelections, tpm2.TPMSPCRSelection{
			Hash: alg, PCRSelect: tpm2.PCClientCompatible.PCRs(idx...),
		})
	}
	return out, nil
}

// sameSelection compares what the TPM selected with what was asked: a disabled
// bank comes back empty instead of as an error.
func sameSelection(got tpm2.TPMLPCRSelection, want []attest.PCRSelection) error {
	have := map[tpm2.TPMIAlgHash]uint32{}
	for _, s := range got.PCRSelections {
		have[s.Hash] |= bits(s.PCRSelect)
	}
	for _, s := range want {
		alg, err := bankAlg(s.Bank)
		if err != nil {
			return err
		}
		var need uint32
		for _, i := range s.Indices {
			need |= 1 << i
		}
		if have[alg] != need {
			return fmt.Errorf("%w: %s: asked for PCRs %06x, the TPM selects %06x (little-endian bit sets)", ErrBankDisabled, s.Bank, need, have[alg])
		}
		delete(have, alg)
	}
	for alg, b := range have {
		if b != 0 {
			return fmt.Errorf("TPM selects PCRs %06x of bank %#x without being asked", b, uint16(alg))
		}
	}
	return nil
}

func bits(sel []byte) (b uint32) {
	for i, v := range sel[:min(len(sel), 4)] {
		b |= uint32(v) << (8 * i)
	}
	return b
}

// ReadPCRs reads PCR values.
func (d *Device) ReadPCRs(ctx context.Context, sel []attest.PCRSelection) ([]attest.PCRBank, error) {
	sel, err := normalize(sel)
	if err != nil {
		return nil, err
	}
	return do(ctx, d, "read PCRs", func(s *state) ([]attest.PCRBank, error) { return s.readPCRs(sel) })
}

// readPCRs reads until all have come: the TPM returns at most eight at a time,
// and starts over when one was extended in between.
func (s *state) readPCRs(sel []attest.PCRSelection) ([]attest.PCRBank, error) {
	for range maxQuoteTries {
		banks, steady, err := s.readPCRsOnce(sel)
		if err != nil || steady {
			return banks, err
		}
	}
	return nil, ErrPCRsChanging
}

func (s *state) readPCRsOnce(sel []attest.PCRSelection) (banks []attest.PCRBank, steady bool, err error) {
	var counter uint32
	first := true
	for _, want := range sel {
		alg, err := bankAlg(want.Bank)
		if err != nil {
			return nil, false, err
		}
		size, err := digestSize(alg)
		if err != nil {
			return nil, false, err
		}
		values := map[uint32][]byte{}
		left := slices.Clone(want.Indices)
		for len(left) > 0 {
			in, err := toTPM([]attest.PCRSelection{{Bank: want.Bank, Indices: left}})
			if err != nil {
				return nil, false, err
			}
			rsp, err := tpm2.PCRRead{PCRSelectionIn: in}.Execute(s.conn)
			if err != nil {
				return nil, false, err
			}
			if !first && rsp.PCRUpdateCounter != counter {
				return nil, false, nil
			}
			counter, first = rsp.PCRUpdateCounter, false
			var got uint32
			for _, o := range rsp.PCRSelectionOut.PCRSelections {
				if o.Hash == alg {
					got |= bits(o.PCRSelect)
				}
			}
			n := 0
			left = slices.DeleteFunc(left, func(i uint32) bool {
				if got&(1<<i) == 0 || n >= len(rsp.PCRValues.Digests) {
					return false
				}
				values[i] = rsp.PCRValues.Digests[n].Buffer
				n++
				return true
			})
			if n == 0 {
				return nil, false, fmt.Errorf("%w: %s PCRs %v", ErrBankDisabled, want.Bank, left)
			}
			if n != len(rsp.PCRValues.Digests) {
				return nil, false, fmt.Errorf("TPM returned %d PCR values for %d selected", len(rsp.PCRValues.Digests), n)
			}
		}
		for i, v := range values {
			if len(v) != size {
				return nil, false, fmt.Errorf("%w: %s PCR %d has %d bytes", ErrBankDisabled, want.Bank, i, len(v))
			}
		}
		banks = append(banks, attest.PCRBank{Bank: want.Bank, Values: values})
	}
	return banks, true, nil
}

func digestSize(alg tpm2.TPMIAlgHash) (int, error) {
	h, err := alg.Hash()
	if err != nil {
		return 0, err
	}
	return h.Size(), nil
}

// banks lists the banks that have PCRs allocated.
func (s *state) banks() ([]string, error) {
	rsp, err := tpm2.GetCapability{Capability: tpm2.TPMCapPCRs, PropertyCount: 1}.Execute(s.conn)
	if err != nil {
		return nil, fmt.Errorf("PCR banks: %w", err)
	}
	list, err := rsp.CapabilityData.Data.AssignedPCR()
	if err != nil {
		return nil, fmt.Errorf("PCR banks: %w", err)
	}
	var out []string
	for _, b := range bankAlgs {
		for _, s := range list.PCRSelections {
			if s.Hash == b.alg && bits(s.PCRSelect) != 0 {
				out = append(out, b.name)
			}
		}
	}
	return out, nil
}
