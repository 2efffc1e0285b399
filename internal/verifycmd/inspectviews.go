package verifycmd

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/google/go-tpm/tpm2"
	rekorv1 "github.com/sigstore/protobuf-specs/gen/pb-go/rekor/v1"

	"github.com/rootlink/rootlink/pkg/attest"
	"github.com/rootlink/rootlink/pkg/link"
	"github.com/rootlink/rootlink/pkg/timestamp"
	"github.com/rootlink/rootlink/pkg/tlog"
)

func certificateView(c *x509.Certificate) (v view) {
	var uris []string
	for _, u := range c.URIs {
		uris = append(uris, u.String())
	}
	v.add("spiffe_id", strings.Join(uris, " "))
	v.addIf("subject", c.Subject.String())
	v.add("issuer", c.Issuer.String())
	v.add("serial", c.SerialNumber.Text(16))
	v.add("key_sha256", hash(c.RawSubjectPublicKeyInfo))
	v.add("not_before", stamp(c.NotBefore))
	v.add("not_after", stamp(c.NotAfter))
	var usage []string
	for _, u := range c.ExtKeyUsage {
		usage = append(usage, map[x509.ExtKeyUsage]string{
			x509.ExtKeyUsageServerAuth: "serverAuth", x509.ExtKeyUsageClientAuth: "clientAuth", x509.ExtKeyUsageCodeSigning: "codeSigning",
		}[u])
	}
	v.add("extended_key_usage", strings.Join(usage, " "))
	v.add("size", fmt.Sprintf("%d bytes", len(c.Raw)))
	return v
}

func evidenceView(e *attest.Evidence) (v view) {
	kind := map[attest.Kind]string{attest.KindLeaf: "leaf", attest.KindDetached: "detached"}[e.Kind]
	v.add("kind", kind)
	v.add("key_made_by", map[attest.KeyOrigin]string{attest.OriginCaller: "caller", attest.OriginAgent: "agent"}[e.KeyOrigin])
	v.add("executable", hex.EncodeToString(e.Executable[:]))
	v.add("recorder", hex.EncodeToString(e.Recorder[:]))
	v.add("tool", hex.EncodeToString(e.Tool[:]))
	v.add("payload", hex.EncodeToString(e.Payload[:]))
	v.add("selectors", e.Selectors)
	if e.Kind == attest.KindDetached {
		v.add("nonce", hex.EncodeToString(e.Nonce[:])) // SHA-256 of the SVID
	} else {
		v.add("nonce_time", attest.NonceTime(e.Nonce).UTC().Format(time.RFC3339Nano))
	}
	v.add("agent_key", hex.EncodeToString(e.AgentKey[:]))
	v.add("leaf", fmt.Sprintf("index %d of %d under the quote", e.Index, e.Size))
	return append(v, nodeView(e)...)
}

// parentView is what the record says, and that it says nothing of the key.
func parentView(p *attest.Parent) (v view) {
	v.add("kind", link.EvidenceParent)
	v.add("means", link.EvidenceMeans(link.EvidenceParent))
	v.add("attested_at", p.AttestedAt.Format(time.RFC3339Nano))
	v.add("agent_key", hex.EncodeToString(p.AgentKey[:]))
	return append(v, nodeView(&attest.Evidence{
		Attest: p.Attest, AKCert: p.AKCert, EKChain: p.EKChain, EKPublic: p.EKPublic, PCRs: p.PCRs,
		Policy: p.Policy, EventLog: p.EventLog, IMALog: p.IMALog,
	})...)
}

// nodeView is what every kind of evidence says of the machine.
func nodeView(e *attest.Evidence) (v view) {
	v.add("quote", quoteView(e))
	for _, b := range e.PCRs {
		var p view
		for _, i := range slices.Sorted(maps.Keys(b.Values)) {
			p.add(fmt.Sprint(i), hex.EncodeToString(b.Values[i]))
		}
		v.add("pcrs_"+b.Bank, p)
	}
	if p := e.Policy; p != nil {
		v.add("pcr_policy_said_by_server", fmt.Sprintf("%s revision %d %s:%x", p.Name, p.Revision, p.Digest.Alg, p.Digest.Value))
	}
	if d := e.EventLog; d != nil {
		v.add("event_log", fmt.Sprintf("%s:%x", d.Alg, d.Value))
	}
	if d := e.IMALog; d != nil {
		v.add("ima_log", fmt.Sprintf("%s:%x", d.Alg, d.Value))
	}
	v.add("ak", akView(e))
	v.add("ek", ekView(e))
	return v
}

