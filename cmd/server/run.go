package main

import (
	"crypto/ecdsa"
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	"github.com/rootlink/rootlink/internal/catalog"
	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/internal/config"
	"github.com/rootlink/rootlink/internal/healthhttp"
	"github.com/rootlink/rootlink/internal/keyfile"
	"github.com/rootlink/rootlink/internal/server"
	"github.com/rootlink/rootlink/internal/server/admin"
	"github.com/rootlink/rootlink/internal/tlog"
	"github.com/rootlink/rootlink/pkg/attest"
	"github.com/rootlink/rootlink/pkg/envelope"
	"github.com/rootlink/rootlink/pkg/svid"
)

// runFlags are the settings of `run`; the same names with underscores are the
// keys of server {} in the configuration file.
type runFlags struct {
	plugins []catalog.Config // external ones, of the file
	running map[string]runningFlag
	health  healthhttp.Flags

	config, logLevel, logFormat                             string
	expandEnv                                               bool
	trustDomain, listen, httpListen, httpURL                string
	log, logOrigin, witnessPolicy                           string
	trustKeyPublic                                          string
	ekRoots                                                 []string
	ekAllow, ekDeny                                         string
	attestationCACert, attestationCAKey                     string
	evidencePatterns, parentPatterns                        []string
	quotePCRs, pcrSelectors                                 []string
	noEventLog, imaLog, refuseAKChange                      bool
	svidTTL, jwtTTL, agentTTL, issuerTTL, caTTL, roundLimit cli.Duration
	attestRate                                              float64
	attestBurst, maxConns, maxConnsOfAddress                int
}

// pluginKeys are those of plugin_data of the built-in node attestor that are
// flags as well.
var pluginKeys = []string{"ek_roots", "ek_allow", "ek_deny", "attestation_ca_cert", "attestation_ca_key"}

func runCommand(at *location) *cobra.Command {
	var f runFlags
	c := &cobra.Command{
		Use: "run --trust-domain NAME --ek-roots PEM|DIR…", Short: "Run the server in the foreground", Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error { return f.run(c, at) },
	}
	f.add(c.Flags())
	return c
}

// validateCommand takes the flags of run, so that whatever starts the server can
// be tried by exchanging one word.
func validateCommand(at *location) *cobra.Command {
	var f runFlags
	c := &cobra.Command{
		Use: "validate", Short: "Judge flags, configuration file and plugin_data as run would, and start nothing", Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			cfg, err := f.settings(c, at)
			if err != nil {
				return err
			}
			notes, err := server.Validate(c.Context(), cfg)
			if err != nil {
				err = explainStart(err, cfg)
			}
			return cli.Validated(c, notes, err)
		},
	}
	f.add(c.Flags())
	return c
}

