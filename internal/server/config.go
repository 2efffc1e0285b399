package server

import (
	"crypto/ecdsa"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"path/filepath"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"

	"github.com/rootlink/rootlink/internal/catalog"
	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/pkg/attest"
	"github.com/rootlink/rootlink/pkg/link"
	"github.com/rootlink/rootlink/pkg/svid"
)

// Config is what a Server is made from. Zero values mean the defaults that
// each field names.
type Config struct {
	TrustDomain string // required, such as "example.org"
	DataDir     string // required; made with mode 0700 when absent
	Listen      string // TCP address; default 127.0.0.1:8081, port 0 picks one
	AdminSocket string // default DataDir/admin.sock
	// TrustKeyPublic is the trust key whose private half is kept elsewhere; nil:
	// it is in the data directory, made at the first start.
	TrustKeyPublic *ecdsa.PublicKey

	HTTPListen string // TCP address of the HTTP port, none when empty; port 0 picks one
	HTTPURL    string // base URL of it that agents are told; default http://HTTPListen

	EKRoots []string // PEM files, or directories of them
	EKAllow string   // file of EK hashes that need no maker chain
	EKDeny  string   // file of EK hashes that are refused

	AttestationCACert string // PEM files that an operator shares among servers;
	AttestationCAKey  string // by default both are made in DataDir

	// The transparency log. LogOrigin names a new one, by default log. and the
	// trust domain; an existing one keeps its name. WitnessPolicy, in tessera's
	// form, names witnesses without whom no checkpoint is published.
	NoTransparencyLog bool
	LogOrigin         string
	WitnessPolicy     []byte

	// EvidencePatterns are SPIFFE ID patterns (see link.MatchPattern) whose
	// Workload API SVIDs need leaf evidence.
	EvidencePatterns []string
	// ParentPatterns are SPIFFE ID patterns whose SVIDs carry the node's last
	// attestation when a stock agent asks for them, which can give no leaf
	// evidence. None by default: an EK certificate is a permanent hardware ID.
	ParentPatterns []string
	// QuotePCRs must be selected by every quote; default sha256:0-15.
	QuotePCRs []attest.PCRSelection
	// PCRSelectors are the PCRs that become pcr: selectors of a node.
	PCRSelectors []attest.PCRSelection
	// Agents are asked for their boot event log unless NoEventLog is set, and
	// for their IMA log only if WantIMALog is.
	NoEventLog bool
	WantIMALog bool
	// RefuseAKChange refuses a second AK of one EK instead of raising an alarm.
	RefuseAKChange bool

	X509TTL          time.Duration // default 1 h; entries may ask for another
	JWTTTL           time.Duration // default 5 min, at most 24 h; entries may ask for another
	AgentTTL         time.Duration // default 1 h
	IssuerTTL        time.Duration // default and most 10 min
	AuthorityTTL     time.Duration // default 365 days
	AttestationRate  float64       // attestations per second and address; default 1
	AttestationBurst int           // default 5
	RoundTimeout     time.Duration // per round of node attestation; default 30 s

	// Open connections on TCP, of all and of one address (of IPv6 a /64).
	MaxConnections          int // default 16384, less where fewer files may be open
	MaxConnectionsOfAddress int // default 4096: many nodes may share an address

	// Plugins are external ones: BundlePublishers, and NodeAttestors, whose names are
	// the attestation types that agents may use beside tpmnode.
	Plugins []catalog.Config

	// AdminServices register further services on the admin socket only.
	AdminServices []func(grpc.ServiceRegistrar, *Server)

	Log *slog.Logger // default slog.Default()
	// LogLevel is that of Log's handler, for who may change it while the server
	// runs; nil: nobody can.
	LogLevel *slog.LevelVar
	Now      func() time.Time // default time.Now
}

// Defaults of Config.
const (
	DefaultListen           = "127.0.0.1:8081"
	DefaultHTTPListen       = "127.0.0.1:8082" // of the command; a Config without one has no HTTP port
	DefaultX509TTL          = time.Hour
	DefaultAgentTTL         = time.Hour
	MaxIssuerTTL            = 10 * time.Minute
	DefaultAuthorityTTL     = 365 * 24 * time.Hour
	DefaultAttestationRate  = 1 // per second and address
	DefaultAttestationBurst = 5
	DefaultRoundTimeout     = 30 * time.Second

	DefaultMaxConnections          = 16384
	DefaultMaxConnectionsOfAddress = 4096
)

// ErrConfig means that New was given a Config that cannot work.
var ErrConfig = errors.New("server configuration")

// settings is a Config that was checked and completed.
type settings struct {
	Config
	td spiffeid.TrustDomain
}

