package suite

import (
	"context"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"strings"
	"time"
)

var (
	oidKeyUsage = asn1.ObjectIdentifier{2, 5, 29, 15}
	oidSAN      = asn1.ObjectIdentifier{2, 5, 29, 17}

	errNoSAN        = errors.New("no SAN extension")
	errMalformedSAN = errors.New("the SAN extension is not a list of names")
)

const (
	spiffeScheme   = "spiffe://"
	emptySubject   = "3000" // in hex: a sequence of nothing
	generalNameURI = 6      // GeneralName's tag of uniformResourceIdentifier
	maxSPIFFEID    = 2048   // bytes
	maxTrustDomain = 255    // bytes
)

// extension is the raw one: x509.Certificate does not say what was critical.
func extension(c *x509.Certificate, oid asn1.ObjectIdentifier) (pkix.Extension, bool) {
	for _, e := range c.Extensions {
		if e.Id.Equal(oid) {
			return e, true
		}
	}
	return pkix.Extension{}, false
}

// uriSANs are the strings as they are in the certificate: url.URL would write
// some of them anew.
func uriSANs(c *x509.Certificate) ([]string, error) {
	ext, there := extension(c, oidSAN)
	if !there {
		return nil, errNoSAN
	}
	var names asn1.RawValue
	if rest, err := asn1.Unmarshal(ext.Value, &names); err != nil || len(rest) > 0 {
		return nil, errMalformedSAN
	}
	var uris []string
	for rest := names.Bytes; len(rest) > 0; {
		var name asn1.RawValue
		var err error
		if rest, err = asn1.Unmarshal(rest, &name); err != nil {
			return nil, errMalformedSAN
		}
		if name.Class == asn1.ClassContextSpecific && name.Tag == generalNameURI {
			uris = append(uris, string(name.Bytes))
		}
	}
	return uris, nil
}

func eachLeaf(judge func(bad *problems, name string, leaf *x509.Certificate)) func(context.Context, *run) error {
	return eachSVID(func(bad *problems, _ *run, s svid) { judge(bad, s.name, s.chain[0]) })
}

// eachAuthority judges the signing certificates: the rest of each chain, and the
// bundle.
func eachAuthority(judge func(bad *problems, name string, ca *x509.Certificate, s svid)) func(context.Context, *run) error {
	return eachSVID(func(bad *problems, _ *run, s svid) {
		for i, c := range s.chain[1:] {
			judge(bad, fmt.Sprintf("%s, certificate %d of the chain", s.name, i+1), c, s)
		}
		for i, c := range s.bundle {
			judge(bad, fmt.Sprintf("%s, certificate %d of the bundle", s.name, i), c, s)
		}
	})
}

