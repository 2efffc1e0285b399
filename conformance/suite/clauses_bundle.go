package suite

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"math/big"
	"slices"

	"github.com/go-jose/go-jose/v4"
)

// document is a JWK Set, or the SPIFFE bundle made of one, with each member as it
// was written: what is absent is not what is empty.
type document struct {
	members map[string]json.RawMessage
	keys    []jwk
}

type jwk struct {
	raw map[string]json.RawMessage
}

var errNoKeys = errors.New("keys is not there, or no array")

func readDocument(raw []byte) (document, error) {
	var d document
	if err := json.Unmarshal(raw, &d.members); err != nil {
		return d, err
	}
	var keys []map[string]json.RawMessage
	list, there := d.members["keys"]
	if !there || json.Unmarshal(list, &keys) != nil || keys == nil {
		return d, errNoKeys
	}
	for _, k := range keys {
		d.keys = append(d.keys, jwk{k})
	}
	return d, nil
}

func (k jwk) text(name string) string {
	var s string
	if json.Unmarshal(k.raw[name], &s) != nil {
		return ""
	}
	return s
}

// usable reads the key as a client would.
func (k jwk) usable() error {
	if k.text("kty") == "" {
		return errors.New("no kty")
	}
	raw, err := json.Marshal(k.raw)
	if err != nil {
		return err
	}
	var key jose.JSONWebKey
	if err := key.UnmarshalJSON(raw); err != nil {
		return err
	}
	if !key.IsPublic() {
		return errors.New("not a public key")
	}
	return nil
}

func (k jwk) certificates() ([]*x509.Certificate, error) {
	var texts []string
	if err := json.Unmarshal(k.raw["x5c"], &texts); err != nil {
		return nil, fmt.Errorf("no x5c: %w", err)
	}
	var out []*x509.Certificate
	for _, t := range texts {
		der, err := base64.StdEncoding.DecodeString(t)
		if err != nil {
			return nil, err
		}
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, err
		}
		out = append(out, c)
	}
	return out, nil
}

// integer reads a JSON integer, of any width.
func (d document) integer(name string) (*big.Int, bool, error) {
	raw, there := d.members[name]
	if !there {
		return nil, false, nil
	}
	n, ok := new(big.Int).SetString(string(bytes.TrimSpace(raw)), 10)
	if !ok {
		return nil, true, fmt.Errorf("%s is %s", name, raw)
	}
	return n, true, nil
}

// eachBundle judges the SPIFFE bundle documents that were given.
func eachBundle(judge func(bad *problems, name string, d document)) func(context.Context, *run) error {
	return func(_ context.Context, r *run) error {
		if len(r.Bundles) == 0 {
			return needs("--bundle")
		}
		var bad problems
		for i, raw := range r.Bundles {
			d, err := readDocument(raw)
			if err != nil && !errors.Is(err, errNoKeys) {
				return notRun("see bundle/4/jwk-set")
			}
			judge(&bad, fmt.Sprintf("bundle %d", i), d)
		}
		return bad.err()
	}
}

// eachKey judges the entries with that use; all with the empty one.
func eachKey(use string, judge func(bad *problems, name string, k jwk)) func(context.Context, *run) error {
	return func(ctx context.Context, r *run) error {
		some := false
		err := eachBundle(func(bad *problems, name string, d document) {
			for i, k := range d.keys {
				if use == "" || k.text("use") == use {
					some = true
					judge(bad, fmt.Sprintf("%s, key %d", name, i), k)
				}
			}
		})(ctx, r)
		if err == nil && !some {
			return notRun("the bundle has no such key")
		}
		return err
	}
}

var (
	setMembers = []string{"keys", "spiffe_sequence", "spiffe_refresh_hint"}
	jwkMembers = []string{"kty", "use", "kid", "x5c", "n", "e", "crv", "x", "y", "alg"}
)