// detachedView is what a detached record has beside its evidence.
func detachedView(d *attest.Detached) (v view) {
	for i, der := range d.AgentSVID {
		name := "agent_svid"
		if i > 0 {
			name = fmt.Sprintf("intermediate_%d", i)
		}
		c, err := x509.ParseCertificate(der)
		if err != nil {
			v.add(name, err.Error())
			continue
		}
		v.add(name, certificateView(c))
	}
	v.add("signed", len(d.Signature) > 0)
	if len(d.Token) > 0 {
		t, err := timestamp.Parse(d.Token)
		if err != nil {
			v.add("timestamp", err.Error())
			return v
		}
		signer := t.UnverifiedSigner()
		v.add("timestamp", stamp(t.UnverifiedTime())+" by certificate sha256:"+hex.EncodeToString(signer[:]))
	}
	return v
}

func quoteView(e *attest.Evidence) (v view) {
	a, err := tpm2.Unmarshal[tpm2.TPMSAttest](e.Attest)
	if err != nil {
		v.add("error", err.Error())
		return v
	}
	v.add("type", fmt.Sprintf("0x%04x", uint16(a.Type)))
	v.add("extra_data", hex.EncodeToString(a.ExtraData.Buffer))
	v.add("reset_count", a.ClockInfo.ResetCount)
	v.add("restart_count", a.ClockInfo.RestartCount)
	v.add("clock_ms", a.ClockInfo.Clock)
	v.add("safe", bool(a.ClockInfo.Safe))
	v.add("firmware_version", fmt.Sprintf("0x%016x", a.FirmwareVersion))
	if q, err := a.Attested.Quote(); err == nil {
		v.add("pcr_digest", hex.EncodeToString(q.PCRDigest.Buffer))
	}
	return v
}

func akView(e *attest.Evidence) (v view) {
	c, err := x509.ParseCertificate(e.AKCert)
	if err != nil {
		v.add("error", err.Error())
		return v
	}
	v.add("certified_by", c.Issuer.String())
	v.add("not_before", stamp(c.NotBefore))
	v.add("not_after", stamp(c.NotAfter))
	s, err := attest.ParseAKCertificate(c)
	if err != nil {
		v.add("error", err.Error())
		return v
	}
	v.add("name", hex.EncodeToString(s.AKName))
	v.add("ek", hex.EncodeToString(s.EKHash[:]))
	v.add("ek_basis", s.EKBasis)
	v.add("manufacturer", s.Manufacturer)
	v.add("firmware", s.Firmware)
	v.add("software_tpm", s.Software)
	if b := s.Boot; b != nil {
		v.add("boot", fmt.Sprintf("reset %d, restart %d", b.Reset, b.Restart))
	}
	return v
}

func ekView(e *attest.Evidence) (v view) {
	if len(e.EKChain) == 0 {
		v.add("sha256", hash(e.EKPublic))
		return v
	}
	c, err := x509.ParseCertificate(e.EKChain[0])
	if err != nil {
		v.add("error", err.Error())
		return v
	}
	v.add("sha256", hash(c.RawSubjectPublicKeyInfo))
	v.add("issuer", c.Issuer.String())
	v.add("chain", fmt.Sprintf("%d certificates", len(e.EKChain)))
	return v
}

// proofView is an entry of a transparency log.
func proofView(e *rekorv1.TransparencyLogEntry) (v view) {
	p := e.GetInclusionProof()
	v.add("log", tlog.UnverifiedOrigin([]byte(p.GetCheckpoint().GetEnvelope())))
	v.add("log_id", hex.EncodeToString(e.GetLogId().GetKeyId()))
	v.add("index", e.GetLogIndex())
	v.add("tree_size", p.GetTreeSize())
	v.add("root", hex.EncodeToString(p.GetRootHash()))
	b, err := tlog.ParseBody(e.GetCanonicalizedBody())
	if err != nil {
		v.add("error", err.Error())
		return v
	}
	v.add("digest", hex.EncodeToString(b.Digest[:]))
	v.add("signed_by", b.Certificate.Subject.String())
	v.add("key_sha256", hash(b.Certificate.RawSubjectPublicKeyInfo))
	return v
}

