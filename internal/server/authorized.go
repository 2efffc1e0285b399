package server

import (
	"cmp"
	"context"
	"errors"
	"io"
	"slices"
	"sync"
	"time"

	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/rootlink/rootlink/internal/store"
	"github.com/rootlink/rootlink/pkg/link"
)

// authorizedCache holds what each agent is authorised for, as long as nothing
// that it was computed from has changed.
type authorizedCache struct {
	mu   sync.Mutex
	m    map[string][]*authorizedSet // guarded by mu; by agent ID, newest first
	size int                         // guarded by mu; of all sets together
}

// setsPerAgent is how many sets of selectors are remembered of one agent: the
// node's own, and those that issuing asks about.
const setsPerAgent = 8

type authorizedSet struct {
	generation uint64
	until      time.Time // when the first entry of it expires; zero for never
	selectors  []store.Selector
	entries    map[string]*store.Entry
	sorted     []*store.Entry // by ID
}

// size is the set's share of the cache; an empty one is not free.
func (a *authorizedSet) size() int { return len(a.entries) + 1 }

// authorized returns the entries that an agent with these selectors may ask
// for: below its own ID, below every alias whose selectors it has, and below
// what it was authorised for. The alias entries themselves are left out.
func (s *Server) authorized(agentID string, selectors []store.Selector) (*authorizedSet, error) {
	gen, err := s.store.Generation()
	if err != nil {
		return nil, err
	}
	now := s.cfg.Now()
	if set := s.cache.get(agentID, gen, selectors, now); set != nil {
		return set, nil
	}
	// An entry that changes while we look raises the generation, so what is
	// cached under the older number is computed again.
	set := &authorizedSet{generation: gen, selectors: selectors, entries: make(map[string]*store.Entry)}
	if err := s.below(agentID, set, now); err != nil {
		return nil, err
	}
	aliases, err := s.store.Children(s.cfg.td.IDString() + "/spire/server")
	if err != nil {
		return nil, err
	}
	for _, alias := range aliases {
		if set.live(alias, now) && contains(selectors, alias.Selectors) {
			if err := s.below(alias.SPIFFEID, set, now); err != nil {
				return nil, err
			}
		}
	}
	for _, e := range set.entries {
		set.sorted = append(set.sorted, e)
	}
	slices.SortFunc(set.sorted, func(a, b *store.Entry) int { return cmp.Compare(a.ID, b.ID) })
	s.cache.put(agentID, set)
	return set, nil
}

func (c *authorizedCache) get(agentID string, gen uint64, selectors []store.Selector, now time.Time) *authorizedSet {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, set := range c.m[agentID] {
		if set.generation == gen && (set.until.IsZero() || now.Before(set.until)) && slices.Equal(set.selectors, selectors) {
			return set
		}
	}
	return nil
}

func (c *authorizedCache) put(agentID string, set *authorizedSet) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.m == nil || c.size > maxCachedEntries {
		c.m, c.size = make(map[string][]*authorizedSet), 0
	}
	var keep []*authorizedSet
	for _, old := range c.m[agentID] {
		if old.generation == set.generation && !slices.Equal(old.selectors, set.selectors) && len(keep) < setsPerAgent-1 {
			keep = append(keep, old)
		} else {
			c.size -= old.size()
		}
	}
	c.m[agentID] = append([]*authorizedSet{set}, keep...)
	c.size += set.size()
}

// maxCachedEntries bounds the cache, in entries of all sets together; over it
// everything is computed anew.
const maxCachedEntries = 1 << 20

// live reports whether e has not expired, and has the set forgotten when it
// will have.
func (a *authorizedSet) live(e *store.Entry, now time.Time) bool {
	if e.ExpiresAt.IsZero() {
		return true
	}
	if !now.Before(e.ExpiresAt) {
		return false
	}
	if a.until.IsZero() || e.ExpiresAt.Before(a.until) {
		a.until = e.ExpiresAt
	}
	return true
}

// below adds the entries below a parent. Each is visited once, so a circle of
// parents ends; one that has expired is left out with what hangs from it.
func (s *Server) below(parentID string, set *authorizedSet, now time.Time) error {
	children, err := s.store.Children(parentID)
	if err != nil {
		return err
	}
	for _, e := range children {
		if set.entries[e.ID] != nil || !set.live(e, now) {
			continue
		}
		set.entries[e.ID] = e
		if err := s.below(e.SPIFFEID, set, now); err != nil {
			return err
		}
	}
	return nil
}

func (s *Server) expired(e *store.Entry) bool {
	return !e.ExpiresAt.IsZero() && !s.cfg.Now().Before(e.ExpiresAt)
}

