package wire

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/rootlink/rootlink/pkg/attest"
	tpmv1 "github.com/rootlink/rootlink/proto/rootlink/tpm/v1"
)

// NumPCRs is the number of PCRs in a bank.
const NumPCRs = 24

// bankSize is the digest size in bytes of each bank we know.
var bankSize = map[string]int{"sha1": 20, "sha256": 32, "sha384": 48, "sha512": 64}

// DefaultPCRs are quoted when nothing else is configured: everything that boot
// measures. 16 and 23 can be reset from user space and are never trusted.
func DefaultPCRs() []attest.PCRSelection {
	s := attest.PCRSelection{Bank: "sha256"}
	for i := range uint32(16) {
		s.Indices = append(s.Indices, i)
	}
	return []attest.PCRSelection{s}
}

// ParsePCRs reads a selection such as "sha256:0-7,11,14+sha384:7" into one sorted
// list per bank.
func ParsePCRs(text string) ([]attest.PCRSelection, error) {
	sel, err := attest.ParsePCRSelections(text)
	if err != nil {
		return nil, err
	}
	return Normalize(sel)
}

// FormatPCRs is the reverse of ParsePCRs.
func FormatPCRs(sel []attest.PCRSelection) string {
	var parts []string
	for _, s := range sel {
		var items []string
		for i := 0; i < len(s.Indices); {
			j := i
			for j+1 < len(s.Indices) && s.Indices[j+1] == s.Indices[j]+1 {
				j++
			}
			if j > i {
				items = append(items, fmt.Sprintf("%d-%d", s.Indices[i], s.Indices[j]))
			} else {
				items = append(items, strconv.FormatUint(uint64(s.Indices[i]), 10))
			}
			i = j + 1
		}
		parts = append(parts, s.Bank+":"+strings.Join(items, ","))
	}
	return strings.Join(parts, "+")
}

// Normalize merges selections into one sorted list per bank, without doubles,
// and fails on banks or PCRs that do not exist or that select nothing.
func Normalize(sel []attest.PCRSelection) ([]attest.PCRSelection, error) {
	byBank := map[string][]uint32{}
	for _, s := range sel {
		if _, ok := bankSize[s.Bank]; !ok {
			return nil, malformed("unknown PCR bank %q", s.Bank)
		}
		if len(s.Indices) == 0 {
			return nil, malformed("selection of no PCR in bank %s", s.Bank)
		}
		for _, i := range s.Indices {
			if i >= NumPCRs {
				return nil, malformed("PCR %d does not exist", i)
			}
		}
		byBank[s.Bank] = append(byBank[s.Bank], s.Indices...)
	}
	out := make([]attest.PCRSelection, 0, len(byBank))
	for bank, idx := range byBank {
		slices.Sort(idx)
		out = append(out, attest.PCRSelection{Bank: bank, Indices: slices.Compact(idx)})
	}
	// By digest size, which is the order of TPM algorithm identifiers too.
	slices.SortFunc(out, func(a, b attest.PCRSelection) int {
		return cmp.Compare(bankSize[a.Bank], bankSize[b.Bank])
	})
	return out, nil
}

// SelectionsToProto encodes selections.
func SelectionsToProto(sel []attest.PCRSelection) []*tpmv1.PCRSelection {
	var out []*tpmv1.PCRSelection
	for _, s := range sel {
		out = append(out, &tpmv1.PCRSelection{Bank: s.Bank, Indices: s.Indices})
	}
	return out
}

// SelectionsFromProto decodes and bounds selections. A bank named twice is an
// error, since the two sides could read it differently.
func SelectionsFromProto(in []*tpmv1.PCRSelection) ([]attest.PCRSelection, error) {
	if len(in) > len(bankSize) {
		return nil, malformed("%d PCR banks", len(in))
	}
	var sel []attest.PCRSelection
	for _, s := range in {
		if slices.ContainsFunc(sel, func(o attest.PCRSelection) bool { return o.Bank == s.GetBank() }) {
			return nil, malformed("PCR bank %q is selected twice", s.GetBank())
		}
		if len(s.GetIndices()) > NumPCRs {
			return nil, malformed("%d PCRs in bank %q", len(s.GetIndices()), s.GetBank())
		}
		sel = append(sel, attest.PCRSelection{Bank: s.GetBank(), Indices: s.GetIndices()})
	}
	return Normalize(sel)
}

// BanksToProto encodes PCR values.
func BanksToProto(banks []attest.PCRBank) []*tpmv1.PCRBank {
	var out []*tpmv1.PCRBank
	for _, b := range banks {
		out = append(out, &tpmv1.PCRBank{Bank: b.Bank, Values: b.Values})
	}
	return out
}

// BanksFromProto decodes and bounds PCR values.
func BanksFromProto(in []*tpmv1.PCRBank) ([]attest.PCRBank, error) {
	if len(in) > len(bankSize) {
		return nil, malformed("%d PCR banks", len(in))
	}
	var out []attest.PCRBank
	for _, b := range in {
		size, ok := bankSize[b.GetBank()]
		switch {
		case !ok:
			return nil, malformed("unknown PCR bank %q", b.GetBank())
		case len(b.GetValues()) == 0 || len(b.GetValues()) > NumPCRs:
			return nil, malformed("%d PCR values in bank %s", len(b.GetValues()), b.GetBank())
		case slices.ContainsFunc(out, func(o attest.PCRBank) bool { return o.Bank == b.GetBank() }):
			return nil, malformed("PCR bank %s is given twice", b.GetBank())
		}
		for i, v := range b.GetValues() {
			if i >= NumPCRs || len(v) != size {
				return nil, malformed("PCR %s:%d has %d bytes", b.GetBank(), i, len(v))
			}
		}
		out = append(out, attest.PCRBank{Bank: b.GetBank(), Values: b.GetValues()})
	}
	return out, nil
}
