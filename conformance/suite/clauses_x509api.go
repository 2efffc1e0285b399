package suite

import (
	"context"
	"crypto"
	"crypto/x509"
	"fmt"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

const maxHint = 1024 // bytes

func profileClauses() []Clause {
	return []Clause{
		{"workload-api/1/x509-profile", Must, "the X.509-SVID profile is supported", func(_ context.Context, r *run) error {
			if r.disabled("x509") {
				return notRun("the operator has disabled it")
			}
			_, err := r.x509SVIDs()
			return supported("FetchX509SVID", err)
		}},
		{"workload-api/1/jwt-profile", Must, "the JWT-SVID profile is supported", func(_ context.Context, r *run) error {
			if r.disabled("jwt") {
				return notRun("the operator has disabled it")
			}
			_, err := r.jwtSVIDs()
			return supported("FetchJWTSVID", err)
		}},
		{"workload-api/2/not-extended", Must, "the Workload API has nothing beyond its document", checkNotExtended},
		{"workload-api/4.3/first-message-at-once", Must, "each stream's first message comes without delay", checkPrompt},
	}
}

// supported: a caller without an identity could not tell. The suite must be run
// as one that has an identity, and says so instead of passing on nothing.
func supported(method string, err error) error {
	if status.Code(err) == codes.PermissionDenied {
		return fmt.Errorf("%s: %s: the suite itself must be a workload with an identity", method, short(err))
	}
	if err != nil {
		return fmt.Errorf("%s: %s", method, short(err))
	}
	return nil
}

// checkPrompt opens all streams twice on a connection of its own: a request is
// what is to be answered, not the connection's beginning.
func checkPrompt(ctx context.Context, r *run) error {
	conn, err := dial(r.Socket)
	if err != nil {
		return err
	}
	defer conn.Close()
	fresh := newRun(ctx, r.Options, conn)
	var bad problems
	streams := 0
	for _, round := range []string{"first", "second"} {
		for _, m := range rpcs {
			if m.name == "FetchJWTSVID" || m.name == "ValidateJWTSVID" || r.disabled(m.profile) {
				continue
			}
			limited, cancel := context.WithTimeout(withHeader(ctx, "true"), r.Prompt)
			began := time.Now()
			err := m.call(limited, fresh)
			cancel()
			streams++
			if status.Code(err) == codes.DeadlineExceeded {
				bad.add("%s, %s stream of a connection: nothing in %v", m.name, round, time.Since(began).Round(time.Millisecond))
			}
		}
	}
	if streams == 0 {
		return notRun("no profile is enabled")
	}
	return bad.err()
}

// svid is one entry of an X509SVIDResponse, read as far as it can be.
type svid struct {
	*workload.X509SVID
	name          string
	chain, bundle []*x509.Certificate
	chainErr      error
	bundleErr     error
}

func (r *run) svids() ([]svid, error) {
	msg, err := r.x509SVIDs()
	if err != nil || len(msg.GetSvids()) == 0 {
		return nil, notRun("no X.509-SVID was served")
	}
	var out []svid
	for i, s := range msg.GetSvids() {
		v := svid{X509SVID: s, name: fmt.Sprintf("svids[%d]", i)}
		v.chain, v.chainErr = x509.ParseCertificates(s.GetX509Svid())
		v.bundle, v.bundleErr = x509.ParseCertificates(s.GetBundle())
		if v.chainErr == nil && len(v.chain) == 0 {
			v.chainErr = fmt.Errorf("no certificate")
		}
		if v.bundleErr == nil && len(v.bundle) == 0 {
			v.bundleErr = fmt.Errorf("no certificate")
		}
		out = append(out, v)
	}
	return out, nil
}

// eachSVID is for clauses about what is in the certificates: one that does not
// even parse is another clause's failure.
func eachSVID(judge func(bad *problems, r *run, s svid)) func(context.Context, *run) error {
	return func(_ context.Context, r *run) error {
		all, err := r.svids()
		if err != nil {
			return err
		}
		var bad problems
		for _, s := range all {
			if s.chainErr != nil || s.bundleErr != nil {
				return notRun("see workload-api/5.1/chain-is-der and bundle-is-der")
			}
			judge(&bad, r, s)
		}
		return bad.err()
	}
}

func x509APIClauses() []Clause {
	return []Clause{
		{"workload-api/5.1/chain-is-der", Must, "x509_svid is a chain of DER certificates, one after the other", checkChainDER},
		{"workload-api/5.1/chain-in-order", Must, "each certificate of the chain is signed by the next", eachSVID(func(bad *problems, _ *run, s svid) {
			for i := 1; i < len(s.chain); i++ {
				if err := s.chain[i-1].CheckSignatureFrom(s.chain[i]); err != nil {
					bad.add("%s: certificate %d is not signed by certificate %d: %v", s.name, i-1, i, err)
				}
			}
		})},
		{"workload-api/5.1/leaf-first", Must, "the chain begins with the SVID itself", eachSVID(func(bad *problems, _ *run, s svid) {
			uris, _ := uriSANs(s.chain[0])
			if s.chain[0].IsCA || len(uris) == 0 || uris[0] != s.GetSpiffeId() {
				bad.add("%s: the first certificate is not %s's own", s.name, s.GetSpiffeId())
			}
		})},
		{"workload-api/5.1/key-is-pkcs8", Must, "x509_svid_key is an unencrypted PKCS #8 key in DER", eachSVID(func(bad *problems, _ *run, s svid) {
			if _, err := x509.ParsePKCS8PrivateKey(s.GetX509SvidKey()); err != nil {
				bad.add("%s: %v", s.name, err)
			}
		})},
		{"workload-api/5.1/key-is-the-leafs", Must, "the private key is the SVID's", eachSVID(func(bad *problems, _ *run, s svid) {
			key, err := x509.ParsePKCS8PrivateKey(s.GetX509SvidKey())
			if err != nil {
				return // the clause above
			}
			signer, ok := key.(crypto.Signer)
			if !ok || !equalKeys(signer.Public(), s.chain[0].PublicKey) {
				bad.add("%s: the key is not the certificate's", s.name)
			}
		})},
		{"workload-api/5.1/bundle-is-der", Must, "bundle holds the trust domain's certificates in DER", func(_ context.Context, r *run) error {
			all, err := r.svids()
			if err != nil {
				return err
			}
			var bad problems
			for _, s := range all {
				if s.bundleErr != nil {
					bad.add("%s: %v", s.name, s.bundleErr)
				}
			}
			return bad.err()
		}},
		{"workload-api/5.1/crl-is-der", Must, "each crl is a certificate revocation list in DER", checkCRL},
		{"workload-api/5.1/federated-bundles-keyed", Must, "federated bundles are DER and keyed by the foreign trust domain's SPIFFE ID", checkFederated},
		{"workload-api/5.2.1/svids-not-empty", Must, "svids has one entry or more", func(_ context.Context, r *run) error {
			msg, err := r.x509SVIDs()
			if err != nil {
				return notRun("no X509SVIDResponse was sent")
			}
			if len(msg.GetSvids()) == 0 {
				return fmt.Errorf("the message has no SVID")
			}
			return nil
		}},
		{"workload-api/5.2.1/fields-set", Must, "ID, chain, key and bundle of each SVID are set", func(_ context.Context, r *run) error {
			msg, err := r.x509SVIDs()
			if err != nil {
				return notRun("no X509SVIDResponse was sent")
			}
			return x509Fields(msg)
		}},
		{"workload-api/5.2.1/hints-unique", Must, "no two SVIDs of a message have the same hint", func(_ context.Context, r *run) error {
			msg, err := r.x509SVIDs()
			if err != nil {
				return notRun("no X509SVIDResponse was sent")
			}
			var hints []string
			for _, s := range msg.GetSvids() {
				hints = append(hints, s.GetHint())
			}
			return uniqueHints(hints)
		}},
		{"workload-api/5.2.2/own-bundle", Must, "bundles has that of the server's own trust domain", checkOwnX509Bundle},
		{"workload-api/5.2.2/bundles-are-der", Must, "bundles are DER and keyed by the trust domain's SPIFFE ID", func(_ context.Context, r *run) error {
			msg, err := r.x509Bundles()
			if err != nil {
				return notRun("no X509BundlesResponse was sent")
			}
			return keyedCertificates(msg.GetBundles())
		}},
		{"workload-api/5.2.2/same-bundle", Should, "both RPCs serve the same bundle", checkSameBundle},
		{"workload-api/5.3/hint-length", Should, "hints are of at most 1024 bytes", func(_ context.Context, r *run) error {
			var bad problems
			x, err := r.x509SVIDs()
			if err != nil {
				return notRun("no X509SVIDResponse was sent")
			}
			for i, s := range x.GetSvids() {
				if len(s.GetHint()) > maxHint {
					bad.add("svids[%d]: %d bytes", i, len(s.GetHint()))
				}
			}
			return bad.err()
		}},
	}
}

func checkChainDER(_ context.Context, r *run) error {
	all, err := r.svids()
	if err != nil {
		return err
	}
	var bad problems
	for _, s := range all {
		if s.chainErr != nil {
			bad.add("%s: %v", s.name, s.chainErr)
		}
	}
	return bad.err()
}

func x509Fields(msg *workload.X509SVIDResponse) error {
	if len(msg.GetSvids()) == 0 {
		return notRun("the message has no SVID")
	}
	var bad problems
	for i, s := range msg.GetSvids() {
		for field, empty := range map[string]bool{
			"spiffe_id": s.GetSpiffeId() == "", "x509_svid": len(s.GetX509Svid()) == 0,
			"x509_svid_key": len(s.GetX509SvidKey()) == 0, "bundle": len(s.GetBundle()) == 0,
		} {
			if empty {
				bad.add("svids[%d] has no %s", i, field)
			}
		}
	}
	return bad.err()
}

func uniqueHints(hints []string) error {
	seen := map[string]int{}
	set := 0
	var bad problems
	for i, h := range hints {
		if h == "" {
			continue
		}
		set++
		if j, twice := seen[h]; twice {
			bad.add("svids[%d] and svids[%d] both have %q", j, i, h)
		}
		seen[h] = i
	}
	if set < 2 {
		return notRun("needs a caller with two identities that have hints")
	}
	return bad.err()
}

func checkCRL(_ context.Context, r *run) error {
	var lists [][]byte
	if msg, err := r.x509SVIDs(); err == nil {
		lists = append(lists, msg.GetCrl()...)
	}
	if msg, err := r.x509Bundles(); err == nil {
		lists = append(lists, msg.GetCrl()...)
	}
	if len(lists) == 0 {
		return notRun("no revocation list was served")
	}
	var bad problems
	for i, der := range lists {
		if _, err := x509.ParseRevocationList(der); err != nil {
			bad.add("crl %d: %v", i, err)
		}
	}
	return bad.err()
}

func checkFederated(_ context.Context, r *run) error {
	msg, err := r.x509SVIDs()
	if err != nil {
		return notRun("no X509SVIDResponse was sent")
	}
	fed := msg.GetFederatedBundles()
	if r.Federated == "" && len(fed) == 0 {
		return needs("--federated")
	}
	var bad problems
	if _, there := fed[r.Federated]; r.Federated != "" && !there {
		bad.add("%s is not among the %d", r.Federated, len(fed))
	}
	for _, s := range msg.GetSvids() {
		if _, own := fed[trustDomainOf(s.GetSpiffeId())]; own {
			bad.add("the own trust domain is among them")
			break
		}
	}
	if err := keyedCertificates(fed); err != nil {
		bad.add("%v", err)
	}
	return bad.err()
}

// keyedCertificates judges a map of bundles: what a key and what a value is.
func keyedCertificates(bundles map[string][]byte) error {
	var bad problems
	for key, der := range bundles {
		if key == "" || key != trustDomainOf(key) {
			bad.add("%q is not the SPIFFE ID of a trust domain", key)
		}
		if certs, err := x509.ParseCertificates(der); err != nil || len(certs) == 0 {
			bad.add("the bundle of %q has %d certificates: %v", key, len(certs), err)
		}
	}
	return bad.err()
}

func checkOwnX509Bundle(_ context.Context, r *run) error {
	msg, err := r.x509Bundles()
	if err != nil {
		return notRun("no X509BundlesResponse was sent")
	}
	td, err := r.trustDomain()
	if err != nil {
		return err
	}
	if len(msg.GetBundles()[td]) == 0 {
		return fmt.Errorf("no bundle of %s among %d", td, len(msg.GetBundles()))
	}
	return nil
}

// checkSameBundle compares sets, of answers taken one right after the other: a
// rotation between them would be nobody's fault, and is ruled out by asking again.
func checkSameBundle(ctx context.Context, r *run) error {
	if r.disabled("x509") {
		return notRun("the operator has disabled the profile")
	}
	for try := 0; ; try++ {
		fresh := newRun(ctx, r.Options, r.conn)
		msg, err := fresh.x509Bundles()
		if err != nil {
			return notRun("no X509BundlesResponse was sent")
		}
		all, err := fresh.svids()
		if err != nil {
			return err
		}
		i := slices.IndexFunc(all, func(s svid) bool {
			other, err := x509.ParseCertificates(msg.GetBundles()[trustDomainOf(s.GetSpiffeId())])
			return err != nil || !sameCertificates(other, s.bundle)
		})
		if i < 0 {
			return nil
		}
		if try > 0 {
			return fmt.Errorf("%s: FetchX509Bundles has another bundle for its trust domain", all[i].name)
		}
	}
}

func sameCertificates(a, b []*x509.Certificate) bool {
	in := func(set []*x509.Certificate, c *x509.Certificate) bool { return slices.ContainsFunc(set, c.Equal) }
	for _, c := range a {
		if !in(b, c) {
			return false
		}
	}
	for _, c := range b {
		if !in(a, c) {
			return false
		}
	}
	return true
}

// trustDomain is the server's own, by the SVIDs it gave us.
func (r *run) trustDomain() (string, error) {
	if msg, err := r.x509SVIDs(); err == nil {
		for _, s := range msg.GetSvids() {
			if td := trustDomainOf(s.GetSpiffeId()); td != "" {
				return td, nil
			}
		}
	}
	if msg, err := r.jwtSVIDs(); err == nil {
		for _, s := range msg.GetSvids() {
			if td := trustDomainOf(s.GetSpiffeId()); td != "" {
				return td, nil
			}
		}
	}
	return "", notRun("no SVID tells the trust domain")
}

func equalKeys(a, b crypto.PublicKey) bool {
	k, ok := a.(interface{ Equal(crypto.PublicKey) bool })
	return ok && k.Equal(b)
}
