package upstream

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"sync/atomic"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	nodev1 "github.com/rootlink/rootlink/proto/rootlink/node/v1"
)

// Session is one agent SVID and the connection that authenticates with it.
type Session struct {
	ID      spiffeid.ID
	KeyHash [32]byte // SHA-256 of the SPKI DER of the agent SVID
	Chain   []*x509.Certificate

	conn *grpc.ClientConn
	node *Node

	replaced atomic.Bool // by another agent, and that was said
}

func (s *Session) leaf() *x509.Certificate { return s.Chain[0] }

// Bounds on what one agent keeps of what its server says.
const (
	maxEntries     = 200_000
	maxEntryBytes  = 256 << 20 // of all entries together, see entryCost
	maxAuthorities = 1024      // in one bundle
	maxBundle      = 1 << 20   // bytes of one bundle
	maxChain       = 16        // certificates of one SVID
	maxChainBytes  = 256 << 10
)

// synced is the list of entries while a stream brings it, within bounds: a
// stream need not end, and an entry may be of any size.
type synced struct {
	entries map[string]*types.Entry
	want    map[string]bool // nil: whatever comes
	left    int             // bytes
}

var errTooMuch = fmt.Errorf("server authorises this node for more than %d entries, or %d bytes of them", maxEntries, maxEntryBytes)

// entryCost is about what an entry, or its revision, takes in memory.
func entryCost(m proto.Message, parts int) int { return proto.Size(m) + 128*(parts+1) }

func (y *synced) spend(cost int) error {
	if y.left -= cost; y.left < 0 || len(y.entries) > maxEntries || len(y.want) > maxEntries {
		return errTooMuch
	}
	return nil
}

// revision notes what the server has; old is what we know of it. One that is
// said twice counts twice.
func (y *synced) revision(r *entryv1.EntryRevision, old *types.Entry) error {
	// A deleted entry may be made again with the same ID and a lower revision.
	if old != nil && old.GetRevisionNumber() == r.GetRevisionNumber() && old.GetCreatedAt() == r.GetCreatedAt() {
		y.entries[r.GetId()] = old
		return y.spend(entryCost(old, len(old.GetSelectors())+len(old.GetFederatesWith())+len(old.GetDnsNames())))
	}
	y.want[r.GetId()] = true
	return y.spend(entryCost(r, 0))
}

// take takes the entries that were asked for.
func (y *synced) take(stream entryv1.Entry_SyncAuthorizedEntriesClient, resp *entryv1.SyncAuthorizedEntriesResponse) error {
	for {
		for _, e := range resp.GetEntries() {
			if e.GetId() == "" {
				return errors.New("server sent an entry without an ID")
			}
			if err := y.spend(entryCost(e, len(e.GetSelectors())+len(e.GetFederatesWith())+len(e.GetDnsNames()))); err != nil {
				return err
			}
			if y.want == nil || y.want[e.GetId()] {
				y.entries[e.GetId()] = e
			}
		}
		if !resp.GetMore() {
			return nil
		}
		var err error
		if resp, err = stream.Recv(); err != nil {
			return err
		}
	}
}

// SyncEntries brings known up to date and returns the result; known is not
// changed. Below a page size of the server's choosing it sends every entry,
// above it revisions, from which we ask for what is new.
func (s *Session) SyncEntries(ctx context.Context, known map[string]*types.Entry) (map[string]*types.Entry, error) {
	ctx, cancel := context.WithCancel(ctx) // ends the stream
	defer cancel()
	stream, err := entryv1.NewEntryClient(s.conn).SyncAuthorizedEntries(ctx)
	if err != nil {
		return nil, err
	}
	if err := stream.Send(&entryv1.SyncAuthorizedEntriesRequest{}); err != nil {
		return nil, recvError(stream, err)
	}
	next := &synced{entries: make(map[string]*types.Entry), left: maxEntryBytes}
	resp, err := stream.Recv()
	if err != nil {
		return nil, err
	}
	if len(resp.GetEntryRevisions()) == 0 {
		return next.entries, next.take(stream, resp)
	}
	next.want = make(map[string]bool)
	for {
		for _, r := range resp.GetEntryRevisions() {
			if err := next.revision(r, known[r.GetId()]); err != nil {
				return nil, err
			}
		}
		if !resp.GetMore() {
			break
		}
		if resp, err = stream.Recv(); err != nil {
			return nil, err
		}
	}
	if len(next.want) == 0 {
		return next.entries, nil
	}
	if err := stream.Send(&entryv1.SyncAuthorizedEntriesRequest{Ids: slices.Sorted(maps.Keys(next.want))}); err != nil {
		return nil, recvError(stream, err)
	}
	if resp, err = stream.Recv(); err != nil {
		return nil, err
	}
	return next.entries, next.take(stream, resp)
}

