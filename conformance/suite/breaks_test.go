package suite

import (
	"context"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/json"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc/codes"
)

// variant breaks one clause of the fake that is right in all.
type variant struct {
	name   string
	breaks func(*fake)
	o      func(*Options)
}

func v(name string, breaks func(*fake)) variant { return variant{name: name, breaks: breaks} }

// openFor lets requests of one method in, whatever their header.
func openFor(method string) func(*fake) {
	return func(f *fake) {
		right := f.headerOK
		f.headerOK = func(values []string, name string) bool { return name == method || right(values, name) }
	}
}

func leaf(change func(*x509.Certificate)) func(*fake) { return func(f *fake) { f.leaf = change } }
func authority(change func(*x509.Certificate)) func(*fake) {
	return func(f *fake) { f.authority = change }
}

func message(change func(*workload.X509SVIDResponse)) func(*fake) {
	return func(f *fake) { f.x509msg = change }
}

func tokens(change func(*workload.JWTSVIDResponse)) func(*fake) {
	return func(f *fake) { f.jwtmsg = change }
}

func bundle(change func(*workload.JWTBundlesResponse)) func(*fake) {
	return func(f *fake) { f.jwtb = change }
}
func claims(change func(map[string]any)) func(*fake) { return func(f *fake) { f.claims = change } }
func header(change func(map[string]any)) func(*fake) { return func(f *fake) { f.header = change } }

// accepts lets tokens validate for which the function says so.
func accepts(say func(token string, header, claims map[string]any) bool) func(*fake) {
	return func(f *fake) {
		f.accepts = func(token string, h, c map[string]any, _ error) bool { return say(token, h, c) }
	}
}

// ofID gives the second identity another SPIFFE ID.
func ofID(id string) []variant {
	return []variant{v(id, func(f *fake) { f.x509msg = func(m *workload.X509SVIDResponse) { m.Svids[1].SpiffeId = id } })}
}

// jwkSet changes the first key of each JWT bundle.
func jwkSet(change func(key map[string]any)) func(*fake) {
	return bundle(func(m *workload.JWTBundlesResponse) {
		for td, raw := range m.Bundles {
			var set map[string][]map[string]any
			if err := json.Unmarshal(raw, &set); err != nil {
				panic(err)
			}
			change(set["keys"][0])
			m.Bundles[td], _ = json.Marshal(set)
		}
	})
}

// doc changes the first or second key (0: X.509, 1: JWT) of the bundle documents.
func doc(i int, change func(f *fake, key map[string]any)) func(*fake) {
	return func(f *fake) {
		f.document = func(_ int, set map[string]any) { change(f, set["keys"].([]any)[i].(map[string]any)) }
	}
}

func without(member string) func(map[string]any) {
	return func(m map[string]any) { delete(m, member) }
}

func rawUsage(critical bool) pkix.Extension {
	value, err := asn1.Marshal(asn1.BitString{Bytes: []byte{0x80}, BitLength: 1})
	if err != nil {
		panic(err)
	}
	return pkix.Extension{Id: oidKeyUsage, Critical: critical, Value: value}
}

func rawSAN(critical bool, uris ...string) pkix.Extension {
	var names []asn1.RawValue
	for _, u := range uris {
		names = append(names, asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: generalNameURI, Bytes: []byte(u)})
	}
	value, err := asn1.Marshal(names)
	if err != nil {
		panic(err)
	}
	return pkix.Extension{Id: oidSAN, Critical: critical, Value: value}
}

func otherKey(m *workload.X509SVIDResponse) {
	der, err := x509.MarshalPKCS8PrivateKey(newKey())
	if err != nil {
		panic(err)
	}
	m.Svids[1].X509SvidKey = der
}

// knownToAll: a validator that takes the public key for an HMAC's secret.
func knownToAll(f *fake) {
	f.accepts = func(token string, _, _ map[string]any, _ error) bool {
		jws, err := jose.ParseSignedCompact(token, []jose.SignatureAlgorithm{jose.HS256})
		if err != nil {
			return false
		}
		der, err := x509.MarshalPKIXPublicKey(&f.jwtKey.PublicKey)
		if err != nil {
			panic(err)
		}
		_, err = jws.Verify(der)
		return err == nil
	}
}

