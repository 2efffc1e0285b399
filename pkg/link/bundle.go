package link

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"path"
	"sync"

	bundlev1 "github.com/sigstore/protobuf-specs/gen/pb-go/bundle/v1"
	commonv1 "github.com/sigstore/protobuf-specs/gen/pb-go/common/v1"
	dssev1 "github.com/sigstore/protobuf-specs/gen/pb-go/dsse"
	rekorv1 "github.com/sigstore/protobuf-specs/gen/pb-go/rekor/v1"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/rootlink/rootlink/pkg/attest"
)

// BundleMediaType is that of a Sigstore bundle v0.3.
const BundleMediaType = "application/vnd.dev.sigstore.bundle.v0.3+json"

// Bundle is a Sigstore bundle with a DSSE envelope, one signature and the
// signer's leaf certificate. It is a claim: only its form has been checked.
type Bundle struct {
	payload   []byte
	signature []byte
	leaf      *x509.Certificate
	tokens    [][]byte                        // RFC 3161, DER of TimeStampResp
	entries   []*rekorv1.TransparencyLogEntry // with inclusion proofs

	// PayloadDigest and ParseStatement of payload, once: a large one takes a
	// while. nil in bundles that Sign made.
	digest    func() [32]byte
	statement func() (*Statement, error)
}

// ErrSignerMismatch: the certificate or its evidence is not for this key and
// statement, so the signature would never verify.
var ErrSignerMismatch = errors.New("certificate does not belong to this key and statement")

// Sign signs p with key, whose certificate is leaf. The leaf must carry
// evidence that commits to exactly this key's statement.
func (p *Prepared) Sign(key crypto.Signer, leaf *x509.Certificate) (*Bundle, error) {
	e, err := attest.FromCertificate(leaf)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrSignerMismatch, err)
	}
	if e.Payload != p.digest {
		return nil, fmt.Errorf("%w: its evidence commits to another statement", ErrSignerMismatch)
	}
	return p.sign(key, leaf)
}

// sign does not look at the evidence. A link without any verifies nowhere, so
// who wants one says so: SignWithoutEvidence.
func (p *Prepared) sign(key crypto.Signer, leaf *x509.Certificate) (*Bundle, error) {
	pub, ok := key.Public().(*ecdsa.PublicKey)
	if !ok || pub.Curve != elliptic.P256() {
		return nil, fmt.Errorf("%w: only ECDSA P-256 keys sign links", ErrSignerMismatch)
	}
	if !pub.Equal(leaf.PublicKey) {
		return nil, fmt.Errorf("%w: it holds another key", ErrSignerMismatch)
	}
	// The digest of the DSSE pre-authentication encoding is also what ECDSA signs.
	sig, err := key.Sign(rand.Reader, p.digest[:], crypto.SHA256)
	if err != nil {
		return nil, fmt.Errorf("signing: %w", err)
	}
	if !ecdsa.VerifyASN1(pub, p.digest[:], sig) {
		return nil, fmt.Errorf("%w: the signer returned a bad signature", ErrCrypto)
	}
	return &Bundle{payload: p.payload, signature: sig, leaf: leaf}, nil
}

// Marshal encodes b as JSON: the same bytes every time.
func (b *Bundle) Marshal() ([]byte, error) {
	raw, err := protojson.Marshal(&bundlev1.Bundle{
		MediaType: BundleMediaType,
		VerificationMaterial: &bundlev1.VerificationMaterial{
			Content: &bundlev1.VerificationMaterial_Certificate{
				Certificate: &commonv1.X509Certificate{RawBytes: b.leaf.Raw},
			},
			TlogEntries:               b.entries,
			TimestampVerificationData: timestampData(b.tokens),
		},
		Content: &bundlev1.Bundle_DsseEnvelope{DsseEnvelope: &dssev1.Envelope{
			Payload: b.payload, PayloadType: PayloadType,
			Signatures: []*dssev1.Signature{{Sig: b.signature}},
		}},
	})
	if err != nil {
		return nil, err
	}
	// protojson varies its white space on purpose.
	var out bytes.Buffer
	if err := json.Compact(&out, raw); err != nil {
		return nil, err
	}
	if out.Len() > MaxBundle {
		return nil, malformed("bundle of %d bytes, at most %d allowed", out.Len(), MaxBundle)
	}
	out.WriteByte('\n')
	return out.Bytes(), nil
}

