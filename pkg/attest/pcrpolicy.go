package attest

import "time"

// PCRPolicy is a named list of complete profiles (§3): one profile must match
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

// Validate fails on empty policies or profiles, resettable PCRs (16, 23), bad
// hex or lengths, SHA-1 only.
func (p *PCRPolicy) Validate() error { return errNotImplemented }

// Digest is SHA-256 over the policy's canonical JSON.
func (p *PCRPolicy) Digest() [32]byte { return [32]byte{} }

// Match returns the name of the first profile whose every value equals pcrs at
// time at, or an error that says what is nearest and how it differs.
func (p *PCRPolicy) Match(pcrs []PCRBank, at time.Time) (profile string, err error) {
	return "", errNotImplemented
}
