package attest

import (
	"bytes"
	"errors"
	"fmt"
	"slices"

	"github.com/google/go-eventlog/extract"
	"github.com/google/go-eventlog/register"
	"github.com/google/go-eventlog/tcg"
)

// ErrEventLog is wrapped by every error about a boot event log.
var ErrEventLog = errors.New("event log does not explain the quoted PCRs")

// firmwarePCRs are those that only firmware and boot loader write, so a log that
// does not explain them is wrong. Higher ones go on growing after the log ends.
const firmwarePCRs = 8

// efiGlobalVariable is the vendor GUID under which UEFI keeps SecureBoot.
const efiGlobalVariable = "8be4df61-93ca-11d2-aa0d-00e098032b8c"

// EventLogClaims is what a replayed boot event log proves.
type EventLogClaims struct {
	SecureBoot *bool    // nil when the log proves neither
	Bank       string   // the bank it was replayed against
	Replayed   []uint32 // PCRs whose quoted value the log explains
}

// ReplayEventLog replays log to the quoted PCR values of the strongest bank that
// the log has digests for. Every quoted firmware PCR (0 to 7) needs events that
// add up to its value, or its reset value: the library passes a log from which
// all events of a PCR were taken away.
func ReplayEventLog(log []byte, pcrs []PCRBank) (claims *EventLogClaims, err error) {
	if len(log) == 0 || len(log) > MaxEventLog {
		return nil, fmt.Errorf("%w: %d bytes, at most %d", ErrEventLog, len(log), MaxEventLog)
	}
	if err := checkBanks(pcrs); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrEventLog, err)
	}
	// The parser is third-party and the log comes from the machine in question.
	defer func() {
		if r := recover(); r != nil {
			claims, err = nil, fmt.Errorf("%w: parser failed: %v", ErrEventLog, r)
		}
	}()
	parsed, err := tcg.ParseEventLog(log, tcg.ParseOpts{})
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrEventLog, err)
	}
	bank, h, err := strongestBank(parsed.Algs, pcrs)
	if err != nil {
		return nil, err
	}

	claims = &EventLogClaims{Bank: bank.Bank}
	var events []tcg.Event // of PCRs 2 and 7, in the log's order
	for pcr := range uint32(MaxPCR + 1) {
		value, ok := bank.Values[pcr]
		if !ok {
			continue
		}
		got, err := parsed.Verify([]register.MR{register.PCR{Index: int(pcr), Digest: value, DigestAlg: h.hash}})
		switch {
		case err == nil && len(got) > 0:
			claims.Replayed = append(claims.Replayed, pcr)
			if pcr == 2 || pcr == 7 {
				events = append(events, got...)
			}
		case err == nil && isReset(value):
			claims.Replayed = append(claims.Replayed, pcr)
		case pcr < firmwarePCRs && err == nil:
			return nil, fmt.Errorf("%w: PCR %d has a value but no events", ErrEventLog, pcr)
		case pcr < firmwarePCRs:
			return nil, fmt.Errorf("%w: PCR %d: the events add up to another value", ErrEventLog, pcr)
		}
	}
	if len(claims.Replayed) == 0 {
		return nil, fmt.Errorf("%w: no PCR replayed", ErrEventLog)
	}
	if slices.Contains(claims.Replayed, 7) && slices.Contains(claims.Replayed, 2) {
		claims.SecureBoot = secureBootClaim(events, h)
	}
	return claims, nil
}

// strongestBank picks the bank to replay: the longest digest that is both
// quoted and in the log. SHA-1 proves nothing and SHA-512 the parser does not know.
func strongestBank(algs []register.HashAlg, pcrs []PCRBank) (PCRBank, tpmHash, error) {
	for _, name := range []string{"sha384", "sha256"} {
		h, _ := hashByName(name)
		inLog := slices.ContainsFunc(algs, func(a register.HashAlg) bool { return a.CryptoHash() == h.hash })
		i := slices.IndexFunc(pcrs, func(b PCRBank) bool { return b.Bank == name })
		if inLog && i >= 0 {
			return pcrs[i], h, nil
		}
	}
	return PCRBank{}, tpmHash{}, fmt.Errorf("%w: no SHA-256 or SHA-384 bank is both in the log and quoted", ErrEventLog)
}

// isReset says whether a PCR was never extended: all zeros, or all ones for the
// PCRs of a dynamic launch that did not happen.
func isReset(v []byte) bool {
	return bytes.Count(v, []byte{0x00}) == len(v) || bytes.Count(v, []byte{0xff}) == len(v)
}

// secureBootClaim returns what PCR 7 proves about Secure Boot, nil for nothing.
//
// Event types are not measured, so whoever holds the machine may relabel an
// event and append measurements of their own after boot. Two readers must
// therefore agree: the library, which fails on any event of PCR 7 whose data is
// not what was measured or whose type has no place there, and our own, which
// takes the state from one EV_EFI_VARIABLE_DRIVER_CONFIG event before the one
// separator and from nowhere else. The library alone reports "off" for a log
// that never mentions the variable.
func secureBootClaim(events []tcg.Event, h tpmHash) *bool {
	state, err := extract.ParseSecurebootState(events, extract.TPMRegisterConfig)
	if err != nil {
		return nil
	}
	var on *bool
	separators := 0
	for _, e := range events {
		if e.MRIndex() != 7 {
			continue
		}
		switch e.UntrustedType() {
		case tcg.Separator:
			separators++
		case tcg.EFIVariableDriverConfig:
			r := bytes.NewReader(e.RawData())
			v, err := tcg.ParseUEFIVariableData(r)
			if err != nil {
				return nil
			}
			if v.VarName() != "SecureBoot" {
				continue
			}
			if on != nil || separators > 0 || r.Len() != 0 || len(v.VariableData) != 1 || v.VariableData[0] > 1 ||
				!equalGUID(v.Header.VariableName.String(), efiGlobalVariable) ||
				!bytes.Equal(h.sum(e.RawData()), e.ReplayedDigest()) {
				return nil
			}
			is := v.VariableData[0] == 1
			on = &is
		}
	}
	if on == nil || separators != 1 || *on != state.Enabled {
		return nil
	}
	return on
}

// equalGUID compares GUIDs written with any case and braces.
func equalGUID(a, b string) bool {
	norm := func(s string) string {
		return string(bytes.ToLower(bytes.Trim([]byte(s), "{}")))
	}
	return norm(a) == norm(b)
}
