package identity

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/rootlink/rootlink/internal/agent/upstream"
	"github.com/rootlink/rootlink/internal/measured"
	"github.com/rootlink/rootlink/internal/vouch"
	"github.com/rootlink/rootlink/pkg/attest"
)

// Issuer gets SVIDs from the server.
type Issuer struct {
	keeper *Keeper
	node   *upstream.Node
	trust  *upstream.Trust
	quoter vouch.Quoter
	log    *slog.Logger
	now    func() time.Time

	batch  batcher
	nonces nonces
	cache  cache
	jwts   jwtCache

	// turns holds a token for each answer that is being checked.
	turns chan struct{}
}

// InTurn calls f, which must only compute, when fewer than there are CPUs do.
// A quote lets hundreds of requests go at once: side by side they would all end
// last, and hold up those that have yet to get into the next quote.
func (i *Issuer) InTurn(f func() error) error {
	i.turns <- struct{}{}
	defer func() { <-i.turns }()
	return f()
}

// NewIssuer returns an Issuer.
func NewIssuer(k *Keeper, node *upstream.Node, trust *upstream.Trust, quoter vouch.Quoter, log *slog.Logger) *Issuer {
	i := &Issuer{keeper: k, node: node, trust: trust, quoter: quoter, log: log, now: time.Now, turns: make(chan struct{}, runtime.GOMAXPROCS(0))}
	i.batch.calls = 2 // so that a far server need not wait for us
	i.batch.sign = func(ctx context.Context, reqs []upstream.SignRequest) (out []upstream.SignResult, err error) {
		err = node.Do(ctx, func(ctx context.Context, s *upstream.Session) (err error) {
			out, err = s.Sign(ctx, reqs)
			return err
		})
		return out, err
	}
	i.nonces = nonces{now: time.Now, seen: node.NoteServerTime, fetch: func(ctx context.Context) (n [32]byte, err error) {
		err = node.Do(ctx, func(ctx context.Context, s *upstream.Session) (err error) {
			n, err = s.Nonce(ctx)
			return err
		})
		return n, err
	}}
	i.cache.init(i)
	return i
}

// Authorities returns the trust domain's authorities for handing out beside an
// SVID that was issued before the call: Sign adds the authority of what it
// returns, so a View that was taken earlier may lack it.
func (i *Issuer) Authorities() []*x509.Certificate { return i.trust.Authorities() }

// IssuedBy says whether one of authorities issued chain, which was verified
// when it came: whoever is handed both must be able to verify the one with the
// other.
func IssuedBy(authorities, chain []*x509.Certificate) bool {
	return upstream.IssuedBy(authorities, chain)
}

// SVID is an X.509-SVID with the key that the agent made for it.
type SVID struct {
	Entry    *Entry
	Chain    []*x509.Certificate
	KeyDER   []byte // PKCS#8
	NotAfter time.Time
	RenewAt  time.Time
}

// ChainDER is the chain as the Workload API carries it, concatenated.
func (s *SVID) ChainDER() []byte { return ConcatDER(s.Chain) }

// ConcatDER concatenates certificates.
func ConcatDER(cs []*x509.Certificate) []byte {
	var b bytes.Buffer
	for _, c := range cs {
		b.Write(c.Raw)
	}
	return b.Bytes()
}

// issue makes a key and has an SVID issued for it.
func (i *Issuer) issue(ctx context.Context, e *Entry, s measured.Subject) (*SVID, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	view, err := i.keeper.View()
	if err != nil {
		return nil, err
	}
	var chain []*x509.Certificate
	if view.NeedsEvidence(e.SPIFFEID) {
		chain, err = i.withEvidence(ctx, e, s, key)
	} else {
		var csr []byte
		if csr, err = x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key); err == nil {
			chain, err = i.Sign(ctx, e, csr, key.Public())
		}
	}
	if err != nil {
		return nil, err
	}
	now := i.now()
	return &SVID{
		Entry: e, Chain: chain, KeyDER: keyDER,
		NotAfter: chain[0].NotAfter,
		RenewAt:  now.Add(upstream.HalfLife(now, chain[0].NotAfter)),
	}, nil
}

