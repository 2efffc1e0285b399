package server

import (
	"context"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-plugin-sdk/pluginsdk"
	identityproviderv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/hostservice/server/identityprovider/v1"
	composerv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/server/credentialcomposer/v1"
	notifierv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/server/notifier/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/rootlink/rootlink/internal/catalog"
	"github.com/rootlink/rootlink/internal/forge"
)

// composer does what the file of its command line says at each call. It knows
// nothing of the server's own SVID.
type composer struct {
	composerv1.UnimplementedCredentialComposerServer
}

func (composer) attributes(a *composerv1.X509SVIDAttributes) (*composerv1.X509SVIDAttributes, error) {
	what, err := os.ReadFile(os.Args[2])
	if err != nil {
		return nil, err
	}
	switch string(what) {
	case "add":
		a.DnsSans = append(a.DnsSans, "added.example.org")
		a.Subject.Organization = []string{"Added"}
		a.ExtraExtensions = append(a.ExtraExtensions, &composerv1.X509Extension{Oid: "1.3.6.1.4.1.99999.1", Value: []byte{5, 0}})
	case "usage":
		a.ExtraExtensions = append(a.ExtraExtensions, &composerv1.X509Extension{Oid: "2.5.29.37", Value: []byte{0x30, 0}})
	case "fail":
		return nil, status.Error(codes.Internal, "what only the log should say")
	case "exit":
		os.Exit(1)
	}
	return a, nil
}

func (c composer) ComposeWorkloadX509SVID(_ context.Context, r *composerv1.ComposeWorkloadX509SVIDRequest) (*composerv1.ComposeWorkloadX509SVIDResponse, error) {
	a, err := c.attributes(r.Attributes)
	return &composerv1.ComposeWorkloadX509SVIDResponse{Attributes: a}, err
}

func (c composer) ComposeAgentX509SVID(_ context.Context, r *composerv1.ComposeAgentX509SVIDRequest) (*composerv1.ComposeAgentX509SVIDResponse, error) {
	a, err := c.attributes(r.Attributes)
	return &composerv1.ComposeAgentX509SVIDResponse{Attributes: a}, err
}

func (c composer) ComposeWorkloadJWTSVID(_ context.Context, r *composerv1.ComposeWorkloadJWTSVIDRequest) (*composerv1.ComposeWorkloadJWTSVIDResponse, error) {
	if _, err := c.attributes(&composerv1.X509SVIDAttributes{Subject: new(composerv1.DistinguishedName)}); err != nil {
		return nil, err
	}
	r.Attributes.Claims.Fields["tenant"] = structpb.NewStringValue("t1")
	return &composerv1.ComposeWorkloadJWTSVIDResponse{Attributes: r.Attributes}, nil
}

