package attest

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"
)

// ErrPCRPolicy is wrapped by every error about the form of a PCR policy.
var ErrPCRPolicy = errors.New("malformed PCR policy")

// PCRPolicy is a named list of complete profiles: one profile must match
// whole. Its digest covers name, revision and profiles.
type PCRPolicy struct {
	Name     string       `json:"name"`
	Revision uint64       `json:"revision"`
	Profiles []PCRProfile `json:"profiles"`
}

// PCRProfile is one complete set of values. Banks maps bank → decimal PCR
// index → lower-case hex.
type PCRProfile struct {
	Name      string                       `json:"name"`
	NotBefore time.Time                    `json:"not_before,omitzero"`
	NotAfter  time.Time                    `json:"not_after,omitzero"`
	Banks     map[string]map[string]string `json:"pcrs"`
}

// PCRDiff is one value that differs from a profile.
type PCRDiff struct {
	Bank  string
	Index uint32
	Want  []byte
	Got   []byte // nil: not quoted
}

// PolicyMismatch is the error of Match: the profile that came nearest and how
// it differs.
type PolicyMismatch struct {
	Policy   string
	Revision uint64
	Profile  string    // nearest
	Diffs    []PCRDiff // empty when only the time is wrong
	From, To time.Time // set when the profile is not valid then
}

// Error names each PCR that differs, and both values.
func (e *PolicyMismatch) Error() string {
	var b strings.Builder
	fmt.Fprintf(&b, "PCR policy %s (revision %d) is not met; nearest profile %s", e.Policy, e.Revision, e.Profile)
	for i, d := range e.Diffs {
		if i == 4 {
			fmt.Fprintf(&b, ", and %d more", len(e.Diffs)-i)
			break
		}
		if d.Got == nil {
			fmt.Fprintf(&b, ", %s:%d was not quoted", d.Bank, d.Index)
		} else {
			fmt.Fprintf(&b, ", %s:%d is %x, want %x", d.Bank, d.Index, d.Got, d.Want)
		}
	}
	if !e.From.IsZero() {
		fmt.Fprintf(&b, ", valid only from %s", e.From.UTC().Format(time.RFC3339))
	}
	if !e.To.IsZero() {
		fmt.Fprintf(&b, ", valid only until %s", e.To.UTC().Format(time.RFC3339))
	}
	return b.String()
}

// Validate fails on empty policies or profiles, resettable PCRs (16, 23), bad
// hex or lengths, SHA-1 only, and names that would not survive a selector.
func (p *PCRPolicy) Validate() error {
	if !plainName(p.Name) {
		return fmt.Errorf("%w: name %.40q: want letters, digits and ._-, at most %d", ErrPCRPolicy, p.Name, MaxPolicyName)
	}
	if p.Revision == 0 || p.Revision >= 1<<53 {
		return fmt.Errorf("%w: revision %d", ErrPCRPolicy, p.Revision)
	}
	if len(p.Profiles) == 0 || len(p.Profiles) > MaxProfiles {
		return fmt.Errorf("%w: %d profiles, want 1 to %d", ErrPCRPolicy, len(p.Profiles), MaxProfiles)
	}
	seen := make(map[string]bool)
	for i := range p.Profiles {
		f := &p.Profiles[i]
		if !plainName(f.Name) || seen[f.Name] {
			return fmt.Errorf("%w: profile name %.40q is repeated, or not letters, digits and ._-", ErrPCRPolicy, f.Name)
		}
		seen[f.Name] = true
		if _, err := f.banks(); err != nil {
			return fmt.Errorf("%w: profile %s: %w", ErrPCRPolicy, f.Name, err)
		}
	}
	return nil
}

// plainName keeps policy names fit for selectors, file names and canonical JSON.
func plainName(s string) bool {
	return s != "" && len(s) <= MaxPolicyName && !strings.ContainsFunc(s, func(r rune) bool {
		return !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("._-", r))
	})
}

// banks decodes and checks the values of a profile, sorted by algorithm.
func (f *PCRProfile) banks() ([]PCRBank, error) {
	if !f.NotBefore.IsZero() && !f.NotAfter.IsZero() && !f.NotBefore.Before(f.NotAfter) {
		return nil, errors.New("not_before is not before not_after")
	}
	if len(f.Banks) > MaxBanks {
		return nil, fmt.Errorf("%d banks", len(f.Banks))
	}
	var out []PCRBank
	strong := false
	for _, h := range hashes() {
		values, ok := f.Banks[h.name]
		if !ok {
			continue
		}
		b := PCRBank{Bank: h.name, Values: make(map[uint32][]byte, len(values))}
		for k, v := range values {
			i, err := strconv.ParseUint(k, 10, 8)
			if err != nil || i > MaxPCR || strconv.FormatUint(i, 10) != k {
				return nil, fmt.Errorf("PCR index %.10q", k)
			}
			if ResettablePCR(uint32(i)) {
				return nil, fmt.Errorf("PCR %d can be reset from user space and proves nothing", i)
			}
			raw, err := hex.DecodeString(v)
			if err != nil || len(raw) != h.size || hex.EncodeToString(raw) != v {
				return nil, fmt.Errorf("PCR %s:%d is not %d bytes of lower-case hex", h.name, i, h.size)
			}
			b.Values[uint32(i)] = raw
		}
		if len(b.Values) == 0 {
			return nil, fmt.Errorf("bank %s is empty", h.name)
		}
		strong = strong || !h.weak
		out = append(out, b)
	}
	if len(out) != len(f.Banks) {
		return nil, fmt.Errorf("unknown bank among %.100q", slices.Sorted(maps.Keys(f.Banks)))
	}
	if !strong {
		return nil, errors.New("needs values of a bank stronger than SHA-1")
	}
	return out, nil
}

