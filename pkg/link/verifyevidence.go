package link

import (
	"cmp"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/rootlink/rootlink/pkg/attest"
)

func (v *linkVerifier) requirementMatch() (string, error) {
	for i := range v.trust.requirements {
		if r := &v.trust.requirements[i]; MatchPattern(r.Identity, v.id.String()) {
			v.req = r
			return r.Identity, nil
		}
	}
	return "", fmt.Errorf("no requirement in trust.json matches %s", v.id)
}

// codeSigning: our server grants this usage only together with the evidence it
// verified in the same transaction. Another server knows of neither: without
// evidence inside, an SVID may have any usages that SPIFFE allows (X509-SVID, 4.4).
func (v *linkVerifier) codeSigning() (string, error) {
	if v.evidence == nil || v.kind != EvidenceLeaf {
		return "", errSkip
	}
	if !slices.Contains(v.leaf.ExtKeyUsage, x509.ExtKeyUsageCodeSigning) {
		return "", errors.New("the SVID lacks extended key usage codeSigning: it was not issued for signing")
	}
	return "extended key usage codeSigning", nil
}

func (v *linkVerifier) evidenceVerify() (string, error) {
	if v.evidence == nil && v.parent == nil {
		return "", errSkip
	}
	pcrs := func() []attest.PCRBank {
		if v.parent != nil {
			return v.parent.PCRs
		}
		return v.evidence.PCRs
	}()
	options := attest.Options{
		AttestationCAs: v.trust.attestCAs,
		EK:             v.trust.ek,
		RequiredPCRs:   []attest.PCRSelection{{Bank: quotedBank(pcrs), Indices: bootPCRs}},
		EventLog:       v.in.EventLog,
		Signatures:     v.trust.signatures,
	}
	var verified *attest.Verified
	var checks []attest.Check
	var err error
	switch v.kind {
	case EvidenceLeaf:
		verified, checks, err = v.verifyLeaf(options)
	case EvidenceDetached:
		verified, checks, err = v.verifyDetached(options)
	case EvidenceParent:
		checks, err = v.verifyParent(options)
	default:
		err = fmt.Errorf("%s evidence: %w", v.kind, ErrUnsupported)
	}
	for i := range checks {
		// Revocations are policy, and judged as one check of their own.
		if strings.HasSuffix(checks[i].ID, ".revocation") && checks[i].Outcome == attest.NotRun {
			checks[i].Detail = "judged under revocation"
		}
		checks[i].ID = "attest." + checks[i].ID
	}
	v.sub = checks
	if err != nil {
		return "", err
	}
	if v.kind == EvidenceParent {
		v.describe()
		return "attested by AK " + hex.EncodeToString(v.node.AK().Name) + ", which committed to no workload key", nil
	}
	v.verified, v.node = verified, verified
	v.describe()
	return "committed to by AK " + hex.EncodeToString(verified.AK().Name), nil
}

func (v *linkVerifier) verifyLeaf(o attest.Options) (*attest.Verified, []attest.Check, error) {
	payload := v.bundle.payloadDigest()
	return attest.Verify(v.evidence, attest.Binding{
		TrustDomain:   v.trust.TrustDomain(),
		SPIFFEID:      v.id.String(),
		SVIDKey:       spkiHash(v.leaf),
		Payload:       &payload,
		SVIDNotBefore: v.leaf.NotBefore,
		At:            v.at,
	}, o)
}

// bootPCRs must be in every quote: firmware, its configuration, the boot
// loader and Secure Boot. What values they need is up to the PCR policies.
var bootPCRs = []uint32{0, 1, 2, 3, 4, 5, 6, 7}

// quotedBank is the bank that bootPCRs are wanted of: the first that is not
// SHA-1, which alone is never enough.
func quotedBank(pcrs []attest.PCRBank) string {
	for _, b := range pcrs {
		if b.Bank != "sha1" {
			return b.Bank
		}
	}
	return "sha256"
}

