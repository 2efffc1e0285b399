package link

import (
	"slices"
	"strings"
	"time"

	"github.com/rootlink/rootlink/pkg/attest"
)

// ResultSchema is the version of Result's JSON. Fields are added without a new
// version; none is removed or changes its meaning.
const ResultSchema = 1

// Verdicts.
const (
	VerdictVerified = "verified"
	VerdictRefused  = "refused"
)

// Failure classes, as the exit code of `rootlink verify` tells them apart.
const (
	ClassCryptographic = "cryptographic"
	ClassPolicy        = "policy"
)

// Input is what Verify judges.
type Input struct {
	Links     []LinkInput
	Artifacts []Artifact // each must be a subject of at least one link
	Identity  string     // pattern that every signer must match; needed
	// Type is the predicate type that every statement must have; empty: a link.
	Type string
	// LeastSerial is the highest serial of trust.json seen before.
	LeastSerial uint64
	// LeastDigest is the Digest of the trust.json that had LeastSerial.
	LeastDigest string
	// TrustKeys are the fingerprints of the keys one of which must have signed
	// trust.json: pinned, or those of the one seen before. None: this is the
	// first one that the caller sees of its trust domain.
	TrustKeys []string
	// Seen are the trees that logs showed to this verifier before: the
	// Checkpoints of earlier results.
	Seen []SeenCheckpoint
	// NotBefore, when set, refuses links whose nonce is older: a genuine link
	// of an earlier run, replayed.
	NotBefore time.Time
	// Clock is the present when Verify is to judge as if it were another time,
	// which is its now. Zero: now is the present.
	Clock time.Time
}

// LinkInput is one bundle with what ships beside it.
type LinkInput struct {
	Name     string // for messages: the file's name
	Bundle   []byte
	Parsed   *Bundle // what ParseBundle made of Bundle, if the caller has it
	EventLog []byte  // optional; must have the digest that the evidence names
	Detached []byte  // the file DetachedName, where there is one
	// LogProofs are log entries of the AK certificate (JSON), see LogProofName.
	LogProofs [][]byte
	// Identity is what this link's signer must match, instead of Input's.
	Identity string
	ExitCode int // how the step must have ended, as a layout may expect
}

// Artifact is a file or directory whose digest the caller took.
type Artifact struct {
	Name   string            `json:"name"`
	Digest map[string]string `json:"digest"` // "sha256" of a file, DirHashAlg of a directory
	// Files are those of a directory: relative slash-separated name → hex
	// SHA-256. A directory whose files a link lists one by one has no dirHash.
	Files map[string]string `json:"-"`
}

// Result is what Verify found, complete also when it refused.
type Result struct {
	SchemaVersion int       `json:"schema_version"`
	Verdict       string    `json:"verdict"`
	Failure       *Failure  `json:"failure,omitempty"` // the first one
	Identity      string    `json:"identity"`          // the pattern asked for
	Trust         TrustInfo `json:"trust"`
	Time          TimeInfo  `json:"time"`
	// AsIf is set when the whole was judged as if it were that time: what it
	// says holds for then, and says nothing of now.
	AsIf      time.Time        `json:"as_if,omitzero"`
	Links     []LinkResult     `json:"links"`
	Artifacts []ArtifactResult `json:"artifacts"`
	// Checkpoints are the largest tree seen of each known log: give them to the
	// next verification as Seen.
	Checkpoints []SeenCheckpoint `json:"checkpoints"`
	// Checks concern the whole: trust.json and artifacts. A link's own are in it.
	Checks []attest.Check `json:"checks"`
}

// TrustAccepted says whether trust.json was found good, whatever became of the
// links: then it is worth remembering.
func (r *Result) TrustAccepted() bool {
	for _, c := range r.Checks {
		if strings.HasPrefix(c.ID, "trust.") && c.Outcome != attest.Passed {
			return false
		}
	}
	return true
}