// Digest is SHA-256 over the policy's canonical JSON (RFC 8785): keys sorted,
// no white space, times in UTC.
func (p *PCRPolicy) Digest() [32]byte {
	profiles := make([]any, len(p.Profiles))
	for i, f := range p.Profiles {
		m := map[string]any{"name": f.Name, "pcrs": f.Banks}
		if !f.NotBefore.IsZero() {
			m["not_before"] = f.NotBefore.UTC().Format(time.RFC3339Nano)
		}
		if !f.NotAfter.IsZero() {
			m["not_after"] = f.NotAfter.UTC().Format(time.RFC3339Nano)
		}
		profiles[i] = m
	}
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	// Strings, integers and maps of them cannot fail to encode.
	_ = enc.Encode(map[string]any{"name": p.Name, "revision": p.Revision, "profiles": profiles})
	return sha256.Sum256(bytes.TrimSuffix(b.Bytes(), []byte{'\n'}))
}

// Ref names this revision as evidence records do.
func (p *PCRPolicy) Ref() *PolicyRef {
	d := p.Digest()
	return &PolicyRef{Name: p.Name, Revision: p.Revision, Digest: TypedDigest{Alg: "sha256", Value: d[:]}}
}

// Match returns the name of the first profile whose every value equals pcrs at
// time at, or a *PolicyMismatch that says what is nearest and how it differs.
// Profiles never mix: one PCR of one image and another of a second is a miss.
func (p *PCRPolicy) Match(pcrs []PCRBank, at time.Time) (profile string, err error) {
	if err := p.Validate(); err != nil {
		return "", err
	}
	var nearest *PolicyMismatch
	for i := range p.Profiles {
		f := &p.Profiles[i]
		want, err := f.banks()
		if err != nil {
			return "", err
		}
		miss := &PolicyMismatch{Policy: p.Name, Revision: p.Revision, Profile: f.Name, Diffs: diff(want, pcrs)}
		if !f.NotBefore.IsZero() && at.Before(f.NotBefore) {
			miss.From = f.NotBefore
		}
		if !f.NotAfter.IsZero() && at.After(f.NotAfter) {
			miss.To = f.NotAfter
		}
		if len(miss.Diffs) == 0 && miss.From.IsZero() && miss.To.IsZero() {
			return f.Name, nil
		}
		if nearest == nil || len(miss.Diffs) < len(nearest.Diffs) {
			nearest = miss
		}
	}
	return "", nearest
}

// diff lists the values of want that got lacks or has otherwise.
func diff(want, got []PCRBank) []PCRDiff {
	var out []PCRDiff
	for _, w := range want {
		var have map[uint32][]byte
		for _, g := range got {
			if g.Bank == w.Bank {
				have = g.Values
			}
		}
		for _, i := range slices.Sorted(maps.Keys(w.Values)) {
			if v, ok := have[i]; !ok || !bytes.Equal(v, w.Values[i]) {
				out = append(out, PCRDiff{Bank: w.Bank, Index: i, Want: w.Values[i], Got: v})
			}
		}
	}
	return out
}

// Required returns every PCR that some profile speaks of, as a quote must
// select it. SHA-1 values are compared but never required.
func (p *PCRPolicy) Required() []PCRSelection {
	sets := make(map[string]map[uint32]bool)
	for i := range p.Profiles {
		banks, err := p.Profiles[i].banks()
		if err != nil {
			continue // Validate and Match report it
		}
		for _, b := range banks {
			if sets[b.Bank] == nil {
				sets[b.Bank] = make(map[uint32]bool)
			}
			for pcr := range b.Values {
				sets[b.Bank][pcr] = true
			}
		}
	}
	var out []PCRSelection
	for _, h := range hashes() {
		if s := sets[h.name]; len(s) > 0 && !h.weak {
			out = append(out, PCRSelection{Bank: h.name, Indices: slices.Sorted(maps.Keys(s))})
		}
	}
	return out
}

// NewProfile takes the selected values out of pcrs, for capturing a policy from
// a known-good machine.
func NewProfile(name string, pcrs []PCRBank, sel []PCRSelection) (*PCRProfile, error) {
	f := &PCRProfile{Name: name, Banks: make(map[string]map[string]string)}
	for _, s := range sel {
		i := slices.IndexFunc(pcrs, func(b PCRBank) bool { return b.Bank == s.Bank })
		m := make(map[string]string)
		for _, pcr := range s.Indices {
			if i < 0 || pcrs[i].Values[pcr] == nil {
				return nil, fmt.Errorf("PCR %s:%d was not quoted", s.Bank, pcr)
			}
			m[strconv.FormatUint(uint64(pcr), 10)] = hex.EncodeToString(pcrs[i].Values[pcr])
		}
		f.Banks[s.Bank] = m
	}
	p := PCRPolicy{Name: "capture", Revision: 1, Profiles: []PCRProfile{*f}}
	if err := p.Validate(); err != nil {
		return nil, err
	}
	return f, nil
}
