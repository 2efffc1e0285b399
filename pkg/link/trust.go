package link

import (
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	rekorv1 "github.com/sigstore/protobuf-specs/gen/pb-go/rekor/v1"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/rootlink/rootlink/pkg/attest"
	"github.com/rootlink/rootlink/pkg/envelope"
	"github.com/rootlink/rootlink/pkg/tlog"
)

// Trust is a trust.json that is well-formed and consistent. OpenTrust reads one
// that is signed; NewTrust makes one that the caller vouches for.
type Trust struct {
	file         TrustFile
	td           spiffeid.TrustDomain
	root         TrustedRoot
	authorities  []Authority // of root
	witnesses    []tlog.Witness
	logProofs    []*rekorv1.TransparencyLogEntry
	attestCAs    []*x509.Certificate
	ek           attest.EKRoots
	layoutKeys   []any
	policies     map[string][]PCRPolicy // by name
	requirements []Requirement
	revocations  map[thing][]Revocation // in the files' order
	trustKeys    []crypto.PublicKey
	trustKeyIDs  []string // their fingerprints
	signers      []string // those that signed
	digest       string   // hex SHA-256 of the document

	// What is true for good of bytes that many links share. Neither remembers
	// anything about times, lists or revocations.
	signatures *attest.Signatures
	proofs     *proofMemory
}

// ParseUnsignedTrust decodes the document in trust.json, whoever signed it.
// Unknown and duplicate keys are errors.
func ParseUnsignedTrust(b []byte) (*Trust, error) {
	var f TrustFile
	if err := decodeStrict(b, MaxTrust, "trusted_root log_proofs", &f); err != nil {
		return nil, fmt.Errorf("trust.json: %w", err)
	}
	t, err := NewTrust(f)
	if err != nil {
		return nil, err
	}
	t.digest = digestOf(b)
	return t, nil
}

// NewTrust validates f.
func NewTrust(f TrustFile) (*Trust, error) {
	t := &Trust{file: f, policies: map[string][]PCRPolicy{}, signatures: attest.NewSignatures(), proofs: newProofMemory()}
	if f.Format != TrustFormat || f.Version != FormatVersion {
		return nil, fmt.Errorf("trust.json: %w", malformed("format %q version %d, want %q version %d", f.Format, f.Version, TrustFormat, FormatVersion))
	}
	for _, step := range []func() error{
		t.readHead, t.readTrustKeys, t.readAuthorities, t.readTime, t.readEKs, t.readPolicies, t.readLayoutKeys, t.readRequirements,
	} {
		if err := step(); err != nil {
			return nil, fmt.Errorf("trust.json: %w", err)
		}
	}
	if err := validateRevocations(f.Revocations); err != nil {
		return nil, fmt.Errorf("trust.json: %w", err)
	}
	t.revoke(f.Revocations)
	return t, nil
}

// Serial rises with each file that a server writes.
func (t *Trust) Serial() uint64 { return t.file.Serial }

// Issued is when the file was written.
func (t *Trust) Issued() time.Time { return t.file.Issued }

// Expires is when the file may no longer be used.
func (t *Trust) Expires() time.Time { return t.file.Expires }

// TrustDomain is the name of the trust domain that the file is about.
func (t *Trust) TrustDomain() string { return t.td.Name() }

// Authorities returns the SVID authorities with their windows.
func (t *Trust) Authorities() []Authority { return t.authorities }

// File returns the file that t was made of.
func (t *Trust) File() TrustFile { return t.file }

// CheckSerial fails with ErrRolledBack when least, the highest serial the
// caller has seen, is higher: an attacker who serves an old trust.json brings
// back what has been revoked since.
func (t *Trust) CheckSerial(least uint64) error {
	if t.file.Serial < least {
		return fmt.Errorf("%w: trust.json has serial %d, %d was seen before", ErrRolledBack, t.file.Serial, least)
	}
	return nil
}

// extend adds r's revocations.
func (t *Trust) extend(r RevocationsFile) (*Trust, error) {
	if r.TrustDomain != t.td.Name() {
		return nil, fmt.Errorf("revocations: %w", malformed("they are of trust domain %q, trust.json is of %q", r.TrustDomain, t.td.Name()))
	}
	// An older file than trust.json is likely the wrong one: the person who
	// named it believes in revocations that it does not hold.
	if r.Issued.Before(t.file.Issued) {
		return nil, fmt.Errorf("revocations: %w: issued %s, before trust.json (%s)", ErrRolledBack, r.Issued.Format(time.RFC3339), t.file.Issued.Format(time.RFC3339))
	}
	out := *t
	out.revoke(r.Revocations)
	return &out, nil
}