// issuable reports whether this server would ever issue for e to agent a. What
// it would not is left out of the sync: a stock agent retries a refused CSR
// for ever while its workload hangs.
func (s *Server) issuable(e *store.Entry, a *store.Agent) bool {
	if s.expired(e) {
		return false
	}
	return a.KeyBound || !isStep(e) && !s.needsEvidence(e.SPIFFEID)
}

// needsEvidence reports whether the configuration demands leaf evidence in
// Workload API SVIDs of this ID.
func (s *Server) needsEvidence(id string) bool {
	for _, p := range s.cfg.EvidencePatterns {
		if link.MatchPattern(p, id) {
			return true
		}
	}
	return false
}

// entriesFor returns what the calling agent gets, sorted by ID.
func (e *entryService) entriesFor(a *store.Agent) ([]*store.Entry, error) {
	set, err := e.s.authorized(a.ID, e.s.nodeSelectors(a))
	if err != nil {
		return nil, e.s.internal("authorized entries", err)
	}
	ready := sync.OnceValue(func() bool { return !givesParent(a) || e.s.parentReady(a) == nil })
	list := make([]*store.Entry, 0, len(set.sorted))
	for _, x := range set.sorted {
		if e.s.issuable(x, a) && (!e.s.wantsParent(x.SPIFFEID) || ready()) {
			list = append(list, x)
		}
	}
	return list, nil
}

func (e *entryService) GetAuthorizedEntries(ctx context.Context, req *entryv1.GetAuthorizedEntriesRequest) (*entryv1.GetAuthorizedEntriesResponse, error) {
	list, err := e.entriesFor(callerOf(ctx).agent)
	if err != nil {
		return nil, err
	}
	resp := new(entryv1.GetAuthorizedEntriesResponse)
	for _, x := range list {
		resp.Entries = append(resp.Entries, entryToProto(x, req.OutputMask))
	}
	return resp, nil
}

// SyncAuthorizedEntries sends a short list in full, and of a long one first
// the revisions and then what the agent asks for.
func (e *entryService) SyncAuthorizedEntries(stream entryv1.Entry_SyncAuthorizedEntriesServer) error {
	req, err := stream.Recv()
	if err != nil {
		return err
	}
	if len(req.Ids) > 0 {
		return status.Error(codes.InvalidArgument, "specifying IDs on initial request is not supported")
	}
	mask := req.OutputMask
	// The revisions tell an agent what changed: it cannot go without.
	if mask != nil && !mask.RevisionNumber {
		return status.Error(codes.InvalidArgument, "revision number cannot be masked")
	}
	list, err := e.entriesFor(callerOf(stream.Context()).agent)
	if err != nil {
		return err
	}
	if len(list) <= maxPage {
		return sendEntries(stream, list, mask)
	}
	for i := 0; i < len(list); i += maxPage {
		resp := &entryv1.SyncAuthorizedEntriesResponse{More: i+maxPage < len(list)}
		for _, x := range list[i:min(i+maxPage, len(list))] {
			resp.EntryRevisions = append(resp.EntryRevisions, &entryv1.EntryRevision{
				Id: x.ID, RevisionNumber: x.Revision, CreatedAt: x.CreatedAt.Unix(),
			})
		}
		if err := stream.Send(resp); err != nil {
			return err
		}
	}
	byID := make(map[string]*store.Entry, len(list))
	for _, x := range list {
		byID[x.ID] = x
	}
	for {
		req, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		// Only the first request may set the mask.
		if req.OutputMask != nil {
			return status.Error(codes.InvalidArgument, "the output mask can only be set on the initial request")
		}
		slices.Sort(req.Ids)
		var want []*store.Entry
		for _, id := range slices.Compact(req.Ids) {
			// One that is gone or not the agent's is left out, as SPIRE does.
			if x := byID[id]; x != nil {
				want = append(want, x)
			}
		}
		if err := sendEntries(stream, want, mask); err != nil {
			return err
		}
	}
}

// sendEntries sends entries in pages that fit, at least one, with More set on
// all but the last.
func sendEntries(stream entryv1.Entry_SyncAuthorizedEntriesServer, list []*store.Entry, mask *types.EntryMask) error {
	resp, bytes := new(entryv1.SyncAuthorizedEntriesResponse), 0
	for _, x := range list {
		if len(resp.Entries) == maxPage || bytes >= maxPageBytes {
			resp.More = true
			if err := stream.Send(resp); err != nil {
				return err
			}
			resp, bytes = new(entryv1.SyncAuthorizedEntriesResponse), 0
		}
		p := entryToProto(x, mask)
		resp.Entries = append(resp.Entries, p)
		bytes += proto.Size(p)
	}
	return stream.Send(resp)
}