func (c Config) check() (*settings, error) {
	s := &settings{Config: c}
	var errs []error
	fail := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }

	td, err := spiffeid.TrustDomainFromString(c.TrustDomain)
	if err != nil {
		fail("trust domain %q: %w", c.TrustDomain, err)
	}
	s.td = td
	s.TrustDomain = td.Name()
	if c.DataDir == "" {
		fail("no data directory")
	}
	setDefault(&s.Listen, DefaultListen)
	if _, _, err := net.SplitHostPort(s.Listen); err != nil {
		fail("listen address: %w", err)
	}
	if err := s.checkHTTP(); err != nil {
		fail("%w", err)
	}
	setDefault(&s.AdminSocket, filepath.Join(c.DataDir, "admin.sock"))
	// A Unix socket path is bounded by sockaddr_un; the kernel's own message
	// for it ("invalid argument") helps nobody.
	if len(s.AdminSocket) > cli.MaxSocketPath {
		fail("admin socket path %q is longer than %d bytes", s.AdminSocket, cli.MaxSocketPath)
	}
	if (c.AttestationCACert == "") != (c.AttestationCAKey == "") {
		fail("attestation CA: certificate and key go together")
	}
	for _, p := range c.EvidencePatterns {
		if err := link.ValidatePattern(p); err != nil {
			fail("evidence pattern: %w", err)
		}
	}
	for _, p := range c.ParentPatterns {
		if err := link.ValidatePattern(p); err != nil {
			fail("parent evidence pattern: %w", err)
		}
	}
	if len(s.QuotePCRs) == 0 {
		s.QuotePCRs = attest.DefaultPCRs()
	}
	if s.QuotePCRs, err = attest.NormalizePCRs(s.QuotePCRs); err != nil {
		fail("quote PCRs: %w", err)
	}
	for _, sel := range s.QuotePCRs {
		if sel.Bank == "sha1" {
			fail("quote PCRs: SHA-1 is too weak a bank")
		}
		if i := slices.IndexFunc(sel.Indices, attest.ResettablePCR); i >= 0 {
			fail("quote PCRs: %s:%d can be reset from user space", sel.Bank, sel.Indices[i])
		}
	}
	setDefault(&s.X509TTL, DefaultX509TTL)
	setDefault(&s.JWTTTL, svid.DefaultJWTTTL)
	setDefault(&s.AgentTTL, DefaultAgentTTL)
	setDefault(&s.IssuerTTL, MaxIssuerTTL)
	setDefault(&s.AuthorityTTL, DefaultAuthorityTTL)
	setDefault(&s.AttestationRate, DefaultAttestationRate)
	setDefault(&s.AttestationBurst, DefaultAttestationBurst)
	setDefault(&s.RoundTimeout, DefaultRoundTimeout)
	for _, d := range []struct {
		name     string
		have     time.Duration
		min, max time.Duration
	}{
		{"X.509 TTL", s.X509TTL, time.Second, s.AuthorityTTL / 6},
		{"JWT TTL", s.JWTTTL, time.Second, svid.MaxJWTTTL},
		{"agent TTL", s.AgentTTL, time.Second, s.AuthorityTTL / 6},
		{"issuer TTL", s.IssuerTTL, time.Second, MaxIssuerTTL},
		{"authority TTL", s.AuthorityTTL, time.Minute, 10 * DefaultAuthorityTTL},
		{"round timeout", s.RoundTimeout, 10 * time.Millisecond, time.Hour},
	} {
		if d.have < d.min || d.have > d.max {
			fail("%s of %v is not between %v and %v", d.name, d.have, d.min, d.max)
		}
	}
	setDefault(&s.MaxConnections, DefaultMaxConnections)
	setDefault(&s.MaxConnectionsOfAddress, DefaultMaxConnectionsOfAddress)
	if s.MaxConnections < 1 || s.MaxConnectionsOfAddress < 1 {
		fail("at most %d connections, %d of one address", s.MaxConnections, s.MaxConnectionsOfAddress)
	}
	// Such SVIDs end with what they carry; a node must attest again before.
	if len(s.ParentPatterns) > 0 && s.AgentTTL > attest.MaxParentAge {
		fail("agent TTL of %v: parent evidence needs one of at most %v", s.AgentTTL, attest.MaxParentAge)
	}
	if s.AttestationRate < 0 || s.AttestationBurst < 1 {
		fail("attestation rate %v with burst %d", s.AttestationRate, s.AttestationBurst)
	}
	if s.Log == nil {
		s.Log = slog.Default()
	}
	if s.Now == nil {
		s.Now = time.Now
	}
	if len(errs) != 0 {
		return nil, fmt.Errorf("%w: %w", ErrConfig, errors.Join(errs...))
	}
	return s, nil
}

func setDefault[T comparable](p *T, d T) {
	var zero T
	if *p == zero {
		*p = d
	}
}
