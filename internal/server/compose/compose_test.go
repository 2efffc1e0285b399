package compose

import (
	"context"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	composerv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/server/credentialcomposer/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/rootlink/rootlink/pkg/svid"
)

// fake answers with what x509 and jwt make of the request; nil: Unimplemented.
type fake struct {
	composerv1.CredentialComposerClient // panics when anything else is called
	x509                                func(*composerv1.X509SVIDAttributes) error
	jwt                                 func(*structpb.Struct) error
	calls                               *[]string
}

func (f fake) called(name string) {
	if f.calls != nil {
		*f.calls = append(*f.calls, name)
	}
}

func (f fake) attrs(in *composerv1.X509SVIDAttributes) (*composerv1.X509SVIDAttributes, error) {
	if f.x509 == nil {
		return nil, status.Error(codes.Unimplemented, "")
	}
	out := proto.CloneOf(in)
	return out, f.x509(out)
}

func (f fake) ComposeWorkloadX509SVID(_ context.Context, r *composerv1.ComposeWorkloadX509SVIDRequest, _ ...grpc.CallOption) (*composerv1.ComposeWorkloadX509SVIDResponse, error) {
	f.called("workload " + r.SpiffeId)
	a, err := f.attrs(r.Attributes)
	return &composerv1.ComposeWorkloadX509SVIDResponse{Attributes: a}, err
}

func (f fake) ComposeAgentX509SVID(_ context.Context, r *composerv1.ComposeAgentX509SVIDRequest, _ ...grpc.CallOption) (*composerv1.ComposeAgentX509SVIDResponse, error) {
	f.called("agent " + r.SpiffeId)
	a, err := f.attrs(r.Attributes)
	return &composerv1.ComposeAgentX509SVIDResponse{Attributes: a}, err
}

func (f fake) ComposeServerX509SVID(_ context.Context, r *composerv1.ComposeServerX509SVIDRequest, _ ...grpc.CallOption) (*composerv1.ComposeServerX509SVIDResponse, error) {
	f.called("server")
	a, err := f.attrs(r.Attributes)
	return &composerv1.ComposeServerX509SVIDResponse{Attributes: a}, err
}

func (f fake) ComposeWorkloadJWTSVID(ctx context.Context, r *composerv1.ComposeWorkloadJWTSVIDRequest, _ ...grpc.CallOption) (*composerv1.ComposeWorkloadJWTSVIDResponse, error) {
	f.called("jwt " + r.SpiffeId)
	if f.jwt == nil {
		<-ctx.Done()
		return nil, status.FromContextError(ctx.Err()).Err()
	}
	out := proto.CloneOf(r.Attributes)
	err := f.jwt(out.Claims)
	return &composerv1.ComposeWorkloadJWTSVIDResponse{Attributes: out}, err
}

const id = "spiffe://example.org/web"

func request() *svid.Request {
	return &svid.Request{Profile: svid.Workload, ID: spiffeid.RequireFromString(id), DNSNames: []string{"web.example.org"}}
}

func ext(oid string) *composerv1.X509Extension {
	return &composerv1.X509Extension{Oid: oid, Value: []byte{5, 0}}
}

func TestComposersAddOneAfterTheOther(t *testing.T) {
	add := func(n int) func(*composerv1.X509SVIDAttributes) error {
		return func(a *composerv1.X509SVIDAttributes) error {
			if len(a.DnsSans) != n || len(a.ExtraExtensions) != n-1 {
				return fmt.Errorf("composer %d was sent %v", n, a)
			}
			a.DnsSans = append(a.DnsSans, fmt.Sprintf("n%d.example.org", n))
			a.ExtraExtensions = append(a.ExtraExtensions, ext(fmt.Sprintf("1.3.6.1.4.1.99999.%d", n)))
			a.Subject.Organization = append(a.Subject.Organization, fmt.Sprint(n))
			a.Subject.ExtraNames = append(a.Subject.ExtraNames, &composerv1.AttributeTypeAndValue{Oid: "2.5.4.45", StringValue: fmt.Sprint(n)})
			return nil
		}
	}
	var calls []string
	c := Chain{{"one", fake{x509: add(1), calls: &calls}}, {"none", fake{}}, {"two", fake{x509: add(2)}}}
	r := request()
	if err := c.X509(t.Context(), r); err != nil {
		t.Fatal(err)
	}
	if want := []string{"web.example.org", "n1.example.org", "n2.example.org"}; !slices.Equal(r.DNSNames, want) {
		t.Errorf("%q", r.DNSNames)
	}
	if s := r.Composed.Subject; s.CommonName != "web.example.org" || !slices.Equal(s.Organization, []string{"1", "2"}) || len(s.ExtraNames) != 2 {
		t.Errorf("%+v", s)
	}
	if len(r.Composed.Extensions) != 2 {
		t.Errorf("%v", r.Composed.Extensions)
	}
	calls = nil
	for _, p := range []svid.Profile{svid.Minted, svid.Agent, svid.Server, svid.Issuer} {
		if err := c[:1].X509(t.Context(), &svid.Request{Profile: p, ID: r.ID, DNSNames: []string{"a"}}); err != nil {
			t.Error(err)
		}
	}
	evidence := request()
	evidence.Evidence = new(svid.Evidence)
	if err := c[:1].X509(t.Context(), evidence); err != nil || evidence.Composed != nil {
		t.Errorf("with evidence: %v, %v", evidence.Composed, err)
	}
	if want := []string{"workload " + id, "agent " + id, "server"}; !slices.Equal(calls, want) {
		t.Errorf("asked for %q, want %q", calls, want)
	}
}

