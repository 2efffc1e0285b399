package attest

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// ErrPCRSelection is wrapped by every error about what PCRs are asked for.
var ErrPCRSelection = errors.New("no such PCR selection")

// PCRSelection is a set of PCRs of one bank.
type PCRSelection struct {
	Bank    string
	Indices []uint32
}

// DefaultPCRs are quoted when nothing else is configured: everything that boot
// measures.
func DefaultPCRs() []PCRSelection {
	s := PCRSelection{Bank: "sha256"}
	for i := range uint32(16) {
		s.Indices = append(s.Indices, i)
	}
	return []PCRSelection{s}
}

// ResettablePCR says whether user space can reset a PCR (PC Client profile:
// debug and application PCRs). Its value says nothing about how the machine was
// booted: whoever wants to meet a policy over it can.
func ResettablePCR(pcr uint32) bool { return pcr == 16 || pcr == 23 }

// NormalizePCRs puts a selection into the one order used everywhere: banks by
// TPM_ALG_ID, each once, indices ascending, each once. It fails with
// ErrPCRSelection on an unknown bank or PCR, and when a bank selects nothing: a
// TPM signs an empty selection too, and it says nothing of the machine.
func NormalizePCRs(sel []PCRSelection) ([]PCRSelection, error) {
	byBank := map[string][]uint32{}
	for _, s := range sel {
		if _, ok := hashByName(s.Bank); !ok {
			return nil, fmt.Errorf("%w: unknown PCR bank %.20q", ErrPCRSelection, s.Bank)
		}
		if n := len(s.Indices); n == 0 || n > 2*(MaxPCR+1) {
			return nil, fmt.Errorf("%w: %d PCRs of bank %s", ErrPCRSelection, n, s.Bank)
		}
		for _, i := range s.Indices {
			if i > MaxPCR {
				return nil, fmt.Errorf("%w: PCR %d does not exist", ErrPCRSelection, i)
			}
		}
		byBank[s.Bank] = append(byBank[s.Bank], s.Indices...)
	}
	if len(byBank) == 0 {
		return nil, fmt.Errorf("%w: it is empty", ErrPCRSelection)
	}
	var out []PCRSelection
	for _, h := range hashes() {
		if idx := byBank[h.name]; len(idx) > 0 {
			slices.Sort(idx)
			out = append(out, PCRSelection{Bank: h.name, Indices: slices.Compact(idx)})
		}
	}
	return out, nil
}

// ParsePCRs reads "sha256:0-7,11+sha384:7", the form of tpm2-tools with ranges,
// each bank once, into a normalized selection.
func ParsePCRs(text string) ([]PCRSelection, error) {
	var sel []PCRSelection
	for part := range strings.SplitSeq(text, "+") {
		bank, list, ok := strings.Cut(part, ":")
		if !ok || slices.ContainsFunc(sel, func(s PCRSelection) bool { return s.Bank == bank }) {
			return nil, fmt.Errorf("%w: %.40q: want sha256:0-7,11 and the like, each bank once", ErrPCRSelection, part)
		}
		s := PCRSelection{Bank: bank}
		for item := range strings.SplitSeq(list, ",") {
			lo, hi, isRange := strings.Cut(item, "-")
			if !isRange {
				hi = lo
			}
			from, err := strconv.ParseUint(lo, 10, 8)
			to, err2 := strconv.ParseUint(hi, 10, 8)
			if err != nil || err2 != nil || from > to || to > MaxPCR {
				return nil, fmt.Errorf("%w: PCR %.20q: want 0 to %d", ErrPCRSelection, item, MaxPCR)
			}
			for i := from; i <= to; i++ {
				if !slices.Contains(s.Indices, uint32(i)) {
					s.Indices = append(s.Indices, uint32(i))
				}
			}
		}
		sel = append(sel, s)
	}
	return NormalizePCRs(sel)
}

// FormatPCRs is the reverse of ParsePCRs: one text for each normalized
// selection.
func FormatPCRs(sel []PCRSelection) string {
	var parts []string
	for _, s := range sel {
		var items []string
		for i := 0; i < len(s.Indices); {
			j := i
			for j+1 < len(s.Indices) && s.Indices[j+1] == s.Indices[j]+1 {
				j++
			}
			item := strconv.FormatUint(uint64(s.Indices[i]), 10)
			if j > i {
				item += "-" + strconv.FormatUint(uint64(s.Indices[j]), 10)
			}
			items = append(items, item)
			i = j + 1
		}
		parts = append(parts, s.Bank+":"+strings.Join(items, ","))
	}
	return strings.Join(parts, "+")
}
