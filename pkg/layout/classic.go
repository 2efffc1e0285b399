package layout

import (
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"strings"

	"github.com/in-toto/in-toto-golang/in_toto"
	"github.com/secure-systems-lab/go-securesystemslib/cjson"
	"github.com/secure-systems-lab/go-securesystemslib/dsse"

	"github.com/rootlink/rootlink/pkg/envelope"
	"github.com/rootlink/rootlink/pkg/link"
)

// classicLink is in-toto's link as in-toto-run writes it. Byproducts and
// environment are open in the format.
type classicLink struct {
	Type        string         `json:"_type"`
	Name        string         `json:"name"`
	Materials   artifactSet    `json:"materials"`
	Products    artifactSet    `json:"products"`
	ByProducts  map[string]any `json:"byproducts"`
	Command     []string       `json:"command"`
	Environment map[string]any `json:"environment"`
}

// verifyClassic judges a link by pinned keys, for a step that allows it. Nothing
// is known of the machine, and T is unknown too: such a link carries no time.
func (v *verifier) verifyClassic(in NamedFile) (string, error) {
	about := func(err error) error { return &detail{link: in.Name, err: fmt.Errorf("%s: %w", in.Name, err)} }
	c, message, sigs, err := parseClassic(in.Raw)
	if err != nil {
		return "", about(err)
	}
	owner := v.owner[c.Name]
	if owner == nil {
		return "", about(fmt.Errorf("it is of step %q, which the layout does not have", c.Name))
	}
	s := owner.step(c.Name)
	if !s.KeyPinned {
		return "", about(fmt.Errorf("step %q takes no links by pinned keys: they show no hardware", s.Name))
	}
	l := &stepLink{name: in.Name, step: c.Name, command: c.Command, classic: true, inTree: true}
	l.buildID, _ = c.Environment["build_id"].(string)
	for _, id := range s.PubKeys {
		pub, err := publicKey(owner.Keys[id])
		if err != nil {
			return "", about(err)
		}
		for _, sig := range sigs {
			if l.signer == "" && envelope.VerifyMessage(pub, message, sig.sig) {
				l.signer = "key:" + id
			}
		}
	}
	if l.signer == "" {
		return "", about(fmt.Errorf("none of the %d keys of step %q signed it", len(s.PubKeys), s.Name))
	}
	if v.in.BuildID != "" && l.buildID != "" && l.buildID != v.in.BuildID {
		v.leftOut[s.Name] = append(v.leftOut[s.Name], in.Name)
		return fmt.Sprintf("%s is of build %s: left out", in.Name, l.buildID), nil
	}
	code, ok := c.ByProducts["return-value"].(float64)
	if !ok || int(code) != s.ExitCode || code != float64(int(code)) {
		return "", about(fmt.Errorf("step %q ended with %v, expected is exit code %d", s.Name, c.ByProducts["return-value"], s.ExitCode))
	}
	if l.materials, err = classicArtifacts(c.Materials); err != nil {
		return "", about(err)
	}
	if l.products, err = classicArtifacts(c.Products); err != nil {
		return "", about(err)
	}
	v.links[s.Name] = append(v.links[s.Name], l)
	return fmt.Sprintf("%s: step %q by %s; key-pinned: no hardware evidence", in.Name, s.Name, l.signer), nil
}

func classicArtifacts(m map[string]map[string]string) (map[string]in_toto.HashObj, error) {
	rs := make([]link.Resource, 0, len(m))
	for n, d := range m {
		if len(d) == 0 || len(d) > link.MaxDigests {
			return nil, malformed("%q has %d digests", n, len(d))
		}
		if !link.StrongDigest(d) {
			// Rules compare digests: of MD5 or SHA-1 alone, an attacker makes two
			// artifacts.
			return nil, fmt.Errorf("%q has no digest of SHA-256 or stronger", n)
		}
		for alg, h := range d {
			if b, err := hex.DecodeString(h); err != nil || len(b) < 16 || h != strings.ToLower(h) {
				return nil, malformed("%q: %s digest", n, alg)
			}
		}
		rs = append(rs, link.Resource{Name: n, Digest: d})
	}
	return artifactsOf(rs)
}

// IsClassic tells a classic link from other files by its form alone.
func IsClassic(raw []byte) bool {
	_, _, _, err := parseClassic(raw)
	return err == nil
}

// parseClassic reads a link in a Metablock or a DSSE envelope, and returns what
// its signatures are over.
func parseClassic(raw []byte) (*classicLink, []byte, []signature, error) {
	if len(raw) > MaxClassic {
		return nil, nil, nil, malformed("link of %d bytes, at most %d allowed", len(raw), MaxClassic)
	}
	var w struct {
		Signed      json.RawMessage `json:"signed"`
		PayloadType string          `json:"payloadType"`
		Payload     string          `json:"payload"`
		Signatures  []struct {
			KeyID string `json:"keyid"`
			Sig   string `json:"sig"`
			Cert  string `json:"cert"` // of the functionary: nothing is pinned by it here
		} `json:"signatures"`
	}
	if err := decodeStrict(raw, MaxClassic, "", &w); err != nil {
		return nil, nil, nil, fmt.Errorf("link: %w", err)
	}
	if (w.Signed == nil) == (w.Payload == "") || w.Payload != "" && w.PayloadType != in_toto.PayloadType {
		return nil, nil, nil, malformed("neither a Metablock nor a DSSE envelope of in-toto")
	}
	if len(w.Signatures) == 0 || len(w.Signatures) > MaxSignatures {
		return nil, nil, nil, malformed("%d signatures, 1 to %d allowed", len(w.Signatures), MaxSignatures)
	}
	body, decode := []byte(w.Signed), hex.DecodeString
	if w.Payload != "" {
		var err error
		if body, err = base64.StdEncoding.Strict().DecodeString(w.Payload); err != nil {
			return nil, nil, nil, malformed("payload: %w", err)
		}
		decode = base64.StdEncoding.Strict().DecodeString
	}
	var sigs []signature
	for _, s := range w.Signatures {
		b, err := decode(s.Sig)
		if err != nil || len(b) == 0 || len(b) > link.MaxSignature {
			return nil, nil, nil, malformed("signature")
		}
		sigs = append(sigs, signature{s.KeyID, b})
	}
	var c classicLink
	// The members' own names in their own spelling: encoding/json would take
	// "Materials" for "materials", and the signature is over what is there.
	if err := decodeStrict(body, MaxClassic, "materials products byproducts environment", &c); err != nil {
		return nil, nil, nil, fmt.Errorf("link: %w", err)
	}
	switch {
	case c.Type != "link" || !namePattern().MatchString(c.Name):
		return nil, nil, nil, malformed("_type %q, name %q", c.Type, c.Name)
	case len(c.Materials) > link.MaxMaterials || len(c.Products) > link.MaxMaterials || len(c.Command) > link.MaxCommand:
		return nil, nil, nil, malformed("more than is recorded of one step")
	}
	message := dsse.PAE(in_toto.PayloadType, body)
	if w.Payload == "" {
		var err error
		if message, err = canonicalLink(&c, body); err != nil {
			return nil, nil, nil, malformed("link: %w", err)
		}
	}
	return &c, message, sigs, nil
}

// canonicalLink is what a Metablock's signatures are over: the link as it was
// read, unknown members included, of which there are none.
func canonicalLink(c *classicLink, body []byte) ([]byte, error) {
	if message, ok, err := c.canonical(); ok || err != nil {
		return message, err
	}
	var all any
	if err := json.Unmarshal(body, &all); err != nil {
		return nil, err
	}
	return cjson.EncodeCanonical(all)
}
