package wire

import (
	"slices"

	"github.com/rootlink/rootlink/pkg/attest"
	tpmv1 "github.com/rootlink/rootlink/proto/rootlink/tpm/v1"
)

// numPCRs is the number of PCRs in a bank.
const numPCRs = attest.MaxPCR + 1

// bankSize is the digest size in bytes of each bank we know.
var bankSize = map[string]int{"sha1": 20, "sha256": 32, "sha384": 48, "sha512": 64}

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
		if len(s.GetIndices()) > numPCRs {
			return nil, malformed("%d PCRs in bank %q", len(s.GetIndices()), s.GetBank())
		}
		sel = append(sel, attest.PCRSelection{Bank: s.GetBank(), Indices: s.GetIndices()})
	}
	sel, err := attest.NormalizePCRs(sel)
	if err != nil {
		return nil, malformed("%v", err)
	}
	return sel, nil
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
		case len(b.GetValues()) == 0 || len(b.GetValues()) > numPCRs:
			return nil, malformed("%d PCR values in bank %s", len(b.GetValues()), b.GetBank())
		case slices.ContainsFunc(out, func(o attest.PCRBank) bool { return o.Bank == b.GetBank() }):
			return nil, malformed("PCR bank %s is given twice", b.GetBank())
		}
		for i, v := range b.GetValues() {
			if i >= numPCRs || len(v) != size {
				return nil, malformed("PCR %s:%d has %d bytes", b.GetBank(), i, len(v))
			}
		}
		out = append(out, attest.PCRBank{Bank: b.GetBank(), Values: b.GetValues()})
	}
	return out, nil
}
