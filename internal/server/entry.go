package server

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"

	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/rootlink/rootlink/internal/store"
	"github.com/rootlink/rootlink/pkg/svid"
)

// Bounds on replies. A client takes 4 MiB at most, which is gRPC's default.
const (
	maxPage      = 500
	maxPageBytes = 3 << 20
)

type entryService struct {
	entryv1.UnimplementedEntryServer
	s *Server
}

func (e *entryService) CountEntries(ctx context.Context, req *entryv1.CountEntriesRequest) (*entryv1.CountEntriesResponse, error) {
	match := func(*store.Entry) bool { return true }
	if f := req.Filter; f != nil {
		var err error
		// The two filters are the same message by another name.
		if match, err = e.filter(&entryv1.ListEntriesRequest_Filter{
			BySpiffeId: f.BySpiffeId, ByParentId: f.ByParentId, BySelectors: f.BySelectors,
			ByFederatesWith: f.ByFederatesWith, ByHint: f.ByHint, ByDownstream: f.ByDownstream,
		}); err != nil {
			return nil, status.Errorf(codes.InvalidArgument, "malformed filter: %v", err)
		}
	}
	all, err := e.s.store.Entries()
	if err != nil {
		return nil, e.s.internal("count entries", err)
	}
	n := int32(0)
	for _, x := range all {
		if match(x) {
			n++
		}
	}
	return &entryv1.CountEntriesResponse{Count: n}, nil
}

func (e *entryService) ListEntries(ctx context.Context, req *entryv1.ListEntriesRequest) (*entryv1.ListEntriesResponse, error) {
	match, err := e.filter(req.Filter)
	if err != nil {
		return nil, status.Errorf(codes.InvalidArgument, "malformed filter: %v", err)
	}
	all, err := e.s.store.Entries()
	if err != nil {
		return nil, e.s.internal("list entries", err)
	}
	resp := new(entryv1.ListEntriesResponse)
	resp.NextPageToken, err = page(all, func(x *store.Entry) string { return x.ID }, req.PageToken, req.PageSize, match, func(x *store.Entry) int {
		p := entryToProto(x, req.OutputMask)
		resp.Entries = append(resp.Entries, p)
		return proto.Size(p)
	})
	return resp, err
}

// page calls add with the items after token that match, until a page is full
// by number or by the bytes that add returns. It returns the token of the next
// page, empty after the last. items are sorted by key.
func page[T any](items []T, key func(T) string, token string, size int32, match func(T) bool, add func(T) int) (string, error) {
	if size < 0 {
		return "", status.Error(codes.InvalidArgument, "page size cannot be negative")
	}
	most := int(size)
	if most == 0 || most > maxPage {
		most = maxPage
	}
	start := 0
	if token != "" {
		i, found := slices.BinarySearchFunc(items, token, func(x T, t string) int { return cmp.Compare(key(x), t) })
		if start = i; found {
			start++
		}
	}
	n, bytes, last := 0, 0, ""
	for _, x := range items[start:] {
		if !match(x) {
			continue
		}
		if n == most || bytes >= maxPageBytes {
			return last, nil
		}
		bytes += add(x)
		n, last = n+1, key(x)
	}
	return "", nil
}

// filter returns what a list filter selects.
func (e *entryService) filter(f *entryv1.ListEntriesRequest_Filter) (func(*store.Entry) bool, error) {
	if f == nil {
		return func(*store.Entry) bool { return true }, nil
	}
	var spiffeID, parentID string
	if f.BySpiffeId != nil {
		id, err := e.s.memberID(f.BySpiffeId)
		if err != nil {
			return nil, err
		}
		if svid.Reserved(id) {
			return nil, fmt.Errorf("SPIFFE ID %q: paths below /spire/ are reserved", id)
		}
		spiffeID = id.String()
	}
	if f.ByParentId != nil {
		id, err := e.s.memberID(f.ByParentId)
		if err != nil {
			return nil, err
		}
		parentID = id.String()
	}
	selectors, err := selectorMatch(f.BySelectors)
	if err != nil {
		return nil, err
	}
	federates, err := e.federatesMatch(f.ByFederatesWith)
	if err != nil {
		return nil, err
	}
	hint := f.ByHint.GetValue() // empty: any
	return func(x *store.Entry) bool {
		switch {
		case spiffeID != "" && x.SPIFFEID != spiffeID,
			parentID != "" && x.ParentID != parentID,
			hint != "" && x.Hint != hint,
			f.ByDownstream != nil && x.Downstream != f.ByDownstream.Value:
			return false
		}
		return selectors(x.Selectors) && federates(x.FederatesWith)
	}, nil
}

