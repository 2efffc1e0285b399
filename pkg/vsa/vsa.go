// Package vsa writes SLSA verification summaries: one signed line for people
// and tools who take a verifier's word instead of verifying themselves.
package vsa

import (
	"crypto"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/rootlink/rootlink/pkg/envelope"
	"github.com/rootlink/rootlink/pkg/link"
)

// PredicateType is that of a SLSA verification summary, version 1.
const PredicateType = "https://slsa.dev/verification_summary/v1"

// slsaVersion is the edition of the specification that the predicate follows.
const slsaVersion = "1.1"

// Levels of our own, as the specification allows beside SLSA_…. Rootlink
// measures tiers of hardware evidence, and no SLSA level follows from them.
const (
	levelPrefix   = "ROOTLINK_TIER_"
	LevelSoftware = "ROOTLINK_SOFTWARE_TPM" // in place of a tier: no hardware was proved
)

var (
	// ErrRefused: only a verification that passed has a summary.
	ErrRefused = errors.New("not verified")
	// ErrNothing: no artifact was compared, so there is nothing to summarise.
	ErrNothing = errors.New("no artifact was verified")
	// ErrOption: an option that the summary cannot be written with.
	ErrOption = errors.New("not usable in a verification summary")
)

// Options say who verified what under which name. All but Version and Levels
// are needed.
type Options struct {
	VerifierID  string            // URI of whoever runs the verifier
	Version     map[string]string // component → version
	ResourceURI string            // what the artifacts are, to whoever fetches them
	Policy      Document          // what was demanded: the layout, or trust.json
	Inputs      []Document        // the bundles
	Levels      []string          // further levels that the verifier's operator vouches for
	Time        time.Time
}

// Document is a file that went into the verification.
type Document struct {
	URI    string
	SHA256 [32]byte
}

// Digest names a document by its content.
func Digest(uri string, content []byte) Document {
	return Document{URI: uri, SHA256: sha256.Sum256(content)}
}

type predicate struct {
	Verifier          verifier   `json:"verifier"`
	TimeVerified      time.Time  `json:"timeVerified"`
	ResourceURI       string     `json:"resourceUri"`
	Policy            resource   `json:"policy"`
	InputAttestations []resource `json:"inputAttestations"`
	Result            string     `json:"verificationResult"`
	Levels            []string   `json:"verifiedLevels"`
	SLSAVersion       string     `json:"slsaVersion"`
}

type verifier struct {
	ID      string            `json:"id"`
	Version map[string]string `json:"version,omitempty"`
}

type resource struct {
	URI    string            `json:"uri,omitempty"`
	Digest map[string]string `json:"digest"`
}

// New summarises r, whose artifacts become the subjects.
func New(r *link.Result, o Options) (*link.Attestation, error) {
	if r.Verdict != link.VerdictVerified {
		return nil, fmt.Errorf("%w: a summary says PASSED or is not written", ErrRefused)
	}
	if len(r.Artifacts) == 0 {
		return nil, ErrNothing
	}
	for what, uri := range map[string]string{"verifier ID": o.VerifierID, "resource URI": o.ResourceURI} {
		if u, err := url.Parse(uri); err != nil || !u.IsAbs() {
			return nil, fmt.Errorf("%s %q is no absolute URI: %w", what, uri, ErrOption)
		}
	}
	if o.Time.IsZero() || o.Policy.SHA256 == [32]byte{} || len(o.Inputs) == 0 {
		return nil, fmt.Errorf("without a time, a policy or bundles: %w", ErrOption)
	}
	levels, err := levels(r, o.Levels)
	if err != nil {
		return nil, err
	}
	p := predicate{
		Verifier: verifier{ID: o.VerifierID, Version: maps.Clone(o.Version)}, TimeVerified: o.Time.UTC().Truncate(time.Second),
		ResourceURI: o.ResourceURI, Policy: o.Policy.resource(), Result: "PASSED", Levels: levels, SLSAVersion: slsaVersion,
	}
	for _, d := range o.Inputs {
		p.InputAttestations = append(p.InputAttestations, d.resource())
	}
	raw, err := json.Marshal(p)
	if err != nil {
		return nil, err
	}
	a := &link.Attestation{Type: PredicateType, Predicate: raw}
	for _, art := range r.Artifacts {
		if len(art.Matches) == 0 || len(art.Digest) == 0 {
			return nil, fmt.Errorf("%s has no digest of its own: %w", art.Name, ErrNothing)
		}
		a.Subjects = append(a.Subjects, link.Resource{Name: art.Name, Digest: maps.Clone(art.Digest)})
	}
	return a, a.Validate()
}

func (d Document) resource() resource {
	return resource{URI: d.URI, Digest: map[string]string{"sha256": hex.EncodeToString(d.SHA256[:])}}
}

var levelForm = sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile(`^[A-Z][A-Z0-9_]{0,127}$`) })

// levels are what every link reached: the least tier of all.
func levels(r *link.Result, more []string) ([]string, error) {
	order := []string{link.TierTPM, link.TierBootAttested, link.TierMeasuredImage, link.TierKernelWitnessed}
	least := len(order)
	software, weakest := false, 0
	for _, l := range r.Links {
		i := slices.Index(order, l.Tier)
		if i < 0 {
			return nil, fmt.Errorf("tier %q: %w", l.Tier, ErrOption)
		}
		least, software = min(least, i), software || l.SoftwareTPM
		if weakest = max(weakest, slices.Index(link.EvidenceKinds(), l.Evidence)); !slices.Contains(link.EvidenceKinds(), l.Evidence) {
			return nil, fmt.Errorf("evidence of kind %q: %w", l.Evidence, ErrOption)
		}
	}
	var out []string
	switch {
	case least == len(order):
		return nil, fmt.Errorf("no link: %w", ErrNothing)
	case software:
		out = append(out, LevelSoftware)
	case link.EvidenceKinds()[weakest] != link.EvidenceLeaf:
		// The same tier is worth less where no server checked it, and whoever reads
		// the summary sees nothing else of that: no policy for the others takes it.
		out = append(out, "ROOTLINK_"+strings.ToUpper(link.EvidenceKinds()[weakest]+"_TIER_"+order[least]))
	default:
		out = append(out, levelPrefix+strings.ToUpper(order[least]))
	}
	for _, l := range more {
		if !levelForm().MatchString(l) || strings.HasPrefix(l, "ROOTLINK_") {
			return nil, fmt.Errorf("level %q: %w", l, ErrOption)
		}
		out = append(out, l)
	}
	return out, nil
}

// Sign puts a summary in a DSSE envelope.
func Sign(a *link.Attestation, key crypto.Signer) ([]byte, error) {
	payload, err := a.Marshal()
	if err != nil {
		return nil, err
	}
	return envelope.Sign(link.PayloadType, payload, key)
}