func (r RevocationsFile) validate() error {
	if r.Format != RevocationsFormat || r.Version != FormatVersion {
		return malformed("format %q version %d, want %q version %d", r.Format, r.Version, RevocationsFormat, FormatVersion)
	}
	if r.Issued.IsZero() {
		return malformed("no time of issue")
	}
	return validateRevocations(r.Revocations)
}

func (t *Trust) readHead() (err error) {
	f := t.file
	t.td, err = spiffeid.TrustDomainFromString(f.TrustDomain)
	if err != nil || t.td.Name() != f.TrustDomain {
		return malformed("trust domain %q", f.TrustDomain)
	}
	if f.Issued.IsZero() || f.Expires.IsZero() || !f.Expires.After(f.Issued) {
		return malformed("it must expire after it was issued (%s, %s)", f.Issued, f.Expires)
	}
	return nil
}

func (t *Trust) readAuthorities() (err error) {
	if t.root, err = ParseTrustedRoot(t.file.TrustedRoot); err != nil {
		return err
	}
	t.authorities = t.root.Authorities
	for _, a := range t.authorities {
		for _, u := range a.Certificate.URIs {
			if u.String() != t.td.IDString() {
				return malformed("SVID authority %q is of %s, not of trust domain %s", a.Certificate.Subject, u, t.td)
			}
		}
	}
	signers := t.svidSigners()
	cas := t.file.AttestationCAs
	if len(cas) == 0 || len(cas) > MaxCAs {
		return malformed("%d attestation CAs, 1 to %d allowed", len(cas), MaxCAs)
	}
	for i, ca := range cas {
		c, err := x509.ParseCertificate(ca.Certificate)
		if err != nil {
			return malformed("attestation CA %d: %w", i, err)
		}
		if !c.BasicConstraintsValid || !c.IsCA {
			return malformed("attestation CA %d (%s) is not a CA", i, c.Subject)
		}
		// One key in both roles could invent hardware for the SVIDs it signs.
		if signers[spkiHash(c)] {
			return malformed("attestation CA %d is also an SVID authority", i)
		}
		t.attestCAs = append(t.attestCAs, c)
	}
	return nil
}

// svidSigners are the keys of SVID authorities: there may be thousands, and
// nothing may compare all with all.
func (t *Trust) svidSigners() map[[32]byte]bool {
	out := make(map[[32]byte]bool, len(t.authorities))
	for _, a := range t.authorities {
		out[spkiHash(a.Certificate)] = true
	}
	return out
}

func (t *Trust) readEKs() (err error) {
	f := t.file.EK
	if t.ek.Roots, err = parseCerts("EK root", f.Roots); err != nil {
		return err
	}
	if t.ek.Intermediates, err = parseCerts("EK intermediate", f.Intermediates); err != nil {
		return err
	}
	if t.ek.Allow, err = hashSet("ek.allow", f.Allow); err != nil {
		return err
	}
	if t.ek.Deny, err = hashSet("ek.deny", f.Deny); err != nil {
		return err
	}
	if len(f.Roots) == 0 && len(f.Allow) == 0 {
		return malformed("neither ek.roots nor ek.allow: no TPM could be genuine")
	}
	for h := range f.Inventory {
		if _, err := parseHash(h); err != nil {
			return fmt.Errorf("ek.inventory: %w", err)
		}
	}
	return nil
}

func (t *Trust) readPolicies() error {
	if len(t.file.PCRPolicies) > MaxPolicies {
		return malformed("%d PCR policies, at most %d allowed", len(t.file.PCRPolicies), MaxPolicies)
	}
	for _, p := range t.file.PCRPolicies {
		if err := p.Validate(); err != nil {
			return malformed("PCR policy %q: %w", p.Name, err)
		}
		for _, q := range t.policies[p.Name] {
			if q.Revision == p.Revision {
				return malformed("PCR policy %q has revision %d twice", p.Name, p.Revision)
			}
		}
		t.policies[p.Name] = append(t.policies[p.Name], p)
	}
	return nil
}

