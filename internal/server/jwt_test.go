package server

import (
	"crypto/x509"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/rootlink/rootlink/pkg/svid"
)

func (n *node) jwt(entryID string, audience ...string) (*types.JWTSVID, error) {
	resp, err := svidv1.NewSVIDClient(n.conn).NewJWTSVID(n.w.t.Context(), &svidv1.NewJWTSVIDRequest{EntryId: entryID, Audience: audience})
	return resp.GetSvid(), err
}

// checkJWT verifies a token with a bundle as it was at some time.
func (w *world) checkJWT(b *types.Bundle, token string) (*svid.UnverifiedJWT, bool) {
	w.t.Helper()
	u, err := svid.ParseJWT(token)
	if err != nil {
		w.t.Fatal(err)
	}
	signed, err := jwt.ParseSigned(token, []jose.SignatureAlgorithm{jose.ES256})
	if err != nil {
		w.t.Fatal(err)
	}
	for _, k := range b.JwtAuthorities {
		if k.KeyId != u.KeyID {
			continue
		}
		key, err := x509.ParsePKIXPublicKey(k.PublicKey)
		if err != nil {
			w.t.Fatal(err)
		}
		if !u.Expiry.After(time.Unix(k.ExpiresAt, 0)) && signed.Claims(key, new(jwt.Claims)) == nil {
			return u, true
		}
	}
	return u, false
}

func TestNewJWTSVID(t *testing.T) {
	w := newWorld(t, nil)
	n := w.attest(w.newTPM(), attestOptions{})
	e := entry(n.id, "/web", "binary:uid:33")
	e.Hint = "inside"
	plain := w.create(e)
	got, err := n.jwt(plain, "reports", "billing")
	if err != nil {
		t.Fatal(err)
	}
	u, ok := w.checkJWT(bundleOf(t, w.admin), got.Token)
	if !ok || u.ID.String() != "spiffe://example.org/web" || !slices.Equal(u.Audience, []string{"reports", "billing"}) {
		t.Fatal(u, ok)
	}
	if got.IssuedAt != u.IssuedAt.Unix() || got.ExpiresAt != u.Expiry.Unix() || got.Id.Path != "/web" || got.Hint != "inside" {
		t.Fatal(got)
	}
	if d := u.Expiry.Sub(u.IssuedAt); d != svid.DefaultJWTTTL {
		t.Errorf("a life of %v", d)
	}
	// The entry's own TTL, and its own end.
	for _, c := range []struct {
		ttl  int32
		ends time.Duration
		want time.Duration
	}{{60, 0, time.Minute}, {0, 2 * time.Minute, 2 * time.Minute}, {7 * 24 * 3600, 0, svid.MaxJWTTTL}} {
		e := entry(n.id, "/web", "binary:uid:"+c.want.String())
		e.JwtSvidTtl = c.ttl
		if c.ends != 0 {
			e.ExpiresAt = w.clock.Now().Add(c.ends).Unix()
		}
		got, err := n.jwt(w.create(e), "a")
		if err != nil {
			t.Fatal(err)
		}
		if d := time.Duration(got.ExpiresAt-got.IssuedAt) * time.Second; d != c.want {
			t.Errorf("a life of %v, want %v", d, c.want)
		}
	}
}

