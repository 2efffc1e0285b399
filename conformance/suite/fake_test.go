package suite

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"errors"
	"maps"
	"math/big"
	"net"
	"net/url"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/reflection"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"
)

const (
	own     = "spiffe://example.org"
	foreign = "spiffe://other.test"
)

// fake is an endpoint that is right in all, but for what a variant breaks: each
// hook gets what is right and changes it.
type fake struct {
	workload.UnimplementedSpiffeWorkloadAPIServer

	// What is made.
	leaf      func(*x509.Certificate)
	authority func(*x509.Certificate)
	subCA     func(*x509.Certificate)
	header    func(map[string]any)
	claims    func(map[string]any)
	compact   func(string) string
	x509msg   func(*workload.X509SVIDResponse)
	x509b     func(*workload.X509BundlesResponse)
	jwtmsg    func(*workload.JWTSVIDResponse)
	jwtb      func(*workload.JWTBundlesResponse)
	validated func(*workload.ValidateJWTSVIDResponse)
	document  func(seq int, set map[string]any)

	// How it behaves.
	headerOK    func(values []string, method string) bool
	headerCode  codes.Code
	credentials bool // demands some
	reflects    bool
	unknown     bool // answers what it does not know
	silent      bool // streams say nothing
	unsupported string
	anyID       bool // tokens for whom asks
	onlyFirst   bool // tokens of the default identity alone
	ignoresID   bool
	noAudience  bool // tokens without one
	accepts     func(token string, header, claims map[string]any, err error) bool
	stranger    Probe
	rotate      func(*workload.X509SVIDResponse)
	keeps       bool // what is withdrawn

	caKey, subKey, leafKey, jwtKey *ecdsa.PrivateKey
	ca, sub                        *x509.Certificate
	ids, hints                     []string
	foreignJWT                     *ecdsa.PrivateKey

	mu      sync.Mutex
	changed chan struct{} // closed when there is something new
	state   int           // 0 at first, 1 rotated, 2 withdrawn
}

func newKey() *ecdsa.PrivateKey {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err)
	}
	return k
}

// Keys are costly to make and none of a fake's are secrets.
var keys = sync.OnceValue(func() (k [5]*ecdsa.PrivateKey) {
	for i := range k {
		k[i] = newKey()
	}
	return k
})

func newFake() *fake {
	k := keys()
	longest := own + "/" + strings.Repeat("long/", 500)
	return &fake{
		caKey: k[0], subKey: k[1], leafKey: k[2], jwtKey: k[3], foreignJWT: k[4],
		ids: []string{own + "/one", own + "/two", longest[:maxSPIFFEID-1] + "x"}, hints: []string{"internal", "external", ""},
		headerCode: codes.InvalidArgument, reflects: true, changed: make(chan struct{}),
		headerOK: func(v []string, _ string) bool { return len(v) == 1 && v[0] == "true" },
		stranger: Probe{
			"FetchX509SVID": {"PermissionDenied", 0}, "FetchX509Bundles": {"PermissionDenied", 0},
			"FetchJWTSVID": {"PermissionDenied", 0}, "FetchJWTBundles": {"PermissionDenied", 0},
		},
	}
}

func change[T any](hook func(T), to T) T {
	if hook != nil {
		hook(to)
	}
	return to
}

func certify(t *x509.Certificate, parent *x509.Certificate, pub crypto.PublicKey, by *ecdsa.PrivateKey) *x509.Certificate {
	if parent == nil {
		parent = t
	}
	der, err := x509.CreateCertificate(rand.Reader, t, parent, pub, by)
	if err != nil {
		panic(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		panic(err)
	}
	return c
}

func mustURL(s string) *url.URL {
	u, err := url.Parse(s)
	if err != nil {
		panic(err)
	}
	return u
}

func (f *fake) makeAuthorities() {
	template := func(name string) *x509.Certificate {
		return &x509.Certificate{
			SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
			IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, URIs: []*url.URL{mustURL(own)},
		}
	}
	f.ca = certify(change(f.authority, template("root")), nil, &f.caKey.PublicKey, f.caKey)
	f.sub = certify(change(f.subCA, template("sub")), f.ca, &f.subKey.PublicKey, f.caKey)
}

func (f *fake) svid(i int, key *ecdsa.PrivateKey) *workload.X509SVID {
	t := change(f.leaf, &x509.Certificate{
		SerialNumber: big.NewInt(2), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}, URIs: []*url.URL{mustURL(f.ids[i])},
	})
	leaf := certify(t, f.sub, &key.PublicKey, f.subKey)
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		panic(err)
	}
	return &workload.X509SVID{SpiffeId: f.ids[i], Hint: f.hints[i], X509Svid: slices.Concat(leaf.Raw, f.sub.Raw), X509SvidKey: der, Bundle: f.ca.Raw}
}

