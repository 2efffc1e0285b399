package server

import (
	"crypto/tls"
	"encoding/hex"
	"log/slog"
	"os"
	"testing"
	"time"

	debugv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/debug/v1"
	localauthorityv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/localauthority/v1"
	loggerv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/logger/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	"github.com/rootlink/rootlink/internal/forge"
	"github.com/rootlink/rootlink/pkg/svid"
)

// An authority is published, signs, is replaced, is distrusted and goes; and
// whatever it signed goes with it.
func TestX509AuthorityToItsEnd(t *testing.T) {
	w := newWorld(t, nil)
	c := localauthorityv1.NewLocalAuthorityClient(w.admin)
	ctx := t.Context()
	state := func() *localauthorityv1.GetX509AuthorityStateResponse {
		t.Helper()
		s, err := c.GetX509AuthorityState(ctx, new(localauthorityv1.GetX509AuthorityStateRequest))
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	taint := func(id string) error {
		_, err := c.TaintX509Authority(ctx, &localauthorityv1.TaintX509AuthorityRequest{AuthorityId: id})
		return err
	}
	revoke := func(id string) error {
		_, err := c.RevokeX509Authority(ctx, &localauthorityv1.RevokeX509AuthorityRequest{AuthorityId: id})
		return err
	}
	activate := func(id string) error {
		_, err := c.ActivateX509Authority(ctx, &localauthorityv1.ActivateX509AuthorityRequest{AuthorityId: id})
		return err
	}
	first := state().Active.AuthorityId
	w.create(entry("spiffe://"+td+"/host", "/web", "unix:uid:1"))
	old := w.mint("/web")
	for name, err := range map[string]error{
		"taint the active one": taint(first), "revoke the active one": revoke(first), "activate the active one": activate(first),
		"taint none": taint(""), "revoke what is not there": revoke("00"), "activate what is not there": activate("00"),
	} {
		if status.Code(err) != codes.InvalidArgument {
			t.Errorf("%s: %v", name, err)
		}
	}
	p, err := c.PrepareX509Authority(ctx, new(localauthorityv1.PrepareX509AuthorityRequest))
	if err != nil {
		t.Fatal(err)
	}
	next := p.PreparedAuthority.AuthorityId
	// Twice is once: each stands in trust.json for ever.
	if again, err := c.PrepareX509Authority(ctx, new(localauthorityv1.PrepareX509AuthorityRequest)); err != nil || again.PreparedAuthority.AuthorityId != next {
		t.Fatal(again, err)
	}
	if s := state(); s.Active.AuthorityId != first || s.Prepared.GetAuthorityId() != next || s.Old != nil || s.Active.ExpiresAt == 0 {
		t.Fatal(s)
	}
	if err := taint(next); status.Code(err) != codes.InvalidArgument {
		t.Errorf("a prepared one was tainted: %v", err)
	}
	if err := activate(next); err != nil {
		t.Fatal(err)
	}
	if s := state(); s.Active.AuthorityId != next || s.Prepared != nil || s.Old.GetAuthorityId() != first {
		t.Fatal(s)
	}
	if err := revoke(first); status.Code(err) != codes.InvalidArgument {
		t.Fatalf("revoked before anybody could have something newer: %v", err)
	}
	if err := taint(first); err != nil {
		t.Fatal(err)
	}
	b := bundleOf(t, w.admin)
	if len(b.X509Authorities) != 2 || !b.X509Authorities[0].Tainted || b.X509Authorities[1].Tainted {
		t.Fatal("which of the two is tainted?")
	}
	// The server's own SVID has moved on, and the key is gone.
	if own := w.srv.authorities.own.Load(); svid.AuthorityID(w.srv.authorities.set.Load().signer.Authority()) != next || !hasKeyID(own, next) {
		t.Error("the server still shows an SVID under what is tainted")
	}
	rows, err := w.srv.store.Authorities()
	if err != nil {
		t.Fatal(err)
	}
	for _, row := range rows {
		if _, err := os.Stat(w.srv.dir.file(row.KeyFile)); (err == nil) != (row.ID == next) {
			t.Errorf("key of %s: %v", row.ID, err)
		}
	}
	if err := revoke(first); err != nil {
		t.Fatal(err)
	}
	if b := bundleOf(t, w.admin); len(b.X509Authorities) != 1 {
		t.Fatal("it is still in the bundle")
	}
	if s := state(); s.Old != nil {
		t.Fatal(s)
	}
	// An SVID that it signed opens nothing.
	if _, err := svidv1.NewSVIDClient(w.dialTCP(old)).MintX509SVID(ctx, new(svidv1.MintX509SVIDRequest)); status.Code(err) != codes.Unavailable {
		t.Errorf("an SVID of a revoked authority: %v", err)
	}
	if _, err := svidv1.NewSVIDClient(w.dialTCP(w.mint("/web"))).MintX509SVID(ctx, new(svidv1.MintX509SVIDRequest)); status.Code(err) != codes.PermissionDenied {
		t.Errorf("an SVID of the new one: %v", err)
	}
	// All of it is known after a start.
	list, err := w.srv.Authorities()
	if err != nil || list[0].RevokedAt.IsZero() || list[0].TaintedAt.IsZero() {
		t.Fatal(list, err)
	}
}

func hasKeyID(c *tls.Certificate, id string) bool {
	return hex.EncodeToString(c.Leaf.AuthorityKeyId) == id
}

func TestJWTAuthorityToItsEnd(t *testing.T) {
	w := newWorld(t, nil)
	c := localauthorityv1.NewLocalAuthorityClient(w.admin)
	ctx := t.Context()
	mint := func() string {
		t.Helper()
		r, err := svidv1.NewSVIDClient(w.admin).MintJWTSVID(ctx, &svidv1.MintJWTSVIDRequest{Id: idToProto("spiffe://" + td + "/web"), Audience: []string{"a"}})
		if err != nil {
			t.Fatal(err)
		}
		return r.Svid.Token
	}
	old := mint()
	s, err := c.GetJWTAuthorityState(ctx, new(localauthorityv1.GetJWTAuthorityStateRequest))
	if err != nil {
		t.Fatal(err)
	}
	first := s.Active.AuthorityId
	p, err := c.PrepareJWTAuthority(ctx, new(localauthorityv1.PrepareJWTAuthorityRequest))
	if err != nil {
		t.Fatal(err)
	}
	next := p.PreparedAuthority.AuthorityId
	if again, err := c.PrepareJWTAuthority(ctx, new(localauthorityv1.PrepareJWTAuthorityRequest)); err != nil || again.PreparedAuthority.AuthorityId != next {
		t.Fatal(again, err)
	}
	for _, id := range []string{"", "absent", first, next} {
		if _, err := c.TaintJWTAuthority(ctx, &localauthorityv1.TaintJWTAuthorityRequest{AuthorityId: id}); status.Code(err) != codes.InvalidArgument {
			t.Errorf("taint %q: %v", id, err)
		}
		if _, err := c.RevokeJWTAuthority(ctx, &localauthorityv1.RevokeJWTAuthorityRequest{AuthorityId: id}); status.Code(err) != codes.InvalidArgument {
			t.Errorf("revoke %q: %v", id, err)
		}
	}
	if _, err := c.ActivateJWTAuthority(ctx, &localauthorityv1.ActivateJWTAuthorityRequest{AuthorityId: first}); status.Code(err) != codes.InvalidArgument {
		t.Error(err)
	}
	if a, err := c.ActivateJWTAuthority(ctx, &localauthorityv1.ActivateJWTAuthorityRequest{AuthorityId: next}); err != nil || a.ActivatedAuthority.AuthorityId != next {
		t.Fatal(a, err)
	}
	if _, ok := w.checkJWT(bundleOf(t, w.admin), old); !ok {
		t.Fatal("what the old key signed ended with its turn")
	}
	if _, err := c.RevokeJWTAuthority(ctx, &localauthorityv1.RevokeJWTAuthorityRequest{AuthorityId: first}); status.Code(err) != codes.InvalidArgument {
		t.Error("revoked, not tainted:", err)
	}
	if _, err := c.TaintJWTAuthority(ctx, &localauthorityv1.TaintJWTAuthorityRequest{AuthorityId: first}); err != nil {
		t.Fatal(err)
	}
	for _, k := range bundleOf(t, w.admin).JwtAuthorities {
		if k.Tainted != (k.KeyId == first) {
			t.Errorf("%s: tainted %t", k.KeyId, k.Tainted)
		}
	}
	if _, err := c.RevokeJWTAuthority(ctx, &localauthorityv1.RevokeJWTAuthorityRequest{AuthorityId: first}); err != nil {
		t.Fatal(err)
	}
	b := bundleOf(t, w.admin)
	if _, ok := w.checkJWT(b, old); ok || len(b.JwtAuthorities) != 1 {
		t.Fatal("it still verifies")
	}
	if _, ok := w.checkJWT(b, mint()); !ok {
		t.Fatal("the new one does not")
	}
}

func TestNoUpstreamAuthority(t *testing.T) {
	w := newWorld(t, nil)
	c := localauthorityv1.NewLocalAuthorityClient(w.admin)
	if _, err := c.TaintX509UpstreamAuthority(t.Context(), &localauthorityv1.TaintX509UpstreamAuthorityRequest{SubjectKeyId: "ab"}); status.Code(err) != codes.FailedPrecondition {
		t.Error(err)
	}
	if _, err := c.RevokeX509UpstreamAuthority(t.Context(), &localauthorityv1.RevokeX509UpstreamAuthorityRequest{SubjectKeyId: "ab"}); status.Code(err) != codes.FailedPrecondition {
		t.Error(err)
	}
}

func TestLogLevel(t *testing.T) {
	level := new(slog.LevelVar)
	level.Set(slog.LevelWarn)
	w := newWorld(t, func(c *Config) { c.LogLevel = level })
	c := loggerv1.NewLoggerClient(w.admin)
	want := func(l *types.Logger, err error, now types.LogLevel) {
		t.Helper()
		if err != nil || l.CurrentLevel != now || l.LaunchLevel != types.LogLevel_WARN {
			t.Fatal(l, err)
		}
	}
	l, err := c.GetLogger(t.Context(), new(loggerv1.GetLoggerRequest))
	want(l, err, types.LogLevel_WARN)
	for v := range types.LogLevel_name {
		if v == int32(types.LogLevel_UNSPECIFIED) {
			continue
		}
		l, err := c.SetLogLevel(t.Context(), &loggerv1.SetLogLevelRequest{NewLevel: types.LogLevel(v)})
		want(l, err, types.LogLevel(v))
	}
	for _, v := range []types.LogLevel{types.LogLevel_UNSPECIFIED, 99, -1} {
		if _, err := c.SetLogLevel(t.Context(), &loggerv1.SetLogLevelRequest{NewLevel: v}); status.Code(err) != codes.InvalidArgument {
			t.Error(v, err)
		}
	}
	l, err = c.ResetLogLevel(t.Context(), new(loggerv1.ResetLogLevelRequest))
	want(l, err, types.LogLevel_WARN)
	if level.Level() != slog.LevelWarn {
		t.Error(level.Level())
	}
	fixed := newWorld(t, nil)
	if _, err := loggerv1.NewLoggerClient(fixed.admin).SetLogLevel(t.Context(), &loggerv1.SetLogLevelRequest{NewLevel: types.LogLevel_INFO}); status.Code(err) != codes.FailedPrecondition {
		t.Error(err)
	}
}

func TestDebugInfo(t *testing.T) {
	w := newWorld(t, nil)
	n := w.attest(w.newTPM(), attestOptions{})
	w.create(entry(n.id, "/web", "binary:uid:33"))
	w.setBundle(&types.Bundle{TrustDomain: "other.org", X509Authorities: []*types.X509Certificate{foreignCA(t, forge.P256(t), nil)}})
	w.clock.add(90 * time.Second)
	got, err := debugv1.NewDebugClient(w.admin).GetInfo(t.Context(), new(debugv1.GetInfoRequest))
	if err != nil || got.AgentsCount != 1 || got.EntriesCount != 1 || got.FederatedBundlesCount != 1 || got.Uptime != 90 ||
		len(got.SvidChain) != 2 || got.SvidChain[0].Id.Path != "/spire/server" {
		t.Fatal(got, err)
	}
}

func TestHealthIsWatched(t *testing.T) {
	w := newWorld(t, nil)
	c := grpc_health_v1.NewHealthClient(w.admin)
	list, err := c.List(t.Context(), new(grpc_health_v1.HealthListRequest))
	if err != nil || list.Statuses[""].Status != grpc_health_v1.HealthCheckResponse_SERVING {
		t.Fatal(list, err)
	}
	for service, want := range map[string]grpc_health_v1.HealthCheckResponse_ServingStatus{
		"": grpc_health_v1.HealthCheckResponse_SERVING, "other": grpc_health_v1.HealthCheckResponse_SERVICE_UNKNOWN,
	} {
		s, err := c.Watch(t.Context(), &grpc_health_v1.HealthCheckRequest{Service: service})
		if err != nil {
			t.Fatal(err)
		}
		got, err := s.Recv()
		if err != nil || got.Status != want {
			t.Fatal(got, err)
		}
	}
}
