package stamp

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"

	rekorv1 "github.com/sigstore/protobuf-specs/gen/pb-go/rekor/v1"
	flog "github.com/transparency-dev/formats/log"
	"github.com/transparency-dev/merkle/proof"
	"github.com/transparency-dev/merkle/rfc6962"

	"github.com/rootlink/rootlink/pkg/link"
	"github.com/rootlink/rootlink/pkg/tlog"
)

const jsonType = "application/json"

// entryRequest is the request of Rekor v2: POST api/v2/log/entries.
type entryRequest struct {
	HashedRekord hashedRekordRequest `json:"hashedRekordRequestV002"`
}

type hashedRekordRequest struct {
	Digest    []byte `json:"digest"`
	Signature struct {
		Content  []byte `json:"content"`
		Verifier struct {
			Certificate struct {
				RawBytes []byte `json:"rawBytes"`
			} `json:"x509Certificate"`
			KeyDetails string `json:"keyDetails"`
		} `json:"verifier"`
	} `json:"signature"`
}

// Append has the log at base (once) take up the bundle's signature, and returns
// the entry with its proof of inclusion.
func (c *Client) Append(ctx context.Context, base string, b *link.Bundle) (*rekorv1.TransparencyLogEntry, error) {
	leaf := b.UnverifiedCertificate()
	digest := link.PayloadDigest(b.UnverifiedPayload())
	body, err := tlog.EntryBody(digest, b.Signature(), leaf)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrAnswer, err) // ours, and as lasting
	}
	var req entryRequest
	req.HashedRekord.Digest = digest[:]
	req.HashedRekord.Signature.Content = b.Signature()
	req.HashedRekord.Signature.Verifier.Certificate.RawBytes = leaf.Raw
	req.HashedRekord.Signature.Verifier.KeyDetails = "PKIX_ECDSA_P256_SHA_256"
	question, err := json.Marshal(req)
	if err != nil {
		return nil, err
	}
	raw, err := c.do(ctx, exchange{
		method: http.MethodPost, url: join(base, "api/v2/log/entries"), body: question, bodyType: jsonType,
		acceptedType: jsonType, limit: tlog.MaxEntryJSON,
	})
	if err != nil {
		return nil, err
	}
	e, err := tlog.ParseEntry(raw)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrAnswer, err)
	}
	return e, checkInclusion(e, body)
}

// CertificateProof fetches the log's proof that it holds a certificate that the
// server issued: an entry in JSON.
func (c *Client) CertificateProof(ctx context.Context, base string, der []byte) ([]byte, error) {
	sum := sha256.Sum256(der)
	raw, err := c.do(ctx, exchange{
		method: http.MethodGet, url: join(base, fmt.Sprintf("proof/%x", sum)), acceptedType: jsonType, limit: tlog.MaxEntryJSON,
	})
	if se, ok := errors.AsType[*StatusError](err); ok && se.Code == http.StatusNotFound {
		return nil, fmt.Errorf("%w (%w)", ErrUnknown, err)
	}
	if err != nil {
		return nil, err
	}
	e, err := tlog.ParseEntry(raw)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrAnswer, err)
	}
	entry, err := tlog.ParseBody(e.GetCanonicalizedBody())
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrAnswer, err)
	}
	if entry.Digest != sum {
		return nil, fmt.Errorf("%w: it is about another certificate", ErrAnswer)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	if err := cert.CheckSignatureFrom(entry.Certificate); err != nil {
		return nil, fmt.Errorf("%w: the entry is not by the certificate's issuer: %w", ErrAnswer, err)
	}
	if err := entry.CheckSignature(); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrAnswer, err)
	}
	if err := checkInclusion(e, e.GetCanonicalizedBody()); err != nil {
		return nil, err
	}
	return tlog.MarshalEntry(e)
}

// checkInclusion checks an entry as far as that goes without the log's key: it
// is this body, and its path leads to the tree that its checkpoint names.
func checkInclusion(e *rekorv1.TransparencyLogEntry, body []byte) error {
	if !bytes.Equal(e.GetCanonicalizedBody(), body) {
		return fmt.Errorf("%w: %w", ErrAnswer, tlog.ErrOtherEntry)
	}
	p := e.GetInclusionProof()
	var cp flog.Checkpoint
	if _, err := cp.Unmarshal([]byte(p.GetCheckpoint().GetEnvelope())); err != nil {
		return fmt.Errorf("%w: checkpoint: %w", ErrAnswer, err)
	}
	if p.GetLogIndex() != e.GetLogIndex() || uint64(p.GetTreeSize()) != cp.Size || !bytes.Equal(p.GetRootHash(), cp.Hash) {
		return fmt.Errorf("%w: %w: the proof is about another tree than the checkpoint", ErrAnswer, tlog.ErrNotIncluded)
	}
	leaf := rfc6962.DefaultHasher.HashLeaf(body)
	if err := proof.VerifyInclusion(rfc6962.DefaultHasher, uint64(e.GetLogIndex()), cp.Size, leaf, p.GetHashes(), cp.Hash); err != nil {
		return fmt.Errorf("%w: %w: %w", ErrAnswer, tlog.ErrNotIncluded, err)
	}
	return nil
}

func join(base, path string) string { return strings.TrimRight(base, "/") + "/" + path }