func bundleClauses() []Clause {
	return []Clause{
		{"bundle/4/jwk-set", Must, "a bundle is a JWK Set", func(_ context.Context, r *run) error {
			if len(r.Bundles) == 0 {
				return needs("--bundle")
			}
			var bad problems
			for i, raw := range r.Bundles {
				if _, err := readDocument(raw); err != nil && !errors.Is(err, errNoKeys) {
					bad.add("bundle %d: %v", i, err)
				}
			}
			return bad.err()
		}},
		{"bundle/4.1/no-other-members", Should, "the set has members of its own document alone", eachBundle(func(bad *problems, name string, d document) {
			for m := range d.members {
				if !slices.Contains(setMembers, m) {
					bad.add("%s: %s", name, m)
				}
			}
		})},
		{"bundle/4.1.1/sequence-set", Should, "spiffe_sequence is set", eachBundle(func(bad *problems, name string, d document) {
			if _, there, _ := d.integer("spiffe_sequence"); !there {
				bad.add("%s: it is not", name)
			}
		})},
		{"bundle/4.1.1/sequence-is-an-integer", Must, "spiffe_sequence, where it is, is an integer", eachBundle(func(bad *problems, name string, d document) {
			if _, _, err := d.integer("spiffe_sequence"); err != nil {
				bad.add("%s: %v", name, err)
			}
		})},
		{"bundle/4.1.1/sequence-grows", Must, "spiffe_sequence grows when the bundle changes", checkSequence},
		{"bundle/4.1.2/refresh-hint-set", Should, "spiffe_refresh_hint is set", eachBundle(func(bad *problems, name string, d document) {
			if _, there, _ := d.integer("spiffe_refresh_hint"); !there {
				bad.add("%s: it is not", name)
			}
		})},
		{"bundle/4.1.2/refresh-hint-is-an-integer", Must, "spiffe_refresh_hint, where it is, is an integer", eachBundle(func(bad *problems, name string, d document) {
			if _, _, err := d.integer("spiffe_refresh_hint"); err != nil {
				bad.add("%s: %v", name, err)
			}
		})},
		{"bundle/4.1.3/keys-present", Must, "keys is there, an array", func(_ context.Context, r *run) error {
			if len(r.Bundles) == 0 {
				return needs("--bundle")
			}
			var bad problems
			for i, raw := range r.Bundles {
				if _, err := readDocument(raw); errors.Is(err, errNoKeys) {
					bad.add("bundle %d: %v", i, err)
				}
			}
			return bad.err()
		}},
		{"bundle/4.2/no-other-members", Should, "keys have the members of their documents alone", eachKey("", func(bad *problems, name string, k jwk) {
			for m := range k.raw {
				if !slices.Contains(jwkMembers, m) {
					bad.add("%s: %s", name, m)
				}
			}
		})},
		{"bundle/4.2.1/key-type-set", Must, "kty is set", eachKey("", func(bad *problems, name string, k jwk) {
			if k.text("kty") == "" {
				bad.add("%s: it is not", name)
			}
		})},
		{"bundle/4.2.2/use-set", Must, "use is set", eachKey("", func(bad *problems, name string, k jwk) {
			if k.text("use") == "" {
				bad.add("%s: it is not", name)
			}
		})},
		{"x509-svid/6.1/use", Must, "a CA certificate's entry has use x509-svid", eachKey("", func(bad *problems, name string, k jwk) {
			if _, x5c := k.raw["x5c"]; x5c && k.text("use") != "x509-svid" {
				bad.add("%s: %q", name, k.text("use"))
			}
		})},
		{"x509-svid/6.1/no-kid", Must, "a CA certificate's entry has no kid", eachKey("x509-svid", func(bad *problems, name string, k jwk) {
			if _, there := k.raw["kid"]; there {
				bad.add("%s: it has", name)
			}
		})},
		{"x509-svid/6.1/x5c", Must, "x5c is the certificate, whose key the entry's is", eachKey("x509-svid", func(bad *problems, name string, k jwk) {
			certs, err := k.certificates()
			if err != nil || len(certs) == 0 {
				bad.add("%s: %d certificates: %v", name, len(certs), err)
			} else if err := k.usable(); err != nil {
				bad.add("%s: %v", name, err) // go-jose compares the keys
			}
		})},
		{"x509-svid/6.1/one-certificate", Must, "x5c has exactly one", eachKey("x509-svid", func(bad *problems, name string, k jwk) {
			if certs, err := k.certificates(); err == nil && len(certs) != 1 {
				bad.add("%s: %d", name, len(certs))
			}
		})},
		{"x509-svid/6.1/self-signed", Should, "the certificate is self-signed", eachKey("x509-svid", func(bad *problems, name string, k jwk) {
			certs, _ := k.certificates()
			for _, c := range certs {
				if c.CheckSignatureFrom(c) != nil {
					bad.add("%s: it is not", name)
				}
			}
		})},
		{"jwt-svid/6.1/use", Must, "an entry for a JWT key, which has no certificate, has use jwt-svid", eachKey("", func(bad *problems, name string, k jwk) {
			if _, x5c := k.raw["x5c"]; !x5c && k.text("use") != "jwt-svid" && k.text("use") != "wit-svid" {
				bad.add("%s: %q", name, k.text("use"))
			}
		})},
		{"jwt-svid/6.1/kid", Must, "a JWT key's entry has a kid", eachKey("jwt-svid", func(bad *problems, name string, k jwk) {
			if k.text("kid") == "" {
				bad.add("%s: it has not", name)
			}
		})},
		{"jwt-svid/6.1/rfc7517", Must, "a JWT key's entry is a public key by RFC 7517", eachKey("jwt-svid", func(bad *problems, name string, k jwk) {
			if err := k.usable(); err != nil {
				bad.add("%s: %v", name, err)
			}
		})},
		{"bundle/4/same-as-served", Should, "the last bundle has the keys that the endpoint serves", checkServed},
	}
}

