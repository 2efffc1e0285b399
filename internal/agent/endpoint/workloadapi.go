package endpoint

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	workloadpb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/rootlink/rootlink/internal/agent/identity"
	"github.com/rootlink/rootlink/internal/agent/upstream"
	"github.com/rootlink/rootlink/internal/measured"
)

// FetchX509SVID streams the caller's SVIDs: at once, and again whenever one is
// renewed, an entry comes, goes or changes, or the bundle does.
func (s *Server) FetchX509SVID(_ *workloadpb.X509SVIDRequest, stream workloadpb.SpiffeWorkloadAPI_FetchX509SVIDServer) error {
	return watch(s, stream.Context(), stream.Send, s.svids)
}

// FetchX509Bundles streams the trust bundles of the caller's trust domain and
// of those its entries federate with.
func (s *Server) FetchX509Bundles(_ *workloadpb.X509BundlesRequest, stream workloadpb.SpiffeWorkloadAPI_FetchX509BundlesServer) error {
	return watch(s, stream.Context(), stream.Send, s.bundles)
}

const noWIT = "this agent serves no WIT-SVIDs, an optional profile; hint: ask for X.509-SVIDs or JWT-SVIDs"

func (s *Server) FetchWITSVID(*workloadpb.WITSVIDRequest, workloadpb.SpiffeWorkloadAPI_FetchWITSVIDServer) error {
	return status.Error(codes.Unimplemented, noWIT)
}

func (s *Server) FetchWITBundles(*workloadpb.WITBundlesRequest, workloadpb.SpiffeWorkloadAPI_FetchWITBundlesServer) error {
	return status.Error(codes.Unimplemented, noWIT)
}

// answer is one message to the caller and when to look again (zero: only when
// something changes).
type answer[M proto.Message] func(ctx context.Context, v *identity.View, subj measured.Subject, es []*identity.Entry) (m M, again time.Time, err error)

// watch is the loop of every stream. The caller is measured when it calls, and
// checked to be the same process with the same executable before each message.
func watch[M proto.Message](s *Server, ctx context.Context, send func(M) error, make answer[M]) error {
	c, err := measured.CallerOf(ctx)
	if err != nil {
		return err
	}
	subj, err := c.Measure(ctx, s.attestor)
	if err != nil {
		return err
	}
	var last M
	sent := false
	for {
		changed := s.cfg.Keeper.Changed()
		view, entries, err := s.entitled(ctx, subj, !sent)
		if err != nil {
			return err
		}
		m, again, err := make(ctx, view, subj, entries)
		if err != nil {
			return err
		}
		if !sent || !proto.Equal(m, last) {
			if err := c.Check(); err != nil {
				return measured.Error(err)
			}
			if err := send(m); err != nil {
				return err
			}
			last, sent = m, true
		}
		if err := sleep(ctx, changed, again); err != nil {
			return err
		}
	}
}

// sleep waits for a change or the time at, zero meaning no time.
func sleep(ctx context.Context, changed <-chan struct{}, at time.Time) error {
	var timer <-chan time.Time
	if !at.IsZero() {
		t := time.NewTimer(max(time.Until(at), 10*time.Millisecond))
		defer t.Stop()
		timer = t.C
	}
	select {
	case <-ctx.Done():
		return status.FromContextError(ctx.Err()).Err()
	case <-changed:
	case <-timer:
	}
	return nil
}

// entitled returns the entries that match, oldest first. When there are none
// and the caller has just come, the server is asked at once: its entry may have
// been made a moment ago.
func (s *Server) entitled(ctx context.Context, subj measured.Subject, knock bool) (*identity.View, []*identity.Entry, error) {
	v, verr := s.cfg.Keeper.View()
	if verr == nil {
		if es := matches(v, subj); len(es) > 0 {
			return v, es, nil
		}
	}
	if knock {
		if err := s.knock(ctx, func(v *identity.View) bool { return len(matches(v, subj)) > 0 }); err != nil {
			return nil, nil, err
		}
	}
	v, verr = s.cfg.Keeper.View()
	if verr != nil {
		return nil, nil, status.Error(codes.Unavailable, verr.Error())
	}
	es := matches(v, subj)
	if len(es) == 0 {
		return nil, nil, noIdentity(v, subj.Selectors, false)
	}
	return v, es, nil
}

// stockPatience is how long somebody who is unknown to a stock server waits for
// an entry that was made a moment ago: that server looks at its own database
// every five seconds.
const stockPatience = 6 * time.Second

// knock syncs until found is true of the view, or there is no hope: after one
// sync with a server of ours, a little later with a stock one.
func (s *Server) knock(ctx context.Context, found func(*identity.View) bool) error {
	patience := time.Now().Add(stockPatience)
	for {
		kctx, cancel := context.WithTimeout(ctx, knockTimeout)
		err := s.cfg.Keeper.SyncNow(kctx)
		cancel()
		if ctx.Err() != nil {
			return status.FromContextError(ctx.Err()).Err()
		}
		if errors.Is(err, upstream.ErrBanned) {
			return upstream.BannedStatus()
		}
		if err != nil {
			// The server is away: whether this workload has an identity is not
			// known, which is not the same as no.
			return status.Errorf(codes.Unavailable, "no identity is known for this workload and the server cannot be asked: %s", status.Convert(err).Message())
		}
		v, err := s.cfg.Keeper.View()
		if err != nil {
			return status.Error(codes.Unavailable, err.Error())
		}
		if found(v) || !v.Stock || !s.cfg.Keeper.MayStillFill() && time.Now().After(patience) {
			return nil
		}
		// On the second, so that all who wait share a sync.
		if err := sleep(ctx, nil, time.Now().Truncate(time.Second).Add(time.Second)); err != nil {
			return err
		}
	}
}

