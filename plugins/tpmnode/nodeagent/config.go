package nodeagent

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"slices"

	"github.com/hashicorp/hcl"
	"github.com/hashicorp/hcl/hcl/token"

	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/internal/hclkeys"
	"github.com/rootlink/rootlink/internal/measured"
	"github.com/rootlink/rootlink/internal/tpm"
	"github.com/rootlink/rootlink/internal/workload"
)

// hclConfig is the plugin's configuration as written.
type hclConfig struct {
	TPMPath           string                 `hcl:"tpm_path"`
	DataDir           string                 `hcl:"data_dir"`
	QuoterSocket      string                 `hcl:"quoter_socket"`
	AgentDataDir      string                 `hcl:"agent_data_dir"`
	RecorderGroup     string                 `hcl:"recorder_group"`
	HashBytesPerUID   int64                  `hcl:"hash_bytes_per_uid"`
	AllowFileSystems  []string               `hcl:"allow_file_systems"`
	AllowSharedDevice bool                   `hcl:"allow_shared_device"`
	EventLogPath      string                 `hcl:"event_log_path"`
	IMALogPath        string                 `hcl:"ima_log_path"`
	EKTypes           []string               `hcl:"ek_types"`
	UnusedKeys        map[string][]token.Pos `hcl:",unusedKeyPositions"`
}

// config is a checked configuration.
type config struct {
	trustDomain  string
	device       tpm.Options // without Log
	eventLogPath string
	imaLogPath   string
	voucher      *voucherConfig // nil without quoter_socket
}

// voucherConfig is the part about quoter_socket.
type voucherConfig struct {
	socket       string
	agentDataDir string
	recorderGID  uint32
	measure      workload.Options
}

const defaultDevice = "/dev/tpmrm0"

// parseConfig fails on everything it does not understand: a misspelt key must
// not leave its default in force unnoticed.
func parseConfig(trustDomain, text string, log *slog.Logger) (*config, error) {
	var h hclConfig
	if err := hcl.Decode(&h, text); err != nil {
		return nil, fmt.Errorf("cannot read the configuration: %w", err)
	}
	if err := hclkeys.Unknown(h.UnusedKeys); err != nil {
		return nil, err
	}
	if trustDomain == "" {
		return nil, errors.New("the host gave no trust domain")
	}
	if h.DataDir == "" {
		return nil, errors.New("data_dir is required: it keeps the attestation key between runs")
	}
	if !filepath.IsAbs(h.DataDir) {
		return nil, fmt.Errorf("data_dir %q is not an absolute path", h.DataDir)
	}
	c := &config{
		trustDomain:  trustDomain,
		eventLogPath: cmp.Or(h.EventLogPath, tpm.DefaultEventLogPath),
		imaLogPath:   cmp.Or(h.IMALogPath, tpm.DefaultIMALogPath),
		device: tpm.Options{
			Address:           cmp.Or(h.TPMPath, defaultDevice),
			DataDir:           h.DataDir,
			AllowSharedDevice: h.AllowSharedDevice,
		},
	}
	if _, err := tpm.ParseAddress(c.device.Address); err != nil {
		return nil, fmt.Errorf("tpm_path: %w", err)
	}
	for _, t := range h.EKTypes {
		if !slices.Contains(tpm.DefaultEKTypes(), tpm.EKType(t)) {
			return nil, fmt.Errorf("ek_types: unknown type %q, known are %v", t, tpm.DefaultEKTypes())
		}
		if slices.Contains(c.device.EKTypes, tpm.EKType(t)) {
			return nil, fmt.Errorf("ek_types: %q twice", t)
		}
		c.device.EKTypes = append(c.device.EKTypes, tpm.EKType(t))
	}
	var err error
	c.voucher, err = h.voucher(log)
	return c, err
}

// voucher checks the keys about quoter_socket. Without the socket the others
// would be ignored, which nobody means who writes them.
func (h *hclConfig) voucher(log *slog.Logger) (*voucherConfig, error) {
	if h.QuoterSocket == "" {
		for key, set := range map[string]bool{
			"agent_data_dir": h.AgentDataDir != "", "recorder_group": h.RecorderGroup != "",
			"hash_bytes_per_uid": h.HashBytesPerUID != 0, "allow_file_systems": len(h.AllowFileSystems) > 0,
		} {
			if set {
				return nil, fmt.Errorf("%s is about quoter_socket, which is not set", key)
			}
		}
		return nil, nil
	}
	v := &voucherConfig{
		socket: h.QuoterSocket, agentDataDir: h.AgentDataDir,
		measure: workload.Options{BytesPerUID: h.HashBytesPerUID, AllowFileSystems: h.AllowFileSystems},
	}
	switch {
	case !filepath.IsAbs(v.socket):
		return nil, fmt.Errorf("quoter_socket %q is not an absolute path", v.socket)
	case v.agentDataDir == "":
		return nil, errors.New("quoter_socket needs agent_data_dir: the data_dir of the SPIRE agent, whose SVID and trust bundle it reads there")
	case !filepath.IsAbs(v.agentDataDir):
		return nil, fmt.Errorf("agent_data_dir %q is not an absolute path", v.agentDataDir)
	case h.HashBytesPerUID < 0:
		return nil, errors.New("hash_bytes_per_uid is negative")
	}
	if err := cli.CheckSocketPath(v.socket); err != nil {
		return nil, fmt.Errorf("quoter_socket: %w", err)
	}
	var err error
	if v.recorderGID, err = measured.RecorderGroup(h.RecorderGroup, log); err != nil {
		return nil, fmt.Errorf("recorder_group: %w", err)
	}
	return v, nil
}
