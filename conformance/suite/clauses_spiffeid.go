package suite

import (
	"context"
	"errors"
	"fmt"
	"strings"
)

// afterScheme is the rest of a SPIFFE ID. The scheme is read without
// regard to case only to be able to go on.
func afterScheme(id string) (string, bool) {
	if len(id) < len(spiffeScheme) || !strings.EqualFold(id[:len(spiffeScheme)], spiffeScheme) {
		return "", false
	}
	return id[len(spiffeScheme):], true
}

func hostOf(id string) string {
	rest, _ := afterScheme(id)
	if i := strings.IndexAny(rest, "/?#"); i >= 0 {
		return rest[:i]
	}
	return rest
}

func pathOf(id string) string {
	rest, _ := afterScheme(id)
	rest = rest[len(hostOf(id)):]
	if i := strings.IndexAny(rest, "?#"); i >= 0 {
		return rest[:i]
	}
	return rest
}

// trustDomainOf is the SPIFFE ID of the ID's trust domain, empty when it has none.
func trustDomainOf(id string) string {
	if h := hostOf(id); h != "" {
		return spiffeScheme + h
	}
	return ""
}

// ids are all SPIFFE IDs that the endpoint has shown, each with where.
func (r *run) ids() (map[string]string, error) {
	found := map[string]string{}
	if msg, err := r.x509SVIDs(); err == nil {
		for i, s := range msg.GetSvids() {
			found[s.GetSpiffeId()] = fmt.Sprintf("X509SVIDResponse.svids[%d]", i)
		}
		for td := range msg.GetFederatedBundles() {
			found[td] = "X509SVIDResponse.federated_bundles"
		}
	}
	if all, err := r.svids(); err == nil {
		for _, s := range all {
			for _, c := range append(s.chain, s.bundle...) {
				uris, _ := uriSANs(c)
				for _, u := range uris {
					found[u] = "a certificate of " + s.name
				}
			}
		}
	}
	if msg, err := r.x509Bundles(); err == nil {
		for td := range msg.GetBundles() {
			found[td] = "X509BundlesResponse.bundles"
		}
	}
	if all, err := r.tokens(); err == nil {
		for _, t := range all {
			found[t.GetSpiffeId()] = t.name
			if sub, ok := t.claims["sub"].(string); ok {
				found[sub] = t.name + "'s sub"
			}
		}
	}
	if msg, err := r.jwtBundles(); err == nil {
		for td := range msg.GetBundles() {
			found[td] = "JWTBundlesResponse.bundles"
		}
	}
	if len(found) == 0 {
		return nil, notRun("no SPIFFE ID was served")
	}
	return found, nil
}

func eachID(bad func(id string) string) func(context.Context, *run) error {
	return func(_ context.Context, r *run) error {
		all, err := r.ids()
		if err != nil {
			return err
		}
		var p problems
		for id, where := range all {
			if why := bad(id); why != "" {
				if len(id) > 100 {
					id = id[:100] + "…"
				}
				p.add("%q of %s: %s", id, where, why)
			}
		}
		return p.err()
	}
}

// when is what to say if it is so.
func when(so bool, say string) string {
	if so {
		return say
	}
	return ""
}

const (
	lowerAlnum = "abcdefghijklmnopqrstuvwxyz0123456789"
	upper      = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
)

func segments(id string) []string {
	p := pathOf(id)
	if p == "" {
		return nil
	}
	return strings.Split(strings.TrimPrefix(p, "/"), "/")
}