func (f *fake) crl() [][]byte {
	issuer := *f.ca
	issuer.KeyUsage, issuer.SubjectKeyId = x509.KeyUsageCRLSign, []byte{1} // whatever a variant made of it
	der, err := x509.CreateRevocationList(rand.Reader, &x509.RevocationList{Number: big.NewInt(1), ThisUpdate: time.Now(), NextUpdate: time.Now().Add(time.Hour)}, &issuer, f.caKey)
	if err != nil {
		panic(err)
	}
	return [][]byte{der}
}

func (f *fake) jwks(key *ecdsa.PrivateKey) []byte {
	b, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: &key.PublicKey, KeyID: "k1", Use: "jwt-svid"}}})
	if err != nil {
		panic(err)
	}
	return b
}

func (f *fake) token(id string, audience []string) string {
	header := change(f.header, map[string]any{"alg": "ES256", "kid": "k1", "typ": "JWT"})
	claims := change(f.claims, map[string]any{"sub": id, "aud": audience, "exp": time.Now().Add(time.Minute).Unix(), "iat": time.Now().Unix()})
	t, err := forge(f.jwtKey, header, claims)
	if err != nil {
		panic(err)
	}
	if header["alg"] != "ES256" {
		raw, _ := json.Marshal(header)
		t = b64.EncodeToString(raw) + t[strings.IndexByte(t, '.'):]
	}
	if f.compact != nil {
		t = f.compact(t)
	}
	return t
}

// bundleDocument is the trust domain's SPIFFE bundle before (0) and after (1) a
// change.
func (f *fake) bundleDocument(seq int) []byte {
	set := jose.JSONWebKeySet{Keys: []jose.JSONWebKey{
		{Key: f.ca.PublicKey, Certificates: []*x509.Certificate{f.ca}, Use: "x509-svid"},
		{Key: &f.jwtKey.PublicKey, KeyID: "k1", Use: "jwt-svid"},
	}}
	if seq > 0 {
		set.Keys = append(set.Keys, jose.JSONWebKey{Key: &f.foreignJWT.PublicKey, KeyID: "k2", Use: "jwt-svid"})
	}
	raw, err := json.Marshal(set)
	if err != nil {
		panic(err)
	}
	doc := map[string]any{}
	if err := json.Unmarshal(raw, &doc); err != nil {
		panic(err)
	}
	doc["spiffe_sequence"], doc["spiffe_refresh_hint"] = 7+seq, 300
	if f.document != nil {
		f.document(seq, doc)
	}
	if raw, err = json.Marshal(doc); err != nil {
		panic(err)
	}
	return raw
}

func (f *fake) event(state int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.state = state
	close(f.changed)
	f.changed = make(chan struct{})
}

func (f *fake) now() (int, <-chan struct{}) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.state, f.changed
}

var errDenied = status.Error(codes.PermissionDenied, "no identity")

