package policy

import (
	"bytes"
	"cmp"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"time"

	"github.com/rootlink/rootlink/pkg/attest"
)

// Errors that callers branch on.
var (
	// ErrResettable means that a profile would name a PCR whose value user
	// space chooses.
	ErrResettable = errors.New("PCR can be reset from user space and proves nothing")
	// ErrNotQuoted means that the node's last quote did not cover a PCR.
	ErrNotQuoted = errors.New("PCR is not among the values that the node quoted")
	// ErrSameProfile means that a policy has that very profile already.
	ErrSameProfile = errors.New("policy has this profile already")
)

// DefaultCapture is what a capture takes when nothing is named: PCR 7, the
// Secure Boot state and keys, which machines of one configuration share.
func DefaultCapture() []attest.PCRSelection {
	return []attest.PCRSelection{{Bank: "sha256", Indices: []uint32{7}}}
}

// Capture makes a profile out of the values that a known-good node quoted. The
// notes say what the person who asked for it should know before relying on it.
func Capture(name string, banks []attest.PCRBank, sel []attest.PCRSelection, notBefore, notAfter time.Time) (attest.PCRProfile, []string, error) {
	if len(sel) == 0 {
		sel = DefaultCapture()
	}
	for _, s := range sel {
		if i := slices.IndexFunc(s.Indices, attest.ResettablePCR); i >= 0 {
			return attest.PCRProfile{}, nil, fmt.Errorf("PCR %d: %w", s.Indices[i], ErrResettable)
		}
	}
	for _, s := range sel {
		i := slices.IndexFunc(banks, func(b attest.PCRBank) bool { return b.Bank == s.Bank })
		for _, n := range s.Indices {
			if i < 0 || len(banks[i].Values[n]) == 0 {
				return attest.PCRProfile{}, nil, fmt.Errorf("PCR %s:%d: %w", s.Bank, n, ErrNotQuoted)
			}
		}
	}
	p, err := attest.NewProfile(name, banks, sel)
	if err != nil {
		return attest.PCRProfile{}, nil, fmt.Errorf("capture: %w", err)
	}
	p.NotBefore, p.NotAfter = notBefore, notAfter
	var notes []string
	noted := map[uint32]bool{}
	for _, s := range sel {
		for _, n := range s.Indices {
			if v, err := hex.DecodeString(p.Banks[s.Bank][strconv.FormatUint(uint64(n), 10)]); err == nil && empty(v) {
				notes = append(notes, fmt.Sprintf("PCR %s:%d holds its reset value: nothing was measured into it on this node, so that it tells no boot from another.", s.Bank, n))
			}
			if note := why[n]; note != "" && !noted[n] {
				noted[n] = true
				notes = append(notes, note)
			}
		}
	}
	return *p, notes, nil
}

// why says what makes a PCR hard to have in a policy.
var why = map[uint32]string{
	0:  "PCR 0 holds the firmware's code: every firmware update changes it.",
	1:  "PCR 1 holds the firmware's settings, boot order and often serial numbers: it differs on every machine and changes with its set-up menu.",
	2:  "PCR 2 holds the code of plug-in cards: adding or updating one changes it.",
	3:  "PCR 3 holds the settings of plug-in cards: it can differ between machines of one model.",
	4:  "PCR 4 holds the boot loaders that ran: every update of shim, GRUB or a unified kernel image changes it.",
	5:  "PCR 5 holds the partition table with its random GUIDs: it differs on every machine and changes when a disk is repartitioned.",
	6:  "PCR 6 is the maker's own: it often holds wake-up events, so that it differs on every machine and from boot to boot.",
	8:  "PCR 8 holds GRUB's commands and the kernel command line: a disk's UUID in it makes it differ on every machine.",
	9:  "PCR 9 holds the files that the boot loader read: every kernel or initramfs update changes it, and an initramfs made on the machine differs on each.",
	10: "PCR 10 grows with every file that IMA measures while the system runs: a fixed value stops matching at once.",
	11: "PCR 11 holds the unified kernel image and grows in phases during boot: the value is that of the phase in which the agent quoted.",
	12: "PCR 12 holds what was added to the kernel command line: it changes with each such edit.",
	14: "PCR 14 holds shim's machine owner keys: enrolling one changes it.",
	15: "PCR 15 holds this system's machine ID and volume keys where systemd measures them: it then differs on every machine.",
}

// empty reports whether a PCR still has a reset value.
func empty(v []byte) bool {
	return !slices.ContainsFunc(v, func(b byte) bool { return b != 0 }) ||
		!slices.ContainsFunc(v, func(b byte) bool { return b != 0xff })
}

// AddProfile returns the profiles of a policy's next revision. current is nil
// when there is no such policy yet.
func AddProfile(current *attest.PCRPolicy, p attest.PCRProfile) ([]attest.PCRProfile, error) {
	var out []attest.PCRProfile
	if current != nil {
		out = slices.Clone(current.Profiles)
	}
	for _, have := range out {
		if have.Name == p.Name {
			return nil, fmt.Errorf("profile %q: %w", p.Name, ErrSameProfile)
		}
		if have.NotBefore.Equal(p.NotBefore) && have.NotAfter.Equal(p.NotAfter) &&
			maps.EqualFunc(have.Banks, p.Banks, maps.Equal) {
			return nil, fmt.Errorf("as profile %q: %w", have.Name, ErrSameProfile)
		}
	}
	return append(out, p), nil
}

// Difference is one PCR whose value is not the profile's.
type Difference struct {
	Profile string
	Bank    string
	PCR     uint32
	Want    []byte
	Got     []byte // nil when the node did not quote it
}

// Diff compares a policy with the values that a node quoted. When no profile
// matches it lists how each of them differs; a profile outside its dates
// differs by nothing and yet does not match.
func Diff(p *attest.PCRPolicy, banks []attest.PCRBank, at time.Time) (profile string, matches bool, diff []Difference, err error) {
	if err := p.Validate(); err != nil {
		return "", false, nil, err
	}
	if profile, err := p.Match(banks, at); err == nil {
		return profile, true, nil, nil
	}
	for _, profile := range p.Profiles {
		for bank, values := range profile.Banks {
			i := slices.IndexFunc(banks, func(b attest.PCRBank) bool { return b.Bank == bank })
			for index, text := range values {
				n, err := strconv.ParseUint(index, 10, 8)
				if err != nil {
					return "", false, nil, fmt.Errorf("PCR %q: %w", index, err)
				}
				want, err := hex.DecodeString(text)
				if err != nil {
					return "", false, nil, fmt.Errorf("PCR %s:%s: %w", bank, index, err)
				}
				var got []byte
				if i >= 0 {
					got = banks[i].Values[uint32(n)]
				}
				if !bytes.Equal(got, want) {
					diff = append(diff, Difference{Profile: profile.Name, Bank: bank, PCR: uint32(n), Want: want, Got: got})
				}
			}
		}
	}
	slices.SortFunc(diff, func(a, b Difference) int {
		return cmp.Or(cmp.Compare(a.Profile, b.Profile), cmp.Compare(a.Bank, b.Bank), cmp.Compare(a.PCR, b.PCR))
	})
	return "", false, diff, nil
}
