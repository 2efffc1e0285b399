package admin

import (
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"time"

	"github.com/rootlink/rootlink/internal/store"
	"github.com/rootlink/rootlink/pkg/attest"
	adminv1 "github.com/rootlink/rootlink/proto/rootlink/admin/v1"
)

const maxPolicyJSON = 1 << 20 // bytes of a hand-written policy

// policyName is what can stand in a selector, a file name and a shell line
// without quoting.
var policyName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$`)

// volatile says why a PCR is a poor choice for a policy, in the terms of the
// TCG PC Client Platform Firmware Profile.
var volatile = map[uint32]string{
	0:  "PCR 0 changes with every firmware update",
	1:  "PCR 1 holds the host platform's configuration, such as serial numbers and boot variables: it differs on every machine",
	2:  "PCR 2 holds option ROMs: it differs between hardware revisions",
	3:  "PCR 3 holds option ROM configuration: it differs between machines",
	4:  "PCR 4 holds the boot loader: every update of shim, the boot loader or a UKI changes it",
	5:  "PCR 5 holds the partition table and boot variables: it differs on every machine",
	6:  "PCR 6 is the vendor's own, often with a unique host identifier: it differs on every machine",
	8:  "PCR 8 holds the boot loader's commands: every change of the kernel command line changes it",
	9:  "PCR 9 holds the files the boot loader read: every kernel or initrd update changes it",
	10: "PCR 10 is extended by IMA for every file that runs: it will not match again, use a runtime policy for it",
}

// CapturePCRPolicy makes a complete profile of the values an agent last attested.
func (s *Service) CapturePCRPolicy(ctx context.Context, req *adminv1.CapturePCRPolicyRequest) (*adminv1.CapturePCRPolicyResponse, error) {
	r, err := s.capture(ctx, req)
	return r, toStatus(err)
}

func (s *Service) capture(ctx context.Context, req *adminv1.CapturePCRPolicyRequest) (*adminv1.CapturePCRPolicyResponse, error) {
	if err := checkName(req.Name); err != nil {
		return nil, err
	}
	agent, err := s.attested(req.AgentId)
	if err != nil {
		return nil, err
	}
	profile := attest.PCRProfile{Name: req.Profile, Banks: map[string]map[string]string{}}
	if req.NotBefore != 0 {
		profile.NotBefore = time.Unix(req.NotBefore, 0).UTC()
	}
	if req.NotAfter != 0 {
		profile.NotAfter = time.Unix(req.NotAfter, 0).UTC()
	}
	selection := req.Pcrs
	if len(selection) == 0 {
		selection = []*adminv1.PCRSelection{{Bank: "sha256", Indices: []uint32{7}}}
	}
	notes := []string{fmt.Sprintf("the values are those of %s", agent.Attestation.At.UTC().Format(time.RFC3339))}
	if agent.Attestation.Software {
		notes = append(notes, "that agent has a SOFTWARE TPM: whoever controls its host can make it show any values")
	}
	for _, sel := range selection {
		for _, i := range sel.Indices {
			v, err := value(agent.Attestation.PCRs, sel.Bank, i)
			if err != nil {
				return nil, err
			}
			if profile.Banks[sel.Bank] == nil {
				profile.Banks[sel.Bank] = map[string]string{}
			}
			profile.Banks[sel.Bank][strconv.FormatUint(uint64(i), 10)] = hex.EncodeToString(v)
			if why := volatile[i]; why != "" {
				notes = append(notes, why)
			}
			if allZero(v) {
				notes = append(notes, fmt.Sprintf("%s PCR %d was never extended (all zeros): it tells this boot from no other", sel.Bank, i))
			}
		}
	}
	made, err := s.store.PutPCRPolicy(ctx, req.Name, func(current *attest.PCRPolicy) ([]attest.PCRProfile, error) {
		if current == nil {
			profile.Name = freeName(nil, profile.Name, agent.ID)
			return []attest.PCRProfile{profile}, nil
		}
		if !req.AddProfile {
			return nil, fmt.Errorf("PCR policy %q %w", req.Name, errExists)
		}
		for _, p := range current.Profiles {
			if sameProfile(p, profile) {
				return nil, fmt.Errorf("profile %q with these very values %w", p.Name, errExists)
			}
			if p.Name == req.Profile {
				return nil, fmt.Errorf("profile %q %w with other values", p.Name, errExists)
			}
		}
		profile.Name = freeName(current.Profiles, profile.Name, agent.ID)
		return append(slices.Clone(current.Profiles), profile), nil
	})
	if err != nil {
		return nil, err
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
	if err := checkName(p.Name); err != nil {
		return nil, err
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
	agent, err := s.attested(req.AgentId)
	if err != nil {
		return nil, toStatus(err)
	}
	p, err := s.store.PCRPolicy(req.Name)
	if err != nil {
		return nil, toStatus(fmt.Errorf("PCR policy %q: %w", req.Name, err))
	}
	now := s.now()
	r := &adminv1.DiffPCRPolicyResponse{AttestedUnix: unix(agent.Attestation.At)}
	for _, profile := range p.Policy.Profiles {
		if now.Before(profile.NotBefore) || !profile.NotAfter.IsZero() && now.After(profile.NotAfter) {
			r.Expired = append(r.Expired, profile.Name)
		}
		ds, err := differences(profile, agent.Attestation.PCRs)
		if err != nil {
			return nil, toStatus(err)
		}
		r.Differences = append(r.Differences, ds...)
	}
	// The verdict is the one that issuance uses, never one worked out here.
	if name, err := p.Policy.Match(agent.Attestation.PCRs, now); err == nil {
		r.Matches, r.MatchedProfile = true, name
	}
	return r, nil
}

func differences(p attest.PCRProfile, pcrs []attest.PCRBank) (out []*adminv1.PCRDifference, err error) {
	for _, bank := range slices.Sorted(maps.Keys(p.Banks)) {
		want := map[uint32][]byte{}
		for text, hexValue := range p.Banks[bank] {
			i, err := strconv.ParseUint(text, 10, 32)
			if err != nil {
				return nil, err
			}
			if want[uint32(i)], err = hex.DecodeString(hexValue); err != nil {
				return nil, err
			}
		}
		for _, i := range sortedIndices(want) {
			var got []byte
			for _, b := range pcrs {
				if b.Bank == bank {
					got = b.Values[i]
				}
			}
			if !bytes.Equal(got, want[i]) {
				out = append(out, &adminv1.PCRDifference{Profile: p.Name, Bank: bank, Pcr: i, Want: want[i], Got: got})
			}
		}
	}
	return out, nil
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

func value(pcrs []attest.PCRBank, bank string, i uint32) ([]byte, error) {
	if i == 16 || i == 23 {
		return nil, malformed("PCR %d can be reset from user space and proves nothing", i)
	}
	for _, b := range pcrs {
		if b.Bank == bank {
			if v := b.Values[i]; v != nil {
				return v, nil
			}
		}
	}
	return nil, fmt.Errorf("the agent %w for %s:%d; it quoted %s", errNoValues, bank, i, quoted(pcrs))
}

func quoted(pcrs []attest.PCRBank) string {
	var b bytes.Buffer
	for n, bank := range pcrs {
		if n > 0 {
			b.WriteString(" and ")
		}
		fmt.Fprintf(&b, "%s:", bank.Bank)
		for k, i := range sortedIndices(bank.Values) {
			if k > 0 {
				b.WriteByte(',')
			}
			fmt.Fprint(&b, i)
		}
	}
	return b.String()
}

func checkName(name string) error {
	if !policyName.MatchString(name) {
		return malformed("PCR policy name %q: letters, digits, '.', '_' and '-' are allowed, at most 63, the first a letter or digit", name)
	}
	return nil
}

// freeName makes a profile's name of the end of the agent's ID unless one was
// asked for, with a number where it is taken.
func freeName(taken []attest.PCRProfile, want, agentID string) string {
	if want != "" {
		return want
	}
	last := agentID[bytes.LastIndexByte([]byte(agentID), '/')+1:]
	base := "node-" + last[:min(len(last), 12)]
	for n := 1; ; n++ {
		name := base
		if n > 1 {
			name = fmt.Sprintf("%s-%d", base, n)
		}
		if !slices.ContainsFunc(taken, func(p attest.PCRProfile) bool { return p.Name == name }) {
			return name
		}
	}
}

func sameProfile(a, b attest.PCRProfile) bool {
	return a.NotBefore.Equal(b.NotBefore) && a.NotAfter.Equal(b.NotAfter) &&
		maps.EqualFunc(a.Banks, b.Banks, func(x, y map[string]string) bool { return maps.Equal(x, y) })
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

func allZero(b []byte) bool { return !slices.ContainsFunc(b, func(c byte) bool { return c != 0 }) }
