package link

import (
	"encoding/json"
	"time"

	"github.com/rootlink/rootlink/pkg/attest"
)

// Format names of the files defined here. Version is that of the format.
const (
	TrustFormat       = "rootlink-trust"
	RevocationsFormat = "rootlink-revocations"
	FormatVersion     = 1
)

// TrustFile is trust.json as written: everything a verifier takes as given.
// It has no power until ParseTrust or NewTrust turned it into a Trust.
type TrustFile struct {
	Format      string    `json:"format"`
	Version     int       `json:"version"`
	Serial      uint64    `json:"serial"` // grows with every export; a lower one is refused
	Issued      time.Time `json:"issued"`
	Expires     time.Time `json:"expires"`
	TrustDomain string    `json:"trust_domain"`
	// Operator is who runs the trust domain; empty: its name. A source of time
	// with the same operator is said to be the same people's word.
	Operator string `json:"operator,omitempty"`
	// TrustKeys may sign this file.
	TrustKeys []TrustKey `json:"trust_keys,omitempty"`
	// Previous is the hex SHA-256 of the document that was exported before this.
	Previous string `json:"previous,omitempty"`
	// TrustedRoot is a Sigstore TrustedRoot (protojson): SVID authorities,
	// timestamp authorities and logs with their windows.
	TrustedRoot    json.RawMessage   `json:"trusted_root"`
	Time           TimePolicy        `json:"time,omitzero"`
	Witnesses      []Witness         `json:"witnesses,omitempty"`
	LogProofs      []json.RawMessage `json:"log_proofs,omitempty"` // log entries of SVID authorities and attestation CAs
	AttestationCAs []AttestationCA   `json:"attestation_cas"`
	EK             EKTrust           `json:"ek"`
	PCRPolicies    []PCRPolicy       `json:"pcr_policies,omitempty"` // every revision, in any order
	LayoutKeys     []LayoutKey       `json:"layout_keys,omitempty"`
	Requirements   []Requirement     `json:"requirements"`
	Revocations    []Revocation      `json:"revocations,omitempty"`
}

// TrustKey is a key that may sign trust.json.
type TrustKey struct {
	Key []byte `json:"key"` // SubjectPublicKeyInfo DER, ECDSA P-256 or Ed25519
}

// AttestationCA is a CA whose word "this AK and this EK live in one TPM" is
// taken. When its certificates count is decided by its own validity (at the AK
// certificate's notBefore) and by revocations.
type AttestationCA struct {
	Certificate []byte `json:"certificate"` // DER
}

// EKTrust says which endorsement keys are genuine. Hashes are the lower-case
// hex SHA-256 of the EK's SubjectPublicKeyInfo.
type EKTrust struct {
	Roots         [][]byte `json:"roots,omitempty"`         // DER
	Intermediates [][]byte `json:"intermediates,omitempty"` // DER
	Allow         []string `json:"allow,omitempty"`
	Deny          []string `json:"deny,omitempty"`
	// Inventory maps EK hash → host. When present, an EK outside it is refused.
	Inventory map[string]string `json:"inventory,omitempty"`
}

// PCRPolicy is one revision of a PCR policy, and until when it was the current
// one: a state that was good once may be one that an attacker wants back.
type PCRPolicy struct {
	attest.PCRPolicy
	// Replaced is when a later revision, or none, took its place. Evidence with
	// a later nonce does not meet it. Zero: it is current, or the file is of a
	// server that did not say.
	Replaced time.Time `json:"replaced,omitzero"`
}

// LayoutKey is a key that may sign layouts.
type LayoutKey struct {
	Name string `json:"name"`
	Key  []byte `json:"key"` // SubjectPublicKeyInfo DER
}

// Tiers: what is known of the software that could use the AK.
const (
	TierTPM             = "tpm"              // a key in that TPM; the boot state is not judged
	TierBootAttested    = "boot_attested"    // a PCR policy was met
	TierMeasuredImage   = "measured_image"   // the whole image is measured
	TierKernelWitnessed = "kernel_witnessed" // every program is measured and allowed
)

// AnyHash in Tools or Recorders stands for every program. It must be written
// out: an empty list is an error, so that nobody allows everything by omission.
const AnyHash = "*"

// Requirement is what an identity must meet. Among several whose pattern
// matches, the first in the file counts.
type Requirement struct {
	Identity string   `json:"identity"`           // pattern, see MatchPattern
	Evidence string   `json:"evidence,omitempty"` // least kind; empty: leaf
	Tier     string   `json:"tier,omitempty"`     // least tier; empty: boot_attested
	Tools    []string `json:"tools"`              // lower-case hex SHA-256, or AnyHash
	// Recorders are the recorders that count as protected (setgid), and
	// UnprotectedRecorders those that are accepted although any process of the
	// same user could have spoken in their name.
	Recorders            []string `json:"recorders,omitempty"`
	UnprotectedRecorders []string `json:"unprotected_recorders,omitempty"`
	EKs                  []string `json:"eks,omitempty"`          // EK hashes; empty: any that EKTrust accepts
	PCRPolicies          []string `json:"pcr_policies,omitempty"` // names, one of which must be met; needed unless tier is tpm
	Steps                []string `json:"steps,omitempty"`        // step names this identity may sign; empty: any
	// Executables is the tool list: what the recorder says ran must be in it,
	// and its list complete. Lower-case hex SHA-256, or AnyHash; absent: not demanded.
	Executables  []string `json:"executables,omitempty"`
	CachesPerJob bool     `json:"caches_per_job,omitempty"` // caches must have been empty
	Logged       []string `json:"logged,omitempty"`         // what must be in a known log, see LoggedSignature
	// Types are the predicate types this identity may sign. Empty: links only.
	// One that signs links and others lists the links' type too.
	Types []string `json:"types,omitempty"`
}

// Revocation kinds.
const (
	RevokedEK            = "ek"
	RevokedAK            = "ak"
	RevokedAttestationCA = "attestation_ca"
	RevokedAuthority     = "authority"
	RevokedExecutable    = "executable"
)

// Revocation takes trust back, from a time on or always.
type Revocation struct {
	Kind   string     `json:"kind"`
	ID     string     `json:"id"` // lower-case hex: SPKI SHA-256, TPM name of an AK, SHA-256 of an executable
	From   *time.Time `json:"from,omitempty"`
	Always bool       `json:"always,omitempty"` // exactly one of From and Always
	Reason string     `json:"reason,omitempty"`
}

// RevocationsFile extends trust.json with later revocations.
type RevocationsFile struct {
	Format      string       `json:"format"`
	Version     int          `json:"version"`
	TrustDomain string       `json:"trust_domain"`
	Issued      time.Time    `json:"issued"`
	Revocations []Revocation `json:"revocations"`
}

// Marshal validates f (setting format and version) and writes trust.json.
func (f TrustFile) Marshal() ([]byte, error) {
	f.Format, f.Version = TrustFormat, FormatVersion
	if _, err := NewTrust(f); err != nil {
		return nil, err
	}
	return marshalFile(f, MaxTrust)
}

// Marshal validates r (setting format and version) and writes a revocation file.
func (r RevocationsFile) Marshal() ([]byte, error) {
	r.Format, r.Version = RevocationsFormat, FormatVersion
	if err := r.validate(); err != nil {
		return nil, err
	}
	return marshalFile(r, MaxRevocations)
}

func marshalFile(v any, limit int) ([]byte, error) {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return nil, malformed("%w", err)
	}
	if len(b) > limit {
		return nil, malformed("%d bytes, at most %d allowed", len(b), limit)
	}
	return append(b, '\n'), nil
}