func (f *runFlags) add(fs *pflag.FlagSet) {
	cli.ConfigFlags(fs, &f.config, &f.expandEnv)
	cli.LogFlags(fs, &f.logLevel, &f.logFormat)
	f.health.Add(fs)
	fs.StringVar(&f.trustDomain, "trust-domain", "", "name of the trust domain, such as example.org")
	fs.StringVar(&f.listen, "listen", server.DefaultListen, "TCP address for agents; port 0 picks one")
	fs.StringVar(&f.httpListen, "http-listen", server.DefaultHTTPListen, `TCP address of the HTTP port, for timestamps and the log; port 0 picks one, "off" opens none`)
	fs.StringVar(&f.httpURL, "http-url", "", "base URL of the HTTP port that agents are told (default http:// and its address)")
	fs.StringVar(&f.log, "log", "on", "on or off: keep a transparency log of what is signed and certified")
	fs.StringVar(&f.logOrigin, "log-origin", "", "name of a new transparency log (default log. and the trust domain)")
	fs.StringVar(&f.witnessPolicy, "witness-policy", "", "`FILE` that names the log's witnesses, whose cosignatures each checkpoint then needs")
	fs.StringVar(&f.trustKeyPublic, "trust-key-public", "", "PEM `FILE` with the public trust key, whose private half is kept elsewhere and signs what trust export --unsigned writes")
	fs.StringArrayVar(&f.ekRoots, "ek-roots", nil, "PEM file, or directory of them, with TPM makers' certificates (repeatable)")
	fs.StringVar(&f.ekAllow, "ek-allow", "", "file of EK hashes that need no maker's certificate")
	fs.StringVar(&f.ekDeny, "ek-deny", "", "file of EK hashes that are refused")
	fs.StringVar(&f.attestationCACert, "attestation-ca-cert", "", "certificate of the attestation CA, where servers share one (default made in the data directory)")
	fs.StringVar(&f.attestationCAKey, "attestation-ca-key", "", "its key")
	fs.StringArrayVar(&f.evidencePatterns, "evidence-pattern", nil, "SPIFFE ID pattern whose Workload API SVIDs must carry evidence (repeatable)")
	fs.StringArrayVar(&f.parentPatterns, "parent-evidence", nil, "SPIFFE ID pattern whose SVIDs show what the node attested with when a stock SPIRE agent asks for them (repeatable)")
	fs.StringArrayVar(&f.quotePCRs, "quote-pcrs", []string{"sha256:0-15"}, "BANK:LIST that every quote must cover (repeatable)")
	fs.StringArrayVar(&f.pcrSelectors, "pcr-selectors", nil, "BANK:LIST of PCRs that become selectors of nodes (repeatable)")
	fs.BoolVar(&f.noEventLog, "no-event-log", false, "do not ask agents for the boot event log")
	fs.BoolVar(&f.imaLog, "ima-log", false, "ask agents for the IMA log")
	fs.BoolVar(&f.refuseAKChange, "refuse-ak-change", false, "refuse a second AK of one TPM instead of raising an alarm")
	f.svidTTL, f.agentTTL, f.issuerTTL = cli.Duration(server.DefaultX509TTL), cli.Duration(server.DefaultAgentTTL), cli.Duration(server.MaxIssuerTTL)
	f.caTTL, f.roundLimit = cli.Duration(server.DefaultAuthorityTTL), cli.Duration(server.DefaultRoundTimeout)
	fs.Var(&f.svidTTL, "svid-ttl", "lifetime of SVIDs whose entry names none")
	f.jwtTTL = cli.Duration(svid.DefaultJWTTTL)
	fs.Var(&f.jwtTTL, "jwt-svid-ttl", "lifetime of JWT-SVIDs whose entry names none, at most 24h")
	fs.Var(&f.agentTTL, "agent-ttl", "lifetime of agents' SVIDs")
	fs.Var(&f.issuerTTL, "issuer-ttl", "lifetime of SVIDs that sign one build step, at most 10m")
	fs.Var(&f.caTTL, "ca-ttl", "lifetime of an authority")
	fs.Float64Var(&f.attestRate, "attest-rate", server.DefaultAttestationRate, "node attestations a second from one address")
	fs.IntVar(&f.attestBurst, "attest-burst", server.DefaultAttestationBurst, "node attestations from one address at once")
	fs.IntVar(&f.maxConns, "max-connections", server.DefaultMaxConnections, "open connections of all agents")
	fs.IntVar(&f.maxConnsOfAddress, "max-connections-per-address", server.DefaultMaxConnectionsOfAddress, "open connections from one address")
	fs.Var(&f.roundLimit, "attest-timeout", "longest wait for one message of a node attestation")
}

func (f *runFlags) run(c *cobra.Command, at *location) error {
	cfg, err := f.settings(c, at)
	if err != nil {
		return err
	}
	signals, stop := catchReload()
	defer stop()
	s, err := server.New(c.Context(), cfg)
	if err != nil {
		return explainStart(err, cfg)
	}
	defer s.Close()
	probes, err := f.health.Start(cfg.AdminSocket, cfg.Log)
	if err != nil {
		return err
	}
	defer probes()
	go f.reloadOnSignal(c.Context(), signals, s, cfg)
	web := "off"
	if a := s.HTTPAddr(); a != nil {
		web = a.String()
	}
	fmt.Fprintf(c.ErrOrStderr(), "%s: ready: trust domain %s, agents at %s, HTTP port %s, admin socket %s\n", program, s.TrustDomain(), s.Addr(), web, cfg.AdminSocket)
	_, pub := s.TrustKey()
	id, err := envelope.Fingerprint(pub)
	if err != nil {
		return err
	}
	cfg.Log.Info("trust.json is signed by this key, which verifiers pin with --trust-key", "fingerprint", id)
	if err := s.Run(c.Context()); err != nil && c.Context().Err() == nil {
		return err
	}
	return nil
}