func spiffeIDClauses() []Clause {
	return []Clause{
		{"spiffe-id/2/scheme", Must, "the scheme is spiffe", eachID(func(id string) string {
			return when(!strings.HasPrefix(id, spiffeScheme), "another scheme")
		})},
		{"spiffe-id/2/no-query-or-fragment", Must, "there is neither query nor fragment", eachID(func(id string) string {
			return when(strings.ContainsAny(id, "?#"), "has one")
		})},
		{"spiffe-id/2.1/trust-domain-not-empty", Must, "the trust domain is not empty", eachID(func(id string) string {
			return when(hostOf(id) == "", "no trust domain")
		})},
		{"spiffe-id/2.1/no-userinfo-or-port", Must, "the authority has neither user nor port", eachID(func(id string) string {
			return when(strings.ContainsAny(hostOf(id), "@:"), "has one")
		})},
		{"spiffe-id/2.1/lower-case", Must, "the trust domain is in lower case", eachID(func(id string) string {
			return when(hostOf(id) != strings.ToLower(hostOf(id)), "is not")
		})},
		{"spiffe-id/2.1/characters", Must, "the trust domain has letters, digits, dots, dashes and underscores alone", eachID(func(id string) string {
			return when(strings.ContainsFunc(strings.ToLower(hostOf(id)), func(c rune) bool {
				return !strings.ContainsRune(lowerAlnum+".-_%@:", c)
			}), "has others")
		})},
		{"spiffe-id/2.1/no-percent-encoding", Must, "the trust domain is not percent-encoded", eachID(func(id string) string {
			return when(strings.Contains(hostOf(id), "%"), "is")
		})},
		{"spiffe-id/2.2/no-percent-encoding", Must, "the path is not percent-encoded", eachID(func(id string) string {
			return when(strings.Contains(pathOf(id), "%"), "is")
		})},
		{"spiffe-id/2.2/no-empty-or-relative-segments", Must, "no segment of the path is empty, . or ..", eachID(func(id string) string {
			s := segments(id)
			for i, seg := range s {
				if seg == "." || seg == ".." || seg == "" && i < len(s)-1 {
					return fmt.Sprintf("segment %q", seg)
				}
			}
			return ""
		})},
		{"spiffe-id/2.2/no-trailing-slash", Must, "the path does not end in a slash", eachID(func(id string) string {
			return when(strings.HasSuffix(pathOf(id), "/"), "it does")
		})},
		{"spiffe-id/2.2/characters", Must, "segments have letters, digits, dots, dashes and underscores alone", eachID(func(id string) string {
			return when(strings.ContainsFunc(pathOf(id), func(c rune) bool {
				return !strings.ContainsRune(lowerAlnum+upper+".-_/%", c)
			}), "has others")
		})},
		{"spiffe-id/2.3/supports-2048-bytes", Must, "IDs of up to 2048 bytes are supported", func(_ context.Context, r *run) error {
			all, err := r.ids()
			if err != nil {
				return err
			}
			for id := range all {
				if len(id) == maxSPIFFEID {
					return longestIsWhole(r, id)
				}
			}
			return notRun("needs a caller with an identity whose SPIFFE ID has 2048 bytes")
		}},
		{"spiffe-id/2.3/at-most-2048-bytes", Should, "no ID is longer than 2048 bytes", eachID(func(id string) string {
			return when(len(id) > maxSPIFFEID, fmt.Sprintf("%d bytes", len(id)))
		})},
		{"spiffe-id/2.3/trust-domain-at-most-255-bytes", Must, "no trust domain is longer than 255 bytes", eachID(func(id string) string {
			return when(len(hostOf(id)) > maxTrustDomain, fmt.Sprintf("%d bytes", len(hostOf(id))))
		})},
		{"spiffe-id/3.1/authority-has-an-svid", Must, "the trust domain's signing authority carries an SVID of its own", func(ctx context.Context, r *run) error {
			all, err := r.svids()
			if err != nil {
				return err
			}
			for _, s := range all {
				for _, c := range append(s.chain[min(1, len(s.chain)):], s.bundle...) {
					if uris, _ := uriSANs(c); len(uris) == 1 && trustDomainOf(uris[0]) == trustDomainOf(s.GetSpiffeId()) {
						return nil
					}
				}
			}
			return errors.New("no signing certificate has a SPIFFE ID of the trust domain")
		}},
	}
}

// longestIsWhole: an ID of that length is of use where each kind of SVID has it.
func longestIsWhole(r *run, id string) error {
	var bad problems
	in := func(what string, ids ...string) {
		for _, have := range ids {
			if have == id {
				return
			}
		}
		bad.add("%s has not the ID of 2048 bytes", what)
	}
	if all, err := r.svids(); err == nil && !r.disabled("x509") {
		var have []string
		for _, s := range all {
			if s.chainErr == nil {
				uris, _ := uriSANs(s.chain[0])
				have = append(have, uris...)
			}
		}
		in("no X.509-SVID", have...)
	}
	if all, err := r.tokens(); err == nil && !r.disabled("jwt") {
		var have []string
		for _, t := range all {
			sub, _ := t.claims["sub"].(string)
			have = append(have, sub)
		}
		in("no JWT-SVID", have...)
	}
	return bad.err()
}
