package identity

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/rootlink/rootlink/internal/agent/upstream"
	"github.com/rootlink/rootlink/internal/measured"
	"github.com/rootlink/rootlink/internal/vouch"
	"github.com/rootlink/rootlink/pkg/attest"
	"github.com/rootlink/rootlink/plugins/tpmnode/wire"
	tpmv1 "github.com/rootlink/rootlink/proto/rootlink/tpm/v1"
)

// ErrNoEvidence means that this server takes no evidence: a stock SPIRE server.
var ErrNoEvidence = errors.New("the server does not issue SVIDs with evidence (it is a stock SPIRE server)")

// ErrNoQuoter means that nothing here can have a TPM quote: the node attestor is
// an external plugin that serves no Quoter.
var ErrNoQuoter = status.Error(codes.FailedPrecondition, "this agent's node attestor is an external plugin without a TPM's quotes, so there is no evidence")

// Leaf is what evidence is asked to commit to; the rest of the leaf is the
// agent's own.
type Leaf struct {
	Origin     attest.KeyOrigin
	SPIFFEID   string
	SPKI       []byte // DER of the SVID key
	Executable [32]byte
	Recorder   [32]byte
	Tool       [32]byte
	Payload    [32]byte
	Selectors  []string
}

// Evidence is a finished commitment.
type Evidence struct {
	Record    *attest.Evidence
	Extension []byte // DER value of the id-pe-cmw extension
	nonce     [32]byte
	session   *upstream.Session
}

// Evidence has the TPM quote a commitment to l with a fresh nonce.
func (i *Issuer) Evidence(ctx context.Context, l Leaf) (*Evidence, error) {
	view, err := i.keeper.View()
	if err != nil {
		return nil, err
	}
	if view.Stock {
		return nil, ErrNoEvidence
	}
	if i.quoter == nil {
		return nil, ErrNoQuoter
	}
	nonce, err := i.nonces.get(ctx)
	if err != nil {
		return nil, fmt.Errorf("get a nonce: %w", err)
	}
	// After the nonce, which may have made the agent attest again.
	sess, err := i.node.Session()
	if err != nil {
		return nil, err
	}
	leaf := &attest.Leaf{
		Kind: attest.KindLeaf, KeyOrigin: l.Origin,
		TrustDomain: view.TrustDomain.Name(), SPIFFEID: l.SPIFFEID,
		SVIDKey: sha256.Sum256(l.SPKI), AgentKey: sess.KeyHash,
		Executable: l.Executable, Recorder: l.Recorder, Tool: l.Tool,
		Payload: l.Payload, Selectors: l.Selectors, Nonce: nonce,
	}
	resp, err := i.quoter.Quote(ctx, vouch.Request(leaf, view.quotePCRs()))
	if err != nil {
		return nil, i.quoteError(err)
	}
	var rec *attest.Evidence
	var ext pkix.Extension
	err = i.InTurn(func() (err error) {
		if rec, err = vouch.Read(resp, leaf); err == nil {
			ext, err = rec.Extension()
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	return &Evidence{Record: rec, Extension: ext.Value, nonce: nonce, session: sess}, nil
}

// Detached has the TPM commit to an SVID that this agent just got from a server
// that signs no evidence, for a key that the caller of a step made.
func (i *Issuer) Detached(ctx context.Context, step *measured.Step, svid *x509.Certificate, e *Entry, payload [32]byte) (*attest.Detached, error) {
	view, err := i.keeper.View()
	if err != nil {
		return nil, err
	}
	if i.quoter == nil {
		return nil, ErrNoQuoter
	}
	sess, err := i.node.Session()
	if err != nil {
		return nil, err
	}
	d, err := vouch.Detached(ctx, i.quoter, vouch.Statement{
		Step: step, Origin: attest.OriginCaller, SPIFFEID: e.SPIFFEID, SVID: svid,
		AgentSVID: sess.Chain, Payload: payload, PCRs: view.quotePCRs(),
	})
	if _, ok := status.FromError(err); ok && err != nil {
		return nil, i.quoteError(err)
	}
	return d, err
}

func (v *View) quotePCRs() []*tpmv1.PCRSelection {
	var out []*tpmv1.PCRSelection
	for _, p := range v.PCRs {
		out = append(out, &tpmv1.PCRSelection{Bank: p.Bank, Indices: p.Indices})
	}
	return out
}

// quoteError is a failed quote for the workload. A missing AK certificate
// mends itself, so it means "later".
func (i *Issuer) quoteError(err error) error {
	st := status.Convert(err)
	code := st.Code()
	if wire.IsMustAttest(err) {
		i.node.Uncertified()
		code = codes.Unavailable
	}
	return status.Errorf(code, "quote: %s", st.Message())
}

// Current says whether ev still names the agent's present SVID. After the agent
// attested again, the server would refuse evidence that names the old one.
func (i *Issuer) Current(ev *Evidence) bool {
	s, err := i.node.Session()
	return err == nil && s == ev.session
}