func (t *Trust) readLayoutKeys() error {
	for i, k := range t.file.LayoutKeys {
		pub, err := x509.ParsePKIXPublicKey(k.Key)
		if err != nil {
			return malformed("layout key %d (%s): %w", i, k.Name, err)
		}
		// One that cannot sign a layout would count for nothing in silence.
		if err := envelope.CheckKey(pub); err != nil {
			return malformed("layout key %d (%s): %w", i, k.Name, err)
		}
		t.layoutKeys = append(t.layoutKeys, pub)
	}
	return nil
}

func (t *Trust) readRequirements() error {
	if len(t.file.Requirements) > MaxRequirements {
		return malformed("%d requirements, at most %d allowed", len(t.file.Requirements), MaxRequirements)
	}
	for i, r := range t.file.Requirements {
		r, err := t.readRequirement(r)
		if err != nil {
			return fmt.Errorf("requirement %d (%s): %w", i, r.Identity, err)
		}
		t.requirements = append(t.requirements, r)
	}
	return nil
}

// readRequirement returns r with its defaults filled in.
func (t *Trust) readRequirement(r Requirement) (Requirement, error) {
	if err := ValidatePattern(r.Identity); err != nil {
		return r, err
	}
	if td, _, _ := splitPattern(r.Identity); td != t.td.Name() {
		return r, malformed("it is not of trust domain %s", t.td)
	}
	if r.Evidence == "" {
		r.Evidence = EvidenceLeaf
	}
	if !slices.Contains(EvidenceKinds(), r.Evidence) {
		return r, malformed("unknown evidence kind %q", r.Evidence)
	}
	if r.Evidence == EvidenceDetached {
		if err := r.checkMapping(); err != nil {
			return r, malformed("evidence %q: %w", r.Evidence, err)
		}
	}
	if r.Evidence == EvidenceParent {
		if err := r.checkPrograms(); err != nil {
			return r, malformed("evidence %q: %w", r.Evidence, err)
		}
	}
	if r.Tier == "" {
		r.Tier = TierBootAttested
	}
	switch r.Tier {
	case TierTPM:
	case TierBootAttested, TierMeasuredImage, TierKernelWitnessed:
		if len(r.PCRPolicies) == 0 {
			return r, malformed("tier %s needs pcr_policies (tier %q judges no boot state)", r.Tier, TierTPM)
		}
	default:
		return r, malformed("unknown tier %q", r.Tier)
	}
	if len(r.Tools) == 0 {
		return r, malformed("no tools (%q allows any)", AnyHash)
	}
	if len(r.Recorders) == 0 && len(r.UnprotectedRecorders) == 0 {
		return r, malformed("neither recorders nor unprotected_recorders (%q allows any)", AnyHash)
	}
	for _, list := range [][]string{r.Tools, r.Recorders, r.UnprotectedRecorders} {
		for _, h := range list {
			if _, err := parseHash(h); err != nil && h != AnyHash {
				return r, err
			}
		}
	}
	if err := r.validateRan(); err != nil {
		return r, err
	}
	if err := r.validateLogged(); err != nil {
		return r, err
	}
	if len(r.Types) > MaxTypes {
		return r, malformed("%d predicate types, at most %d allowed", len(r.Types), MaxTypes)
	}
	for _, uri := range r.Types {
		if err := ValidatePredicateType(uri); err != nil {
			return r, err
		}
	}
	for _, h := range r.EKs {
		if _, err := parseHash(h); err != nil {
			return r, err
		}
	}
	for _, name := range r.PCRPolicies {
		if len(t.policies[name]) == 0 {
			return r, malformed("PCR policy %q is not in pcr_policies", name)
		}
	}
	return r, nil
}

func validateRevocations(rs []Revocation) error {
	if len(rs) > MaxIDs {
		return malformed("%d revocations, at most %d allowed", len(rs), MaxIDs)
	}
	for i, r := range rs {
		switch r.Kind {
		case RevokedAK:
			// A TPM name: u16 algorithm and a digest of at most 64 bytes.
			if b, err := hex.DecodeString(r.ID); err != nil || len(b) < 22 || len(b) > 66 || !isLowerHex(r.ID) {
				return malformed("revocation %d: %q is not a TPM name", i, r.ID)
			}
		case RevokedEK, RevokedAttestationCA, RevokedAuthority, RevokedExecutable:
			if _, err := parseHash(r.ID); err != nil {
				return fmt.Errorf("revocation %d: %w", i, err)
			}
		default:
			// Skipping it would bring back what somebody meant to revoke.
			return malformed("revocation %d of unknown kind %q", i, r.Kind)
		}
		if (r.From != nil) == r.Always {
			return malformed("revocation %d needs exactly one of from and always", i)
		}
	}
	return nil
}