// matches returns entries in the order of their age, so that the first one (the
// default identity of the Workload API) stays the same when more are made. Of
// several with one hint only the first counts, as the Workload API demands
// hints to be unique.
func matches(v *identity.View, subj measured.Subject) []*identity.Entry {
	es := v.Workload(subj.Selectors)
	slices.SortStableFunc(es, func(a, b *identity.Entry) int {
		if a.CreatedAt != b.CreatedAt {
			return int(max(-1, min(1, a.CreatedAt-b.CreatedAt)))
		}
		return 0
	})
	seen := make(map[string]bool)
	return slices.DeleteFunc(es, func(e *identity.Entry) bool {
		dup := e.Hint != "" && seen[e.Hint]
		seen[e.Hint] = true
		return dup
	})
}

// svids gets an SVID for each entry. Those that cannot be had are left out; it
// fails when none can.
func (s *Server) svids(ctx context.Context, v *identity.View, subj measured.Subject, es []*identity.Entry) (*workloadpb.X509SVIDResponse, time.Time, error) {
	got := make([]*identity.SVID, len(es))
	errs := make([]error, len(es))
	var wg sync.WaitGroup
	for i, e := range es { // together, so that they share a batch
		wg.Go(func() { got[i], errs[i] = s.cfg.Issuer.SVID(ctx, e, subj) })
	}
	wg.Wait()
	if err := ctx.Err(); err != nil {
		return nil, time.Time{}, status.FromContextError(err).Err()
	}
	authorities := s.cfg.Issuer.Authorities()
	bundle := identity.ConcatDER(authorities)
	resp := &workloadpb.X509SVIDResponse{FederatedBundles: federated(v, es)}
	var again time.Time
	var failed error
	for i, svid := range got {
		at := time.Now().Add(5 * time.Second)
		if errs[i] == nil && !identity.IssuedBy(authorities, svid.Chain) {
			errs[i] = errNotInBundle
		}
		if errs[i] != nil {
			failed = fmt.Errorf("%s: %w", es[i].SPIFFEID, errs[i])
		} else {
			at = svid.RenewAt
			resp.Svids = append(resp.Svids, &workloadpb.X509SVID{
				SpiffeId: es[i].SPIFFEID.String(), X509Svid: svid.ChainDER(), X509SvidKey: svid.KeyDER,
				Bundle: bundle, Hint: es[i].Hint,
			})
		}
		if again.IsZero() || at.Before(again) {
			again = at
		}
	}
	if len(resp.Svids) == 0 {
		return nil, time.Time{}, issueError(failed)
	}
	return resp, again, nil
}

// errNotInBundle: the authority was withdrawn while the SVID was on its way.
var errNotInBundle = errors.New("the authority that issued it is no longer in the trust bundle")

func (s *Server) bundles(_ context.Context, v *identity.View, _ measured.Subject, es []*identity.Entry) (*workloadpb.X509BundlesResponse, time.Time, error) {
	m := federated(v, es)
	m[v.TrustDomain.IDString()] = identity.ConcatDER(s.cfg.Issuer.Authorities())
	return &workloadpb.X509BundlesResponse{Bundles: m}, time.Time{}, nil
}

func federated(v *identity.View, es []*identity.Entry) map[string][]byte {
	m := make(map[string][]byte)
	for _, e := range es {
		for _, td := range e.FederatesWith {
			if as := v.Federated[td].X509; len(as) > 0 {
				m[td.IDString()] = identity.ConcatDER(as)
			}
		}
	}
	return m
}

// issueError turns what the server or the quoter said into what a workload
// hears. A refusal keeps its code and reason, everything else means "later".
func issueError(err error) error {
	if errors.Is(err, upstream.ErrBanned) {
		return upstream.BannedStatus()
	}
	st, ok := status.FromError(err)
	if !ok {
		var g interface{ GRPCStatus() *status.Status }
		if errors.As(err, &g) {
			st, ok = g.GRPCStatus(), true
		}
	}
	if ok {
		switch st.Code() {
		case codes.PermissionDenied, codes.InvalidArgument, codes.FailedPrecondition, codes.NotFound, codes.Aborted,
			codes.ResourceExhausted, codes.Canceled, codes.DeadlineExceeded, codes.Unimplemented:
			return status.Errorf(st.Code(), "no SVID issued: %s", bounded(plain(err)))
		}
	}
	if errors.Is(err, identity.ErrNoEvidence) {
		return status.Errorf(codes.FailedPrecondition, "no SVID issued: %s", err)
	}
	return status.Errorf(codes.Unavailable, "no SVID issued: %s", bounded(plain(err)))
}

// plain is err's text without gRPC's prefix in the middle of it.
func plain(err error) string {
	var inner interface {
		error
		GRPCStatus() *status.Status
	}
	if errors.As(err, &inner) {
		return strings.Replace(err.Error(), inner.Error(), inner.GRPCStatus().Message(), 1)
	}
	return err.Error()
}

// maxMessage bounds what an error message carries, in bytes: it travels in an
// HTTP/2 header.
const maxMessage = 1500

// grpcWords is what gRPC writes before the message of an error inside another.
var grpcWords = regexp.MustCompile(`rpc error: code = \w+ desc = `)

func bounded(s string) string {
	s = grpcWords.ReplaceAllString(s, "")
	if len(s) <= maxMessage {
		return s
	}
	return string(bytes.ToValidUTF8([]byte(s[:maxMessage]), nil)) + " …"
}
