// Package server issues SVIDs. It speaks SPIRE's Server API and our node
// service on TCP, and the same with full rights on a Unix socket that only its
// own user can open.
package server

import (
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	debugv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/debug/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	localauthorityv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/localauthority/v1"
	loggerv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/logger/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	trustdomainv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/trustdomain/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"

	"github.com/rootlink/rootlink/internal/attestca"
	"github.com/rootlink/rootlink/internal/boundcodec"
	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/internal/join"
	"github.com/rootlink/rootlink/internal/policy"
	"github.com/rootlink/rootlink/internal/server/bundles"
	"github.com/rootlink/rootlink/internal/server/compose"
	"github.com/rootlink/rootlink/internal/server/logger"
	"github.com/rootlink/rootlink/internal/store"
	"github.com/rootlink/rootlink/internal/tsa"
	"github.com/rootlink/rootlink/pkg/attest"
	"github.com/rootlink/rootlink/plugins/tpmnode/nodeserver"
	nodev1 "github.com/rootlink/rootlink/proto/rootlink/node/v1"
)

// stopTimeout is how long Run lets calls in progress finish.
const stopTimeout = 5 * time.Second

// maxStreams bounds the calls that one TCP connection has open at a time.
const maxStreams = 256

// Server is a trust domain's server. Make one with New, then call Run.
type Server struct {
	cfg           *settings
	dir           *dataDir
	store         *store.Store
	authorities   *authorities
	jwt           *jwtAuthorities
	trustKey      *ecdsa.PrivateKey // signs trust.json, and bundles for agents that have only a join line; nil when kept elsewhere
	trustPublic   *ecdsa.PublicKey
	joinLine      join.Line // pins trustKey
	attestationCA *attestca.CA
	nonces        *attest.NonceMaker
	tcp, admin    net.Listener
	http          net.Listener   // nil without an HTTP port
	tsa           *tsa.Authority // nil when none is kept
	// logHandler serves the transparency log; nil without one. Set before Run.
	logHandler http.Handler
	certLog    *certLog // nil without one

	// The built-in node attestor; nil when nothing makes an EK genuine.
	nodeserver *nodeserver.Plugin
	// attestors are the node attestors by attestation type, built in and external.
	attestors  map[string]*attestor
	external   []*external // all plugins that are not built in
	publishers []*publisher
	composers  compose.Chain
	ready      atomic.Bool // host services may answer

	running attestations
	rivals  rivals
	limiter *addressLimiter
	lines   *addressLimiter // of the log, by who causes them

	judge  *policy.Judge
	leaves replayCache
	// signatures spares leaves under one quote the checks that they share.
	signatures *attest.Signatures

	calls openCalls
	count counters
	cache authorizedCache

	started  time.Time     // when New was called
	stopping chan struct{} // closed when Run ends: no stream may keep it

	closing sync.Once
	closed  error
}