// recvError returns the status behind a failed Send.
func recvError(stream grpc.ClientStream, err error) error {
	if errors.Is(err, io.EOF) {
		if rerr := stream.RecvMsg(&entryv1.SyncAuthorizedEntriesResponse{}); rerr != nil {
			return rerr
		}
	}
	return err
}

// SyncBundle fetches the trust domain's authorities.
func (s *Session) SyncBundle(ctx context.Context) error {
	b, err := bundlev1.NewBundleClient(s.conn).GetBundle(ctx, &bundlev1.GetBundleRequest{})
	if err != nil {
		return err
	}
	withdrawn, err := s.node.takeBundle(b)
	// Once for each change: a server that distrusts what it signs with itself
	// would keep us attesting.
	if err == nil && withdrawn && IssuedBy(s.node.cfg.Trust.Tainted(), s.Chain) {
		s.node.ask(whyTainted)
	}
	return err
}

// IssuedBy says whether one of authorities issued chain, which was verified when
// it came.
func IssuedBy(authorities, chain []*x509.Certificate) bool {
	last := chain[len(chain)-1]
	return slices.ContainsFunc(authorities, func(a *x509.Certificate) bool { return bytes.Equal(a.SubjectKeyId, last.AuthorityKeyId) })
}

// takeBundle believes b, which came from a verified server. withdrawn: other
// authorities than before are tainted.
func (n *Node) takeBundle(b *types.Bundle) (withdrawn bool, err error) {
	if err := checkBundle(b, n.cfg.TrustDomain); err != nil {
		return false, err
	}
	as, err := authorities(b)
	if err != nil {
		return false, err
	}
	keys, err := jwtKeys(b)
	if err != nil {
		return false, err
	}
	var tainted []*x509.Certificate
	for i, a := range b.GetX509Authorities() {
		if a.GetTainted() {
			tainted = append(tainted, as[i])
		}
	}
	n.cfg.Trust.SetJWT(keys)
	if withdrawn = n.cfg.Trust.setTainted(tainted); withdrawn && len(tainted) > 0 {
		n.cfg.Log.Warn("an authority is being withdrawn; what it signed is replaced", "tainted", len(tainted))
	}
	changed, err := n.cfg.Trust.Set(as, n.cfg.Now())
	if err != nil {
		// A full disk must not take identities away: it is said, and the
		// bundle in memory is good.
		n.cfg.Log.Error("bundle not saved", "error", err)
	}
	if changed {
		n.cfg.Log.Info("trust bundle updated", "authorities", len(as))
	}
	return withdrawn, nil
}

// checkBundle fails unless b is what was asked for, and small: each certificate
// takes ten times its size once parsed, and every workload is sent all of them.
func checkBundle(b *types.Bundle, td spiffeid.TrustDomain) error {
	name, err := spiffeid.TrustDomainFromString(b.GetTrustDomain())
	if err != nil || name != td {
		return fmt.Errorf("server sent a bundle of %.300q instead of %q", b.GetTrustDomain(), td.Name())
	}
	if n := len(b.GetX509Authorities()) + len(b.GetJwtAuthorities()); n > maxAuthorities || proto.Size(b) > maxBundle {
		return fmt.Errorf("server sent a bundle of %q with %d authorities in %d bytes, at most %d and %d are taken", td.Name(), n, proto.Size(b), maxAuthorities, maxBundle)
	}
	return nil
}

func authorities(b *types.Bundle) ([]*x509.Certificate, error) {
	var as []*x509.Certificate
	for _, a := range b.GetX509Authorities() {
		// A tainted authority still verifies, until it is gone.
		c, err := x509.ParseCertificate(a.GetAsn1())
		if err != nil {
			return nil, fmt.Errorf("bundle: %w", err)
		}
		as = append(as, c)
	}
	if len(as) == 0 {
		return nil, errors.New("bundle holds no X.509 authority")
	}
	return as, nil
}