// withEvidence quotes, and quotes once more when the server does not like it:
// a server that was restarted knows none of its old nonces.
func (i *Issuer) withEvidence(ctx context.Context, e *Entry, s measured.Subject, key *ecdsa.PrivateKey) ([]*x509.Certificate, error) {
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return nil, err
	}
	for attempt := 0; ; attempt++ {
		ev, err := i.Evidence(ctx, Leaf{
			Origin: attest.OriginAgent, SPIFFEID: e.SPIFFEID.String(), SPKI: spki,
			Executable: s.Executable, Selectors: s.Selectors,
		})
		if err != nil {
			return nil, err
		}
		csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
			ExtraExtensions: []pkix.Extension{{Id: attest.ExtensionID(), Value: ev.Extension}},
		}, key)
		if err != nil {
			return nil, err
		}
		chain, err := i.SignEvidence(ctx, e, csr, key.Public(), ev)
		if err == nil || attempt > 0 || !refusedEvidence(err) {
			return chain, err
		}
	}
}

// refusedEvidence says whether the server answered and said no, rather than
// being away: new evidence may then do better.
func refusedEvidence(err error) bool {
	switch status.Code(err) {
	case codes.InvalidArgument, codes.PermissionDenied, codes.FailedPrecondition, codes.Aborted:
		return true
	}
	return false
}

// SignEvidence is Sign for a CSR that carries ev, and checks that the SVID
// carries it too.
func (i *Issuer) SignEvidence(ctx context.Context, e *Entry, csr []byte, key crypto.PublicKey, ev *Evidence) ([]*x509.Certificate, error) {
	chain, err := i.sign(ctx, e, upstream.SignRequest{EntryID: e.ID, CSR: csr, Under: ev.session}, key)
	if err != nil {
		if refusedEvidence(err) {
			i.nonces.forget(ev.nonce)
		}
		// The evidence names the agent SVID it was made under. If the agent
		// attested again meanwhile, a refusal says nothing about the workload.
		if !i.Current(ev) && !errors.Is(err, upstream.ErrBanned) {
			return nil, status.Errorf(codes.Aborted, "the agent attested again meanwhile: %s", status.Convert(err).Message())
		}
		return nil, err
	}
	// A server that ignores unknown extensions would hand out an SVID without
	// the evidence it was asked for.
	var got *attest.Evidence
	err = i.InTurn(func() (err error) {
		got, err = attest.FromCertificate(chain[0])
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("evidence in the issued SVID: %w", err)
	}
	if !bytes.Equal(got.Attest, ev.Record.Attest) || !bytes.Equal(got.Signature, ev.Record.Signature) ||
		got.Salt != ev.Record.Salt || got.Payload != ev.Record.Payload || !slices.Equal(got.Selectors, ev.Record.Selectors) {
		return nil, errors.New("server put other evidence into the SVID than it was sent")
	}
	return chain, nil
}

// Sign has csr signed for e and checks what comes back: key, SPIFFE ID, chain.
func (i *Issuer) Sign(ctx context.Context, e *Entry, csr []byte, key crypto.PublicKey) ([]*x509.Certificate, error) {
	return i.sign(ctx, e, upstream.SignRequest{EntryID: e.ID, CSR: csr}, key)
}

func (i *Issuer) sign(ctx context.Context, e *Entry, req upstream.SignRequest, key crypto.PublicKey) ([]*x509.Certificate, error) {
	ders, err := i.batch.do(ctx, req)
	if err != nil {
		return nil, err
	}
	var chain []*x509.Certificate
	var id spiffeid.ID
	err = i.InTurn(func() (err error) {
		if chain, err = upstream.ParseChain(ders); err == nil {
			id, err = upstream.CheckSVID(chain, key, i.trust, i.now())
		}
		return err
	})
	var unknown x509.UnknownAuthorityError
	if errors.As(err, &unknown) {
		// The server began to sign with an authority that it published after
		// our last look.
		if serr := i.node.Do(ctx, func(ctx context.Context, s *upstream.Session) error { return s.SyncBundle(ctx) }); serr == nil {
			id, err = upstream.CheckSVID(chain, key, i.trust, i.now())
		}
	}
	if err != nil {
		return nil, fmt.Errorf("issued SVID: %w", err)
	}
	if id != e.SPIFFEID {
		return nil, fmt.Errorf("server issued %q for an entry of %q", id, e.SPIFFEID)
	}
	return chain, nil
}

// cacheKey names an SVID: another executable, or in evidence other selectors,
// means another SVID.
func (i *Issuer) cacheKey(e *Entry, s measured.Subject, evidence bool) cacheKey {
	k := cacheKey{entry: e.ID, revision: e.Revision, created: e.CreatedAt, executable: s.Executable}
	if evidence {
		h := sha256.New()
		for _, sel := range s.Selectors {
			fmt.Fprintf(h, "%d:%s", len(sel), sel)
		}
		h.Sum(k.selectors[:0])
	}
	return k
}
