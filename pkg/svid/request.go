package svid

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/rootlink/rootlink/pkg/attest"
)

// Profile is a kind of SVID.
type Profile uint8

const (
	Workload Profile = iota + 1 // Workload API, evidence optional
	Issuer                      // signs one statement: codeSigning, evidence mandatory
	Minted                      // made by an administrator, never with evidence
	Agent
	Server
)

// String is the profile in words, for errors and logs.
func (p Profile) String() string {
	names := [...]string{Workload: "workload", Issuer: "issuer", Minted: "minted", Agent: "agent", Server: "server"}
	if p == 0 || int(p) >= len(names) {
		return "unknown"
	}
	return names[p]
}

// Limits on requests.
const (
	MaxDNSNames = 64
	MaxRSABits  = 4096
)

// Evidence is a record that was verified in this very transaction, and the
// verdict. Neither is of use without the other: the verdict has no maker but
// attest.Verify, and the record is what goes into the certificate.
type Evidence struct {
	Record   *attest.Evidence
	Verified *attest.Verified
}

// Parent is what the node of the agent that asks attested with, as it was
// verified in this very transaction, and the PCR policy that the server matched
// (nil for none). It is no evidence about the SVID's key.
type Parent struct {
	Verified *attest.VerifiedParent
	Policy   *attest.PolicyRef
}

// Request asks for one SVID.
type Request struct {
	Profile   Profile
	ID        spiffeid.ID
	PublicKey crypto.PublicKey
	SPKI      []byte // DER of PublicKey as the CSR has it
	DNSNames  []string
	TTL       time.Duration
	Evidence  *Evidence
	Parent    *Parent // of a workload SVID without Evidence only
	// Composed is what is added for a deployment's own ends; nil for nothing.
	Composed *Composed
	Now      time.Time
}

// Subject is the subject of the SVID when none is composed.
func (r *Request) Subject() pkix.Name {
	if len(r.DNSNames) > 0 && len(r.DNSNames[0]) <= 64 {
		return pkix.Name{CommonName: r.DNSNames[0]} // as SPIRE does, for peers that read nothing else
	}
	return pkix.Name{}
}

// checkRequest holds a request against the rules of its profile.
func checkRequest(r *Request, td spiffeid.TrustDomain) error {
	if r.Now.IsZero() {
		return fmt.Errorf("%w: no time", ErrRequest)
	}
	if r.TTL <= 0 {
		return fmt.Errorf("%w: TTL of %v", ErrRequest, r.TTL)
	}
	if err := checkID(r, td); err != nil {
		return err
	}
	if err := checkKey(r); err != nil {
		return err
	}
	if len(r.DNSNames) > MaxDNSNames {
		return fmt.Errorf("%w: %d DNS names, at most %d allowed", ErrRequest, len(r.DNSNames), MaxDNSNames)
	}
	for _, n := range r.DNSNames {
		if err := CheckDNSName(n); err != nil {
			return fmt.Errorf("%w: %w", ErrRequest, err)
		}
	}
	if err := checkComposed(r); err != nil {
		return err
	}
	return checkEvidence(r, td)
}

// checkID: X509-SVID §2 and §3.1. A leaf has a path; the paths below /spire/
// belong to the server and to agents, so that nobody becomes one by an entry.
func checkID(r *Request, td spiffeid.TrustDomain) error {
	if r.ID.IsZero() || r.ID.TrustDomain() != td {
		return fmt.Errorf("%w: %q is not in trust domain %q", ErrRequest, r.ID, td.Name())
	}
	path := r.ID.Path()
	if path == "" {
		return fmt.Errorf("%w: %q has no path: it names the trust domain itself", ErrRequest, r.ID)
	}
	switch r.Profile {
	case Workload, Issuer, Minted:
		if Reserved(r.ID) {
			return fmt.Errorf("%w: %q: paths below /spire/ are reserved", ErrRequest, r.ID)
		}
	case Agent:
		if !strings.HasPrefix(path, "/spire/agent/") {
			return fmt.Errorf("%w: %q is not an agent's ID", ErrRequest, r.ID)
		}
	case Server:
		if path != "/spire/server" {
			return fmt.Errorf("%w: %q is not the server's ID", ErrRequest, r.ID)
		}
	default:
		return fmt.Errorf("%w: profile %d", ErrRequest, r.Profile)
	}
	return nil
}

