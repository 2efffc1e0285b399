package attest

import (
	"crypto/x509"
	"time"
)

// Outcome of one check.
type Outcome string

const (
	Passed Outcome = "passed"
	Failed Outcome = "failed"
	NotRun Outcome = "not_run"
)

// Check is one line of a verification report. Every check that could run is
// listed, also after a failure (then NotRun).
type Check struct {
	ID      string  `json:"id"`     // stable, e.g. "quote.signature"
	Clause  string  `json:"clause"` // e.g. "TPM 2.0 Part 2 §10.12.8", "evidence.md §3"
	Outcome Outcome `json:"outcome"`
	Detail  string  `json:"detail,omitempty"`
}

// EKRoots is what decides whether an EK is genuine.
type EKRoots struct {
	Roots         []*x509.Certificate
	Intermediates []*x509.Certificate
	Allow         map[[32]byte]bool // SHA-256 of EK SPKI DER
	Deny          map[[32]byte]bool
}

// Revoked answers revocation questions; a nil func means nothing is revoked.
// kind is "ek", "ak", "attestation_ca" or "executable"; id is lower-case hex
// (SPKI SHA-256; for an AK the hex of its TPM name).
type Revoked func(kind, id string, at time.Time) bool

// Binding is what the evidence must be bound to, known from elsewhere.
type Binding struct {
	TrustDomain   string
	SPIFFEID      string
	SVIDKey       [32]byte  // SHA-256 of SPKI DER of the certificate or CSR
	AgentKey      *[32]byte // the server knows it from mTLS; nil offline
	EKHash        *[32]byte // the server knows it from the agent ID; nil offline
	Payload       *[32]byte // the verifier knows the statement; nil at the server
	SVIDNotBefore time.Time // zero at the server, which has not yet signed
	At            time.Time // T of §4.4; at the server the time of issuance
}

// Options are the trust that Verify takes as given.
type Options struct {
	AttestationCAs []*x509.Certificate
	EK             EKRoots
	Revoked        Revoked
	RequiredPCRs   []PCRSelection             // must be selected by the quote; at least one
	CheckNonce     func(nonce [32]byte) error // server: NonceMaker.Check; offline: nil, the times of §4.4 bound it
	EventLog       []byte                     // optional: replayed when given, must match the record's digest
}

// PCRSelection is a set of PCRs of one bank.
type PCRSelection struct {
	Bank    string
	Indices []uint32
}

// Verified is evidence that passed Verify. It has no exported fields and no
// other maker.
type Verified struct {
	leaf   Leaf
	ek     EK
	ak     AK
	quote  Quote
	pcrs   []PCRBank
	secure *bool
}

// Verify runs every check of §4.3 and §4.4 that needs no server state, top
// down. The report holds each check's outcome, also on failure.
func Verify(e *Evidence, b Binding, o Options) (*Verified, []Check, error) {
	return nil, nil, errNotImplemented
}

func (v *Verified) Leaf() Leaf           { return v.leaf }
func (v *Verified) EK() EK               { return v.ek }
func (v *Verified) AK() AK               { return v.ak }
func (v *Verified) Quote() Quote         { return v.quote }
func (v *Verified) PCRs() []PCRBank      { return v.pcrs }
func (v *Verified) NonceTime() time.Time { return NonceTime(v.leaf.Nonce) }

// SecureBoot returns the claim that the replayed event log proves, nil when no
// log was given or it proves nothing.
func (v *Verified) SecureBoot() *bool { return v.secure }

// Quote is the part of a checked TPMS_ATTEST that policies look at.
type Quote struct {
	ResetCount      uint32
	RestartCount    uint32
	Clock           uint64 // ms
	Safe            bool
	FirmwareVersion uint64
	Selection       []PCRSelection
	DigestAlg       string
	Digest          []byte // as recomputed from the values
	ExtraData       []byte
}

// EK is an endorsement key that passed VerifyEK or that an AK certificate names.
type EK struct {
	Hash     [32]byte // SHA-256 of SPKI DER: the node's identity
	Public   any      // *ecdsa.PublicKey or *rsa.PublicKey; nil when known by hash only
	Basis    string   // "maker" or "allow_list"
	RootHash [32]byte // SHA-256 of the maker root certificate; zero for allow_list
	Root     *x509.Certificate
}

// AK is an attestation key that passed VerifyAK or that an AK certificate names.
type AK struct {
	Name         []byte // TPM name: u16 nameAlg ‖ digest
	Public       any    // *ecdsa.PublicKey or *rsa.PublicKey
	Manufacturer string // TPM_PT_MANUFACTURER as ASCII; what the TPM says it is
	Firmware     string
	Software     bool // swtpm and known virtual TPMs
}

// VerifyEK decides whether an EK is genuine: chain to a maker root at time at
// (critical extensions understood, key sizes, ROCA, EKU), or on the allow-list;
// the deny-list wins. public is TPMT_PUBLIC as the agent sent it and must be
// the certificate's key.
func VerifyEK(chain [][]byte, public []byte, r EKRoots, at time.Time) (*EK, error) {
	return nil, errNotImplemented
}

// VerifyAK checks an AK's public area (restricted, fixedTPM, fixedParent,
// sensitiveDataOrigin, sign, not decrypt, a signing scheme that is not NULL),
// that its creation data was certified by itself under an endorsement-hierarchy
// parent, and returns it.
func VerifyAK(public, creationData, creationAttest, creationSignature []byte) (*AK, error) {
	return nil, errNotImplemented
}

// MakeCredential seals secret to (ek, ak name) for TPM2_ActivateCredential.
func MakeCredential(ekPublic []byte, akName, secret []byte) (blob, encryptedSecret []byte, err error) {
	return nil, nil, errNotImplemented
}

// VerifyQuote checks magic, type, exact length, signature, extraData, that the
// selection covers required, and that the digest is that of the values.
func VerifyQuote(attest, signature []byte, ak *AK, extraData [32]byte, pcrs []PCRBank, required []PCRSelection) (*Quote, error) {
	return nil, errNotImplemented
}

// EventLogClaims is what a replayed boot event log proves.
type EventLogClaims struct {
	SecureBoot *bool // nil when the log proves neither
	Replayed   []uint32
}

// ReplayEventLog replays log to the quoted PCR values of the strongest bank.
// Every PCR it speaks for needs at least one event or its reset value.
func ReplayEventLog(log []byte, pcrs []PCRBank) (*EventLogClaims, error) {
	return nil, errNotImplemented
}