func TestRefusesJWTOfAnEntryThatIsNotTheAgents(t *testing.T) {
	w := newWorld(t, nil)
	n, other := w.attest(w.newTPM(), attestOptions{}), w.attest(w.newTPM(), attestOptions{})
	gone := entry(n.id, "/gone", "binary:uid:1")
	gone.ExpiresAt = w.clock.Now().Add(time.Minute).Unix()
	ids := map[string]string{
		"another agent's": w.create(entry(other.id, "/web", "binary:uid:33")),
		"an expired one":  w.create(gone),
		"nobody's":        "no-such-entry",
		"empty":           "",
	}
	w.clock.add(2 * time.Minute)
	for name, id := range ids {
		if _, err := n.jwt(id, "a"); status.Code(err) != codes.NotFound {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// A step's identity rests on evidence, which a token cannot carry.
func TestRefusesJWTForARecordedStep(t *testing.T) {
	w := newWorld(t, nil)
	n := w.attest(w.newTPM(), attestOptions{})
	id := w.create(entry(n.id, "/build", stepSelectorsOf("go")...))
	if _, err := n.jwt(id, "a"); status.Code(err) != codes.PermissionDenied || !strings.Contains(err.Error(), "jwt_for_step") {
		t.Fatal(err)
	}
}

func TestRefusesJWTWithoutAudience(t *testing.T) {
	w := newWorld(t, nil)
	n := w.attest(w.newTPM(), attestOptions{})
	id := w.create(entry(n.id, "/web", "binary:uid:33"))
	for name, audience := range map[string][]string{
		"none": nil, "empty": {""}, "one empty": {"a", ""}, "long": {strings.Repeat("a", svid.MaxAudience+1)},
		"many": slices.Repeat([]string{"a"}, svid.MaxAudiences+1),
	} {
		if _, err := n.jwt(id, audience...); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%s: %v", name, err)
		}
		_, err := svidv1.NewSVIDClient(w.admin).MintJWTSVID(t.Context(), &svidv1.MintJWTSVIDRequest{Id: idToProto("spiffe://example.org/web"), Audience: audience})
		if status.Code(err) != codes.InvalidArgument {
			t.Errorf("mint, %s: %v", name, err)
		}
	}
}

func TestRefusesJWTForABannedAgent(t *testing.T) {
	w := newWorld(t, nil)
	n := w.attest(w.newTPM(), attestOptions{})
	id := w.create(entry(n.id, "/web", "binary:uid:33"))
	if _, err := n.jwt(id, "a"); err != nil {
		t.Fatal(err)
	}
	if _, err := w.agents().BanAgent(t.Context(), &agentv1.BanAgentRequest{Id: idToProto(n.id)}); err != nil {
		t.Fatal(err)
	}
	if _, err := n.jwt(id, "a"); reasonOf(err) != types.PermissionDeniedDetails_AGENT_BANNED {
		t.Fatal(err)
	}
	// Nobody else has a way in: not without a certificate, not as a workload,
	// not as the administrator.
	for name, conn := range map[string]svidv1.SVIDClient{
		"nobody": svidv1.NewSVIDClient(w.dialTCP(nil)), "workload": svidv1.NewSVIDClient(w.dialTCP(w.mint("/web"))), "admin": svidv1.NewSVIDClient(w.admin),
	} {
		if _, err := conn.NewJWTSVID(t.Context(), &svidv1.NewJWTSVIDRequest{EntryId: id, Audience: []string{"a"}}); status.Code(err) != codes.PermissionDenied {
			t.Errorf("%s: %v", name, err)
		}
		if name == "admin" {
			continue
		}
		if _, err := conn.MintJWTSVID(t.Context(), &svidv1.MintJWTSVIDRequest{Id: idToProto("spiffe://example.org/web"), Audience: []string{"a"}}); status.Code(err) != codes.PermissionDenied {
			t.Errorf("%s mints: %v", name, err)
		}
	}
}

func TestMintJWTSVID(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.JWTTTL = time.Minute })
	mint := func(id string, ttl int32) (*types.JWTSVID, error) {
		resp, err := svidv1.NewSVIDClient(w.admin).MintJWTSVID(t.Context(), &svidv1.MintJWTSVIDRequest{Id: idToProto(id), Audience: []string{"a"}, Ttl: ttl})
		return resp.GetSvid(), err
	}
	for ttl, want := range map[int32]int64{0: 60, 10: 10, 1 << 30: int64(svid.MaxJWTTTL / time.Second)} {
		got, err := mint("spiffe://example.org/web", ttl)
		if err != nil || got.ExpiresAt-got.IssuedAt != want {
			t.Fatal(got, err)
		}
		if _, ok := w.checkJWT(bundleOf(t, w.admin), got.Token); !ok {
			t.Fatal("not verified by the bundle")
		}
	}
	for _, id := range []string{"spiffe://example.com/web", "spiffe://example.org", "spiffe://example.org/spire/server", "spiffe://example.org/spire/agent/tpmnode/00"} {
		if _, err := mint(id, 0); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%s: %v", id, err)
		}
	}
	if _, err := mint("spiffe://example.org/web", -1); status.Code(err) != codes.InvalidArgument {
		t.Error(err)
	}
}

