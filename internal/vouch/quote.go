// Package vouch has a node's TPM commit to keys, statements and measurements: the
// evidence inside SVIDs that our server signs, and detached evidence where the
// server signs none. Its Service gives the latter to whoever got an SVID from a
// SPIRE agent.
package vouch

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"

	"github.com/rootlink/rootlink/internal/measured"
	"github.com/rootlink/rootlink/pkg/attest"
	tpmv1 "github.com/rootlink/rootlink/proto/rootlink/tpm/v1"
)

// Quoter makes evidence records; the node attestor plugin serves it.
type Quoter interface {
	Quote(ctx context.Context, in *tpmv1.QuoteRequest, opts ...grpc.CallOption) (*tpmv1.QuoteResponse, error)
}

// Request asks for a commitment to l, whose salt the quoter chooses.
func Request(l *attest.Leaf, pcrs []*tpmv1.PCRSelection) *tpmv1.QuoteRequest {
	return &tpmv1.QuoteRequest{Pcrs: pcrs, Leaf: &tpmv1.Leaf{
		Kind:           uint32(l.Kind),
		KeyOrigin:      uint32(l.KeyOrigin),
		TrustDomain:    l.TrustDomain,
		SpiffeId:       l.SPIFFEID,
		SvidKeySha256:  l.SVIDKey[:],
		AgentKeySha256: l.AgentKey[:],
		Executable:     l.Executable[:],
		Recorder:       l.Recorder[:],
		Tool:           l.Tool[:],
		Payload:        l.Payload[:],
		Selectors:      l.Selectors,
		Nonce:          l.Nonce[:],
	}}
}

// ErrOtherLeaf means that a quoter, which is a plugin, committed to something
// else than it was asked for.
var ErrOtherLeaf = errors.New("quoter's evidence commits to something else than it was asked for")

// Read reads the answer to Request(l, …).
func Read(r *tpmv1.QuoteResponse, l *attest.Leaf) (*attest.Evidence, error) {
	rec, err := attest.ParseRecord(r.GetEvidence())
	if err != nil {
		return nil, fmt.Errorf("quoter's evidence: %w", err)
	}
	want := *l
	want.Salt = rec.Salt
	asked, err := want.Hash()
	if err != nil {
		return nil, err
	}
	if got, err := rec.Leaf(l.TrustDomain, l.SPIFFEID, l.SVIDKey).Hash(); err != nil || got != asked {
		return nil, ErrOtherLeaf
	}
	return rec, nil
}

// Statement is what detached evidence is asked for.
type Statement struct {
	Step      *measured.Step // that has ended
	Origin    attest.KeyOrigin
	SPIFFEID  spiffeid.ID
	SVID      *x509.Certificate   // leaf, verified
	AgentSVID []*x509.Certificate // of this node, verified, leaf first
	Payload   [32]byte            // SHA-256 of the DSSE pre-authentication encoding
	PCRs      []*tpmv1.PCRSelection
}

// Detached has the TPM commit to s. The record still lacks its signature, which
// only the holder of the SVID's key can make.
func Detached(ctx context.Context, q Quoter, s Statement) (*attest.Detached, error) {
	agent := sha256.Sum256(s.AgentSVID[0].RawSubjectPublicKeyInfo)
	l := &attest.Leaf{
		Kind: attest.KindDetached, KeyOrigin: s.Origin,
		TrustDomain: s.SPIFFEID.TrustDomain().Name(), SPIFFEID: s.SPIFFEID.String(),
		SVIDKey: sha256.Sum256(s.SVID.RawSubjectPublicKeyInfo), AgentKey: agent,
		Executable: s.Step.Executable(), Recorder: s.Step.Executable(), Tool: s.Step.Tool(),
		Payload: s.Payload, Selectors: s.Step.Seen().All(), Nonce: attest.DetachedNonce(s.SVID.Raw),
	}
	resp, err := q.Quote(ctx, Request(l, s.PCRs))
	if err != nil {
		return nil, err
	}
	rec, err := Read(resp, l)
	if err != nil {
		return nil, err
	}
	var chain [][]byte
	for _, c := range s.AgentSVID {
		chain = append(chain, c.Raw)
	}
	return attest.NewDetached(rec, chain)
}