// New checks c, locks and opens the data directory, makes or loads keys and
// opens the listeners. Nothing is served before Run.
func New(ctx context.Context, c Config) (_ *Server, err error) {
	s := new(Server)
	if s.cfg, err = c.check(); err != nil {
		return nil, err
	}
	// Whatever was opened before a failure is closed again.
	defer func() {
		if err != nil {
			s.Close()
		}
	}()
	s.started, s.stopping = s.cfg.Now(), make(chan struct{})
	s.attestors = make(map[string]*attestor)
	if err = s.checkAttestor(ctx); err != nil {
		return nil, err
	}
	if err = s.loadExternal(ctx); err != nil {
		return nil, err
	}
	if s.dir, err = openDataDir(s.cfg.DataDir); err != nil {
		return nil, err
	}
	if s.store, err = store.Open(ctx, s.dir.file("server.db"), s.cfg.Now); err != nil {
		return nil, err
	}
	if s.trustPublic = s.cfg.TrustKeyPublic; s.trustPublic == nil {
		if s.trustKey, err = s.openTrustKey(); err != nil {
			return nil, err
		}
		s.trustPublic = &s.trustKey.PublicKey
	}
	if s.joinLine, err = join.NewLine(s.cfg.td, s.trustPublic); err != nil {
		return nil, err
	}
	s.authorities = &authorities{
		td: s.cfg.td, store: s.store, dir: s.dir, lifetime: s.cfg.AuthorityTTL, ttl: s.cfg.X509TTL,
		now: s.cfg.Now, log: s.cfg.Log, compose: s.compose,
	}
	if err = s.openLog(ctx); err != nil {
		return nil, err
	}
	if s.certLog != nil {
		s.authorities.logged = s.certLog.logAuthority
	}
	if err = openAuthorities(ctx, s.authorities); err != nil {
		return nil, err
	}
	s.jwt = &jwtAuthorities{
		td: s.cfg.td, store: s.store, dir: s.dir, lifetime: min(s.cfg.AuthorityTTL, maxJWTAuthorityTTL),
		now: s.cfg.Now, log: s.cfg.Log,
	}
	if err = openJWTAuthorities(ctx, s.jwt); err != nil {
		return nil, err
	}
	if s.attestationCA, err = s.openAttestationCA(); err != nil {
		return nil, err
	}
	if err = s.logAttestationCA(ctx); err != nil {
		return nil, err
	}
	if err = s.openTSA(); err != nil {
		return nil, err
	}
	var key [32]byte
	rand.Read(key[:]) // never fails
	s.nonces = attest.NewNonceMaker(key)
	s.judge = policy.NewJudge()
	s.signatures = attest.NewSignatures()
	s.limiter = newAddressLimiter(s.cfg.AttestationRate, s.cfg.AttestationBurst)
	s.lines = newAddressLimiter(linesPerSecond, linesAtOnce)
	if err = s.loadAttestor(ctx); err != nil {
		return nil, err
	}
	tcp, err := net.Listen("tcp", s.cfg.Listen)
	if err != nil {
		return nil, err
	}
	s.tcp = newConnListener(tcp, s.cfg, &s.count)
	if err = s.listenHTTP(); err != nil {
		return nil, err
	}
	if s.admin, err = listenAdmin(s.cfg.AdminSocket); err != nil {
		return nil, err
	}
	s.ready.Store(true)
	if err = s.advised(ctx); err != nil {
		return nil, err
	}
	return s, nil
}

// openTrustKey loads the key whose public half join lines pin, and makes it in
// a new data directory. In one that is not new a missing key is an error: with
// another key every join line ever given out would be void, in silence.
func (s *Server) openTrustKey() (*ecdsa.PrivateKey, error) {
	const name = "trust.key"
	key, err := s.dir.readKey(name)
	if !errors.Is(err, fs.ErrNotExist) {
		return key, err
	}
	list, err := s.store.Authorities()
	if err != nil {
		return nil, err
	}
	if len(list) > 0 {
		return nil, cli.Hint(fmt.Errorf("trust key %s is missing", s.dir.file(name)),
			"restore it from a backup; or, when it is kept elsewhere on purpose, start with --trust-key-public FILE")
	}
	return s.dir.makeKey(name)
}

func (s *Server) openAttestationCA() (*attestca.CA, error) {
	if s.cfg.AttestationCACert != "" {
		return attestca.Load(s.cfg.AttestationCACert, s.cfg.AttestationCAKey, s.cfg.Now())
	}
	return attestca.LoadOrCreate(s.cfg.DataDir, s.cfg.Now())
}

// register puts the services that both listeners offer on g. Who may call what
// is decided by the interceptors.
func (s *Server) register(g *grpc.Server) {
	agentv1.RegisterAgentServer(g, &agentService{s: s})
	entryv1.RegisterEntryServer(g, &entryService{s: s})
	svidv1.RegisterSVIDServer(g, &svidService{s: s})
	bundlev1.RegisterBundleServer(g, newBundleService(s))
	trustdomainv1.RegisterTrustDomainServer(g, bundles.Relationships{})
	localauthorityv1.RegisterLocalAuthorityServer(g, &localAuthorityService{s: s})
	loggerv1.RegisterLoggerServer(g, logger.New(s.cfg.LogLevel, s.cfg.Log))
	debugv1.RegisterDebugServer(g, &debugService{s: s})
	grpc_health_v1.RegisterHealthServer(g, &healthService{s: s})
	nodev1.RegisterNodeServer(g, &nodeService{s: s})
}

