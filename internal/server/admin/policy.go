package admin

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/rootlink/rootlink/internal/policy"
	"github.com/rootlink/rootlink/internal/store"
	"github.com/rootlink/rootlink/pkg/attest"
	adminv1 "github.com/rootlink/rootlink/proto/rootlink/admin/v1"
)

const maxPolicyJSON = 1 << 20 // bytes of a hand-written policy

// CapturePCRPolicy makes a complete profile of the values an agent last attested.
func (s *Service) CapturePCRPolicy(ctx context.Context, req *adminv1.CapturePCRPolicyRequest) (*adminv1.CapturePCRPolicyResponse, error) {
	r, err := s.capture(ctx, req)
	return r, toStatus(err)
}

func (s *Service) capture(ctx context.Context, req *adminv1.CapturePCRPolicyRequest) (*adminv1.CapturePCRPolicyResponse, error) {
	if err := policy.CheckName(req.Name); err != nil {
		return nil, malformed("%q: %w", req.Name, err)
	}
	agent, err := s.attested(req.AgentId)
	if err != nil {
		return nil, err
	}
	var sel []attest.PCRSelection
	for _, p := range req.Pcrs {
		sel = append(sel, attest.PCRSelection{Bank: p.Bank, Indices: p.Indices})
	}
	var notes []string
	made, err := s.store.PutPCRPolicy(ctx, req.Name, func(current *attest.PCRPolicy) ([]attest.PCRProfile, error) {
		if current != nil && !req.AddProfile {
			return nil, fmt.Errorf("PCR policy %q %w", req.Name, errExists)
		}
		name := req.Profile
		if name == "" {
			name = freeName(current, agent.ID)
		}
		var profile attest.PCRProfile
		var err error
		profile, notes, err = policy.Capture(name, agent.Attestation.PCRs, sel, fromUnix(req.NotBefore), fromUnix(req.NotAfter))
		if err != nil {
			return nil, err
		}
		return policy.AddProfile(current, profile)
	})
	if errors.Is(err, policy.ErrNotQuoted) {
		err = fmt.Errorf("%w (it quoted %s)", err, quoted(agent.Attestation.PCRs))
	}
	if err != nil {
		return nil, err
	}
	notes = append([]string{"the values are those of " + agent.Attestation.At.UTC().Format(time.RFC3339)}, notes...)
	if agent.Attestation.Software {
		notes = append(notes, "that agent has a SOFTWARE TPM: whoever controls its host can make it show any values")
	}
	out, err := policyMessage(*made)
	return &adminv1.CapturePCRPolicyResponse{Policy: out, Notes: notes}, err
}

// PutPCRPolicy stores a policy written by hand.
func (s *Service) PutPCRPolicy(ctx context.Context, req *adminv1.PutPCRPolicyRequest) (*adminv1.PutPCRPolicyResponse, error) {
	r, err := s.put(ctx, req)
	return r, toStatus(err)
}

func (s *Service) put(ctx context.Context, req *adminv1.PutPCRPolicyRequest) (*adminv1.PutPCRPolicyResponse, error) {
	if len(req.PolicyJson) > maxPolicyJSON {
		return nil, malformed("a policy of %d bytes, at most %d allowed", len(req.PolicyJson), maxPolicyJSON)
	}
	var p attest.PCRPolicy
	dec := json.NewDecoder(bytes.NewReader(req.PolicyJson))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&p); err != nil {
		return nil, malformed("PCR policy: %w", err)
	}
	if dec.More() {
		return nil, malformed("PCR policy: more follows the first object")
	}
	if err := policy.CheckName(p.Name); err != nil {
		return nil, malformed("%q: %w", p.Name, err)
	}
	// The store counts revisions; any positive number passes the check of form.
	p.Revision = 1
	if err := p.Validate(); err != nil {
		return nil, malformed("PCR policy: %w", err)
	}
	made, err := s.store.PutPCRPolicy(ctx, p.Name, func(current *attest.PCRPolicy) ([]attest.PCRProfile, error) {
		if current != nil && !req.Replace {
			return nil, fmt.Errorf("PCR policy %q %w", p.Name, errExists)
		}
		return p.Profiles, nil
	})
	if err != nil {
		return nil, err
	}
	out, err := policyMessage(*made)
	return &adminv1.PutPCRPolicyResponse{Policy: out}, err
}