// federatesMatch returns whether the trust domains that an entry federates with
// meet a filter; a nil filter matches everything.
func (e *entryService) federatesMatch(m *types.FederatesWithMatch) (func([]string) bool, error) {
	if m == nil {
		return func([]string) bool { return true }, nil
	}
	if len(m.TrustDomains) == 0 {
		return nil, errors.New("empty list of federated trust domains")
	}
	want, err := trustDomains(m.TrustDomains)
	if err != nil {
		return nil, err
	}
	switch m.Match {
	case types.FederatesWithMatch_MATCH_EXACT:
		return func(have []string) bool { return slices.Equal(have, want) }, nil
	case types.FederatesWithMatch_MATCH_SUBSET:
		return func(have []string) bool { return len(have) > 0 && contains(want, have) }, nil
	case types.FederatesWithMatch_MATCH_SUPERSET:
		return func(have []string) bool { return contains(have, want) }, nil
	case types.FederatesWithMatch_MATCH_ANY:
		return func(have []string) bool {
			return slices.ContainsFunc(want, func(s string) bool { return slices.Contains(have, s) })
		}, nil
	}
	return nil, errors.New("unknown federates-with match behavior")
}

func (e *entryService) GetEntry(ctx context.Context, req *entryv1.GetEntryRequest) (*types.Entry, error) {
	if req.Id == "" {
		return nil, status.Error(codes.InvalidArgument, "missing ID")
	}
	x, err := e.s.store.Entry(req.Id)
	if errors.Is(err, store.ErrNotFound) {
		return nil, status.Error(codes.NotFound, "entry not found")
	}
	if err != nil {
		return nil, e.s.internal("get entry", err)
	}
	return entryToProto(x, req.OutputMask), nil
}

func (e *entryService) BatchCreateEntry(ctx context.Context, req *entryv1.BatchCreateEntryRequest) (*entryv1.BatchCreateEntryResponse, error) {
	if err := answerable(req, len(req.Entries)); err != nil {
		return nil, err
	}
	resp := &entryv1.BatchCreateEntryResponse{Results: make([]*entryv1.BatchCreateEntryResponse_Result, len(req.Entries))}
	var good []store.Entry
	var index []int
	for i, p := range req.Entries {
		x, err := e.newEntry(p)
		if err != nil {
			resp.Results[i] = &entryv1.BatchCreateEntryResponse_Result{Status: statusOf(codes.InvalidArgument, err)}
			continue
		}
		good, index = append(good, *x), append(index, i)
	}
	results, err := e.s.store.CreateEntries(ctx, good)
	var noBundle *store.NoBundleError
	for n, i := range index {
		r := new(entryv1.BatchCreateEntryResponse_Result)
		switch {
		case err != nil:
			r.Status = internalStatus(e.s.internal("create entries", err))
		case errors.Is(results[n].Err, store.ErrExists):
			r.Status = &types.Status{Code: int32(codes.AlreadyExists), Message: "similar entry already exists"}
			r.Entry = entryToProto(results[n].Entry, req.OutputMask)
		case errors.As(results[n].Err, &noBundle):
			r.Status = statusOf(codes.InvalidArgument, noBundle)
		case results[n].Err != nil:
			r.Status = internalStatus(e.s.internal("create entries", results[n].Err))
		default:
			r.Status = okStatus()
			r.Entry = entryToProto(results[n].Entry, req.OutputMask)
			e.s.cfg.Log.Info("entry created", "entry", results[n].Entry.ID, "spiffe_id", results[n].Entry.SPIFFEID)
		}
		resp.Results[i] = r
	}
	return resp, nil
}

