package config

import (
	"strings"
	"testing"

	"github.com/spf13/pflag"

	"github.com/rootlink/rootlink/internal/cli"
)

func daemonFlags() *pflag.FlagSet {
	fs := pflag.NewFlagSet("run", pflag.ContinueOnError)
	for name, value := range map[string]string{
		"listen": "127.0.0.1:8081", "server": "127.0.0.1:8081", "admin-socket": "", "svid-ttl": "1h", "jwt-svid-ttl": "5m",
		"log-level": "info", "socket": "", "trust-bundle": "", "sync-interval": "5s", "trust-domain": "", "data-dir": "",
		"attest-rate": "1", "attest-burst": "5", "health-listen": "off", "health-live-path": "/live", "health-ready-path": "/ready",
	} {
		fs.String(name, value, "")
	}
	return fs
}

func TestSPIREsNames(t *testing.T) {
	for _, tt := range []struct {
		name, section, in string
		want              map[string]string
	}{
		{"server", "server", `server {
  bind_address = "0.0.0.0"
  bind_port = 9081
  socket_path = "/run/x.sock"
  default_x509_svid_ttl = "30m"
  default_jwt_svid_ttl = "2m"
  ca_key_type = "ec-p256"
  log_level = "WARNING"
  ratelimit { attestation = false }
}`, map[string]string{
			"listen": "0.0.0.0:9081", "admin-socket": "/run/x.sock", "svid-ttl": "30m", "jwt-svid-ttl": "2m", "log-level": "warn",
			"attest-rate": "1000000", "attest-burst": "1000000",
		}},
		{"only the port", "server", `server { bind_port = "9081" }`, map[string]string{"listen": "127.0.0.1:9081"}},
		{"an IPv6 address", "server", `server { bind_address = "::1" }`, map[string]string{"listen": "[::1]:8081"}},
		{"agent", "agent", `agent {
  server_address = "spire.example"
  server_port = "8443"
  socket_path = "/run/agent.sock"
  trust_bundle_path = "b.pem"
  insecure_bootstrap = false
  experimental { sync_interval = "7s" }
}`, map[string]string{"server": "spire.example:8443", "socket": "/run/agent.sock", "trust-bundle": "b.pem", "sync-interval": "7s"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f, err := Parse("x.conf", []byte(tt.in))
			if err != nil {
				t.Fatal(err)
			}
			fs := daemonFlags()
			if err := f.Apply(tt.section, fs); err != nil {
				t.Fatal(err)
			}
			for name, want := range tt.want {
				if got := fs.Lookup(name).Value.String(); got != want {
					t.Errorf("--%s is %q, want %q", name, got, want)
				}
			}
		})
	}
}

func TestFlagsWinOverSPIREsNames(t *testing.T) {
	f, err := Parse("x.conf", []byte(`server { bind_port = 1 }`))
	if err != nil {
		t.Fatal(err)
	}
	fs := daemonFlags()
	if err := fs.Set("listen", "127.0.0.1:2"); err != nil {
		t.Fatal(err)
	}
	if err := f.Apply("server", fs); err != nil {
		t.Fatal(err)
	}
	if got := fs.Lookup("listen").Value.String(); got != "127.0.0.1:2" {
		t.Errorf("the file won: %s", got)
	}
}

// What a file asks for and does not get must not go unnoticed.
func TestRefusesWhatSPIREDoesAndWeDoNot(t *testing.T) {
	for _, tt := range []struct {
		name, section, in, want string
	}{
		{"federation", "server", "server {\n  federation {\n  }\n}", "x.conf:2: federation: "},
		{"another key type", "server", "server {\n\n  ca_key_type = \"rsa-4096\"\n}", "x.conf:3: ca_key_type"},
		{"a key in a block", "server", "server {\n  ratelimit {\n    other = 1\n  }\n}", `x.conf:3: unknown key "other" in ratelimit`},
		{"join token", "agent", "agent {\n  join_token = \"x\"\n}", "x.conf:2: join_token: "},
		{"insecure bootstrap", "agent", "agent {\n  insecure_bootstrap = true\n}", "x.conf:2: insecure_bootstrap"},
		{"set twice by two names", "server", "server {\n  listen = \"a:1\"\n  bind_port = 2\n}", "x.conf:3: listen and bind_port both set --listen"},
		{"a key twice", "server", "server {\n  socket_path = \"a\"\n  socket_path = \"b\"\n}", "x.conf:3: socket_path is set a second time"},
		{"a block for a value", "server", "server {\n  socket_path { }\n}", "x.conf:2: "},
		{"a value for a block", "server", "server {\n  ratelimit = true\n}", "x.conf:2: ratelimit must be a block"},
		{"expand_env is of the command line", "server", "server {\n  expand_env = true\n}", "x.conf:2: unknown key"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f, err := Parse("x.conf", []byte(tt.in))
			if err == nil {
				err = f.Apply(tt.section, daemonFlags())
			}
			if err == nil || !strings.HasPrefix(err.Error(), tt.want) || cli.ExitCode(err) != cli.ExitUsage {
				t.Fatalf("%v, want %s…", err, tt.want)
			}
		})
	}
}