// Run serves until ctx ends or a listener fails, and then releases everything.
func (s *Server) Run(ctx context.Context) error {
	defer s.Close()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	remote := grpc.NewServer(append(s.interceptors(false),
		workers(),
		grpc.ReadBufferSize(readBuffer),
		grpc.Creds(connCredentials{credentials.NewTLS(s.tlsConfig())}),
		grpc.InTapHandle(s.tap),
		grpc.ForceServerCodecV2(boundcodec.New(maxRequestFields)),
		grpc.StaticStreamWindowSize(window), grpc.StaticConnWindowSize(connWindow),
		grpc.MaxConcurrentStreams(maxStreams),
		grpc.ConnectionTimeout(handshakeTimeout),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: time.Minute, Timeout: 20 * time.Second}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 10 * time.Second, PermitWithoutStream: true}),
	)...)
	local := grpc.NewServer(append(s.interceptors(true), workers())...)
	s.register(remote)
	s.register(local)
	for _, f := range s.cfg.AdminServices {
		f(local, s)
	}
	var wg sync.WaitGroup
	failed := make(chan error, 3)
	wg.Go(func() { s.authorities.run(ctx) })
	wg.Go(func() { s.jwt.run(ctx) })
	for _, x := range []struct {
		g *grpc.Server
		l net.Listener
	}{{remote, s.tcp}, {local, s.admin}} {
		wg.Go(func() {
			if err := x.g.Serve(x.l); err != nil {
				failed <- err
			}
		})
	}
	for _, p := range s.publishers {
		wg.Go(func() { s.publish(ctx, p) })
	}
	if s.tsa != nil {
		wg.Go(func() { s.maintainTSA(ctx) })
	}
	web := s.newHTTP()
	if s.http != nil {
		wg.Go(func() {
			if err := web.Serve(s.http); !errors.Is(err, http.ErrServerClosed) {
				failed <- err
			}
		})
	}
	s.cfg.Log.Info("serving", "trust_domain", s.cfg.TrustDomain, "address", s.tcp.Addr().String(), "admin_socket", s.cfg.AdminSocket, "http_url", s.HTTPURL())
	var err error
	select {
	case <-ctx.Done():
	case err = <-failed:
	}
	cancel()
	close(s.stopping)
	wg.Go(func() { stopHTTP(web) })
	stop(remote, local)
	wg.Wait()
	return errors.Join(err, s.Close())
}

// stop ends servers gracefully, and those that take too long not so.
func stop(servers ...*grpc.Server) {
	var wg sync.WaitGroup
	for _, g := range servers {
		wg.Go(func() {
			t := time.AfterFunc(stopTimeout, g.Stop)
			defer t.Stop()
			g.GracefulStop()
		})
	}
	wg.Wait()
}

// Close releases everything without Run having been called. After Run it does
// nothing.
func (s *Server) Close() error {
	s.closing.Do(func() {
		var errs []error
		closed := func(err error) {
			if err != nil && !errors.Is(err, net.ErrClosed) {
				errs = append(errs, err)
			}
		}
		if s.tcp != nil {
			closed(s.tcp.Close())
		}
		if s.http != nil {
			closed(s.http.Close())
		}
		if s.admin != nil {
			closed(s.admin.Close())
		}
		s.ready.Store(false)
		for _, a := range s.attestors {
			closed(a.plugin.Close())
		}
		for _, x := range s.external {
			closed(x.plugin.Close())
		}
		if s.certLog != nil {
			closed(s.certLog.close())
		}
		if s.store != nil {
			closed(s.store.Close())
		}
		if s.dir != nil {
			closed(s.dir.Close())
		}
		s.closed = errors.Join(errs...)
	})
	return s.closed
}

// Addr is the TCP address that is listened on, with its real port.
func (s *Server) Addr() net.Addr { return s.tcp.Addr() }

// AdminSocket is the path of the admin socket.
func (s *Server) AdminSocket() string { return s.cfg.AdminSocket }

// Store is what the server keeps.
func (s *Server) Store() *store.Store { return s.store }

// TrustDomain is the name of the trust domain.
func (s *Server) TrustDomain() string { return s.cfg.TrustDomain }