// settings are what flags and file describe.
func (f *runFlags) settings(c *cobra.Command, at *location) (server.Config, error) {
	if err := f.readConfig(c); err != nil {
		return server.Config{}, err
	}
	return f.serverConfig(c, at)
}

func (f *runFlags) readConfig(c *cobra.Command) error {
	f.remember(c.Flags())
	if f.config != "" {
		file, err := config.Load(f.config, f.expandEnv)
		if err != nil {
			return err
		}
		if err := applyFile(file, c.Flags()); err != nil {
			return err
		}
		f.plugins = externalPlugins(file)
	}
	f.settle(c.Flags())
	if f.trustDomain == "" {
		return cli.Usage("such as --trust-domain example.org", "no trust domain")
	}
	return nil
}

func applyFile(file *config.File, fs *pflag.FlagSet) error {
	if err := file.Apply("server", fs); err != nil {
		return err
	}
	return file.ApplyPlugins(fs, map[string][]string{"NodeAttestor tpmnode": pluginKeys})
}

func (f *runFlags) serverConfig(c *cobra.Command, at *location) (server.Config, error) {
	cfg := server.Config{
		TrustDomain: f.trustDomain, DataDir: at.dataDir, Listen: f.listen, AdminSocket: at.adminSocket(),
		Plugins: f.plugins,
		EKRoots: f.ekRoots, EKAllow: f.ekAllow, EKDeny: f.ekDeny,
		AttestationCACert: f.attestationCACert, AttestationCAKey: f.attestationCAKey,
		EvidencePatterns: f.evidencePatterns, ParentPatterns: f.parentPatterns,
		NoEventLog: f.noEventLog, WantIMALog: f.imaLog, RefuseAKChange: f.refuseAKChange,
		X509TTL: time.Duration(f.svidTTL), JWTTTL: time.Duration(f.jwtTTL), AgentTTL: time.Duration(f.agentTTL), IssuerTTL: time.Duration(f.issuerTTL),
		AuthorityTTL: time.Duration(f.caTTL), RoundTimeout: time.Duration(f.roundLimit),
		AttestationRate: f.attestRate, AttestationBurst: f.attestBurst,
		MaxConnections: f.maxConns, MaxConnectionsOfAddress: f.maxConnsOfAddress,
	}
	if f.httpListen != "off" {
		cfg.HTTPListen, cfg.HTTPURL = f.httpListen, f.httpURL
	} else if f.httpURL != "" {
		return cfg, cli.Usage("", "--http-url without an HTTP port: --http-listen is off")
	}
	if err := f.logConfig(&cfg); err != nil {
		return cfg, err
	}
	if err := f.health.Check(); err != nil {
		return cfg, err
	}
	if err := cli.CheckSocketPath(cfg.AdminSocket); err != nil {
		return cfg, cli.Hint(err, "name a shorter path with --admin-socket")
	}
	if f.attestRate <= 0 || f.attestBurst < 1 {
		return cfg, cli.Usage("", "--attest-rate and --attest-burst must be positive")
	}
	if f.maxConns < 1 || f.maxConnsOfAddress < 1 {
		return cfg, cli.Usage("", "--max-connections and --max-connections-per-address must be positive")
	}
	var err error
	if f.trustKeyPublic != "" {
		pub, err := keyfile.Public(f.trustKeyPublic)
		if err != nil {
			return cfg, err
		}
		var ok bool
		if cfg.TrustKeyPublic, ok = pub.(*ecdsa.PublicKey); !ok {
			return cfg, cli.Usage("join lines pin ECDSA keys: give one on P-256", "--trust-key-public: %s is not an ECDSA key", f.trustKeyPublic)
		}
	}
	if cfg.QuotePCRs, err = pcrFlags("--quote-pcrs", f.quotePCRs); err != nil {
		return cfg, err
	}
	if cfg.PCRSelectors, err = pcrFlags("--pcr-selectors", f.pcrSelectors); err != nil {
		return cfg, err
	}
	if cfg.Log, cfg.LogLevel, err = cli.Logger(c.ErrOrStderr(), f.logLevel, f.logFormat); err != nil {
		return cfg, err
	}
	if len(cfg.EKRoots) == 0 && cfg.EKAllow == "" && len(cfg.Plugins) == 0 {
		cfg.Log.Warn("no TPM can attest: neither --ek-roots nor --ek-allow is given",
			"hint", "--ek-roots takes the TPM makers' certificates; `rootlink-agent tpm info` prints the EK hash of a machine for --ek-allow")
	}
	cfg.AdminServices = append(cfg.AdminServices, registerAdmin)
	return cfg, nil
}

