package config

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spf13/pflag"

	"github.com/rootlink/rootlink/internal/cli"
)

type values struct {
	td    string
	ttl   time.Duration
	rate  float64
	roots []string
	on    bool
}

func flagSet(v *values) *pflag.FlagSet {
	fs := pflag.NewFlagSet("run", pflag.ContinueOnError)
	fs.StringVar(&v.td, "trust-domain", "", "")
	fs.DurationVar(&v.ttl, "svid-ttl", time.Hour, "")
	fs.Float64Var(&v.rate, "attest-rate", 1, "")
	fs.StringArrayVar(&v.roots, "ek-roots", []string{"default"}, "")
	fs.BoolVar(&v.on, "pin-ak", false, "")
	fs.String("config", "", "")
	return fs
}

const whole = `
# a comment
server {
  trust_domain = "file.example"
  svid_ttl     = "30m"
  attest_rate  = 2.5
  ek_roots     = ["a.pem", "b.pem"]
  pin_ak       = true
}
agent { anything = 1 }
plugins {
  NodeAttestor "tpmnode" {
    plugin_data {
      ek_roots = ["x"]
      nested { deep = 1 }
    }
  }
  WorkloadAttestor "other" {
    plugin_cmd = "/opt/other"
    plugin_checksum = "ABCD"
    plugin_args = ["agent"]
    enabled = false
  }
}
`

func TestFlagsWinOverTheFile(t *testing.T) {
	f, err := Parse("x.conf", []byte(whole))
	if err != nil {
		t.Fatal(err)
	}
	var v values
	fs := flagSet(&v)
	if err := fs.Parse([]string{"--trust-domain", "flag.example", "--ek-roots", "c.pem"}); err != nil {
		t.Fatal(err)
	}
	if err := f.Apply("server", fs); err != nil {
		t.Fatal(err)
	}
	if v.td != "flag.example" || !slices.Equal(v.roots, []string{"c.pem"}) {
		t.Errorf("the file won over the command line: %+v", v)
	}
	if v.ttl != 30*time.Minute || v.rate != 2.5 || !v.on {
		t.Errorf("the file's values are missing: %+v", v)
	}
	v = values{}
	if err := f.Apply("server", flagSet(&v)); err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(v.roots, []string{"a.pem", "b.pem"}) {
		t.Errorf("a list does not replace the default: %v", v.roots)
	}
}

func TestPlugins(t *testing.T) {
	f, err := Parse("x.conf", []byte(whole))
	if err != nil {
		t.Fatal(err)
	}
	ps := f.Plugins()
	if len(ps) != 2 {
		t.Fatalf("%d plugins", len(ps))
	}
	if p := ps[0]; p.Type != "NodeAttestor" || p.Name != "tpmnode" || !p.Enabled || p.Cmd != "" ||
		!strings.Contains(p.Data, `ek_roots = ["x"]`) || !strings.Contains(p.Data, "deep = 1") {
		t.Errorf("%+v", p)
	}
	if p := ps[1]; p.Enabled || p.Cmd != "/opt/other" || p.Checksum != "abcd" || !slices.Equal(p.Args, []string{"agent"}) {
		t.Errorf("%+v", p)
	}
}

func TestBuiltInPluginsOnly(t *testing.T) {
	builtin := map[string][]string{"NodeAttestor tpmnode": {"ek_roots"}}
	for _, tt := range []struct {
		name, in string
		line     int // 0: accepted
	}{
		{"keys are flags", "plugins {\n  NodeAttestor \"tpmnode\" {\n    plugin_data { ek_roots = [\"p.pem\"] }\n  }\n}", 0},
		{"disabled", "plugins {\n  KeyManager \"disk\" { enabled = false }\n}", 0},
		{"a flag that is no key of the plugin", "plugins {\n  NodeAttestor \"tpmnode\" {\n    plugin_data { trust_domain = \"x\" }\n  }\n}", 3},
		{"another plugin", "plugins {\n  KeyManager \"disk\" {}\n}", 2},
		{"a checksum of nothing", "plugins {\n  NodeAttestor \"tpmnode\" { plugin_checksum = \"00\" }\n}", 2},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f, err := Parse("x.conf", []byte(tt.in))
			if err != nil {
				t.Fatal(err)
			}
			var v values
			err = f.ApplyPlugins(flagSet(&v), builtin)
			if e, ok := errors.AsType[*Error](err); ok != (tt.line != 0) || ok && e.Line != tt.line {
				t.Errorf("%v, want line %d", err, tt.line)
			}
			if tt.name == "keys are flags" && !slices.Equal(v.roots, []string{"p.pem"}) {
				t.Error(v.roots)
			}
		})
	}
}