// ParseBundle decodes a bundle and checks its form: exactly the fields that
// Marshal writes, once each.
func ParseBundle(raw []byte) (*Bundle, error) {
	if len(bytes.TrimSpace(raw)) == 0 {
		return nil, malformed("the bundle is empty")
	}
	if err := scanJSON(raw, MaxBundle); err != nil {
		return nil, fmt.Errorf("bundle: %w", err)
	}
	var pb bundlev1.Bundle
	if err := protojson.Unmarshal(raw, &pb); err != nil {
		return nil, malformed("bundle: %w", err)
	}
	if pb.GetMediaType() != BundleMediaType {
		return nil, malformed("bundle media type %q, want %q", pb.GetMediaType(), BundleMediaType)
	}
	vm := pb.GetVerificationMaterial()
	var tokens [][]byte
	for _, t := range vm.GetTimestampVerificationData().GetRfc3161Timestamps() {
		tokens = append(tokens, t.GetSignedTimestamp())
	}
	if err := checkTokens(tokens); err != nil {
		return nil, err
	}
	if err := checkEntries(vm.GetTlogEntries()); err != nil {
		return nil, err
	}
	der := vm.GetCertificate().GetRawBytes()
	if len(der) == 0 {
		return nil, malformed("bundle without a leaf certificate")
	}
	if len(der) > MaxLeaf {
		return nil, malformed("leaf certificate of %d bytes, at most %d allowed", len(der), MaxLeaf)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, malformed("leaf certificate: %w", err)
	}
	env := pb.GetDsseEnvelope()
	switch {
	case env == nil:
		return nil, malformed("bundle without a DSSE envelope")
	case env.GetPayloadType() != PayloadType:
		return nil, malformed("payload type %q, want %q", env.GetPayloadType(), PayloadType)
	case len(env.GetPayload()) == 0 || len(env.GetPayload()) > MaxStatement:
		return nil, malformed("payload of %d bytes, 1 to %d allowed", len(env.GetPayload()), MaxStatement)
	case len(env.GetSignatures()) != 1:
		return nil, malformed("%d signatures, exactly one allowed", len(env.GetSignatures()))
	}
	sig := env.GetSignatures()[0]
	if sig.GetKeyid() != "" {
		return nil, malformed("signature with a key ID: the certificate alone names the key")
	}
	if n := len(sig.GetSig()); n == 0 || n > MaxSignature {
		return nil, malformed("signature of %d bytes, 1 to %d allowed", n, MaxSignature)
	}
	payload := env.GetPayload()
	return &Bundle{
		payload: payload, signature: sig.GetSig(), leaf: leaf,
		tokens: tokens, entries: vm.GetTlogEntries(),
		digest:    sync.OnceValue(func() [32]byte { return PayloadDigest(payload) }),
		statement: sync.OnceValues(func() (*Statement, error) { return ParseStatement(payload) }),
	}, nil
}

// UnverifiedCertificate returns the signer's certificate as the bundle claims it.
func (b *Bundle) UnverifiedCertificate() *x509.Certificate { return b.leaf }

// UnverifiedPayload returns the signed bytes.
func (b *Bundle) UnverifiedPayload() []byte { return bytes.Clone(b.payload) }

// payloadDigest is what the signature is over.
func (b *Bundle) payloadDigest() [32]byte {
	if b.digest == nil {
		return PayloadDigest(b.payload)
	}
	return b.digest()
}

// UnverifiedStatement decodes the statement as the bundle claims it. It is the
// same one every time: leave it as it is.
func (b *Bundle) UnverifiedStatement() (*Statement, error) {
	if b.statement == nil {
		return ParseStatement(b.payload) // made by Sign
	}
	return b.statement()
}

// BundleSuffix ends the names of bundles.
const BundleSuffix = ".sigstore.json"

// EventLogName is the name under which a boot event log lies beside the
// bundles whose evidence names its digest.
func EventLogName(d *attest.TypedDigest) string {
	return fmt.Sprintf("%s-%x.eventlog", d.Alg, d.Value)
}

// UnverifiedEvidence returns the evidence in the certificate or, where that has
// none, in the detached record beside the bundle; nil when there is neither.
func (b *Bundle) UnverifiedEvidence(detached []byte) *attest.Evidence {
	e, err := attest.FromCertificate(b.leaf)
	_, perr := attest.ParentFromCertificate(b.leaf)
	if (errors.Is(err, attest.ErrNoEvidence) || perr == nil) && len(detached) > 0 {
		var d *attest.Detached
		if d, err = attest.ParseDetached(detached); err == nil {
			e = d.Evidence
		}
	}
	if err != nil {
		return nil
	}
	return e
}

// NamesBeside are the names of the files that lie beside the bundle and belong
// to its evidence: the boot event log, and the log entry of the AK certificate.
// Empty where there is none. detached is what the file DetachedName holds.
func (b *Bundle) NamesBeside(detached []byte) (eventLog, logProof string) {
	var akCert []byte
	var log *attest.TypedDigest
	if e := b.UnverifiedEvidence(detached); e != nil {
		akCert, log = e.AKCert, e.EventLog
	} else if p, err := attest.ParentFromCertificate(b.leaf); err == nil {
		akCert, log = p.AKCert, p.EventLog
	} else {
		return "", ""
	}
	if log != nil {
		// The evidence is a stranger's: it chooses no directory.
		if name := EventLogName(log); path.Base(name) == name {
			eventLog = name
		}
	}
	return eventLog, LogProofName(akCert)
}