func (f *runFlags) logConfig(cfg *server.Config) (err error) {
	switch f.log {
	case "on":
	case "off":
		if f.logOrigin != "" || f.witnessPolicy != "" {
			return cli.Usage("", "--log-origin and --witness-policy are about a log, and --log is off")
		}
		cfg.NoTransparencyLog = true
	default:
		return cli.Usage("on or off", "--log %q", f.log)
	}
	cfg.LogOrigin = f.logOrigin
	if f.witnessPolicy != "" {
		const most = 64 << 10 // bytes
		cfg.WitnessPolicy, err = cli.ReadInput(f.witnessPolicy, most)
	}
	return err
}

func registerAdmin(r grpc.ServiceRegistrar, s *server.Server) {
	// New fails on a missing field only, which both are set here.
	if svc, err := admin.New(admin.Config{Backend: s, EK: s.EKRoots}); err == nil {
		svc.Register(r)
	}
}

func pcrFlags(flag string, in []string) (out []attest.PCRSelection, err error) {
	sels, err := pcrSelections(flag, in)
	for _, s := range sels {
		out = append(out, attest.PCRSelection{Bank: s.Bank, Indices: s.Indices})
	}
	return out, err
}

// explainStart says what to do about the ways in which a start goes wrong.
func explainStart(err error, cfg server.Config) error {
	var hint string
	var plugin *catalog.ConfigureError
	code := cli.ExitInternal
	switch {
	case errors.Is(err, server.ErrConfig):
		code, hint = cli.ExitUsage, "see `"+program+" run --help`"
	case errors.Is(err, catalog.ErrConfig):
		code, hint = cli.ExitUsage, "correct the plugin's block in the configuration file"
	case errors.Is(err, server.ErrInUse):
		hint = "stop the other server, or give this one its own --data-dir and --admin-socket"
	case errors.As(err, &plugin):
		hint = plugin.Hint
		if plugin.Code == codes.InvalidArgument {
			code = cli.ExitUsage
		}
	case catalog.Hint(err) != "":
		hint = catalog.Hint(err)
	case errors.Is(err, tlog.ErrOrigin):
		code, hint = cli.ExitUsage, "leave --log-origin out: a log keeps the name that it was made with"
	case errors.Is(err, tlog.ErrLost):
		hint = "restore log/, log.key and log-index.db from one backup; `" + program + " log check` says what is missing. To begin anew, move all three away: verifiers then need a new trust.json"
	case errors.Is(err, server.ErrShared):
		hint = "chmod go-w it, or name a directory of the server's own with --data-dir or --admin-socket"
	case errors.Is(err, server.ErrNotSocket):
		hint = "remove it, or name another path with --admin-socket"
	case errors.Is(err, server.ErrForeignOwner):
		hint = "run the server as that user, or name a directory of its own with --data-dir"
	case errors.Is(err, syscall.EADDRINUSE):
		hint = "another program listens there; choose another address with --listen or --http-listen, port 0 picks a free one"
	case errors.Is(err, fs.ErrPermission):
		hint = "the server needs a data directory of its own: name one with --data-dir"
		if strings.HasPrefix(cfg.DataDir, defaultDataDir) {
			hint += ", or run it as root for " + defaultDataDir
		}
	default:
		hint = cli.HintOf(err)
	}
	return cli.Fail(code, err, hint)
}