// anySignature: a validator that looks at no signature.
func anySignature(string, map[string]any, map[string]any) bool { return true }

var variants = map[string][]variant{
	"workload-endpoint/3/served-over-grpc":        nil, // TestEndpointThatIsNoGRPC
	"workload-endpoint/3/missing-header-rejected": {v("one method is open", openFor("FetchJWTBundles")), v("validation is open", openFor("ValidateJWTSVID"))},
	"workload-endpoint/3/wrong-header-rejected":   {v("any value", func(f *fake) { f.headerOK = func(v []string, _ string) bool { return len(v) > 0 } })},
	"workload-endpoint/3/header-is-case-sensitive": {v("any case", func(f *fake) {
		f.headerOK = func(v []string, _ string) bool { return len(v) > 0 && strings.EqualFold(v[0], "true") }
	})},
	"workload-endpoint/3.1/tls-not-required":                 nil, // TestEndpointThatDemandsTLS
	"workload-endpoint/5/no-client-authentication":           {v("a password", func(f *fake) { f.credentials = true })},
	"workload-endpoint/6/missing-header-is-invalid-argument": {v("another code", func(f *fake) { f.headerCode = codes.PermissionDenied })},
	"workload-endpoint/7/workload-api-exposed": {v("no method", func(f *fake) {
		f.unsupported = "JWT"
		f.headerOK = func([]string, string) bool { return false }
		f.headerCode = codes.Unimplemented
	})},
	"workload-endpoint/7/services-not-extended": {v("any method", func(f *fake) { f.unknown = true })},

	"workload-api/1/x509-profile":            {v("not there", func(f *fake) { f.unsupported = "X509" })},
	"workload-api/1/jwt-profile":             {v("not there", func(f *fake) { f.unsupported = "JWT" })},
	"workload-api/2/not-extended":            {v("any method", func(f *fake) { f.unknown = true })},
	"workload-api/4.3/first-message-at-once": {{"silence", func(f *fake) { f.silent = true }, func(o *Options) { o.Prompt = 100 * time.Millisecond }}},
	"workload-api/4.3/later-messages-are-whole": {
		v("an SVID less", func(f *fake) { f.rotate = func(m *workload.X509SVIDResponse) { m.Svids = m.Svids[:1] } }),
		v("no bundle", func(f *fake) { f.rotate = func(m *workload.X509SVIDResponse) { m.Svids[0].Bundle = nil } }),
		v("no federated bundle", func(f *fake) { f.rotate = func(m *workload.X509SVIDResponse) { m.FederatedBundles = nil } }),
	},
	"workload-api/4.3/withdrawn-is-absent": {{"all stay", func(f *fake) { f.keeps = true }, func(o *Options) { o.Wait = 200 * time.Millisecond }}},
	"workload-api/5.1/chain-is-der":        {v("PEM", message(func(m *workload.X509SVIDResponse) { m.Svids[1].X509Svid = []byte("-----BEGIN CERTIFICATE-----") })), v("something after it", message(func(m *workload.X509SVIDResponse) { m.Svids[0].X509Svid = append(m.Svids[0].X509Svid, 1) }))},
	"workload-api/5.1/chain-in-order": {v("the root's place", func(f *fake) {
		f.x509msg = func(m *workload.X509SVIDResponse) {
			m.Svids[0].X509Svid = append(m.Svids[0].X509Svid, f.sub.Raw...)
			m.Svids[0].X509Svid = append(m.Svids[0].X509Svid[:len(m.Svids[0].X509Svid)-2*len(f.sub.Raw)], f.ca.Raw...)
		}
	})},
	"workload-api/5.1/leaf-first": {v("leaf last", func(f *fake) {
		f.x509msg = func(m *workload.X509SVIDResponse) {
			b := m.Svids[0].X509Svid
			n := len(b) - len(f.sub.Raw)
			m.Svids[0].X509Svid = slices.Concat(b[n:], b[:n])
		}
	})},
	"workload-api/5.1/key-is-pkcs8": {v("SEC 1", func(f *fake) {
		f.x509msg = func(m *workload.X509SVIDResponse) { m.Svids[0].X509SvidKey, _ = x509.MarshalECPrivateKey(f.leafKey) }
	})},
	"workload-api/5.1/key-is-the-leafs": {v("another", message(otherKey))},
	"workload-api/5.1/bundle-is-der":    {v("JSON", message(func(m *workload.X509SVIDResponse) { m.Svids[0].Bundle = []byte("{}") })), v("nothing", message(func(m *workload.X509SVIDResponse) { m.Svids[0].Bundle = nil }))},
	"workload-api/5.1/crl-is-der":       {v("garbage", message(func(m *workload.X509SVIDResponse) { m.Crl = append(m.Crl, []byte("crl")) }))},
	"workload-api/5.1/federated-bundles-keyed": {
		v("not there", message(func(m *workload.X509SVIDResponse) { m.FederatedBundles = nil })),
		v("by name", func(f *fake) {
			f.x509msg = func(m *workload.X509SVIDResponse) { m.FederatedBundles["other.test"] = f.ca.Raw }
		}),
		v("with a path", func(f *fake) {
			f.x509msg = func(m *workload.X509SVIDResponse) { m.FederatedBundles[foreign+"/x"] = f.ca.Raw }
		}),
		v("the own one", func(f *fake) { f.x509msg = func(m *workload.X509SVIDResponse) { m.FederatedBundles[own] = f.ca.Raw } }),
		v("no certificate", message(func(m *workload.X509SVIDResponse) { m.FederatedBundles[foreign] = []byte("x") })),
	},
	"workload-api/5.2.1/svids-not-empty": {v("empty", message(func(m *workload.X509SVIDResponse) { m.Svids = nil }))},
	"workload-api/5.2.1/fields-set": {
		v("no ID", message(func(m *workload.X509SVIDResponse) { m.Svids[1].SpiffeId = "" })), v("no chain", message(func(m *workload.X509SVIDResponse) { m.Svids[1].X509Svid = nil })),
		v("no key", message(func(m *workload.X509SVIDResponse) { m.Svids[1].X509SvidKey = nil })), v("no bundle", message(func(m *workload.X509SVIDResponse) { m.Svids[1].Bundle = nil })),
	},
	"workload-api/5.2.1/hints-unique": {v("twice", message(func(m *workload.X509SVIDResponse) { m.Svids[1].Hint = m.Svids[0].Hint }))},
	"workload-api/5.2.2/own-bundle":   {v("not there", func(f *fake) { f.x509b = func(m *workload.X509BundlesResponse) { delete(m.Bundles, own) } }), v("empty", func(f *fake) { f.x509b = func(m *workload.X509BundlesResponse) { m.Bundles[own] = nil } })},
	"workload-api/5.2.2/bundles-are-der": {
		v("garbage", func(f *fake) { f.x509b = func(m *workload.X509BundlesResponse) { m.Bundles[foreign] = []byte("x") } }),
		v("by name", func(f *fake) {
			f.x509b = func(m *workload.X509BundlesResponse) { m.Bundles["example.org"] = m.Bundles[own] }
		}),
	},
	"workload-api/5.2.1/no-identity-no-empty-answer": {v("empty", func(f *fake) { f.stranger["FetchX509SVID"] = Seen{"OK", 0} }), v("not asked", func(f *fake) { f.stranger = Probe{} })},
	"workload-api/5.2.2/no-identity-no-empty-answer": {v("empty", func(f *fake) { f.stranger["FetchX509Bundles"] = Seen{"OK", 0} })},
	"workload-api/6.2.1/no-identity-no-empty-answer": {v("empty", func(f *fake) { f.stranger["FetchJWTSVID"] = Seen{"OK", 0} })},
	"workload-api/6.2.2/no-identity-no-empty-answer": {v("empty", func(f *fake) { f.stranger["FetchJWTBundles"] = Seen{"OK", 0} })},

	"workload-api/6.2.1/audience-embedded":      {v("the first alone", claims(func(c map[string]any) { c["aud"] = c["aud"].([]string)[:1] })), v("one more", claims(func(c map[string]any) { c["aud"] = append(slices.Clone(c["aud"].([]string)), "all") }))},
	"workload-api/6.2.1/every-identity":         {v("the default alone", func(f *fake) { f.onlyFirst = true })},
	"workload-api/6.2.1/the-identity-asked-for": {v("all", func(f *fake) { f.ignoresID = true })},
	"workload-api/6.2.1/no-token-of-others":     {v("all", func(f *fake) { f.ignoresID = true }), v("none, and no error", func(f *fake) { f.anyID = true })},
	"workload-api/6.2.1/svids-not-empty":        {v("empty", tokens(func(m *workload.JWTSVIDResponse) { m.Svids = nil }))},
	"workload-api/6.2.1/fields-set":             {v("no ID", tokens(func(m *workload.JWTSVIDResponse) { m.Svids[0].SpiffeId = "" })), v("no token", tokens(func(m *workload.JWTSVIDResponse) { m.Svids[1].Svid = "" }))},
	"workload-api/6.2.1/hints-unique":           {v("twice", func(f *fake) { f.hints[1] = f.hints[0] })},
	"workload-api/6.2.2/own-bundle":             {v("not there", bundle(func(m *workload.JWTBundlesResponse) { delete(m.Bundles, own) }))},
	"workload-api/6.2.2/jwk-sets": {
		v("PEM", bundle(func(m *workload.JWTBundlesResponse) { m.Bundles[own] = []byte("-----BEGIN") })), v("an array", bundle(func(m *workload.JWTBundlesResponse) { m.Bundles[own] = []byte("[]") })),
		v("no keys", bundle(func(m *workload.JWTBundlesResponse) { m.Bundles[own] = []byte("{}") })), v("no kty", jwkSet(without("kty"))), v("half a key", jwkSet(without("y"))),
		v("by name", bundle(func(m *workload.JWTBundlesResponse) { m.Bundles["example.org"] = m.Bundles[own] })),
	},
	"workload-api/6.2.2/no-keys-of-other-uses": {v("x509-svid", jwkSet(func(k map[string]any) { k["use"] = "x509-svid" })), v("a certificate", jwkSet(func(k map[string]any) { k["x5c"] = []string{} }))},
	"workload-api/6.2.2/verifies-the-tokens":   {v("another key", func(f *fake) { f.jwtb = func(m *workload.JWTBundlesResponse) { m.Bundles[own] = f.jwks(newKey()) } }), v("another kid", header(func(h map[string]any) { h["kid"] = "k9" }))},
	"workload-api/6.2.2/federated-bundles":     {v("not there", bundle(func(m *workload.JWTBundlesResponse) { delete(m.Bundles, foreign) }))},
	"workload-api/6.2.3/good-token-validates":  {v("another key", func(f *fake) { f.jwtb = nil; f.header = func(h map[string]any) { h["kid"] = "k2" } })},
	"workload-api/6.2.3/response-fields":       {v("no ID", func(f *fake) { f.validated = func(m *workload.ValidateJWTSVIDResponse) { m.SpiffeId = "" } }), v("no claims", func(f *fake) { f.validated = func(m *workload.ValidateJWTSVIDResponse) { m.Claims = nil } })},
	"workload-api/6.2.3/spiffe-claims": {v("no exp", func(f *fake) {
		f.validated = func(m *workload.ValidateJWTSVIDResponse) { delete(m.Claims.Fields, "exp") }
	})},
	"workload-api/6.2.3/garbage-refused": {v("a word", accepts(func(t string, _, _ map[string]any) bool { return t == "garbage" })), v("a fourth part", accepts(func(t string, _, _ map[string]any) bool { return strings.Count(t, ".") == 3 })), v("huge", accepts(func(t string, _, _ map[string]any) bool { return len(t) > 1<<20 }))},
	"workload-api/6.3/foreign-subject-refused": {v("any subject", accepts(func(_ string, _, c map[string]any) bool {
		s, _ := c["sub"].(string)
		return strings.HasPrefix(s, "spiffe://conformance.invalid")
	}))},

	"x509-svid/2/exactly-one-uri-san":            {v("two", leaf(func(c *x509.Certificate) { c.URIs = append(c.URIs, mustURL(own+"/other")) })), v("none", leaf(func(c *x509.Certificate) { c.URIs, c.DNSNames = nil, []string{"a.test"} }))},
	"x509-svid/2/id-is-the-messages":             {v("another", message(func(m *workload.X509SVIDResponse) { m.Svids[0].SpiffeId = own + "/other" }))},
	"x509-svid/3.1/leaf-has-a-path":              {v("none", leaf(func(c *x509.Certificate) { c.URIs = []*url.URL{mustURL(own)} })), v("a slash", leaf(func(c *x509.Certificate) { c.URIs = []*url.URL{mustURL(own + "/")} }))},
	"x509-svid/3.1/san-critical-without-subject": {v("it is not", leaf(func(c *x509.Certificate) { c.ExtraExtensions = append(c.ExtraExtensions, rawSAN(false, own+"/one")) }))},
	"x509-svid/3.2/authority-has-no-path":        {v("it has", authority(func(c *x509.Certificate) { c.URIs = []*url.URL{mustURL(own + "/ca")} })), v("an intermediate's", func(f *fake) { f.subCA = func(c *x509.Certificate) { c.URIs = []*url.URL{mustURL(own + "/ca")} } })},
	"x509-svid/4.1/leaf-is-no-ca":                {v("it is", leaf(func(c *x509.Certificate) { c.IsCA = true }))},
	"x509-svid/4.1/authority-is-a-ca":            {v("the root", authority(func(c *x509.Certificate) { c.IsCA = false })), v("an intermediate", func(f *fake) { f.subCA = func(c *x509.Certificate) { c.IsCA = false } })},
	"x509-svid/4.3/key-usage-set":                {v("a leaf", leaf(func(c *x509.Certificate) { c.KeyUsage = 0 })), v("an authority", authority(func(c *x509.Certificate) { c.KeyUsage = 0 }))},
	"x509-svid/4.3/key-usage-critical": {v("it is not", leaf(func(c *x509.Certificate) {
		c.KeyUsage = 0
		c.ExtraExtensions = append(c.ExtraExtensions, rawUsage(false))
	}))},
	"x509-svid/4.3/authority-signs-certificates": {v("it does not", authority(func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageCRLSign }))},
	"x509-svid/4.3/leaf-signs":                   {v("it does not", leaf(func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageKeyAgreement }))},
	"x509-svid/4.3/leaf-signs-no-certificates":   {v("keyCertSign", leaf(func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCertSign })), v("cRLSign", leaf(func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCRLSign }))},
	"x509-svid/4.4/both-tls-usages":              {v("client alone", leaf(func(c *x509.Certificate) { c.ExtKeyUsage = c.ExtKeyUsage[1:] })), v("another alone", leaf(func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageCodeSigning} }))},
	"x509-svid/5.1/path-validates": {v("expired", leaf(func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) })), v("another bundle", func(f *fake) {
		other := newFake()
		other.caKey = newKey()
		other.makeAuthorities()
		f.x509msg = func(m *workload.X509SVIDResponse) { m.Svids[0].Bundle = other.ca.Raw }
	})},

	"jwt-svid/5.1/compact-serialization": {
		v("JSON", func(f *fake) {
			f.compact = func(t string) string {
				p := strings.Split(t, ".")
				return `{"protected":"` + p[0] + `","payload":"` + p[1] + `","signature":"` + p[2] + `"}`
			}
		}),
		v("unsigned", func(f *fake) { f.compact = func(t string) string { return t[:strings.LastIndexByte(t, '.')+1] } }),
	},
	"jwt-svid/2/no-other-headers":        {v("jku", header(func(h map[string]any) { h["jku"] = "https://example.org" }))},
	"jwt-svid/2.1/algorithm":             {v("EdDSA", header(func(h map[string]any) { h["alg"] = "EdDSA" })), v("HS256", header(func(h map[string]any) { h["alg"] = "HS256" }))},
	"jwt-svid/2.3/type":                  {v("another", header(func(h map[string]any) { h["typ"] = "at+jwt" }))},
	"jwt-svid/3.1/subject":               {v("none", claims(without("sub"))), v("another", claims(func(c map[string]any) { c["sub"] = own + "/other" }))},
	"jwt-svid/3.2/audience":              {v("none", claims(without("aud"))), v("empty", claims(func(c map[string]any) { c["aud"] = []string{} }))},
	"jwt-svid/3.2/none-without-audience": {v("a token for all", func(f *fake) { f.noAudience = true })},
	"jwt-svid/3.3/expiration":            {v("none", claims(without("exp"))), v("text", claims(func(c map[string]any) { c["exp"] = "tomorrow" }))},

	"jwt-svid/1/json-serialization-refused":   {v("any JSON", accepts(func(t string, _, _ map[string]any) bool { return strings.HasPrefix(t, "{") })), v("the general form", accepts(func(t string, _, _ map[string]any) bool { return strings.Contains(t, "signatures") }))},
	"jwt-svid/2/other-headers-refused":        {v("accepted", accepts(func(_ string, h, _ map[string]any) bool { return h["x-conformance"] != nil }))},
	"jwt-svid/2.3/other-type-refused":         {v("accepted", accepts(func(_ string, h, _ map[string]any) bool { return h["typ"] == "at+jwt" }))},
	"jwt-svid/2.1/alg-none-refused":           {v("none", accepts(func(_ string, h, _ map[string]any) bool { return h["alg"] == "none" })), v("NONE", accepts(func(_ string, h, _ map[string]any) bool { return h["alg"] == "NONE" }))},
	"jwt-svid/2.1/symmetric-alg-refused":      {v("the public key", knownToAll)},
	"jwt-svid/3.2/other-audience-refused":     {v("any", accepts(anySignature))},
	"jwt-svid/3.2/without-audience-refused":   {v("accepted", accepts(func(_ string, _, c map[string]any) bool { return c["aud"] == nil }))},
	"jwt-svid/3.3/without-expiration-refused": {v("accepted", accepts(func(_ string, _, c map[string]any) bool { return c["exp"] == nil }))},
	"jwt-svid/4/expired-refused": {v("accepted", accepts(func(_ string, _, c map[string]any) bool {
		e, ok := c["exp"].(float64)
		return ok && e < float64(time.Now().Unix())
	}))},
	"jwt-svid/3.1/without-subject-refused": {v("accepted", accepts(func(_ string, _, c map[string]any) bool {
		s, _ := c["sub"].(string)
		return strings.HasPrefix(s, "https:")
	}))},
	"jwt-svid/4/changed-claims-refused":    {v("no look at the signature", accepts(anySignature))},
	"jwt-svid/4/changed-signature-refused": {v("no look at the signature", accepts(anySignature)), v("none at all is fine", accepts(func(t string, _, _ map[string]any) bool { return strings.HasSuffix(t, ".") }))},
	"jwt-svid/4/unknown-key-refused":       {v("no look at the signature", accepts(anySignature)), v("an unknown kid", accepts(func(_ string, h, _ map[string]any) bool { return h["kid"] == "conformance" }))},

	"spiffe-id/2/scheme":                           ofID("https://example.org/x"),
	"spiffe-id/2/no-query-or-fragment":             append(ofID(own+"/x?a=b"), ofID(own+"/x#y")...),
	"spiffe-id/2.1/trust-domain-not-empty":         ofID("spiffe:///x"),
	"spiffe-id/2.1/no-userinfo-or-port":            append(ofID("spiffe://a@example.org/x"), ofID("spiffe://example.org:443/x")...),
	"spiffe-id/2.1/lower-case":                     ofID("spiffe://Example.org/x"),
	"spiffe-id/2.1/characters":                     ofID("spiffe://example!org/x"),
	"spiffe-id/2.1/no-percent-encoding":            ofID("spiffe://example%2eorg/x"),
	"spiffe-id/2.2/no-percent-encoding":            ofID(own + "/%41"),
	"spiffe-id/2.2/no-empty-or-relative-segments":  slices.Concat(ofID(own+"/a//b"), ofID(own+"/a/../b"), ofID(own+"/./b")),
	"spiffe-id/2.2/no-trailing-slash":              ofID(own + "/a/"),
	"spiffe-id/2.2/characters":                     append(ofID(own+"/ä"), ofID(own+"/a:b")...),
	"spiffe-id/2.3/supports-2048-bytes":            {v("cut in tokens", claims(func(c map[string]any) { s := c["sub"].(string); c["sub"] = s[:min(len(s), 1024)] })), v("cut in certificates", leaf(func(c *x509.Certificate) { s := c.URIs[0].String(); c.URIs[0] = mustURL(s[:min(len(s), 255)]) }))},
	"spiffe-id/2.3/trust-domain-at-most-255-bytes": ofID("spiffe://" + strings.Repeat("a", 256) + "/x"),
	"spiffe-id/3.1/authority-has-an-svid":          {v("none", func(f *fake) { f.authority = func(c *x509.Certificate) { c.URIs = nil }; f.subCA = f.authority })},

	"bundle/4/jwk-set":                        {{"text", func(*fake) {}, func(o *Options) { o.Bundles[1] = []byte("keys") }}},
	"bundle/4.1.1/sequence-is-an-integer":     {v("text", func(f *fake) { f.document = func(_ int, d map[string]any) { d["spiffe_sequence"] = "7" } }), v("a fraction", func(f *fake) { f.document = func(_ int, d map[string]any) { d["spiffe_sequence"] = 7.5 } })},
	"bundle/4.1.1/sequence-grows":             {v("the same", func(f *fake) { f.document = func(_ int, d map[string]any) { d["spiffe_sequence"] = 7 } }), v("less", func(f *fake) { f.document = func(n int, d map[string]any) { d["spiffe_sequence"] = 7 - n } })},
	"bundle/4.1.2/refresh-hint-is-an-integer": {v("text", func(f *fake) { f.document = func(_ int, d map[string]any) { d["spiffe_refresh_hint"] = "5m" } })},
	"bundle/4.1.3/keys-present":               {v("absent", func(f *fake) { f.document = func(_ int, d map[string]any) { delete(d, "keys") } }), v("null", func(f *fake) { f.document = func(_ int, d map[string]any) { d["keys"] = nil } })},
	"bundle/4.2.1/key-type-set":               {v("absent", doc(0, func(_ *fake, k map[string]any) { delete(k, "kty") }))},
	"bundle/4.2.2/use-set":                    {v("absent", doc(1, func(_ *fake, k map[string]any) { delete(k, "use") }))},
	"x509-svid/6.1/use":                       {v("another", doc(0, func(_ *fake, k map[string]any) { k["use"] = "sig" }))},
	"x509-svid/6.1/no-kid":                    {v("it has", doc(0, func(_ *fake, k map[string]any) { k["kid"] = "k" }))},
	"x509-svid/6.1/x5c": {v("absent", doc(0, func(_ *fake, k map[string]any) { delete(k, "x5c") })), v("empty", doc(0, func(_ *fake, k map[string]any) { k["x5c"] = []string{} })), v("another key's", doc(0, func(f *fake, k map[string]any) {
		raw, _ := (&jose.JSONWebKey{Key: &f.jwtKey.PublicKey}).MarshalJSON()
		var other map[string]any
		_ = json.Unmarshal(raw, &other)
		k["x"], k["y"] = other["x"], other["y"]
	}))},
	"x509-svid/6.1/one-certificate": {v("two", doc(0, func(_ *fake, k map[string]any) { c := k["x5c"].([]any); k["x5c"] = append(c, c[0]) }))},
	"jwt-svid/6.1/use":              {v("sig", doc(1, func(_ *fake, k map[string]any) { k["use"] = "sig" }))},
	"jwt-svid/6.1/kid":              {v("absent", doc(1, func(_ *fake, k map[string]any) { delete(k, "kid") }))},
	"jwt-svid/6.1/rfc7517":          {v("half a key", doc(1, func(_ *fake, k map[string]any) { delete(k, "y") }))},
}