func x509SVIDClauses() []Clause {
	return []Clause{
		{"x509-svid/2/exactly-one-uri-san", Must, "an SVID has exactly one URI SAN", eachLeaf(func(bad *problems, name string, c *x509.Certificate) {
			if uris, err := uriSANs(c); len(uris) != 1 {
				bad.add("%s has %d (%v)", name, len(uris), err)
			}
		})},
		{"x509-svid/2/id-is-the-messages", Must, "the URI SAN is the SPIFFE ID that the message names", eachSVID(func(bad *problems, _ *run, s svid) {
			if uris, _ := uriSANs(s.chain[0]); len(uris) == 0 || uris[0] != s.GetSpiffeId() {
				bad.add("%s: %q in the message, %q in the certificate", s.name, s.GetSpiffeId(), uris)
			}
		})},
		{"x509-svid/3.1/leaf-has-a-path", Must, "a leaf's SPIFFE ID has a path", eachLeaf(func(bad *problems, name string, c *x509.Certificate) {
			uris, _ := uriSANs(c)
			for _, u := range uris {
				if p := pathOf(u); p == "" || p == "/" {
					bad.add("%s: %q", name, u)
				}
			}
		})},
		{"x509-svid/3.1/san-critical-without-subject", Must, "the SAN is critical where there is no Subject", func(ctx context.Context, r *run) error {
			subjects := true
			err := eachLeaf(func(bad *problems, name string, c *x509.Certificate) {
				if fmt.Sprintf("%x", c.RawSubject) != emptySubject {
					return
				}
				subjects = false
				if e, there := extension(c, oidSAN); !there || !e.Critical {
					bad.add("%s: no Subject, and the SAN is not critical", name)
				}
			})(ctx, r)
			if err == nil && subjects {
				return notRun("every SVID has a Subject")
			}
			return err
		}},
		{"x509-svid/3.2/authority-has-no-path", Must, "a signing certificate's SPIFFE ID has no path", eachAuthority(func(bad *problems, name string, c *x509.Certificate, _ svid) {
			uris, _ := uriSANs(c)
			for _, u := range uris {
				if p := pathOf(u); strings.HasPrefix(u, spiffeScheme) && p != "" && p != "/" {
					bad.add("%s: %q", name, u)
				}
			}
		})},
		{"x509-svid/3.2/authority-is-an-svid", Should, "a signing certificate is itself an SVID", eachAuthority(func(bad *problems, name string, c *x509.Certificate, _ svid) {
			if uris, _ := uriSANs(c); len(uris) == 0 {
				bad.add("%s has no SPIFFE ID", name)
			}
		})},
		{"x509-svid/3.2/authority-in-its-trust-domain", Should, "a signing certificate's SPIFFE ID is in the trust domain of what it signs", eachAuthority(func(bad *problems, name string, c *x509.Certificate, s svid) {
			uris, _ := uriSANs(c)
			for _, u := range uris {
				if trustDomainOf(u) != trustDomainOf(s.GetSpiffeId()) {
					bad.add("%s: %q", name, u)
				}
			}
		})},
		{"x509-svid/4.1/leaf-is-no-ca", Must, "a leaf has cA false", eachLeaf(func(bad *problems, name string, c *x509.Certificate) {
			if c.IsCA {
				bad.add("%s has cA true", name)
			}
		})},
		{"x509-svid/4.1/authority-is-a-ca", Must, "a signing certificate has cA true", eachAuthority(func(bad *problems, name string, c *x509.Certificate, _ svid) {
			if !c.BasicConstraintsValid || !c.IsCA {
				bad.add("%s has not", name)
			}
		})},
		{"x509-svid/4.3/key-usage-set", Must, "the key usage extension is there", eachCertificate(func(bad *problems, name string, c *x509.Certificate) {
			if _, there := extension(c, oidKeyUsage); !there {
				bad.add("%s has none", name)
			}
		})},
		{"x509-svid/4.3/key-usage-critical", Must, "the key usage extension is critical", eachCertificate(func(bad *problems, name string, c *x509.Certificate) {
			if e, there := extension(c, oidKeyUsage); there && !e.Critical {
				bad.add("%s: it is not", name)
			}
		})},
		{"x509-svid/4.3/authority-signs-certificates", Must, "a signing certificate has keyCertSign", eachAuthority(func(bad *problems, name string, c *x509.Certificate, _ svid) {
			if c.KeyUsage&x509.KeyUsageCertSign == 0 {
				bad.add("%s has not", name)
			}
		})},
		{"x509-svid/4.3/leaf-signs", Must, "a leaf has digitalSignature", eachLeaf(func(bad *problems, name string, c *x509.Certificate) {
			if c.KeyUsage&x509.KeyUsageDigitalSignature == 0 {
				bad.add("%s has not", name)
			}
		})},
		{"x509-svid/4.3/leaf-signs-no-certificates", Must, "a leaf has neither keyCertSign nor cRLSign", eachLeaf(func(bad *problems, name string, c *x509.Certificate) {
			if c.KeyUsage&(x509.KeyUsageCertSign|x509.KeyUsageCRLSign) != 0 {
				bad.add("%s has", name)
			}
		})},
		{"x509-svid/4.4/leaf-has-extended-key-usage", Should, "a leaf has the extended key usage extension", eachLeaf(func(bad *problems, name string, c *x509.Certificate) {
			if len(c.ExtKeyUsage)+len(c.UnknownExtKeyUsage) == 0 {
				bad.add("%s has not", name)
			}
		})},
		{"x509-svid/4.4/both-tls-usages", Must, "extended key usage, where it is, has serverAuth and clientAuth", checkBothUsages},
		{"x509-svid/5.1/path-validates", Must, "each SVID validates against its bundle by RFC 5280, now", eachSVID(checkPath)},
		{"x509-svid/A/authority-does-not-sign-data", Should, "digitalSignature is for leaves alone", eachAuthority(func(bad *problems, name string, c *x509.Certificate, _ svid) {
			if c.KeyUsage&x509.KeyUsageDigitalSignature != 0 {
				bad.add("%s has it", name)
			}
		})},
	}
}

// eachCertificate judges leaves, and those signing certificates that are SVIDs:
// the clauses are about SVIDs.
func eachCertificate(judge func(bad *problems, name string, c *x509.Certificate)) func(context.Context, *run) error {
	return func(ctx context.Context, r *run) error {
		leaves := eachLeaf(judge)(ctx, r)
		if _, skipped := leaves.(notRun); skipped {
			return leaves
		}
		return errors.Join(leaves, eachAuthority(func(bad *problems, name string, c *x509.Certificate, _ svid) {
			if uris, _ := uriSANs(c); len(uris) > 0 {
				judge(bad, name, c)
			}
		})(ctx, r))
	}
}

func checkBothUsages(ctx context.Context, r *run) error {
	some := false
	err := eachLeaf(func(bad *problems, name string, c *x509.Certificate) {
		if len(c.ExtKeyUsage)+len(c.UnknownExtKeyUsage) == 0 {
			return
		}
		some = true
		var server, client bool
		for _, u := range c.ExtKeyUsage {
			server = server || u == x509.ExtKeyUsageServerAuth
			client = client || u == x509.ExtKeyUsageClientAuth
		}
		if !server || !client {
			bad.add("%s: serverAuth %v, clientAuth %v", name, server, client)
		}
	})(ctx, r)
	if err == nil && !some {
		return notRun("no SVID has the extension")
	}
	return err
}

func checkPath(bad *problems, _ *run, s svid) {
	o := x509.VerifyOptions{
		Roots: x509.NewCertPool(), Intermediates: x509.NewCertPool(),
		CurrentTime: time.Now(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
	}
	for _, c := range s.chain[1:] {
		o.Intermediates.AddCert(c)
	}
	for _, c := range s.bundle {
		o.Roots.AddCert(c)
	}
	if _, err := s.chain[0].Verify(o); err != nil {
		bad.add("%s: %v", s.name, err)
	}
}