func (f *fake) stream(ctx context.Context, send func(state int) error) error {
	for {
		state, changed := f.now()
		if f.silent {
			<-ctx.Done()
			return ctx.Err()
		}
		if state == 2 && !f.keeps {
			return errDenied
		}
		if err := send(state); err != nil {
			return err
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (f *fake) FetchX509SVID(_ *workload.X509SVIDRequest, s grpc.ServerStreamingServer[workload.X509SVIDResponse]) error {
	return f.stream(s.Context(), func(state int) error {
		m := &workload.X509SVIDResponse{Crl: f.crl(), FederatedBundles: map[string][]byte{foreign: f.ca.Raw}}
		for i := range f.ids {
			m.Svids = append(m.Svids, f.svid(i, f.leafKey))
		}
		if f.x509msg != nil {
			f.x509msg(m)
		}
		if state == 1 && f.rotate != nil {
			f.rotate(m)
		}
		return s.Send(m)
	})
}

func (f *fake) FetchX509Bundles(_ *workload.X509BundlesRequest, s grpc.ServerStreamingServer[workload.X509BundlesResponse]) error {
	return f.stream(s.Context(), func(int) error {
		return s.Send(change(f.x509b, &workload.X509BundlesResponse{Bundles: map[string][]byte{own: f.ca.Raw, foreign: f.ca.Raw}}))
	})
}

func (f *fake) FetchJWTSVID(_ context.Context, req *workload.JWTSVIDRequest) (*workload.JWTSVIDResponse, error) {
	if len(req.GetAudience()) == 0 && !f.noAudience {
		return nil, status.Error(codes.InvalidArgument, "audience is missing")
	}
	m := &workload.JWTSVIDResponse{}
	for i, id := range f.ids {
		if req.GetSpiffeId() == "" || req.GetSpiffeId() == id || f.ignoresID {
			m.Svids = append(m.Svids, &workload.JWTSVID{SpiffeId: id, Hint: f.hints[i], Svid: f.token(id, req.GetAudience())})
		}
		if f.onlyFirst {
			break
		}
	}
	if len(m.Svids) == 0 && !f.anyID {
		return nil, errDenied
	}
	return change(f.jwtmsg, m), nil
}

func (f *fake) FetchJWTBundles(_ *workload.JWTBundlesRequest, s grpc.ServerStreamingServer[workload.JWTBundlesResponse]) error {
	return f.stream(s.Context(), func(int) error {
		return s.Send(change(f.jwtb, &workload.JWTBundlesResponse{Bundles: map[string][]byte{own: f.jwks(f.jwtKey), foreign: f.jwks(f.foreignJWT)}}))
	})
}

var errToken = errors.New("not a good token")

// check is a validator by the rules; its error says what is the matter.
func (f *fake) check(req *workload.ValidateJWTSVIDRequest) (header, claims map[string]any, err error) {
	header, claims, err = readToken(req.GetSvid())
	if err != nil {
		return header, claims, err
	}
	for name := range header {
		if !slices.Contains([]string{"alg", "kid", "typ"}, name) {
			return header, claims, errToken
		}
	}
	if typ, set := header["typ"]; set && typ != "JWT" && typ != "JOSE" {
		return header, claims, errToken
	}
	jws, err := jose.ParseSignedCompact(req.GetSvid(), algorithms)
	if err == nil {
		_, err = jws.Verify(&f.jwtKey.PublicKey)
	}
	if err != nil {
		return header, claims, err
	}
	exp, _ := claims["exp"].(float64)
	sub, _ := claims["sub"].(string)
	if exp < float64(time.Now().Unix()) || trustDomainOf(sub) != own || header["kid"] != "k1" || !slices.Contains(audienceOf(claims), req.GetAudience()) {
		return header, claims, errToken
	}
	return header, claims, nil
}

func (f *fake) ValidateJWTSVID(_ context.Context, req *workload.ValidateJWTSVIDRequest) (*workload.ValidateJWTSVIDResponse, error) {
	header, claims, err := f.check(req)
	if req.GetAudience() == "" || req.GetSvid() == "" || err != nil && (f.accepts == nil || !f.accepts(req.GetSvid(), header, claims, err)) {
		return nil, status.Error(codes.InvalidArgument, "not valid")
	}
	s, err := structpb.NewStruct(claims)
	if err != nil {
		return nil, err
	}
	sub, _ := claims["sub"].(string)
	return change(f.validated, &workload.ValidateJWTSVIDResponse{SpiffeId: sub, Claims: s}), nil
}

func (f *fake) admit(ctx context.Context, method string) error {
	_, name, _ := strings.Cut(strings.TrimPrefix(method, "/"), "/")
	if !strings.HasPrefix(method, "/"+service+"/") {
		return nil
	}
	md, _ := metadata.FromIncomingContext(ctx)
	if !f.headerOK(md.Get(headerKey), name) {
		return status.Error(f.headerCode, "no header")
	}
	if f.credentials && len(md.Get("authorization")) == 0 {
		return status.Error(codes.Unauthenticated, "who are you?")
	}
	if f.unsupported != "" && strings.Contains(name, f.unsupported) {
		return status.Error(codes.Unimplemented, "not here")
	}
	return nil
}

// serve starts the fake and gives the options of a run with every scene.
func (f *fake) serve(t *testing.T, more ...grpc.ServerOption) Options {
	t.Helper()
	f.makeAuthorities()
	o := append([]grpc.ServerOption{
		grpc.UnaryInterceptor(func(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
			if err := f.admit(ctx, info.FullMethod); err != nil {
				return nil, err
			}
			return next(ctx, req)
		}),
		grpc.StreamInterceptor(func(srv any, s grpc.ServerStream, info *grpc.StreamServerInfo, next grpc.StreamHandler) error {
			if err := f.admit(s.Context(), info.FullMethod); err != nil {
				return err
			}
			return next(srv, s)
		}),
	}, more...)
	if f.unknown {
		o = append(o, grpc.UnknownServiceHandler(func(_ any, s grpc.ServerStream) error { return s.SendMsg(&workload.X509SVIDRequest{}) }))
	}
	srv := grpc.NewServer(o...)
	workload.RegisterSpiffeWorkloadAPIServer(srv, f)
	if f.reflects {
		reflection.Register(srv)
	}
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() { defer close(done); _ = srv.Serve(l) }()
	t.Cleanup(func() { srv.Stop(); <-done })
	return Options{
		Socket: "unix://" + socket, Audience: "tests", Federated: foreign,
		Bundles: [][]byte{f.bundleDocument(0), f.bundleDocument(1)}, JWTKey: f.jwtKey,
		WithoutIdentity: func(context.Context) (Probe, error) { return maps.Clone(f.stranger), nil },
		TriggerRotation: func(context.Context) error { f.event(1); return nil },
		Withdraw:        func(context.Context) error { f.event(2); return nil },
		Prompt:          2 * time.Second, Wait: 5 * time.Second,
	}
}
