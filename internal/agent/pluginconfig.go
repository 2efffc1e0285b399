package agent

import (
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/hashicorp/hcl"

	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/internal/config"
	"github.com/rootlink/rootlink/plugins/tpmnode/nodeagent"
	"github.com/rootlink/rootlink/plugins/tpmnode/wire"
	"github.com/rootlink/rootlink/plugins/workloadattestor/binary"
	"github.com/rootlink/rootlink/plugins/workloadattestor/unix"
)

// PluginConfig says which plugins the agent has and what they are configured
// with.
type PluginConfig struct {
	TrustDomain string
	DataDir     string
	TPM         string // /dev/tpmrm0, unix:PATH or tcp:HOST:PORT
	AllowShared bool
	EventLog    string
	IMALog      string

	// Reread returns the plugin blocks of the configuration file as it is now;
	// nil without a file.
	Reread func() ([]config.Plugin, error)

	nodeOptions []nodeagent.Option // benchmarks only

	node   config.Plugin // the node attestor; zero: the built-in one
	binary config.Plugin // WorkloadAttestor "binary"; zero: the built-in one
	others []config.Plugin
}

const (
	nodeAttestorType     = "NodeAttestor"
	workloadAttestorType = "WorkloadAttestor"
)

// Override takes the plugin blocks of a configuration file, whose data wins over
// the fields.
func (p *PluginConfig) Override(blocks []config.Plugin) error {
	for _, b := range blocks {
		skip, why := false, ""
		builtIn := b.Type == nodeAttestorType && b.Name == wire.PluginName || b.Type == workloadAttestorType && b.Name == binary.Name
		if !builtIn {
			skip, why = config.SPIREPlugin("agent", b)
		}
		switch {
		case !b.Enabled && builtIn && b.Name == binary.Name:
			return cli.Usage("", "line %d: plugin %s %q is needed; it cannot be switched off", b.Line, b.Type, b.Name)
		case !b.Enabled:
			if b.Type == nodeAttestorType && b.Name == wire.PluginName && !otherNodeAttestor(blocks) {
				return cli.Usage("name another node attestor's program with plugin_cmd", "line %d: the agent needs a node attestor, and %q is switched off", b.Line, b.Name)
			}
			continue
		case skip:
			continue
		case why != "":
			return cli.Usage("", "line %d: %s %q: %s", b.Line, b.Type, b.Name, why)
		case !builtIn && b.Cmd == "" && !isUnix(b):
			return cli.Usage(fmt.Sprintf("built in are NodeAttestor %q and WorkloadAttestors %q and %q; plugin_cmd names the program of any other", wire.PluginName, binary.Name, unix.Name),
				"line %d: there is no plugin %s %q", b.Line, b.Type, b.Name)
		}
		switch {
		case b.Type == nodeAttestorType && p.node.Name != "":
			return cli.Usage("leave one of the two out", "line %d: a second node attestor, %q beside %q", b.Line, b.Name, p.node.Name)
		case b.Type == nodeAttestorType:
			p.node = b
		case b.Type == workloadAttestorType && b.Name == binary.Name:
			p.binary = b
		case b.Type == workloadAttestorType:
			p.others = append(p.others, b)
		default:
			return cli.Usage("an agent loads NodeAttestor and WorkloadAttestor plugins", "line %d: plugins of type %s are not loaded", b.Line, b.Type)
		}
	}
	// Selectors are told apart by their type, which is the plugin's name.
	for _, b := range p.others {
		if b.Name == p.node.Name || b.Name == wire.PluginName || b.Name == "spiffe_id" {
			return cli.Usage("give it another name", "line %d: selectors of a workload attestor named %q would pass for those of nodes", b.Line, b.Name)
		}
	}
	return nil
}

// isUnix reports whether b is about the workload attestor that is built in and off
// unless a block names it.
func isUnix(b config.Plugin) bool {
	return b.Type == workloadAttestorType && b.Name == unix.Name && b.Cmd == ""
}

func otherNodeAttestor(blocks []config.Plugin) bool {
	return slices.ContainsFunc(blocks, func(b config.Plugin) bool {
		return b.Type == nodeAttestorType && b.Name != wire.PluginName && b.Enabled
	})
}

// block returns the block of a plugin; a built-in one needs none.
func (p *PluginConfig) block(typ, name string) (config.Plugin, bool) {
	switch {
	case typ == nodeAttestorType && (name == p.node.Name || p.node.Name == "" && name == wire.PluginName):
		b := p.node
		b.Type, b.Name = typ, name
		return b, true
	case typ == workloadAttestorType && name == binary.Name:
		return p.binary, true
	case typ == workloadAttestorType:
		for _, b := range p.others {
			if b.Name == name {
				return b, true
			}
		}
	}
	return config.Plugin{}, false
}

// programs names what is run for which plugin, for comparison.
func (p *PluginConfig) programs() string {
	var b strings.Builder
	for _, x := range append([]config.Plugin{p.node, p.binary}, p.others...) {
		if x.Cmd != "" || isUnix(x) {
			fmt.Fprintf(&b, "%q %q %q %q %q\n", x.Type, x.Name, x.Cmd, x.Args, x.Checksum)
		}
	}
	return b.String()
}

// data is what a plugin is configured with. For tpmnode that is the file's
// keys, then a line for each field that the file does not set.
func (p *PluginConfig) data(block config.Plugin) (string, error) {
	if block.Type != nodeAttestorType || block.Name != wire.PluginName {
		return block.Data, nil
	}
	var set map[string]any
	if err := hcl.Decode(&set, block.Data); err != nil {
		return "", fmt.Errorf("plugin_data of %s: %w", wire.PluginName, err)
	}
	b := &strings.Builder{}
	b.WriteString(block.Data + "\n")
	for _, kv := range [][2]string{
		{"tpm_path", p.TPM},
		{"data_dir", p.DataDir},
		{"event_log_path", p.log(p.EventLog)},
		{"ima_log_path", p.log(p.IMALog)},
	} {
		if _, ok := set[kv[0]]; ok || kv[1] == "" {
			continue
		}
		if strings.ContainsAny(kv[1], "\"\\\n\x00") || strings.Contains(kv[1], "${") {
			return "", cli.Usage("choose a path of plain characters", "%s: %q cannot be written in a configuration", kv[0], kv[1])
		}
		fmt.Fprintf(b, "%s = \"%s\"\n", kv[0], kv[1])
	}
	if _, ok := set["allow_shared_device"]; !ok && p.AllowShared {
		b.WriteString("allow_shared_device = true\n")
	}
	return b.String(), nil
}

// log keeps this machine's own logs from being sent for a TPM that is not this
// machine's: a software TPM on a socket saw none of these events.
func (p *PluginConfig) log(path string) string {
	if path == "" && slices.ContainsFunc([]string{"unix:", "tcp:"}, func(s string) bool { return strings.HasPrefix(p.TPM, s) }) {
		return os.DevNull
	}
	return path
}