// Failure says why a verdict is "refused".
type Failure struct {
	Class   string `json:"class"`          // "cryptographic" or "policy"
	Check   string `json:"check"`          // ID of the first failed check
	Link    string `json:"link,omitempty"` // name of the link it is about
	Message string `json:"message"`
}

// TrustInfo names the trust.json that was used.
type TrustInfo struct {
	TrustDomain string    `json:"trust_domain"`
	Serial      uint64    `json:"serial"`
	Expires     time.Time `json:"expires"`
	Operator    string    `json:"operator"`
	Digest      string    `json:"digest,omitempty"` // of the signed document
	SignedBy    []string  `json:"signed_by"`        // fingerprints of keys
	// FirstUse: the key was neither pinned nor seen before.
	FirstUse bool `json:"first_use,omitempty"`
}

// TimeInfo is the time T at which certificates were judged, the latest one
// where several links have their own; each link's is in it.
type TimeInfo struct {
	At       time.Time `json:"at"`
	Attested bool      `json:"attested"` // of every link; false: the verifier's own clock
	Source   string    `json:"source"`
}

// of takes the time from links, unless the clock had to stand in for one.
func (t *TimeInfo) of(links []LinkResult) {
	if len(links) == 0 || slices.ContainsFunc(links, func(l LinkResult) bool { return !l.Time.Attested }) {
		return
	}
	last := slices.MaxFunc(links, func(a, b LinkResult) int { return a.Time.At.Compare(b.Time.At) })
	*t = TimeInfo{At: last.Time.At, Attested: true, Source: last.Time.summary()}
}

// ArtifactResult says which links have an artifact among their subjects.
type ArtifactResult struct {
	Artifact
	Matches []Match `json:"matches"`
}

// Match is one subject with an artifact's digest, or for a directory whose
// files are subjects what their names begin with.
type Match struct {
	Link    string `json:"link"`
	Subject string `json:"subject"`
	Files   int    `json:"files,omitempty"` // matched one by one
}

// LinkResult is what was found about one link. Fields below Verdict hold what
// had been established when the first check failed, nothing more.
type LinkResult struct {
	Name    string `json:"name"`
	Verdict string `json:"verdict"`
	// Chain is the way from the statement to the TPM maker, filled as far as
	// checks passed.
	Chain Chain    `json:"chain"`
	Time  LinkTime `json:"time"`
	// Evidence is the kind, one of the Evidence… constants, and EvidenceMeans
	// what it is worth.
	Evidence      string   `json:"evidence,omitempty"`
	EvidenceMeans string   `json:"evidence_means,omitempty"`
	Tier          string   `json:"tier,omitempty"`
	SoftwareTPM   bool     `json:"software_tpm"`
	ProvedByTPM   []string `json:"proved_by_tpm"`
	SaidBy        []Said   `json:"said_by_recorder"`
	TakenOnWordOf []Word   `json:"taken_on_word_of"`

	Checks []attest.Check `json:"checks"`

	// Failure is this link's first; Result.Failure is that of all.
	Failure *Failure `json:"failure,omitempty"`

	stmt *Statement // once its signature was checked
}

// Said is one thing that only the recorder says.
type Said struct {
	What  string `json:"what"`
	Value string `json:"value"`
}

// Word is one thing that somebody's word is taken for.
type Word struct {
	What string `json:"what"`
	Who  string `json:"who"`
	// SameOperator: the same organisation also runs the SVID authority.
	SameOperator bool `json:"same_operator_as_svid_authority,omitempty"`
}

