package layout

import (
	"crypto"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/in-toto/in-toto-golang/in_toto"

	"github.com/rootlink/rootlink/pkg/link"
)

// Pinned is a pipeline that verified, as in-toto's other implementations can
// check it: links signed by keys that the layout names. Whoever exports it
// vouches: the links' own signatures are by certificates of minutes, which those
// tools would judge at the present time, so new keys sign what was verified.
type Pinned struct {
	Layout []byte       // Metablock, signed
	Links  []PinnedLink // Metablocks, each signed by a key of its own
	Key    []byte       // the layout's public key, in securesystemslib's JSON
	KeyPEM []byte       // and in PEM
}

// PinnedLink is one classic link under the name that verifiers look for.
type PinnedLink struct {
	Name string
	Raw  []byte
}

// ErrNotPinnable: in-toto's classic formats cannot say it.
var ErrNotPinnable = errors.New("classic in-toto links cannot say it")

// ExportPinned turns a pipeline that Verify accepted into a key-pinned one that
// holds until expires, or the layout's own end. in and res are Verify's;
// newKey makes the key of one link, which is forgotten after it has signed.
func ExportPinned(in Input, res *Result, key crypto.Signer, newKey func() (crypto.Signer, error), expires time.Time) (*Pinned, error) {
	if res.Verdict != link.VerdictVerified {
		return nil, fmt.Errorf("%w: only what was verified is vouched for", link.ErrPolicy)
	}
	f, err := ParseFile(in.Layout.Raw)
	if err != nil {
		return nil, err
	}
	l := f.layout
	if l.Expires.Before(expires) || expires.IsZero() {
		expires = l.Expires
	}
	w := in_toto.Layout{
		Type: "layout", Steps: []in_toto.Step{}, Inspect: []in_toto.Inspection{}, Keys: map[string]in_toto.Key{},
		Expires: expires.UTC().Format(in_toto.ISO8601DateSchema),
		Readme: fmt.Sprintf("Layout %s, serial %d, with pinned keys. The links were verified by rootlink and signed anew: "+
			"whoever signed this layout vouches for that. It shows nothing of machines, programs or times.", l.Name, l.Serial),
	}
	out := &Pinned{}
	for i := range l.Steps {
		s := &l.Steps[i]
		if s.Sublayout != "" {
			return nil, fmt.Errorf("%w: step %q is a sublayout's", ErrNotPinnable, s.Name)
		}
		step := in_toto.Step{
			Type: "step", PubKeys: []string{}, ExpectedCommand: orEmpty(s.Command),
			SupplyChainItem: in_toto.SupplyChainItem{Name: s.Name, ExpectedMaterials: orEmpty(s.Materials), ExpectedProducts: orEmpty(s.Products)},
		}
		links, err := in.countedLinks(res, s.Name)
		if err != nil {
			return nil, err
		}
		for _, sl := range links {
			if len(step.ExpectedCommand) == 0 {
				step.ExpectedCommand = orEmpty(sl.command) // in-toto only warns of another, and does of none
			}
			k, err := newKey()
			if err != nil {
				return nil, err
			}
			pub, err := NewKey(k.Public())
			if err != nil {
				return nil, err
			}
			mb, err := signMetablock(sl.classicForm(s.ExitCode), []crypto.Signer{k})
			if err != nil {
				return nil, err
			}
			raw, err := json.MarshalIndent(mb, "", " ")
			if err != nil {
				return nil, err
			}
			out.Links = append(out.Links, PinnedLink{fmt.Sprintf(in_toto.LinkNameFormat, s.Name, pub.KeyID), append(raw, '\n')})
			w.Keys[pub.KeyID] = pub
			step.PubKeys = append(step.PubKeys, pub.KeyID)
		}
		step.Threshold = len(links)
		w.Steps = append(w.Steps, step)
	}
	for _, in := range l.Inspections {
		w.Inspect = append(w.Inspect, in_toto.Inspection{
			Type: "inspection", Run: in.Run,
			SupplyChainItem: in_toto.SupplyChainItem{Name: in.Name, ExpectedMaterials: orEmpty(in.Materials), ExpectedProducts: orEmpty(in.Products)},
		})
	}
	mb, err := signMetablock(w, []crypto.Signer{key})
	if err != nil {
		return nil, err
	}
	if out.Layout, err = json.MarshalIndent(mb, "", " "); err != nil {
		return nil, err
	}
	out.Layout = append(out.Layout, '\n')
	return out, out.setKey(key.Public())
}

// countedLinks are one link of each identity that the step's threshold counted.
func (in Input) countedLinks(res *Result, step string) ([]*stepLink, error) {
	var out []*stepLink
	seen := map[string]bool{}
	for i := range res.Links {
		r := &res.Links[i]
		s := r.Statement()
		if r.Verdict != link.VerdictVerified || s == nil || s.Step != step || seen[r.Chain.SVID.SPIFFEID] {
			continue
		}
		seen[r.Chain.SVID.SPIFFEID] = true
		l := &stepLink{name: r.Name, step: step, signer: r.Chain.SVID.SPIFFEID, command: s.Command}
		var err error
		if l.materials, err = artifactsOf(s.Materials); err != nil {
			return nil, err
		}
		if l.products, err = artifactsOf(s.Subjects); err != nil {
			return nil, err
		}
		out = append(out, l)
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("%w: step %q is by pinned keys already: copy its links", ErrNotPinnable, step)
	}
	return out, nil
}

// classicForm is l as in-toto's link.
func (l *stepLink) classicForm(exit int) in_toto.Link {
	return in_toto.Link{
		Type: "link", Name: l.step, Materials: l.materials, Products: l.products, Command: orEmpty(l.command),
		ByProducts:  map[string]any{"return-value": exit, "stdout": "", "stderr": ""},
		Environment: map[string]any{"signer": l.signer},
	}
}

func (p *Pinned) setKey(pub crypto.PublicKey) error {
	k, err := NewKey(pub)
	if err != nil {
		return err
	}
	if p.Key, err = json.Marshal(map[string]any{
		"keytype": k.KeyType, "scheme": k.Scheme, "keyid_hash_algorithms": k.KeyIDHashAlgorithms, "keyval": map[string]string{"public": k.KeyVal.Public},
	}); err != nil {
		return err
	}
	p.KeyPEM, err = publicPEM(pub)
	return err
}