// programsMeasured reads the committed selectors. The leaf names the last main
// program and the recorder; the selectors name every one, and say whether the
// recorder was out of its user's reach.
func (v *linkVerifier) programsMeasured() (string, error) {
	if v.verified == nil {
		return "", errSkip
	}
	l := v.verified.Leaf()
	// A SPIRE agent makes the keys of its workloads. What it vouches for is one
	// statement all the same, and the result says who had the key.
	if l.KeyOrigin != attest.OriginCaller && v.kind != EvidenceDetached {
		return "", errors.New("the key was not made by the process that signs")
	}
	var recorders, unprotected []string
	for _, s := range l.Selectors {
		if h, ok := strings.CutPrefix(s, attest.SelectorTool); ok {
			v.tools = append(v.tools, h)
		} else if h, ok := strings.CutPrefix(s, attest.SelectorRecorder); ok {
			recorders = append(recorders, h)
		} else if h, ok := strings.CutPrefix(s, attest.SelectorUnprotectedRecorder); ok {
			unprotected = append(unprotected, h)
		}
	}
	tool, recorder := hex.EncodeToString(l.Tool[:]), hex.EncodeToString(l.Recorder[:])
	if l.Tool == ([32]byte{}) || !slices.Contains(v.tools, tool) {
		return "", errors.New("the tool was not measured")
	}
	if l.Recorder == ([32]byte{}) || len(recorders)+len(unprotected) != 1 || !slices.Contains(append(recorders, unprotected...), recorder) {
		return "", errors.New("the recorder was not measured, or not as one thing")
	}
	v.protected = len(recorders) == 1
	v.out.Chain.Programs = &ProgramsInfo{
		Executable: hex.EncodeToString(l.Executable[:]), Tool: tool, Tools: v.tools,
		Recorder: recorder, RecorderProtected: v.protected, Selectors: l.Selectors,
	}
	return fmt.Sprintf("tool %s, recorder %s", short(tool), short(recorder)), nil
}

// notRevoked judges at the nonce's time and at T: either is enough to refuse.
func (v *linkVerifier) notRevoked() (string, error) {
	times := []time.Time{v.at}
	ids := [][2]string{{RevokedAuthority, hexHash(spkiHash(v.authority.Certificate))}}
	if v.node != nil {
		times = append(times, v.spokenAt())
		ids = append(ids,
			[2]string{RevokedEK, hexHash(v.node.EK().Hash)},
			[2]string{RevokedAK, hex.EncodeToString(v.node.AK().Name)},
			[2]string{RevokedAttestationCA, v.out.Chain.AK.CAKeySHA256},
		)
	}
	if v.verified != nil {
		l := v.verified.Leaf()
		for _, c := range v.verified.AgentChain() {
			ids = append(ids, [2]string{RevokedAuthority, hexHash(spkiHash(c))})
		}
		ids = append(ids,
			[2]string{RevokedExecutable, hexHash(l.Executable)},
			[2]string{RevokedExecutable, hexHash(l.Recorder)},
			[2]string{RevokedExecutable, hexHash(l.Tool)},
		)
		for _, t := range v.tools {
			ids = append(ids, [2]string{RevokedExecutable, t})
		}
	}
	// What the recorder says it ran besides is no proof, and still reason enough.
	if v.stmt != nil {
		for _, e := range v.stmt.Byproducts.Executables {
			ids = append(ids, [2]string{RevokedExecutable, e.Digest["sha256"]})
		}
	}
	for _, id := range ids {
		for _, at := range times {
			if r, yes := v.trust.revoked(id[0], id[1], at); yes {
				return "", revokedError(r)
			}
		}
	}
	return fmt.Sprintf("%d revocations, none applies", v.trust.countRevocations()), nil
}

func revokedError(r Revocation) error {
	when := "always"
	if r.From != nil {
		when = "from " + stamp(*r.From)
	}
	if r.Reason != "" {
		when += ": " + r.Reason
	}
	return fmt.Errorf("%s %s is revoked (%s)", strings.ReplaceAll(r.Kind, "_", " "), r.ID, when)
}

func (v *linkVerifier) requiredEK() (string, error) {
	if v.req == nil || v.node == nil || len(v.req.EKs) == 0 {
		return "", errSkip
	}
	ek := hexHash(v.node.EK().Hash)
	if !slices.Contains(v.req.EKs, ek) {
		return "", fmt.Errorf("EK %s is not among the %d that %s may use", ek, len(v.req.EKs), v.req.Identity)
	}
	return ek, nil
}