// Chain holds its links from the statement down to the maker's root. A nil
// member was not established.
type Chain struct {
	Statement *StatementInfo `json:"link,omitempty"`
	SVID      *SVIDInfo      `json:"svid,omitempty"`
	Programs  *ProgramsInfo  `json:"programs,omitempty"`
	Quote     *QuoteInfo     `json:"quote,omitempty"`
	AK        *AKInfo        `json:"ak,omitempty"`
	EK        *EKInfo        `json:"ek,omitempty"`
	Maker     *MakerInfo     `json:"maker_root,omitempty"`
	Detached  *DetachedInfo  `json:"detached,omitempty"`
	Parent    *ParentInfo    `json:"parent,omitempty"`
}

// StatementInfo is the signed statement, as the recorder said it.
type StatementInfo struct {
	PredicateType string     `json:"predicate_type"`
	Step          string     `json:"step"` // of a link, as all below it but the subjects
	Command       []string   `json:"command"`
	PayloadSHA256 string     `json:"payload_sha256"` // of the DSSE pre-authentication encoding
	Subjects      []Resource `json:"subjects"`
	Materials     int        `json:"materials"`
	ExitCode      *int       `json:"exit_code,omitempty"`
	Git           *Git       `json:"git,omitempty"`
	Started       time.Time  `json:"started,omitzero"`
	Finished      time.Time  `json:"finished,omitzero"`
}

// SVIDInfo is the signer's certificate and the authority that issued it.
type SVIDInfo struct {
	SPIFFEID     string    `json:"spiffe_id"`
	KeySHA256    string    `json:"key_sha256"`
	NotBefore    time.Time `json:"not_before"`
	NotAfter     time.Time `json:"not_after"`
	Authority    string    `json:"authority"`
	AuthorityKey string    `json:"authority_key_sha256"`
}

// ProgramsInfo is what the agent measured and the TPM committed to.
type ProgramsInfo struct {
	Executable        string   `json:"executable_sha256"` // holds the key
	Tool              string   `json:"tool_sha256"`
	Tools             []string `json:"tools_sha256"` // every main program of the step
	Recorder          string   `json:"recorder_sha256"`
	RecorderProtected bool     `json:"recorder_protected"`
	Selectors         []string `json:"selectors"`
}

// QuoteInfo is the TPM's quote and the boot state in it.
type QuoteInfo struct {
	NonceTime       time.Time                    `json:"nonce_time,omitzero"` // zero but of leaf evidence
	ResetCount      uint32                       `json:"reset_count"`
	RestartCount    uint32                       `json:"restart_count"`
	Safe            bool                         `json:"safe"`
	FirmwareVersion uint64                       `json:"firmware_version"`
	PCRs            map[string]map[string]string `json:"pcrs"`
	Policy          *PolicyInfo                  `json:"pcr_policy,omitempty"` // the one that was met
	SecureBoot      *bool                        `json:"secure_boot,omitempty"`
	EventLog        string                       `json:"event_log,omitempty"` // digest that the evidence names
}

// PolicyInfo names a PCR policy revision and its profile.
type PolicyInfo struct {
	Name     string `json:"name"`
	Revision uint64 `json:"revision"`
	Profile  string `json:"profile"`
}

// AKInfo is the key that signed the quote.
type AKInfo struct {
	Name         string    `json:"name"` // TPM name, hex
	CertifiedBy  string    `json:"certified_by"`
	CAKeySHA256  string    `json:"ca_key_sha256"`
	NotBefore    time.Time `json:"certificate_not_before"`
	NotAfter     time.Time `json:"certificate_not_after"`
	Manufacturer string    `json:"tpm_manufacturer"`
	Firmware     string    `json:"tpm_firmware"`
	Software     bool      `json:"software_tpm"`
}

// EKInfo is the TPM's own identity.
type EKInfo struct {
	SHA256 string `json:"sha256"` // of its SubjectPublicKeyInfo
	Basis  string `json:"basis"`  // "maker" or "allow_list"
	Host   string `json:"host,omitempty"`
}

// MakerInfo is the TPM maker's root certificate.
type MakerInfo struct {
	Subject string `json:"subject"`
	SHA256  string `json:"sha256"` // of the certificate
}