// thing is what can be revoked. A link may name 16,384 executables and a file
// 65,536 revocations: nothing may compare all with all.
type thing struct{ kind, id string }

func (t *Trust) revoke(rs []Revocation) {
	more := map[thing][]Revocation{}
	for _, r := range rs {
		x := thing{r.Kind, r.ID}
		more[x] = append(more[x], r)
	}
	all := make(map[thing][]Revocation, len(t.revocations)+len(more))
	maps.Copy(all, t.revocations) // which a copy of t holds, too
	for x, rs := range more {
		all[x] = append(slices.Clip(all[x]), rs...)
	}
	t.revocations = all
}

// revoked says whether something is revoked at a time.
func (t *Trust) revoked(kind, id string, at time.Time) (Revocation, bool) {
	for _, r := range t.revocations[thing{kind, id}] {
		if r.Always || !at.Before(*r.From) {
			return r, true
		}
	}
	return Revocation{}, false
}

func (t *Trust) countRevocations() (n int) {
	for _, rs := range t.revocations {
		n += len(rs)
	}
	return n
}

// IsTrust says whether b looks like trust.json, signed or not, for commands that
// take any file.
func IsTrust(b []byte) bool {
	kind, _, _, err := Document(b)
	return err == nil && kind == KindTrust
}

// IsBundle says whether b looks like a Sigstore bundle of any version.
func IsBundle(b []byte) bool {
	var head struct {
		MediaType string `json:"mediaType"`
	}
	return json.Unmarshal(b, &head) == nil && strings.HasPrefix(head.MediaType, "application/vnd.dev.sigstore.bundle")
}

// IsStatement says whether b looks like a bare in-toto statement, of which
// nobody has signed anything.
func IsStatement(b []byte) bool {
	var head struct {
		Type string `json:"_type"`
	}
	return json.Unmarshal(b, &head) == nil && strings.HasPrefix(head.Type, "https://in-toto.io/Statement/")
}

func parseCerts(what string, ders [][]byte) ([]*x509.Certificate, error) {
	if len(ders) > MaxCAs {
		return nil, malformed("%d %ss, at most %d allowed", len(ders), what, MaxCAs)
	}
	var out []*x509.Certificate
	for i, der := range ders {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, malformed("%s %d: %w", what, i, err)
		}
		out = append(out, c)
	}
	return out, nil
}

func hashSet(what string, list []string) (map[[32]byte]bool, error) {
	if len(list) > MaxIDs {
		return nil, malformed("%s has %d entries, at most %d allowed", what, len(list), MaxIDs)
	}
	out := make(map[[32]byte]bool, len(list))
	for _, s := range list {
		h, err := parseHash(s)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", what, err)
		}
		out[h] = true
	}
	return out, nil
}

var errHash = errors.New("not 64 lower-case hex digits")

func parseHash(s string) (h [32]byte, err error) {
	if len(s) != 64 || !isLowerHex(s) {
		return h, malformed("%q: %w", s, errHash)
	}
	_, err = hex.Decode(h[:], []byte(s))
	return h, err
}

// spkiHash is SHA-256 of a certificate's SubjectPublicKeyInfo.
func spkiHash(c *x509.Certificate) [32]byte { return sha256.Sum256(c.RawSubjectPublicKeyInfo) }

// StateKeys name the lines of trust.json files whose serials grow: the trust
// domain and a key that signed the file. A domain that was set up anew under its
// old name has a new key and starts another line.
//
// The last one is how earlier releases named a line: by the oldest authority. It
// is read still, and does not suffice: a file that lists an older authority began
// a line of its own, and those before it were fresh again in theirs.
func (t *Trust) StateKeys() []string {
	oldest := t.authorities[0]
	for _, a := range t.authorities {
		if a.Certificate.NotBefore.Before(oldest.Certificate.NotBefore) {
			oldest = a
		}
	}
	var keys []string
	for _, id := range t.signers {
		keys = append(keys, t.td.Name()+" key "+id)
	}
	return append(keys, t.td.Name()+" "+hexHash(spkiHash(oldest.Certificate)))
}
