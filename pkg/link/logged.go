package link

import (
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"sync"

	rekorv1 "github.com/sigstore/protobuf-specs/gen/pb-go/rekor/v1"

	"github.com/rootlink/rootlink/pkg/tlog"
)

// What a requirement may want to see in a known log. A server that makes up a
// certificate must log it to be believed, and then it shows.
const (
	LoggedSignature     = "signature"
	LoggedAK            = "ak"
	LoggedAuthority     = "authority"
	LoggedAttestationCA = "attestation_ca"
)

// LogProofName is the name under which the log entry of an AK certificate, in
// DER, lies beside the bundles whose evidence holds the certificate.
func LogProofName(der []byte) string { return "sha256-" + hexHash(sha256.Sum256(der)) + ".tlog.json" }

// SeenCheckpoint is a log's tree as a verifier once saw it.
type SeenCheckpoint struct {
	Origin string `json:"origin"`
	LogID  string `json:"log_id"` // hex
	Size   uint64 `json:"size"`
	Root   string `json:"root"` // hex
}

// checkpoints are all trees seen: log ID → size → root.
type checkpoints map[string]map[uint64]SeenCheckpoint

func newCheckpoints(seen []SeenCheckpoint) checkpoints {
	c := checkpoints{}
	for _, s := range seen {
		c.put(s)
	}
	return c
}

func (c checkpoints) put(s SeenCheckpoint) {
	if c[s.LogID] == nil {
		c[s.LogID] = map[uint64]SeenCheckpoint{}
	}
	c[s.LogID][s.Size] = s
}

// contradict says that c and more hold different trees of one size.
func (c checkpoints) contradict(more checkpoints) bool {
	for id, sizes := range more {
		for size, s := range sizes {
			if old, ok := c[id][size]; ok && old.Root != s.Root {
				return true
			}
		}
	}
	return false
}

func (c checkpoints) merge(more checkpoints) {
	for _, sizes := range more {
		for _, s := range sizes {
			c.put(s)
		}
	}
}

// showTree fails with tlog.ErrFork when another tree of the same size was seen.
func (v *linkVerifier) showTree(got *tlog.Included) error {
	s := SeenCheckpoint{Origin: got.Log.Origin, LogID: fmt.Sprintf("%x", got.Log.ID), Size: got.Size, Root: hexHash(got.Root)}
	one := checkpoints{s.LogID: {s.Size: s}}
	if v.seen.contradict(one) || v.trees.contradict(one) {
		return fmt.Errorf("%w: %s shows two trees of size %d", tlog.ErrFork, s.Origin, s.Size)
	}
	v.trees.put(s)
	return nil
}

// largest is what a verifier should remember of each log.
func (c checkpoints) largest() []SeenCheckpoint {
	out := []SeenCheckpoint{}
	for _, sizes := range c {
		var most SeenCheckpoint
		for _, s := range sizes {
			if s.Size >= most.Size {
				most = s
			}
		}
		out = append(out, most)
	}
	slices.SortFunc(out, func(a, b SeenCheckpoint) int {
		if a.LogID < b.LogID {
			return -1
		}
		return 1
	})
	return out
}

func (r *Requirement) validateLogged() error {
	for _, what := range r.Logged {
		switch what {
		case LoggedSignature, LoggedAK, LoggedAuthority, LoggedAttestationCA:
		default:
			return malformed("logged: unknown %q", what)
		}
	}
	return nil
}