// JWT-SVID §6.1: the bundle has each signing key with its name.
func TestJWTSVIDSection61BundleHasTheKeys(t *testing.T) {
	w := newWorld(t, nil)
	b := bundleOf(t, w.dialTCP(nil))
	if len(b.JwtAuthorities) != 1 || b.JwtAuthorities[0].KeyId == "" || b.JwtAuthorities[0].ExpiresAt == 0 {
		t.Fatal(b.JwtAuthorities)
	}
	if _, err := x509.ParsePKIXPublicKey(b.JwtAuthorities[0].PublicKey); err != nil {
		t.Fatal(err)
	}
	masked, err := bundlev1.NewBundleClient(w.admin).GetBundle(t.Context(), &bundlev1.GetBundleRequest{OutputMask: &types.BundleMask{X509Authorities: true}})
	if err != nil || len(masked.JwtAuthorities) != 0 {
		t.Fatal(masked, err)
	}
	if _, err := bundlev1.NewBundleClient(w.dialTCP(w.mint("/web"))).PublishJWTAuthority(t.Context(), new(bundlev1.PublishJWTAuthorityRequest)); status.Code(err) != codes.PermissionDenied {
		t.Error("a workload may publish a key:", err)
	}
	if _, err := bundlev1.NewBundleClient(w.admin).PublishJWTAuthority(t.Context(), new(bundlev1.PublishJWTAuthorityRequest)); status.Code(err) != codes.Unimplemented || status.Convert(err).Message() == "" {
		t.Error(err)
	}
}