func TestRefusesSectionsThatDoNothing(t *testing.T) {
	for _, name := range []string{"telemetry"} {
		if _, err := Parse("x.conf", []byte("\n"+name+" { }")); err == nil || !strings.HasPrefix(err.Error(), "x.conf:2: "+name+": ") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestExpand(t *testing.T) {
	env := map[string]string{"PORT": "9081", "DIR": "/srv/a b", "EVIL": "x\"\n join = \"y", "NESTED": "${PORT}", "EMPTY": "", "MORE": "9081 join = true", "REST": "9081#"}
	lookup := func(name string) (string, bool) { v, ok := env[name]; return v, ok }
	for _, tt := range []struct{ name, in, want, err string }{
		{"both forms", `a = "$DIR/x" b = ${PORT}`, `a = "/srv/a b/x" b = 9081`, ""},
		{"set to nothing", `a = "$EMPTY"`, `a = ""`, ""},
		{"not set", "\n a = \"$OTHER\"", "", "x.conf:2: the variable OTHER is not set"},
		{"a comment", "# $OTHER\na = 1 // ${OTHER}\n", "# $OTHER\na = 1 // ${OTHER}\n", ""},
		{"no comment inside quotes", `a = "http://$PORT"`, `a = "http://9081"`, ""},
		{"a value that ends its string", `a = "$EVIL"`, "", "x.conf:1: the value of EVIL"},
		{"between quotes it is one value", `a = "$MORE"`, `a = "9081 join = true"`, ""},
		{"after an escaped quote too", `a = "\"$MORE"`, `a = "\"9081 join = true"`, ""},
		{"a value that brings its own key", `a = $MORE`, "", "x.conf:1: the value of MORE"},
		{"after a string", `a = "x" b = $MORE`, "", "x.conf:1: the value of MORE"},
		{"a value that makes the rest a comment", `a = $REST b = 1`, "", "x.conf:1: the value of REST"},
		{"a value that would be expanded later", `a = "$NESTED"`, "", "x.conf:1: the value of NESTED"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			out, err := Expand("x.conf", []byte(tt.in), lookup)
			if tt.err == "" && (err != nil || string(out) != tt.want) {
				t.Fatalf("%q, %v, want %q", out, err, tt.want)
			}
			if tt.err != "" && (err == nil || !strings.HasPrefix(err.Error(), tt.err)) {
				t.Fatalf("%v, want %s…", err, tt.err)
			}
		})
	}
}

func TestSPIREsOwnPlugins(t *testing.T) {
	for _, tt := range []struct {
		section, typ, name, cmd string
		skip                    bool
		why                     string
	}{
		{"agent", "KeyManager", "memory", "", true, ""},
		{"agent", "KeyManager", "disk", "", false, "memory"},
		{"server", "KeyManager", "memory", "", false, "data_dir"},
		{"server", "DataStore", "sql", "", false, "data_dir"},
		{"server", "DataStore", "sql", "/external", false, ""},
		{"server", "NodeAttestor", "join_token", "", false, "tpmnode"},
		{"agent", "WorkloadAttestor", "docker", "", false, ""},
	} {
		skip, why := SPIREPlugin(tt.section, Plugin{Type: tt.typ, Name: tt.name, Cmd: tt.cmd})
		if skip != tt.skip || (why == "") != (tt.why == "") || !strings.Contains(why, tt.why) {
			t.Errorf("%+v: %t, %q", tt, skip, why)
		}
	}
}

func TestHealthChecks(t *testing.T) {
	for _, tt := range []struct{ in, listen, live, ready, err string }{
		{"health_checks {\n listener_enabled = true\n bind_address = \"0.0.0.0\"\n bind_port = 8080\n live_path = \"/l\"\n ready_path = \"/r\"\n}", "0.0.0.0:8080", "/l", "/r", ""},
		{"health_checks { listener_enabled = true }", "localhost:80", "/live", "/ready", ""},
		{"health_checks { bind_port = \"8080\" }", "off", "/live", "/ready", ""},
		{"health_checks {\n listener_enabled = 1\n}", "", "", "", "x.conf:2: listener_enabled"},
		{"health_checks {\n\n listener = true\n}", "", "", "", "x.conf:3: unknown key"},
		{"health_checks {\n bind_port = 1\n bind_port = 2\n}", "", "", "", "x.conf:3: bind_port is set a second time"},
		{"health_checks = true", "", "", "", "x.conf:1: health_checks must be a block"},
	} {
		for _, section := range []string{"server", "agent"} {
			fs := daemonFlags()
			f, err := Parse("x.conf", []byte(tt.in))
			if err == nil {
				err = f.Apply(section, fs)
			}
			if tt.err != "" {
				if err == nil || !strings.HasPrefix(err.Error(), tt.err) {
					t.Errorf("%s: %v", tt.in, err)
				}
				continue
			}
			get := func(name string) string { return fs.Lookup(name).Value.String() }
			if err != nil || get("health-listen") != tt.listen || get("health-live-path") != tt.live || get("health-ready-path") != tt.ready {
				t.Errorf("%s: %v, %s %s %s", tt.in, err, get("health-listen"), get("health-live-path"), get("health-ready-path"))
			}
		}
	}
}