// logProofs verifies the log entries of certificates that came along, wanted or
// not. One that does not verify counts for nothing: it lies beside the bundle,
// where anybody may put it, or is of another certificate.
func (v *linkVerifier) logProofs() (string, error) {
	if v.node == nil {
		return "", errSkip
	}
	ak, ca := v.ak, v.akIssuer
	if ak == nil || ca == nil {
		return "", errors.New("the attestation CA is not in trust.json")
	}
	var beside []*rekorv1.TransparencyLogEntry
	for i, raw := range v.in.LogProofs {
		if i == MaxLogProofs {
			return "", fmt.Errorf("more than %d log entries beside the link", MaxLogProofs)
		}
		if e, err := tlog.ParseEntry(raw); err == nil {
			beside = append(beside, e)
		}
	}
	proofs := 0
	for _, c := range []struct {
		of           string
		cert, issuer *x509.Certificate
		entries      []*rekorv1.TransparencyLogEntry
		verify       verifyProof
	}{
		{LoggedAK, ak, ca, beside, v.trust.verifyProof},
		{LoggedAuthority, v.authority.Certificate, v.authority.Certificate, v.trust.logProofs, v.trust.rememberedProof},
		{LoggedAttestationCA, ca, v.trust.issuerOf(ca), v.trust.logProofs, v.trust.rememberedProof},
	} {
		for _, e := range c.entries {
			got, err := c.verify(e, c.cert, c.issuer)
			if err != nil || got.Log.ValidAt(v.at) != nil {
				continue
			}
			if err := v.includes(c.of, got); err != nil {
				return "", err
			}
			proofs++
		}
	}
	if proofs == 0 {
		return "none came along", errSkip
	}
	return fmt.Sprintf("%d certificates in known logs", proofs), nil
}

type verifyProof func(e *rekorv1.TransparencyLogEntry, cert, issuer *x509.Certificate) (*tlog.Included, error)

func (t *Trust) verifyProof(e *rekorv1.TransparencyLogEntry, cert, issuer *x509.Certificate) (*tlog.Included, error) {
	return tlog.VerifyCertificate(e, cert, issuer, t.root.Logs, t.witnesses)
}

// proofMemory holds what became of the log proofs of a trust.json. Proof,
// certificates, logs and witnesses are all parts of the one file, so the answer
// is the same for every link.
type proofMemory struct {
	mu    sync.Mutex
	known map[proofKey]proofAnswer
}

// proofKey holds parts of one Trust, which nobody changes once it is read.
type proofKey struct {
	entry        *rekorv1.TransparencyLogEntry
	cert, issuer *x509.Certificate
}

type proofAnswer struct {
	got *tlog.Included
	err error
}

// maxKnownProofs bounds the memory: proofs and certificates can be thousands each.
const maxKnownProofs = 1 << 14

func newProofMemory() *proofMemory { return &proofMemory{known: map[proofKey]proofAnswer{}} }

// rememberedProof is verifyProof for an entry and certificates of t itself.
func (t *Trust) rememberedProof(e *rekorv1.TransparencyLogEntry, cert, issuer *x509.Certificate) (*tlog.Included, error) {
	key := proofKey{e, cert, issuer}
	t.proofs.mu.Lock()
	a, ok := t.proofs.known[key]
	t.proofs.mu.Unlock()
	if !ok {
		a.got, a.err = t.verifyProof(e, cert, issuer)
		t.proofs.mu.Lock()
		if len(t.proofs.known) < maxKnownProofs {
			t.proofs.known[key] = a
		}
		t.proofs.mu.Unlock()
	}
	return a.got, a.err
}

// issuerOf is the CA that issued an attestation CA: itself, unless trust.json
// holds another.
func (t *Trust) issuerOf(ca *x509.Certificate) *x509.Certificate {
	for _, c := range t.attestCAs {
		if string(c.RawSubject) == string(ca.RawIssuer) && t.signatures.SignedBy(ca, c) == nil {
			return c
		}
	}
	return ca
}

func (v *linkVerifier) requiredLogged() (string, error) {
	if v.req == nil || len(v.req.Logged) == 0 {
		return "", errSkip
	}
	for _, what := range v.req.Logged {
		if !slices.ContainsFunc(v.time.Logs, func(l LogEntry) bool { return l.Of == what && l.Counted }) {
			return "", fmt.Errorf("%s: %w", loggedName(what), ErrNotLogged)
		}
	}
	return fmt.Sprintf("%v", v.req.Logged), nil
}

func loggedName(what string) string {
	return map[string]string{
		LoggedSignature: "the signature", LoggedAK: "the AK certificate",
		LoggedAuthority: "the SVID authority", LoggedAttestationCA: "the attestation CA",
	}[what]
}