// Over three lives: who fetched the bundle a day ago verifies what is signed
// now, who fetches it now verifies what is still alive, and then it goes.
func TestJWTAuthoritiesRotate(t *testing.T) {
	w := newWorld(t, nil)
	dir := w.cfg.DataDir
	maintain := func() {
		t.Helper()
		if _, err := w.srv.jwt.maintain(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	kids := map[string]bool{}
	type alive struct {
		token string
		end   time.Time
	}
	var tokens []alive
	before := bundleOf(t, w.admin)
	for range 3 * 30 {
		w.clock.add(24 * time.Hour)
		maintain()
		got, err := svidv1.NewSVIDClient(w.admin).MintJWTSVID(t.Context(), &svidv1.MintJWTSVIDRequest{Id: idToProto("spiffe://example.org/web"), Audience: []string{"a"}, Ttl: 24 * 3600})
		if err != nil {
			t.Fatal(err)
		}
		u, ok := w.checkJWT(before, got.Svid.Token)
		if !ok {
			t.Fatal("signed by an authority that peers could not know")
		}
		kids[u.KeyID] = true
		tokens = append(tokens, alive{got.Svid.Token, u.Expiry})
		now := bundleOf(t, w.admin)
		if now.SequenceNumber < before.SequenceNumber || len(now.JwtAuthorities) != len(before.JwtAuthorities) && now.SequenceNumber == before.SequenceNumber {
			t.Fatalf("sequence %d after %d", now.SequenceNumber, before.SequenceNumber)
		}
		before = now
		tokens = slices.DeleteFunc(tokens, func(a alive) bool { return !w.clock.Now().Before(a.end) })
		for _, a := range tokens {
			if _, ok := w.checkJWT(now, a.token); !ok {
				t.Fatal("a token that is alive is not verified")
			}
		}
		if len(now.JwtAuthorities) > 2 {
			t.Fatalf("%d authorities", len(now.JwtAuthorities))
		}
		keys, err := filepath.Glob(filepath.Join(dir, "jwt-*.key"))
		if err != nil || len(keys) > 2 {
			t.Fatal(keys, err)
		}
	}
	if len(kids) < 4 {
		t.Fatalf("%d authorities signed in three lives", len(kids))
	}
	// What signs is the same after a restart.
	w.stop()
	w.start()
	got, err := svidv1.NewSVIDClient(w.admin).MintJWTSVID(t.Context(), &svidv1.MintJWTSVIDRequest{Id: idToProto("spiffe://example.org/web"), Audience: []string{"a"}})
	if err != nil {
		t.Fatal(err)
	}
	if _, ok := w.checkJWT(before, got.Svid.Token); !ok {
		t.Fatal("another authority after a restart")
	}
}

// A retired authority signs no more, its key is gone, and once its tokens have
// ended its name means nothing.
func TestRefusesRetiredJWTAuthority(t *testing.T) {
	w := newWorld(t, nil)
	old := w.srv.jwt.set.Load().all[0]
	for {
		w.clock.add(12 * time.Hour)
		if _, err := w.srv.jwt.maintain(t.Context()); err != nil {
			t.Fatal(err)
		}
		if w.srv.jwt.set.Load().signer.KeyID() != old.ID {
			break
		}
	}
	if _, err := w.srv.dir.readKey(old.KeyFile); err == nil {
		t.Error("the key of a retired authority is still there")
	}
	has := func() bool {
		return slices.ContainsFunc(bundleOf(t, w.admin).JwtAuthorities, func(k *types.JWTKey) bool { return k.KeyId == old.ID })
	}
	if !has() {
		t.Error("retired and gone at once: its tokens live")
	}
	w.clock.add(svid.MaxJWTTTL + time.Minute)
	if has() {
		t.Error("served after its last token ended")
	}
	if _, err := w.srv.jwt.maintain(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, a := range w.srv.jwt.set.Load().all {
		if a.ID == old.ID {
			t.Error("kept after its last token ended")
		}
	}
}

// The store names keys, files hold them: one put in another's place is noticed
// before it signs.
func TestRefusesForeignJWTKeyFile(t *testing.T) {
	w := newWorld(t, nil)
	if _, err := w.srv.dir.makeKey("jwt-other.key"); err != nil {
		t.Fatal(err)
	}
	row := w.srv.jwt.set.Load().all[0]
	w.stop()
	if err := os.Rename(filepath.Join(w.cfg.DataDir, "jwt-other.key"), filepath.Join(w.cfg.DataDir, row.KeyFile)); err != nil {
		t.Fatal(err)
	}
	if _, err := New(t.Context(), w.cfg); err == nil || !strings.Contains(err.Error(), row.ID) {
		t.Fatal(err)
	}
}

// A clock that is set back a little does not stop tokens; an authority that has
// ended is no health.
func TestJWTAuthorityAndTheClock(t *testing.T) {
	w := newWorld(t, nil)
	w.clock.add(-30 * time.Second)
	if _, err := svidv1.NewSVIDClient(w.admin).MintJWTSVID(t.Context(), &svidv1.MintJWTSVIDRequest{Id: idToProto("spiffe://example.org/web"), Audience: []string{"a"}}); err != nil {
		t.Error(err)
	}
	if err := w.srv.jwt.healthy(); err != nil {
		t.Error(err)
	}
	w.clock.add(31 * 24 * time.Hour)
	if err := w.srv.jwt.healthy(); err == nil {
		t.Error("healthy with an authority that has ended")
	}
	if _, err := w.srv.jwt.maintain(t.Context()); err != nil || w.srv.jwt.healthy() != nil {
		t.Error("not mended by the next round:", err)
	}
}

func BenchmarkMintJWTSVID(b *testing.B) {
	w := newWorld(b, nil)
	client := svidv1.NewSVIDClient(w.admin)
	b.SetParallelism(4) // times GOMAXPROCS
	b.ResetTimer()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if _, err := client.MintJWTSVID(b.Context(), &svidv1.MintJWTSVIDRequest{Id: idToProto("spiffe://example.org/web"), Audience: []string{"a"}}); err != nil {
				b.Error(err)
				return
			}
		}
	})
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "SVIDs/s")
}