func withComposer(t *testing.T) (do func(string), bend func(*Config)) {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "do")
	do = func(what string) {
		if err := os.WriteFile(file, []byte(what), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	do("nothing")
	return do, func(c *Config) {
		c.Plugins = []catalog.Config{{Type: composerType, Name: "extra", Cmd: exe, Args: []string{"compose", file}}}
	}
}

func TestComposersAddToSVIDs(t *testing.T) {
	do, bend := withComposer(t)
	w := newWorld(t, bend)
	do("add")
	n := w.attest(w.newTPM(), attestOptions{})
	added := []string{"added.example.org"}
	if c := n.cert; !slices.Equal(c.DNSNames, added) || c.URIs[0].String() != n.id {
		t.Errorf("agent SVID: %q, %v", c.DNSNames, c.URIs)
	}
	id := w.create(entry(n.id, "/web", "unix:uid:1"))
	c, err := n.sign(id, newCSR(t, forge.P256(t), nil))
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(c.DNSNames, added) || c.Subject.String() != "O=Added" || len(c.URIs) != 1 || c.URIs[0].String() != "spiffe://"+td+"/web" {
		t.Errorf("%q, %v, %v", c.DNSNames, c.Subject, c.URIs)
	}
	token, err := n.jwt(id, "bank")
	if err != nil {
		t.Fatal(err)
	}
	if _, ok := w.checkJWT(bundleOf(t, w.admin), token.Token); !ok {
		t.Error("the token is not verified by the bundle")
	}
	b, err := base64.RawURLEncoding.DecodeString(strings.Split(token.Token, ".")[1])
	var claims map[string]any
	if err == nil {
		err = json.Unmarshal(b, &claims)
	}
	if err != nil || claims["tenant"] != "t1" || claims["sub"] != "spiffe://"+td+"/web" {
		t.Errorf("%v, %v", claims, err)
	}
	// What carries evidence about its key is as if there were no composer, even
	// one that would have it refused.
	do("usage")
	q := n.workload("/build", "unix:uid:2")
	c, err = n.sign(w.create(entry(n.id, "/build", "unix:uid:2")), n.csr(q))
	if err != nil || len(c.DNSNames) != 0 || c.Subject.String() != "" {
		t.Errorf("with leaf evidence: %v, %v", c, err)
	}
}

func TestRefusesSVIDsForAComposersSake(t *testing.T) {
	do, bend := withComposer(t)
	w := newWorld(t, bend)
	n := w.attest(w.newTPM(), attestOptions{})
	id := w.create(entry(n.id, "/web", "unix:uid:1"))
	for what, want := range map[string]codes.Code{"usage": codes.Internal, "fail": codes.Unavailable} {
		do(what)
		n.refused("composer", id, newCSR(t, forge.P256(t), nil))
		_, err := n.sign(id, newCSR(t, forge.P256(t), nil))
		if status.Code(err) != want || strings.Contains(err.Error(), "only the log") {
			t.Errorf("%s: %v", what, err)
		}
		uris, err := spiffeURL("spiffe://" + td + "/minted")
		if err != nil {
			t.Fatal(err)
		}
		csr := newCSR(t, forge.P256(t), &x509.CertificateRequest{URIs: uris})
		if _, err := svidv1.NewSVIDClient(w.admin).MintX509SVID(t.Context(), &svidv1.MintX509SVIDRequest{Csr: csr}); status.Code(err) != want {
			t.Errorf("%s: minted: %v", what, err)
		}
		if _, err := w.tryAttest(w.newTPM(), attestOptions{}); err == nil {
			t.Errorf("%s: an agent attested", what)
		}
	}
	do("fail")
	if _, err := n.jwt(id, "bank"); status.Code(err) != codes.Unavailable {
		t.Errorf("a token: %v", err)
	}
	if c := w.srv.count.all(); c["composer_refused/extra"] < 3 || c["composer_failed/extra"] < 3 {
		t.Errorf("%v", c)
	}
	// One that dies is started again; until then nothing is signed without it.
	do("exit")
	if _, err := n.sign(id, newCSR(t, forge.P256(t), nil)); status.Code(err) != codes.Unavailable {
		t.Errorf("while it dies: %v", err)
	}
	do("add")
	for {
		c, err := n.sign(id, newCSR(t, forge.P256(t), nil))
		if err == nil {
			if len(c.DNSNames) != 1 {
				t.Error("signed without the composer")
			}
			break
		}
		if status.Code(err) != codes.Unavailable {
			t.Fatal(err)
		}
		select {
		case <-t.Context().Done():
			t.Fatal("never came back")
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// notifier writes what it is told to the file of its command line, or objects.
type notifier struct {
	notifierv1.UnimplementedNotifierServer
	identity identityproviderv1.IdentityProviderServiceClient
}

func (n *notifier) BrokerHostServices(b pluginsdk.ServiceBroker) error {
	if !b.BrokerClient(&n.identity) {
		return status.Error(codes.FailedPrecondition, "no identity provider")
	}
	return nil
}

func (n *notifier) told(ctx context.Context, what string) error {
	// What notifiers do with it: fetch the identity and the bundle, and push.
	r, err := n.identity.FetchX509Identity(ctx, new(identityproviderv1.FetchX509IdentityRequest))
	if err != nil {
		return err
	}
	if len(r.Bundle.X509Authorities) == 0 || len(r.Identity.CertChain) == 0 {
		return status.Error(codes.Internal, "no identity")
	}
	f, err := os.OpenFile(os.Args[2], os.O_APPEND|os.O_WRONLY|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = f.WriteString(what + " ")
	return err
}

func (n *notifier) NotifyAndAdvise(ctx context.Context, r *notifierv1.NotifyAndAdviseRequest) (*notifierv1.NotifyAndAdviseResponse, error) {
	if strings.HasSuffix(os.Args[2], "objects") {
		return nil, status.Error(codes.FailedPrecondition, "not while I am here")
	}
	if len(r.GetBundleLoaded().GetBundle().GetX509Authorities()) == 0 {
		return nil, status.Error(codes.InvalidArgument, "no bundle")
	}
	return new(notifierv1.NotifyAndAdviseResponse), n.told(ctx, "loaded")
}

func (n *notifier) Notify(ctx context.Context, r *notifierv1.NotifyRequest) (*notifierv1.NotifyResponse, error) {
	if len(r.GetBundleUpdated().GetBundle().GetX509Authorities()) == 0 {
		return nil, status.Error(codes.InvalidArgument, "no bundle")
	}
	return new(notifierv1.NotifyResponse), n.told(ctx, "updated")
}

func withNotifier(t *testing.T, name string) (file string, bend func(*Config)) {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	file = filepath.Join(t.TempDir(), name)
	return file, func(c *Config) {
		c.Plugins = []catalog.Config{{Type: notifierType, Name: "herald", Cmd: exe, Args: []string{"notify", file}}}
	}
}

func TestNotifiersAreToldOfTheBundle(t *testing.T) {
	file, bend := withNotifier(t, "told")
	w := newWorld(t, bend)
	if b, err := os.ReadFile(file); err != nil || string(b) != "loaded " {
		t.Fatalf("before the server serves: %q, %v", b, err)
	}
	if _, err := w.srv.authorities.rotate(t.Context()); err != nil {
		t.Fatal(err)
	}
	for {
		if b, err := os.ReadFile(file); err == nil && string(b) == "loaded updated " {
			break
		}
		select {
		case <-t.Context().Done():
			t.Fatal("never told")
		case <-time.After(20 * time.Millisecond):
		}
	}
}

func TestRefusesToStartAgainstANotifiersAdvice(t *testing.T) {
	w := newWorld(t, nil)
	w.stop()
	_, bend := withNotifier(t, "objects")
	cfg := w.cfg
	bend(&cfg)
	if s, err := New(t.Context(), cfg); err == nil {
		s.Close()
		t.Error("started")
	} else if !strings.Contains(err.Error(), "herald") {
		t.Error(err)
	}
	cfg.Plugins = nil
	w.cfg = cfg
	w.start() // and everything was released
	w.stop()
}