// Each of these is what a composer of SPIRE's may do, or a stolen one would try.
func TestRefusesWhatComposersMayNotAdd(t *testing.T) {
	extension := func(oid string) func(a *composerv1.X509SVIDAttributes) {
		return func(a *composerv1.X509SVIDAttributes) { a.ExtraExtensions = append(a.ExtraExtensions, ext(oid)) }
	}
	for name, bend := range map[string]func(a *composerv1.X509SVIDAttributes){
		"names, another URI with them": extension("2.5.29.17"),
		"basic constraints":            extension("2.5.29.19"),
		"key usage":                    extension("2.5.29.15"),
		"extended key usage":           extension("2.5.29.37"),
		"key identifier":               extension("2.5.29.14"),
		"authority key identifier":     extension("2.5.29.35"),
		"private key usage period":     extension("2.5.29.16"),
		"name constraints":             extension("2.5.29.30"),
		"evidence":                     extension("1.3.6.1.5.5.7.1.35"),
		"code signing, Netscape's":     extension("2.16.840.1.113730.1.1"),
		"code signing, Microsoft's":    extension("1.3.6.1.4.1.311.21.10"),
		"somebody's build, Sigstore's": extension("1.3.6.1.4.1.57264.1.1"),
		"a delegation":                 extension("1.3.6.1.4.1.311.20.2"),
		"no OID":                       extension("1.2.x"),
		"an OID of another spelling":   extension("2.5.029.17"),
		"an OID that wraps around":     extension("2.5.4294967325.17"),
		"an OID of two numbers":        extension("1.2"),
		"an OID that has no encoding":  extension("3.50.1"),
		"a critical one":               func(a *composerv1.X509SVIDAttributes) { extension("1.2.3.4")(a); a.ExtraExtensions[0].Critical = true },
		"the same twice":               func(a *composerv1.X509SVIDAttributes) { extension("1.2.3.4")(a); extension("1.2.3.4")(a) },
		"nil":                          func(a *composerv1.X509SVIDAttributes) { a.ExtraExtensions = append(a.ExtraExtensions, nil) },
		"a large one": func(a *composerv1.X509SVIDAttributes) {
			extension("1.2.3.4")(a)
			a.ExtraExtensions[0].Value = make([]byte, svid.MaxComposed)
		},
		"many":                    func(a *composerv1.X509SVIDAttributes) { a.ExtraExtensions = make([]*composerv1.X509Extension, 1000) },
		"a URI as DNS name":       func(a *composerv1.X509SVIDAttributes) { a.DnsSans = append(a.DnsSans, "spiffe://example.org/root") },
		"a DNS name of two lines": func(a *composerv1.X509SVIDAttributes) { a.DnsSans = append(a.DnsSans, "a\nb") },
		"too many DNS names": func(a *composerv1.X509SVIDAttributes) {
			a.DnsSans = append(a.DnsSans, slices.Repeat([]string{"a"}, 64)...)
		},
		"too long DNS names": func(a *composerv1.X509SVIDAttributes) {
			a.DnsSans = append(a.DnsSans, slices.Repeat([]string{strings.Repeat("a.", 100) + "a"}, 40)...)
		},
		"the entry's DNS name gone": func(a *composerv1.X509SVIDAttributes) { a.DnsSans = []string{"other.example.org"} },
		"no subject":                func(a *composerv1.X509SVIDAttributes) { a.Subject = nil },
		"a huge subject":            func(a *composerv1.X509SVIDAttributes) { a.Subject.CommonName = strings.Repeat("x", svid.MaxComposed+1) },
		"a subject of many parts":   func(a *composerv1.X509SVIDAttributes) { a.Subject.Organization = make([]string, svid.MaxComposed) },
		"a subject with an OID that is no": func(a *composerv1.X509SVIDAttributes) {
			a.Subject.ExtraNames = []*composerv1.AttributeTypeAndValue{{Oid: "x"}}
		},
		"a subject that is not UTF-8": func(a *composerv1.X509SVIDAttributes) { a.Subject.CommonName = "\xff" },
	} {
		t.Run(name, func(t *testing.T) {
			r := request()
			c := Chain{{"bad", fake{x509: func(a *composerv1.X509SVIDAttributes) error { bend(a); return nil }}}}
			err := c.X509(t.Context(), r)
			if e, ok := errors.AsType[*Error](err); !ok || !e.Refused || e.Composer != "bad" {
				t.Errorf("%v", err)
			}
			if r.Composed != nil || len(r.DNSNames) != 1 {
				t.Error("the request was changed")
			}
		})
	}
	for _, oid := range []string{"2.5.29.31", "2.5.29.32", "1.3.6.1.5.5.7.1.1", "1.3.6.1.4.1.99999.1", "2.25.1.2"} {
		r := request()
		c := Chain{{"good", fake{x509: func(a *composerv1.X509SVIDAttributes) error { extension(oid)(a); return nil }}}}
		if err := c.X509(t.Context(), r); err != nil || len(r.Composed.Extensions) != 1 {
			t.Errorf("%s: %v", oid, err)
		}
	}
	var id asn1.ObjectIdentifier = []int{1, 2, 3, 4}
	critical := svid.Composed{Extensions: []pkix.Extension{{Id: id, Critical: true}}}
	if err := critical.Check(); !errors.Is(err, svid.ErrRequest) {
		t.Errorf("svid took it: %v", err)
	}
}