func trustView(t *link.Trust) (v view) {
	f := t.File()
	v.add("trust_domain", f.TrustDomain)
	v.add("serial", f.Serial)
	v.add("issued", stamp(f.Issued))
	v.add("expires", stamp(f.Expires))
	var authorities []view
	for _, a := range t.Authorities() {
		one := view{{"subject", a.Certificate.Subject.String()}, {"key_sha256", hash(a.Certificate.RawSubjectPublicKeyInfo)}, {"from", stamp(a.Start)}}
		if !a.End.IsZero() {
			one.add("to", stamp(a.End))
		}
		authorities = append(authorities, one)
	}
	v.add("svid_authorities", authorities)
	var cas []string
	for _, ca := range f.AttestationCAs {
		if c, err := x509.ParseCertificate(ca.Certificate); err == nil {
			cas = append(cas, c.Subject.String()+" "+hash(c.RawSubjectPublicKeyInfo))
		}
	}
	v.add("attestation_cas", cas)
	v.add("operator", cmp.Or(f.Operator, f.TrustDomain))
	v.add("authorities_needed", f.Time.AuthoritiesNeeded)
	var tsas, logs, witnesses []string
	root := t.TrustedRoot()
	for _, a := range root.Timestamps {
		tsas = append(tsas, strings.TrimSpace(fmt.Sprintf("%s from %s %s", cmp.Or(a.URI, a.Chain[len(a.Chain)-1].Subject.String()), stamp(a.Start), a.Operator)))
	}
	for _, l := range root.Logs {
		logs = append(logs, strings.TrimSpace(fmt.Sprintf("%s id %x %s", l.Origin, l.ID, l.Operator)))
	}
	for _, w := range f.Witnesses {
		witnesses = append(witnesses, strings.TrimSpace(w.Key+" "+w.Operator))
	}
	v.add("timestamp_authorities", tsas)
	v.add("logs", logs)
	v.add("witnesses", witnesses)
	v.add("log_proofs", len(f.LogProofs))
	v.add("ek_roots", len(f.EK.Roots))
	v.add("ek_intermediates", len(f.EK.Intermediates))
	v.add("ek_allow", f.EK.Allow)
	v.add("ek_deny", f.EK.Deny)
	var hosts []string
	for _, ek := range slices.Sorted(maps.Keys(f.EK.Inventory)) {
		hosts = append(hosts, ek+" "+f.EK.Inventory[ek])
	}
	v.add("inventory", hosts)
	var policies []string
	for i := range f.PCRPolicies {
		p := &f.PCRPolicies[i]
		ended := ""
		if !p.Replaced.IsZero() {
			ended = ", replaced " + stamp(p.Replaced)
		}
		policies = append(policies, fmt.Sprintf("%s revision %d, %d profiles%s", p.Name, p.Revision, len(p.Profiles), ended))
	}
	v.add("pcr_policies", policies)
	v.add("layout_keys", len(f.LayoutKeys))
	var rules []view
	for _, r := range f.Requirements {
		one := view{{"identity", r.Identity}}
		one.addIf("evidence", r.Evidence)
		one.addIf("tier", r.Tier)
		for _, l := range []struct {
			name string
			list []string
		}{{"tools", r.Tools}, {"recorders", r.Recorders}, {"unprotected_recorders", r.UnprotectedRecorders}, {"eks", r.EKs}, {"pcr_policies", r.PCRPolicies}, {"steps", r.Steps}, {"executables", r.Executables}, {"logged", r.Logged}, {"types", r.Types}} {
			if len(l.list) > 0 {
				one.add(l.name, l.list)
			}
		}
		if r.CachesPerJob {
			one.add("caches_per_job", true)
		}
		rules = append(rules, one)
	}
	v.add("requirements", rules)
	var revoked []string
	for _, r := range f.Revocations {
		when := "always"
		if r.From != nil {
			when = "from " + stamp(*r.From)
		}
		revoked = append(revoked, strings.TrimSpace(fmt.Sprintf("%s %s %s %s", r.Kind, r.ID, when, r.Reason)))
	}
	v.add("revocations", revoked)
	return v
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }

func hash(b []byte) string {
	h := sha256.Sum256(b)
	return hex.EncodeToString(h[:])
}

func digests(set map[string]string) string {
	var b bytes.Buffer
	for i, alg := range slices.Sorted(maps.Keys(set)) {
		if i > 0 {
			b.WriteByte(' ')
		}
		b.WriteString(alg + ":" + set[alg])
	}
	return b.String()
}