// Advice has its variants too, though not all: it fails nobody.
var advice = map[string][]variant{
	"workload-endpoint/6/wrong-header-is-invalid-argument": {v("another code", func(f *fake) { f.headerCode = codes.PermissionDenied })},
	"workload-endpoint/7/reflection":                       {v("none", func(f *fake) { f.reflects = false })},
	"workload-endpoint/A/unknown-is-unimplemented":         {v("answered", func(f *fake) { f.unknown = true })},
	"workload-api/4.3/rotation-arrives": {{"nothing", func(*fake) {}, func(o *Options) {
		o.TriggerRotation, o.Wait = func(context.Context) error { return nil }, 100*time.Millisecond
	}}},
	"workload-api/4.5/audience-is-mandatory":              {v("a token", func(f *fake) { f.noAudience = true })},
	"workload-api/5.2.1/no-identity-is-permission-denied": {v("another code", func(f *fake) { f.stranger["FetchX509SVID"] = Seen{"Unauthenticated", 0} })},
	"workload-api/5.2.2/same-bundle":                      {v("another", func(f *fake) { f.x509b = func(m *workload.X509BundlesResponse) { m.Bundles[own] = f.sub.Raw } })},
	"workload-api/5.3/hint-length":                        {v("longer", func(f *fake) { f.hints[0] = strings.Repeat("h", maxHint+1) })},
	"workload-api/6.2.2/use-is-jwt-svid":                  {v("none", jwkSet(without("use")))},
	"workload-api/6.2.2/kids-unique":                      {v("none", jwkSet(without("kid")))},
	"x509-svid/3.2/authority-is-an-svid":                  {v("none", authority(func(c *x509.Certificate) { c.URIs = nil }))},
	"x509-svid/3.2/authority-in-its-trust-domain":         {v("another", authority(func(c *x509.Certificate) { c.URIs = []*url.URL{mustURL(foreign)} }))},
	"x509-svid/4.4/leaf-has-extended-key-usage":           {v("none", leaf(func(c *x509.Certificate) { c.ExtKeyUsage = nil }))},
	"x509-svid/A/authority-does-not-sign-data":            {v("it does", authority(func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageDigitalSignature }))},
	"spiffe-id/2.3/at-most-2048-bytes":                    ofID(own + "/" + strings.Repeat("a", 2048)),
	"bundle/4.1.1/sequence-set":                           {v("absent", func(f *fake) { f.document = func(_ int, d map[string]any) { delete(d, "spiffe_sequence") } })},
	"bundle/4.1.2/refresh-hint-set":                       {v("absent", func(f *fake) { f.document = func(_ int, d map[string]any) { delete(d, "spiffe_refresh_hint") } })},
	"bundle/4.1/no-other-members":                         {v("one", func(f *fake) { f.document = func(_ int, d map[string]any) { d["issuer"] = "x" } })},
	"bundle/4.2/no-other-members":                         {v("one", doc(1, func(_ *fake, k map[string]any) { k["nbf"] = 1 }))},
	"bundle/4/same-as-served":                             {v("not in it", func(f *fake) { f.x509msg = func(m *workload.X509SVIDResponse) { m.Svids[0].Bundle = f.sub.Raw } })},
	"x509-svid/6.1/self-signed":                           {v("it is not", func(f *fake) { f.document = func(_ int, d map[string]any) { d["keys"].([]any)[0] = jwkOf(f.sub) } })},
}

func jwkOf(c *x509.Certificate) map[string]any {
	raw, err := (&jose.JSONWebKey{Key: c.PublicKey, Certificates: []*x509.Certificate{c}, Use: "x509-svid"}).MarshalJSON()
	if err != nil {
		panic(err)
	}
	out := map[string]any{}
	if err := json.Unmarshal(raw, &out); err != nil {
		panic(err)
	}
	return out
}
