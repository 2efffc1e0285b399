package upstream

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
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

// maxEntries bounds what one agent keeps.
const maxEntries = 200_000

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
	next := make(map[string]*types.Entry)
	resp, err := stream.Recv()
	if err != nil {
		return nil, err
	}
	if len(resp.GetEntryRevisions()) == 0 {
		return next, takeEntries(stream, resp, next)
	}
	var need []string
	for {
		for _, r := range resp.GetEntryRevisions() {
			if len(next)+len(need) >= maxEntries {
				return nil, fmt.Errorf("server authorises this node for more than %d entries", maxEntries)
			}
			old := known[r.GetId()]
			// A deleted entry may be made again with the same ID and a lower revision.
			if old != nil && old.GetRevisionNumber() == r.GetRevisionNumber() && old.GetCreatedAt() == r.GetCreatedAt() {
				next[r.GetId()] = old
			} else {
				need = append(need, r.GetId())
			}
		}
		if !resp.GetMore() {
			break
		}
		if resp, err = stream.Recv(); err != nil {
			return nil, err
		}
	}
	if len(need) == 0 {
		return next, nil
	}
	if err := stream.Send(&entryv1.SyncAuthorizedEntriesRequest{Ids: need}); err != nil {
		return nil, recvError(stream, err)
	}
	if resp, err = stream.Recv(); err != nil {
		return nil, err
	}
	return next, takeEntries(stream, resp, next)
}

func takeEntries(stream entryv1.Entry_SyncAuthorizedEntriesClient, resp *entryv1.SyncAuthorizedEntriesResponse, into map[string]*types.Entry) error {
	for {
		for _, e := range resp.GetEntries() {
			if len(into) >= maxEntries {
				return fmt.Errorf("server authorises this node for more than %d entries", maxEntries)
			}
			if e.GetId() == "" {
				return errors.New("server sent an entry without an ID")
			}
			into[e.GetId()] = e
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