func (v *linkVerifier) requiredTools() (string, error) {
	if v.req == nil || v.verified == nil {
		return "", errSkip
	}
	for _, t := range v.tools {
		if !allows(v.req.Tools, t) {
			return "", fmt.Errorf("tool %s is not allowed for %s", t, v.req.Identity)
		}
	}
	return fmt.Sprintf("%d measured, all allowed", len(v.tools)), nil
}

func (v *linkVerifier) requiredRecorder() (string, error) {
	if v.req == nil || v.verified == nil {
		return "", errSkip
	}
	r := v.out.Chain.Programs.Recorder
	if v.protected {
		if !allows(v.req.Recorders, r) && !allows(v.req.UnprotectedRecorders, r) {
			return "", fmt.Errorf("recorder %s is not allowed for %s", r, v.req.Identity)
		}
		return "protected", nil
	}
	if !allows(v.req.UnprotectedRecorders, r) {
		return "", fmt.Errorf("recorder %s was unprotected: any process of its user could have spoken in its name", r)
	}
	return "UNPROTECTED, and accepted by the requirement", nil
}

func allows(list []string, hash string) bool {
	return slices.Contains(list, hash) || slices.Contains(list, AnyHash)
}

// requiredPCRs judges the values in the evidence, which the quote's digest
// covers, not what the server said about them.
func (v *linkVerifier) requiredPCRs() (string, error) {
	if v.req == nil || v.node == nil || len(v.req.PCRPolicies) == 0 {
		return "", errSkip
	}
	var reasons []error
	for _, name := range v.req.PCRPolicies {
		revisions := slices.Clone(v.trust.policies[name])
		slices.SortFunc(revisions, func(a, b PCRPolicy) int { return cmp.Compare(b.Revision, a.Revision) })
		for i := range revisions {
			p := &revisions[i]
			profile, err := p.match(v.node, v.spokenAt())
			if err != nil {
				reasons = append(reasons, err)
				continue
			}
			v.out.Chain.Quote.Policy = &PolicyInfo{Name: name, Revision: p.Revision, Profile: profile}
			v.out.Tier = TierBootAttested
			return fmt.Sprintf("%s revision %d, profile %s", name, p.Revision, profile), nil
		}
	}
	return "", fmt.Errorf("the machine's boot state meets none of the PCR policies asked for: %w", errors.Join(reasons...))
}

// match judges at the time of the quote: for leaf evidence the nonce's, which
// the server that keeps the policies chose itself. Without an end to old revisions, whoever boots what was taken
// out of the policy, and has the server's keys, is back in it.
func (p *PCRPolicy) match(e nodeEvidence, at time.Time) (profile string, err error) {
	if !p.Replaced.IsZero() && at.After(p.Replaced.Add(replacedGrace)) {
		return "", fmt.Errorf("PCR policy %s (revision %d) was replaced at %s, before the time of the evidence %s", p.Name, p.Revision, stamp(p.Replaced), stamp(at))
	}
	return p.Match(e.PCRs(), at)
}

// replacedGrace is for servers of one trust domain whose clocks differ.
const replacedGrace = 10 * time.Second

func (v *linkVerifier) requiredTier() (string, error) {
	if v.req == nil || v.node == nil {
		return "", errSkip
	}
	switch v.req.Tier {
	case TierTPM:
	case TierBootAttested:
		if v.out.Tier != TierBootAttested {
			return "", errors.New("the boot state was not attested")
		}
	default:
		return "", fmt.Errorf("tier %s: %w", v.req.Tier, ErrUnsupported)
	}
	return fmt.Sprintf("%s, at least %s", v.out.Tier, v.req.Tier), nil
}

func (v *linkVerifier) requiredStep() (string, error) {
	if v.req == nil || v.stmt == nil || len(v.req.Steps) == 0 {
		return "", errSkip
	}
	if !slices.Contains(v.req.Steps, v.stmt.Step) {
		return "", fmt.Errorf("%s may not sign step %q", v.req.Identity, v.stmt.Step)
	}
	return v.stmt.Step, nil
}

