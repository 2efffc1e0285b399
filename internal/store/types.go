package store

import (
	"errors"
	"time"

	"github.com/rootlink/rootlink/pkg/attest"
	"github.com/rootlink/rootlink/pkg/svid"
)

// Outcomes that callers branch on.
var (
	ErrNotFound = errors.New("store: not found")
	// ErrExists means that an entry with this ID, or one with the same SPIFFE
	// ID, parent and selectors, is there already.
	ErrExists = errors.New("store: exists already")
	ErrBanned = errors.New("store: agent is banned")
	// ErrConflict means that the row changed since the caller looked at it.
	ErrConflict = errors.New("store: changed meanwhile")
	// ErrNewerSchema means that a later version of this program wrote the file.
	ErrNewerSchema = errors.New("store: database was written by a newer version")
	// ErrUnknownState means that a commit failed and what the file holds could
	// not be read back; every call fails until it can.
	ErrUnknownState = errors.New("store: outcome of the last write is unknown")
	ErrClosed       = errors.New("store: closed")
)

// Selector is one type:value pair of an entry or an agent.
type Selector struct {
	Type  string `json:"t"`
	Value string `json:"v"`
}

func (s Selector) String() string { return s.Type + ":" + s.Value }

// Entry is a registration entry. Entries handed out are shared and must not
// be modified.
type Entry struct {
	ID            string
	SPIFFEID      string
	ParentID      string
	Selectors     []Selector // sorted, unique
	X509TTL       time.Duration
	JWTTTL        time.Duration
	FederatesWith []string
	Admin         bool
	Downstream    bool
	StoreSVID     bool
	ExpiresAt     time.Time // zero: never
	DNSNames      []string
	Hint          string
	Revision      int64     // grows on every update
	CreatedAt     time.Time // whole seconds
}

// Agent is an attested node. Agents handed out are shared and must not be
// modified.
type Agent struct {
	ID              string
	AttestationType string
	// Serial is the decimal serial number of the SVID in use. NewSerial is that
	// of a renewed SVID which was never used yet; its first use retires Serial.
	// Both are empty for a banned agent.
	Serial       string
	ExpiresAt    time.Time
	NewSerial    string
	NewExpiresAt time.Time
	Banned       bool
	CanReattest  bool
	// KeyBound says that the node's quote covered the key of its SVID. Only
	// such a node may commit to keys of others.
	KeyBound    bool
	Selectors   []Selector   // sorted, unique
	Attestation *Attestation // nil when the attestor reports nothing of the kind
}

// Attestation is what the last node attestation showed.
type Attestation struct {
	At           time.Time           `json:"at"`
	EKHash       [32]byte            `json:"ek_hash"`
	EKBasis      string              `json:"ek_basis"`
	EKRoot       [32]byte            `json:"ek_root"`
	EKChain      [][]byte            `json:"ek_chain,omitempty"`
	EKPublic     []byte              `json:"ek_public,omitempty"` // SPKI DER, of an EK without certificate
	AKName       []byte              `json:"ak_name"`
	AKCert       []byte              `json:"ak_cert"`
	AgentKey     [32]byte            `json:"agent_key"` // zero when hidden by the plugin interface
	Nonce        []byte              `json:"nonce,omitempty"`
	Quote        []byte              `json:"quote,omitempty"`
	Signature    []byte              `json:"signature,omitempty"`
	PCRs         []attest.PCRBank    `json:"pcrs"`
	ResetCount   uint32              `json:"reset_count"`
	RestartCount uint32              `json:"restart_count"`
	Clock        uint64              `json:"clock"`
	EventLog     *attest.TypedDigest `json:"event_log,omitempty"`
	IMALog       *attest.TypedDigest `json:"ima_log,omitempty"`
	SecureBoot   *bool               `json:"secure_boot,omitempty"`
	Manufacturer string              `json:"manufacturer,omitempty"`
	Firmware     string              `json:"firmware,omitempty"`
	Software     bool                `json:"software,omitempty"`
}

// AgentEvent is one line of an agent's history.
type AgentEvent struct {
	AgentID string
	At      time.Time
	Event   string // "attested", "renewed", "banned", "deleted", "ak_changed"
	Detail  string
}

// Authority is an X.509 authority. Its private key is in a file of its own.
type Authority struct {
	ID          string // lower-case hex of the subject key ID
	Certificate []byte // DER
	KeyFile     string // base name in the data directory
	State       svid.State
	PreparedAt  time.Time
	ActivatedAt time.Time // zero until then
	RetiredAt   time.Time // zero until then
	// Distrusted by an operator: what it signed is replaced once it is tainted,
	// and verifies no more once it is revoked. Zero until then.
	TaintedAt time.Time
	RevokedAt time.Time
}

// PolicyRevision is one revision of a PCR policy, kept for ever so that a
// verifier can judge SVIDs issued under it.
type PolicyRevision struct {
	Policy    attest.PCRPolicy
	Digest    [32]byte
	CreatedAt time.Time
	DeletedAt time.Time // zero unless the policy was deleted at this revision
}