// FederatedBundle returns another trust domain's authorities, none when the
// server has none.
func (s *Session) FederatedBundle(ctx context.Context, td spiffeid.TrustDomain) (out Bundle, err error) {
	b, err := bundlev1.NewBundleClient(s.conn).GetFederatedBundle(ctx, &bundlev1.GetFederatedBundleRequest{TrustDomain: td.Name()})
	switch status.Code(err) {
	case codes.OK:
	case codes.NotFound, codes.Unimplemented:
		return Bundle{}, nil
	default:
		return Bundle{}, err
	}
	if err := checkBundle(b, td); err != nil {
		return Bundle{}, err
	}
	if len(b.GetX509Authorities()) > 0 { // it may be for JWT-SVIDs alone
		if out.X509, err = authorities(b); err != nil {
			return Bundle{}, err
		}
	}
	out.JWT, err = jwtKeys(b)
	return out, err
}

// SignResult is the outcome of one CSR.
type SignResult struct {
	Chain [][]byte
	Err   error // a status error
}

// SignRequest is one CSR.
type SignRequest struct {
	EntryID string
	CSR     []byte
	// Under is the session that evidence in the CSR names, nil without evidence.
	Under *Session
}

// Sign has CSRs signed in one call. It may return fewer results than there are
// requests: a server keeps its reply small.
func (s *Session) Sign(ctx context.Context, reqs []SignRequest) ([]SignResult, error) {
	// Evidence under another session would be refused, and noted as an attack.
	n := 0
	for n < len(reqs) && (reqs[n].Under == nil || reqs[n].Under == s) {
		n++
	}
	if n == 0 && len(reqs) > 0 {
		return []SignResult{{Err: status.Error(codes.Aborted, "the agent attested again since the evidence was made")}}, nil
	}
	reqs = reqs[:n]
	params := make([]*svidv1.NewX509SVIDParams, len(reqs))
	for i, r := range reqs {
		params[i] = &svidv1.NewX509SVIDParams{EntryId: r.EntryID, Csr: r.CSR}
	}
	resp, err := svidv1.NewSVIDClient(s.conn).BatchNewX509SVID(ctx, &svidv1.BatchNewX509SVIDRequest{Params: params})
	if err != nil {
		return nil, err
	}
	if len(resp.GetResults()) == 0 || len(resp.GetResults()) > len(reqs) {
		return nil, fmt.Errorf("server answered %d CSRs with %d results", len(reqs), len(resp.GetResults()))
	}
	out := make([]SignResult, len(resp.GetResults()))
	for i, r := range resp.GetResults() {
		code := codes.Code(r.GetStatus().GetCode())
		switch {
		case code != codes.OK:
			out[i].Err = status.Error(code, r.GetStatus().GetMessage())
		case len(r.GetSvid().GetCertChain()) == 0:
			out[i].Err = status.Error(codes.Internal, "server sent an OK without a certificate")
		default:
			out[i].Chain = r.GetSvid().GetCertChain()
		}
	}
	return out, nil
}

// Nonce fetches a freshness nonce; a stock SPIRE server has none (Unimplemented).
func (s *Session) Nonce(ctx context.Context) (nonce [32]byte, err error) {
	resp, err := nodev1.NewNodeClient(s.conn).GetNonce(ctx, &nodev1.GetNonceRequest{})
	if err != nil {
		return nonce, err
	}
	if len(resp.GetNonce()) != len(nonce) {
		return nonce, fmt.Errorf("server sent a nonce of %d bytes, want %d", len(resp.GetNonce()), len(nonce))
	}
	copy(nonce[:], resp.GetNonce())
	return nonce, nil
}

// Config fetches what the server expects of evidence, nil from a stock SPIRE
// server, which expects none.
func (s *Session) Config(ctx context.Context) (*nodev1.GetConfigResponse, error) {
	resp, err := nodev1.NewNodeClient(s.conn).GetConfig(ctx, &nodev1.GetConfigRequest{})
	if status.Code(err) == codes.Unimplemented {
		return nil, nil
	}
	return resp, err
}