// policyClaim compares what the server said it matched with what its revision
// really asks. A revision that trust.json does not know decides nothing.
func (v *linkVerifier) policyClaim() (string, error) {
	if v.node == nil || v.node.Policy() == nil {
		return "", errSkip
	}
	claim := v.node.Policy()
	for _, p := range v.trust.policies[claim.Name] {
		if p.Revision != claim.Revision {
			continue
		}
		digest := p.Digest()
		if claim.Digest.Alg != "sha256" || string(claim.Digest.Value) != string(digest[:]) {
			return "", fmt.Errorf("the server matched another PCR policy %q revision %d than trust.json holds", claim.Name, claim.Revision)
		}
		if _, err := p.match(v.node, v.spokenAt()); err != nil {
			return "", fmt.Errorf("the server says PCR policy %q revision %d was met: %w", claim.Name, claim.Revision, err)
		}
		return fmt.Sprintf("%s revision %d, as the server said", claim.Name, claim.Revision), nil
	}
	return fmt.Sprintf("%s revision %d is not in trust.json: not relied upon", claim.Name, claim.Revision), nil
}

func (v *linkVerifier) inInventory() (string, error) {
	if v.node == nil || v.trust.file.EK.Inventory == nil {
		return "", errSkip
	}
	ek := hexHash(v.node.EK().Hash)
	host, ok := v.trust.file.EK.Inventory[ek]
	if !ok {
		return "", fmt.Errorf("EK %s is not in the inventory", ek)
	}
	v.out.Chain.EK.Host = host
	return host, nil
}

// describe fills in the chain from what was proved.
func (v *linkVerifier) describe() {
	q, ak, ek := v.node.Quote(), v.node.AK(), v.node.EK()
	akCert, log := []byte(nil), (*attest.TypedDigest)(nil)
	quote := &QuoteInfo{
		ResetCount: q.ResetCount, RestartCount: q.RestartCount,
		Safe: q.Safe, FirmwareVersion: q.FirmwareVersion, PCRs: map[string]map[string]string{}, SecureBoot: v.node.SecureBoot(),
	}
	if v.parent != nil {
		akCert, log = v.parent.AKCert, v.parent.EventLog
	} else {
		akCert, log = v.evidence.AKCert, v.evidence.EventLog
		quote.NonceTime = v.verified.NonceTime().UTC()
	}
	for _, b := range v.node.PCRs() {
		quote.PCRs[b.Bank] = map[string]string{}
		for i, value := range b.Values {
			quote.PCRs[b.Bank][strconv.FormatUint(uint64(i), 10)] = hex.EncodeToString(value)
		}
	}
	if log != nil {
		quote.EventLog = log.Alg + ":" + hex.EncodeToString(log.Value)
	}
	v.out.Chain.Quote = quote
	info := &AKInfo{Name: hex.EncodeToString(ak.Name), Manufacturer: ak.Manufacturer, Firmware: ak.Firmware, Software: ak.Software}
	if c, err := x509.ParseCertificate(akCert); err == nil {
		info.NotBefore, info.NotAfter = c.NotBefore.UTC(), c.NotAfter.UTC()
		v.ak, v.akIssuer = c, v.attestationCA(c)
		if ca := v.akIssuer; ca != nil {
			info.CertifiedBy, info.CAKeySHA256 = ca.Subject.String(), hexHash(spkiHash(ca))
		}
	}
	v.out.Chain.AK = info
	v.out.Chain.EK = &EKInfo{SHA256: hexHash(ek.Hash), Basis: ek.Basis}
	if ek.Root != nil {
		sum := sha256.Sum256(ek.Root.Raw)
		v.out.Chain.Maker = &MakerInfo{Subject: ek.Root.Subject.String(), SHA256: hex.EncodeToString(sum[:])}
	}
	v.out.SoftwareTPM = ak.Software
	v.out.Tier = TierTPM
	v.out.Evidence, v.out.EvidenceMeans = v.kind, EvidenceMeans(v.kind)
	if v.detached != nil {
		v.describeDetached()
	}
}

func (v *linkVerifier) attestationCA(ak *x509.Certificate) *x509.Certificate {
	for _, ca := range v.trust.attestCAs {
		// By name first: what is not signed is not remembered, and old CAs stay listed.
		if string(ca.RawSubject) == string(ak.RawIssuer) && v.trust.signatures.SignedBy(ak, ca) == nil {
			return ca
		}
	}
	return nil
}
