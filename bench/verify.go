package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"regexp"
	"slices"
	"time"

	"github.com/rootlink/rootlink/bench/figures"
	"github.com/rootlink/rootlink/pkg/attest"
	"github.com/rootlink/rootlink/pkg/link"
)

// judged is a bundle made on the software TPM and what it is judged by.
type judged struct {
	trust  *link.Trust
	input  link.Input
	leaf   *x509.Certificate
	record *attest.Evidence
}

// trust is what the server exports now, by the key that it prints.
func (b *bench) trust(ctx context.Context) (*link.Trust, error) {
	raw, key, err := b.exportTrust(ctx, b.path("trust.json"))
	if err != nil {
		return nil, err
	}
	return link.OpenTrust(raw, []string{key})
}

var fingerprint = regexp.MustCompile(`\b[0-9a-f]{64}\b`)

func (b *bench) judged(ctx context.Context) (*judged, error) {
	if err := b.enrolStep(ctx); err != nil {
		return nil, err
	}
	if _, err := b.runStep(ctx, "--products", "product"); err != nil {
		return nil, err
	}
	j := &judged{}
	var err error
	if j.trust, err = b.trust(ctx); err != nil {
		return nil, err
	}
	bundle, err := os.ReadFile(b.path("step.sigstore.json"))
	if err != nil {
		return nil, err
	}
	j.input = link.Input{Identity: "spiffe://" + trustDomain + stepPath, Links: []link.LinkInput{{Name: "step", Bundle: bundle}}}
	parsed, err := link.ParseBundle(bundle)
	if err != nil {
		return nil, err
	}
	j.leaf = parsed.UnverifiedCertificate()
	j.record, err = attest.FromCertificate(j.leaf)
	return j, err
}

// repeat times n calls of f one by one.
func repeat(n int, f func() error) (figures.Samples, error) {
	var s figures.Samples
	for range n {
		start := time.Now()
		if err := f(); err != nil {
			return nil, err
		}
		s = append(s, time.Since(start))
	}
	return s, nil
}

// verifyCosts: the evidence of a bundle, and the whole bundle.
func verifyCosts(ctx context.Context, b *bench) error {
	j, err := b.judged(ctx)
	if err != nil {
		return err
	}
	x, err := j.record.Extension()
	if err != nil {
		return err
	}
	chain := 0
	for _, c := range j.record.EKChain {
		chain += len(c)
	}
	b.out.Bytes("evidence extension, ECC EK", int64(len(x.Value)), 4<<10,
		fmt.Sprintf("AK certificate %d, EK chain %d, quote and signature %d bytes of it", len(j.record.AKCert), chain, len(j.record.Attest)+len(j.record.Signature)))

	now := time.Now()
	// A Trust remembers what many links share, so the first link of a machine
	// costs more than those that follow.
	var first figures.Samples
	for range 300 {
		raw, err := os.ReadFile(b.path("trust.json"))
		if err != nil {
			return err
		}
		fresh, err := link.OpenUnpinnedTrust(raw)
		if err != nil {
			return err
		}
		start := time.Now()
		if _, err := link.Verify(j.input, fresh, now); err != nil {
			return err
		}
		first = append(first, time.Since(start))
	}
	whole, err := repeat(1000, func() error {
		_, err := link.Verify(j.input, j.trust, now)
		return err
	})
	if err != nil {
		return err
	}
	evidence, err := j.verifyEvidence(now)
	if err != nil {
		return err
	}
	floor, parts, err := j.signatures()
	if err != nil {
		return err
	}
	b.out.Most("verify a bundle, the first of its machine", first, time.Millisecond,
		fmt.Sprintf("its signatures alone (%s, token and log entry not among them): %s", parts, figures.Short(floor)))
	b.out.Most("of it the evidence (attest.Verify)", evidence, 0, "")
	b.out.Most("each further bundle of that machine", whole, 0, "4 signatures are its own: statement, SVID, token and checkpoint")
	return nil
}

// options are what trust.json says of hardware.
func (j *judged) options() (attest.Options, error) {
	f := j.trust.File()
	options := attest.Options{RequiredPCRs: []attest.PCRSelection{{Bank: "sha256", Indices: []uint32{0, 1, 2, 3, 4, 5, 6, 7}}}}
	for _, list := range []struct {
		to   *[]*x509.Certificate
		from [][]byte
	}{
		{&options.EK.Roots, f.EK.Roots},
		{&options.EK.Intermediates, f.EK.Intermediates},
		{&options.AttestationCAs, caCertificates(f.AttestationCAs)},
	} {
		for _, der := range list.from {
			c, err := x509.ParseCertificate(der)
			if err != nil {
				return options, err
			}
			*list.to = append(*list.to, c)
		}
	}
	return options, nil
}

// verifyEvidence times attest.Verify with what trust.json says.
func (j *judged) verifyEvidence(now time.Time) (figures.Samples, error) {
	options, err := j.options()
	if err != nil {
		return nil, err
	}
	binding := attest.Binding{
		TrustDomain: trustDomain, SPIFFEID: "spiffe://" + trustDomain + stepPath,
		SVIDKey: sha256.Sum256(j.leaf.RawSubjectPublicKeyInfo), Payload: &j.record.Payload, SVIDNotBefore: j.leaf.NotBefore, At: now,
	}
	return repeat(1000, func() error {
		e, err := attest.FromCertificate(j.leaf)
		if err != nil {
			return err
		}
		_, _, err = attest.Verify(e, binding, options)
		return err
	})
}

func caCertificates(cas []link.AttestationCA) (out [][]byte) {
	for _, ca := range cas {
		out = append(out, ca.Certificate)
	}
	return out
}

// signatures times the signature checks that nobody can leave out: statement,
// SVID, AK certificate, quote, and each certificate of the EK's chain.
func (j *judged) signatures() (time.Duration, string, error) {
	one, err := verifyTime()
	if err != nil {
		return 0, "", err
	}
	total, chain := 4*one, 0
	options, err := j.options()
	if err != nil {
		return 0, "", err
	}
	child, err := x509.ParseCertificate(j.record.EKChain[0])
	for err == nil && child != nil {
		var parent *x509.Certificate
		for _, p := range slices.Concat(options.EK.Intermediates, options.EK.Roots) {
			if !p.Equal(child) && child.CheckSignatureFrom(p) == nil {
				parent = p
				break
			}
		}
		if parent == nil {
			return 0, "", errors.New("the EK chain ends nowhere")
		}
		var each figures.Samples
		if each, err = repeat(300, func() error { return child.CheckSignatureFrom(parent) }); err != nil {
			break
		}
		total, chain = total+each.Median(), chain+1
		if slices.ContainsFunc(options.EK.Roots, parent.Equal) {
			break
		}
		child = parent
	}
	return total, fmt.Sprintf("4 ECDSA P-256, %d in the EK chain", chain), err
}

// verifyTime is how long one check of an ECDSA P-256 signature takes.
func verifyTime() (time.Duration, error) {
	digest := sha256.Sum256([]byte("floor"))
	ec, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return 0, err
	}
	sig, err := ecdsa.SignASN1(rand.Reader, ec, digest[:])
	if err != nil {
		return 0, err
	}
	one, err := repeat(1000, func() error {
		if !ecdsa.VerifyASN1(&ec.PublicKey, digest[:], sig) {
			return errors.New("a signature does not verify")
		}
		return nil
	})
	return one.Median(), err
}
