package server

import (
	"bytes"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/rootlink/rootlink/internal/store"
	"github.com/rootlink/rootlink/pkg/attest"
	"github.com/rootlink/rootlink/pkg/link"
	"github.com/rootlink/rootlink/pkg/svid"
	"github.com/rootlink/rootlink/plugins/tpmnode/wire"
)

// maxParentSVID bounds an SVID with parent evidence, in bytes: 500 of them, the
// most that a stock agent asks for at once, fit into one message.
const maxParentSVID = 8<<10 - 1

// errNoParent means that a node's last attestation cannot be shown.
var errNoParent = errors.New("the node's last attestation cannot go into an SVID")

// wantsParent reports whether the configuration asks for parent evidence in
// SVIDs of this ID.
func (s *Server) wantsParent(id string) bool {
	return slices.ContainsFunc(s.cfg.ParentPatterns, func(p string) bool { return link.MatchPattern(p, id) })
}

// givesParent reports whether a is an agent whose SVIDs may carry parent
// evidence: one that could not have given a better kind. An agent whose quote
// covered its key could, also after it renewed that key; if parent evidence
// took the place of what it left out, leaving it out would pay.
func givesParent(a *store.Agent) bool {
	return a.AttestationType == wire.PluginName && !a.KeyBound && a.Attestation != nil && a.Attestation.AgentKey == [32]byte{}
}

// parentRecord is the node's last attestation as an SVID would carry it. Of the
// EK chain, what trust.json carries as well stays out.
func (s *Server) parentRecord(a *store.Agent, ek *attest.EKRoots) (*attest.Parent, error) {
	n := a.Attestation
	if len(n.Quote) == 0 || len(n.Nonce) != 32 {
		return nil, fmt.Errorf("%w: its record, of an earlier version, holds no quote", errNoParent)
	}
	p := &attest.Parent{
		Attest: n.Quote, Signature: n.Signature, AKCert: n.AKCert, EKPublic: n.EKPublic, PCRs: n.PCRs,
		EventLog: n.EventLog, IMALog: n.IMALog, AgentKey: n.AgentKey, Nonce: [32]byte(n.Nonce), AttestedAt: n.At,
	}
	for i, der := range n.EKChain {
		known := func(c *x509.Certificate) bool { return bytes.Equal(c.Raw, der) }
		if i == 0 || !slices.ContainsFunc(ek.Roots, known) && !slices.ContainsFunc(ek.Intermediates, known) {
			p.EKChain = append(p.EKChain, der)
		}
	}
	if len(p.EKChain) > 0 {
		p.EKPublic = nil
	}
	if _, err := p.Marshal(); err != nil {
		return nil, fmt.Errorf("%w: %w", errNoParent, err)
	}
	return p, nil
}

// parentReady says why SVIDs for a's workloads cannot carry what they must. Then
// they are left out of the sync, and addParent would refuse them.
func (s *Server) parentReady(a *store.Agent) error {
	ek, err := s.EKRoots()
	if err == nil {
		_, err = s.parentRecord(a, &ek)
	}
	return err
}

// parentOf verifies what the calling agent's node attested with, once for all
// items of a call. A node whose record will not do has to attest again.
func (s *Server) parentOf(in *issuance) (*attest.VerifiedParent, error) {
	in.parentOnce.Do(func() {
		p, err := s.parentRecord(in.agent, &in.ek)
		if err != nil {
			in.parentErr = err
			return
		}
		in.parent, _, in.parentErr = attest.VerifyParent(p, attest.ParentBinding{
			TrustDomain: s.cfg.TrustDomain, EKHash: &in.agent.Attestation.EKHash, At: in.now,
		}, attest.Options{
			AttestationCAs: s.attestationCA.Chain(), EK: in.ek, RequiredPCRs: s.cfg.QuotePCRs, Signatures: s.signatures,
		})
	})
	return in.parent, in.parentErr
}

// addParent completes a request for an SVID without leaf evidence, where the
// configuration asks for parent evidence and the agent is of those that have
// nothing better.
func (s *Server) addParent(in *issuance, entry *store.Entry, r *svid.Request) error {
	if !s.wantsParent(entry.SPIFFEID) || !givesParent(in.agent) {
		return nil
	}
	v, err := s.parentOf(in)
	if err != nil {
		return refuse("parent_evidence", "%w", err)
	}
	q := v.Quote()
	ref, err := s.checkPolicy(in, entry, s.judge.Node(v.AK().Name, &q, v.PCRs(), in.policies, in.now), v.PCRs())
	if err != nil {
		return err
	}
	r.Parent = &svid.Parent{Verified: v, Policy: ref}
	return nil
}

// parentCache is what parentOf found in this call.
type parentCache struct {
	parentOnce sync.Once
	parent     *attest.VerifiedParent // written in parentOnce
	parentErr  error                  // written in parentOnce
}
