package layout

import (
	"time"

	"github.com/in-toto/in-toto-golang/in_toto"
)

// Layout says who must do which step with which machine and program, and how
// what goes into and comes out of the steps hangs together. It is well-formed;
// whether anybody signed it is File's to say.
type Layout struct {
	Name        string // with it the verifier remembers the serial
	Serial      uint64 // grows with every edition; a lower one is refused
	Issued      time.Time
	Expires     time.Time
	Readme      string
	Steps       []Step
	Inspections []Inspection
	// Keys are pinned functionary keys by in-toto key ID: of classic links and
	// of sublayouts. Steps signed with SPIFFE identities need none.
	Keys map[string]in_toto.Key
}

// Step is one step of the pipeline.
type Step struct {
	Name string
	// Command is what must have been run, word for word; empty allows any.
	Command   []string
	Materials [][]string // artifact rules
	Products  [][]string
	Threshold int
	PubKeys   []string // IDs of pinned keys; see Demands.KeyPinned and Sublayout
	Demands
}

// Demands is what this project's extension says of a step. Hashes are
// lower-case hex SHA-256.
type Demands struct {
	Step string `json:"step"`
	// Identities are SPIFFE ID patterns, of which the signer must match one.
	Identities []string `json:"identities,omitempty"`
	// Authorities restricts the SVID authorities that count: hashes of their
	// SubjectPublicKeyInfo.
	Authorities []string `json:"authorities,omitempty"`
	// DistinctHosts wants each of the threshold's links from a TPM of its own.
	DistinctHosts bool     `json:"distinct_hosts,omitempty"`
	EKs           []string `json:"eks,omitempty"` // hashes of SubjectPublicKeyInfo
	PCRPolicies   []string `json:"pcr_policies,omitempty"`
	Evidence      string   `json:"evidence,omitempty"` // least kind, see link.EvidenceKinds
	Tier          string   `json:"tier,omitempty"`     // least one
	Tools         []string `json:"tools,omitempty"`
	Recorders     []string `json:"recorders,omitempty"`
	// ProtectedRecorder refuses recorders that their user could have forged.
	ProtectedRecorder bool `json:"protected_recorder,omitempty"`
	// Executables names every program that the step's process tree may run.
	Executables  []string `json:"executables,omitempty"`
	CachesPerJob bool     `json:"caches_per_job,omitempty"`
	ExitCode     int      `json:"exit_code,omitempty"`
	// KeyPinned accepts classic in-toto links by PubKeys: no hardware stands
	// behind them.
	KeyPinned bool `json:"key_pinned,omitempty"`
	// Sublayout is the name of a layout, signed by one of PubKeys, that stands
	// for the step.
	Sublayout string `json:"sublayout,omitempty"`
	// Standalone allows that no MATCH rule joins the step to another.
	Standalone bool `json:"standalone,omitempty"`
	// MayMatchNothing allows MATCH rules of the step that nothing meets.
	MayMatchNothing bool `json:"may_match_nothing,omitempty"`
}

// Inspection is a command that the verifier runs over the artifacts.
type Inspection struct {
	Name      string
	Run       []string
	Materials [][]string
	Products  [][]string
}

// step returns the step of that name.
func (l *Layout) step(name string) *Step {
	for i := range l.Steps {
		if l.Steps[i].Name == name {
			return &l.Steps[i]
		}
	}
	return nil
}