func TestRefusesWithTheLine(t *testing.T) {
	for _, tt := range []struct {
		name, in string
		line     int
		want     string
	}{
		{"syntax", "server {\n  a = \n}", 3, ""},
		{"unknown section", "\nservr {}", 2, `unknown section "servr"`},
		{"section as value", "server = 1", 1, "must be a block"},
		{"second section", "server {}\nserver {}", 2, "second server"},
		{"another program's file", "\nagent {\n  data_dir = \"x\"\n}", 2, "agent section and none for the server"},
		{"unknown key", "server {\n  trust_domian = \"x\"\n}", 2, `unknown key "trust_domian" in server`},
		{"hyphen", "server {\n  \"trust-domain\" = \"x\"\n}", 2, "unknown key"},
		{"not a file key", "server {\n  config = \"x\"\n}", 2, "unknown key"},
		{"twice", "server {\n  trust_domain = \"x\"\n  trust_domain = \"y\"\n}", 3, ""},
		{"block for value", "server {\n  trust_domain {}\n}", 2, "must be a value"},
		{"list for value", "server {\n  trust_domain = [\"a\", \"b\"]\n}", 2, "takes one value"},
		{"bad duration", "server {\n\n  svid_ttl = \"soon\"\n}", 3, "svid_ttl"},
		{"bad bool", "server {\n  pin_ak = \"maybe\"\n}", 2, "pin_ak"},
		{"nested list", "server {\n  ek_roots = [[\"a\"]]\n}", 2, "list of values"},
		{"plugin without name", "plugins {\n  NodeAttestor {}\n}", 2, `TYPE "NAME"`},
		{"second plugin", "plugins {\n  A \"b\" {}\n  A \"b\" {}\n}", 3, `second A "b"`},
		{"unknown plugin key", "plugins {\n  A \"b\" {\n    plugin_path = 1\n  }\n}", 3, `unknown key "plugin_path"`},
		{"plugin enabled", "plugins {\n  A \"b\" {\n    enabled = 3\n  }\n}", 3, "true or false"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f, err := Parse("x.conf", []byte(tt.in))
			if err == nil {
				err = f.Apply("server", flagSet(&values{}))
			}
			e, ok := errors.AsType[*Error](err)
			if !ok {
				t.Fatalf("accepted, or no place named: %v", err)
			}
			if e.Line != tt.line || !strings.Contains(e.Msg, tt.want) {
				t.Errorf("line %d, want %d: %v", e.Line, tt.line, e)
			}
			if cli.ExitCode(err) != cli.ExitUsage {
				t.Errorf("exit code %d", cli.ExitCode(err))
			}
		})
	}
}

func TestMissingFileIsNotAUsageError(t *testing.T) {
	_, err := Load(filepath.Join(t.TempDir(), "none"), false)
	if cli.ExitCode(err) != cli.ExitInternal || !strings.Contains(cli.HintOf(err), "--config") {
		t.Errorf("%v, code %d", err, cli.ExitCode(err))
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(whole))
	f.Add([]byte("server { a = \"${\" }"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if c, err := Parse("f", b); err == nil {
			_ = c.Apply("server", flagSet(&values{}))
		}
	})
}

// Whoever can write it names a program that runs as the daemon.
func TestRefusesFileThatAllCanWrite(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x.conf")
	if err := os.WriteFile(path, []byte("server {}"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Load(path, false); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, 0o646); err != nil {
		t.Fatal(err)
	}
	if _, err := Load(path, false); err == nil || !strings.Contains(err.Error(), "writable for every user") {
		t.Fatal(err)
	}
}
