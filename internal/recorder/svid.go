package recorder

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"

	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/pkg/attest"
	"github.com/rootlink/rootlink/pkg/layout"
	"github.com/rootlink/rootlink/pkg/link"
	workloadv1 "github.com/rootlink/rootlink/proto/rootlink/workload/v1"
)

// ErrEvidence: the evidence that came is not about this step.
var ErrEvidence = errors.New("the evidence is not what was asked for")

// svid is a key and the certificate for it.
type svid struct {
	key  *ecdsa.PrivateKey
	leaf *x509.Certificate
	// bare signs without evidence.
	bare bool
}

func (s *svid) id() string { return s.leaf.URIs[0].String() }

// oneLeaf reads a chain that must be a leaf alone.
func oneLeaf(chain [][]byte) (*x509.Certificate, error) {
	if len(chain) == 0 {
		return nil, errors.New("the agent sent no SVID")
	}
	leaf, err := x509.ParseCertificate(chain[0])
	if err != nil {
		return nil, fmt.Errorf("the SVID cannot be read: %w", err)
	}
	if len(leaf.URIs) != 1 {
		return nil, fmt.Errorf("the SVID has %d URIs, not one", len(leaf.URIs))
	}
	if len(chain) > 1 {
		return nil, cli.Fail(cli.ExitRun, fmt.Errorf("%s: %w", leaf.URIs[0], link.ErrIntermediate),
			"the SPIRE server must sign SVIDs by an authority of its bundle: take its UpstreamAuthority out, or set up a server without one for builds")
	}
	return leaf, nil
}

// sign signs p and, where the evidence travels beside, that too.
func (s *svid) sign(p Prepared, detached func() (*attest.Detached, error)) (*Signed, error) {
	spki, err := x509.MarshalPKIXPublicKey(s.key.Public())
	if err != nil {
		return nil, err
	}
	out := &Signed{KeyHash: sha256.Sum256(spki), SPIFFEID: s.id()}
	if !s.bare {
		if out.Detached, err = detached(); err != nil {
			return nil, err
		}
	}
	switch p := p.(type) {
	case *link.Prepared:
		switch {
		case s.bare:
			out.Bundle, err = p.SignWithoutEvidence(s.key, s.leaf)
		case out.Detached != nil:
			out.Bundle, err = p.SignDetached(s.key, s.leaf, out.Detached)
		default:
			out.Bundle, err = p.Sign(s.key, s.leaf)
		}
	case *layout.Classic:
		switch {
		case s.bare:
			out.Classic, err = p.SignWithoutEvidence(s.key, s.leaf)
		case out.Detached != nil:
			out.Classic, err = p.SignDetached(s.key, s.leaf, out.Detached)
		default:
			out.Classic, err = p.Sign(s.key, s.leaf)
		}
	default:
		err = fmt.Errorf("nothing signs a %T", p)
	}
	switch {
	case err != nil:
		return nil, err
	case out.Detached != nil:
		out.Evidence, out.DetachedAs = out.Detached.Evidence, attest.DetachedFile(s.leaf.Raw, p.Digest())
	case !s.bare:
		if out.Evidence, err = attest.FromCertificate(s.leaf); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// readDetached reads what a node says of a step, and fails unless that is what it
// said while the tool was stopped: our signature over it makes it our word too.
func readDetached(b []byte, origin attest.KeyOrigin, m *workloadv1.Measurement) (*attest.Detached, error) {
	d, err := attest.ParseDetached(b)
	if err != nil {
		return nil, err
	}
	agent, err := x509.ParseCertificate(d.AgentSVID[0])
	if err != nil {
		return nil, fmt.Errorf("the agent's SVID cannot be read: %w", err)
	}
	e := d.Evidence
	for _, c := range []struct {
		ok   bool
		what string
	}{
		{e.KeyOrigin == origin, "the key was made by somebody else"},
		{e.AgentKey == sha256.Sum256(agent.RawSubjectPublicKeyInfo), "it names another agent's key"},
		{bytes.Equal(e.Executable[:], m.GetExecutable()), "another executable"},
		{bytes.Equal(e.Recorder[:], m.GetRecorder()), "another recorder"},
		{bytes.Equal(e.Tool[:], m.GetTool()), "another tool"},
		{len(d.Signature) == 0 && len(d.Token) == 0, "it is signed already"},
	} {
		if !c.ok {
			return nil, fmt.Errorf("%w: %s", ErrEvidence, c.what)
		}
	}
	return d, nil
}