// ListPCRPolicies returns current policies, or all revisions there ever were.
func (s *Service) ListPCRPolicies(ctx context.Context, req *adminv1.ListPCRPoliciesRequest) (*adminv1.ListPCRPoliciesResponse, error) {
	list, err := s.store.PCRPolicies()
	if req.AllRevisions {
		list, err = s.store.PCRPolicyRevisions(ctx)
	}
	if err != nil {
		return nil, toStatus(err)
	}
	r := &adminv1.ListPCRPoliciesResponse{}
	for _, p := range list {
		if req.Name != "" && p.Policy.Name != req.Name {
			continue
		}
		m, err := policyMessage(p)
		if err != nil {
			return nil, toStatus(err)
		}
		r.Policies = append(r.Policies, m)
	}
	if req.Name != "" && len(r.Policies) == 0 {
		return nil, toStatus(fmt.Errorf("PCR policy %q: %w", req.Name, store.ErrNotFound))
	}
	return r, nil
}

// DeletePCRPolicy ends a policy and keeps its revisions on record.
func (s *Service) DeletePCRPolicy(ctx context.Context, req *adminv1.DeletePCRPolicyRequest) (*adminv1.DeletePCRPolicyResponse, error) {
	err := s.store.DeletePCRPolicy(ctx, req.Name)
	if errors.Is(err, store.ErrNotFound) {
		err = fmt.Errorf("PCR policy %q: %w", req.Name, err)
	}
	if err != nil {
		return nil, toStatus(err)
	}
	return &adminv1.DeletePCRPolicyResponse{}, nil
}

// DiffPCRPolicy shows how an agent's last attested values differ from every
// profile of a policy.
func (s *Service) DiffPCRPolicy(_ context.Context, req *adminv1.DiffPCRPolicyRequest) (*adminv1.DiffPCRPolicyResponse, error) {
	r, err := s.diff(req)
	return r, toStatus(err)
}

func (s *Service) diff(req *adminv1.DiffPCRPolicyRequest) (*adminv1.DiffPCRPolicyResponse, error) {
	agent, err := s.attested(req.AgentId)
	if err != nil {
		return nil, err
	}
	p, err := s.store.PCRPolicy(req.Name)
	if err != nil {
		return nil, fmt.Errorf("PCR policy %q: %w", req.Name, err)
	}
	now := s.now()
	profile, matches, diff, err := policy.Diff(&p.Policy, agent.Attestation.PCRs, now)
	if err != nil {
		return nil, err
	}
	r := &adminv1.DiffPCRPolicyResponse{AttestedUnix: unix(agent.Attestation.At), Matches: matches, MatchedProfile: profile}
	for _, d := range diff {
		r.Differences = append(r.Differences, &adminv1.PCRDifference{Profile: d.Profile, Bank: d.Bank, Pcr: d.PCR, Want: d.Want, Got: d.Got})
	}
	for _, pr := range p.Policy.Profiles {
		if now.Before(pr.NotBefore) || !pr.NotAfter.IsZero() && now.After(pr.NotAfter) {
			r.Expired = append(r.Expired, pr.Name)
		}
	}
	return r, nil
}

// attested returns an agent whose PCR values are known.
func (s *Service) attested(id string) (*store.Agent, error) {
	a, err := s.agent(id)
	if err != nil {
		return nil, err
	}
	if a.Attestation == nil || len(a.Attestation.PCRs) == 0 {
		return nil, fmt.Errorf("agent %s attested with %q and %w", id, a.AttestationType, errNoValues)
	}
	return a, nil
}

func quoted(pcrs []attest.PCRBank) string {
	var out []string
	for _, bank := range pcrs {
		out = append(out, bank.Bank+":"+strings.Trim(strings.ReplaceAll(fmt.Sprint(sortedIndices(bank.Values)), " ", ","), "[]"))
	}
	return strings.Join(out, " and ")
}

// freeName makes a profile's name of the end of the agent's ID, with a number
// where that is taken.
func freeName(current *attest.PCRPolicy, agentID string) string {
	last := agentID[strings.LastIndexByte(agentID, '/')+1:]
	base := "node-" + last[:min(len(last), 12)]
	name := base
	for n := 2; current != nil && slices.ContainsFunc(current.Profiles, func(p attest.PCRProfile) bool { return p.Name == name }); n++ {
		name = fmt.Sprintf("%s-%d", base, n)
	}
	return name
}

func policyMessage(p store.PolicyRevision) (*adminv1.PCRPolicy, error) {
	b, err := json.Marshal(p.Policy)
	if err != nil {
		return nil, err
	}
	return &adminv1.PCRPolicy{
		PolicyJson: b, Digest: p.Digest[:], CreatedUnix: unix(p.CreatedAt), DeletedUnix: unix(p.DeletedAt),
	}, nil
}

func sortedIndices[V any](m map[uint32]V) []uint32 { return slices.Sorted(maps.Keys(m)) }

func fromUnix(s int64) time.Time {
	if s == 0 {
		return time.Time{}
	}
	return time.Unix(s, 0).UTC()
}