// Reserved reports whether id is the server's, an agent's or may become one.
func Reserved(id spiffeid.ID) bool {
	return id.Path() == "/spire" || strings.HasPrefix(id.Path(), "/spire/")
}

func checkKey(r *Request) error {
	switch k := r.PublicKey.(type) {
	case *ecdsa.PublicKey:
		if k.Curve == elliptic.P256() || k.Curve == elliptic.P384() && r.Profile != Issuer {
			return nil
		}
	case *rsa.PublicKey:
		// A stock agent may be configured for RSA workload keys.
		if n := k.N.BitLen(); r.Profile != Issuer && n >= 2048 && n <= MaxRSABits && k.E >= 3 {
			return nil
		}
	}
	want := "ECDSA P-256, P-384 or RSA of 2048 to 4096 bits"
	if r.Profile == Issuer {
		want = "ECDSA P-256" // what Sigstore bundles are verified with
	}
	return fmt.Errorf("%w: the key of a %s SVID is %s", ErrRequest, r.Profile, want)
}

// checkEvidence ties the verdict to this request. The server has done so
// already; it is checked again here because codeSigning depends on it.
func checkEvidence(r *Request, td spiffeid.TrustDomain) error {
	e := r.Evidence
	if p := r.Parent; p != nil && (r.Profile != Workload || e != nil || p.Verified == nil) {
		return fmt.Errorf("%w: parent evidence goes, verified, into workload SVIDs that carry no other", ErrEvidence)
	}
	if e == nil {
		if r.Profile == Issuer {
			return fmt.Errorf("%w: an issuer SVID needs evidence", ErrEvidence)
		}
		return nil
	}
	if r.Profile != Issuer && r.Profile != Workload {
		return fmt.Errorf("%w: a %s SVID carries none", ErrEvidence, r.Profile)
	}
	if e.Record == nil || e.Verified == nil {
		return fmt.Errorf("%w: it is not verified", ErrEvidence)
	}
	leaf := e.Verified.Leaf()
	verified, err := leaf.Hash()
	if err != nil {
		return fmt.Errorf("%w: %w", ErrEvidence, err)
	}
	embedded, err := e.Record.Leaf(td.Name(), r.ID.String(), KeyHash(r.SPKI)).Hash()
	if err != nil {
		return fmt.Errorf("%w: %w", ErrEvidence, err)
	}
	if verified != embedded {
		return fmt.Errorf("%w: what was verified is of another SVID", ErrEvidence)
	}
	var zero [32]byte
	switch {
	case leaf.Kind != attest.KindLeaf:
		return fmt.Errorf("%w: kind %d does not go into an SVID", ErrEvidence, leaf.Kind)
	case r.Profile == Issuer && (leaf.Payload == zero || leaf.Tool == zero || leaf.Recorder == zero || leaf.KeyOrigin != attest.OriginCaller):
		return fmt.Errorf("%w: an issuer SVID needs statement, tool, recorder and the caller's own key", ErrEvidence)
	case r.Profile == Workload && (leaf.Payload != zero || leaf.KeyOrigin != attest.OriginAgent):
		return fmt.Errorf("%w: a workload SVID signs no statement", ErrEvidence)
	}
	return nil
}

// CheckDNSName fails on anything but a DNS name, whose first label may be "*".
func CheckDNSName(name string) error {
	if len(name) == 0 || len(name) > 253 {
		return fmt.Errorf("DNS name of %d bytes", len(name))
	}
	for i, label := range strings.Split(name, ".") {
		if label == "*" && i == 0 && len(name) > 1 {
			continue
		}
		if len(label) == 0 || len(label) > 63 || label[0] == '-' || label[len(label)-1] == '-' {
			return fmt.Errorf("DNS name %q: bad label %q", name, label)
		}
		for _, c := range []byte(label) {
			if !(c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '-' || c == '_') {
				return fmt.Errorf("DNS name %q: bad label %q", name, label)
			}
		}
	}
	return nil
}

// usages: serverAuth and clientAuth always (X509-SVID §4.4); codeSigning says
// that hardware evidence for one statement was verified.
func (p Profile) usages() []x509.ExtKeyUsage {
	u := []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
	if p == Issuer {
		u = append(u, x509.ExtKeyUsageCodeSigning)
	}
	return u
}
