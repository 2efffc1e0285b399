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
)

// PluginConfig is what the built-in plugins are configured with.
type PluginConfig struct {
	TrustDomain string
	DataDir     string
	TPM         string // /dev/tpmrm0, unix:PATH or tcp:HOST:PORT
	AllowShared bool
	EventLog    string
	IMALog      string

	nodeOptions  []nodeagent.Option // benchmarks only
	nodeData     string             // plugin_data of the configuration file, wins over the fields
	workloadData string
}

// Override takes the plugin blocks of a configuration file.
func (p *PluginConfig) Override(blocks []config.Plugin) error {
	for _, b := range blocks {
		if !b.Enabled {
			return cli.Usage("", "line %d: plugin %s %q is built in and needed; it cannot be switched off", b.Line, b.Type, b.Name)
		}
		if b.Cmd != "" {
			return cli.Usage("leave plugin_cmd out: the plugin is built in", "line %d: plugin %s %q: this version loads no external plugins", b.Line, b.Type, b.Name)
		}
		switch [2]string{b.Type, b.Name} {
		case [2]string{"NodeAttestor", wire.PluginName}:
			p.nodeData = b.Data
		case [2]string{"WorkloadAttestor", binary.Name}:
			p.workloadData = b.Data
		default:
			return cli.Usage(fmt.Sprintf("the plugins of this agent are NodeAttestor %q and WorkloadAttestor %q", wire.PluginName, binary.Name),
				"line %d: there is no plugin %s %q", b.Line, b.Type, b.Name)
		}
	}
	return nil
}

// nodeAttestor is the HCL for the node attestor: the file's keys, then a line
// for each field that the file does not set.
func (p *PluginConfig) nodeAttestor() (string, error) {
	var set map[string]any
	if err := hcl.Decode(&set, p.nodeData); err != nil {
		return "", fmt.Errorf("plugin_data of %s: %w", wire.PluginName, err)
	}
	b := &strings.Builder{}
	b.WriteString(p.nodeData + "\n")
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