func (e *entryService) newEntry(p *types.Entry) (*store.Entry, error) {
	if p == nil {
		return nil, badEntry("it is missing")
	}
	x := new(store.Entry)
	if p.Id != "" {
		if len(p.Id) > maxEntryID || !entryID.MatchString(p.Id) {
			return nil, badEntry("entry ID %.64q is too long or has characters other than letters, digits and ._-", p.Id)
		}
		x.ID = p.Id
	}
	return x, e.s.setEntry(x, p, nil)
}

func (e *entryService) BatchUpdateEntry(ctx context.Context, req *entryv1.BatchUpdateEntryRequest) (*entryv1.BatchUpdateEntryResponse, error) {
	if err := answerable(req, len(req.Entries)); err != nil {
		return nil, err
	}
	resp := new(entryv1.BatchUpdateEntryResponse)
	for _, p := range req.Entries {
		r := new(entryv1.BatchUpdateEntryResponse_Result)
		var noBundle *store.NoBundleError
		resp.Results = append(resp.Results, r)
		if p.GetId() == "" {
			r.Status = &types.Status{Code: int32(codes.InvalidArgument), Message: "missing entry ID"}
			continue
		}
		x, err := e.s.store.UpdateEntry(ctx, p.Id, func(x *store.Entry) error { return e.s.setEntry(x, p, req.InputMask) })
		switch {
		case errors.Is(err, store.ErrNotFound):
			r.Status = &types.Status{Code: int32(codes.NotFound), Message: "entry not found"}
		case errors.Is(err, errEntry), errors.As(err, &noBundle):
			r.Status = statusOf(codes.InvalidArgument, err)
		case errors.Is(err, store.ErrExists):
			r.Status = statusOf(codes.AlreadyExists, err)
		case err != nil:
			r.Status = internalStatus(e.s.internal("update entry", err))
		default:
			r.Status = okStatus()
			r.Entry = entryToProto(x, req.OutputMask)
			e.s.cfg.Log.Info("entry updated", "entry", x.ID, "revision", x.Revision)
		}
	}
	return resp, nil
}

func (e *entryService) BatchDeleteEntry(ctx context.Context, req *entryv1.BatchDeleteEntryRequest) (*entryv1.BatchDeleteEntryResponse, error) {
	if err := answerable(req, len(req.Ids)); err != nil {
		return nil, err
	}
	resp := new(entryv1.BatchDeleteEntryResponse)
	for _, id := range req.Ids {
		r := &entryv1.BatchDeleteEntryResponse_Result{Id: id, Status: okStatus()}
		resp.Results = append(resp.Results, r)
		if id == "" {
			r.Status = &types.Status{Code: int32(codes.InvalidArgument), Message: "missing entry ID"}
			continue
		}
		switch err := e.s.store.DeleteEntry(ctx, id); {
		case errors.Is(err, store.ErrNotFound):
			r.Status = &types.Status{Code: int32(codes.NotFound), Message: "entry not found"}
		case err != nil:
			r.Status = internalStatus(e.s.internal("delete entry", err))
		default:
			e.s.cfg.Log.Info("entry deleted", "entry", id)
		}
	}
	return resp, nil
}

// itemOverhead is what the answer to one item of a batch holds beside what was
// sent, in bytes: an ID, a status, a revision and times.
const itemOverhead = 128

// maxReply is what a client takes, in bytes: gRPC's default.
const maxReply = 4 << 20

// answerable fails when the answer to a batch could be too large for the
// client. It would be done, and nobody told.
func answerable(req proto.Message, items int) error {
	if size := proto.Size(req) + items*itemOverhead; size > maxReply {
		return status.Errorf(codes.ResourceExhausted, "a batch of %d items is too large for its answer: send it in parts", items)
	}
	return nil
}

func okStatus() *types.Status { return &types.Status{Code: int32(codes.OK), Message: "OK"} }

func statusOf(c codes.Code, err error) *types.Status {
	return &types.Status{Code: int32(c), Message: err.Error()}
}

// internalStatus is what s.internal returned, as the status of one item.
func internalStatus(err error) *types.Status {
	st := status.Convert(err)
	return &types.Status{Code: int32(st.Code()), Message: st.Message()}
}
