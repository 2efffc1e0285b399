package layout

import (
	"time"

	"github.com/rootlink/rootlink/pkg/attest"
	"github.com/rootlink/rootlink/pkg/link"
)

// ResultSchema is the version of Result's JSON. Fields are added without a new
// version; none is removed or changes its meaning.
const ResultSchema = 1

// Input is what Verify judges.
type Input struct {
	Layout NamedFile
	// Sublayouts are layouts that may stand for steps; one that no step asks
	// for is refused.
	Sublayouts []NamedFile
	Links      []link.LinkInput // bundles
	Classic    []NamedFile      // classic in-toto links, for steps that allow them
	Artifacts  []link.Artifact  // each must be a product, as its last step left it
	// BuildID, when set, leaves out links of other runs and refuses those of none.
	BuildID string
	// LeastSerial is the highest serial of trust.json seen before.
	LeastSerial uint64
	// LeastDigest and TrustKeys are link.Input's.
	LeastDigest string
	TrustKeys   []string
	// Seen is what is remembered of layouts by name.
	Seen map[string]Seen
	// NotBefore, when set, refuses links whose nonce is older.
	NotBefore time.Time
	// Clock is the present when Verify is to judge as if it were another time,
	// which is its now. Zero: now is the present.
	Clock time.Time
	// ArchivedAt is when layout and links were put into an archive, as its
	// timestamp shows: a layout that was in force then may have expired since.
	ArchivedAt time.Time
	// Checkpoints are link.Input's: the trees that logs have shown before.
	Checkpoints []link.SeenCheckpoint
	// Inspect runs an inspection in a place of its own that holds the
	// artifacts. nil: none is run, and a layout that has one is refused unless
	// SkipInspections says that this is known.
	Inspect         func(Inspection) (Inspected, error)
	SkipInspections bool
}

// NamedFile is a file's content.
type NamedFile struct {
	Name string // for messages
	Raw  []byte
}

// Seen is the newest edition of a layout that a verifier has accepted.
type Seen struct {
	Serial uint64 `json:"serial"`
	Digest string `json:"digest"` // of its meaning, hex
}

// Inspected is what an inspection left: file names to hex SHA-256.
type Inspected struct {
	ExitCode            int
	Materials, Products map[string]string
}

// Result is what Verify found, complete also when it refused.
type Result struct {
	SchemaVersion int            `json:"schema_version"`
	Verdict       string         `json:"verdict"`
	Failure       *Failure       `json:"failure,omitempty"` // the first one
	Layouts       []Info         `json:"layouts"`           // the one that was asked for, then sublayouts
	Trust         link.TrustInfo `json:"trust"`
	// AsIf is set when the whole was judged as if it were that time.
	AsIf      time.Time         `json:"as_if,omitzero"`
	Steps     []StepResult      `json:"steps"`
	Links     []link.LinkResult `json:"links"`
	Artifacts []ArtifactResult  `json:"artifacts"`
	// Checkpoints are the largest tree seen of each known log.
	Checkpoints []link.SeenCheckpoint `json:"checkpoints,omitempty"`
	// Checks concern the whole and the steps. A link's own are in it.
	Checks []Check `json:"checks"`
}

// Check is one line of the verifier: which rule, and how it went.
type Check struct {
	attest.Check
	Step string `json:"step,omitempty"` // or inspection
}

// Failure says why a verdict is "refused". What does not apply is empty.
type Failure struct {
	Class   string `json:"class"` // link.ClassCryptographic or link.ClassPolicy
	Check   string `json:"check"`
	Step    string `json:"step,omitempty"`
	Rule    string `json:"rule,omitempty"`
	File    string `json:"file,omitempty"` // the artifact
	Link    string `json:"link,omitempty"`
	Message string `json:"message"`
}

// Info names a layout whose signature was checked.
type Info struct {
	File    string    `json:"file"`
	Name    string    `json:"name"`
	Serial  uint64    `json:"serial"`
	Issued  time.Time `json:"issued"`
	Expires time.Time `json:"expires"`
	Signers []string  `json:"signers"`
	Digest  string    `json:"digest"` // what to remember with the serial
}

// StepResult says who vouched for a step.
type StepResult struct {
	Layout    string   `json:"layout"`
	Name      string   `json:"name"`
	Verdict   string   `json:"verdict"`
	Threshold int      `json:"threshold"`
	Links     []string `json:"links"`      // names of the links that count
	SignedBy  []string `json:"signed_by"`  // distinct SPIFFE IDs, or key:<ID>
	Hosts     []string `json:"hosts"`      // distinct EK hashes
	LeftOut   []string `json:"left_out"`   // links of other builds
	Unproved  bool     `json:"key_pinned"` // by a pinned key: no hardware evidence
	Sublayout string   `json:"sublayout,omitempty"`
	Materials int      `json:"materials"`
	Products  int      `json:"products"`
}

// ArtifactResult says which step made an artifact.
type ArtifactResult struct {
	link.Artifact
	Step    string `json:"step"`
	Subject string `json:"subject"`
	Link    string `json:"link"`
}