// A failing composer is never left out: not even one of several.
func TestRefusesWithoutAnAnswer(t *testing.T) {
	down := fake{x509: func(*composerv1.X509SVIDAttributes) error { return status.Error(codes.Unavailable, "down") }}
	fine := fake{x509: func(*composerv1.X509SVIDAttributes) error { return nil }}
	for _, c := range []Chain{{{"down", down}, {"fine", fine}}, {{"fine", fine}, {"down", down}}} {
		err := c.X509(t.Context(), request())
		if e, ok := errors.AsType[*Error](err); !ok || e.Refused || e.Composer != "down" || status.Code(e.Err) != codes.Unavailable {
			t.Errorf("%v", err)
		}
	}
	synctest.Test(t, func(t *testing.T) { // one that hangs
		start := time.Now()
		err := Chain{{"slow", fake{}}}.JWT(t.Context(), token(), start, start.Add(time.Minute))
		if e, ok := errors.AsType[*Error](err); !ok || e.Refused || time.Since(start) != timeout {
			t.Errorf("%v after %s", err, time.Since(start))
		}
	})
}

func token() *svid.JWTRequest {
	return &svid.JWTRequest{ID: spiffeid.RequireFromString(id), Audience: []string{"bank"}}
}

func TestComposersAddClaims(t *testing.T) {
	begin := time.Unix(1<<31, 0)
	add := func(k string, v any) fake {
		return fake{jwt: func(s *structpb.Struct) error {
			value, err := structpb.NewValue(v)
			s.Fields[k] = value
			return err
		}}
	}
	r := token()
	c := Chain{{"a", add("groups", []any{"x", "y"})}, {"b", add("tenant", map[string]any{"n": 1})}}
	if err := c.JWT(t.Context(), r, begin, begin.Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	if want := []string{"groups", "tenant"}; !slices.Equal(slices.Sorted(maps.Keys(r.Extra)), want) {
		t.Errorf("%v", r.Extra)
	}
	for name, f := range map[string]fake{
		"another subject":   add("sub", "spiffe://example.org/root"),
		"another audience":  add("aud", []any{"bank", "other"}),
		"audience as text":  add("aud", "bank"),
		"a longer life":     add("exp", float64(begin.Add(time.Hour).Unix())),
		"another beginning": add("iat", 1),
		"an issuer":         add("iss", "https://example.org"),
		"not before":        add("nbf", 1),
		"an identifier":     add("jti", "x"),
		"a key":             add("cnf", map[string]any{}),
		"a subject, almost": add("Sub", "spiffe://example.org/root"),
		"no name":           add("", 1),
		"more than a token": add("x", strings.Repeat("x", svid.MaxComposed)),
		"names that collide": {jwt: func(s *structpb.Struct) error {
			s.Fields["a"], s.Fields["A"] = structpb.NewBoolValue(true), structpb.NewBoolValue(false)
			return nil
		}},
		"no claims at all": {jwt: func(s *structpb.Struct) error { clear(s.Fields); return nil }},
		"no time":          {jwt: func(s *structpb.Struct) error { delete(s.Fields, "exp"); return nil }},
	} {
		r := token()
		err := Chain{{"bad", f}}.JWT(t.Context(), r, begin, begin.Add(time.Minute))
		if e, ok := errors.AsType[*Error](err); !ok || !e.Refused || r.Extra != nil {
			t.Errorf("%s: %v, %v", name, err, r.Extra)
		}
	}
}