func checkSequence(_ context.Context, r *run) error {
	if len(r.Bundles) < 2 {
		return needs("--bundle twice, before and after a change")
	}
	var bad problems
	compared := 0
	for i := 1; i < len(r.Bundles); i++ {
		was, err1 := readDocument(r.Bundles[i-1])
		is, err2 := readDocument(r.Bundles[i])
		if err1 != nil || err2 != nil {
			return notRun("see bundle/4/jwk-set")
		}
		before, there1, err1 := was.integer("spiffe_sequence")
		after, there2, err2 := is.integer("spiffe_sequence")
		if err1 != nil || err2 != nil || !there1 || !there2 {
			return notRun("not both have an integer")
		}
		changed := !bytes.Equal(was.members["keys"], is.members["keys"])
		switch c := after.Cmp(before); {
		case c < 0:
			bad.add("bundle %d: %v after %v", i, after, before)
		case changed && c == 0:
			bad.add("bundle %d: other keys, and still %v", i, after)
		}
		if changed {
			compared++
		}
	}
	if len(bad) == 0 && compared == 0 {
		return notRun("needs --bundle twice, before and after a change: these have the same keys")
	}
	return bad.err()
}

func checkServed(_ context.Context, r *run) error {
	if len(r.Bundles) == 0 {
		return needs("--bundle")
	}
	d, err := readDocument(r.Bundles[len(r.Bundles)-1])
	all, err2 := r.svids()
	if err != nil || err2 != nil {
		return notRun("there are not both to compare")
	}
	var in [][]byte
	for _, k := range d.keys {
		certs, _ := k.certificates()
		for _, c := range certs {
			in = append(in, c.Raw)
		}
	}
	for _, c := range all[0].bundle {
		if !slices.ContainsFunc(in, func(raw []byte) bool { return bytes.Equal(raw, c.Raw) }) {
			return fmt.Errorf("%s of the endpoint is not in it", c.Subject)
		}
	}
	return nil
}
